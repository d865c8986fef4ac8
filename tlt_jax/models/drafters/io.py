"""A drafter as a directory: `config.json` and `drafter.safetensors`.

Directories in the layouts of other projects are read as well (`drafter_hf`).
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.formats import convert, hf_settings, json_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "drafter.safetensors"
# The second says what the layer is, too; the first is that of architecture `tlt`.
_FORMAT, _FORMAT_WITH_LAYER = 1, 2
# What drafters of earlier versions do not say.
_DEFAULTS = {"block_size": 0, "markov_rank": 0}
_MOST_LAYERS = 64
# Scalars that stand beside the weights where they were measured.
_MEASURED = ("sharpness", "tau")
_SETTINGS = ("feature_layers", "output_norm", "draft_vocab_size", "max_length")


def save(
    directory: str | os.PathLike,
    params: drafter.DrafterParams,
    cfg: drafter.DrafterConfig,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a drafter; the directory appears complete, in place of an older one.

    Args:
      directory: where.
      params: the weights, with `draft_ids` where the vocabulary is reduced, and
        `sharpness` and `tau` where they were measured.
      cfg: the drafter.
      about: what else shall stand in `config.json`: objective, target version, ...

    Raises:
      ValueError: the directory holds something else.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and not (directory / CONFIG_FILE).is_file():
        raise ValueError(
            f"{directory} holds something that is no drafter: name another directory."
        )
    if cfg.architecture == "tlt":
        settings = {name: getattr(cfg, name) for name in ("target", *_SETTINGS)}
        record = {"format": _FORMAT, **settings}
    else:
        record = {"format": _FORMAT_WITH_LAYER, **dataclasses.asdict(cfg)}
    record["about"] = dict(about or {})
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = {"prefix": f".{directory.name}.", "suffix": ".partial"}
    with tempfile.TemporaryDirectory(dir=directory.parent, **aside) as temp:
        made = pathlib.Path(temp) / "made"
        made.mkdir()
        (made / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
        named = _named(params).items()
        arrays = {name: np.asarray(leaf, order="C") for name, leaf in named}
        safetensors.numpy.save_file(arrays, made / WEIGHTS_FILE)
        if directory.exists():
            shutil.move(directory, pathlib.Path(temp) / "old")
        made.rename(directory)


def load(
    directory: str | os.PathLike,
    target: model_config.ModelConfig,
    dtype=jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[drafter.DrafterConfig, drafter.DrafterParams]:
    """Read a drafter and its weights for `target`.

    Args:
      directory: of `save`, or of another project: EAGLE, EAGLE-3, speculators.
      target: the model that shall verify.
      dtype: of the weights.
      sharding: of every leaf; None: the first device holds them.

    Raises:
      ValueError: there is none, it is damaged, or of another target or vocabulary.
    """
    if drafter_hf.layout_of(directory) is not None:
        cfg, params = drafter_hf.load(directory, target)
    else:
        cfg, params = _load(pathlib.Path(directory), target)

    def place(path, leaf):
        is_kept = _name(path) in ("draft_ids", *_MEASURED)
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            raise ValueError(
                f"{directory}: {_name(path)} holds weights that are not finite: it is "
                "damaged, or of a training that diverged."
            )
        return jax.device_put(leaf if is_kept else leaf.astype(dtype), sharding)

    return cfg, jax.tree_util.tree_map_with_path(place, params)


def _load(directory: pathlib.Path, target: model_config.ModelConfig):
    """Read what `save` wrote, in the file's types."""
    cfg = read_config(directory, target)
    wanted = drafter.describe(cfg)
    if cfg.draft_vocab_size:
        wanted = wanted.replace(draft_ids=np.zeros(cfg.draft_vocab_size, np.int32))
    arrays = _read_weights(directory / WEIGHTS_FILE)
    there = [name for name in _MEASURED if name in arrays]
    wanted = wanted.replace(**{name: np.float32(1) for name in there})
    shapes = {name: tuple(leaf.shape) for name, leaf in _named(wanted).items()}
    present = {name: array.shape for name, array in arrays.items()}
    if present != shapes:
        both = {*present, *shapes}
        names = sorted(n for n in both if present.get(n) != shapes.get(n))
        name = names[0]
        raise ValueError(
            f"{directory / WEIGHTS_FILE} does not fit its config.json: {name} is "
            f"{present.get(name, 'absent')} and should be {shapes.get(name, 'absent')} "
            f"({len(names)} tensors differ). Export the drafter again."
        )
    for name, array in arrays.items():
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if is_float == (name == "draft_ids"):
            raise ValueError(
                f"{directory / WEIGHTS_FILE}: {name} is {array.dtype}: export the "
                "drafter again."
            )
    _check_ids(directory, arrays.get("draft_ids"), target.vocab_size)
    for name in there:
        if not 0 < arrays[name] < np.inf:
            raise ValueError(
                f"{directory} has {name} {arrays[name]}, which should be positive: "
                "export the drafter again."
            )
    named = {name: arrays[name] for name in shapes}
    return cfg, jax.tree.unflatten(jax.tree.structure(wanted), named.values())


def read_config(
    directory: str | os.PathLike, target: model_config.ModelConfig
) -> drafter.DrafterConfig:
    """Read what a drafter is, without its weights.

    Raises:
      ValueError: as `load`.
    """
    if drafter_hf.layout_of(directory) is not None:
        return drafter_hf.read_config(directory, target)
    path = pathlib.Path(directory) / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"{directory} holds no drafter ({CONFIG_FILE} is missing): give the "
            "directory that `python -m tlt_jax.train_drafter` exported, or one with a "
            "published EAGLE, EAGLE-3 or speculators drafter."
        )
    try:
        record = json_file.read(path, "export the drafter again")
    except ValueError as error:
        raise ValueError(f"{path} is not a drafter's: {error}") from error
    names = ("format", "target", *_SETTINGS)
    absent = [name for name in names if name not in record]
    if absent:
        raise ValueError(
            f"{path} is not a drafter's (no {absent[0]}): export the drafter again."
        )
    given = {name: record[name] for name in names}
    if given["format"] not in (_FORMAT, _FORMAT_WITH_LAYER):
        raise ValueError(
            f"{path} has format {json_file.show(given['format'])}, and {_FORMAT} and "
            f"{_FORMAT_WITH_LAYER} are read here: export the drafter with this version."
        )
    if given["target"] != drafter.identify(target):
        raise ValueError(
            f"{directory} is a drafter of another target, "
            f"{json_file.word(given['target'])}, not of "
            f"{drafter.identify(target)}: train one for this model, or give the model "
            "that it was trained for."
        )
    settings = {name: given[name] for name in _SETTINGS}
    try:
        if given["format"] == _FORMAT_WITH_LAYER:
            names = [field.name for field in dataclasses.fields(drafter.DrafterConfig)]
            described = _DEFAULTS | record
            cfg = from_json({name: described[name] for name in names})
            _check_layer(cfg, target)
            return cfg
        settings["feature_layers"] = layers_of(settings)
        return drafter.of_target(target, **settings)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a drafter's: {convert.told(error).rstrip('.')}."
        ) from error


def from_json(fields: Mapping[str, Any]) -> drafter.DrafterConfig:
    """Rebuild a description from what JSON made of `dataclasses.asdict`."""
    layer = model_config.ModelConfig.from_json(fields["layer"])
    layers = layers_of(fields)
    return drafter.DrafterConfig(
        **dict(fields) | {"layer": layer, "feature_layers": layers}
    )


def layers_of(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Read `feature_layers`, a list of numbers of layers.

    Raises:
      ValueError: it is anything else.
    """
    layers = fields["feature_layers"]
    if not isinstance(layers, list | tuple) or len(layers) > _MOST_LAYERS:
        raise ValueError(
            f"feature_layers={json_file.show(layers)}; accepted: a list of up to "
            f"{_MOST_LAYERS} layers"
        )
    key = "feature_layers"
    return tuple(hf_settings.integer({key: i}, key, at_least=0) for i in layers)


def _check_layer(cfg: drafter.DrafterConfig, target: model_config.ModelConfig) -> None:
    """Refuse a layer that does not continue the target's features and tokens."""
    for name in ("d_model", "vocab_size"):
        own, wanted = getattr(cfg.layer, name), getattr(target, name)
        if own != wanted:
            raise ValueError(f"its layer has {name}={own}, and the target {wanted}")
    absent = [i for i in cfg.feature_layers if i >= target.num_layers]
    if absent:
        raise ValueError(
            f"feature_layers names {absent}, and the target has {target.num_layers}"
        )


def about(directory: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` was told about the drafter's making."""
    path = pathlib.Path(directory) / CONFIG_FILE
    found = json_file.read(path, "export the drafter again").get("about")
    return found if isinstance(found, dict) else {}


def _read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        convert.check_header(path)
        return safetensors.numpy.load_file(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        # The library has no word for some types of numbers: a KeyError.
        raise ValueError(
            f"{path} is missing, truncated or corrupt ({convert.told(error)}): export "
            "the drafter again."
        ) from error


def _check_ids(directory, ids: np.ndarray | None, vocab_size: int) -> None:
    if ids is None:
        return
    if ids.dtype.kind != "i" or np.any(np.diff(ids) <= 0):
        raise ValueError(
            f"{directory} has draft_ids that do not rise: export the drafter again."
        )
    if ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(
            f"{directory} has draft_ids from {ids[0]} to {ids[-1]}, outside the "
            f"target's vocabulary of {vocab_size}: export the drafter again."
        )


def _named(params: drafter.DrafterParams) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return ".".join(key.name for key in path)

"""Drafters as directories of other projects: Hugging Face configs and safetensors."""

import functools
import importlib.util
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter, layout_config, layouts
from tlt_jax.models.formats import convert, hf_config

_PICKLED = "pytorch_model.bin"


def layout_of(directory: str | os.PathLike) -> layouts.Layout | None:
    """Tell the layout of a directory; None: it has none of the published ones."""
    try:
        config = hf_config.read_json(os.path.join(directory, "config.json"))
    except ValueError:
        return None
    return layout_config.layout_of(config)


def read_config(
    directory: str | os.PathLike, target: model_config.ModelConfig
) -> drafter.DrafterConfig:
    """Read what a published drafter is, without its weights.

    Raises:
      ValueError: as `load`.
    """
    return _read(directory, target)[0]


def load(
    directory: str | os.PathLike, target: model_config.ModelConfig
) -> tuple[drafter.DrafterConfig, drafter.DrafterParams]:
    """Read a published drafter: `eagle`, `eagle3` or `speculators`.

    Its embedding is not read, and in `eagle` its head neither: they are copies of the
    target's.

    Args:
      directory: with config.json, and safetensors or a pytorch_model.bin; the latter
        needs torch, which reads nothing but tensors of it.
      target: the model that shall verify.

    Returns:
      The drafter, and its weights in the file's types, on the host.

    Raises:
      ValueError: naming what is missing, damaged, not computed here, or of another
        target.
    """
    cfg, layout, tensors = _read(directory, target)
    try:
        return cfg, layouts.from_tensors(dict(tensors), cfg, layout)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def save(
    directory: str | os.PathLike,
    params: drafter.DrafterParams,
    cfg: drafter.DrafterConfig,
    layout: layouts.Layout,
    target: model_config.ModelConfig,
    *,
    head: Any = None,
    dtype: str = "bfloat16",
    verifier: str = "",
    num_speculative_tokens: int = 5,
) -> None:
    """Write a drafter for other engines; the directory is complete or absent.

    Args:
      directory: absent or empty.
      params: with `draft_ids` where the vocabulary is reduced.
      cfg: the drafter.
      layout: which.
      target: the model that it was made for.
      head: `[Vd, D]` of the target, for a drafter without one.
      dtype: of the weights, one of `convert.DTYPES`.
      verifier: name or directory of the target; vLLM finds it by that.
      num_speculative_tokens: that vLLM shall draft.

    Raises:
      ValueError: the layout has no place for what this drafter computes, `directory` is
        not empty, or the dtype unknown.
      OSError: the disk is full or not writable.
    """
    if str(dtype) not in convert.DTYPES:
        raise ValueError(f"dtype={dtype!r}; accepted: {', '.join(convert.DTYPES)}.")
    layouts.check_expressible(cfg, layout, target.num_layers)
    config = layout_config.to_config(
        *(cfg, layout, target),
        dtype=dtype,
        verifier=verifier,
        num_speculative_tokens=num_speculative_tokens,
    )
    tensors = {
        name: array if array.dtype.kind in "ib" else array.astype(jnp.dtype(dtype))
        for name, array in layouts.to_tensors(params, cfg, layout, head).items()
    }
    with convert.writing(directory, sum(x.nbytes for x in tensors.values())) as made:
        path = pathlib.Path(made) / "model.safetensors"
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        convert.write_json(made, "config.json", config)


def _read(directory: str | os.PathLike, target: model_config.ModelConfig):
    """Return the description, the layout, and what reads the tensors that count."""
    directory = os.fspath(directory)
    config = hf_config.read_json(os.path.join(directory, "config.json"))
    layout = layout_config.layout_of(config)
    if layout is None:
        raise ValueError(f"{directory} has none of the published layouts of drafters.")
    places = _places(directory)
    names = frozenset(places) - layouts.NOT_READ[layout]
    try:
        cfg = layout_config.from_config(config, layout, target, names)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return cfg, layout, ((name, places[name](name)) for name in sorted(names))


def _places(directory: str) -> dict[str, Any]:
    """What reads each tensor, by its name."""
    pickled = os.path.join(directory, _PICKLED)
    single = ("model.safetensors", "model.safetensors.index.json")
    has_safetensors = any(
        os.path.exists(os.path.join(directory, name)) for name in single
    )
    if not has_safetensors and os.path.exists(pickled):
        tensors = _unpickled(pickled)
        return dict.fromkeys(tensors, tensors.__getitem__)
    places: dict[str, Any] = {}
    for path in convert.weight_files(directory):
        file = convert.open_safetensors(path)
        places |= dict.fromkeys(file.keys(), functools.partial(_tensor, file, path))
    return places


def _tensor(file, path: str, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        # What the library says of a type of numbers that NumPy has not.
        raise ValueError(
            f"{name} in {path} cannot be read ({convert.told(error)}): download it "
            "again."
        ) from error


def _unpickled(path: str) -> dict[str, np.ndarray]:
    """Read torch's own format, as EAGLE's authors publish it."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"{path} can be read by torch alone, which is not installed: `pip install "
            "torch`, or convert it to model.safetensors elsewhere."
        )
    # Here, because nothing else needs it.
    import torch

    def array_of(tensor):
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): array_of(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # whatever a damaged file makes the library meet
        raise ValueError(
            f"{path} is truncated, corrupt, or holds more than tensors "
            f"({convert.told(error)}): download it again."
        ) from error

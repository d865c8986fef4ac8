"""Weights between Hugging Face directories and `Params`, tensor by tensor."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import hf_config, json_file
from tlt_jax.models.formats import layout as model_layout

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def load(
    directory: str | os.PathLike,
    cfg: model_config.ModelConfig,
    dtype=jnp.float32,
    shardings: model_params.Params | None = None,
) -> model_params.Params:
    """Load a directory's safetensors.

    Args:
      directory: with `model.safetensors`, or `model.safetensors.index.json` and the
        files that it names.
      cfg: the model; every tensor must belong to it.
      dtype: of the result, whatever the files hold.
      shardings: a sharding per leaf; a process then reads only the slices of the
        shards that it holds. None: everything on the default device.

    Raises:
      ValueError: naming tensors that are missing, surplus or misshapen, or a file that
        is truncated.
    """
    source = _Safetensors(directory)
    _check_tied_head(source, cfg)
    leaves = model_layout.layout(cfg, model_layout.hf_names(cfg))
    return model_layout.assemble(leaves, source, dtype, shardings)


def save(
    params: model_params.Params,
    cfg: model_config.ModelConfig,
    directory: str | os.PathLike,
    tokenizer_source: str | os.PathLike | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a directory that `transformers` and serving engines load.

    Everything is written to a temporary sibling that is renamed at the end: whatever
    happens, `directory` is complete or absent.

    Args:
      params: layers stacked or not.
      cfg: the model.
      directory: absent or empty.
      tokenizer_source: a directory whose tokenizer files are copied.
      dtype: of the files, one of `DTYPES`.
      max_shard_bytes: a file with more is split at a tensor's border.

    Raises:
      ValueError: if `directory` is not empty, the dtype unknown, or no Hugging Face
        model computes `cfg`.
      OSError: if the disk is full or not writable.
    """
    if str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; accepted: {', '.join(DTYPES)}.")
    config = hf_config.to_hf(cfg, dtype)
    num_bytes = model_params.count(cfg) * jnp.dtype(dtype).itemsize
    with writing(directory, num_bytes) as temporary:
        _write_weights(params, cfg, temporary, jnp.dtype(dtype), max_shard_bytes)
        write_json(temporary, "config.json", config)
        write_json(temporary, "generation_config.json", hf_config.to_hf_generation(cfg))
        for file in TOKENIZER_FILES if tokenizer_source is not None else ():
            path = os.path.join(tokenizer_source, file)
            if os.path.exists(path):
                shutil.copyfile(path, os.path.join(temporary, file))


@contextlib.contextmanager
def writing(directory: str | os.PathLike, num_bytes: int) -> Iterator[str]:
    """Give a temporary sibling that becomes `directory` if all goes well.

    Args:
      directory: absent or empty.
      num_bytes: that will be written.

    Raises:
      ValueError: if `directory` is not empty.
      OSError: if the disk is full or not writable.
    """
    directory = os.path.abspath(directory)
    if os.path.exists(directory) and (
        not os.path.isdir(directory) or os.listdir(directory)
    ):
        raise ValueError(
            f"{directory} exists and is not empty: name another or remove it."
        )
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(
            f"{directory} needs {num_bytes / 1e9:.2f} GB and {parent} has "
            f"{free / 1e9:.2f} GB free: make room or write elsewhere."
        )
    name = os.path.basename(directory)
    temporary = tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent)
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.rename(temporary, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"could not write {directory} ({error}): nothing was left behind; make "
            "room or write elsewhere."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def named_tensors(
    params: model_params.Params, cfg: model_config.ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the Hugging Face form, layer by layer, on the host."""
    leaves = model_layout.layout(cfg, model_layout.hf_names(cfg))
    yield _single(leaves.embed, params.embed)
    for i in range(cfg.num_layers):
        for field in dataclasses.fields(model_params.LayerParams):
            leaf = getattr(leaves.layers, field.name)
            if leaf is None:
                continue
            block = _layer(params.layers, field.name, i)
            for piece in leaf.pieces:
                if piece.start[0] == i:
                    bounds = zip(piece.start[1:], piece.block[1:], strict=True)
                    index = tuple(slice(start, start + n) for start, n in bounds)
                    yield piece.name, block[index].reshape(piece.shape)
    yield _single(leaves.final_norm, params.final_norm)
    if leaves.lm_head is not None:
        yield _single(leaves.lm_head, params.lm_head)


def _single(leaf: model_layout.Leaf, value: jax.Array) -> tuple[str, np.ndarray]:
    return leaf.pieces[0].name, np.asarray(value)


def _layer(layers, field: str, i: int) -> np.ndarray:
    if isinstance(layers, tuple):
        return np.asarray(getattr(layers[i], field))
    # A traced index: one program per leaf, not one per layer, and only one layer's
    # weights on the host.
    leaf, index = getattr(layers, field), jnp.asarray(i, jnp.int32)
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False))


class _Safetensors:
    """The tensors of a directory, without buffers that no leaf needs."""

    _BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")

    def __init__(self, directory: str | os.PathLike):
        self._files = {}
        self._shapes = {}
        for path, listed in weight_files(os.fspath(directory)).items():
            file = open_safetensors(path)
            present = set(file.keys())
            if listed is not None and listed != present:
                raise ValueError(
                    f"{path} does not hold what the index says; they differ in "
                    f"{model_layout.some(sorted(listed ^ present))}: download both."
                )
            for name in file.keys():
                if self._BUFFERS.search(name):
                    continue
                view = file.get_slice(name)
                if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{name} in {path} is {view.get_dtype()}; accepted: F64, F32, "
                        "F16, BF16 (quantised weights: give the unquantised model or "
                        "a GGUF file)."
                    )
                self._files[name] = file
                self._shapes[name] = tuple(view.get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._files[name].get_slice(name)[index]

    def forget(self, name: str) -> None:
        """Leave out a tensor that is known to repeat another."""
        del self._shapes[name]


def weight_files(directory: str) -> dict[str, set[str] | None]:
    """Paths of the weight files, each with the names that the index lists for it."""
    single = os.path.join(directory, "model.safetensors")
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.exists(index):
        if os.path.exists(single):
            return {single: None}
        raise ValueError(
            f"{directory} holds neither model.safetensors nor "
            "model.safetensors.index.json: only safetensors are read."
        )
    weight_map = hf_config.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map: download it again.")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.\w+", file):
            raise ValueError(
                f"{index} names {json_file.show(file)}, outside its directory or no "
                "file: refused."
            )
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise ValueError(f"{path} is missing (named by {index}): download it.")
        files.setdefault(path, set()).add(name)
    if os.path.exists(single) and single not in files:
        raise ValueError(
            f"{directory} holds model.safetensors and an index of other files, "
            f"{model_layout.some([os.path.basename(f) for f in files], 2)}: remove the "
            "one that is not meant."
        )
    return files


def open_safetensors(path: str) -> safetensors.safe_open:
    """Open a file; `ValueError` if it is damaged."""
    try:
        check_header(path)
        return safetensors.safe_open(path, "np")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({told(error)}): download it again."
        ) from error


def check_header(path: str | os.PathLike) -> None:
    """Refuse a header that names a tensor twice, of which readers take either.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"a header of {length} bytes")
        json_file.parse(file.read(length))


def told(error: Exception) -> str:
    """Say an error of a library in one line, and not a long one."""
    return " ".join(str(error).split())[:200]


def _check_tied_head(source: _Safetensors, cfg: model_config.ModelConfig) -> None:
    """Accept a stored copy of a tied head if it is one."""
    head, embed = model_layout.HF_NAMES["lm_head"], model_layout.HF_NAMES["embed"]
    shapes = source.shapes()
    if not cfg.tie_embeddings or head not in shapes or embed not in shapes:
        return
    equal = shapes[head] == shapes[embed]
    step = 4096  # rows at a time: the table may be large
    for low in range(0, shapes[embed][0] if equal else 0, step):
        index = (slice(low, min(low + step, shapes[embed][0])), slice(0, cfg.d_model))
        equal &= np.array_equal(source.read(head, index), source.read(embed, index))
    if not equal:
        raise ValueError(
            f"tie_word_embeddings is true but {head} differs from {embed}: set "
            "tie_word_embeddings to false in config.json or remove the tensor."
        )
    source.forget(head)


def _write_weights(params, cfg, directory: str, dtype, max_shard_bytes: int) -> None:
    """Write safetensors, a new file where the next tensor would exceed the limit."""
    pending, shards, total = {}, [], 0

    def flush():
        path = os.path.join(directory, f"shard-{len(shards)}")
        safetensors.numpy.save_file(pending, path, metadata={"format": "pt"})
        shards.append(tuple(pending))
        pending.clear()

    for name, tensor in named_tensors(params, cfg):
        tensor = np.ascontiguousarray(tensor.astype(dtype))
        size = sum(other.nbytes for other in pending.values())
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        total += tensor.nbytes
    flush()
    count, files = len(shards), ["model.safetensors"]
    if count > 1:
        files = [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        places = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in places for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory, "model.safetensors.index.json", index)
    for i, file in enumerate(files):
        path = os.path.join(directory, file)
        os.rename(os.path.join(directory, f"shard-{i}"), path)
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())


def write_json(directory: str, name: str, value: Mapping) -> None:
    """Write a JSON object as the file `name`."""
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")

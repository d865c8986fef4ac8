"""Offline training of a drafter: whole runs, killed and taken up again."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import smollm2_drafter, tiny_drafter
from tests import command_lines, tiny_runs
from tlt_jax import export, policy, speculation, train_drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.drafters import shipped
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.runtime import failures, stopping
from tlt_jax.settings import drafter_run, schema
from tlt_jax.specdec import noise
from tlt_jax.specdec.texts import shards
from tlt_jax.workdir import metrics, record_keys

NUM_STEPS = 8


def settings(**overrides):
    config = tiny_drafter.get_config()
    config.num_steps = NUM_STEPS
    config.pretrain.steps = 0
    config.texts.num = 40
    config.texts.num_held_out = 8
    config.texts.max_new_tokens = 12
    config.texts.max_batch = 2
    config.texts.dtype = "float32"
    config.batch.row_tokens = 32
    config.batch.row_bases = 24
    config.batch.head_chunk = 32
    config.checkpoint.every = 3
    config.log.every = 2
    config.log.progress = "off"
    config.eval.every = 6
    config.update_from_flattened_dict(overrides)
    return drafter_run.load(config.to_dict())


class Killed(Exception):
    """In place of a signal."""


def killed_at(monkeypatch, owner, name, call):
    """Raise at a function's `call`-th call."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, train_drafter.train(settings(), directory)


def comparable(directory):
    rows = metrics.read(directory)
    return [{k: v for k, v in row.items() if "time/" not in k} for row in rows]


def test_run_leaves_its_record_plot_and_drafter(whole):
    directory, last = whole
    rows = metrics.read(directory)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert tiny_runs.unknown_keys(rows, record_keys.DRAFTER) == []
    assert rows[-1]["drafter/loss"] < rows[1]["drafter/loss"]
    assert len(last["eval/coupled_rate_by_depth"]) == 4
    assert 1.0 <= last["eval/coupled_accept_length"] <= 5.0
    assert rows[0]["texts/num"] == 40
    assert (directory / "plots" / "drafter.png").stat().st_size > 10_000
    target = policy.load(str(directory / "target"))
    cfg, params = drafter_io.load(directory / "drafter", target.config)
    assert cfg.feature_layers == (0, 1) and cfg.max_length == 20
    assert params.fuse.shape == (64, 128)
    assert params.sharpness == last["eval/sharpness"]
    assert params.tau == np.float32(last["eval/tau"])
    record = json.loads((directory / "drafter" / "config.json").read_text())
    assert record["about"]["objective"]["token_loss"] == "lk_hybrid"
    assert record["about"]["num_steps"] == NUM_STEPS


def test_killed_run_goes_on_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    """Killed once while texts are written, and once between two checkpoints."""
    directory, _ = whole
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, shards.Shards, "append", 2)
        train_drafter.train(settings(), tmp_path)
    with pytest.raises(schema.ConfigError, match="texts made with texts=.*not "):
        train_drafter.train(settings(**{"texts.max_new_tokens": 10}), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, train_drafter._Trainer, "_row", 3)
        train_drafter.train(settings(), tmp_path)
    stop = stopping.Stop()
    with monkeypatch.context() as patch, pytest.raises(failures.Stopped) as raised:
        row_of = train_drafter._Trainer._row

        def row(*arguments):
            stop.signal = 2
            return row_of(*arguments)

        patch.setattr(train_drafter._Trainer, "_row", row)
        train_drafter.train(settings(), tmp_path, stop)
    assert raised.value.status == 130
    assert "of 8 is saved in" in str(raised.value)
    train_drafter.train(settings(), tmp_path)
    # Now it is complete.
    with monkeypatch.context() as patch:
        patch.setattr(train_drafter, "_Trainer", None)
        assert train_drafter.train(settings(), tmp_path)["step"] == NUM_STEPS
    assert comparable(tmp_path) == comparable(directory)
    loaded = [
        drafter_io.load(path / "drafter", policy.load(str(path / "target")).config)[1]
        for path in (directory, tmp_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_a_killed_block_drafter_goes_on_as_if_it_had_not_been(
    whole, tmp_path, monkeypatch
):
    """On the texts of the other run: of their drafter they know nothing."""
    run = settings(**{"drafter.architecture": "block"})
    for name in ("run", "whole"):
        for folder in ("target", "texts"):
            shutil.copytree(whole[0] / folder, tmp_path / name / folder)
    last = train_drafter.train(run, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, train_drafter._Trainer, "_row", 3)
        train_drafter.train(run, tmp_path / "run")
    train_drafter.train(run, tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    model = policy.load(str(tmp_path / "run" / "target")).config
    (cfg, loaded), (_, wanted) = (
        drafter_io.load(tmp_path / name / "drafter", model) for name in ("run", "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
    # As deep as what is measured, whatever the recipe says of unrolled steps.
    assert (cfg.block_size, run.objective.num_steps) == (4, 3)
    assert len(last["drafter/top1_acc"]) == len(last["eval/coupled_rate_by_depth"]) == 4
    assert np.abs(loaded.block.markov_out).max() > 0


def test_rounds_bring_new_texts_and_a_killed_run_goes_on(whole, tmp_path, monkeypatch):
    """Steps 1 to 3, 4 to 6 and 7 to 8 have texts of their own and those before."""
    changes = {"texts.num": 32, "texts.round_steps": 3, "texts.kept_rounds": 2}
    target = str(whole[0] / "target")
    run = settings(**changes | {"average": 0.9, "model.spec": target})
    train_drafter.train(run, tmp_path / "whole")
    for owner, name, call in (
        (train_drafter._Trainer, "_row", 3),
        # Before the texts of the last round are kept.
        (shards.Shards, "append", 1),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, owner, name, call)
            train_drafter.train(run, tmp_path / "run")
    train_drafter.train(run, tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    model = policy.load(target).config
    loaded, wanted = (
        drafter_io.load(tmp_path / name / "drafter", model)[1]
        for name in ("run", "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
    held_out = [offline_texts.HELD_OUT + i for i in range(8)]
    for name in ("run", "whole"):
        there = shards.Shards(tmp_path / name / "texts", "float32").text_ids
        assert there == [*range(32, 96), *held_out]


def test_template_options_reach_the_prompts_of_texts(whole, tmp_path):
    directory, _ = whole
    options = settings(**{"texts.template_options": {"thinking": True}})
    shutil.copytree(directory / "target", tmp_path / "target")
    with pytest.raises(ValueError, match="'.*' is text, which goes without a templ"):
        train_drafter.train(options, tmp_path)
    # Texts of other prompts are not taken for these.
    with pytest.raises(schema.ConfigError, match="made with template_options={'think"):
        train_drafter.train(settings(), tmp_path)


def test_texts_are_what_their_features_and_noise_draw(whole):
    """Whoever measures a drafter may rely on it: features, keys, positions agree."""
    directory, _ = whole
    buffer = shards.Shards(directory / "texts", "float32")
    head = np.asarray(policy.load(str(directory / "target")).params.head)
    num_drawn = 0
    for i in range(0, len(buffer), 5):
        record = buffer.read(i)
        places = np.arange(record.response_start, len(record.tokens))
        keys = np.broadcast_to(record.key, (len(places), 2))
        gumbel = noise.gumbel(keys, places.astype(np.int32), len(head))
        drawn = np.argmax(record.hidden[places - 1] @ head.T + gumbel, axis=-1)
        np.testing.assert_array_equal(drawn, record.tokens[places])
        num_drawn += len(places)
    assert num_drawn > 50


def test_a_trained_drafter_can_be_shipped_under_a_name(whole, tmp_path, monkeypatch):
    """And is found by it, with what it was made of and what was measured."""
    directory, last = whole
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    export.ship_drafter(str(directory), "tiny-model", "What it brings.\n")
    target = policy.load(str(directory / "target"))
    found = speculation.load("tiny-model", target.config)
    _, wanted = drafter_io.load(directory / "drafter", target.config)
    np.testing.assert_array_equal(
        found.params.join, wanted.join.astype("bfloat16").astype("float32")
    )
    assert found.params.tau == wanted.tau
    assert speculation.folder("tiny-model") == str(tmp_path / "tiny-model")
    card = (tmp_path / "tiny-model" / "CARD.md").read_text()
    assert "| trained | 8 steps of up to 48 positions, tlt_jax" in card
    assert "| texts | 40 answers of the target at temperature 1, of up to 12" in card
    length = last["eval/coupled_accept_length"]
    assert f"chains of 4 | accept length {length:.3f} coupled" in card
    assert card.endswith("\n\nWhat it brings.\n")
    with pytest.raises(ValueError, match="give a name, not a path"):
        export.ship_drafter(str(directory), "a/b")


def test_other_settings_are_refused_in_the_same_directory(whole):
    directory, _ = whole
    with pytest.raises(schema.ConfigError, match="seed=0, not 1"):
        train_drafter.train(settings(seed=1), directory)


def test_settings_that_cannot_be_used_are_refused():
    for changes, message in (
        ({"texts.tasks": ()}, "texts.tasks is empty"),
        ({"drafter.features": "last"}, "name layers with features='layers'"),
        ({"objective.name": "eagle2"}, "did you mean 'eagle"),
        ({"objective.decay": 0.0}, "objective.decay=0.0 is out of range"),
    ):
        with pytest.raises(schema.ConfigError, match=message):
            settings(**changes)


def test_recipe_of_the_real_model_is_valid():
    run = drafter_run.load(smollm2_drafter.get_config().to_dict())
    assert run.texts.tasks.count("chat") * 2 == len(run.texts.tasks)


def test_command_names_a_wrong_key(tmp_path):
    (result,) = command_lines.start(
        [
            [
                "tlt_jax.train_drafter",
                "--config=configs/tiny_drafter.py",
                f"--workdir={tmp_path / 'run'}",
                "--config.texts.nun=4",
            ]
        ],
        stop=False,
    )
    assert result.status == 2
    assert "did you mean 'texts.num'" in result.errors

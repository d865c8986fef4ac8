"""Checkpoints of a drafter: what each mode writes, and that all come back."""

import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.specdec import tiny_drafter
from tests.specdec.texts import test_buffer
from tlt_jax.runtime import distributed, train_state
from tlt_jax.settings import sections
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import sampling as text_sampling
from tlt_jax.workdir import checkpoint, drafter_checkpoint

OPTIMIZER = optax.adamw(1e-2)
CFG = tiny_drafter.drafter_config()
snapshot = train_state.Snapshot


def made(seed):
    """A state of random numbers."""
    params = tiny_drafter.params_of(CFG)
    state = train_state.begin(params, OPTIMIZER)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(100, size=leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, state)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def size_of(directory):
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("mode", drafter_checkpoint.MODES)
def test_every_mode_comes_back_bit_for_bit(tmp_path, mode):
    target = tiny_drafter.target_of(CFG)
    states = {step: made(step) for step in (3, 4)}
    with drafter_checkpoint.DrafterCheckpointer(tmp_path, mode) as checkpointer:
        assert checkpointer.restore(made(0)) is None
        waits = [
            checkpointer.save(n, snapshot(state, meta={"version": n}), CFG, target)
            for n, state in states.items()
        ]
        assert min(waits) > 0
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        step, found = checkpointer.restore(made(0))
        assert (step, found.meta, found.arrays) == (4, {"version": 4}, {})
        same(found.state, states[4])
    # Embedding and head, which `selective` does not write.
    frozen = tmp_path / drafter_checkpoint.DIRECTORY / "4" / "frozen"
    assert frozen.exists() == (mode != "selective")
    if frozen.exists():
        wanted = {name: x for name, x in vars(target).items() if x is not None}
        with ocp.StandardCheckpointer() as reader:
            same(reader.restore(frozen), wanted)


def test_selective_writes_what_is_trained_alone(tmp_path):
    target = tiny_drafter.target_of(CFG)
    target = target.replace(embed=jnp.ones((512, 256)))
    sizes = {}
    for mode in drafter_checkpoint.MODES:
        folder = tmp_path / mode
        with drafter_checkpoint.DrafterCheckpointer(folder, mode) as checkpointer:
            checkpointer.save(1, snapshot(made(1)), CFG, target)
        sizes[mode] = size_of(folder)
    assert sizes["selective"] < 200_000 < target.embed.nbytes
    # The same content; how many files Orbax makes of it hangs on what coincides.
    assert abs(sizes["async"] - sizes["blocking"]) < 20_000


def test_only_blocking_is_complete_when_save_returns(tmp_path, monkeypatch):
    waited = []
    wait = checkpoint.Checkpointer.wait

    def seen(self):
        waited.append(self)
        wait(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "wait", seen)
    for mode, expected in (("blocking", 1), ("async", 0), ("selective", 0)):
        folder = tmp_path / mode
        with drafter_checkpoint.DrafterCheckpointer(folder, mode) as checkpointer:
            waited.clear()
            checkpointer.save(1, snapshot(made(1)), CFG, tiny_drafter.target_of(CFG))
            assert len(waited) == expected


def test_state_may_be_given_up_right_after(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 - 1, tree)

    large = made(1)
    large = large.replace(opt_state=(large.opt_state, jnp.ones((600, 6000))))
    wanted = jax.tree.map(np.array, large)
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, snapshot(jax.tree.map(jnp.array, wanted)), CFG)
            checkpointer.wait()
        checkpointer.save(4, snapshot(large), CFG)
        large = overwrite(large)
        jax.block_until_ready(large)
    like = jax.tree.map(jnp.zeros_like, large)
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        found = checkpointer.restore(like, 4)[1].state
        same(jax.tree.map(np.asarray, found), wanted)


def test_buffer_and_sampler_come_back(tmp_path):
    sizes = {"row_tokens": 32, "row_bases": 30, "num_rows": 2, "seed": 3}
    buffer = text_buffer.TextBuffer(1_000_000)
    for i in range(9):
        buffer.append(test_buffer.made(i, 6 + i, 1 + i // 4, features=i < 0))
    sampler = text_sampling.Sampler(buffer, **sizes)
    sampler.next_batch()
    parts = {"texts": buffer.state(), "sampler": sampler.state()}
    arrays = {f"{p}/{n}": x for p, part in parts.items() for n, x in part.items()}
    # No features: an array of width 0.
    assert any(array.size == 0 for array in arrays.values())
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, snapshot(made(1), arrays), CFG)
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        found = checkpointer.restore(made(0))[1].arrays
    same(found, arrays)
    again = text_buffer.TextBuffer(1_000_000)
    again.restore({n.removeprefix("texts/"): x for n, x in found.items()})
    resumed = text_sampling.Sampler(again, **sizes)
    resumed.restore({n.removeprefix("sampler/"): x for n, x in found.items()})
    for _ in range(4):
        for one, other in zip(
            jax.tree.leaves(sampler.next_batch()),
            jax.tree.leaves(resumed.next_batch()),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_what_is_ahead_of_the_run_is_written_again(tmp_path):
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, snapshot(made(step)), CFG)
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        step, found = checkpointer.restore(made(0), at_most=2)
        assert step == 2
        same(found.state, made(2))
        checkpointer.save(3, snapshot(made(7)), CFG)
        checkpointer.wait()
        same(checkpointer.restore(made(0))[1].state, made(7))
        assert sorted(os.listdir(tmp_path / "drafter_checkpoints")) == ["1", "2", "3"]


def test_a_run_that_begins_anew_finds_no_place_taken(tmp_path):
    """Killed before the policy's checkpoint was complete, and after the drafter's."""
    notes, restored = [], []
    trained = types.SimpleNamespace(
        trains=True,
        cfg=CFG,
        abstract_state=lambda: made(0),
        state=lambda: snapshot(made(7)),
        target=lambda: None,
        restore=restored.append,
    )
    observer = types.SimpleNamespace(note=notes.append)
    how = trained, tmp_path, sections.Checkpoint(), distributed.Group(), observer
    with drafter_checkpoint.DrafterStore(*how) as store:
        store.save(2)
    with drafter_checkpoint.DrafterStore(*how) as store:
        store.restore(0)
        assert os.listdir(tmp_path / "drafter_checkpoints") == []
        store.save(2)
        store.wait()
        assert notes == [] and restored == []
        store.restore(2)
    assert len(restored) == 1 and notes == []


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(ValueError, match="mode='fast': use blocking, async, selective"):
        drafter_checkpoint.DrafterCheckpointer(tmp_path, "fast")
    with drafter_checkpoint.DrafterCheckpointer(tmp_path, "async") as checkpointer:
        with pytest.raises(ValueError, match="mode='async' writes the target: give it"):
            checkpointer.save(1, snapshot(made(1)), CFG)
        target = tiny_drafter.target_of(CFG)
        checkpointer.save(1, snapshot(made(1)), CFG, target)
        checkpointer.wait()
        other = made(1).replace(opt_state=())
        with pytest.raises(checkpoint.CheckpointError, match="of another model or opt"):
            checkpointer.restore(other)
        for path in (tmp_path / "drafter_checkpoints/1").rglob("*"):
            if path.is_file() and "policy" in str(path):
                path.write_bytes(b"")
        with pytest.raises(checkpoint.CheckpointError, match="it is damaged"):
            checkpointer.restore(made(0))


def test_weights_are_read_of_a_run_that_goes_on(tmp_path):
    ids = np.asarray(tiny_drafter.DRAFT_IDS)
    with drafter_checkpoint.DrafterCheckpointer(tmp_path) as checkpointer:
        for step in (3, 4):
            arrays = {"draft_ids": ids + step - 3, "texts/tokens": np.arange(step)}
            meta = {"version": 2 * step, "sharpness": step / 2, "tau": step}
            checkpointer.save(step, snapshot(made(step), arrays, meta), CFG)
        checkpointer.wait()
        for asked, step in ((None, 4), (3, 3)):
            cfg, params, found, version = drafter_checkpoint.restore_weights(
                tmp_path, asked
            )
            assert (cfg, found, version) == (CFG, step, 2 * step)
            assert params.draft_ids.tolist() == (ids + step - 3).tolist()
            assert (params.sharpness, params.tau) == (step / 2, step)
            assert params.tau.dtype == np.float32
            bare = params.replace(draft_ids=None, sharpness=None, tau=None)
            same(bare, made(step).params.replace(draft_ids=None, sharpness=None))
    # Its vocabulary is compared with the rest.
    largest = max(
        (p for p in (tmp_path / "drafter_checkpoints/4/arrays").rglob("*")),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(checkpoint.DamagedError, match="arrays/.* is not what was wri"):
        drafter_checkpoint.restore_weights(tmp_path)
    assert drafter_checkpoint.restore_weights(tmp_path, 3)[2] == 3

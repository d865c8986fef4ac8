"""Checkpoints survive kills, change meshes, and say what is wrong with them."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.workdir import damage
from tlt_jax.models import config as model_config
from tlt_jax.models import params as params_lib
from tlt_jax.runtime import sharding
from tlt_jax.workdir import checkpoint

CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
    qk_norm=True,
    rope_scaling=model_config.RopeScaling("llama3", 8.0, 256),
    sliding_window=8,
    windowed_layers=(True, False),
    eos_ids=(2, 5),
)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

_KILLED = """
import os, signal, sys
from tlt_jax.workdir import checkpoint
from tests.workdir import test_checkpoint
params, opt_state = test_checkpoint.make_state()
checkpointer = checkpoint.Checkpointer(sys.argv[1])
checkpointer.save(1, params, opt_state, test_checkpoint.CFG, {"position": 1})
checkpointer.wait()
checkpointer.save(2, params, opt_state, test_checkpoint.CFG, {"position": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def make_state(seed: int = 0):
    """Return a policy and an optimizer state of random numbers."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(100, size=leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    abstract = params_lib.abstract(CFG)
    state = abstract, jax.eval_shape(OPTIMIZER.init, abstract)
    return jax.tree.map(draw, state)


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def shard(tree, mesh):
    """Shard the weights of a state by the rules and replicate the rest."""
    rules = sharding.ShardingRules()
    weights = sharding.tree_shardings(mesh, rules, params_lib.logical_axes(CFG))
    return optax.tree_map_params(
        OPTIMIZER,
        jax.device_put,
        tree,
        weights,
        transform_non_params=lambda x: jax.device_put(x, sharding.replicated(mesh)),
    )


def shard_params(params, mesh):
    rules = sharding.ShardingRules()
    return jax.device_put(
        params, sharding.tree_shardings(mesh, rules, params_lib.logical_axes(CFG))
    )


def test_latest_comes_back_bitwise_and_old_ones_go(tmp_path):
    with checkpoint.Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        states = {step: make_state(step) for step in (1, 2, 3)}
        assert checkpointer.restore_latest(*states[1]) is None
        for step, state in states.items():
            checkpointer.save(step, *state, CFG, {"position": step * 10})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(*make_state(0))
    assert (restored.step, restored.meta) == (3, {"position": 30})
    assert_bitwise_equal((restored.params, restored.opt_state), states[3])


def test_leaves_that_are_none_may_have_come_since(tmp_path):
    """Weights get optional parts in later versions: theirs before went on without."""
    older = {"norm": None, "out": jnp.arange(6.0), "gone": None}
    newer = {"bias": None, "norm": None, "out": jnp.zeros(6), "parts": (None, None)}
    made, wanted = ((x, OPTIMIZER.init(x)) for x in (older, newer))
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, *made, CFG, {})
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(*wanted)
    assert_bitwise_equal(restored.params, newer | {"out": older["out"]})
    found = jax.tree.leaves(restored.opt_state)
    assert_bitwise_equal(found, jax.tree.leaves(made[1]))


def test_eight_devices_to_one_and_to_another_mesh(tmp_path):
    params, opt_state = make_state()
    eight = sharding.make_mesh(2, 2, 2)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        sharded = shard_params(params, eight), shard(opt_state, eight)
        checkpointer.save(7, *sharded, CFG, {})
    for mesh in (
        sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
        sharding.make_mesh(1, 4, 2),
    ):
        target = shard_params(params, mesh), shard(opt_state, mesh)
        with checkpoint.Checkpointer(tmp_path) as checkpointer:
            restored = checkpointer.restore_latest(*target)
        assert_bitwise_equal((restored.params, restored.opt_state), (params, opt_state))
        assert restored.params.embed.sharding == target[0].embed.sharding
        nu = restored.opt_state[1][0].nu
        assert nu.layers.qkv.sharding == target[0].layers.qkv.sharding


def test_donating_after_save_does_not_change_what_is_saved(tmp_path):
    params, opt_state = make_state()
    before = jax.tree.map(np.array, params)
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
    )
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, params, opt_state, CFG, {})
        jax.block_until_ready(overwrite(params))
    assert_bitwise_equal(checkpoint.restore_policy(tmp_path)[0], before)


def test_policy_alone(tmp_path):
    states = {step: make_state(step) for step in (4, 6)}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        for step, (params, opt_state) in states.items():
            bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            checkpointer.save(step, bf16 if step == 6 else params, opt_state, CFG, {})
    params, cfg, step = checkpoint.restore_policy(tmp_path)
    assert (cfg, step, params.embed.dtype) == (CFG, 6, jnp.bfloat16)
    assert hash(cfg) == hash(CFG)
    params, _, step = checkpoint.restore_policy(tmp_path, step=4)
    assert step == 4
    assert_bitwise_equal(params, states[4][0])
    with pytest.raises(checkpoint.CheckpointError, match="there are 4, 6"):
        checkpoint.restore_policy(tmp_path, step=5)
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoints"):
        checkpoint.restore_policy(tmp_path / "other")


def test_killed_while_writing_leaves_the_checkpoint_before(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], env=env, cwd=root, timeout=120
    )
    assert child.returncode == -signal.SIGKILL
    left = set(os.listdir(tmp_path / "checkpoints"))
    assert "2" not in left and len(left) == 2, "the kill came too early or too late"
    # A reader beside it sees the complete one, and so does the next run.
    assert checkpoint.restore_policy(tmp_path)[2] == 1
    state = make_state()
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(*state)
        assert (restored.step, restored.meta) == (1, {"position": 1})
        assert_bitwise_equal((restored.params, restored.opt_state), state)
        checkpointer.save(3, *state, CFG, {"position": 3})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]
    assert checkpoint.restore_policy(tmp_path)[2] == 3


# Where reading fails, Orbax drops the coroutines that it has not started.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("item", ["policy", "meta", "removed"])
def test_damage_names_the_step_and_the_remedy(tmp_path, item):
    state = make_state()
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, *state, CFG, {})
    damaged = tmp_path / "checkpoints" / "3"
    if item == "removed":
        # The largest file has arrays.
        files = [file for file in (damaged / "policy").rglob("*") if file.is_file()]
        max(files, key=lambda file: file.stat().st_size).unlink()
    for file in (damaged / item).rglob("*"):
        if file.is_file() and file.name != "commit_success.txt":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(checkpoint.CheckpointError, match="step 3.*Delete .*/3 "):
            checkpointer.restore_latest(*state)
    with pytest.raises(checkpoint.CheckpointError, match="step 3.*Delete .*/3 "):
        checkpoint.restore_policy(tmp_path)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of steps 3 and 5, each of its own state."""
    directory = tmp_path_factory.mktemp("three")
    with checkpoint.Checkpointer(directory, keep=3) as checkpointer:
        for step in (3, 5):
            state, more = make_state(step), {"arrays": {"x": np.arange(9.0) + step}}
            record = {"position": step, "arrays": {"x": [[9], "float64"]}}
            checkpointer.save(step, *state, CFG, record, more)
    return directory


def read(directory, step=5, **options):
    """Whether what is read is bit for bit what was saved at a step; or what is said."""
    with checkpoint.Checkpointer(directory, keep=3, **options) as checkpointer:
        return read_by(checkpointer, step)


def read_by(checkpointer, step):
    state = make_state(step)
    try:
        found = checkpointer.restore_latest(*state, "arrays")
    except checkpoint.DamagedError as error:
        said = str(error)
    else:
        assert_bitwise_equal((found.params, found.opt_state), state)
        assert (found.step, found.meta["position"]) == (step, step)
        assert found.arrays["x"].tolist() == (np.arange(9.0) + step).tolist()
        said = "whole"
    return said


def refused(newest, said):
    """What was refused, each in the one line that says what to do, by file."""
    lines = {where: line for where, line in said.items() if line != "whole"}
    for line in lines.values():
        assert "\n" not in line
        assert line.endswith(
            f"it is damaged. Delete {newest} to go on from the checkpoint before it."
        )
    return lines


def test_no_flipped_bit_gives_another_state(three, tmp_path):
    """What is read is what was written, or it is damaged: of every file, at random."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    newest, said = tmp_path / "checkpoints" / "5", {}
    with checkpoint.Checkpointer(tmp_path, keep=3) as checkpointer:
        for path, bit in damage.flips(newest, num_per_file=1, seed=7):
            said[path.relative_to(newest).as_posix(), bit] = read_by(checkpointer, 5)
        assert read_by(checkpointer, 5) == "whole"
    items = {name.split("/")[0] for name, _ in said}
    assert items >= {"policy", "optimizer", "meta", "arrays"} and len(said) > 20
    lines = refused(newest, said)
    # Marks that Orbax makes at last, and does not read.
    assert {name for name, _ in said.keys() - lines.keys()} == {
        *("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def test_files_that_are_cut_or_gone_are_told_in_one_line(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    newest, said = tmp_path / "checkpoints" / "5", {}
    with checkpoint.Checkpointer(tmp_path, keep=3) as checkpointer:
        for item in ("policy", "meta", "arrays"):
            for path, how in damage.losses(newest / item):
                name = path.relative_to(newest).as_posix()
                said[name, how] = read_by(checkpointer, 5)
    lines = refused(newest, said)
    assert len(said) > 20 and len(lines) == len(said)


def test_a_damaged_one_is_passed_over_on_request(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "checkpoints" / "5" / "meta" / "metadata", 1)
    assert "step 5 could not be read" in read(tmp_path)
    lines = []
    assert read(tmp_path, 3, pass_over=lines.append) == "whole"
    (line,) = lines
    assert line == (
        "the checkpoint of step 5 could not be read (meta/metadata is not what was "
        "written): it is damaged. That of step 3 is taken instead, and this one "
        "removed."
    )
    # It would stand in the way of the step that is taken again.
    assert os.listdir(tmp_path / "checkpoints") == ["3"]
    os.truncate(tmp_path / "checkpoints" / "3" / "meta" / "metadata", 1)
    assert "step 3 could not be read" in read(tmp_path, 3, pass_over=lines.append)
    assert len(lines) == 1


def test_a_record_that_was_changed_is_not_believed(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    assert checkpoint.newest_record(tmp_path)["driver"]["position"] == 5
    path = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"position": 5', '"position": 4'))
    assert json.loads(path.read_text())["driver"]["position"] == 4
    assert checkpoint.newest_record(tmp_path) is None
    assert "meta/metadata is not what was written" in read(tmp_path)
    assert checkpoint.newest_record(tmp_path / "nothing") is None


def test_what_is_not_read_may_be_damaged(three, tmp_path):
    """An export takes the policy alone."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "5"
    shutil.rmtree(folder / "optimizer")
    assert checkpoint.restore_policy(tmp_path)[2] == 5
    shutil.rmtree(folder / "policy" / "d")
    with pytest.raises(checkpoint.DamagedError, match="policy/d/[0-9a-f]+ is not what"):
        checkpoint.restore_policy(tmp_path)
    checkpoint.checksums_path(tmp_path, 5).unlink()
    with pytest.raises(
        checkpoint.DamagedError, match="whole checksums.json, which che"
    ):
        checkpoint.restore_policy(tmp_path)


def test_another_model_or_optimizer_is_refused(tmp_path):
    params, opt_state = make_state()
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, params, opt_state, CFG, {})
        wider = params_lib.abstract(dataclasses.replace(CFG, d_ff=32))
        with pytest.raises(
            checkpoint.CheckpointError,
            match=r"\.layers\.down is \[2, 16, 24\] there and \[2, 16, 32\] here",
        ):
            checkpointer.restore_latest(wider, opt_state)
        with pytest.raises(checkpoint.CheckpointError, match="absent here"):
            checkpointer.restore_latest(params, optax.sgd(1.0).init(params))


def test_record_is_plain_json(tmp_path):
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, *make_state(), CFG, {"config": "abc"})
    file = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    record = json.loads(file.read_text())
    assert record["driver"] == {"config": "abc"}
    assert record["versions"]["jax"] == jax.__version__


def test_unstacked_layers_and_bad_keep_are_refused(tmp_path):
    params, opt_state = make_state()
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="stacked"):
            checkpointer.save(1, params_lib.unstack(params), opt_state, CFG, {})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.Checkpointer(tmp_path, keep=0)


def test_a_failure_is_said_of_the_checkpoint_that_failed(tmp_path, monkeypatch):
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, *make_state(), CFG, {})
        manager = checkpointer._manager
        with monkeypatch.context() as patch:

            def full():
                raise OSError("No space left on device")

            patch.setattr(manager, "wait_until_finished", full)
            with pytest.raises(checkpoint.CheckpointError) as raised:
                checkpointer.save(2, *make_state(), CFG, {})
        assert str(raised.value).startswith("writing the checkpoint of step 1 below ")


def test_something_else_in_its_place_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.Checkpointer(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/checkpoints cannot be a directory (File exists): move what is in "
        "its place, or use another --workdir."
    )
    assert checkpoint.newest(tmp_path) is None


def test_write_failure_names_the_remedy(tmp_path):
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").touch()
        with pytest.raises(checkpoint.CheckpointError, match="check free space"):
            checkpointer.save(1, *make_state(), CFG, {})
            checkpointer.wait()

"""The drafter while it learns: its weights on whatever devices are free, step by step.

One copy of the weights exists. A training moves it to the devices of the workers that
wait, data-parallel over them, and takes steps there, each in pieces, so that it can be
given up; engines get copies with a version.
"""

import functools
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import programs, sharding, train_state
from tlt_jax.specdec.texts import vocabulary
from tlt_jax.specdec.training import acceptance, objectives, unroll
from tlt_jax.specdec.training import step as step_lib
from tlt_jax.types import Array

Devices = tuple[jax.Device, ...]
_T = TypeVar("_T")
# Waiting for a piece, one looks so often whether to go on.
_POLL_S = 0.001
# Work of which each piece is begun when it is asked for, and that ends with a result.
Pieces = Generator[Array, None, _T]
# Programs of a training, by name.
_NAMES = "begin", "add", "close", "update", "measure"


class DrafterLearner:
    """Takes training steps on given devices.

    Attributes:
      cfg: the drafter.
      state: float32, without `draft_ids`; in host memory between trainings.
      draft_ids: `[Vd] int32` in host memory, or None: all tokens, or not yet chosen.
      sharpness: of coupled drafts; None: not known, the next measurement finds it.
      tau: with that sharpness, as it was measured last.
      pool: of compiled programs.
    """

    def __init__(
        self,
        cfg: drafter.DrafterConfig,
        objective: objectives.Objective,
        optimizer: optax.GradientTransformation,
        *,
        batch: unroll.Batch,
        head_chunk: int,
        piece_bases: int,
        depth: int,
        dtype: str,
        remat: bool = False,
    ):
        """Prepare; `begin` gives weights.

        `batch` is of the shapes and dtypes that all have. Of `head_chunk` bases the
        logits are held at once, and a piece takes `piece_bases` bases of each row, 0:
        all. Acceptance is measured on `depth` levels. With `remat` activations are
        computed again in the backward pass.
        """
        self.cfg = cfg
        self.draft_ids: np.ndarray | None = None
        self.sharpness: float | None = drafter.SHARPNESS
        self.tau = drafter.TAU
        self.pool = programs.ProgramPool()
        self._objective, self._optimizer = objective, optimizer
        self._batch, self._depth = batch, depth
        self._piece_bases = piece_bases
        self._forward = unroll.ForwardConfig(
            cfg, dtype=jnp.dtype(dtype), head_chunk=head_chunk, remat=remat
        )
        self.state: train_state.TrainState | None = None
        self._placed: train_state.TrainState | None = None
        self._target: unroll.Target | None = None
        self._mesh: jax.sharding.Mesh | None = None
        self._compiled: dict[str, Callable] = {}

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken so far."""
        return 0 if self.state is None else int(self.state.num_updates)

    @property
    def has_vocabulary(self) -> bool:
        """Whether it is known which tokens can be proposed."""
        return self.draft_ids is not None or not self.cfg.draft_vocab_size

    @property
    def newest(self) -> train_state.TrainState | None:
        """The state as it is now: on the devices during a training, else `state`."""
        return self.state if self._placed is None else self._placed

    def learned(self) -> tuple[Any, ...]:
        """Return what another needs to have the same drafter, between trainings."""
        return self.state, self.draft_ids, self.sharpness, self.tau

    def take_over(self, learned: tuple[Any, ...]) -> None:
        """Have the drafter of another's `learned`."""
        self.state, self.draft_ids, self.sharpness, self.tau = learned

    def choose_vocabulary(self, weights: np.ndarray, eos_ids: Sequence[int]) -> None:
        """Choose the tokens that can be proposed, by weights; see `vocabulary`.

        `eos_ids` are always among them.
        """
        size = self.cfg.draft_vocab_size
        self.draft_ids = vocabulary.choose(weights, size, eos_ids)

    def init_state(
        self, params: drafter.DrafterParams | None, norm: Array, seed: int
    ) -> train_state.TrainState:
        """Make a state with these weights, or random ones of a seed.

        What else they came with is taken over: sharpness, tau and draft vocabulary.
        `norm [D]` is the target's final norm: the head is made for its scale.
        """
        state = self._random_state(seed)
        own = state.params
        if params is not None:
            if params.sharpness is not None:
                self.sharpness = float(params.sharpness)
            if params.tau is not None:
                self.tau = float(params.tau)
            if params.draft_ids is not None:
                self.draft_ids = np.asarray(params.draft_ids)
            own = params.replace(draft_ids=None, sharpness=None, tau=None)
            own = jax.tree.map(lambda x: x.astype(jnp.float32), own)
        elif own.norm is not None:
            own = own.replace(norm=jnp.asarray(norm, jnp.float32))
        return jax.device_get(state.replace(params=own))

    def _random_state(self, seed: int) -> train_state.TrainState:
        params = drafter.init(self.cfg, jax.random.key(seed))
        return train_state.begin(params, self._optimizer)

    def abstract_state(self) -> train_state.TrainState:
        """Describe `state`."""
        return jax.eval_shape(lambda: self._random_state(0))

    def devices_of(self, meshes: Sequence[jax.sharding.Mesh]) -> Devices:
        """Choose the first devices of the first workers, as many as divide a batch.

        `meshes` are those of the workers that wait, in their order.
        """
        first = [mesh.devices.flat[0] for mesh in meshes]
        num_rows = self._batch.tokens.shape[0]
        while num_rows % len(first):
            first.pop()
        return tuple(first)

    def prepare(self, devices: Devices, target: model_params.Params) -> None:
        """Compile step and measurement for devices, in the background."""
        for program in self._programs(devices, target).values():
            self.pool.prepare(program)

    def is_ready(
        self, devices: Devices, target: model_params.Params, timeout_s: float = 0.0
    ) -> bool:
        """Tell whether the programs are there; wait for them for a while.

        Raises an error of their compilation.
        """
        made = self._programs(devices, target).values()
        return all(self.pool.is_ready(program, timeout_s) for program in made)

    def begin(self, devices: Devices, target: model_params.Params) -> None:
        """Move to these devices, with what is read of the target.

        Several devices share each batch's rows.
        """
        self._mesh = _mesh(devices)
        everywhere = sharding.replicated(self._mesh)
        self._placed = jax.device_put(self.newest, everywhere)
        ids = None if self.draft_ids is None else jnp.asarray(self.draft_ids)
        given = unroll.Target(target.embed, drafter_head.head_rows(target, ids), ids)
        self._target = jax.device_put(given, everywhere)
        self._compiled = {
            name: self.pool.get(program)
            for name, program in self._programs(devices, target).items()
        }

    def step(self, batch: unroll.Batch) -> Pieces[dict[str, Array]]:
        """Take a step piece by piece; given up before its end it changes nothing.

        Yields a result of each piece and returns the metrics of `step.update`; all of
        them are on their way.
        """
        run, params, given = self._compiled, self._placed.params, self._target
        placed = self._place(batch)
        under_way = run["begin"](params, placed, given)
        yield under_way.seen.keys
        for start in self._starts(batch):
            under_way = run["add"](under_way, params, placed, given, np.int32(start))
            yield under_way.sums["token_loss"]
        sums, seen_grads = under_way.sums, under_way.seen_grads
        grads = run["close"](under_way.grads, seen_grads, params, placed, given)
        yield grads.layer.down
        self._placed, outcome = run["update"](self._placed, grads, sums, placed)
        return outcome

    def measure(self, batches: Iterable[unroll.Batch]) -> Pieces[dict[str, Any]]:
        """Say what drafts along the batches' texts would have had accepted.

        A sharpness that would have been clearly better than the one in use replaces it;
        tau is always the newest.
        Yields a result of each part, which is on its way; returns what was found, see
        `acceptance.summarise`. Of weights of which an average is kept it is that one's.
        """
        run, given = self._compiled, self._target
        params = train_state.average_of(self._placed)
        sums = acceptance.nothing(self._depth)
        for batch in batches:
            placed = self._place(batch)
            seen = run["begin"](params, placed, given).seen
            yield seen.keys
            for start in self._starts(batch):
                here = run["measure"](params, placed, given, seen, np.int32(start))
                yield here["count"]
                sums = jax.tree.map(np.add, sums, jax.device_get(here))
        found = acceptance.summarise(sums, self.sharpness)
        self.sharpness, self.tau = found["sharpness"], found["tau"]
        return found

    def end(self, keep: bool = True) -> None:
        """Leave the devices, with what was learned there or without it."""
        if keep and self._placed is not None:
            self.state = jax.device_get(self._placed)
        self._placed = self._target = None

    def weights(self, dtype: str) -> drafter.DrafterParams:
        """Return a copy for engines, with `draft_ids`, sharpness and tau.

        It is their average where one is kept.
        """
        params = jax.device_get(train_state.average_of(self.newest))
        cast = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
        return cast.replace(
            draft_ids=self.draft_ids,
            sharpness=np.float32(self.sharpness),
            tau=np.float32(self.tau),
        )

    def _place(self, batch: unroll.Batch) -> unroll.Batch:
        return jax.device_put(batch, self._by_rows(self._mesh))

    def _by_rows(self, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
        return sharding.named(mesh, sharding.ShardingRules(), ("batch",))

    @property
    def _piece_size(self) -> int:
        num_bases = self._batch.bases.shape[1]
        return min(self._piece_bases or num_bases, num_bases)

    def _starts(self, batch: unroll.Batch) -> range:
        return step_lib.starts(batch.bases.shape[1], self._piece_size)

    def _programs(self, devices: Devices, target: model_params.Params):
        """A training's programs, by name."""
        key = tuple(device.id for device in devices)
        return {
            name: programs.Program(
                ("drafter", name, key),
                functools.partial(self._lower, name, devices, target),
            )
            for name in _NAMES
        }

    def described(
        self, devices: Devices, target: model_params.Params
    ) -> tuple[train_state.TrainState, unroll.Batch, unroll.Target, step_lib.UnderWay]:
        """Describe what a step on devices holds, each array where it lies.

        State and batch, what is read of the target, and the step under way.
        """
        mesh = _mesh(devices)
        everywhere, by_rows = sharding.replicated(mesh), self._by_rows(mesh)
        like = self.abstract_state() if self.state is None else self.state
        state = engine_programs.abstract_of(like, everywhere)
        batch = engine_programs.abstract_of(self._batch, by_rows)
        given = self._abstract_target(target, everywhere)
        begin = functools.partial(step_lib.begin, **self._how)
        under_way = jax.eval_shape(begin, state.params, batch, given)
        split = sharding.named(mesh, sharding.ShardingRules(), (None, "batch"))
        seen = unroll.Seen(split, by_rows, by_rows)
        where = step_lib.UnderWay(seen, everywhere, seen, everywhere)
        return state, batch, given, engine_programs.abstract_of(under_way, where)

    @property
    def _how(self) -> dict[str, Any]:
        return {"cfg": self._forward, "objective": self._objective}

    def _lower(self, name: str, devices: Devices, target: model_params.Params):
        """Trace a program of a training."""
        state, batch, given, under_way = self.described(devices, target)
        everywhere = sharding.replicated(_mesh(devices))
        where = jax.tree.map(lambda x: x.sharding, under_way)
        how = self._how
        start = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        size = self._piece_size
        given_now = state.params, batch, given
        match name:
            case "begin":
                begin = functools.partial(step_lib.begin, **how)
                jitted = jax.jit(begin, out_shardings=where)
                return jitted.lower(*given_now)
            case "add":
                add = functools.partial(step_lib.add, size=size, **how)
                jitted = jax.jit(add, donate_argnums=0, out_shardings=where)
                return jitted.lower(under_way, *given_now, start)
            case "close":
                close = functools.partial(step_lib.close, cfg=self._forward)
                jitted = jax.jit(close, donate_argnums=0, out_shardings=everywhere)
                return jitted.lower(under_way.grads, under_way.seen_grads, *given_now)
            case "update":
                learning = {"objective": self._objective, "optimizer": self._optimizer}
                update = functools.partial(step_lib.update, **learning)
                jitted = jax.jit(update, donate_argnums=0, out_shardings=everywhere)
                return jitted.lower(state, under_way.grads, under_way.sums, batch)
        how = {"num_steps": self._depth, "cfg": self._forward, "size": size}

        def measure(params, batch, given, seen, start):
            return acceptance.measure(
                params, batch, given, seen=seen, start=start, **how
            )

        jitted = jax.jit(measure, out_shardings=everywhere)
        return jitted.lower(*given_now, under_way.seen, start)

    def _abstract_target(self, target: model_params.Params, where) -> unroll.Target:
        """Describe what is read of the target: embedding and rows of the head."""
        shape = (self.cfg.num_draft_tokens, target.head.shape[1])
        head, ids = jax.ShapeDtypeStruct(shape, target.head.dtype), None
        if self.cfg.draft_vocab_size:
            ids = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        return engine_programs.abstract_of(
            unroll.Target(target.embed, head, ids), where
        )


def _mesh(devices: Devices) -> jax.sharding.Mesh:
    return sharding.make_mesh(len(devices), 1, 1, devices)


def run_through(
    pieces: Pieces[_T], interrupted: Callable[[], bool] | None = None
) -> _T | None:
    """Compute piece after piece of `DrafterLearner.step` or `measure`.

    Where `interrupted` can say that they shall be given up, each piece is waited for
    before the next is begun, and what is under way then is left to itself, its result
    dropped. Without it they are begun one after the other, and nobody waits.

    Returns:
      What they end with, or None: they were given up, and nothing changed.
    """
    while True:
        try:
            under_way = next(pieces)
        except StopIteration as end:
            return end.value
        if interrupted is None:
            continue
        while not under_way.is_ready():
            if interrupted():
                return None
            time.sleep(_POLL_S)
        if interrupted():
            return None

"""A rollout worker in a process of its own: engines that serve a learner elsewhere.

It has the target's weights and no state of the learner. Where the learner's process is
gone it waits for the one that is started in its place, and keeps its programs.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from multiprocessing import AuthenticationError
from typing import Any

import jax

from tlt_jax import types
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.workers import columns, separate, weight_sync
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import links, messages, ring, talk

Engines = Mapping[str, engine_lib.Engine]
# How often it looks whether a learner is there.
_LOOK_S = 0.1


class Worker:
    """Serves one learner after another until one says that the run has ended."""

    def __init__(
        self,
        meeting: distributed.Meeting,
        about: Mapping[str, str],
        make: Callable[[], tuple[Engines, drafter.DrafterParams | None]],
    ):
        """Make nothing before a learner is there, whose files `make` may read.

        It makes engines by the law by which each samples, of one target on one mesh and
        without weights, and the drafter of the first, if it has one. For `about` see
        `separate.Door`.
        """
        self._meeting, self._about, self._make = meeting, dict(about), make
        self._engines: Engines = {}
        self._parts: list[Any] = []
        self._drafter: drafter.DrafterParams | None = None

    def work(self) -> None:
        """Serve until the end of the run.

        Raises:
          failures.UserError: the learner has other code, libraries or settings.
        """
        while True:
            its = self._come()
            try:
                if not self._follow(its):
                    return
            except talk.TalkError:
                # The learner is gone, or has given this worker up: it comes anew.
                continue
            finally:
                its.close()

    def _come(self) -> talk.Talk:
        """Wait for a learner, and show that this process belongs to it."""
        greeting = [self._meeting.worker, self._about]
        while True:
            try:
                given = self._meeting.address, self._meeting.secret, greeting
                its = talk.Talk(links.connect(*given))
                told, *other = its.hear(separate.ANSWER_S)
            except (OSError, EOFError, AuthenticationError):
                time.sleep(_LOOK_S)
                continue
            if told == "welcome":
                return its
            raise failures.UserError(
                f"rollout worker {self._meeting.worker} has another {other[0]} than "
                "the learner: start all processes with the same command, code and "
                "libraries."
            )

    def _follow(self, its: talk.Talk) -> bool:
        """Do what the learner says; false: the run has ended."""
        if not self._engines:
            self._engines, self._drafter = self._make()
            first = self._engines[separate.ROLLOUT]
            shardings = weight_sync.shardings_of(first.cfg, first.mesh)
            self._parts = weight_sync.in_parts(shardings)
        while True:
            match its.hear():
                case "weights", *told:
                    has = self._take_weights(its, *told)
                    its.say(has, self._engines[separate.ROLLOUT].pool.is_idle)
                case "serve", seed, law:
                    self._serve(its, seed, law)
                case ("end",):
                    return False
                case other:
                    raise talk.TalkError(f"the learner says {other[:1]}")

    def _take_weights(
        self,
        its: talk.Talk,
        version: int,
        index: int,
        num: int,
        secret: bytes,
        silent_s: float,
    ) -> int:
        """Take weights part by part; return their version, or -1: some are missing."""
        round_ = ring.Ring(index, num, self._meeting.host, secret, silent_s)
        with contextlib.closing(round_):
            its.say(list(round_.address))
            (addresses,) = its.hear()
            placed, is_whole = [], addresses is not None
            if is_whole:
                try:
                    round_.connect([tuple(address) for address in addresses])
                except ring.RingError:
                    is_whole = False
            while True:
                match its.hear():
                    case "part", size:
                        is_whole = is_whole and self._take_part(
                            round_, size, index, num, placed
                        )
                    case _:
                        break
        if not (is_whole and len(placed) == len(self._parts)):
            return -1
        is_first = self._engines[separate.ROLLOUT].params is None
        for engine in self._engines.values():
            engine.set_params(weight_sync.joined(placed), version)
        if is_first:
            if self._drafter is not None:
                self._engines[separate.ROLLOUT].set_drafter(self._drafter, 1)
            for engine in self._engines.values():
                engine.warm_up(wait=False)
        return version

    def _take_part(
        self, round_: ring.Ring, size: int, index: int, num: int, placed: list[Any]
    ) -> bool:
        """Take the next part where the engines have it; say whether it has come."""
        sizes = [size, *[0] * (num - 1)]
        try:
            leaves = messages.unpack(round_.gather(sizes, [])[0])
        except ring.RingError:
            return False
        where, treedef = jax.tree.flatten(self._parts[len(placed)])
        own = map(jax.device_put, leaves, where)
        placed.append(jax.tree.unflatten(treedef, own))
        return True

    def _serve(self, its: talk.Talk, seed: int, law: str) -> None:
        """Generate what the learner's queue has."""
        engine, stats = self._engines[law], None
        known = len(engine.pool.stats.waits)
        # Of what an evaluation asks nothing is learned.
        is_aside = law == separate.EVALUATION
        aside = engine.aside() if is_aside else contextlib.nullcontext()
        with aside, contextlib.suppress(failures.Abandoned):
            stats = engine.serve(
                _Share(its),
                seed,
                on_completion=lambda one: its.say(
                    "finished", columns.of_completions([one])
                ),
                on_call=lambda num_tokens: _ask_on(its, num_tokens),
            )
        now = time.perf_counter()
        waits = [(a - now, b - now) for a, b in engine.pool.stats.waits[known:]]
        its.say("served", stats, waits)


class _Share(request_queue.RequestSource):
    """What is seen here of the learner's queue, as of the last look.

    A queue that was found empty is not asked again, see `remote.RemoteShare`.
    """

    def __init__(self, its: talk.Talk):
        self._talk = its
        self._prompts: frozenset[int] = frozenset()
        self.num_waiting = 1

    def take(self) -> types.Request | None:
        if not self.num_waiting:
            return None
        self._talk.say("take")
        request, self._prompts, self.num_waiting = self._talk.hear()
        return request

    def finish(self, request_id: int) -> bool:
        # The learner says so when it has the completion.
        return True

    def waits(self, prompt_id: int) -> bool:
        return prompt_id in self._prompts


def _ask_on(its: talk.Talk, num_tokens: int) -> None:
    """Tell that this worker lives; raise `Abandoned` where it is to go no further."""
    its.say("alive", num_tokens)
    (goes_on,) = its.hear()
    if not goes_on:
        raise failures.Abandoned

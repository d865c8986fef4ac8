"""A simulated cluster: rollouts as events in simulated time.

What decides is the system itself: `request_queue.RequestQueue` hands requests out,
`scheduler.Scheduler` admits rows and gives them pages, `mailboxes.Coordination`
(under a simulated clock) says who generates, trains and stops, and a `tuner.Tuner`
chooses strategies. Made up are only the devices: how long something takes (`costs`) and
how many drafts are accepted (`draw_lifetimes`). The loops below are those of
`engine.Engine.serve`, `workers.Workers` and `spot_trainer.SpotTrainer`, with an event
where those wait.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from experiments.simulation import cluster_records, workload
from experiments.simulation import costs as costs_lib
from tlt_jax import types
from tlt_jax.rl.engine import request_queue, scheduler
from tlt_jax.rl.workers import coordinator, mailboxes, records
from tlt_jax.specdec.tuners import tuner as tuner_lib


class Cluster:
    """Simulated workers, their coordinator, one drafter and one tuner."""

    def __init__(
        self,
        cfg: cluster_records.ClusterConfig,
        costs: costs_lib.Costs,
        acceptance: workload.Acceptance | None,
        tuner: tuner_lib.Tuner | None,
        *,
        seed: int,
        drafter: cluster_records.Drafter | None = None,
    ):
        """Begins at time 0 with nothing to do; the seed is of what is accepted.

        One tuner chooses for all workers, as in a run. Without acceptance or tuner all
        decoding is plain; without a drafter's state it is adapted and constant.
        """
        self.cfg, self.costs = cfg, costs
        self.acceptance, self.tuner = acceptance, tuner
        self.drafter = drafter or cluster_records.Drafter()
        # Whether a training of this version of the target has examined the drafter.
        self.is_measured = False
        self.now_s = 0.0
        self.coordination = mailboxes.Coordination(
            records.Config(
                min_idle=cfg.min_idle if cfg.trains else cfg.num_workers + 1,
                heartbeat_timeout_s=1e12,
                stop_timeout_s=1e12,
            ),
            clock=lambda: self.now_s,
        )
        self.rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    @property
    def num_places(self) -> int:
        """Processes that have workers."""
        return -(-self.cfg.num_workers // self.cfg.workers_per_place)

    def changed_target(self) -> None:
        """Notes that the policy was updated: the drafter falls behind."""
        self.is_measured = False
        self.drafter.quality *= 1 - self.drafter.lost
        if self.tuner is not None:
            self.tuner.changed("target")

    def roll_out(
        self, responses: Sequence[workload.Response]
    ) -> cluster_records.Report:
        """Generates responses in the order asked for; returns what that took.

        Raises:
          ValueError: a response does not fit into a worker's cache.
        """
        rolling = _Rollout(self, responses)
        rolling.begin()
        while not rolling.ended:
            assert self._events, "the rollout has not ended and nothing will happen"
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        return rolling.report()

    def pass_time(self, seconds: float) -> None:
        """Lets time pass between rollouts."""
        self.now_s += seconds

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Lets `act` happen so much later."""
        assert seconds >= 0, seconds
        heapq.heappush(self._events, (self.now_s + seconds, next(self._order), act))


class _Rollout:
    """One rollout while it runs."""

    def __init__(self, cluster: Cluster, responses: Sequence[workload.Response]):
        self.cluster, cfg = cluster, cluster.cfg
        self.ended = False
        prompts: dict[int, np.ndarray] = {}
        requests, samples = [], {}
        self.responses = responses
        for number, response in enumerate(responses):
            text = prompts.setdefault(
                response.prompt, np.zeros(response.prompt_tokens, np.int32)
            )
            sample = samples[response.prompt] = samples.get(response.prompt, -1) + 1
            request = types.Request(
                number, response.prompt, sample, text, cfg.max_new_tokens
            )
            scheduler.check_fits(
                request, num_pages=cfg.num_pages, page_size=cfg.page_size
            )
            if not 1 <= response.num_tokens <= cfg.max_new_tokens:
                raise ValueError(
                    f"response {number} has num_tokens={response.num_tokens}: between "
                    f"1 and max_new_tokens={cfg.max_new_tokens}."
                )
            requests.append(request)
        self._queue = request_queue.RequestQueue(requests, num_workers=cfg.num_workers)
        self._served: set[tuple[int, int]] = set()
        # Sums; and of rows' speculative steps, their number and tokens.
        self.spent = cluster_records.Report()
        self.accepted = [0, 0]

    def begin(self) -> None:
        """Asks the coordinator for the rollout."""
        cfg = self.cluster.cfg
        numbers = range(cfg.num_workers)
        places = [n // cfg.workers_per_place for n in numbers]
        self._generation = self.cluster.coordination.begin(numbers, places)
        self.act()

    def act(self) -> None:
        """Does what the coordinator has commanded, as drivers and trainers do."""
        c = self.cluster.coordination
        for place in range(self.cluster.num_places):
            while (command := c.next_command(0, place)) is not None:
                if command.generation != self._generation:
                    continue
                match command:
                    case records.Generate(_, worker, turn):
                        if (worker, turn) not in self._served:
                            self._served.add((worker, turn))
                            _Serving(self, worker, turn).turn()
                    case records.EndRollout():
                        self.ended = True
        training = c.state.training
        if training is not None:
            order = c.next_training(0, training.place)
            if order is not None:
                if order.revision == 0:
                    _Training(self, order).start()
                else:
                    self._trainer.join(order)

    def send(self, event: object) -> None:
        """Tells the coordinator, and does what follows."""
        self.cluster.coordination.send(event)
        self.act()

    def report(self) -> cluster_records.Report:
        """Sums the rollout up."""
        c = self.cluster.coordination
        rows, tokens = self.accepted
        return dataclasses.replace(
            self.spent,
            makespan_s=c.state.ended_s - c.state.began_s,
            accept_length=tokens / rows if rows else 1.0,
            intervals=c.timeline(),
            sums=coordinator.sums(c.timeline()),
        )


class _Serving:
    """A worker that takes requests until the queue is empty: `Engine.serve`."""

    def __init__(self, rolling: _Rollout, worker: int, turn: int):
        self._rolling, self._cluster = rolling, rolling.cluster
        self._numbers = rolling._generation, worker, turn
        cfg = self._cluster.cfg
        self._plan = scheduler.Scheduler(
            rolling._queue.share(worker),
            num_pages=cfg.num_pages,
            page_size=cfg.page_size,
            max_rows=cfg.max_rows,
        )
        self._version = self._cluster.drafter.version

    def turn(self) -> None:
        """Admits rows and decodes once, or is done."""
        rolling, cluster, plan = self._rolling, self._cluster, self._plan
        cfg, costs = cluster.cfg, cluster.costs
        admission = plan.admit(cfg.steps_per_call)
        seconds = 0.0
        jobs = (*admission.prompts, *admission.returns)
        if jobs:
            seconds = costs.prefill_s(sum(len(j.text) - j.start for j in jobs))
            rolling.spent.prefill_s += seconds
        if not plan.rows:
            rolling.spent.num_preempted += plan.num_preempted
            rolling.send(records.WorkerDone(*self._numbers))
            return
        cluster.after(seconds, self._decode)

    def _decode(self) -> None:
        rolling, cluster, rows = self._rolling, self._cluster, list(self._plan.rows)
        cfg, costs = cluster.cfg, cluster.costs
        bucket = tuner_lib.bucket_of(len(rows), cfg.max_rows)
        strategy = cluster.tuner.choose(len(rows)) if cluster.tuner else None
        quota = scheduler.finish_quota(len(rows), self._plan.num_waiting, cfg.max_rows)
        texts = [rolling.responses[row.request.request_id] for row in rows]
        drawn = [len(row.tokens) for row in rows]
        left = np.array([text.num_tokens for text in texts]) - drawn
        lifetimes = None
        if strategy is not None:
            lifetimes = draw_lifetimes(
                cluster.rng,
                cluster.acceptance.survival(strategy, cluster.drafter.quality),
                [(text.drafted, n) for text, n in zip(texts, drawn, strict=True)],
                cfg.steps_per_call,
            )
        num_steps, counts, accepted = decode(left, lifetimes, cfg.steps_per_call, quota)
        context = sum(row.length for row in rows) + counts.sum() / 2
        elapsed_s = num_steps * costs.step_s(bucket, strategy, context)
        if not np.isfinite(elapsed_s) or elapsed_s <= 0:
            raise ValueError(
                f"a step of {strategy or 'plain decoding'} at {bucket} rows takes "
                f"{elapsed_s / num_steps:g} s: step times are above 0."
            )
        filling_s = self._fill(rows, strategy)
        call = tuner_lib.Call(
            num_rows=len(rows),
            bucket=bucket,
            strategy=strategy,
            elapsed_s=elapsed_s,
            num_steps=num_steps,
            num_tokens=int(counts.sum()),
            num_accepted=accepted,
        )
        spent = rolling.spent
        spent.num_steps += num_steps
        spent.num_tokens += call.num_tokens
        spent.steps_by_kind[bucket, strategy] += num_steps
        if accepted:
            rolling.accepted[0] += accepted[0]
            rolling.accepted[1] += sum(accepted)
        finished = [
            row for row, n, most in zip(rows, counts, left, strict=True) if n == most
        ]
        total_s = filling_s + elapsed_s + len(finished) * costs.finished_s
        cluster.after(total_s, lambda: self._decoded(rows, counts, call, finished))

    def _fill(self, rows, strategy) -> float:
        """Bring the drafter's cache up to date; return the seconds."""
        drafter = self._cluster.drafter
        if drafter.version != self._version:
            self._version = drafter.version
            for row in rows:
                row.drafted = 0
        if strategy is None or not strategy.drafts:
            return 0.0
        missing = [
            row.length - row.drafted
            for row in rows
            if row.length - row.drafted > strategy.max_accept_length
        ]
        return self._cluster.costs.fill_s(sum(missing)) if missing else 0.0

    def _decoded(self, rows, counts, call, finished) -> None:
        cluster = self._cluster
        if cluster.tuner is not None:
            cluster.tuner.record(call)
        speculated = call.strategy is not None
        for row, count in zip(rows, counts, strict=True):
            # Tokens are counted, not known: a range has a length and slices.
            row.tokens = range(len(row.tokens) + int(count))
            row.length += int(count)
            if speculated:
                row.drafted = row.length
        for row in finished:
            self._plan.finish(row)
        # Nobody is lost here, so that a worker's words change nothing but this time.
        cluster.coordination.send(records.WorkerAlive(*self._numbers))
        self.turn()


class _Training:
    """The spot trainer on waiting workers: `SpotTrainer._guarded`."""

    def __init__(self, rolling: _Rollout, order: records.Train):
        self._rolling, self._cluster = rolling, rolling.cluster
        self._order, self._joining = order, None
        self._num_steps = 0
        rolling._trainer = self

    def join(self, order: records.Train) -> None:
        """Lets more workers take part from the next step on."""
        self._joining = order

    def start(self) -> None:
        """Begins once programs and texts are there."""
        self._cluster.after(self._cluster.costs.start_s, self._begun)

    def _begun(self) -> None:
        if self._stopped():
            return
        self._runs(self._order)
        if self._cluster.is_measured:
            self._step()
            return
        # An RL step's first training begins with what drafts would have had accepted.
        self._cluster.is_measured = True
        self._cluster.after(self._cluster.costs.measured_s, self._go_on)

    def _go_on(self) -> None:
        if not self._stopped():
            self._step()

    def _runs(self, order: records.Train) -> None:
        self._order = order
        self._rolling.send(records.TrainingRuns(order.training, order.revision))

    def _step(self) -> None:
        if self._joining is not None:
            joining, self._joining = self._joining, None
            self._runs(joining)
        members = len(self._order.workers)
        seconds = self._cluster.costs.drafter_s
        if not seconds > 0:
            raise ValueError(
                f"a drafter's step takes {seconds:g} s: where workers train it takes "
                "more than 0."
            )
        self._cluster.after(seconds, lambda: self._stepped(members))

    def _stepped(self, members: int) -> None:
        drafter = self._cluster.drafter
        drafter.quality += (1 - drafter.quality) * (
            1 - (1 - drafter.learned) ** members
        )
        self._num_steps += 1
        self._rolling.spent.num_drafter_steps += members
        self._go_on()

    def _stopped(self) -> bool:
        """Ends the training if the coordinator says so."""
        c, number = self._cluster.coordination, self._order.training
        if not c.should_stop(number):
            return False
        publishes = c.may_publish(number) and self._num_steps
        self._cluster.after(
            self._cluster.costs.sync_s if publishes else 0.0,
            lambda: self._ended(publishes),
        )
        return True

    def _ended(self, publishes: bool) -> None:
        if publishes:
            self._cluster.drafter.version += 1
            if self._cluster.tuner is not None:
                self._cluster.tuner.changed("drafter")
        self._rolling.send(records.TrainingStopped(self._order.training))


def draw_lifetimes(
    rng: np.random.Generator,
    survival: np.ndarray,
    known: Sequence[tuple[workload.Drafted | None, int]],
    num_steps: int,
) -> np.ndarray:
    """Draws how many drafts each step of each row has accepted, `[rows, num_steps]`.

    By `survival`, `[depth]`, the chance that at least 1, 2, ... drafts are accepted; or
    as is known of a row: how its text fared before, or None, and its tokens so far.
    """
    draws = rng.random((len(known), num_steps))
    # At least d where the draw is below the chance of that.
    found = np.searchsorted(-survival, -draws, side="left")
    for i, (drafted, start) in enumerate(known):
        if drafted is not None:
            found[i] = drafted.accepted(start, len(survival), num_steps)
    return found


def decode(
    left: np.ndarray, lifetimes: np.ndarray | None, limit: int, quota: int
) -> tuple[int, np.ndarray, tuple[int, ...]]:
    """Decodes rows once, as the engine's program does.

    Steps are taken until a row has drawn `limit` tokens or `quota` rows have ended.
    `left`, `[n] int`, are tokens until each row ends; `lifetimes`, `[n, limit] int`,
    drafts accepted by each step; None: plain steps.

    Returns:
      Steps; tokens of each row, `[n] int`; `num_accepted` as of `tuner.Call`, up to
      the deepest draft that was accepted.
    """
    most = np.minimum(left, limit)
    if lifetimes is None:
        ended = np.sort(left)
        num_steps = int(min(ended[min(quota, len(left)) - 1], limit))
        return num_steps, np.minimum(left, num_steps), ()
    totals = np.minimum(np.cumsum(1 + lifetimes, axis=1), most[:, None])
    stops = (totals.max(axis=0) >= limit) | (
        (totals >= left[:, None]).sum(axis=0) >= quota
    )
    num_steps = int(np.argmax(stops)) + 1
    before = np.concatenate([np.zeros((len(left), 1), int), totals], axis=1)
    alive = before[:, :num_steps] < left[:, None]
    lived = np.bincount(lifetimes[:, :num_steps][alive])
    accepted = tuple(int(n) for n in np.cumsum(lived[::-1])[::-1])
    return num_steps, totals[:, num_steps - 1], accepted

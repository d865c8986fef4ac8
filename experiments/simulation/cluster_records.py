"""Plain records of a simulated cluster: its sizes, its drafter, what a rollout took."""

import collections
import dataclasses
from collections.abc import Mapping

from experiments.simulation import costs
from tlt_jax.rl.workers import records


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Sizes of a cluster and its engines.

    Attributes:
      num_workers: rollout workers.
      workers_per_place: those of one process, which train together.
      max_rows: rows that a worker decodes at once.
      num_pages, page_size: of a worker's cache, scratch page included.
      steps_per_call: tokens of a row in a decode call.
      max_new_tokens: length limit, for which pages are reserved.
      trains: whether waiting workers train the drafter.
      min_idle: waiting workers that begin a training.
    """

    num_workers: int
    workers_per_place: int
    max_rows: int
    num_pages: int
    page_size: int
    steps_per_call: int
    max_new_tokens: int
    trains: bool = True
    min_idle: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "trains" and getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} is out of range: at "
                    "least 1."
                )


@dataclasses.dataclass
class Drafter:
    """The state of the drafter.

    Attributes:
      quality: 0 to 1, see `workload.Acceptance`.
      learned: share of the distance to 1 that one worker's training step covers.
      lost: share of `quality` that an update of the target takes.
      version: counts publications.
    """

    quality: float = 1.0
    learned: float = 0.0
    lost: float = 0.0
    version: int = 0


@dataclasses.dataclass
class Report:
    """What came of a rollout.

    Attributes:
      makespan_s: from its begin to its end, drafter's last step included.
      num_tokens, num_steps: of decoding, over all workers.
      prefill_s: seconds of workers.
      accept_length: tokens per row and speculative step; 1 without.
      steps_by_kind: decode steps by (bucket, strategy).
      num_drafter_steps: taken on waiting workers, each worker's counted.
      num_preempted: rows put back for want of pages.
      intervals: what each worker did.
      sums: `workers/` values, as the coordinator gives them.
    """

    makespan_s: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    prefill_s: float = 0.0
    accept_length: float = 1.0
    steps_by_kind: collections.Counter[costs.Kind] = dataclasses.field(
        default_factory=collections.Counter
    )
    num_drafter_steps: int = 0
    num_preempted: int = 0
    intervals: tuple[records.Interval, ...] = ()
    sums: Mapping[str, float] = dataclasses.field(default_factory=dict)

"""Plain records of a simulated cluster: its sizes, its drafter, what a rollout took."""

import collections
import dataclasses
from collections.abc import Mapping

from experiments.simulation import costs
from tlt_jax.rl.workers import records


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Sizes of a cluster of rollout workers and their engines.

    Those of one process, a place, train together; a training begins when `min_idle`
    wait. A worker decodes `max_rows` at once, `steps_per_call` tokens of a row in a
    call; its pages include the scratch page, and are reserved for `max_new_tokens`.
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
    """The drafter's `quality`, 0 to 1 (see `workload.Acceptance`), and publications.

    One worker's training step covers `learned` of the distance to 1; an update of the
    target takes the share `lost`.
    """

    quality: float = 1.0
    learned: float = 0.0
    lost: float = 0.0
    version: int = 0


@dataclasses.dataclass
class Report:
    """What came of a rollout, over all workers, and what each of them did.

    `makespan_s` includes the drafter's last step; `accept_length` is 1 without
    speculative steps; of `num_drafter_steps` each worker's count; `num_preempted` rows
    were put back for want of pages; `sums` are the coordinator's `workers/` values.
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

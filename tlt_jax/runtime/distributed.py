"""The processes of a run: how they find each other and what they tell each other.

Every process runs the same program with the same settings. `initialize` joins them
through `jax.distributed`, so that a mesh may span their devices; a `Group` carries what
is not an array of such a mesh: what is small through process 0, what is large round a
ring, so that no process carries more than twice the values however many there are. A
program of one process has a group of one.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tlt_jax.runtime import channel, failures
from tlt_jax.runtime.transport import door, messages
from tlt_jax.runtime.transport import ring as ring_lib

# What a launcher says to the processes that it starts.
COORDINATOR = "TLT_JAX_COORDINATOR"
NUM_PROCESSES = "TLT_JAX_NUM_PROCESSES"
PROCESS = "TLT_JAX_PROCESS"
DEVICES = "TLT_JAX_DEVICES"
# Where the learner waits for separate rollout workers, by which secret, and for those
# the number of each.
MEETING = "TLT_JAX_MEETING"
SECRET = "TLT_JAX_SECRET"
WORKER = "TLT_JAX_WORKER"
# Where each of the learner's processes waits for reward workers, one after the other,
# and for those the number of each.
REWARD_MEETINGS = "TLT_JAX_REWARD_MEETINGS"
REWARD_WORKER = "TLT_JAX_REWARD_WORKER"
# Where a process listens; for machines whose name is not the address to use.
HOST = "TLT_JAX_HOST"

_LOCAL = ("localhost", "127.0.0.1")
_SHUTDOWN_LIMIT_S = 30
# What JAX says where it cannot listen.
_PORT_TAKEN = "Failed to start RPC server"
_TOLD_S = 1.0


def initialize(on_cluster: bool = False) -> None:
    """Join the run's other processes, if there are any; before any array is made.

    With `on_cluster` JAX finds out from the cluster's own launcher (Slurm, Open MPI,
    Kubernetes, TPU pods) who takes part. Otherwise the environment variables of
    `tlt_jax.launch` are read; without them this process is alone.

    Raises:
      channel.ProcessError: the others could not be joined.
    """
    if not on_cluster and COORDINATOR not in os.environ:
        if os.environ.get(DEVICES):
            # A rollout worker's, of those that the machine has.
            jax.config.update("jax_cuda_visible_devices", os.environ[DEVICES])
        return
    settings = {} if on_cluster else _settings()
    # Between processes CPUs need a library for what one process does by itself.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would keep SIGTERM from ending a process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **settings, shutdown_timeout_seconds=_SHUTDOWN_LIMIT_S
        )
    except (RuntimeError, ValueError) as error:
        if _PORT_TAKEN in str(error):
            raise channel.ProcessError(
                f"another program listens at {settings.get('coordinator_address')}: "
                "the same command takes another port."
            ) from error
        raise channel.ProcessError(
            f"the other processes could not be joined ({error}): start all of them, "
            "with tlt_jax.launch or your cluster's launcher."
        ) from error


def _settings() -> dict[str, Any]:
    """Read what a launcher has said."""
    coordinator, devices = os.environ[COORDINATOR], os.environ.get(DEVICES)
    settings: dict[str, Any] = dict(
        coordinator_address=coordinator,
        num_processes=int(os.environ[NUM_PROCESSES]),
        process_id=int(os.environ[PROCESS]),
    )
    if devices:
        settings["local_device_ids"] = [int(i) for i in devices.split(",")]
    if _is_local():
        settings["coordinator_bind_address"] = coordinator
    return settings


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where a process of the learner waits for workers in processes of their own.

    Attributes:
      address: its host and port.
      secret: who knows it belongs to the run.
      host: at which this process listens for others.
      worker: this one's number; None: it is of the learner.
    """

    address: tuple[str, int]
    secret: bytes
    host: str
    worker: int | None = None


def meeting() -> Meeting | None:
    """Read what a launcher has said of separate workers; None: nothing."""
    found = _meetings(MEETING, WORKER)
    return found[0] if found else None


def reward_meetings() -> list[Meeting]:
    """Read what a launcher has said of reward workers: by process of the learner."""
    return _meetings(REWARD_MEETINGS, REWARD_WORKER)


def _meetings(name: str, number: str) -> list[Meeting]:
    found, worker = [], os.environ.get(number)
    for address in filter(None, os.environ.get(name, "").split(",")):
        host, _, port = address.rpartition(":")
        found.append(
            Meeting(
                (host, int(port)),
                bytes.fromhex(os.environ[SECRET]),
                os.environ.get(HOST, "127.0.0.1"),
                None if worker is None else int(worker),
            )
        )
    return found


def open_door(meeting: Meeting, about: Mapping[str, str]) -> door.Door:
    """Let workers in at a meeting; for `about` see `door.Door`.

    Raises:
      failures.UserError: another program listens there.
    """
    try:
        return door.Door(meeting.address, meeting.secret, about)
    except OSError as error:
        host, port = meeting.address
        raise failures.UserError(
            f"another program listens at {host}:{port} ({error.strerror}): the same "
            "command takes another port."
        ) from error


class Group(contextlib.AbstractContextManager):
    """What the processes of a run have in common; this one has the `index` of `num`."""

    def __init__(
        self,
        index: int = 0,
        num: int = 1,
        link: channel.Server | channel.Client | None = None,
    ):
        """Take the link; `alone`, `linked` and `join` make groups."""
        self.index, self.num = index, num
        self._link = link
        self._ring: ring_lib.Ring | None = None
        self._num_meetings = 0

    def __exit__(self, kind: object, *_: object) -> None:
        if self._link is not None:
            for name, num_bytes in self.traffic.items():
                logging.info("%s: %d bytes through this process", name, num_bytes)
            self._link.close(failed=kind is not None)
        if self._ring is not None:
            self._ring.close()

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes sent and received by this process: of `calls` and `values`."""
        carriers = {"calls": self._link, "values": self._ring}
        return {n: c.traffic.num_bytes for n, c in carriers.items() if c is not None}

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: it writes, shows and serves."""
        return self.index == 0

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Give a small `value` to all and get everyone's, in order of processes.

        All processes call this, in the same order and for the same topic. It waits for
        the last of them as long as that takes. Everything goes through process 0, so
        arrays are refused: `gather` is for them.

        Raises:
          channel.ProcessError: a process has ended, or came for another topic.
        """
        if self._link is None:
            return [value]
        self._num_meetings += 1
        return self._link.meet(self._num_meetings, topic, self.index, value)

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Do as `exchange` does with what is large: arrays, and records of them.

        Values go from process to process, see `ring`; through process 0 go their sizes.
        Arrays of others are views of memory that is nobody else's.
        """
        if self._link is None:
            return [value]
        own = messages.pack(value)
        sizes = self.exchange(topic, messages.size(own))
        try:
            parts = self._ring.gather(sizes, own)
        except ring_lib.RingError as error:
            self.explain(error)
            raise channel.ProcessError(str(error)) from error
        found = [value if part is None else messages.unpack(part) for part in parts]
        return found

    def first(self, topic: str, make: Callable[[], Any]) -> Any:
        """Let process 0 make what all get; the others wait. See `exchange`."""
        return self.exchange(topic, make() if self.is_first else None)[0]

    def first_large(self, topic: str, make: Callable[[], Any]) -> Any:
        """Do as `first` does with what is large; see `gather`."""
        return self.gather(topic, make() if self.is_first else None)[0]

    def check_same(self, topic: str, value: Any) -> None:
        """Make sure that all processes have the same `value`.

        Raises:
          ValueError: they have not.
        """
        found = self.exchange(topic, value)
        if any(other != found[0] for other in found):
            raise ValueError(
                f"the processes have different {topic}: start all of them with the "
                "same command line and files."
            )

    def explain(self, error: Exception) -> None:
        """Raise a `ProcessError` in place of `error` if a process has ended.

        What JAX says of a collective whose other side is gone, helps nobody.
        """
        if self._link is None:
            return
        # The end of a process is told by other means, a moment later.
        time.sleep(_TOLD_S)
        try:
            self._link.check()
        except channel.ProcessError as cause:
            raise cause from error

    def offer(self, name: str, target: Any) -> None:
        """In process 0: let the others call `target`'s methods."""
        if self._link is not None:
            self._link.offer(name, target)

    def call(self, name: str, method: str, *args: Any) -> Any:
        """In another process: call a method of what process 0 offers by `name`."""
        return self._link.call(name, method, *args)


def linked(
    index: int,
    num: int,
    link: channel.Server | channel.Client,
    host: str,
    secret: bytes,
) -> Group:
    """Make a group of processes whose channel there is; all of them do.

    Each listens at its `host`, where the process before it must reach it.

    Raises:
      channel.ProcessError: a process cannot be reached by its neighbour.
    """
    group = Group(index, num, link)
    ring = group._ring = ring_lib.Ring(index, num, host, secret)
    link.when_broken(ring.close)
    addresses = group.exchange("addresses", list(ring.address))
    try:
        ring.connect(addresses)
    except ring_lib.RingError as error:
        group.explain(error)
        raise channel.ProcessError(str(error)) from error
    return group


def alone() -> Group:
    """Return the group of a program of one process."""
    return Group()


def join() -> Group:
    """Make the group of all processes that `initialize` has joined.

    The channel's address and secret travel through a collective of JAX.
    """
    index, num = jax.process_index(), jax.process_count()
    if num == 1:
        return alone()
    if index == 0:
        secret = secrets.token_bytes(32)
        server = channel.Server(num, _host(), secret, on_gone=_leave)
        logging.info("listening at %s for %d processes", server.address, num - 1)
        host, port = server.address
        _broadcast(b"\n".join([secret.hex().encode(), host.encode(), b"%d" % port]))
        return linked(0, num, server, _host(), secret)
    secret, host, port = _broadcast(b"").split(b"\n")
    address, key = (host.decode(), int(port)), bytes.fromhex(secret.decode())
    client = channel.Client(index, address, key, on_gone=_leave)
    return linked(index, num, client, _host(), key)


def leave() -> None:
    """Part from the run's other processes, which do the same, before an early end."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def _leave(reason: str) -> None:
    """End this process, which waits in a collective for one that is gone."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _host() -> str:
    """Return the address of this machine at which other processes find it."""
    if HOST in os.environ:
        return os.environ[HOST]
    if _is_local():
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())


def _is_local() -> bool:
    return os.environ.get(COORDINATOR, "").rpartition(":")[0] in _LOCAL


def _broadcast(message: bytes) -> bytes:
    """Give process 0's message to all."""
    padded = np.zeros(512, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0")

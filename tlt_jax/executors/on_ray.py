"""Members as actors of Ray, in a placement group; see `executor`.

`RAY_ADDRESS` names the cluster; without it one of this machine is begun, on the
loopback, and ends with this process. Ray is an optional extra: `pip install
'tlt-jax[ray]'`.
"""

import collections
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from tlt_jax.executors import executor
from tlt_jax.executors import member as member_lib

_ADDRESS = "RAY_ADDRESS"
_LOOPBACK = "127.0.0.1"
# Resources may be in use by who is about to end.
_PLACED_S = 60.0
_ANSWER_S = 60.0
_CONNECT_S = 10.0
# The least that Ray takes.
_STORE_BYTES = 75 << 20
_ACCELERATORS = "GPU", "TPU"


class OnRay(executor.Executor):
    """Operates actors."""

    is_local = False
    look_s = 0.3

    def __init__(self):
        """Join the cluster, or begin one.

        Raises:
          executor.ExecutorError: Ray is not installed, or the cluster not reached.
        """
        # Nothing is reported to anybody, unless the user wants it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # It is about to change what actors without GPUs see; they see none either way.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = os.environ.get(_ADDRESS, "")
        if not address:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            # Ray's name for clusters of several machines: without them it takes the
            # loopback, which it otherwise replaces by the machine's other address,
            # even where it is named below.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
            import ray.util.scheduling_strategies as strategies
        except ImportError as error:
            raise executor.ExecutorError(
                f"--executor=ray needs Ray, which is not there ({error}): install "
                "tlt-jax[ray], or use --executor=local."
            ) from error
        self._ray, self._strategies = ray, strategies
        self._is_own = not address
        _check_answers(address)
        own: dict[str, Any] = {}
        if not address:
            own = {
                "include_dashboard": False,
                "_node_ip_address": _LOOPBACK,
                # What is called is some words; arrays take other ways.
                "object_store_memory": _STORE_BYTES,
            }
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
        # Of many kinds, Ray's own among them; whatever it is, there is no cluster.
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            where = f"{_ADDRESS}={address}" if address else "a cluster of this machine"
            raise executor.ExecutorError(
                f"{where}: Ray cannot be joined ({first}): it must be of the same "
                "version, and RAY_AUTH_MODE and token those of the cluster."
            ) from error
        self._group: Any = None
        self._members: list[Any] = []
        self._bundles: list[dict[str, float]] = []

    def start(self, shares: Sequence[executor.Share]) -> None:
        ray, num = self._ray, len(shares)
        there = ray.cluster_resources()
        kind = next(filter(there.get, _ACCELERATORS), "")
        self._bundles = [_bundle(share, kind) for share in shares]
        needed: collections.Counter[str] = collections.Counter()
        for bundle in self._bundles:
            needed.update(bundle)
        for name, count in needed.items():
            if count > there.get(name, 0.0):
                raise executor.ExecutorError(
                    f"{num} processes need {count:g} {name} together, and the Ray "
                    f"cluster has {there.get(name, 0.0):g}: start fewer processes, or "
                    "add nodes."
                )
        self._group = ray.util.placement_group(self._bundles, strategy="PACK")
        if not self._group.wait(_PLACED_S):
            free = ray.available_resources()
            told = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in needed)
            self.stop()
            raise executor.ExecutorError(
                f"the Ray cluster did not place {num} processes, which need "
                f"{', '.join(f'{n:g} {name}' for name, n in needed.items())}, within "
                f"{_PLACED_S:g} s; free are {told}: wait for others, or add nodes."
            )
        self._members = [self._place(index) for index in range(num)]
        for index in range(num):
            self.call(index, "poll")

    def restart(self, index: int) -> None:
        self._ray.kill(self._members[index])
        self._members[index] = self._place(index)
        # Its bundle may have to find another machine first.
        self.call(index, "poll")

    def stop(self) -> None:
        for one in self._members:
            self._ray.kill(one)
        self._members = []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        self._ray.shutdown()

    def _place(self, index: int) -> Any:
        ray = self._ray
        strategy = self._strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=index
        )
        actor, bundle = ray.remote(member_lib.Member), self._bundles[index]
        options: dict[str, Any] = {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0.0),
            "scheduling_strategy": strategy,
        }
        if "TPU" in bundle:
            options["resources"] = {"TPU": bundle["TPU"]}
        return actor.options(**options).remote()

    def host(self, index: int) -> str:
        if self._is_own:
            # A worker of Ray may name this machine's other address.
            return _LOOPBACK
        context = self._ray.get_runtime_context
        asked = self._members[index].__ray_call__.remote(
            lambda _: context().get_node_id()
        )
        node = self._answer(index, asked)
        for one in self._ray.nodes():
            if one["NodeID"] == node:
                return one["NodeManagerAddress"]
        raise executor.ExecutorError(f"process {index} is gone (with its node)")

    def _call(self, index: int, method: str, arguments: list[Any]) -> Any:
        asked = getattr(self._members[index], method).remote(*arguments)
        return self._answer(index, asked)

    def _answer(self, index: int, asked: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(asked, timeout=_ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.GetTimeoutError,
        ) as error:
            first = str(error).strip().partition("\n")[0]
            raise executor.ExecutorError(
                f"process {index} is gone ({first})"
            ) from error

    def _codes(self) -> list[int | None]:
        ray = self._ray
        asked = [one.poll.remote() for one in self._members]
        codes: list[int | None] = []
        for one in asked:
            try:
                codes.append(ray.get(one, timeout=_ANSWER_S))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                codes.append(executor.GONE)
        return codes


def _bundle(share: executor.Share, kind: str) -> dict[str, float]:
    """Return what a member takes of a node that has accelerators of a kind, if any."""
    taken = {"CPU": 1.0 if share.cpus is None else share.cpus}
    if kind and share.devices:
        taken[kind] = float(share.devices)
    return taken


def _check_answers(address: str) -> None:
    """Make sure that somebody listens at `host:port`: Ray would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        raise executor.ExecutorError(
            f"{_ADDRESS}={address}: Ray cannot be joined ({error}): start the cluster "
            "(`ray start --head`), or unset the variable for one of this machine."
        ) from error

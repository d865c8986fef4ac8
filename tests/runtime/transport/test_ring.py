"""Rings of threads; of processes, which count what each carries."""

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tlt_jax.runtime.transport import messages
from tlt_jax.runtime.transport import ring as ring_lib

ROOT = pathlib.Path(__file__).resolve().parents[3]
# A process of a ring without the rest of a run: joins by what it reads, brings so many
# bytes, and says what it has carried, by its own count and by the system's.
MEMBER = """
import json, socket, struct, sys
import numpy as np
from tlt_jax.runtime.transport import messages, ring
index, *sizes = map(int, sys.argv[1:])
one = ring.Ring(index, len(sizes), "127.0.0.1", b"secret")
print(json.dumps(one.address), flush=True)
one.connect(json.loads(sys.stdin.readline()))
parts = one.gather(sizes, [memoryview(np.full(sizes[index], index, np.uint8))])
right = all(p is None or bytes(p) == bytes([i]) * sizes[i] for i, p in enumerate(parts))
# struct tcp_info: bytes_acked and bytes_received stand after 24 and 6 words.
def carried(link):
    told = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 200)
    return struct.unpack_from("=QQ", told, 120)
import time
time.sleep(0.2)
acked, received = carried(one._after)[0], carried(one._before)[1]
print(json.dumps([right, one.traffic.sent_bytes, one.traffic.received_bytes,
                  acked, received]), flush=True)
sys.stdin.readline()
"""
MIB = 1 << 20


@contextlib.contextmanager
def rings(num):
    made = [ring_lib.Ring(i, num, "127.0.0.1", b"secret") for i in range(num)]
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        addresses = [one.address for one in made]
        list(pool.map(lambda one: one.connect(addresses), made))
        yield made, pool
        for one in made:
            one.close()


def carried(sizes):
    """Lets processes bring parts of these sizes; returns bytes carried by each."""
    num = len(sizes)
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(index), *map(str, sizes)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(num)
    ]
    addresses = [json.loads(member.stdout.readline()) for member in members]
    for member in members:
        member.stdin.write(json.dumps(addresses) + "\n")
        member.stdin.flush()
    found = [json.loads(member.stdout.readline()) for member in members]
    for member in members:
        member.communicate("\n", timeout=60)
        assert member.returncode == 0
    for right, sent, received, acked, arrived in found:
        assert right
        # The system has seen the greeting, too, and no more than that.
        assert sent <= acked <= sent + 1000 and received <= arrived <= received + 1000
    return [sent + received for _, sent, received, *_ in found]


# Even parts, as completions are; one that brings nearly all; one that brings all.
@pytest.mark.parametrize(
    "num",
    [2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16, 32))],
)
def test_the_busiest_process_carries_twice_the_values_at_most(num):
    even, lone = [8 * MIB // num] * num, [0] * num
    uneven = [MIB // 8 + 7 * i for i in range(num)]
    uneven[num // 2], lone[-1] = 4 * MIB, 8 * MIB + 3
    for sizes in (even, uneven, lone):
        total, found = sum(sizes), carried(sizes)
        print(f"{num} processes, {total} bytes: {max(found) / total:.3f} x at most")
        assert max(found) <= 2 * total
        # All get all: half of it is what comes, the other half what is passed on.
        assert sum(found) == 2 * (num - 1) * total


def test_parts_arrive_whole_in_whatever_chunks_they_come(monkeypatch):
    monkeypatch.setattr(ring_lib, "_CHUNK_BYTES", 7)
    values = [np.arange(n, dtype=np.int16) for n in (100, 0, 1, 33, 5)]
    with rings(5) as (made, pool):
        parts = [messages.pack({"of": i, "x": x}) for i, x in enumerate(values)]
        sizes = [messages.size(part) for part in parts]
        # Twice: nothing is left over on the way.
        for _ in range(2):
            found = list(
                pool.map(lambda one: one.gather(sizes, parts[one._index]), made)
            )
            for index, others in enumerate(found):
                assert others[index] is None
                for i, other in enumerate(others):
                    if i != index:
                        value = messages.unpack(other)
                        assert value["of"] == i
                        assert value["x"].tolist() == values[i].tolist()


def test_who_is_gone_is_noticed_by_all(monkeypatch):
    with rings(3) as (made, pool):
        sizes = [10 * MIB] * 3
        part = [memoryview(bytes(sizes[0]))]
        waiting = [pool.submit(made[i].gather, sizes, part) for i in (0, 2)]
        time.sleep(0.1)
        assert not any(one.done() for one in waiting)
        made[1].close()
        for one in waiting:
            with pytest.raises(
                ring_lib.RingError, match="the ring of processes is bro"
            ):
                one.result(10)
    assert not [t for t in threading.enumerate() if t.name == "ring sender"]


def test_a_stranger_is_no_neighbour_and_holds_up_nobody():
    made = [ring_lib.Ring(i, 2, "127.0.0.1", b"secret") for i in range(2)]
    quiet = [socket.create_connection(made[0].address) for _ in range(10)]
    stranger = ring_lib.Ring(1, 2, "127.0.0.1", b"another secret")
    addresses = [one.address for one in made]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        joining = pool.submit(stranger.connect, addresses)
        with pytest.raises(
            ring_lib.RingError, match="process 0 cannot be reached at 12"
        ):
            joining.result(10)
        started = time.monotonic()
        list(pool.map(lambda one: one.connect(addresses), made))
        assert time.monotonic() - started < 5
    for one in (*made, stranger, *quiet):
        one.close()


def test_a_neighbour_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(ring_lib, "_CONNECT_S", 0.2)
    made = [ring_lib.Ring(i, 3, "127.0.0.1", b"secret") for i in range(3)]
    told = "process 0 did not connect to process 1 within 0.2 s"
    with pytest.raises(ring_lib.RingError, match=told):
        made[1].connect([one.address for one in made])
    for one in made:
        one.close()

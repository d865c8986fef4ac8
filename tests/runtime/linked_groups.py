"""Groups of processes, here threads of one, linked as those of a run are."""

import concurrent.futures
import contextlib
from collections.abc import Iterator

from tlt_jax.runtime import channel, distributed

_HOST, _SECRET = "127.0.0.1", b"secret"


@contextlib.contextmanager
def of(num: int) -> Iterator[list[distributed.Group]]:
    """Makes the groups of so many; what waits for them is let go at the end."""
    server = channel.Server(num, _HOST, _SECRET)
    ends = [server]
    ends += [channel.Client(i, server.address, _SECRET) for i in range(1, num)]

    def link(index):
        return distributed.linked(index, num, ends[index], _HOST, _SECRET)

    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        groups = list(pool.map(link, range(num)))
    yield groups
    server.close(failed=True)
    for group in groups:
        group._ring.close()

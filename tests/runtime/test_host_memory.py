"""Freed memory stays with the process: asked of the system, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import ctypes, resource, sys

from tlt_jax.runtime import host_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 64 << 20

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = host_memory.keep_freed()
faults_of_a_block()
print(done, faults_of_a_block() < 1000)
"""


def run(**environment):
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.split()


def test_blocks_are_kept_where_there_are_only_cpus():
    # 64 MiB are 16384 pages, and each of them a fault where the block was given back.
    assert run(JAX_PLATFORMS="cpu") == ["True", "True"]
    assert run(JAX_PLATFORMS="cuda") == ["False", "False"]

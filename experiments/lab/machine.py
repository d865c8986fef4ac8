"""What a table was measured on: the machine, its devices, the code."""

import collections
import os
import pathlib
import platform
import shutil
import subprocess


def device_name() -> str:
    """Names what programs compute on here, without taking hold of it."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return "cpu"
    if shutil.which("nvidia-smi"):
        told = _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        names = collections.Counter((told or "").splitlines())
        if names:
            return ", ".join(f"{num} x {name}" for name, num in names.items())
    if chips := os.environ.get("TPU_ACCELERATOR_TYPE"):
        return f"TPU {chips}"
    return "cpu"


def cpu_model() -> str:
    """Returns the processor's own name, where the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def git(*arguments: str) -> str | None:
    """Returns what git says of this checkout; None: it is none."""
    return _told("git", *arguments)


def _told(*command: str) -> str | None:
    where = {"cwd": pathlib.Path(__file__).parent, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, check=True, **where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

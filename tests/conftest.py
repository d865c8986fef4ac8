"""Set-up of every test process: simulated devices, exact products, compile cache."""

import importlib.metadata
import os
import pathlib
import tempfile

# Read when jax is first imported, so set before that. Nearly all the time of the tests
# goes into compiling. Without LLVM's optimisations that takes half as long, and a third
# of that where code for fusions is not made by way of MLIR, which jax 0.11 always does.
# An accelerator is compiled for as users' programs are.
NUM_DEVICES = 8
os.environ.setdefault("JAX_PLATFORMS", "cpu")
QUICKLY = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICKLY += ["--xla_cpu_use_fusion_emitters=false"]
    QUICKLY += ["--xla_cpu_parallel_codegen_split_count=1"]
if os.environ["JAX_PLATFORMS"] != "cpu":
    QUICKLY = []
for _flags in ([f"--xla_force_host_platform_device_count={NUM_DEVICES}"], QUICKLY):
    _given = os.environ.get("XLA_FLAGS", "")
    # Who gives the first of them decides about all.
    if _flags and _flags[0].partition("=")[0] not in _given:
        os.environ["XLA_FLAGS"] = " ".join([_given, *_flags]).strip()
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs compiled by one test process are found by the others and by the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"tlt_jax_tests_{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

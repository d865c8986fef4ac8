"""Set-up of every test process: simulated devices, exact products, compile cache."""

import os
import pathlib
import tempfile

# Read when jax is first imported, so set before that. Nearly all the time of the tests
# goes into compiling. Without LLVM's optimisations that takes half as long, and a third
# of that where code for fusions is not made by way of MLIR.
NUM_DEVICES = 8
for _flag, _value in (
    ("--xla_force_host_platform_device_count", NUM_DEVICES),
    ("--xla_backend_optimization_level", 0),
    ("--xla_cpu_use_fusion_emitters", False),
    ("--xla_cpu_parallel_codegen_split_count", 1),
):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
        )
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs compiled by one test process are found by the others and by the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"tlt_jax_tests_{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

"""Machine code in XLA's programs for CPUs: compile what `code` wrote, and register it.

A kernel is a module with one handler of XLA's typed foreign-function interface per
target, see `job`. LLVM itself is loaded with the first one: processes on other devices
import this module too, and never need it.
"""

import ctypes
import sys
from collections.abc import Mapping

import jax

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import job as job_lib


def is_supported() -> bool:
    """Tell whether kernels can be compiled and called on this machine at all."""
    return sys.platform != "win32" and ctypes.sizeof(ctypes.c_void_p) == 8


def host_features() -> frozenset[str]:
    """Return the names by which LLVM calls what the host's CPU has."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def has_fma(features: frozenset[str]) -> bool:
    """Tell whether a CPU multiplies and adds in one rounding."""
    return "fma" in features or "neon" in features


def register(
    module: code_lib.Module,
    handlers: Mapping[str, str],
    cpu: str | None = None,
    *,
    num_devices: int | None = None,
) -> None:
    """Compile a kernel and register its handlers for XLA's programs on CPUs.

    The machine code stays until the process ends: programs, and threads of XLA that
    come too late for a unit, may enter it at any time.

    Args:
      module: the kernel, begun by `job.begin`.
      handlers: names of its functions, by the target's name in programs; a target is
        registered once in a process.
      cpu: what LLVM calls the CPU to compile for; None: the host's.
      num_devices: that share the threads; None: the process's CPU devices.
    """
    import llvmlite.binding as llvm

    if num_devices is None:
        num_devices = len(jax.local_devices(backend="cpu"))
    code, () = module.begin(job_lib.NUM_DEVICES, code_lib.I64)
    code.ret(code.number(num_devices))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu or llvm.get_host_cpu_name(),
        features="" if cpu else llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    compiled = llvm.parse_assembly(module.text())
    compiled.verify()
    # Variables into registers, loops and addresses into shape, no more: kernels arrange
    # their own instructions, and all of LLVM's passes rather undo that.
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_loop_rotate_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    options = llvm.create_pipeline_tuning_options()
    builder = llvm.create_pass_builder(machine, options)
    for fn in compiled.functions:
        if not fn.is_declaration:
            passes.run(fn, builder)
    engine = llvm.create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    addresses = {t: engine.get_function_address(name) for t, name in handlers.items()}
    engine.detach()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    for target, address in addresses.items():
        capsule = new_capsule(address, None, None)
        jax.ffi.register_ffi_target(target, capsule, platform="cpu", api_version=1)

"""Which machines the native kernels' tests need, and lesser CPUs to compile for."""

import llvmlite.binding as llvm
import pytest

from tlt_jax.cpu_kernels import code, ffi

# Windows and 32-bit machines have no native kernels: `choice` leaves them to XLA.
needs_native = pytest.mark.skipif(
    not ffi.is_supported(), reason="no native kernels on this machine"
)
# Code for x86 cannot be run elsewhere; that for Arm is compiled everywhere.
needs_x86 = pytest.mark.skipif(
    "sse2" not in ffi.host_features(), reason="code for another kind of CPU"
)
# CPUs whose code this host runs as well, and their features: what they have, it has.
LESSER_CPUS = {
    cpu: features
    for cpu, features in (
        ("haswell", frozenset({"avx2", "fma"})),
        ("x86-64", frozenset()),
    )
    if features <= ffi.host_features()
}


def arm_assembly(kernel: code.Module) -> str:
    """Compile a kernel for a CPU of Arm's, which any host can; it is not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="neoverse-n1")
    module = llvm.parse_assembly(kernel.text())
    module.verify()
    return machine.emit_assembly(module)

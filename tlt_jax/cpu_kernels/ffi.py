"""Machine code in XLA's programs for CPUs: compile LLVM IR, register it, share threads.

A kernel is a text of LLVM IR with one handler of XLA's typed foreign-function interface
(`xla/ffi/api/c_api.h`) per target. It may call what `RUNTIME` defines: reading call
frames, and running the chunks of a job on the program's own threads. A job is taken
chunk by chunk from a counter, by the calling thread as well, so that it ends whether or
not any other thread is free; a thread that starts too late finds no chunk left.

All CPU devices of a process have one pool of threads. A program of one device takes its
device's share of them and no more, so that devices do not slow one another down.
"""

import ctypes
import sys
from collections.abc import Mapping

import jax
import llvmlite.binding as llvm

# Bytes of a job that the runtime uses; the kernel's own fields follow.
JOB_HEADER = 64

# Offsets are those of the C structs on 64-bit machines. Versions 0.3 and 0.4 of the
# interface (jaxlib 0.10 and 0.11) have the same ones; a runtime older than the version
# answered, or of another major one, refuses the handler when it is registered.
#
# Job: i64 next chunk, i64 chunks done, i64 references, i64 chunks, ptr body.
# What every kernel may call.
RUNTIME = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()

; Answers the question which interface the handler was written for.
define internal i1 @tlt_metadata(ptr %frame) {
  %at = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %at
  %absent = icmp eq ptr %extension, null
  br i1 %absent, label %no, label %look
look:
  %type_at = getelementptr i8, ptr %extension, i64 8
  %type = load i32, ptr %type_at
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %yes, label %no
yes:
  %metadata_at = getelementptr i8, ptr %extension, i64 24
  %metadata = load ptr, ptr %metadata_at
  %major_at = getelementptr i8, ptr %metadata, i64 24
  store i32 0, ptr %major_at
  %minor_at = getelementptr i8, ptr %metadata, i64 28
  store i32 3, ptr %minor_at
  %traits_at = getelementptr i8, ptr %metadata, i64 32
  store i32 0, ptr %traits_at
  ret i1 true
no:
  ret i1 false
}

define internal ptr @tlt_argument(ptr %frame, i64 %index) {
  %at = getelementptr i8, ptr %frame, i64 72
  %all = load ptr, ptr %at
  %one = getelementptr ptr, ptr %all, i64 %index
  %buffer = load ptr, ptr %one
  ret ptr %buffer
}

define internal ptr @tlt_result(ptr %frame, i64 %index) {
  %at = getelementptr i8, ptr %frame, i64 112
  %all = load ptr, ptr %at
  %one = getelementptr ptr, ptr %all, i64 %index
  %buffer = load ptr, ptr %one
  ret ptr %buffer
}

define internal ptr @tlt_data(ptr %buffer) {
  %at = getelementptr i8, ptr %buffer, i64 24
  %data = load ptr, ptr %at
  ret ptr %data
}

define internal i64 @tlt_rank(ptr %buffer) {
  %at = getelementptr i8, ptr %buffer, i64 32
  %rank = load i64, ptr %at
  ret i64 %rank
}

; Product of the buffer's dimensions start to stop - 1.
define internal i64 @tlt_count(ptr %buffer, i64 %start, i64 %stop) {
entry:
  %at = getelementptr i8, ptr %buffer, i64 40
  %dims = load ptr, ptr %at
  br label %head
head:
  %i = phi i64 [%start, %entry], [%i_next, %body]
  %count = phi i64 [1, %entry], [%count_next, %body]
  %more = icmp slt i64 %i, %stop
  br i1 %more, label %body, label %done
body:
  %dim_at = getelementptr i64, ptr %dims, i64 %i
  %dim = load i64, ptr %dim_at
  %count_next = mul i64 %count, %dim
  %i_next = add i64 %i, 1
  br label %head
done:
  ret i64 %count
}

define internal void @tlt_destroy(ptr %frame, ptr %error) {
  %args = alloca [24 x i8], align 8
  store i64 24, ptr %args
  %extension = getelementptr i8, ptr %args, i64 8
  store ptr null, ptr %extension
  %error_at = getelementptr i8, ptr %args, i64 16
  store ptr %error, ptr %error_at
  %api_at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_at
  %call_at = getelementptr i8, ptr %api, i64 64
  %call = load ptr, ptr %call_at
  call void %call(ptr %args)
  ret void
}

; How many threads the program has, its device's share; 1 where it has no pool.
define internal i64 @tlt_threads(ptr %frame) {
  %count = alloca i64
  store i64 1, ptr %count
  %args = alloca [32 x i8], align 8
  store i64 32, ptr %args
  %extension = getelementptr i8, ptr %args, i64 8
  store ptr null, ptr %extension
  %context_at = getelementptr i8, ptr %frame, i64 24
  %context = load ptr, ptr %context_at
  %context_to = getelementptr i8, ptr %args, i64 16
  store ptr %context, ptr %context_to
  %count_to = getelementptr i8, ptr %args, i64 24
  store ptr %count, ptr %count_to
  %api_at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_at
  %call_at = getelementptr i8, ptr %api, i64 144
  %call = load ptr, ptr %call_at
  %error = call ptr %call(ptr %args)
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %known, label %failed
failed:
  call void @tlt_destroy(ptr %frame, ptr %error)
  ret i64 1
known:
  %found = load i64, ptr %count
  %devices = call i64 @tlt_devices()
  %share = udiv i64 %found, %devices
  %some = icmp sgt i64 %share, 1
  %threads = select i1 %some, i64 %share, i64 1
  ret i64 %threads
}

; Drops one reference to the job; the last one frees it.
define internal void @tlt_release(ptr %job) {
  %refs_at = getelementptr i8, ptr %job, i64 16
  %before = atomicrmw sub ptr %refs_at, i64 1 acq_rel
  %last = icmp eq i64 %before, 1
  br i1 %last, label %drop, label %done
drop:
  call void @free(ptr %job)
  ret void
done:
  ret void
}

; Takes chunks until there are none.
define internal void @tlt_work(ptr %job) {
  %done_at = getelementptr i8, ptr %job, i64 8
  %chunks_at = getelementptr i8, ptr %job, i64 24
  %chunks = load i64, ptr %chunks_at
  %body_at = getelementptr i8, ptr %job, i64 32
  %body = load ptr, ptr %body_at
  br label %take
take:
  %chunk = atomicrmw add ptr %job, i64 1 monotonic
  %some = icmp slt i64 %chunk, %chunks
  br i1 %some, label %run, label %none
run:
  call void %body(ptr %job, i64 %chunk)
  %before = atomicrmw add ptr %done_at, i64 1 release
  br label %take
none:
  ret void
}

define internal void @tlt_task(ptr %job) {
  call void @tlt_work(ptr %job)
  call void @tlt_release(ptr %job)
  ret void
}

; Runs all chunks of the job on up to %threads threads, and gives the job up.
define internal void @tlt_run(
    ptr %frame, ptr %job, ptr %body, i64 %chunks, i64 %threads) {
entry:
  %args = alloca [40 x i8], align 8
  store i64 0, ptr %job
  %done_at = getelementptr i8, ptr %job, i64 8
  store i64 0, ptr %done_at
  %refs_at = getelementptr i8, ptr %job, i64 16
  store i64 %threads, ptr %refs_at
  %chunks_at = getelementptr i8, ptr %job, i64 24
  store i64 %chunks, ptr %chunks_at
  %body_at = getelementptr i8, ptr %job, i64 32
  store ptr %body, ptr %body_at
  store i64 40, ptr %args
  %extension = getelementptr i8, ptr %args, i64 8
  store ptr null, ptr %extension
  %context_at = getelementptr i8, ptr %frame, i64 24
  %context = load ptr, ptr %context_at
  %context_to = getelementptr i8, ptr %args, i64 16
  store ptr %context, ptr %context_to
  %task_to = getelementptr i8, ptr %args, i64 24
  store ptr @tlt_task, ptr %task_to
  %job_to = getelementptr i8, ptr %args, i64 32
  store ptr %job, ptr %job_to
  %api_at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_at
  %call_at = getelementptr i8, ptr %api, i64 136
  %schedule = load ptr, ptr %call_at
  br label %head
head:
  %i = phi i64 [1, %entry], [%i_next, %next]
  %more = icmp slt i64 %i, %threads
  br i1 %more, label %ask, label %join
ask:
  %error = call ptr %schedule(ptr %args)
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %next, label %failed
failed:
  call void @tlt_destroy(ptr %frame, ptr %error)
  call void @tlt_release(ptr %job)
  br label %next
next:
  %i_next = add i64 %i, 1
  br label %head
join:
  call void @tlt_work(ptr %job)
  br label %wait
wait:
  %spins = phi i64 [0, %join], [%spins_next, %again]
  %done = load atomic i64, ptr %done_at acquire, align 8
  %all = icmp eq i64 %done, %chunks
  br i1 %all, label %finish, label %linger
linger:
  ; Others are within their last chunk; where cores are scarce they need this one.
  %long = icmp sgt i64 %spins, 4096
  br i1 %long, label %yield, label %again
yield:
  %ignored = call i32 @sched_yield()
  br label %again
again:
  %spins_next = add i64 %spins, 1
  br label %wait
finish:
  call void @tlt_release(ptr %job)
  ret void
}
"""


def runtime(num_devices: int) -> str:
    """Write what kernels may call, for so many devices that share the threads."""
    return RUNTIME + (
        f"\ndefine internal i64 @tlt_devices() {{\n  ret i64 {num_devices}\n}}\n"
    )


def is_supported() -> bool:
    """Tell whether kernels can be compiled and called on this machine at all."""
    return sys.platform != "win32" and ctypes.sizeof(ctypes.c_void_p) == 8


def host_features() -> frozenset[str]:
    """Return the names by which LLVM calls what the host's CPU has."""
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def has_fma(features: frozenset[str]) -> bool:
    """Tell whether a CPU multiplies and adds in one rounding."""
    return "fma" in features or "neon" in features


def register(
    text: str,
    handlers: Mapping[str, str],
    cpu: str | None = None,
    *,
    optimise: bool = False,
    num_devices: int | None = None,
) -> None:
    """Compile a kernel and register its handlers for XLA's programs on CPUs.

    The machine code stays until the process ends: programs, and threads of XLA that
    come too late for a chunk, may enter it at any time.

    Args:
      text: IR that the kernel defines and declares, behind `RUNTIME`.
      handlers: names of its functions, by the target's name in programs; a target is
        registered once in a process.
      cpu: what LLVM calls the CPU to compile for; None: the host's.
      optimise: run LLVM's passes before code is generated; for IR that keeps its
        variables in memory, as `code` writes it.
      num_devices: that share the threads; None: the process's CPU devices.
    """
    if num_devices is None:
        num_devices = len(jax.local_devices(backend="cpu"))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu or llvm.get_host_cpu_name(),
        features="" if cpu else llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    module = llvm.parse_assembly(runtime(num_devices) + text)
    module.verify()
    if optimise:
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        # Vectors are the kernel's own business.
        options.loop_vectorization = options.slp_vectorization = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    addresses = {
        target: engine.get_function_address(name) for target, name in handlers.items()
    }
    engine.detach()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    for target, address in addresses.items():
        capsule = new_capsule(address, None, None)
        jax.ffi.register_ffi_target(target, capsule, platform="cpu", api_version=1)

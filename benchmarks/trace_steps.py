"""Which functions of the CUDA driver a step calls, in their order: does a fast step wait for the GPU before its end?

    python benchmarks/trace_steps.py BUILD/bin/libsfi-trace-cuda.so MODEL.gguf [DEPTH]

A step of each kind is shown, of the policies sketch and frozen and of stock, after some of its kind: a line for every run of the same
call. What waits is marked. Ends with exit code 1 if a fast step waits before the last of its work was given to the GPU.
"""

import ctypes
import itertools
import os
import sys

WAITS = ("Synchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuMemcpy_v2", "cuMemcpy_ptds")
WORK = ("cuGraphLaunch", "cuLaunchKernel")
N_BEFORE = 6  # steps of a kind before the one that is shown: a graph is captured after some


def is_wait(call):
    return any(word in call for word in WAITS)


def waits_early(calls):
    """Whether something waits although work follows."""
    work = [i for i, call in enumerate(calls) if call.startswith(WORK)]
    return any(is_wait(call) for call in calls[:work[-1]]) if work else False


class Trace:
    """The calls of what runs inside ``with``."""

    def __init__(self, library):
        self.library = library
        library.sfi_trace_end.restype = ctypes.c_size_t

    def __enter__(self):
        self.calls = []
        self.library.sfi_trace_begin()
        return self

    def __exit__(self, *_):
        room = ctypes.create_string_buffer(1 << 22)
        self.library.sfi_trace_end(room, ctypes.c_size_t(len(room)))
        self.calls = room.value.decode().split()


def show(name, calls):
    print(f"{name}: {len(calls)} calls, {sum(map(is_wait, calls))} of which wait" + (", before all work is given" if waits_early(calls) else ""))
    for call, run in itertools.groupby(calls):
        print(f"    {sum(1 for _ in run):5} {call}{'   <- waits' if is_wait(call) else ''}")


def main(library, path, depth="8192"):
    os.environ["CUDA_INJECTION64_PATH"] = os.path.abspath(library)  # before the driver wakes up
    import sfi_local
    from sfi_local.binding import state_fill
    from sfi_local.binding.context import maker
    from sfi_local.params import SfiParams
    from sfi_local.runtime.slot import Slot

    model, depth, early = sfi_local.load(path), int(depth), []
    trace = Trace(ctypes.CDLL(os.path.abspath(library)))
    for policy, kinds in (("sketch", ("fast",)), ("frozen", ("slow", "fast", "dense")), ("stock", ("stock",))):
        params = SfiParams.of("frozen" if policy == "stock" else policy)
        session = Slot(maker(model.weights, model.n_threads), depth + 256, "stock" if policy == "stock" else "sfi", params)
        session.prefill([1] * 16)
        state_fill.fill(session.context.ctx, depth)
        session.tokens[:] = [1] * depth
        if policy != "stock":
            session.step(1, lambda *_: "slow")
        for kind in kinds:
            for _ in range(N_BEFORE):
                session.step(1, lambda *_: kind)
            with trace:
                session.step(1, lambda *_: kind)
            show(f"{policy}, {kind} step at depth {len(session.tokens)}", trace.calls)
            if not trace.calls:
                sys.exit("Nothing was recorded: the model does not run on a GPU, or the driver did not load the library.")
            if kind == "fast" and waits_early(trace.calls):
                early.append(policy)
        session.close()
    sys.exit(f"Fast steps wait before their end: {', '.join(early)}" if early else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

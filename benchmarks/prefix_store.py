"""What the prefix store saves and costs: a first question about a text, a second one in a new process, storing, reading, and a context
that grows.

usage: prefix_store.py MODEL.gguf TEXT --tokens 6500 > DATE-MACHINE-MODEL-prefix-store.json

Times are seconds; ttft_s from the start of the process to the first token. Processes and reads take turns; files are dropped from the
page cache before each read that is called cold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTIONS = ("What does the assert statement do?", "How is a function called?", "What is a dictionary?", "Which types are mutable?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=6500), parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--mode", default="auto"), parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="also the first question by llama.cpp's own path")
    parser.add_argument("--deepest", type=int, default=16384, help="tokens of the longest text that gets more room")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(SFI_LOCAL_CACHE=folder, SFI_LOCAL_PREFIX_BUDGET="100e9", SFI_LOCAL_AUTO_DEPTH="0")  # nothing else is measured
        stock = ask(args, QUESTIONS[0], "stock", "--no-cache") if args.stock else None
        first, *more = [ask(args, question) for question in QUESTIONS]
        again = [ask(args, question) for question in QUESTIONS[1:]]
        ttft = statistics.median(a["ttft_s"] for a in more)
        record = {"command": ["prefix_store.py", *(Path(word).name for word in sys.argv[1:])], "date": time.strftime("%Y-%m-%d"),
                  "machine": machine(), "source_id": first["source_id"],
                  "first": short(first), "second": [short(a) for a in more], "again": [short(a) for a in again],
                  "first_over_second": round(first["ttft_s"] / ttft, 1), **(
                      {"stock": short(stock), "stock_over_second": round(stock["ttft_s"] / ttft, 1)} if stock else {}), "parts": parts(args),
                  "growth": growth(args)}
    print(json.dumps(record, indent=1))


def ask(args: argparse.Namespace, question: str, mode: str = "", *more: str) -> dict:
    """The object of `run --json`, and the seconds of the whole process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "sfi_local", "run", args.model, "-f", args.text, "--max-prompt-tokens", str(args.tokens), "-p",
                           question, "-n", str(args.n), "--temp", "0", "--mode", mode or args.mode, "-t", str(args.t), "--json", *more],
                          check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "process_s": round(time.perf_counter() - start, 3)}


def short(answer: dict) -> dict:
    keys = ("n_prompt", "n_cached", "cached_from", "ttft_s", "process_s", "prefill_tps", "decode_tps", "n_generated", "mode_taken", "steps")
    return {key: answer[key] for key in keys}


def machine() -> dict:
    from sfi_local.machine import cpu_name
    return {"cpu": cpu_name(), "cpus": os.cpu_count()}


def parts(args: argparse.Namespace) -> dict:
    """Storing, bytes, and reading beside a sequential read of the same files."""
    import sfi_local
    from sfi_local.binding import state
    from sfi_local.store import prefixes

    with sfi_local.load(args.model, mode="sfi", n_threads=args.t) as model:
        longest = max(prefixes.rows(state.checksum), key=lambda row: row["n_tokens"])
        with open(longest["path"], "rb") as file:
            head = prefixes.read_head(file, prefixes.EntryHead, state.checksum)
            tokens = prefixes.read_tokens(file, head, state.checksum)
        slot = model.open_session(len(tokens) + 1, 1)
        files = [Path(longest["path"]), *(Path(longest["path"]).parents[1] / "blocks" / name for name in head.blocks)]
        n_bytes = sum(file.stat().st_size for file in files)
        fetched, read = {"cold": [], "warm": []}, {"cold": [], "warm": []}
        for _ in range(5):
            for what in ("cold", "warm"):
                read[what].append(timed(lambda: [read_file(file) for file in files], files if what == "cold" else []))
                slot.cut(0)
                fetched[what].append(timed(lambda: slot.reuse([*tokens, 0]), files if what == "cold" else []))
                assert len(slot.tokens) == len(tokens) and slot.cached_from == "disk"
        prefixes.clear()
        stored, held = [], []
        for _ in range(3):
            slot._blocks, slot._n_kept = [], 0
            start = time.perf_counter()
            slot.keep()
            held.append(time.perf_counter() - start)
            slot.keep(wait=True)
            stored.append(time.perf_counter() - start)
            in_memory = state.rows_size(slot.context, len(tokens)) + len(state.get_state(slot.engine))
            on_disk = prefixes.size_of(prefixes.folder())
            prefixes.clear()
    median = statistics.median
    return {"n_tokens": len(tokens), "bytes": n_bytes, "bytes_in_memory": in_memory, "bytes_over_memory": round(on_disk / in_memory, 4),
            "store_s": round(median(stored), 3), "store_held_up_s": round(median(held), 3),
            **{f"fetch_{what}_s": round(median(times), 4) for what, times in fetched.items()},
            **{f"read_{what}_s": round(median(times), 4) for what, times in read.items()},
            "fetch_cold_speed_over_read": round(median(read["cold"]) / median(fetched["cold"]), 3)}


def growth(args: argparse.Namespace) -> list[dict]:
    """Seconds that a text takes to get room behind as many tokens, as run, chat and serve give it: 3 times each, in a new context. The cells
    are repeated ones, so that none has to be computed for this. moved: they went to a larger context, which is so where cells take memory
    before they are used (all systems but Linux), and behind 32k tokens."""
    import sfi_local
    from sfi_local.binding import state_fill

    rows = []
    with sfi_local.load(args.model, mode="dense", n_threads=args.t, cache=False) as model:
        for depth in (n for n in (4096, 8192, 16384, 32768) if n <= args.deepest and n + 512 <= model.n_ctx_limit):
            times = []
            for _ in range(3):
                slot = model.new_slot()
                model.make_room(slot, depth - 128, 128)
                slot.prefill([100] * 16)
                state_fill.fill(slot.context.ctx, depth)
                slot.tokens[:] = [100] * depth
                context, start, n_prefilled = slot.context, time.perf_counter(), slot.n_prefilled
                model.make_room(slot, depth + 128, 128)
                slot.step(100)
                times.append(round(time.perf_counter() - start, 3))
                assert len(slot.tokens) == depth + 1 and slot.n_prefilled == n_prefilled
                moved = slot.context is not context
                slot.close()
            rows.append({"n_tokens": depth, "room_and_step_s": sorted(times), "moved": moved, "n_computed": 0})
    return rows


def timed(work, drop) -> float:
    for path in drop:
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_file(path: Path, into=bytearray(8 << 20)) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(into):
            pass


if __name__ == "__main__":
    main()

"""Instructions per generated token, counted by valgrind: what stands in for the speed of a board that is not there.

    python benchmarks/count_instructions.py smollm2-135m --depth 1000,4000,8000

The text is read once, at full speed, and kept; under valgrind it is taken from the disk, and what N more tokens take is the difference of
two runs, so that start, loading and reading do not count. One thread. It says how much work a step is, not how long it takes: a step that
waits for memory has few instructions and is slow all the same.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FEW, MANY = 4, 12  # tokens of the two runs
MODES = ("stock", "dense", "sfi")


def child(model_path: str, mode: str, depth: int, n: int, kv_type: str) -> None:
    """Answer with n tokens behind the first depth tokens of the text."""
    from sfi_local import load
    from sfi_local.lab.facts import measured_text
    from sfi_local.runtime.sampling import Sampling

    with load(model_path, mode=mode, n_ctx=depth + 256, n_threads=1, type_k=kv_type, type_v=kv_type) as model:
        tokens = model.tokenize(measured_text(None)[0][:8 * depth + 1000])[:depth]
        assert len(tokens) == depth, f"the text has {len(tokens)} tokens"
        steps = list(model.generate(tokens, n=n, sampling=Sampling(temp=0), stop=()))
        assert len(steps) == n, [step.finish for step in steps]
        print(model.stats().cached_from, model.stats().n_prefilled, file=sys.stderr)


def counted(command: list[str], env: dict[str, str]) -> int:
    """Instructions of a process."""
    done = subprocess.run(["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", *command], env=env,
                          capture_output=True, text=True)
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)} under valgrind failed:\n{done.stderr[-2000:]}")
    return int(found[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--depth", default="1000,4000,8000")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--kv-type", default="f16")
    args = parser.parse_args()
    from sfi_local.store.pull import resolve

    model = str(resolve(args.model))  # before the cache is another
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "SFI_LOCAL_CACHE": cache, "SFI_LOCAL_PREFIX_BUDGET": "1e12", "SFI_LOCAL_AUTO_DEPTH": "0"}
        print("| depth | mode | million instructions per token |\n|---:|---|---:|")
        for depth in map(int, args.depth.split(",")):
            for mode in args.modes.split(","):
                def command(n: int, mode: str = mode, depth: int = depth) -> list[str]:
                    return [sys.executable, str(Path(__file__).resolve()), "--child", model, mode, str(depth), str(n), args.kv_type]
                subprocess.run(command(1), env=env, check=True, capture_output=True)  # reads the text and keeps it
                few, many = (counted(command(n), env) for n in (FEW, MANY))
                print(f"| {depth} | {mode} | {(many - few) / (MANY - FEW) / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model_path, mode, depth, n, kv_type = sys.argv[2:]
        child(model_path, mode, int(depth), int(n), kv_type)
    else:
        main()

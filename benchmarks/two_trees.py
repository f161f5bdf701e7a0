"""Decoding speed of two source trees of sfi-local, in turns: each is built and linked (`make dev`), and a process of its own runs it.

    python benchmarks/two_trees.py OLD NEW MODEL.gguf TEXT [--depth 8000] [--steps 24] [--pairs 14] [--rows sketch]

A round is --steps steps of the one tree, then of the other; of each policy --pairs rounds, the median step of each, and the median of
the ratios of the pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ROWS = {"sketch": {}, "sketch, tolerance 0": {"tolerance": 0.0}, "frozen": {"policy": "frozen"}}


def params_of(changes):
    from sfi_local import SfiParams

    changes = dict(changes)
    return SfiParams.of(changes.pop("policy", "sketch"), **changes)


def work(model, text, depth, n_steps):
    """One tree: a row of ROWS comes in on each line, times of its steps in ms go out; first, when the text is read, an empty line."""
    from sfi_local import SlowFastLlama

    llm = SlowFastLlama(model, n_ctx=depth + 2000, n_threads=2, n_threads_batch=2, mode="sfi")
    tokens = llm.tokenize(open(text, "rb").read())
    llm.eval(tokens[:depth])
    print(flush=True)
    for at, line in enumerate(sys.stdin):
        changes = json.loads(line)
        if changes is not None:
            llm.engine.params = params_of(changes)
            llm.engine.step(tokens[depth], "slow")
        times = []
        for token in tokens[depth + at * n_steps:depth + (at + 1) * n_steps]:
            start = time.perf_counter()
            kind = llm.engine.step(token).kind
            times.append((time.perf_counter() - start) * 1000 if kind == "fast" else None)
        print(json.dumps([t for t in times if t is not None]), flush=True)


class Tree:
    def __init__(self, path, arguments):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--work", *map(str, arguments)], cwd=path, text=True,
                                        env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a tree stopped: see above")
        return line

    def round(self, changes):
        self.process.stdin.write(json.dumps(changes) + "\n")
        self.process.stdin.flush()
        return statistics.median(json.loads(self.answer()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "model", "text"):
        parser.add_argument(name, type=os.path.abspath)
    for name, default in (("depth", 8000), ("steps", 24), ("pairs", 14)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    a = parser.parse_args()
    trees = [Tree(path, (a.model, a.text, a.depth, a.steps)) for path in (a.old, a.new)]
    for row in a.rows:
        for tree in trees:
            tree.round(ROWS[row])  # not counted
        pairs = [[tree.round(None) for tree in trees] for _ in range(a.pairs)]
        old, new = (statistics.median(column) for column in zip(*pairs))
        ratios = sorted(after / before for before, after in pairs)
        middle = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(f"{row}: {old:.2f} ms, {new:.2f} ms, {statistics.median(ratios):.3f} of it (half between {middle[0]:.3f} and {middle[1]:.3f})", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()

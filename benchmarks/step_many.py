"""Fast steps of several sequences in one pass over the weights (sfi_step_many), in turns with the same steps one after the other.

usage: step_many.py MODEL.gguf TEXT --tokens 6000 --sequences 4 > DATE-MACHINE-MODEL-step-many.json

Nothing is timed before the logits of both ways agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from sfi_local import SfiParams
from sfi_local.binding.context import Context, context_params, load_weights, logits
from sfi_local.binding.engine import Engine
from sfi_local.binding.library import open_library
from sfi_local.machine import cpu_name, reads_mapped_weights
from sfi_local.runtime.vocabulary import Vocabulary

CLOSE = 0.02  # of the spread of the logits: products of several columns may round otherwise than of one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=6000), parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40), parser.add_argument("-t", type=int, default=2)
    args = parser.parse_args()
    steps = Steps(args)
    steps.check()
    seconds = {"apart": [], "together": []}
    for _ in range(args.rounds):
        for how, all_of in seconds.items():
            start = time.perf_counter()
            getattr(steps, how)()
            all_of.append(time.perf_counter() - start)
    tps = {how: args.sequences / statistics.median(all_of) for how, all_of in seconds.items()}
    print(json.dumps({
        "command": ["step_many.py", *(Path(word).name for word in sys.argv[1:])], "date": time.strftime("%Y-%m-%d"), "machine": cpu_name(),
        "threads": args.t, "tokens": args.tokens, "sequences": args.sequences, "logits_apart": steps.apart_by,
        "tokens_per_second": {how: round(x, 1) for how, x in tps.items()}, "ratio": round(tps["together"] / tps["apart"], 3)}, indent=1))


class Steps:
    """A context of several sequences with one text in all of them, each behind a slow step."""

    def __init__(self, args: argparse.Namespace):
        llama = open_library().llama_cpp
        weights = load_weights(llama, Path(args.model), None, None, mapped_only=reads_mapped_weights())
        params = context_params(llama, (args.tokens + 4 * args.rounds + 64) * args.sequences, args.t, "f16", "f16")
        params.n_seq_max, params.n_outputs_max = args.sequences, 0
        self.context = Context(weights, params)
        self.engine = Engine(self.context.ctx, SfiParams(auto_depth=0), owner=self.context)
        tokens = Vocabulary(weights).tokenize(Path(args.text).read_text(encoding="utf-8", errors="replace"), add_bos=True)
        if len(tokens) < args.tokens + 2:
            sys.exit(f"The text has {len(tokens)} tokens only: give a longer one, or a smaller --tokens.")
        self.next = tokens[args.tokens]
        self.sequences = range(args.sequences)
        self.engine.prefill(tokens[:args.tokens], seq=0)
        memory = llama.llama_get_memory(self.context.ctx)
        for seq in self.sequences[1:]:
            llama.llama_memory_seq_cp(memory, 0, seq, -1, -1)
        for seq in self.sequences:
            self.engine.step(self.next, "slow", seq)

    def apart(self) -> None:
        for seq in self.sequences:
            self.engine.step(self.next, "fast", seq)

    def together(self) -> None:
        self.engine.step_many({seq: self.next for seq in self.sequences}, "fast")

    def check(self) -> None:
        """A step of all gives each sequence what its own step does."""
        alone = []
        for seq in self.sequences:
            self.engine.step(self.next, "fast", seq)
            alone.append(logits(self.context, -1).copy())
            self.engine.rollback(1, seq)
        self.together()
        self.apart_by = max(float(np.abs(logits(self.context, row) - one).max() / np.ptp(one)) for row, one in enumerate(alone))
        if not self.apart_by < CLOSE:
            sys.exit(f"No time is shown: the logits of a step of all are {self.apart_by:.3f} of their spread from those of one.")


if __name__ == "__main__":
    main()

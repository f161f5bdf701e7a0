"""How fast a whole prompt is read, by llama.cpp alone (stock) and by sfi's kernels, exactly (dense) and passing over what hardly counts
(sparse), in turns, and how far their logits are apart.

usage: prefill.py MODEL.gguf TEXT --tokens 6500 > DATE-MACHINE-MODEL-prefill.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import sfi_local
from sfi_local.binding.context import logits
from sfi_local.machine import cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=6500), parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-t", type=int, default=2), parser.add_argument("--by", default="stock,dense", help="of stock, dense, sparse")
    args = parser.parse_args()
    text = Path(args.text).read_text(encoding="utf-8", errors="replace")
    seconds, last = {mode: [] for mode in args.by.split(",")}, {}
    for _ in range(args.rounds):
        for mode in seconds:
            took, last[mode] = read(args, mode, text)
            seconds[mode].append(took)
            print(f"{mode} {args.tokens / took:.1f} tokens/s", file=sys.stderr)
    first = next(iter(seconds))
    tps = {mode: args.tokens / statistics.median(all_of) for mode, all_of in seconds.items()}
    print(json.dumps({
        "command": ["prefill.py", *(Path(word).name for word in sys.argv[1:])], "date": time.strftime("%Y-%m-%d"), "machine": cpu_name(),
        "threads": args.t, "tokens": args.tokens, "seconds": seconds, "prefill_tps": {mode: round(x, 1) for mode, x in tps.items()},
        "ratio": {mode: round(x / tps[first], 2) for mode, x in tps.items()},
        "kl_of_the_last_logits": {mode: round(divergence(last[first], x), 5) for mode, x in last.items()}}, indent=1))


def read(args: argparse.Namespace, mode: str, text: str) -> tuple[float, np.ndarray]:
    """Seconds of the prefill of a fresh context, and the logits after it."""
    how = {"mode": "dense", "params": {"prefill": "sparse"}} if mode == "sparse" else {"mode": mode}
    with sfi_local.load(args.model, **how, n_ctx=args.tokens + 256, n_threads=args.t, cache=False) as model:
        tokens = model.tokenize(text, add_bos=True)[:args.tokens]
        if len(tokens) < args.tokens:
            sys.exit(f"The text has {len(tokens)} tokens only: give a longer one, or --tokens {len(tokens)}.")
        slot = model.open_session(len(tokens), 1)
        start = time.perf_counter()
        slot.prefill(tokens)
        took = time.perf_counter() - start
        return took, np.array(logits(slot.context, -1), np.float64)


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a || b) in nats."""
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
    return float((np.exp(p) * (p - q)).sum())


if __name__ == "__main__":
    main()

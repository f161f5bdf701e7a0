"""Mode exact beside dense: free prose, and the edit of a file whose answer repeats most of it; by turns, and their tokens must be equal.

usage: exact.py MODEL.gguf --task prose --text NOVEL.txt --depth 6000 > DATE-MACHINE-MODEL-exact-prose.json
       exact.py MODEL.gguf --task edit --text FILE.py --rename OLD=NEW --depth 6000 > DATE-MACHINE-MODEL-exact-edit.json

prose: the model writes on where the text is cut, with temperature 0.8, another seed in each round.
edit:  the text is a file, from its beginning as much as fits, and the model is asked to repeat it with every OLD named NEW, with temperature 0.
       --replay: the answer is that file as it should be, for models that cannot do it: its tokens are "drawn" whatever the logits say (fast
       steps draft by the logits), so times and acceptance are those of a model that does what it was asked.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Sequence

import sfi_local
from sfi_local import Sampling, SfiParams, Tally
from sfi_local.lab.checks import first_difference
from sfi_local.lab.trunk import SwitchSession
from sfi_local.machine import cpu_name
from sfi_local.runtime.exact import generate_exact
from sfi_local.runtime.generate import generate

ASK = "Repeat this file with every `{old}` named `{new}`. Write the whole file and nothing else.\n\n```python\n{text}\n```"


class Replay:
    """A sampler that draws given tokens; a copy of it, by which fast steps draft, draws the most likely ones."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = iter(tokens)

    def sample(self, context: Any, row: int = -1) -> int:
        return next(self._tokens)

    def clone(self) -> Any:
        return Sampling(temp=0).chain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("--task", choices=("prose", "edit"), required=True)
    parser.add_argument("--text", required=True), parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--rename", default="x=y"), parser.add_argument("--replay", action="store_true")
    parser.add_argument("-n", type=int, default=256), parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", type=int, default=2)
    args = parser.parse_args()
    text = Path(args.text).read_text(encoding="utf-8", errors="replace")
    with sfi_local.load(args.model, mode="exact", n_ctx=args.depth + args.n, n_threads=args.t, cache=False) as model:
        prompt, answer = prose(model, text, args) if args.task == "prose" else edit(model, text, args)
        params = SfiParams().fit_context(args.depth + args.n)
        with SwitchSession(model, args.depth + args.n, params, "f16") as session:
            start = time.perf_counter()
            session.set_trunk(prompt)
            print(f"{len(prompt)} tokens read in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            rounds = [measure(model, session, prompt, answer, args, seed) for seed in range(args.rounds)]
            cost = session.costs
    ratios = [r["exact"]["tps"] / r["dense"]["tps"] for r in rounds]
    print(json.dumps({
        "command": ["exact.py", *(Path(word).name for word in sys.argv[1:])], "date": time.strftime("%Y-%m-%d"), "machine": cpu_name(),
        "threads": args.t, "model": Path(args.model).stem, "task": args.task, "depth": len(prompt), "n": args.n, "replay": args.replay,
        "dense_tps": round(statistics.median(r["dense"]["tps"] for r in rounds), 2),
        "exact_tps": round(statistics.median(r["exact"]["tps"] for r in rounds), 2),
        "ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios],
        "verify_cost": cost.verify_cost,
        "passes": {n: round(ms / cost.dense, 2) for n, ms in sorted(cost.passes.items())}, "fast_cost": cost.fast / cost.dense, "rounds": rounds}, indent=1))


def prose(model: Any, text: str, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The prompt; there is no answer that is known."""
    return model.tokenize(text, add_bos=True)[:args.depth], []


def edit(model: Any, text: str, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The prompt, and the answer as it should be."""
    old, new = args.rename.split("=")
    lines, tokens = text.splitlines(), []
    while lines:
        part = "\n".join(lines)
        asked = ASK.format(old=old, new=new, text=part)
        tokens = model.prompt_tokens([{"role": "user", "content": asked}])
        if len(tokens) <= args.depth:
            break
        lines = lines[:max(1, int(len(lines) * min(0.99, args.depth / len(tokens))))]
    answer = "```python\n" + re.sub(rf"\b{re.escape(old)}\b", new, part) + "\n```"
    return tokens, model.tokenize(answer)[:args.n]


def measure(model: Any, session: SwitchSession, prompt: list[int], answer: list[int], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round: both modes, each first in every other round."""
    found, tokens, drafted = {}, {}, Tally()
    for mode in ("dense", "exact") if seed % 2 == 0 else ("exact", "dense"):
        session.cut_back(mode)
        sampler = Replay(answer) if args.replay else Sampling(temp=0.8 if args.task == "prose" else 0, seed=seed).chain()
        tally, loop, n = Tally(), generate_exact if mode == "exact" else generate, len(answer) if args.replay else args.n
        start = 0.0
        for step in loop(session, model.vocabulary, prompt, sampler, n):
            tally.add(step)
            start = start or time.perf_counter()  # the first comes with the prompt
        seconds, tokens[mode] = time.perf_counter() - start, tally.tokens
        found[mode] = {"tps": (len(tally.tokens) - 1) / seconds, "n": len(tally.tokens)}
        drafted = tally if mode == "exact" else drafted
    tally = drafted
    found["exact"].update(steps=dict(tally.steps), ngram=tally.drafted("ngram"), fast=tally.drafted("fast"), n_passes=len(tally.spans),
                          accepted=tally.n_accepted / max(1, tally.n_drafted), n_ties=tally.n_ties, noise=session.noise.largest,
                          first_difference=first_difference(tokens["exact"], tokens["dense"]))
    print(args.task, {k: round(v["tps"], 2) for k, v in found.items()}, found["exact"], file=sys.stderr)
    if args.task == "edit" and not seed:
        print(b"".join(map(model.vocabulary.piece, tokens["dense"]))[:800].decode(errors="replace"), file=sys.stderr)
    return found


if __name__ == "__main__":
    main()

"""The likeliest tokens after a text, and how clearly they are that; two machines compared by them. See check-arm64.sh.

    greedy.py MODEL TEXTFILE N                  writes JSON: text, pieces, gaps in nats to the next likely token, library
    greedy.py --compare REFERENCE OTHER         OTHER: such JSON, or the text alone as the C example prints it
"""

import json
import sys
from pathlib import Path

TIE = 0.1  # nats: two correct kernels may choose differently where the gap is smaller


def greedy(model_path: str, text_path: str, n: int) -> dict:
    from sfi_local import load
    from sfi_local.binding.library import cpu_library
    from sfi_local.runtime.sampling import Sampling

    text = Path(text_path).read_text(encoding="utf-8")
    with load(model_path, mode="sfi", n_ctx=512, n_threads=1, cache=False) as model:
        steps = [step for step in model.generate(text, n=n, sampling=Sampling(temp=0), logprobs=2)]
        pieces = [model.detokenize([step.token]) for step in steps]
    gaps = [step.top[0][1] - step.top[1][1] for step in steps]
    return {"text": "".join(pieces), "pieces": pieces, "gaps": gaps, "library": cpu_library()}


def compare(reference: dict, other: str) -> str:
    """A clause; exits with a sentence where the texts differ without a tie."""
    text = json.loads(other)["text"] if other.startswith("{") else other.rstrip("\n")
    done = ""
    for i, (piece, gap) in enumerate(zip(reference["pieces"], reference["gaps"])):
        if not text.startswith(piece, len(done)):
            if len(text) == len(done):
                return f"the same {i} tokens"
            if gap < TIE:
                return f"the same {i} tokens, then a tie: {piece!r} is {gap:.3f} nats before the next likely one here"
            sys.exit(f"token {i} differs: {piece!r} here, {gap:.3f} nats before the next one, and there {text[len(done):]!r}")
        done += piece
    return f"the same {len(reference['pieces'])} tokens"


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        print(compare(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]).read_text(encoding="utf-8")))
    else:
        print(json.dumps(greedy(sys.argv[1], sys.argv[2], int(sys.argv[3]))))

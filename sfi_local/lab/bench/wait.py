"""What somebody waits for: a question about a text in a new process, another one in the same process, a third in a process after that.

Each mode is loaded as the product loads it, with weights in the order that it likes best, which the steps of one context that is measured
in all modes cannot have. `python -m sfi_local.lab.bench.wait REQUEST` is such a process: JSON in and out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfi_local.cli.stream import since_start
from sfi_local.errors import SfiError
from sfi_local.lab.checks import CheckError
from sfi_local.loading import load
from sfi_local.params import SfiParams
from sfi_local.runtime.keeper import MIN_KEEP
from sfi_local.runtime.sampling import Sampling

N_ANSWER = 300  # tokens of a whole answer
QUESTIONS = ("\n\nWhat is this about?", "\n\nWhich names are in it?", "\n\nHow does it begin?")
FIELDS = ("prefill_tps", "ttft_cold_s", "ttft_memory_s", "ttft_disk_s", "answer_s")
NONE: dict[str, float | None] = dict.fromkeys(FIELDS)


def measure(model: Path, mode: str, kv_type: str, n_tokens: int, text: str, n_threads: int, params: SfiParams) -> dict[str, float | None]:
    """FIELDS of a mode: tokens/s of the prompt, seconds to the first token of three questions, and to the end of the first answer.

    A text too short to be kept has no ttft_disk_s. Raises CheckError where something was not read from where it should be.
    """
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "text"
        head.write_text(text, encoding="utf-8")
        asked = {"model": str(model), "mode": mode, "kv_type": kv_type, "n_tokens": n_tokens, "text": str(head), "n_threads": n_threads,
                 "params": asdict(params)}
        first, second = _process({**asked, "questions": QUESTIONS[:2], "n": N_ANSWER}, folder)
        third = _process({**asked, "questions": QUESTIONS[2:], "n": 1}, folder)[0] if n_tokens >= MIN_KEEP else None
    _check(mode, (first, None), (second, "memory"), *([(third, "disk")] if third else []))
    return {"prefill_tps": first["prefill_tps"], "ttft_cold_s": first["ttft_s"], "ttft_memory_s": second["ttft_s"],
            "ttft_disk_s": third and third["ttft_s"], "answer_s": first["answer_s"]}


def _check(mode: str, *answers: tuple[dict[str, Any], str | None]) -> None:
    for answer, expected in answers:
        if answer["cached_from"] != expected:
            raise CheckError(f"{mode}: what was read came from {answer['cached_from']}, not from {expected}: no wait is shown.")


def _process(asked: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """One answer for each question. Raises SfiError with what it said."""
    env = {**os.environ, "SFI_LOCAL_CACHE": folder, "SFI_LOCAL_PREFIX_BUDGET": "1e12", "SFI_LOCAL_AUTO_DEPTH": "0"}
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(asked)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SfiError(f"A process that was to answer failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def answers(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """In this process; times of the first question are from its start."""
    with load(asked["model"], mode=asked["mode"], n_threads=asked["n_threads"], type_k=asked["kv_type"], type_v=asked["kv_type"],
              params=SfiParams(**asked["params"])) as model:
        head = model.tokenize(Path(asked["text"]).read_text(encoding="utf-8"))[:asked["n_tokens"]]
        return [_answer(model, [*head, *model.tokenize(question)], asked["n"] if i == 0 else 1, i == 0)
                for i, question in enumerate(asked["questions"])]


def _answer(model: Any, tokens: list[int], n: int, from_start: bool) -> dict[str, Any]:
    start, before = time.perf_counter(), since_start() if from_start else 0.0
    steps, times = [], []
    for step in model.generate(tokens, n=n, sampling=Sampling(temp=0)):
        steps.append(step)
        times.append(before + time.perf_counter() - start)
    per_step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return {"ttft_s": times[0], "prefill_tps": 1000 * model.stats().n_prefilled / steps[0].t_ms, "cached_from": model.stats().cached_from,
            "answer_s": times[-1] + (n - len(times)) * per_step}  # of n tokens, also where the model ends sooner


if __name__ == "__main__":
    try:
        print(json.dumps(answers(json.loads(sys.argv[1]))))
    except SfiError as error:
        sys.exit(str(error))

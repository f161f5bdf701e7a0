"""Fewer lines for each prompt of a LongEval file, for models that find nothing among all: fewer_lines.py FILE N > OUT

Lines that are left out lie evenly around the one that is asked for, so that it keeps its place in the prompt."""

import json
import sys


def shortened(row: dict, n: int) -> dict:
    lines = row["prompt"].split("\n")
    numbered = [i for i, line in enumerate(lines) if line.startswith("line ")]
    asked = numbered.index(lines.index(row["correct_line"].strip()))
    first = asked * (len(numbered) - n) // (len(numbered) - 1)
    dropped = set(numbered) - set(numbered[first:first + n])
    prompt = "\n".join(line for i, line in enumerate(lines) if i not in dropped)
    return {**row, "prompt": prompt, "num_lines": n, "prompt_length": len(prompt)}


with open(sys.argv[1], encoding="utf-8") as file:
    for text in file:
        print(json.dumps(shortened(json.loads(text), int(sys.argv[2]))))

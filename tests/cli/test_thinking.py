"""Thoughts on the command line: shown apart or hidden, switched, given a budget; and what a template cannot do is said."""

import json

import pytest
from support.command_line import sentence
from support.tiny_model import CHATML, write_tiny

from sfi_local.cli.thinking import no_answer
from sfi_local.runtime.step import Tally

THINKER = CHATML[:-3] + r" + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '<think>\n') + (mood or '') }}"
OPTIONS = ("--mode", "dense", "-t", "1", "--temp", "0", "-p", "Hi")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, native):
    return write_tiny(tmp_path_factory.mktemp("thinker") / "thinker.gguf", template=THINKER)


def report(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_run_that_ends_in_a_thought_says_so(cli, thinker):
    done = cli("run", thinker, *OPTIONS, "-n", "6")
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 0 and "inside the thought" in last
    assert "--think-budget" in done.stderr.decode()
    assert done.stdout.strip() == b""


@pytest.mark.parametrize("finish, said", [("end", "ended inside its thought"), ("length", "larger -n"), ("context", "larger -n"), ("stop", ""), ("", "")])
def test_a_thought_without_an_answer_is_said_with_its_remedy(finish, said):
    found = no_answer(Tally(finish=finish, in_thought=True))
    assert (said in found and "/think off" in found) if said else found == ""
    assert no_answer(Tally(finish=finish, in_thought=False)) == ""


def test_a_budget_makes_the_answer_begin(cli, thinker):
    done = report(cli("run", thinker, *OPTIONS, "-n", "40", "--think-budget", "8", "--json"))
    assert done["thought"] and done["answer"] and "</think>" in done["text"]
    assert done["text"].endswith(done["answer"]) and not done["text"].startswith(done["answer"])
    assert done["ttft_s"] > 0 and done["n_cached"] == 0


@pytest.mark.parametrize("how", ["show", "hide"])
def test_the_answer_alone_goes_to_stdout(cli, thinker, how):
    arguments = ("run", thinker, *OPTIONS, "-n", "40", "--think-budget", "8")
    told = report(cli(*arguments, "--json"))
    shown = cli(*arguments, "--thoughts", how)
    assert shown.stdout.decode().strip() == told["answer"].strip()
    assert (told["thought"][:4] in shown.stderr.decode()) == (how == "show")


def test_thoughts_are_switched_off(cli, thinker):
    on, off, by_name = (report(cli("run", thinker, *OPTIONS, "-n", "4", "--json", *more))
                        for more in ((), ("--no-think",), ("--template-arg", "enable_thinking=false")))
    assert on["thought"] and not on["answer"]
    assert off["answer"] and not off["thought"] and off["n_prompt"] > on["n_prompt"]
    assert by_name["tokens"] == off["tokens"]


def test_an_argument_is_json_or_text(cli, thinker):
    plain, said = (report(cli("run", thinker, *OPTIONS, "-n", "1", "--json", "--template-arg", f"mood={mood}")) for mood in ('""', "happy"))
    assert said["n_prompt"] == plain["n_prompt"] + len("happy")


def test_what_has_no_effect_is_said(cli, tiny):
    done = cli("run", tiny, *OPTIONS, "-n", "1", "--no-think", "--template-arg", "cheese=1")
    assert b"asking for none changes nothing" in done.stderr and b"does not know cheese" in done.stderr


def test_a_model_without_a_template_says_so(cli, native, tmp_path):
    done = cli("run", write_tiny(tmp_path / "base.gguf", template=""), *OPTIONS, "-n", "1")
    assert done.returncode == 0 and b"no chat template" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (("--template-arg", "cheese"), "--template-arg enable_thinking=false"), (("--template-arg", "a-b=1"), "not understood"),
    (("--raw", "--no-think"), "--raw"), (("--template-arg", "messages=1"), "no variable"), (("--think-budget", "-1"), "0"),
])
def test_what_cannot_be_meant_is_refused(cli, thinker, arguments, words):
    done = cli("run", thinker, *OPTIONS, *arguments)
    assert words in sentence(done, done.returncode) and done.returncode in (1, 2)


def test_a_question_above_the_limit_is_told_the_limit(cli, tiny, tmp_path):
    (tmp_path / "f.txt").write_text("A short file.")
    done = cli("run", tiny, "-f", "f.txt", "-p", "why " * 40, "--max-prompt-tokens", "50", "-n", "1")
    assert "--max-prompt-tokens allows 50" in sentence(done)


def test_a_raw_file_and_a_raw_prompt_agree(cli, tiny, tmp_path):
    text = "<|im_start|>user\nName a colour.<|im_end|>\n"
    (tmp_path / "f.txt").write_text(text)
    a, b = (report(cli("run", tiny, "--raw", *what, "-n", "1", "-t", "1", "--json")) for what in (("-f", "f.txt"), ("-p", text)))
    assert a["n_prompt"] == b["n_prompt"] < len(text) - 10


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_file_of_a_windows_editor_is_read(cli, tiny, tmp_path, encoding):
    (tmp_path / "u.txt").write_bytes("What does it say?".encode(encoding))
    (tmp_path / "u8.txt").write_text("What does it say?")
    a, b = (report(cli("run", tiny, "-f", name, "-n", "1", "-t", "1", "--json")) for name in ("u.txt", "u8.txt"))
    assert a["n_prompt"] == b["n_prompt"]

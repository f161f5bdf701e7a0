"""Prompts whose answer is known: where the pass key lies, the formats of task files, how answers are scored, rows."""

import json

import pytest
from support.command_line import sentence

from sfi_local import SfiParams
from sfi_local.errors import InputError
from sfi_local.lab.checks import CheckError
from sfi_local.lab.eval.answers import answer_all
from sfi_local.lab.eval.prompts import N_PLACES, Prompt, ask, copies, passkeys, sentence_end, task_file
from sfi_local.lab.eval.rows import Row
from sfi_local.lab.facts import measured_text
from sfi_local.lab.trunk import SwitchSession

SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
OPTIONS = ("--set", "n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1)
DENSE, SFI, WINDOW = Row("dense", "dense"), Row("sfi", "sfi"), Row("window", "sfi", {"policy": "window", "n_recent": 32})
LINES = {"random_idx": ["odd-cat", 1], "expected_number": 2416, "num_lines": 2, "correct_line": "line odd-cat: ... <2416>\n",
         "prompt": "line even-dog: REGISTER_CONTENT is <17>\nline odd-cat: REGISTER_CONTENT is <2416>\n\nWhat is in odd-cat?"}
PAIRS = {"ordered_kv_records": [["a1", "b2"], ["c3", "d4"]], "key": "c3", "value": "d4"}


@pytest.fixture(scope="module")
def model(tiny):
    from sfi_local import load

    with load(tiny, mode="stock", n_threads=1) as model:
        yield model


# ---- prompts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 3, 10, 13])
def test_pass_keys_lie_at_even_places_of_prompts_of_the_length_asked_for(model, n):
    text, depth = measured_text(None)[0], 900
    prompts = passkeys(model, text, "text", depth, n)
    texts = [model.detokenize(prompt.tokens) for prompt in prompts]
    assert len({prompt.answer for prompt in prompts}) == n and all(depth - 20 <= len(p.tokens) <= depth for p in prompts)
    assert all(t.count(p.answer) == 2 and t.endswith("is") and "What is the pass key?" in t for t, p in zip(texts, prompts))
    places = [t.index(p.answer) / len(t) for t, p in zip(texts, prompts)][:N_PLACES]
    size = min(n, N_PLACES)
    assert places == sorted(places, reverse=True)
    assert places == pytest.approx([(i + 0.5) / size for i in reversed(range(size))], abs=0.12)
    assert [p.tokens for p in passkeys(model, text, "text", depth, n)] == [p.tokens for p in prompts]


def test_every_ten_pass_keys_have_other_prose_and_share_theirs(model):
    prompts = passkeys(model, measured_text(None)[0], "text", 900, 20)
    for first, second in zip(prompts, prompts[1:10]):
        at = model.detokenize(second.tokens).index("\n\nThe pass key is")
        assert model.detokenize(first.tokens)[:at] == model.detokenize(second.tokens)[:at]
    assert prompts[10].tokens[60:200] != prompts[0].tokens[60:200]


def test_texts_that_are_too_short_for_pass_keys(model):
    with pytest.raises(InputError, match="has 10 tokens, and --depth 500 takes 500"):
        passkeys(model, "Too short.", "text", 500, 3)
    with pytest.raises(InputError, match="give a --depth of"):
        passkeys(model, measured_text(None)[0], "text", 60, 3)


def test_a_key_comes_after_a_sentence():
    text = 'One two. Three? "Four!" Five six'
    assert [text[:sentence_end(text, at, 20)] for at in (5, 8, 12, 15, 24, 32)] == [
        "One", "One two.", "One two.", "One two. Three?", 'One two. Three? "Four!"', 'One two. Three? "Four!"']
    assert text[:sentence_end(text, 30, 3)] == text[:28] and sentence_end("word", 3, 20) == 3


def test_copies_end_with_the_beginning_of_what_is_to_go_on(model):
    tokens = model.tokenize(measured_text(None)[0][:900])
    prompts = copies(model, tokens, 800, 80)
    assert len(prompts) == N_PLACES and all(len(p.tokens) == 800 and p.n == len(p.answer) == 48 for p in prompts)
    for prompt in prompts:
        passage = prompt.tokens[-32:] + prompt.answer
        assert any(tokens[i:i + 80] == passage for i in range(800)) and prompt.tokens[:700] == tokens[:700]
    with pytest.raises(InputError, match="lower --copy"):
        copies(model, tokens, 100, 90)


# ---- scoring ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, right", [(" 2416.", 1), ("2416> is it", 1), ("It is <2416>", 1), ("12416", 0), ("24160", 0), ("", 0),
                                         ("2 416", 0), ("d2416", 0)])
def test_an_answer_stands_for_itself(text, right):
    assert Prompt([1], 9, "2416").score([], text) == right


def test_a_copy_is_scored_by_the_share_before_the_first_wrong_token():
    prompt = Prompt([1], 4, [5, 6, 7, 8])
    assert [prompt.score(t, "") for t in ([5, 6, 7, 8], [5, 6, 0, 8], [], [0, 6, 7, 8], [5, 6])] == [1, 0.5, 0, 0, 0.5]


# ---- task files ------------------------------------------------------------------------------------------------------

def test_the_formats_of_task_files():
    lines = [LINES, PAIRS, {"prompt": "Two and two?", "answer": "4"}]
    tasks = task_file("\n".join(map(json.dumps, lines)) + "\n\n", "tasks.jsonl")
    assert tasks[0] == (LINES["prompt"], "The <REGISTER_CONTENT> in line odd-cat is <", "2416")
    assert '"a1": "b2",\n "c3": "d4"' in tasks[1][0] and tasks[1][1:] == ('"c3": "', "d4")
    assert tasks[2] == ("Two and two?", "", "4")


def without(line, name, **changes):
    return json.dumps({k: v for k, v in line.items() if k != name} | changes)


@pytest.mark.parametrize("line, said", [
    ('{"prompt": ', "is not JSON"), ("[1, 2]", "is not a JSON object"), ("{}", "has neither"), (without(LINES, "prompt"), "lacks prompt"),
    (without(PAIRS, "key"), "lacks key"), (without(PAIRS, "", key="zz"), "not among its records"),
    (without(PAIRS, "", ordered_kv_records=["abc"]), "wrong type"), (without(LINES, "", prompt=7), "prompt that is no text"),
    (without(LINES, "", expected_number="many"), "wrong type"), ('{"prompt": "x", "answer": ""}', "lacks answer")])
def test_a_broken_line_is_named(line, said):
    with pytest.raises(InputError, match=f"tasks.jsonl, line 3 .*{said}"):
        task_file(f"{json.dumps(LINES)}\n\n{line}\n", "tasks.jsonl")


def test_a_file_without_tasks():
    with pytest.raises(InputError, match="no tasks in it"):
        task_file("\n \n", "tasks.jsonl")


# ---- rows ------------------------------------------------------------------------------------------------------------

def test_rows_have_what_scripts_rely_on(cli, tiny):
    done = cli("eval", tiny, "--passkey", 3, "--depth", 500, "-o", "json", *OPTIONS)
    assert done.returncode == 0, done.stderr
    dense, stock, sfi = rows = json.loads(done.stdout)
    assert [(r["task"], r["mode"], r["total"], r["depth"]) for r in rows] == [
        ("passkey", mode, 3, 500) for mode in ("dense", "stock", "sfi")]
    assert all({"passed", "passed_of_dense", "kv_read_share", "model", "source_id", "command", "params"} <= set(r) for r in rows)
    assert sfi["steps"]["fast"] > 5 and sfi["kv_read_share"] < 0.5 and set(dense["failed"]) <= {0, 1, 2}


def test_tasks_of_a_file_are_limited_and_long_ones_skipped_and_counted(cli, tiny, tmp_path):
    lines = [LINES, {"prompt": "word " * 1000, "answer": "word"}, PAIRS, LINES]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = cli("eval", tiny, "--tasks", "tasks.jsonl", "--limit", 3, "--modes", "sfi", "-o", "json", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert [(r["mode"], r["total"], r["skipped"]) for r in json.loads(done.stdout)] == [("dense", 2, 1), ("sfi", 2, 1)]
    (tmp_path / "long.jsonl").write_text(json.dumps(lines[1]))
    assert "All 1 prompts are longer than the 4096 tokens" in sentence(cli("eval", tiny, "--tasks", "long.jsonl"))
    (tmp_path / "broken.jsonl").write_text(json.dumps(LINES) + "\n{")
    assert "broken.jsonl, line 2 is not JSON" in sentence(cli("eval", tiny, "--tasks", "broken.jsonl"))
    assert "no file none.jsonl" in sentence(cli("eval", tiny, "--tasks", "none.jsonl"))


def test_answers_are_those_of_a_run_and_a_window_gives_others(model):
    """The right answers are what dense decoding says, so dense passes, and so does a support of everything."""
    from sfi_local.runtime.generate import generate
    from sfi_local.runtime.sampling import Sampling

    prompts, text = [], measured_text(None)[0]
    for start in range(0, 40_000, 4000):
        tokens = model.tokenize(text[start:start + 690])
        with SwitchSession(model, 720, SMALL, "f16") as session:
            session.use("dense")
            said = [s.token for s in generate(session, model.vocabulary, tokens, Sampling(temp=0).chain(), 16)]
        if len(said) == 16:  # this model likes to end its answers
            prompts.append(Prompt(tokens, len(said), said))
    assert len(prompts) > 2
    everything = Row("all", "sfi", {"n_selected": 680})
    dense, every, window = answer_all(model, prompts, [DENSE, everything, WINDOW], SMALL)
    assert set(dense.scores) == set(every.scores) == {1} and all(dense.passed)
    assert max(window.scores) < 1 and window.kinds.count("fast") > 10 and window.kv_read_share < 0.3
    assert every.kinds.count("fast") > 10 and dense.kv_read_share == 1 and dense.depth <= 690


def test_a_row_whose_steps_were_dense_is_noticed(model, monkeypatch):
    real = SwitchSession.use
    monkeypatch.setattr(SwitchSession, "use", lambda self, mode, params=None: real(
        self, "dense" if mode == "sfi" else mode, params))
    with pytest.raises(CheckError, match="sfi were dense"):
        answer_all(model, [ask(model, "What is new? " * 30, "", "nothing")], [DENSE, SFI], SMALL)

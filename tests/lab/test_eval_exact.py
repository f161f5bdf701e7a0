"""Mode exact beside dense as a measurement: what is counted, what a tie excuses, and that a difference is never quiet."""

import json
import sys

import pytest
from support.command_line import sentence

from sfi_local import Sampling, SfiParams
from sfi_local.cli import main as command_line
from sfi_local.errors import InputError
from sfi_local.lab.checks import CheckError
from sfi_local.lab.eval import exact as eval_exact
from sfi_local.lab.eval import report as eval_report
from sfi_local.lab.eval.answers import answer
from sfi_local.lab.eval.command import measure
from sfi_local.lab.eval.exact import Difference, compare, from_rounding
from sfi_local.lab.eval.prompts import excerpts
from sfi_local.lab.eval.request import EvalPlan
from sfi_local.lab.eval.rows import Row, plan
from sfi_local.lab.eval.score import Score
from sfi_local.lab.facts import measured_text
from sfi_local.lab.trunk import Sessions

SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
OPTIONS = ("--set", "policy=frozen,n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1)
FIELDS = {"mode", "depth", "n_prompts", "n", "n_tokens", "n_equal", "n_ties", "verdict", "complaint", "differences", "noise", "draft",
          "n_spans", "n_drafted", "n_accepted", "kept_per_span", "n_dense", "temp", "seed", "kv_read_share", "steps", "reasons", "params",
          "model", "machine", "source_id", "command", "text"}

DRAWN = Sampling(temp=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=3)


@pytest.fixture(scope="module")
def model(tiny):
    from sfi_local import load

    with load(tiny, mode="stock", n_threads=1) as model:
        yield model


@pytest.fixture
def request_of(tiny):
    return lambda **options: EvalPlan(str(tiny), threads=1, params=SMALL, **{"n_exact": 3, "depths": (300,), "n": 30, **options})


def keep_all(slot, sampler, drafts, first, logprobs):
    """In place of exact._keep: drafts are not verified."""
    return [*(d.token for d in drafts), sampler.sample(slot.context, first + len(drafts))], [{"tie": False}] * (len(drafts) + 1)


# ---- rows ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drawn", [(), ("--temp", 0.8, "--seed", 7)], ids=["greedy", "sampled"])
def test_rows_have_what_scripts_rely_on(cli, tiny, tmp_path, drawn):
    done = cli("eval", tiny, "--exact", 3, "--depth", 300, "-n", 30, "--row", "four:mode=exact,draft=4", "-o", "json", "--save",
               "rows.json", *drawn, *OPTIONS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(r["name"], r["mode"], r["draft"]) for r in rows] == [("exact", "exact", None), ("four", "exact", 4)]
    assert all(FIELDS <= set(r) and (r["depth"], r["n_prompts"], r["n"]) == (300, 3, 30) for r in rows)
    assert all(r["n_equal"] == r["n_tokens"] <= 90 and r["verdict"] == "dense" and r["differences"] == [] for r in rows)
    assert all((r["temp"], r["seed"]) == ((0.8, 7) if drawn else (0, 0)) for r in rows)
    four = rows[1]
    assert 0 < four["n_drafted"] <= 4 * four["n_spans"] and four["kept_per_span"] == four["n_accepted"] / four["n_spans"]
    assert four["steps"]["fast"] + four["n_by_ngrams"] == four["n_accepted"]
    assert four["n_dense"] + four["n_spans"] + four["n_by_ngrams"] == sum(four["steps"][kind] for kind in ("dense", "slow"))
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_formats_agree(request_of):
    rows = measure(request_of(n_exact=1, n=12))
    n = rows[0]["n_tokens"]
    assert f"| {n} | {n} | dense |" in eval_report.show("md", rows) and "greedy, beside dense steps" in eval_report.show("table", rows)
    assert eval_report.show("csv", rows).startswith("task,name,mode") and json.loads(eval_report.show("json", rows)) == rows


def test_the_tokens_are_those_of_the_mode_itself_and_each_prompt_has_its_seed(model, tiny, request_of, monkeypatch):
    from sfi_local import load
    from sfi_local.lab.eval import answers as eval_answers

    found, real = [], eval_answers.answer_all
    monkeypatch.setattr(eval_answers, "answer_all", lambda *args: found.append(real(*args)) or found[-1])
    measure(request_of(temp=0.8, seed=5))
    dense, exact = found[0]
    prompts = excerpts(model, *measured_text(None), 300, 3, 30)
    for mode, score in (("dense", dense), ("exact", exact)):
        with load(tiny, mode=mode, n_threads=1, params=SMALL) as other:
            said = []
            for i, prompt in enumerate(prompts):
                other.close_session()
                said.append([s.token for s in other.generate(prompt.tokens, n=30, sampling=Sampling(temp=0.8, seed=5 + i))])
        assert score.tokens == said


def test_prompts_are_cut_at_even_distances(model):
    text = measured_text(None)[0][:4000]
    tokens = model.tokenize(text)
    prompts = excerpts(model, text, "text", 300, 5, 7)
    assert [(len(p.tokens), p.n) for p in prompts] == [(300, 7)] * 5
    starts = [round(i * (len(tokens) - 300) / 4) for i in range(5)]
    assert [p.tokens for p in prompts] == [tokens[at:at + 300] for at in starts]
    assert [p.tokens for p in excerpts(model, text, "text", 300, 1, 7)] == [tokens[:300]]
    assert len(excerpts(model, text, "text", len(tokens) - 4, 5, 7)) == 5
    with pytest.raises(InputError, match="5 prompts of --depth .* take"):
        excerpts(model, text, "text", len(tokens) - 3, 5, 7)


# ---- equal or not ----------------------------------------------------------------------------------------------------

def scores(dense, exact, ties, rounding=(False, False)):
    return Score(Row("exact", "exact"), 0, tokens=exact, ties=ties, rounding=list(rounding)), Score(Row("dense", "dense"), 0, tokens=dense)


def test_tokens_are_counted_up_to_the_first_difference_of_their_prompt():
    no = [False] * 4
    same = compare(*scores([[1, 2, 3, 4]], [[1, 2, 3, 4]], [no]))
    assert (same.n_tokens, same.n_equal, same.verdict, same.complaint) == (4, 4, "dense", "")
    tie = compare(*scores([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]], [[False, False, True, False], no]))
    assert (tie.n_tokens, tie.n_equal, tie.verdict, tie.complaint) == (6, 4, "dense but for rounding", "")
    rounded = compare(*scores([[1, 2], [5, 6]], [[1, 3], [5, 6]], [no, no], (True, False)))
    assert (rounded.n_equal, rounded.verdict, rounded.differences) == (3, "dense but for rounding", (Difference(1, 2, False, True),))
    wrong = compare(*scores([[1, 2], [1, 2, 3, 4]], [[1, 2], [1, 9, 3, 4]], [no, [True, False, True, True]]))
    assert (wrong.n_equal, wrong.verdict, wrong.differences) == (3, "NOT DENSE", (Difference(2, 2, False, False),))
    assert "in 1 of 2 prompts" in wrong.complaint and "token 2 of prompt 2" in wrong.complaint


@pytest.mark.parametrize("dense, exact", [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3])])
def test_an_answer_that_ends_elsewhere_is_a_difference(dense, exact):
    found = compare(*scores([dense], [exact], [[False] * len(exact)]))
    assert (found.n_equal, found.verdict, found.differences[0].token) == (2, "NOT DENSE", 3)


@pytest.fixture
def replayed(model):
    """An answer of mode exact, and the session that gave it, with 4 drafts per span."""
    prompt, row = excerpts(model, *measured_text(None), 300, 3, 100)[1], Row("exact", "exact", draft=4)
    with Sessions(model, 400, SMALL, "f16") as sessions:
        session, planned = sessions.at(None, SMALL, prompt.tokens), plan(row, SMALL, 100, 400, {})
        answered = lambda: answer(model, session, prompt, row, planned, DRAWN.chain())
        yield session, planned.params, answered


def other_than(tokens, at):
    return [*tokens[:at], tokens[at] + 1, *tokens[at + 1:]]


def test_a_difference_that_the_passes_give_without_drafts_is_rounding(replayed, monkeypatch):
    session, params, answered = replayed
    tally = answered()
    assert 0 < tally.n_accepted < tally.n_drafted and len(tally.tokens) > 20
    for at in (0, 1, 2, 9, len(tally.tokens) - 1):
        assert from_rounding(session, params, tally, other_than(tally.tokens, at), DRAWN.chain())
    assert not from_rounding(session, params, tally, tally.tokens, DRAWN.chain())  # there is none
    assert not from_rounding(session, params, tally, [*tally.tokens, 1], DRAWN.chain())  # an answer that ended earlier
    monkeypatch.setattr(eval_exact, "MAX_KL", -1.0)  # logits that are not near
    assert not from_rounding(session, params, tally, other_than(tally.tokens, 9), DRAWN.chain())


def test_a_difference_that_drafts_made_is_not(replayed, monkeypatch):
    session, params, answered = replayed
    dense = answered().tokens
    monkeypatch.setattr("sfi_local.runtime.exact._keep", keep_all)
    assert not from_rounding(session, params, answered(), dense, DRAWN.chain())


def test_drafts_that_are_not_verified_are_shown_as_wrong_and_the_exit_code_is_1(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sfi_local.runtime.exact._keep", keep_all)
    monkeypatch.setattr(sys, "argv", ["sfi-local", "eval", str(tiny), "--exact", "3", "--depth", "300", "-n", "30", "--save",
                                      str(tmp_path / "rows.json"), *map(str, OPTIONS)])
    assert command_line.main() == 1
    out, err = capsys.readouterr()
    assert "NOT DENSE" in out and "is not what dense decoding gives: in " in out
    assert "is not what dense decoding gives: in " in err.splitlines()[-1]
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    assert row["n_equal"] < row["n_tokens"] and row["verdict"] == "NOT DENSE" and not row["differences"][0]["tie"]


def test_a_row_that_drafted_nothing_has_no_numbers(request_of, monkeypatch):
    monkeypatch.setattr("sfi_local.runtime.slot.Slot.can_verify", lambda self, token: False)
    with pytest.raises(CheckError, match="exact drafted nothing"):
        measure(request_of())


# ---- answers to tasks ------------------------------------------------------------------------------------------------

def test_mode_exact_answers_tasks_as_dense_does(cli, tiny):
    done = cli("eval", tiny, "--passkey", 3, "--depth", 500, "--modes", "exact,sfi", "--row", "two:mode=exact,draft=2", "-o", "json",
               *OPTIONS)
    assert done.returncode == 0, done.stderr
    dense, sfi, exact, two = json.loads(done.stdout)
    assert [r["mode"] for r in (dense, sfi, exact, two)] == ["dense", "sfi", "exact", "exact"]
    assert exact["passed_of_dense"] == two["passed_of_dense"] == dense["passed"] and two["reasons"]["verify"] > 0


def test_answers_of_mode_exact_that_are_not_dense_are_not_shown(request_of, monkeypatch):
    monkeypatch.setattr("sfi_local.runtime.exact._keep", keep_all)
    with pytest.raises(CheckError, match="No numbers are shown: exact is not what dense decoding gives"):
        measure(request_of(n_exact=None, passkey=5, depths=(500,), modes=("exact",)))


# ---- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, said", [
    (("--modes", "exact"), "measure it with --exact N"), (("--row", "x:mode=exact"), "measure it with --exact N"),
    (("--exact", 2, "--passkey", 3), "leave out"), (("--exact", 2, "--greedy", 3), "leave out"), (("--exact", 2, "--reference"), "leave out"),
    (("--exact", 2, "--plot", "x.png"), "leave out"), (("--exact", 2, "--modes", "sfi"), "leave out"), (("--temp", 0.5), "are of --exact"),
    (("--seed", 3), "are of --exact"), (("--exact", 2, "--row", "x:n_selected=9"), "mode=exact"),
    (("--exact", 2, "--quality", 0.1), "leave it out")])
def test_what_cannot_be_meant_is_refused(cli, tiny, options, said):
    assert said in sentence(cli("eval", tiny, *options), code=2)


def test_depths_and_texts_that_cannot_be(cli, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    assert "exact drafts from a depth of 152 tokens" in sentence(cli("eval", tiny, "--exact", 2, "--depth", 100, "-n", 30, *OPTIONS))
    assert "has 10 tokens" in sentence(cli("eval", tiny, "--exact", 2, "--depth", 300, "--text", "short.txt", *OPTIONS))
    assert "was trained on 4096" in sentence(cli("eval", tiny, "--exact", 2, "--depth", 4000, "-n", 100, *OPTIONS))

"""Fidelity on a text: rows scripts rely on, equivalences that hold for any model, and a sentence for every mistake."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.command_line import cli_command, cli_env, interrupted, sentence

from sfi_local import SfiParams
from sfi_local.lab.checks import CheckError
from sfi_local.lab.eval import report as eval_report
from sfi_local.lab.eval import text as eval_text
from sfi_local.lab.eval.greedy import NEAR_TIE
from sfi_local.lab.eval.rows import Row
from sfi_local.lab.facts import measured_text
from sfi_local.lab.trunk import SwitchSession

SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
OPTIONS = ("--set", "n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1, "-n", 20)
FIELDS = {"mode", "depth", "n", "kld_mean", "kld_median", "kld_p99", "top1", "delta_nll", "kv_read_share", "kv_bytes", "name",
          "kv_type", "steps", "reasons", "params", "budget", "model", "machine", "source_id", "date", "command", "threads", "text"}
DENSE, SFI = Row("dense", "dense"), Row("sfi", "sfi")


@pytest.fixture(scope="module")
def model(tiny):
    from sfi_local import load

    with load(tiny, mode="stock", n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenize(measured_text(None)[0][:2000])


@pytest.fixture
def measure(model, tokens):
    def run(*rows, depths=(300,), n=20, params=SMALL, **options):
        return {(one.row.name, one.depth): one for one in eval_text.measure(model, depths, n, rows, params, tokens, **options)}
    return run


# ---- rows ------------------------------------------------------------------------------------------------------------

def test_rows_have_what_scripts_rely_on(cli, tiny, tmp_path):
    (tmp_path / "book.txt").write_text(measured_text(None)[0][5000:6000])
    done = cli("eval", tiny, "--text", "book.txt", "--depth", 300, "--modes", "sfi,dense,stock", "-o", "json", "--save",
               "rows.json", *OPTIONS)
    assert done.returncode == 0, done.stderr
    dense, stock, sfi = rows = json.loads(done.stdout)
    assert [r["mode"] for r in rows] == ["dense", "stock", "sfi"] and all(FIELDS <= set(r) for r in rows)
    assert all((r["depth"], r["n"], r["text"], sum(r["steps"].values())) == (300, 20, "book.txt", 20) for r in rows)
    assert dense["kld_mean"] == dense["kld_p99"] == dense["delta_nll"] == 0 and dense["top1"] == dense["kv_read_share"] == 1
    assert 0 < stock["kld_mean"] < 0.001 < sfi["kld_mean"] <= sfi["kld_p99"] and stock["kv_read_share"] == 1
    assert sfi["steps"]["fast"] > 10 and sfi["kv_read_share"] < 0.6 and sfi["budget"]["n_selected"] == 40
    assert json.loads((tmp_path / "rows.json").read_text()) == rows and len(list(tmp_path.iterdir())) == 2


def test_formats_agree(measure, model, tiny):
    from sfi_local.lab.eval.request import EvalPlan

    found = list(measure(DENSE, SFI, n_greedy=5).values())
    rows = eval_report.text_rows(found, EvalPlan(str(tiny), n_greedy=5), model)
    parsed = list(csv.DictReader(io.StringIO(eval_report.show("csv", rows))))
    assert [float(r["kld_mean"]) for r in parsed] == [r["kld_mean"] for r in json.loads(eval_report.show("json", rows))]
    assert len(eval_report.show("md", rows).splitlines()) == 3 + 1 + 2 + 2
    assert "near" not in eval_report.show("table", rows) and str(NEAR_TIE) in eval_report.show("table", rows)


def test_a_plot_is_written(measure, model, tiny, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    from sfi_local.lab.eval.request import EvalPlan

    rows = [DENSE, Row("stock", "stock"), SFI, *(Row(f"oracle {n}", "sfi", {"n_selected": n}) for n in (8, 16))]
    found = list(measure(*rows, depths=(100, 200), n=4).values())
    eval_report.plot(eval_report.text_rows(found, EvalPlan(str(tiny)), model), str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


# ---- equivalences ----------------------------------------------------------------------------------------------------

def test_dense_equals_itself_whatever_came_between_and_a_window_does_not(measure):
    found = measure(DENSE, Row("window", "sfi", {"policy": "window", "n_recent": 32}), Row("again", "dense"), depths=(300, 400))
    for depth in (300, 400):
        assert found["dense", depth].kl == found["again", depth].kl == [0.0] * 20
        assert found["window", depth].kinds.count("fast") > 10 and np.mean(found["window", depth].kl) > 0.01


def test_a_depth_gives_the_same_alone_and_after_another(measure):
    both, alone = measure(DENSE, SFI, depths=(300, 400)), measure(DENSE, SFI, depths=(400,))
    assert both["sfi", 400].kl == pytest.approx(alone["sfi", 400].kl, abs=1e-3)
    assert both["sfi", 400].kinds == alone["sfi", 400].kinds


def test_a_budget_of_everything_is_dense(measure):
    found = measure(DENSE, Row("all", "sfi", {"n_selected": 300}))
    assert found["all", 300].kinds.count("fast") > 10 and max(found["all", 300].kl) < 1e-5
    assert all(found["all", 300].same_top)


def test_the_divergence_is_that_of_the_logits_of_a_run(model, tokens, measure):
    """The same steps by hand, in a context of its own: prefill the text, then one step per token."""
    found = measure(DENSE, SFI)["sfi", 300]
    logits = {}
    for mode in ("dense", "sfi"):
        with SwitchSession(model, 320, SMALL, "f16") as session:
            session.use(mode)
            session.prefill(tokens[:300])
            logits[mode] = np.array([session.step(token) and session.last_logits().copy() for token in tokens[300:320]], float)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits.values())
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), abs=0.02)
    at = np.arange(19), tokens[301:320]
    assert found.delta_nll[:19] == pytest.approx((p[at] - q[at]), abs=0.05)


def test_divergence_by_hand():
    p, q = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32))
    assert eval_text.divergence(p, q) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert eval_text.divergence(p, p) == 0
    assert eval_text.log_softmax(p + 7) == pytest.approx(p)
    assert [eval_report.quantile(list(range(1, 101)), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert eval_report.quantile([3.0], 0.99) == 3


def test_the_share_of_bytes_is_the_librarys_and_counts_the_kv_type(measure):
    found = measure(DENSE, SFI, Row("q8_0", "dense", kv_type="q8_0"), Row("both", "sfi", kv_type="q8_0"))
    assert found["q8_0", 300].kv_read_share == 34 / 64 and found["dense", 300].kv_read_share == 1
    assert found["both", 300].kv_read_share == pytest.approx(found["sfi", 300].kv_read_share * 34 / 64)
    per_cell = 4 * 2 * 2 * 32 * 2  # layers, K and V, KV heads, head size, bytes of F16
    assert found["dense", 300].kv_bytes == per_cell * (300 + 10.5)


def test_rows_like_another_spend_as_much(measure):
    rows = [DENSE, SFI, Row("fixed", "sfi", same="refreshes", like="sfi"), Row("window", "sfi", {"policy": "window"}, same="bytes", like="sfi")]
    found = measure(*rows, n=60)
    assert found["fixed", 300].kinds.count("slow") == found["sfi", 300].kinds.count("slow") > 2
    assert set(found["fixed", 300].reasons) == {"forced"} != set(found["sfi", 300].reasons)
    assert found["window", 300].kv_read_share == pytest.approx(found["sfi", 300].kv_read_share, rel=0.05)
    assert found["window", 300].kinds == ["fast"] * 60


def test_the_first_difference_is_where_free_outputs_part(model, tokens, measure):
    from sfi_local.runtime.generate import generate
    from sfi_local.runtime.sampling import Sampling

    n, outputs = 20, {}
    greedy = measure(DENSE, SFI, depths=(700,), n=2, n_greedy=n)["sfi", 700].greedy
    for mode in ("dense", "sfi"):
        with SwitchSession(model, 700 + n, SMALL, "f16") as session:
            session.use(mode)
            outputs[mode] = [s.token for s in generate(session, model.vocabulary, tokens[:700], Sampling(temp=0).chain(), n)]
    equal = [a == b for a, b in zip(*outputs.values())]
    assert greedy.first == equal.index(False) and greedy.gap > 0 and 0 <= greedy.n_ties <= greedy.n_differ <= greedy.n
    same = measure(DENSE, n=2, n_greedy=n)["dense", 300].greedy
    assert (same.first, same.gap, same.tie, same.n_differ) == (None, None, None, 0)


def test_the_oracle_is_counted_by_what_it_chose_and_is_nearer_than_a_window_of_as_many(measure):
    found = measure(DENSE, Row("oracle", "sfi", {"policy": "oracle", "n_recent": 32, "n_selected": 40}),
                    Row("window", "sfi", {"policy": "window", "boundary": False, "n_recent": 72}))
    oracle, window = found["oracle", 300], found["window", 300]
    assert oracle.kv_read_share == pytest.approx(76 / 310.5) and window.kv_read_share == pytest.approx(76 / 310.5)
    assert oracle.kinds == window.kinds == ["fast"] * 20 and np.mean(oracle.kl) < np.mean(window.kl)


# ---- nothing is shown of a row that did something else -----------------------------------------------------------------

def test_a_row_whose_steps_were_dense_is_noticed(measure, monkeypatch):
    real = SwitchSession.use
    monkeypatch.setattr(SwitchSession, "use", lambda self, mode, params=None: real(
        self, "dense" if mode == "sfi" else mode, params))
    with pytest.raises(CheckError, match="sfi were dense"):
        measure(DENSE, SFI)


def test_a_state_that_is_not_restored_is_noticed(measure, monkeypatch):
    real, calls = SwitchSession.begin, []

    def begin(self, mode, params=None):
        real(self, mode, params)
        calls.append(mode)
        if len(calls) > 1:
            self.cut(len(self.trunk) - 5)
            self.prefill(self.trunk[-5:][::-1])

    monkeypatch.setattr(SwitchSession, "begin", begin)
    with pytest.raises(CheckError, match="does not equal itself"):
        measure(DENSE)


# ---- mistakes --------------------------------------------------------------------------------------------------------

def test_texts_and_depths_that_cannot_be(cli, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    line = sentence(cli("eval", tiny, "--text", "short.txt", "--depth", 100, "-n", 4))
    assert "short.txt" in line and "has 10 tokens" in line and "takes 104" in line
    assert "was trained on 4096" in sentence(cli("eval", tiny, "--depth", 5000))
    assert "was trained on 4096" in sentence(cli("eval", tiny, "--depth", 4000, "-n", 10, "--greedy", 200))
    assert "no file none.txt" in sentence(cli("eval", tiny, "--text", "none.txt", "--depth", 10))


@pytest.mark.parametrize("options", [
    ("--modes", "stok"), ("--modes", ","), ("--depth", "many"), ("-n", 0), ("-o", "xml"), ("--row", "x"), ("--limit", 3),
    ("--row", "sfi:n_selected=3"), ("--passkey", 2, "--greedy", 3), ("--copy", 20, "--plot", "x.png"), ("--plot", "x.doc"),
    ("--tasks", "-", "--text", "-")])
def test_wrong_uses(cli, tiny, options):
    sentence(cli("eval", tiny, *options), code=2)


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(cli, tiny):
    assert "none/rows.json cannot be written" in sentence(cli("eval", tiny, "--depth", 4000, "--save", "none/rows.json"))


def test_a_model_that_cannot_be_sparse_is_refused(cli, tmp_path, native):
    from support.tiny_model import write_tiny

    path = write_tiny(tmp_path / "odd.gguf", n_embd=96)  # head size 24
    assert "head size" in sentence(cli("eval", path, "--depth", 10, "-n", 2))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_leaves_nothing(tiny, tmp_path):
    command = cli_command("eval", tiny, "--depth", 300, "-n", 3000, "-t", 1, "-o", "json", "--save", "rows.json")
    assert (*interrupted(command, b"measuring", tmp_path), list(tmp_path.iterdir())) == (130, b"", [])


def test_help_needs_no_library():
    code = "import sys, sfi_local.lab.eval.command; sys.exit(any(m in sys.modules for m in ('llama_cpp', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env=cli_env()).returncode == 0
    assert subprocess.run(cli_command("eval", "--help"), env=cli_env(), capture_output=True).returncode == 0

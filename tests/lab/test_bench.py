"""The benchmark: rows scripts rely on, outputs before times, turns, filled states, and a sentence for every mistake."""

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
from sfi_local.binding import state_fill
from sfi_local.lab.bench import command as bench
from sfi_local.lab.bench import report as bench_report
from sfi_local.lab.bench.session import PIECE, BenchSession, Decoded
from sfi_local.lab.checks import CheckError, compare, slow_and_fast
from sfi_local.lab.facts import measured_text

SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
OPTIONS = ("--set", "policy=frozen,n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1,
           "--reps", 2, "-n", 20)
FIELDS = {"mode", "depth", "decode_tps", "ms_slow", "ms_fast", "steps", "kv_read_share", "ratio_to_stock", "ratio_to_dense",
          "ceiling", "kv_type", "spread", "gbps", "read_bandwidth", "model", "threads", "n", "reps", "source_id", "machine",
          "date", "command"}


def request(tiny, **changes):
    given = dict(model=str(tiny), depths=(0, 300), modes=("stock", "dense", "sfi"), kv_types=("f16",), n=20, reps=2,
                 threads=1, text=None, random_tokens=False, fill="prefill", slow_every=None, verbose=False, params=SMALL)
    return bench.BenchPlan(**{**given, **changes})


@pytest.fixture(scope="module")
def model(tiny):
    from sfi_local import load

    with load(tiny, mode="stock", n_threads=1) as model:
        yield model


@pytest.fixture
def session(model):
    made = []

    def make(fill="prefill", kv="f16", params=SMALL, n_ctx=2048):
        tokens = model.tokenize(measured_text(None)[0][:n_ctx])
        made.append(BenchSession(model, n_ctx, params, kv, tokens, fill))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- rows ------------------------------------------------------------------------------------------------------------

def test_rows_have_what_scripts_rely_on(cli, tiny):
    done = cli("bench", tiny, "--depth", "300", "-o", "json", *OPTIONS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(r["depth"], r["mode"]) for r in rows] == [(0, "stock"), (300, "stock"), (300, "dense"), (300, "sfi")]
    assert all(FIELDS <= set(r) and r["decode_tps"] > 0 and sum(r["steps"].values()) == 20 for r in rows)
    at_0, stock, dense, sfi = rows
    assert stock["ceiling"] == dense["ceiling"] == at_0["decode_tps"] / stock["decode_tps"]
    assert stock["ratio_to_stock"] == dense["ratio_to_dense"] == 1 and stock["steps"]["stock"] == 20
    assert sfi["steps"]["fast"] > 10 and sfi["kv_read_share"] < 0.6 < 1 == dense["kv_read_share"]
    assert sfi["ms_slow"] > 0 < sfi["ms_fast"] and dense["ms_slow"] is None and 0 <= dense["kl_dense_stock"] < 0.02
    assert "bench" in sfi["command"] and sfi["text"] == "pydoc_data.topics" and "boundary" in sfi["reasons"]


@pytest.mark.parametrize("fill", ["prefill", "state"])
def test_the_sketch_is_measured_beside_the_frozen_support(tiny, fill):
    """After a state fill the step that makes the sketch is not counted."""
    rows = bench.measure(request(tiny, depths=(900,), modes=("dense", "frozen", "sfi"), fill=fill, params=SfiParams(), n=20))
    dense, frozen, sketch = rows
    assert sketch["steps"]["fast"] == 20 and sketch["params"]["support"] == "sketch" and sketch["kv_read_share"] < 0.7
    assert frozen["params"]["support"] == "frozen" and dense["steps"]["dense"] == 20
def test_mode_exact_is_measured_on_the_greedy_text_that_dense_steps_give(tiny):
    params = SMALL.replace(auto_depth=1)
    rows = bench.measure(request(tiny, depths=(300,), modes=("dense", "exact"), params=params, n=40))
    exact = next(r for r in rows if r["mode"] == "exact")
    assert exact["n_drafted"] >= exact["n_accepted"] and exact["n_drafted"] > 0 and sum(exact["steps"].values()) == 40


def test_mode_exact_that_is_not_dense_gets_no_time(tiny, monkeypatch):
    def keep_all(slot, sampler, drafts, first, logprobs):
        return [*(d.token for d in drafts), sampler.sample(slot.context, first + len(drafts))], [{"tie": False}] * (len(drafts) + 1)

    monkeypatch.setattr("sfi_local.runtime.exact._keep", keep_all)
    with pytest.raises(CheckError, match="mode exact is not that of dense steps"):
        bench.measure(request(tiny, depths=(300,), modes=("dense", "exact"), params=SMALL.replace(auto_depth=1), n=40))


def test_every_kv_type_and_depth_has_its_rows_and_a_state_fill_is_labelled(tiny):
    rows = bench.measure(request(tiny, depths=(600, 900), kv_types=("f16", "q8_0"), fill="state", slow_every=5, n=10))
    assert len(rows) == 2 * (1 + 2 * 3)
    sfi = [r for r in rows if r["mode"] == "sfi"]
    assert all((r["steps"]["slow"], r["steps"]["fast"], r["fill"]) == (2, 8, "state") for r in sfi)
    assert "repeated" in bench_report.table(rows) and "repeated" in bench_report.markdown(rows)


def test_formats_agree(tiny):
    rows = bench.measure(request(tiny, depths=(0,), reps=1, n=4, random_tokens=True))
    parsed = list(csv.DictReader(io.StringIO(bench_report.as_csv(rows))))
    assert [r["mode"] for r in parsed] == ["stock", "dense", "sfi"] == [r["mode"] for r in json.loads(bench_report.as_json(rows))]
    assert [float(r["decode_tps"]) for r in parsed] == [r["decode_tps"] for r in rows]
    assert int(parsed[1]["steps_dense"]) == 4
    text = bench_report.table(rows)
    assert len(bench_report.markdown(rows).splitlines()) == len(bench_report.context(rows)) + 1 + 2 + 3 and "random tokens" in text


def test_modes_take_turns_on_the_same_tokens(tiny, monkeypatch):
    order, real = [], BenchSession.decode

    def decode(self, mode, n, slow_every=None, params=None):
        done = real(self, mode, n, slow_every, params)
        order.append((mode, tuple(self.tokens)))
        return done

    monkeypatch.setattr(BenchSession, "decode", decode)
    bench.measure(request(tiny, depths=(0, 90), reps=2))
    assert [mode for mode, _ in order] == ["stock", "dense", "sfi"] * 4
    assert len({tokens for _, tokens in order[:6]}) == len({tokens for _, tokens in order[6:]}) == 1
    assert len(order[0][1]) == 20 and len(order[6][1]) == 110


def test_auto_is_dense_below_its_depth_and_slow_fast_above(tiny):
    rows = bench.measure(request(tiny, depths=(0, 300), modes=("dense", "auto"), reps=1))
    below, above = (r for r in rows if r["mode"] == "auto")
    assert below["steps"]["dense"] == 20 and above["steps"]["fast"] > 10 and above["params"]["auto_depth"] == 2 * SMALL.budget
    assert above["ratio_to_stock"] is above["ceiling"] is None


# ---- outputs before times --------------------------------------------------------------------------------------------

def test_no_time_is_shown_of_a_mode_that_did_other_steps(tiny, monkeypatch):
    real = BenchSession.use
    monkeypatch.setattr(BenchSession, "use", lambda self, mode, params=None: real(
        self, "dense" if mode == "sfi" else mode, params))
    with pytest.raises(CheckError, match="sfi were dense"):
        bench.measure(request(tiny, reps=1))


def test_no_time_is_shown_where_the_logits_differ(tiny, monkeypatch):
    real = BenchSession.logits
    monkeypatch.setattr(BenchSession, "logits", lambda self, mode, n, schedule=None: real(self, mode, n, schedule) * (
        0.5 if mode == "stock" else 1))
    with pytest.raises(CheckError, match="dense does not equal stock"):
        bench.measure(request(tiny, reps=1))


def test_fast_steps_in_place_of_slow_ones_are_noticed(session):
    one = session()
    one.go_to(600)
    slow, fast = (one.logits("sfi", 8, lambda *_: kind) for kind in ("slow", "fast"))
    assert compare("slow", slow, "dense", one.logits("dense", 8), 0.002) < 0.002
    with pytest.raises(CheckError):
        compare("fast", fast, "slow", slow, 0.002)


def test_a_schedule_that_was_not_kept_is_noticed():
    kept = Decoded(["slow", "fast", "fast", "fast"] * 2, [1.0] * 8, {}, 0.5, 1.0)
    slow_and_fast(kept, 76, 300, 4)
    with pytest.raises(CheckError, match="every 3th step"):
        slow_and_fast(kept, 76, 300, 3)
    with pytest.raises(CheckError, match="read 100 %"):
        slow_and_fast(Decoded(kept.kinds, kept.ms, {}, 1.0, 1.0), 76, 300, None)


def test_logits_that_are_not_finite_and_ties():
    flat, tilted = np.zeros((1, 10), np.float32), np.linspace(0, 0.01, 10, dtype=np.float32)[None]
    assert compare("a", flat, "b", tilted, 0.02) < 1e-4
    with pytest.raises(CheckError, match="not finite"):
        compare("a", flat * np.nan, "b", flat, 0.02)


# ---- the cache at a depth --------------------------------------------------------------------------------------------

def test_repetitions_of_a_mode_are_equal_whatever_came_between(session):
    one = session()
    one.go_to(300)
    first = one.logits("sfi", 20)
    one.decode("stock", 30)
    one.decode("dense", 5)
    assert np.array_equal(one.logits("sfi", 20), first)
    one.go_to(400)
    assert one.tokens == one._text[:400]


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_a_filled_cache_holds_the_piece_again_and_again(session, kv):
    one = session("state", kv)
    one.go_to(3 * PIECE - 100)
    assert one._llama.llama_memory_seq_pos_max(one._memory, 0) + 1 == len(one.tokens) == 3 * PIECE - 100
    state = state_of(one)
    own = state_fill.parts(state, 3 * PIECE - 100)
    piece = state_fill.parts(first_cells(own, PIECE), 3 * PIECE - 100)
    assert b"".join(p.data for p in own) == b"".join(state_fill._repeated(p.data, 0, p.n_bytes) for p in piece)
    one.decode("sfi", 20)
    assert len(one.tokens) == 3 * PIECE - 80


def state_of(session):
    import ctypes

    n = session._llama.llama_state_seq_get_size(session.context.ctx, 0)
    data = (ctypes.c_uint8 * n)()
    assert session._llama.llama_state_seq_get_data(session.context.ctx, data, n, 0) == n
    return bytes(data)


def first_cells(parts, n):
    """The state of the first n cells, from the parts of a state."""
    head, depth = parts[0].data, (len(parts[0].data) - state_fill._HEADER.size - 8) // state_fill._CELL.size
    magic, seq, streams, _ = state_fill._HEADER.unpack_from(head)
    out = [state_fill._HEADER.pack(magic, seq, streams, n), head[16:16 + 12 * n], head[-8:]]
    for title, rows in zip(parts[1::2], parts[2::2]):
        out += [title.data, rows.data[:len(rows.data) // depth * n]]
    return b"".join(out)


@pytest.mark.parametrize("n, total", [(7, 3), (7, 100_000), (4096, 1 << 20), (5000, 123_457), (204 * 16, 999_999)])
def test_a_state_laid_out_in_pages_equals_one_built_in_memory(n, total):
    import ctypes

    data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8).tobytes()
    parts = [state_fill._plain(b"head"), state_fill.Part(data, total), state_fill._plain(b"tail")]
    with state_fill.laid_out(parts) as (address, size):
        assert ctypes.string_at(address, size) == b"head" + state_fill._repeated(data, 0, total) + b"tail"


def test_a_state_of_another_kind_is_refused():
    from sfi_local.errors import InputError

    for state in (b"", bytes(40), bytes(16) + b"\1" * 100):
        with pytest.raises(InputError, match="take fill='prefill'"):
            state_fill.parts(state, 100)


# ---- mistakes --------------------------------------------------------------------------------------------------------

def test_depths_that_cannot_be(cli, tiny, tmp_path):
    assert "was trained on 4096" in sentence(cli("bench", tiny, "--depth", 5000))
    (tmp_path / "short.txt").write_text("Too short.")
    line = sentence(cli("bench", tiny, "--depth", 100, "-n", 4, "--text", "short.txt"))
    assert "has 10 tokens" in line and "takes 104" in line
    assert "0,2000,8000" in sentence(cli("bench", tiny, "--depth", "12,abc"), code=2)


@pytest.mark.parametrize("options, meant", [(("--modes", "stok"), "stock"), (("--kv-type", "f16,q8"), "q8_0")])
def test_an_unknown_name_suggests_the_nearest(cli, tiny, options, meant):
    assert f"did you mean {meant}?" in sentence(cli("bench", tiny, *options), code=2)


@pytest.mark.parametrize("options", [("-o", "xml"), ("--reps", 0), ("--fill", "file"), ("--modes", ","), ("--plot", "a.doc")])
def test_wrong_uses(cli, tiny, options):
    sentence(cli("bench", tiny, *options), code=2)


def test_a_model_that_cannot_be_sparse_is_refused(cli, tmp_path, native):
    from support.tiny_model import write_tiny

    path = write_tiny(tmp_path / "odd.gguf", n_embd=96)  # head size 24
    assert "head size" in sentence(cli("bench", path, "--depth", 10, "-n", 2, "--reps", 1))


def test_a_plot_needs_matplotlib_and_a_place_before_anything_is_measured(cli, tiny, tmp_path):
    assert "cannot be written" in sentence(cli("bench", tiny, "--plot", "none/x.png"))
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path / "hidden"), cli_env()["PYTHONPATH"]])
    assert "pip install" in sentence(cli("bench", tiny, "--plot", "x.png", PYTHONPATH=path))


def test_a_plot_is_written(tiny, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    rows = bench.measure(request(tiny, depths=(0, 90), reps=1, n=4))
    bench_report.plot(rows, str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_leaves_nothing(tiny, tmp_path):
    command = cli_command("bench", tiny, "--depth", 300, "-n", 200, "--reps", 100_000, "-t", 1, "-o", "json")
    assert (*interrupted(command, b"measuring", tmp_path), list(tmp_path.iterdir())) == (130, b"", [])


def test_help_needs_no_library():
    code = "import sys, sfi_local.lab.bench.command, sfi_local.lab.make_model; sys.exit(any(m in sys.modules for m in ('llama_cpp', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env=cli_env()).returncode == 0
    for name in ("bench", "make-model"):
        assert subprocess.run(cli_command(name, "--help"), env=cli_env(), capture_output=True).returncode == 0


def test_the_wait_of_a_mode_is_that_of_the_product(tiny):
    """A first question in a new process, another one in it, a third in the next: each was read from where it says, or no wait is shown."""
    rows = bench.measure(request(tiny, depths=(0, 600), modes=("dense",), wait=True, reps=1, n=8))
    assert [row["answer_s"] for row in rows if row["depth"] == 0] == [None]
    (row,) = (row for row in rows if row["depth"])
    assert row["prefill_tps"] > 0 and 0 < row["ttft_memory_s"] < row["ttft_cold_s"] < row["answer_s"] and row["ttft_disk_s"] > 0
    assert "answer s" in bench_report.table(rows) and "answer s" not in bench_report.table(rows[:1])

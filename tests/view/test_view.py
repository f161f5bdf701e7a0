"""The view: what the page holds is what the hook said, whatever the text; files are there whole or not at all."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.command_line import cli_env, sentence
from support.tiny_model import SEED

from sfi_local.errors import NoSupportError
from sfi_local.runtime.step import Step
from sfi_local.view.data import NUMBERS, Collector, n_bins, numbers_of, pack_sets, page_data, sets_of, unpack_sets
from sfi_local.view.page import page
from sfi_local.view.sentences import read_most

SMALL = ("--set", "policy=frozen,n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1, "--temp", 0, "--seed", 1)
TEXT = "The quick brown fox jumps over the lazy dog. " * 12
NASTY = '</script><script>alert(1)</script> & &amp; <!-- ]]> "\' \u2028 \\u003c __DATA__ \U0001f98a'
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="the page's own decoder is run by node, which is not here")


def data_of(html: str) -> dict:
    return json.loads(DATA.search(html)[1])


# ---- packing ---------------------------------------------------------------------------------------------------------

def random_choices(rng, size: int, n_choices: int = 5) -> list:
    """Sets of five heads: none, few, half, all, and runs."""
    def sets():
        few, half = (np.flatnonzero(rng.random(size) < p).astype(np.int32) for p in (.02, .5))
        return [np.arange(0, dtype=np.int32), few, half, np.arange(size, dtype=np.int32), np.unique(np.minimum(size - 1, few + np.arange(9)[:, None]))]
    return [sets() for _ in range(n_choices)]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 63, 64, 65, 1000, 70000])
def test_packed_sets_come_back(size):
    choices = random_choices(np.random.default_rng(SEED + size), size)
    for sent, got in zip(choices, unpack_sets(pack_sets(choices, size), len(choices), 5, size), strict=True):
        assert all(map(np.array_equal, sent, got))


def test_nothing_packs_to_nothing():
    assert pack_sets([], 10) == b"" and unpack_sets(b"", 0, 3, 10) == []


def test_what_stays_costs_next_to_nothing():
    choices = random_choices(np.random.default_rng(SEED), 6400, n_choices=1)
    assert len(pack_sets(choices * 9, 6400)) - len(pack_sets(choices, 6400)) <= 8 * 5 / 8 + 1


# ---- collecting ------------------------------------------------------------------------------------------------------

class Hook:
    """An engine of 30 layers and 3 KV heads, two layers dense; its sets change a little at every look() that says so."""

    def __init__(self, n_layer: int = 30, n_positions: int = 6400, n_selected: int = 256):
        self.rng, self.n_layer, self.n_positions = np.random.default_rng(SEED), n_layer, n_positions
        self.chosen = {(il, h): self.rng.choice(n_positions, n_selected, replace=False) for il in range(n_layer) for h in range(3)}
        self.ready, self.mass = True, .5

    def layers(self):
        return [SimpleNamespace(sparse=il not in (0, 7), n_head=6, n_head_kv=3) for il in range(self.n_layer)]

    def selected(self, il, head):
        if not self.ready:
            raise NoSupportError("No support yet.")
        return [-7], [-1, *self.chosen[il, head].tolist()]  # an emptied cell holds no position

    def stability(self, il, head):
        return SimpleNamespace(n_selected=256, evidence=(il + 1) / 64, mass=self.mass, mass_prev=float("nan"), jaccard=.125)

    def tail(self, il, head):
        return SimpleNamespace(mass=head / 16, logit_error=il)

    def move(self):
        """A quarter of each set moves."""
        for key, chosen in self.chosen.items():
            free = np.setdiff1d(np.arange(4, self.n_positions), chosen)
            self.chosen[key] = np.concatenate([chosen[64:], self.rng.choice(free, 64, replace=False)])


def step(kind: str, depth: int, n_cells: int) -> Step:
    return Step(0, "x", kind, "", 1.0, depth, depth, n_cells)


def collect(hook: Hook, n: int, moves) -> Collector:
    collector = Collector(hook, hook.n_positions, 4, 256)
    for i in range(n):
        if moves(i):
            hook.move()
        collector.add(step("fast" if i else "prefill", hook.n_positions + i, 4 + 256 + i + 256))
    return collector


def test_only_what_changed_is_kept():
    collector = collect(Hook(4), 9, lambda i: i in (3, 6))
    assert collector.chosen == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(collector.choices) == 3
    assert collector.heads == [(il, head) for il in (1, 2, 3) for head in range(3)]


def test_measures_change_on_their_own():
    hook = Hook(2)
    collector = collect(hook, 3, lambda i: setattr(hook, "mass", i // 2 / 8))
    assert collector.chosen == [0, 0, 0] and collector.measured == [0, 0, 1]
    assert numbers_of(page_data(collector, ["x"] * 6403, {}))[1, :, NUMBERS.index("mass")].tolist() == [.125] * 3


def test_the_recent_window_is_pinned_at_the_refresh():
    assert collect(Hook(2), 5, lambda i: False).recent_from == [6400 - 256] * 5


def test_a_fast_step_of_policy_sketch_says_what_it_left_to_the_sketch():
    hook = Hook(2)
    collector = Collector(hook, 6400, 4, 256, "sketch")
    for kind, n_cells in (("prefill", 6400), ("fast", 516), ("slow", 6400), ("fast", 6400)):
        collector.add(step(kind, 6400, n_cells))
    assert collector.chosen == [-1, 0, -1, -1]  # what the hook says after the others is an older choice
    (numbers,) = numbers_of(page_data(collector, ["x"] * 6404, {}))
    assert numbers[:, NUMBERS.index("tail_mass")].tolist() == [.5 / 16, 2.5 / 16, 4.5 / 16]  # query heads 0, 1; 2, 3; 4, 5
    assert numbers[:, NUMBERS.index("n_selected")].tolist() == [256] * 3 and np.isnan(numbers[:, NUMBERS.index("mass")]).all()


def test_before_there_is_a_support_nothing_is_in_force():
    hook = Hook(2)
    hook.ready = False
    collector = collect(hook, 2, lambda i: False)
    assert collector.chosen == [-1, -1] and collector.choices == []
    assert page_data(collector, ["x"] * 6402, {})["n_choices"] == 0
    assert Collector(None, 5, 4, 256).heads == []


def test_a_hundred_tokens_that_all_choose_anew_stay_below_three_megabytes():
    hook = Hook()
    collector = collect(hook, 100, lambda i: i)
    data = page_data(collector, ["word "] * 6500, {"model": "m"})
    assert len(collector.choices) == 100 and len(page(data).encode()) < 3_000_000
    got = sets_of(data)
    for m in (0, 50, 99):
        for sent, back in zip(collector.choices[m], got[m], strict=True):
            assert np.array_equal(np.unique(sent // data["bin"]), back)


def test_sets_too_large_for_the_page_are_binned(monkeypatch):
    monkeypatch.setattr("sfi_local.view.data.MAX_SETS_BYTES", 2000)
    collector = collect(Hook(3), 9, lambda i: i % 3 == 0)
    data = page_data(collector, ["x"] * 6409, {})
    assert data["bin"] in (8, 16, 32, 64, 128) and len(data["sets"]) <= 2000 * 4 / 3 + 4
    assert all(np.array_equal(np.unique(sent // data["bin"]), back)
               for sets, got in zip(collector.choices, sets_of(data)) for sent, back in zip(sets, got))


# ---- the page --------------------------------------------------------------------------------------------------------

def test_text_is_data_whatever_it_holds():
    collector = collect(Hook(2), 1, lambda i: False)
    data = page_data(collector, [NASTY] * 3, {"model": NASTY})
    html, plain = page(data), page({**data, "pieces": ["x"] * 3, "model": "x"})
    assert html.count("<script") == plain.count("<script") and html.count("</script>") == plain.count("</script>")
    assert html.count("&") == plain.count("&") and html.count("<!--") == plain.count("<!--")
    assert data_of(html)["pieces"] == [NASTY] * 3 and data_of(html)["model"] == NASTY


def test_the_page_loads_nothing():
    html = page(page_data(Collector(None, 1, 4, 16), ["x"], {}))
    assert "default-src 'none'" in html
    assert not re.search(r"""(?:src|href)=|@import|url\(|fetch\(|XMLHttp|innerHTML|document\.write|eval\(""", html)
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


@needs_node
@pytest.mark.parametrize("width", [1, 16])
def test_the_page_reads_what_was_packed(monkeypatch, width):
    """The decoder in the page against the specification, over one head, and over all."""
    monkeypatch.setattr("sfi_local.view.data.MAX_SETS_BYTES", 1 << 20 if width == 1 else 3000)
    collector = collect(Hook(6), 8, lambda i: i % 2)
    data = page_data(collector, ["x"] * 6408, {})
    assert (data["bin"] == 1) == (width == 1)
    decoder = re.search(r'<script id="decoder">(.*?)</script>', page(data), re.DOTALL)[1]
    code = decoder + """
    const D = JSON.parse(require("fs").readFileSync(0)), counts = f => countsOf(D, D.heads.map(f)).map(r => Array.from(r));
    console.log(JSON.stringify({all: counts(() => true), one: counts((_, h) => h === 4)}));"""
    done = subprocess.run(["node", "-e", code], input=json.dumps(data), capture_output=True, text=True, check=True)
    got, size = json.loads(done.stdout), n_bins(6408, data["bin"])
    for m, sets in enumerate(sets_of(data)):
        assert got["all"][m] == np.bincount(np.concatenate(sets), minlength=size).tolist()
        assert got["one"][m] == np.bincount(sets[4], minlength=size).tolist()


@needs_node
def test_the_page_ranks_sentences_as_the_program_does():
    share, ranges = np.random.default_rng(SEED).random(400).round(3), [(i, i + 4 + i % 23) for i in range(0, 370, 13)]
    decoder = re.search(r'<script id="decoder">(.*?)</script>', page({}), re.DOTALL)[1]
    code = decoder + """
    const [D, shares] = JSON.parse(require("fs").readFileSync(0));
    console.log(JSON.stringify(readMost(D, b => shares[b]).map(([k, share]) => [k, share])));"""
    given = json.dumps([{"sentences": ranges, "bin": 1}, share.tolist()])
    done = subprocess.run(["node", "-e", code], input=given, capture_output=True, text=True, check=True)
    assert [(k, round(s, 4)) for k, s in json.loads(done.stdout)] == read_most(share, ranges)


# ---- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT + NASTY, encoding="utf-8")
    return path


def test_the_page_has_every_token_of_what_run_generates(cli, tiny, document, tmp_path):
    done = cli("view", tiny, "-f", document, "-p", "Why?", "-n", 40, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"view.html\n" and sorted(p.name for p in tmp_path.iterdir()) == ["document.txt", "view.html"]
    data = data_of((tmp_path / "view.html").read_text(encoding="utf-8"))
    run = json.loads(cli("run", tiny, "-f", document, "-p", "Why?", "-n", 40, "--mode", "sfi", "--json", *SMALL).stdout)
    assert data["n_prompt"] == run["n_prompt"] and len(data["kind"]) == run["n_generated"] > 20
    answer = "".join(data["pieces"][run["n_prompt"]:])
    answer = answer.replace("<|im_start|>", "").replace("<|endoftext|>", "")
    assert data["question"] == "Why?" and len(data["sentences"]) >= 12 and 1 <= len(data["read_most"]) <= 5
    assert answer == run["text"] and NASTY in "".join(data["pieces"])
    assert data["pieces"][0] == "<|im_start|>" and len(data["pieces"]) == run["n_prompt"] + run["n_generated"]
    assert {k: data["kind"].count(k) for k in ("slow", "fast")} == {k: run["steps"][k] for k in ("slow", "fast")}
    assert data["kind"][0] == "prefill" and data["kind"].count("fast") > 15 and "max_span" in data["reason"]
    assert {len(data[name]) for name in ("reason", "ms", "depth", "n_cells", "recent_from", "chosen", "measured")} == {len(data["kind"])}


@pytest.mark.parametrize("support", ["frozen", "sketch", "oracle"])
def test_the_numbers_of_the_page_are_those_of_the_hook(tiny, native, support):
    """The hook is asked again, step by step, in a second generation of the same tokens."""
    from sfi_local import load
    from sfi_local.params import SfiParams
    from sfi_local.runtime.sampling import Sampling

    params = SfiParams.of(support, n_recent=32, n_selected=40, max_span=6)
    with load(tiny, mode="sfi", params=params) as model:
        def generate():
            return model.generate([*TEXT.encode()], n=20, sampling=Sampling(temp=0))

        collector = None
        for item in generate():
            collector = collector or Collector.of(model.session, len(TEXT))
            collector.add(item)
        data = page_data(collector, ["x"] * (len(TEXT) + 20), {})
        sets, numbers = sets_of(data), numbers_of(data)
        assert data["bin"] == 1 and min(data["n_choices"], data["n_measures"]) >= 3 and len(data["heads"]) == 8
        model.close_session()
        n_fast = 0
        for i, item in enumerate(generate()):
            assert item.kind == data["kind"][i]
            c, m = data["chosen"][i], data["measured"][i]
            if item.kind == "fast":
                n_fast += 1
                mean = sum(map(len, sets[c])) / 8  # rounded in n_cells
                assert abs(4 + item.depth - data["recent_from"][i] + mean - item.n_cells) <= .5
            elif support != "frozen":
                assert c == -1
                continue
            for k, (il, head) in enumerate(data["heads"]):
                assert sets[c][k].tolist() == sorted(model.session.engine.selected(il, head)[1])
                hook = hook_of(model.session.engine, support, il, head)
                said = dict(zip(NUMBERS, numbers[m, k].tolist()))
                assert {name: said[name] for name in hook} == pytest.approx(hook, abs=1e-6, nan_ok=True)
        assert n_fast > 10


def hook_of(engine, support: str, il: int, head: int) -> dict:
    """What the hook says of one KV head, by the names of NUMBERS."""
    if support == "frozen":
        stability = engine.stability(il, head)
        return {**vars(stability), "overlap": stability.jaccard}
    n_selected = len(engine.selected(il, head)[1])
    if support == "oracle":
        return {"n_selected": n_selected}
    tails = [engine.tail(il, h) for h in (2 * head, 2 * head + 1)]  # two query heads per KV head
    return {"n_selected": n_selected, "tail_mass": sum(t.mass for t in tails) / 2,
            "logit_error": sum(t.logit_error for t in tails) / 2}


def test_the_picture_is_a_png_of_the_same_numbers(cli, tiny, document, tmp_path):
    pytest.importorskip("matplotlib")
    done = cli("view", tiny, "-f", document, "-n", 20, "--html", "a.html", "--png", "a.png", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"a.html\na.png\n" and (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from sfi_local.view.png import colours, shares, stability

    collector = collect(Hook(3), 6, lambda i: i == 3)
    data = page_data(collector, ["x"] * 6406, {"model": "$x$"})
    share = shares(data, collector)
    for m, sets in enumerate(sets_of(data)):
        assert np.array_equal(share[m] * 6, np.bincount(np.concatenate(sets), minlength=6406))
    assert stability(collector.measures)["evidence"] == pytest.approx(numbers_of(data)[:, :, NUMBERS.index("evidence")].mean(axis=1))
    assert colours(data, collector).shape == (6, 1200, 3)


def test_without_matplotlib_a_sentence_before_any_work(cli, tiny, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    code = "import sys; sys.path.insert(0, '.'); from sfi_local.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "view", str(tiny), "-p", "x", "--png", "x.png"], cwd=tmp_path,
                          env=cli_env(), capture_output=True, stdin=subprocess.DEVNULL)
    assert "pip install 'sfi-local[plot]'" in sentence(done)
    assert not (tmp_path / "view.html").exists()


@pytest.mark.parametrize("options, word, code", [
    (("--html", "."), "directory", 1), (("--html", "none/x.html"), "cannot be written", 1), (("--png", "x.jpg"), ".png", 2),
    (("--png", "x.png", "--html", "x.png"), "two names", 2), (("-n", 0), "-n 0", 2)])
def test_paths_that_cannot_be(cli, tiny, tmp_path, options, word, code):
    assert word in sentence(cli("view", tiny, "-p", "x", *options), code)
    assert list(tmp_path.iterdir()) == []


def test_dense_steps_choose_nothing_and_the_page_says_so(cli, tiny, tmp_path):
    for mode in ("dense", "stock"):
        done = cli("view", tiny, "-p", "Hello", "-n", 5, "--mode", mode, "-t", 1)
        assert done.returncode == 0 and b"No step was fast" in done.stderr
        data = data_of((tmp_path / "view.html").read_text(encoding="utf-8"))
        assert data["n_choices"] == 0 and set(data["chosen"]) == {-1} and set(data["kind"][1:]) <= {mode}


def test_a_policy_that_chooses_nothing_has_a_page_too(cli, tiny, document, tmp_path):
    pytest.importorskip("matplotlib")
    done = cli("view", tiny, "-f", document, "-n", 20, *SMALL, "--set", "policy=window", "--png", "w.png")
    assert done.returncode == 0 and b"No step was fast" not in done.stderr, done.stderr
    data = data_of((tmp_path / "view.html").read_text(encoding="utf-8"))
    assert data["n_choices"] == 0 and data["kind"].count("fast") > 10
    for i in (i for i, kind in enumerate(data["kind"]) if kind == "fast"):
        assert data["depth"][i] - data["recent_from"][i] + 4 == data["n_cells"][i]


@pytest.mark.parametrize("phase, returncode", [("decode", 130), ("write", 130), ("fail", 1)])
def test_nothing_is_left_of_a_view_that_did_not_end(tiny, tmp_path, phase, returncode):
    """Ctrl-C falls into a step, or while the file is written; or the disk is full. What was there before stays."""
    hit = "import signal; hit = lambda *a: signal.raise_signal(signal.SIGINT)\n"
    hook = {
        "decode": hit + "import sfi_local.runtime.slot as s; old = s.Slot.step; s.Slot.step = lambda *a: (hit(), old(*a))[1]",
        "write": hit + "import pathlib as p; old = p.Path.write_text; p.Path.write_text = lambda *a, **k: (old(*a, **k), hit())",
        "fail": "import pathlib as p\ndef full(*a, **k): raise OSError(28, 'No space left on device')\np.Path.write_text = full",
    }[phase]
    (tmp_path / "view.html").write_text("before")
    code = f"import sys\n{hook}\nfrom sfi_local.cli.main import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "view", str(tiny), "-p", "Hello", "-n", "20", *map(str, SMALL)], cwd=tmp_path,
                          env=cli_env(), capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == returncode and b"Traceback" not in done.stderr and done.stdout == b""
    assert [p.name for p in tmp_path.iterdir()] == ["view.html"] and (tmp_path / "view.html").read_text() == "before"

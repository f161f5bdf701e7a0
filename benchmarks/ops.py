"""The scan of the sketch alone: what a decoded token costs in all layers, and how near it is to reading the codes.

    python benchmarks/ops.py --shape smollm2 -t 2
    python benchmarks/ops.py --shape qwen3-0.6b -t 2

Every layer has codes of its own, so that they come from memory as they do in use. Results are compared with the reference
of tests/ before anything is timed. `wall` is the median over the repetitions; `cpu` is the processor time of all threads,
over their number: on a busy machine the better estimate.
"""

import argparse
import ctypes
import sys
import threading
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "ops")]

import test_sketch_ops as ops  # noqa: E402
from support import ggml_ops  # noqa: E402
from support import reference as ref  # noqa: E402

SHAPES = {  # n_list, n_head, n_head_kv, n_embd, layers of the model, layers that fit the memory of this program
    "smollm2": (8000, 9, 3, 64, 30, 30),
    "qwen3-0.6b": (131072, 16, 8, 128, 28, 7),
}
ggml_ops.MEM_SIZE = 1536 << 20


class Layers:
    """A graph context with the inputs of some layers."""

    def __init__(self, g, shape, form, n_selected, least, second_look):
        self.n_list, self.n_head, self.n_head_kv, self.n_embd, self.n_model, self.n = SHAPES[shape]
        self.g, self.form, self.n_selected, self.second_look = g, form, n_selected, second_look
        rng = np.random.default_rng(ops.SEED)
        self.bases = ops.draw_bases(rng, form, self.n_head_kv, self.n_embd, self.n_embd)
        self.codes = ops.draw_codes(rng, form, self.n_head_kv, self.n_list // 16)
        self.q = rng.normal(size=(self.n_head, self.n_embd)).astype(np.float32)
        self.skip = np.arange(68, dtype=np.int32)
        self.scale = 2 / self.n_embd
        self.t_least = g.tensor(np.full(self.n_head_kv, least)) if least > 0 else None
        self.basis = g.tensor(ops.flat(self.bases))
        self.t_codes = [g.tensor(self.codes) for _ in range(self.n)]
        self.t_q, self.t_skip, self.t_plan = g.tensor(self.q), g.tensor(self.skip), g.tensor(np.array([self.n_list]))

    def scan(self, i):
        """(tail, selected, counts) of a layer"""
        selected = self.g.new("i32", self.n_selected, self.n_head_kv)
        counts = self.g.new("i32", 2, self.n_head_kv)
        return self.g.sketch_scan(self.t_q, self.t_codes[i], self.basis, self.t_skip, self.t_plan, self.t_least, selected, counts,
                                  self.n_list, self.n_embd, self.form, self.scale, 0.0, self.second_look), selected, counts

    def check(self, tail, selected):
        """The outermost heads against the reference."""
        for h in (0, self.n_head - 1):
            h_kv = h * self.n_head_kv // self.n_head
            basis, codes = ops.in_double(self.bases[h_kv]), self.codes[h_kv]
            group = range(h_kv * self.n_head // self.n_head_kv, (h_kv + 1) * self.n_head // self.n_head_kv)
            logits = [[ref.sketch_logits(self.form, basis, codes, self.q[i].astype(float), self.skip, self.n_list, self.n_list, self.scale,
                                         first=first) for i in group] for first in (True, False)]
            first, x = np.array(logits[0]), logits[1][h - group[0]]
            looked = ref.sketch_looked(first, self.second_look, self.n_list)
            x[~looked], others = -np.inf, ref.log_sum_exp(first[h - group[0]][~looked])
            expected = ref.sketch_tail(self.form, basis, codes, x, selected[h_kv][selected[h_kv] >= 0], others)
            np.testing.assert_allclose(tail[h], expected, rtol=0, atol=2e-3)


def graph_of(g, outs):
    graph = g.lib.ggml_new_graph(g.ctx)
    for out in outs:
        g.lib.ggml_build_forward_expand(graph, out)
    return graph


def timed(g, graph, n_reps, n_threads):
    """(wall, cpu / n_threads) in seconds, medians"""
    g.lib.set_n_threads(g.lib.cpu, n_threads)
    rows = []
    for _ in range(n_reps):
        wall, cpu = time.perf_counter(), time.process_time()
        assert g.lib.ggml_backend_graph_compute(g.lib.cpu, graph) == 0
        rows.append((time.perf_counter() - wall, (time.process_time() - cpu) / n_threads))
    return np.median(rows[1:], axis=0)


def read_bandwidth(n_threads, n_bytes=320 << 20):
    """Bytes per second that threads read: each looks for a byte that its part of a buffer does not have."""
    buffer = np.full(n_bytes, 2, np.uint8)
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes, libc.memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = n_bytes // n_threads

    def read(i):
        assert libc.memchr(buffer.ctypes.data + i * part, 1, part) is None

    best = 0
    for _ in range(5):
        threads = [threading.Thread(target=read, args=(i,)) for i in range(n_threads)]
        start = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        best = max(best, n_bytes / (time.perf_counter() - start))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--form", default="8,48,0,0,16,2", help="n_k4,n_k2,n_k1,n_v4,n_v2,n_first")
    parser.add_argument("--second-look", type=float, default=1.5, help="of random codes, which fall less steeply than real ones")
    parser.add_argument("-k", "--n-selected", type=int, default=1024)
    parser.add_argument("--least", type=float, default=0.0008, help="least share of a selected cell (0: the best n)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--reps", type=int, default=9)
    args = parser.parse_args()
    form = ref.SketchFormat(*map(int, args.form.split(",")))

    with ggml_ops.Graph() as g:
        a = Layers(g, args.shape, form, args.n_selected, args.least, args.second_look)
        scans = [a.scan(i) for i in range(a.n)]
        tail, selected = g.compute(scans[0][0], args.threads)[0, 0], g.read(scans[0][1])[0, 0]
        a.check(tail, selected)
        bandwidth = read_bandwidth(args.threads)
        print(f"{args.shape}: {a.n_list} cells, {a.n_head_kv} KV heads, {a.n_head} query heads, form {args.form}, "
              f"{np.mean(selected >= 0) * a.n_selected:.0f} selected, {args.threads} threads, reading {bandwidth / 1e9:.1f} GB/s"
              f", {100 * np.mean(g.read(scans[0][2])[..., 1]) / a.n_list:.0f} % looked at again")
        wall, cpu = timed(g, graph_of(g, [scan[0] for scan in scans]), args.reps, args.threads)
        cells = a.n_list * a.n_head_kv * a.n
        gbps = form.cell_bytes * cells / wall / 1e9
        print(f"scan  wall {wall / a.n * a.n_model * 1e3:7.2f} ms/token  cpu {cpu / a.n * a.n_model * 1e3:7.2f}  "
              f"{wall / cells * 1e9:6.3f} ns/cell (cpu {cpu / cells * 1e9:6.3f})  codes {gbps:5.1f} GB/s, "
              f"{100 * gbps * 1e9 / bandwidth:3.0f} %")


if __name__ == "__main__":
    main()

"""The specification of sfi-local's operations: numpy, float64, no cleverness. Fast kernels are judged only against it.

Arrays are indexed the way C nests loops, so a ggml tensor [ne0, ne1, ne2, ne3] is an array [ne3, ne2, ne1, ne0].

    q         [n_stream, n_head,    n_tokens, n_embd_k]
    k         [n_stream, n_head_kv, n_cells,  n_embd_k]      n_head % n_head_kv == 0
    v         [n_stream, n_head_kv, n_cells,  n_embd_v]
    always    [n_stream, n_tokens | 1, n_always]             cells; an entry outside [0, n_cells) is a pad
    selected  [n_stream, n_tokens | 1, n_head_kv, n_selected]
    tail      [n_stream, n_tokens, n_head, n_embd_v + 1]     normalised output of other cells, then their log-sum-exp
    sinks     [n_head]                                       learned logits without a value
    result    [n_stream, n_tokens, n_head, n_embd_v]

Where an order is not promised (a support, a selection) the reference scrambles it, so that nobody comes to rely on it.
"""

from typing import NamedTuple

import numpy as np

EPS = 1e-8  # of the paper's selector
PAD = -1

# ---- storage types: what a kernel reads when it reads a row of K or V ---------------------------------------------


def dequantise(kind, rows):
    """uint8 [..., n_bytes] -> float64 [..., n_values], for rows stored as f32, f16, bf16, q8_0 or q4_0."""
    rows = np.ascontiguousarray(rows)
    if kind == "f32":
        return rows.view(np.float32).astype(np.float64)
    if kind == "f16":
        return rows.view(np.float16).astype(np.float64)
    if kind == "bf16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    block_bytes = {"q8_0": 2 + 32, "q4_0": 2 + 16}[kind]  # a float16 scale, then 32 small integers
    blocks = rows.reshape(*rows.shape[:-1], -1, block_bytes)  # [..., n_blocks, block_bytes]
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)  # [..., n_blocks, 1]
    if kind == "q8_0":
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    else:  # low halves are values 0..15, high halves values 16..31
        values = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.int8) - 8
    return (scale * values).reshape(*rows.shape[:-1], -1)


# ---- attention ------------------------------------------------------------------------------------------------------


def logits(q, k, scale, logit_softcap=0.0):
    """q [n_embd_k], k [n, n_embd_k] -> [n]"""
    x = scale * (k @ q)
    return logit_softcap * np.tanh(x / logit_softcap) if logit_softcap > 0 else x


def attend(q, k, v, scale, logit_softcap=0.0, tail=None, sink=None):
    """One query over the n cells it is given: q [n_embd_k], k [n, n_embd_k], v [n, n_embd_v] -> [n_embd_v].

    Nothing to attend to gives zeros.
    """
    # pass 1: the logit of every cell, and the largest of all logits so that no exp overflows
    x = logits(q, k, scale, logit_softcap)  # [n]
    top = np.max(x, initial=-np.inf)
    if tail is not None:
        top = max(top, tail[-1])
    if sink is not None:
        top = max(top, sink)
    if top == -np.inf:
        return np.zeros(v.shape[1])

    # pass 2: weights, not normalised yet
    w = np.exp(x - top)  # [n]
    out, total = w @ v, w.sum()

    # pass 3: the tail counts as the cells it stands for, the sink takes weight and gives nothing
    if tail is not None:
        w_tail = np.exp(tail[-1] - top)
        out, total = out + w_tail * tail[:-1], total + w_tail
    if sink is not None:
        total += np.exp(sink - top)

    # pass 4: normalise
    return out / total


def tail_of(q, k, v, scale, logit_softcap=0.0):
    """The exact tail row that stands for the given cells: [n_embd_v + 1]. No cells: zeros and -inf."""
    x = logits(q, k, scale, logit_softcap)
    if x.size == 0:
        return np.append(np.zeros(v.shape[1]), -np.inf)
    return np.append(attend(q, k, v, scale, logit_softcap), x.max() + np.log(np.exp(x - x.max()).sum()))


def sparse_attn(q, k, v, always, selected, scale, logit_softcap=0.0, tail=None, sinks=None):
    """Attention of each query over its support -> [n_stream, n_tokens, n_head, n_embd_v]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    n_stream, n_head, n_tokens, _ = q.shape
    _, n_head_kv, n_cells, n_embd_v = v.shape
    group = n_head // n_head_kv  # GQA: query heads h*group ... h*group + group-1 share KV head h

    out = np.zeros((n_stream, n_tokens, n_head, n_embd_v))
    for s in range(n_stream):
        for t in range(n_tokens):
            for h in range(n_head):
                cells = support_of(always, selected, s, t, h // group, n_cells)
                out[s, t, h] = attend(
                    q[s, h, t], k[s, h // group, cells], v[s, h // group, cells], scale, logit_softcap,
                    None if tail is None else np.asarray(tail[s, t, h], np.float64),
                    None if sinks is None else float(sinks[h]))
    return out


def support_of(always, selected, s, t, h_kv, n_cells):
    """The cells that KV head h_kv attends to for token t of stream s: both lists without their pads.

    Lists made for one token serve all of them.
    """
    parts = []
    if always is not None:
        parts.append(always[s, t if always.shape[1] > 1 else 0])
    if selected is not None:
        parts.append(selected[s, t if selected.shape[1] > 1 else 0, h_kv])
    cells = np.concatenate(parts) if parts else np.zeros(0)
    cells = cells.astype(np.int64)
    return cells[(cells >= 0) & (cells < n_cells)]


def dense_attn(q, k, v, scale, logit_softcap=0.0, sinks=None, visible=None):
    """Attention over every cell, or over visible [n_tokens, n_cells]: what a slow step computes."""
    n_stream, _, n_tokens, _ = q.shape
    n_cells = k.shape[2]
    seen = np.ones((n_tokens, n_cells), bool) if visible is None else visible
    always = np.where(seen, np.arange(n_cells), PAD)
    return sparse_attn(q, k, v, np.broadcast_to(always, (n_stream, n_tokens, n_cells)), None, scale, logit_softcap,
                       sinks=sinks)


# ---- support ------------------------------------------------------------------------------------------------------


def candidates(n_list, n_sink, n_recent):
    """(j0, j1) of the cells a selector may rank: all cells of the sequence minus sink minus recent."""
    j0 = min(n_sink, n_list)
    return j0, max(j0, n_list - n_recent)


def support(cells, n_sink, n_recent, selected, seed=0):
    """sink + recent + selected, each cell once, in no order. cells: those of one sequence in position order."""
    j0, j1 = candidates(len(cells), n_sink, n_recent)
    chosen = [c for c in selected if c >= 0]
    return scramble(np.unique(np.concatenate([cells[:j0], cells[j1:], chosen]).astype(np.int32)), seed)


def scramble(cells, seed):
    return np.random.default_rng(seed).permutation(cells)


# ---- evidence -----------------------------------------------------------------------------------------------------

VISIBLE, CANDIDATES = 0, 1  # what the softmax runs over


def evidence(q, k, cells, j0, j1, n_visible, scale, logit_softcap=0.0, alpha=1.0, over=VISIBLE):
    """How much attention a few queries pay to each candidate -> [n_head_kv, n_list], zero outside [j0, j1).

    q [n_queries, n_head, n_embd_k], k [n_head_kv, n_cells, n_embd_k], cells [n_list] in position order, -1 is a pad.
    Query i sees cells[0 .. n_visible[i]); 0 means it is not used. A row is a query of a head of the group.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    n_head, n_head_kv, n_list = q.shape[1], k.shape[0], len(cells)
    group = n_head // n_head_kv
    place = np.arange(n_list)
    is_cell = cells >= 0
    is_candidate = is_cell & (place >= j0) & (place < j1)

    out = np.zeros((n_head_kv, n_list))
    for h_kv in range(n_head_kv):
        n_rows = 0
        for i in range(len(q)):
            if n_visible[i] == 0:
                continue
            seen = is_cell & (place < n_visible[i])  # [n_list]
            if over == CANDIDATES:
                seen &= is_candidate
            for h in range(h_kv * group, (h_kv + 1) * group):
                n_rows += 1
                p = np.zeros(n_list)
                if seen.any():
                    x = logits(q[i, h], k[h_kv, cells[seen]], scale, logit_softcap)
                    w = np.exp(x - x.max())
                    p[seen] = w / w.sum()
                out[h_kv] += np.where(is_candidate, p**alpha, 0.0)
        out[h_kv] /= max(n_rows, 1)
    return out


# ---- selection ----------------------------------------------------------------------------------------------------


def windowed_max(x, before, after):
    """y[j] = max of x[j - before .. j + after], the window cut at both ends."""
    return np.array([x[max(0, j - before):j + after + 1].max() for j in range(len(x))])


def pool(evidence, j0, j1, pool_after, pool_before):
    """An important cell also brings the pool_after cells after it and the pool_before before it.

    evidence [n_head_kv, n_list] -> score [n_head_kv, j1 - j0]
    """
    e = np.asarray(evidence, np.float64)[:, j0:j1]
    return np.array([windowed_max(row, before=pool_after, after=pool_before) for row in e]).reshape(e.shape)


def take_best(score, cells, n_selected, seed=0):
    """The n_selected best cells of each head -> [n_head_kv, n_selected], padded with -1, in no order.

    score [n_head_kv, n] for cells [n] in position order. Equal scores: the earlier position wins. Pads are never chosen.
    """
    out = np.full((len(score), n_selected), PAD, np.int32)
    for h, z in enumerate(score):
        ranked = np.argsort(-z, kind="stable")  # best first, ties in position order
        best = cells[ranked][cells[ranked] >= 0][:n_selected]
        out[h, :len(best)] = best
        out[h] = scramble(out[h], seed + h)
    return out


def select_topk(evidence, cells, j0, j1, n_selected, pool_after=0, pool_before=0, seed=0):
    """top-K of the pooled evidence -> [n_head_kv, n_selected]"""
    return take_best(pool(evidence, j0, j1, pool_after, pool_before), cells[j0:j1], n_selected, seed)


def select_paper(evidence, cells, j0, j1, k, n_selected, seed=0, **params):
    """The selector of arXiv 2603.12038 -> [n_head_kv, n_selected]"""
    return take_best(paper_score(evidence, cells, j0, j1, k, **params), cells[j0:j1], n_selected, seed)


def paper_score(evidence, cells, j0, j1, k, *, alpha, gamma, beta, p, eta, lambda_clip, nms_radius, a_soft, a_cross,
                temperature):
    """Score of every candidate, [n_head_kv, n] with n = j1 - j0.

    evidence [n_head_kv, n_list] made with the same alpha, k [n_head_kv, n_cells, n_embd_k].
    A pad keeps its place in the ranks but has neither evidence nor prior.
    """
    m = np.asarray(evidence, np.float64)[:, j0:j1]  # [n_head_kv, n]
    n_head_kv, n = m.shape
    if n == 0:
        return m
    is_cell = cells[j0:j1] >= 0
    m = np.where(is_cell, m, 0.0)
    norm = np.linalg.norm(np.asarray(k, np.float64)[:, np.where(is_cell, cells[j0:j1], 0)], axis=-1)  # [n_head_kv, n]

    z = np.zeros((n_head_kv, n))
    for h in range(n_head_kv):
        # pass 1: evidence, as a distribution
        f = power_mean(m[h], alpha)
        # pass 2: prior from the keys' norms and the age
        r = prior(norm[h], is_cell, gamma, beta, p, eta)
        # pass 3: fusion
        weight = prior_weight(f, r, lambda_clip)
        s = (1 - weight) * f + weight * r
        # pass 4: log score, and a step down for whoever stands beside somebody better
        z[h] = np.log(s + EPS)
        z[h] -= a_soft * np.maximum(0.0, windowed_max(z[h], nms_radius, nms_radius) - z[h])

    # pass 5: KV heads compete for cells
    if n_head_kv > 2:
        z = z + a_cross * log_softmax(z / temperature, axis=0)
    return z


def power_mean(m, alpha):
    """f(j) = m(j)^(1/alpha) / sum. m: means of p^alpha over the rows. No evidence at all stays 0."""
    f = m ** (1 / alpha)
    return f / f.sum() if f.sum() > 0 else f


def prior(norm, is_cell, gamma, beta, p, eta):
    """r(j) proportional to (|k_j| + eps)^-gamma exp(-beta u^p) (1 - u + eps)^eta, u = rank in [0, 1]; sums to 1."""
    n = len(norm)
    u = np.arange(n) / (n - 1) if n > 1 else np.zeros(n)
    r = np.where(is_cell, (norm + EPS) ** -gamma * np.exp(-beta * u**p) * (1 - u + EPS) ** eta, 0.0)
    return r / r.sum() if r.sum() > 0 else r


def prior_weight(f, r, lambda_clip):
    """lambda = clip((|f|^2 - f.r) / (|f|^2 - 2 f.r + |r|^2), 0, lambda_clip); 0 where f and r agree."""
    denominator = f @ f - 2 * (f @ r) + r @ r
    return float(np.clip((f @ f - f @ r) / denominator, 0.0, lambda_clip)) if denominator > 0 else 0.0


def log_softmax(x, axis):
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


# ---- support stability --------------------------------------------------------------------------------------------


def stability(evidence, cells, j0, j1, selected, previous):
    """[n_head_kv, 4] = evidence on all candidates, on selected, on previous, jaccard(selected, previous).

    evidence [n_head_kv, n_list]; selected and previous [n_head_kv, n_selected] with pads. A cell of `previous` that is
    no candidate any more holds no evidence, but it counts in the jaccard. Two empty sets have jaccard 1.
    """
    out = np.zeros((len(evidence), 4))
    for h, row in enumerate(np.asarray(evidence, np.float64)):
        mass = {int(c): e for c, e in zip(cells[j0:j1], row[j0:j1]) if c >= 0}
        now, before = ({int(c) for c in x[h] if c >= 0} for x in (selected, previous))
        out[h, 0] = sum(mass.values())
        out[h, 1] = sum(mass.get(c, 0.0) for c in now)
        out[h, 2] = sum(mass.get(c, 0.0) for c in before)
        out[h, 3] = len(now & before) / len(now | before) if now | before else 1.0
    return out


# ---- the sketch ---------------------------------------------------------------------------------------------------
#
# A row x of K (or V) becomes a few small integers, code_j = clamp(round(enc_j . (x - mean) + centre_j), 0, 2^bits_j - 1),
# and stands for x' = mean + sum_j (code_j - centre_j) dec_j, with centre_j = (2^bits_j - 1) / 2.
#
#     codes  uint8 [n_head_kv, n_blocks, 16 * cell_bytes]
#     basis  one Basis per KV head


class SketchFormat(NamedTuple):
    """How many components of K have 4, 2 and 1 bits, and of V 4 and 2; planes of K of the first look."""
    n_k4: int
    n_k2: int
    n_k1: int
    n_v4: int
    n_v2: int
    n_first: int

    @property
    def bits_k(self):
        return np.repeat([4, 2, 1], [self.n_k4, self.n_k2, self.n_k1])

    @property
    def bits_v(self):
        return np.repeat([4, 2], [self.n_v4, self.n_v2])

    @property
    def cell_bytes(self):
        return int(self.bits_k.sum() + self.bits_v.sum()) // 8

    @property
    def n_k_first(self):
        """Components of K of the first look."""
        planes = np.repeat(self.bits_k[::4].cumsum() - 1, 4) // 8
        return int((planes < self.n_first).sum())


def one_look(n_k4, n_k2, n_k1, n_v4, n_v2):
    """A format whose first look is at all of K."""
    return SketchFormat(n_k4, n_k2, n_k1, n_v4, n_v2, (4 * n_k4 + 2 * n_k2 + n_k1) // 32)


class Basis(NamedTuple):
    """mean [n_embd], enc and dec [n, n_embd], of K and of V."""
    mean_k: np.ndarray
    enc_k: np.ndarray
    dec_k: np.ndarray
    mean_v: np.ndarray
    enc_v: np.ndarray
    dec_v: np.ndarray

    def flat(self):
        """As the operations take it: dec in F16, two values in the place of one."""
        parts = [part.astype(np.float16).view(np.float32) if part is self.dec_k or part is self.dec_v else part for part in self]
        return np.concatenate([part.ravel() for part in parts])


CELLS, PLANE = 16, 64  # cells of a block, bytes of a plane of K: four for each cell


def place_k(form, j, cell, n_blocks):
    """(byte of the KV head's codes, lowest bit) of component j of K. Every four components take bits of the cell's four
    bytes, from the lowest upwards; when those are full, the next plane follows."""
    bits_before = int(form.bits_k[:j - j % 4:4].sum())  # in each of the four bytes
    plane, bit = bits_before // 8, bits_before % 8
    if plane >= form.n_first:
        return record(form, cell, n_blocks) + 4 * (plane - form.n_first) + j % 4, bit
    return PLANE * form.n_first * (cell // CELLS) + PLANE * plane + 4 * (cell % CELLS) + j % 4, bit


def place_v(form, j, cell, n_blocks):
    """The same for component j of V: in the record, one after the other."""
    at, planes_k = int(form.bits_v[:j].sum()), int(form.bits_k.sum()) // 32
    return record(form, cell, n_blocks) + 4 * (planes_k - form.n_first) + at // 8, at % 8


def record(form, cell, n_blocks):
    """Where the record of a cell begins: behind the first planes of all blocks."""
    return PLANE * form.n_first * n_blocks + (form.cell_bytes - 4 * form.n_first) * cell


def unpack(form, codes):
    """codes uint8 [n_blocks, 16 * cell_bytes] -> of K int [n_cells, n_k], of V int [n_cells, n_v]"""
    cells, flat = np.arange(CELLS * len(codes)), codes.ravel()
    parts = []
    for bits, place in ((form.bits_k, place_k), (form.bits_v, place_v)):
        part = np.zeros((len(cells), len(bits)), np.int64)
        for j, b in enumerate(bits):
            byte, bit = place(form, j, cells, len(codes))
            part[:, j] = flat[byte] >> bit & 2**b - 1
        parts.append(part)
    return parts


def pack(form, codes, cells, of_k, of_v):
    """A copy of codes [n_blocks, 16 * cell_bytes] in which the given cells have the codes [n, n_k] and [n, n_v]."""
    flat = codes.ravel().copy()
    for values, bits, place in ((of_k, form.bits_k, place_k), (of_v, form.bits_v, place_v)):
        for j, b in enumerate(bits):
            for cell, value in zip(cells, values[:, j]):
                byte, bit = place(form, j, int(cell), len(codes))
                flat[byte] = flat[byte] & ~((2**b - 1) << bit) & 255 | int(value) << bit
    return flat.reshape(codes.shape)


def unrounded(x, mean, enc, bits):
    """x [n, n_embd] -> [n, n_components]: codes before they are rounded and clamped."""
    return (x - mean) @ enc.T + (2**bits - 1) / 2


def sketch_encode(form, basis, codes, k, v, cells):
    """One KV head: codes with those of some cells written. k [n_cells, n_embd_k], v [n_cells, n_embd_v]"""
    cells = cells[(cells >= 0) & (cells < len(k))]
    of_k = np.clip(np.round(unrounded(k[cells], basis.mean_k, basis.enc_k, form.bits_k)), 0, 2**form.bits_k - 1)
    of_v = np.clip(np.round(unrounded(v[cells], basis.mean_v, basis.enc_v, form.bits_v)), 0, 2**form.bits_v - 1)
    return pack(form, codes, cells, of_k, of_v)


def decode(code, mean, dec, bits):
    """code [n, n_components] -> [n, n_embd]"""
    return mean + (code - (2**bits - 1) / 2) @ dec


def sketch_weights(q, dec):
    """The projection of a query, [n_k], in 8 bits: (integers -127 .. 127, what one of them is worth)"""
    w = dec @ q
    s = np.abs(w).max() / 127
    return (np.round(w / s) if s > 0 else np.zeros(len(w))), s


def sketch_logits(form, basis, codes, q, skip, n_used, n_list, scale, logit_softcap=0.0, first=False):
    """One query of a head: the logits of the cells 0 .. n_list - 1, from the codes of its KV head; first: of the first look.
    A query whose projection is not finite has none: all are -inf."""
    of_k, _ = unpack(form, codes)
    if not np.isfinite(np.append(basis.dec_k @ q, q @ basis.mean_k)).all():
        return np.full(n_list, -np.inf)
    w, s = sketch_weights(q, basis.dec_k)
    n_k = form.n_k_first if first else len(w)
    x = scale * (q @ basis.mean_k + s * ((of_k[:n_list] - (2**form.bits_k - 1) / 2) @ np.where(np.arange(len(w)) < n_k, w, 0)))
    if logit_softcap > 0:
        x = logit_softcap * np.tanh(x / logit_softcap)
    x[n_used:] = -np.inf
    x[[c for c in skip if 0 <= c < n_list]] = -np.inf
    return x


def log_sum_exp(x):
    top = x.max(initial=-np.inf)
    return top + np.log(np.exp(x - top).sum()) if top > -np.inf else -np.inf


def sketch_score(x, others=()):
    """Logits of the heads of a group [group, n_list] -> the log of a cell's mean softmax, [n_list]

    others: of each head the log-sum-exp of the logits of cells that are not in x, but that the softmax is over as well
    """
    p = np.array([row - lse for row, lse in zip(np.asarray(x, np.float64), _all_cells(x, others))])
    return np.array([log_sum_exp(column) for column in p.T]) - np.log(len(p))


def sketch_share(x, others=()):
    """The same, but the largest softmax of each cell among the heads of the group, [n_list]"""
    return np.max([np.exp(row - lse) for row, lse in zip(np.asarray(x, np.float64), _all_cells(x, others))], axis=0)


def _all_cells(x, others):
    """Log-sum-exps of a group; 0 where there is no cell, whose logits then are -inf."""
    lse = [np.logaddexp(log_sum_exp(np.asarray(row, np.float64)), other) for row, other in zip(x, others or [-np.inf] * len(x))]
    return [t if t > -np.inf else 0.0 for t in lse]


def sketch_select(x, n_selected, least=None, seed=0):
    """Logits [n_head_kv, group, n_list] -> [n_head_kv, n_selected]: the cells of the best scores, padded, in no order.

    least [n_head_kv]: cells whose share is smaller in every head of the group are not selected
    """
    out = np.full((len(x), n_selected), PAD, np.int32)
    for h, of_head in enumerate(x):
        score = sketch_score(of_head)
        if least is not None:
            score[sketch_share(of_head) < least[h]] = -np.inf
        best = np.argsort(-score, kind="stable")[:min(n_selected, np.isfinite(score).sum())]
        out[h, :len(best)] = best
        out[h] = scramble(out[h], seed + h)
    return out


def sketch_looked(x, second_look, n_used):
    """Logits of the first look [group, n_list] -> whether a cell is looked at again, [n_list]"""
    return (sketch_share(x) >= second_look / np.clip(n_used, 1, 8192)) & np.isfinite(x).any(axis=0)


def sketch_tail(form, basis, codes, x, selected, others=-np.inf):
    """One head: [n_embd_v + 1], from its logits [n_list] and its KV head's codes and selected cells.

    others: log-sum-exp of the logits of cells that are not in x; the more they weigh, the more their V is that of the basis' mean
    instead of the others'
    """
    _, of_v = unpack(form, codes)
    rest = np.isfinite(x)
    rest[selected[selected >= 0]] = False
    v = decode(of_v[:len(x)], basis.mean_v, basis.dec_v, form.bits_v)
    of_rest = log_sum_exp(x[rest])
    lse = np.logaddexp(of_rest, others)
    if not rest.any() and others == -np.inf:
        return np.concatenate([np.zeros(v.shape[1]), [lse]])
    mean = np.exp(x[rest] - of_rest) @ v[rest] if rest.any() else basis.mean_v
    return np.concatenate([basis.mean_v + (1 - np.exp(others - lse)**2) * (mean - basis.mean_v), [lse]])

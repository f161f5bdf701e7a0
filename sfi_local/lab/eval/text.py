"""Fidelity: how far the next-token distributions of a row are from dense's, on a text that is given token by token.

Everything is decoded: one step per token through Slot.step, as in a run. The text up to a depth is prefilled once per
KV type, and every row starts from that state.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterator, Sequence

from sfi_local.cli.progress import Quiet
from sfi_local.lab import checks
from sfi_local.lab.eval.greedy import Greedy, Output, compare_greedy, decode_greedy
from sfi_local.lab.eval.rows import DENSE, Plan, Row, Spent, plan
from sfi_local.lab.trunk import Sessions, SwitchSession
from sfi_local.params import SfiParams
from sfi_local.runtime.slot import Schedule
from sfi_local.store import layout


@dataclass
class TextScore:
    """A row at a depth; the lists have an entry per step.

    kl:        divergence of the row from dense, sum of p_dense (log p_dense - log p_row); nats
    same_top:  whether both find the same token most likely
    delta_nll: -log p of the text's own next token, row minus dense; nats, one entry less where the text ends
    kv_read_share: bytes of K, V (and sketch) read, over those of dense steps in the run's KV type
    kv_bytes:  bytes of them per step
    """

    row: Row
    params: SfiParams
    depth: int
    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    delta_nll: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    kv_read_share: float = 1.0
    kv_bytes: float = 0.0
    greedy: Greedy | None = None

    @property
    def spent(self) -> Spent:
        return Spent(len(self.kinds), self.kinds.count("slow"), self.depth + len(self.kinds) / 2, self.kv_read_share)


def measure(model: Any, depths: Sequence[int], n: int, rows: Sequence[Row], params: SfiParams, tokens: Sequence[int],
            kv_type: str = "f16", n_greedy: int = 0, bar: Any = None) -> list[TextScore]:
    """Every row at every depth, in that order; contexts of its own are made on the weights of ``model`` and freed.

    depths:   ascending; n: steps of the text; n_greedy: steps of dense's own output that are compared as well
    params:   of the run; what a row changes is applied to them
    tokens:   the text, at least depths[-1] + n of them
    bar:      has say, advance, filling as progress.Bar
    Raises CheckError where a row did other steps than it stands for, and what SwitchSession raises.
    """
    n_ctx, bar = depths[-1] + max(n, n_greedy), bar or Quiet()
    found: list[TextScore] = []
    with Sessions(model, n_ctx, params, kv_type) as sessions:
        for depth in depths:
            bar.say(f"{kv_type} @ {depth}: dense")
            exact = plan(DENSE, params, n, n_ctx, {}).params
            session = sessions.at(kv_type, exact, tokens[:depth], bar.filling)
            dense = _Dense(model, session, exact, tokens[depth:depth + n + 1], n, n_greedy)
            spent: dict[str, Spent] = {}
            for row in rows:
                bar.say(f"{kv_type} @ {depth}: {row.name}")
                planned = plan(row, params, n, n_ctx, spent)
                session = sessions.at(row.kv_type, planned.params, tokens[:depth], bar.filling)
                one = dense.compare(session, row, planned)
                check(one)
                spent[row.name] = one.spent
                found.append(one)
                bar.advance()
    return found


class _Dense:
    """Dense's log-probabilities at every step, float32 [n, n_vocab], and its own output."""

    def __init__(self, model: Any, session: SwitchSession, params: SfiParams, text: Sequence[int], n: int, n_greedy: int):
        import numpy as np

        self.text, self.targets = list(text[:n]), list(text[1:n + 1])
        self.layers, self.kv_type = layout.layers(model.file), session.kv_type
        session.begin("dense", params)
        self.log_p = np.stack([log_p for _, log_p in steps(session, self.text)])
        self.output: Output | None = None
        if n_greedy:
            session.begin("dense", params)
            self.output = decode_greedy(session, model.vocabulary, n_greedy)

    def compare(self, session: SwitchSession, row: Row, planned: Plan) -> TextScore:
        """A row, from the same state on the same text."""
        one, infos = TextScore(row, planned.params, len(session.trunk)), []
        session.begin(row.mode, planned.params)
        if session.engine:
            session.engine.reset_stats()
        for i, (info, log_q) in enumerate(steps(session, self.text, planned.schedule())):
            log_p = self.log_p[i]
            one.kl.append(divergence(log_p, log_q))
            one.same_top.append(bool(log_p.argmax() == log_q.argmax()))
            if i < len(self.targets):
                one.delta_nll.append(float(log_p[self.targets[i]]) - float(log_q[self.targets[i]]))
            infos.append(info)
        one.kinds = [info.kind for info in infos]
        one.reasons = dict(Counter(info.reason for info in infos if info.reason))
        one.kv_bytes, one.kv_read_share = bytes_read(session, self.layers, [info.depth for info in infos], self.kv_type)
        if self.output:
            session.begin(row.mode, planned.params)
            one.greedy = compare_greedy(session, self.output, planned.schedule())
        return one


def steps(session: SwitchSession, tokens: Sequence[int], schedule: Schedule | None = None) -> Iterator[tuple[Any, Any]]:
    """(StepInfo, log-probabilities of the next token, float32 [n_vocab]) of every token."""
    for token in tokens:
        info = session.step(token, schedule)
        yield info, log_softmax(session.last_logits())


def bytes_read(session: SwitchSession, layers: list, at: list[int], kv_type: str) -> tuple[float, float]:
    """(bytes per step, share of dense's) that the steps since reset_stats read of the cache.

    at: depth of each step; kv_type: of the dense steps that are the measure. The library counts in mode sfi and dense;
    a stock step reads every cell. The oracle's search is not counted: its row is the limit of what could be chosen.
    """
    dense, mine = (sum(layout.kv_bytes(layers, depth, kind, kind) for depth in at) for kind in (kv_type, session.kv_type))
    share = session.engine.stats().kv_read_share if session.engine else 1.0
    if session.engine and session.mode.always_fast and session.params.policy == "oracle":
        share = chosen_share(session, at)
    return share * mine / len(at), share * mine / dense


def chosen_share(session: SwitchSession, at: list[int]) -> float:
    """Bytes of the cells that steps of policy oracle attended to, over those of dense steps."""
    cell = sum(layer.kv_cell_bytes for layer in session.engine.layers() if layer.sparse)
    spared = cell * sum(depth - min(depth, session.params.budget) for depth in at)
    return 1 - spared / session.engine.stats().kv_dense


def log_softmax(logits: Any) -> Any:
    """float32 [n_vocab], computed in float64."""
    import numpy as np

    x = logits.astype(np.float64)
    x -= x.max()
    return (x - np.log(np.exp(x).sum())).astype(np.float32)


def divergence(log_p: Any, log_q: Any) -> float:
    """KL(p||q) in nats; 0.0 for equal distributions."""
    import numpy as np

    p = log_p.astype(np.float64)
    return max(0.0, float((np.exp(p) * (p - log_q)).sum()))  # the sum may round below 0


def check(one: TextScore) -> None:
    """Raise CheckError where a row did not do what it stands for."""
    if not one.row.decodes.fast:
        checks.only(one, *one.row.decodes.kinds)
    elif one.row.decodes.always_fast:
        checks.sparse(one.row.name, one.kinds)
    if one.row.is_yardstick:
        checks.same_again(one.row.name, max(one.kl))

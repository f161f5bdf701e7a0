"""The rows of an evaluation: each has a name, a mode, and what differs from the parameters asked for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sfi_local.errors import UsageError
from sfi_local.fields import kinds, meant, parse
from sfi_local.params import SfiParams
from sfi_local.runtime.draft_length import MAX_DRAFTS
from sfi_local.runtime.modes import MODES, Mode, mode_of
from sfi_local.runtime.slot import Schedule
from sfi_local.store.layout import KV_TYPES

ORACLE_BUDGETS = (32, 128, 512)  # cells selected, of the oracle's rows

# everything that the paper gives, whatever the defaults are
PAPER = {"policy": "frozen", "selector": "paper", "n_sink": 4, "n_recent": 256, "n_selected": 2048, "n_queries": 1, "pool_after": 0,
         "pool_before": 0, "boundary": True, "min_span": 16, "max_span": 64}


@dataclass(frozen=True)
class Row:
    """What is measured beside dense.

    changes:    fields of SfiParams that differ from the run's; with ``support`` among them, from that policy's defaults
    kv_type:    of its own context; None: the run's
    slow_every: every n-th step is slow instead of the schedule; steps
    draft:      mode ``exact``: tokens drafted per span; None: as many as pay
    same, like: ``bytes`` or ``refreshes`` are to be those of the earlier row ``like``
    fit:        a budget larger than the context is made smaller instead of refused
    """

    name: str
    mode: str
    changes: dict[str, Any] = field(default_factory=dict)
    kv_type: str | None = None
    slow_every: int | None = None
    draft: int | None = None
    same: str = ""
    like: str = ""
    fit: bool = True

    @property
    def decodes(self) -> Mode:
        return mode_of(self.mode)

    @property
    def is_yardstick(self) -> bool:
        """Dense in the run's own KV type: what every other row is compared with."""
        return self.mode == "dense" and self.kv_type is None and self.changes.get("prefill", "exact") == "exact"


@dataclass(frozen=True)
class Spent:
    """What a row took: steps in all, slow ones, mean depth in cells, bytes of K and V read over those of dense steps."""

    n: int
    n_slow: int
    depth: float
    kv_read_share: float


DENSE = Row("dense", "dense")


def mode_rows(modes: tuple[str, ...], fit: bool) -> list[Row]:
    """A row per mode, named for it."""
    return [Row(mode, mode, fit=fit) for mode in modes]


def read_rows(params: SfiParams) -> list[Row]:
    """Where the run reads its text otherwise: what that alone loses, in dense decoding."""
    return [] if not params.reading else [Row(f"dense, {params.prefill} prefill", "dense", {"prefill": params.prefill})]


def reference_rows(modes: tuple[str, ...], kv_type: str, params: SfiParams) -> list[Row]:
    """What the run's parameters are judged against."""
    rows = [] if "stock" in modes else [Row("stock", "stock")]
    rows += [Row(policy, "sfi", {"policy": policy}) for policy in ("sketch", "frozen")
             if "sfi" not in modes or params != SfiParams.of(policy)]
    rows += [
        Row("paper", "sfi", PAPER),
        Row("paper, fixed period", "sfi", PAPER, same="refreshes", like="paper"),
        Row("sink + recent", "sfi", {"policy": "window"}, same="bytes", like="sfi" if "sfi" in modes else "sketch"),
    ]
    rows += [Row(f"oracle {n}", "sfi", {"policy": "oracle", "n_selected": n}) for n in ORACLE_BUDGETS]
    return rows + [Row(kind, "dense", kv_type=kind) for kind in ("q8_0", "q4_0") if KV_TYPES[kind] < KV_TYPES[kv_type]]


def unique(rows: list[Row]) -> list[Row]:
    """The rows with dense first. Raises UsageError where two have one name."""
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"There are two rows named {name!r}: give each --row another name.")
    return sorted(rows, key=lambda row: not row.is_yardstick)


@dataclass(frozen=True)
class Plan:
    """What a row is measured with; n_slow: slow steps of n, evenly spread; None: the library's schedule decides."""

    params: SfiParams
    n: int
    n_slow: int | None = None

    def schedule(self) -> Schedule | None:
        """A new schedule, for one decoding."""
        return None if self.n_slow is None else spread(self.n, self.n_slow)


def plan(row: Row, base: SfiParams, n: int, n_ctx: int, spent: dict[str, Spent]) -> Plan:
    """The plan of n steps of a row; base: the run's parameters, spent: what the rows before it took. Raises ArgumentError."""
    params, n_slow = settings(row, base), None
    if row.same == "bytes":
        params = window_of(params, n, spent[row.like])
    elif row.same == "refreshes":
        n_slow = spent[row.like].n_slow
    elif row.slow_every:
        n_slow = n // row.slow_every
    if n_slow is not None:
        params = params.replace(max_span=max(params.max_span, n))
    if row.fit or not row.decodes.fast:
        params = params.fit_context(n_ctx)
    else:
        params.check_context(n_ctx)
    return Plan(params.validate(), n, n_slow)


def spread(n: int, n_slow: int) -> Schedule:
    """A schedule of n steps of which n_slow, evenly spread, are slow; the last of each period is."""
    count = iter(range(1, 1 << 62))

    def kind(*_: Any) -> str:
        i = next(count)
        return "slow" if i * n_slow // n > (i - 1) * n_slow // n else "fast"
    return kind


def settings(row: Row, base: SfiParams) -> SfiParams:
    """The parameters of a row that is like no other. Mode ``exact`` takes the depth of the rule, as in a run, not a measured one; the
    yardstick, and llama.cpp's own decoding, read the text exactly."""
    if row.is_yardstick or not row.decodes.attaches:
        base = base.replace(prefill="exact")
    if row.decodes.verifies:
        base = base.replace(auto_depth=0)
    if "policy" not in row.changes:
        return base.replace(**row.changes)
    unused = {"n_selected": 1} if row.changes["policy"] == "window" else {}  # so that the budget is what is read
    return SfiParams.of(**{"auto_depth": base.auto_depth, **unused, **row.changes})


def window_of(params: SfiParams, n: int, spent: Spent) -> SfiParams:
    """A sliding window that reads in n steps as many bytes as another row did, none of them in slow steps."""
    n_recent = max(1, round(spent.kv_read_share * spent.depth) - params.n_sink)
    return params.replace(boundary=False, max_span=n + 1, n_recent=n_recent)


# ---- rows that are typed ---------------------------------------------------------------------------------------------

_COUNTS = ("slow_every", "draft")
_OWN = {"mode": str, "kv_type": str, **dict.fromkeys(_COUNTS, int)}
_FIELDS = {**_OWN, **kinds(SfiParams)}


def parse_row(text: str) -> Row:
    """The row of ``NAME:FIELD=VALUE,...``, e.g. ``small:n_selected=128,n_recent=64``. Raises UsageError, ArgumentError."""
    name, colon, fields_given = text.partition(":")
    if not name.strip() or not colon:
        raise UsageError(f"--row {text}: write NAME:FIELD=VALUE,..., e.g. --row small:n_selected=128,n_recent=64.")
    given = parse(fields_given, _FIELDS, f"--row {name}")
    own = {key: given.pop(key) for key in _OWN if key in given}
    for key in _COUNTS:
        if own.get(key, 1) < 1:
            raise UsageError(f"--row {name}: {key} is {own[key]}: give at least 1.")
    mode = own.get("mode", "sfi")
    _one_of(name, "mode", mode, MODES)
    if "kv_type" in own:
        _one_of(name, "kv_type", own["kv_type"], KV_TYPES)
    _check_exact(name, mode, own)
    settings(Row(name, mode, given), SfiParams()).validate()
    budget = any(key in given for key in ("n_sink", "n_recent", "n_selected"))
    return Row(name.strip(), mode, given, own.get("kv_type"), own.get("slow_every"), own.get("draft"), fit=not budget)


def _check_exact(name: str, mode: str, own: dict[str, Any]) -> None:
    """Refuse what mode exact does not have, and what no other mode has."""
    verifies = mode_of(mode).verifies
    if verifies and "kv_type" in own:
        raise UsageError(f"--row {name}: mode exact is compared with dense in the run's own KV type: take --kv-type for both.")
    if verifies and "slow_every" in own:
        raise UsageError(f"--row {name}: in mode exact every step is a draft or a verification: leave slow_every out.")
    if "draft" in own and (not verifies or own["draft"] > MAX_DRAFTS):
        raise UsageError(f"--row {name}: draft is of mode exact, from 1 to {MAX_DRAFTS}: add mode=exact, or leave it out.")


def _one_of(name: str, key: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"--row {name}: there is no {key} {value!r}:{meant(value, choices)} There are {', '.join(choices)}.")

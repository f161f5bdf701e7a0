"""The rows of an evaluation: what a reference stands for, rows that are like another, and rows that are typed."""

import pytest

from sfi_local import SfiParams
from sfi_local.errors import ArgumentError, UsageError
from sfi_local.lab.eval.rows import Row, Spent, mode_rows, parse_row, plan, reference_rows, spread, unique

BASE = SfiParams()


def kinds(schedule, n):
    return [schedule(i, 0, "fast", "") for i in range(n)]


@pytest.mark.parametrize("n, n_slow", [(20, 0), (20, 1), (20, 7), (20, 20), (64, 9)])
def test_a_fixed_period_has_as_many_refreshes_evenly_spread(n, n_slow):
    found = kinds(spread(n, n_slow), n)
    slow = [i for i, kind in enumerate(found) if kind == "slow"]
    gaps = [b - a for a, b in zip([-1, *slow], slow)]
    assert len(slow) == n_slow and (not gaps or max(gaps) - min(gaps) <= 1)


def test_each_schedule_of_a_plan_begins_anew():
    planned = plan(Row("x", "sfi", slow_every=5), BASE, 20, 4096, {})
    assert kinds(planned.schedule(), 20) == kinds(planned.schedule(), 20) == (["fast"] * 4 + ["slow"]) * 4
    assert plan(Row("x", "sfi"), BASE, 20, 4096, {}).schedule() is None


@pytest.mark.parametrize("spent", [Spent(200, 9, 6500.0, 0.40), Spent(200, 0, 6500.0, 0.09), Spent(512, 3, 3000.0, 0.6)])
def test_a_window_of_the_same_bytes_reads_as_many(spent):
    params = plan(Row("x", "sfi", {"policy": "window"}, same="bytes", like="y"), BASE, spent.n, 8192, {"y": spent}).params
    assert (params.policy, params.boundary) == ("window", False) and params.max_span > spent.n
    assert params.n_sink + params.n_recent == pytest.approx(spent.kv_read_share * spent.depth, rel=0.01)


def test_references_stand_for_the_same_whatever_was_asked():
    other = SfiParams(n_sink=1, n_recent=20, n_selected=30, max_span=5)
    rows = {row.name: row for row in reference_rows(("dense", "sfi"), "f16", other)}
    assert {"stock", "sketch", "frozen", "paper", "paper, fixed period", "sink + recent", "q8_0", "q4_0"} <= set(rows)
    params = plan(rows["paper"], other, 10, 8192, {}).params
    assert (params.selector, params.n_selected, params.n_recent, params.n_queries) == ("paper", 2048, 256, 1)
    assert (params.boundary, params.min_span, params.max_span) == (True, 16, 64)
    assert plan(rows["frozen"], other, 10, 8192, {}).params == SfiParams.of("frozen")
    assert {plan(row, other, 10, 8192, {}).params.policy for name, row in rows.items() if name.startswith("oracle ")} == {"oracle"}


def test_no_reference_is_measured_twice():
    default = {row.name for row in reference_rows(("stock", "sfi"), "q8_0", SfiParams())}
    assert not {"stock", "sketch", "q8_0"} & default and {"frozen", "q4_0"} <= default


def test_what_a_row_is_like_was_measured_before_it():
    for modes in (("dense", "sfi"), ("dense",), ("dense", "stock", "sfi")):
        rows = unique(mode_rows(modes, True) + reference_rows(modes, "f16", BASE))
        names = [row.name for row in rows]
        assert rows[0].is_yardstick and all(row.like in names[:i] for i, row in enumerate(rows) if row.like)


def test_a_typed_row():
    row = parse_row("small: n_selected=128, policy=window, boundary=off, alpha=0.25, kv_type=q8_0, slow_every=6")
    assert (row.name, row.mode, row.kv_type, row.slow_every, row.fit) == ("small", "sfi", "q8_0", 6, False)
    assert row.changes == {"n_selected": 128, "policy": "window", "boundary": False, "alpha": 0.25}
    assert parse_row("all:mode=dense").mode == "dense"
    assert parse_row("x:mode=exact,draft=8").draft == 8


def test_mode_exact_has_the_depth_of_the_rule_unless_it_is_typed():
    measured = BASE.replace(auto_depth=700)
    depth = lambda text: plan(parse_row(text), measured, 10, 4096, {}).params.auto_depth
    assert [depth(text) for text in ("x:mode=auto", "x:mode=exact", "x:mode=exact,auto_depth=5")] == [700, 0, 5]


@pytest.mark.parametrize("text, said", [
    ("small", "NAME:FIELD=VALUE"), (":n_selected=3", "NAME:FIELD=VALUE"), ("x:n_select=3", "did you mean n_selected?"),
    ("x:n_selected=many", "a whole number"), ("x:n_selected", "a whole number"), ("x:alpha=a", "a number"),
    ("x:boundary=maybe", "on or off"), ("x:mode=dens", "did you mean dense?"), ("x:kv_type=q8", "did you mean q8_0?"),
    ("x:slow_every=0", "slow_every"), ("x:draft=4", "mode=exact"), ("x:mode=exact,draft=33", "1 to 32"),
    ("x:mode=exact,slow_every=3", "leave slow_every out"), ("x:mode=exact,kv_type=q8_0", "--kv-type"), ("x:policy=windo", "window"),
    ("x:n_recent=0", "n_recent")])
def test_a_row_that_cannot_be_is_a_sentence(text, said):
    with pytest.raises((UsageError, ArgumentError), match=said.replace("?", r"\?")):
        parse_row(text)


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(UsageError, match="two rows named 'sfi'"):
        unique([*mode_rows(("dense", "sfi"), True), parse_row("sfi:n_selected=9")])


def test_a_typed_budget_is_refused_where_it_does_not_fit_and_the_default_adapts():
    with pytest.raises(ArgumentError, match="larger than the context"):
        plan(parse_row("x:n_selected=5000"), BASE, 10, 4096, {})
    assert plan(parse_row("x:policy=frozen"), BASE, 10, 1000, {}).params.budget == 1000


def test_a_row_with_a_policy_begins_with_its_defaults():
    assert plan(parse_row("x:policy=frozen,n_selected=9"), BASE, 10, 4096, {}).params == SfiParams.of("frozen", n_selected=9)
    assert plan(parse_row("x:policy=window,n_recent=900"), BASE, 10, 1000, {}).params.budget == 905
    assert plan(parse_row("x:n_selected=9"), SfiParams.of("frozen"), 10, 4096, {}).params == SfiParams.of("frozen", n_selected=9)

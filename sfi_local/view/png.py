"""The picture of `sfi-local view`: the same numbers as the page, the mean over all layers and KV heads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sfi_local.view.data import NUMBERS, Collector

SLOW, CHOSEN, ALWAYS, OVERLAP, READ = "#b45309", "#0f766e", "#ddd7ee", "#5b4b9a", "#1a56db"
N_COLUMNS = 1200  # of the map; more positions than that share a column


def draw(data: dict[str, Any], collector: Collector, path: Path) -> None:
    """Write a PNG: above, what each token read of the text; below, how stable the choice is."""
    from matplotlib.figure import Figure

    n, n_positions = len(data["kind"]), len(data["pieces"])
    figure = Figure(figsize=(11, 7.5))
    figure.subplots_adjust(left=.07, right=.98, top=.95, bottom=.13, hspace=.42)
    above, below = figure.subplots(2, 1, height_ratios=(2.4, 1))
    above.imshow(colours(data, collector), aspect="auto", interpolation="nearest", extent=(0, n_positions, n + .5, .5))
    slow = [i + 1 for i, kind in enumerate(data["kind"]) if kind == "slow"]
    if slow:
        above.plot([0] * len(slow), slow, linestyle="", marker=">", color=SLOW, clip_on=False, label="slow step: everything was read")
    above.axvline(data["n_prompt"], color="black", linewidth=.8, label="the answer begins")
    for colour, label in ((CHOSEN, "chosen places; darker: by more heads"), (ALWAYS, "always read: beginning and latest text")):
        above.plot([], [], linestyle="", marker="s", markersize=9, color=colour, label=label)
    above.set(xlabel="position in the text, in tokens", ylabel="token of the answer", title=_title(data))
    above.legend(loc="upper center", bbox_to_anchor=(.5, -.11), ncols=4, frameon=False, fontsize=9, columnspacing=1.4,
                 handletextpad=.6)
    _stability(below, collector)
    figure.savefig(path, format="png", dpi=150)


def _title(data: dict[str, Any]) -> str:
    kinds = ", ".join(f"{data['kind'].count(kind)} {kind}" for kind in ("slow", "fast", "dense", "stock") if kind in data["kind"])
    name = data["model"].replace("$", r"\$")  # not a formula
    return f"What {name} read of {data['n_prompt']} tokens of text: {kinds} steps"


def _stability(axes: Any, collector: Collector) -> None:
    """Mass, overlap and tail against the token whose step brought them, each where it was measured anew."""
    means = stability(collector.measures)
    steps = [collector.measured.index(m) for m in range(len(collector.measures))]
    slow = [collector.steps[i].kind != "fast" for i in steps]
    anew = [collector.chosen.index(collector.chosen[i]) == i for i in steps]
    for values, drawn, colour, dash, label in (
        (means["mass"], slow, CHOSEN, "-", "mass: attention on older text that the new choice holds"),
        (means["mass_prev"], slow, CHOSEN, "--", "the same, had the choice before been kept"),
        ([1 - x for x in means["tail_mass"]], [True] * len(steps), READ, "-", "attention of a fast step on what it read"),
        (means["overlap"], anew, OVERLAP, "-", "jaccard: overlap with the choice before"),
    ):
        points = [(i + 1, y) for i, y, d in zip(steps, values, drawn) if d and y == y]
        if points:
            axes.plot(*zip(*points), color=colour, linestyle=dash, marker="o" if len(points) <= 60 else "", markersize=4, label=label)
    axes.set(xlim=(.5, len(collector.steps) + .5), ylim=(0, 1.05), xlabel="token of the answer", ylabel="share")
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(.5, -.26), ncols=2, frameon=False, fontsize=9)


def stability(measures: list[np.ndarray]) -> dict[str, list[float]]:
    """Per measure the mean over all heads of each of NUMBERS; NaN where no head has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        return {name: [float(np.nanmean(numbers[:, i])) for numbers in measures] for i, name in enumerate(NUMBERS)}


def shares(data: dict[str, Any], collector: Collector) -> np.ndarray:
    """Share of the heads that hold each position, per choice: float [n_choices, n_positions]."""
    n_positions = len(data["pieces"])
    counts = [np.bincount(np.concatenate(sets), minlength=n_positions) for sets in collector.choices]
    return np.array(counts, dtype=float).reshape(-1, n_positions) / max(1, len(data["heads"]))


def colours(data: dict[str, Any], collector: Collector) -> np.ndarray:
    """The map: uint8 [n_tokens, n_columns, 3]; always read below, chosen over it."""
    share, n_positions = shares(data, collector), len(data["pieces"])
    edges = np.linspace(0, n_positions, min(N_COLUMNS, n_positions) + 1).astype(int)[:-1]
    width = np.diff([*edges, n_positions])
    position, rows = np.arange(n_positions), []
    for depth, recent_from, c in zip(data["depth"], data["recent_from"], data["chosen"]):
        always = (position < depth) & ((position < data["n_sink"]) | (position >= recent_from))
        chosen = share[c] if c >= 0 else np.zeros(n_positions)
        rows.append(_blend(*(np.add.reduceat(x.astype(float), edges) / width for x in (always, chosen / max(1e-9, share.max(initial=0))))))
    return np.array(rows)


def _blend(always: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    ground = np.ones(3) + always[:, None] * (np.array(to_rgb(ALWAYS)) - 1)
    return (255 * (ground + (chosen ** .7)[:, None] * (np.array(to_rgb(CHOSEN)) - ground))).astype(np.uint8)

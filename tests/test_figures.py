"""The figures: what they show, of any table, and that they are whole."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import llama3_circuit_tracing as tracing
from by_hand import Effects, results, steps
from conftest import finish

CONFIG = tracing.Config(num_bootstrap=100)
SUMMARY, HEATMAP, CONFIRM = (f"circuit_{name}.png" for name in ("summary", "heatmap", "confirm"))


def check_png(path: Path) -> None:
    """A PNG of 300 dots per inch, of a size to print, with something drawn in it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
        assert 900 <= image.width <= 9000
        assert 500 <= image.height <= 9000
        darkest, lightest = image.convert("L").getextrema()
    assert darkest < 100 < lightest


def check_whole(figure: Any) -> None:
    """Nothing is cut off, and no label hides its neighbour."""
    inked, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(inked.x0, inked.y0, width - inked.x1, height - inked.y1) > -0.02, inked
    for axes in figure.axes:
        labels = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(labels))


@pytest.fixture()
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved, by file name."""
    figures: dict[str, Any] = {}
    save = tracing.save_figure

    def keep(figure: Any, path: Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(tracing, "save_figure", keep)
    return figures


def heads_of(effects: Effects, base: float = -2.0, floor: float = math.nan) -> pd.DataFrame:
    table = results(effects, base)
    return tracing.heads_table(table, tracing.base_statistics(table, CONFIG), floor, CONFIG)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--layers 1", {SUMMARY}),
        ("--layers 0 --confirm 1 --num_random 1", {SUMMARY, CONFIRM}),
        ("--layers 0,2 --given L0H0 --heatmap", {SUMMARY, HEATMAP}),
        ("--kind mlp --heatmap", {SUMMARY, HEATMAP}),
        ("--kind neuron --neurons 0-3 --layers 1 --heatmap", {SUMMARY, HEATMAP}),
    ],
)
def test_a_run_draws_the_figures_that_are_asked_for(
    flags: str, names: set[str], llama: str, tmp_path: Path
) -> None:
    finish(llama, tmp_path, "--num_samples", "2", *flags.split())
    assert {path.name for path in tmp_path.glob("*.png")} == names
    for name in names:
        check_png(tmp_path / name)


# ----- any table

EVERY_HEAD = {f"L{n}H{h}": steps(n - h / 2) for n in range(3) for h in range(4)}
ALL_BUT_GIVEN = {label: moved for label, moved in EVERY_HEAD.items() if label != "L1H2"}
GRIDS: dict[str, Effects] = {
    "all heads": EVERY_HEAD,
    "without a given one": ALL_BUT_GIVEN,
    "one layer of many": {f"L2H{h}": steps(h) for h in range(32)},
    "one head": {"L2H3": steps(1)},
    "no mean": {"L0H0": [0.1, -0.1], "L0H1": [-0.1, 0.1]},
    "nothing": {f"L{n}H{h}": [0.0] * 8 for n in range(2) for h in range(2)},
    "MLPs": {f"L{n}mlp": steps(n - 1) for n in range(4)},
    "one residual stream": {"L1resid": steps(-1)},
    "neurons": {f"L{n}N{i}": steps(i - n) for n in range(2) for i in (3, 5, 70)},
}


@pytest.mark.parametrize(("floor", "top_k"), [(0.1, 1), (1e6, 20), (math.nan, 32)])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_figures_of_any_table_are_whole(
    grid: str, floor: float, top_k: int, tmp_path: Path, saved: dict[str, Any]
) -> None:
    heads = heads_of(GRIDS[grid], floor=floor)
    tracing.draw_summary(heads, tracing.Config(top_k=top_k), tmp_path / SUMMARY)
    tracing.draw_heatmap(heads, tmp_path / HEATMAP)
    for name, figure in saved.items():
        check_png(tmp_path / name)
        check_whole(figure)
    assert len(saved[SUMMARY].axes[0].patches) == min(top_k, len(heads))
    for mesh in saved[HEATMAP].axes[0].collections:
        assert mesh.norm.vmin == -mesh.norm.vmax < 0


# ----- the bars of the strongest


@pytest.mark.parametrize(
    ("form", "kind", "axis"),
    [("L3H{}", "head", "head"), ("L3N{}", "neuron", "neuron"), ("L{}mlp", "mlp", "layer")],
)
def test_the_summary_shows_the_top_k_mean_effects_by_magnitude(
    form: str, kind: str, axis: str, tmp_path: Path, saved: dict[str, Any]
) -> None:
    moved = (0.1, -0.6, 0.3, 0.0, -0.2)
    heads = heads_of({form.format(i): [by, by + 0.02] for i, by in enumerate(moved)})
    tracing.draw_summary(heads, tracing.Config(top_k=3), tmp_path / SUMMARY)
    (axes,) = saved[SUMMARY].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([-0.59, 0.31, -0.19])
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == [form.format(i) for i in (1, 2, 4)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (axis, "mean_head_effect")
    assert axes.get_title() == f"Top 3 {kind} effects on delta_logit"


# ----- joint ablation


def joint_table(chosen: dict[int, float], drawn: dict[int, list[float]]) -> pd.DataFrame:
    rows = [("held-out", "none", 0, 0, -0.61)]
    rows += [("held-out", "chosen", 0, n, delta) for n, delta in chosen.items()]
    rows += [("held-out", "random", i, n, d) for n, ds in drawn.items() for i, d in enumerate(ds)]
    rows += [("all", "none", 0, 0, 5.0), ("all", "ablate", 0, 3, 7.0)]
    return pd.DataFrame(rows, columns=["samples", "set", "draw", "n_ablated", "mean_delta"])


def test_the_joint_figure_shows_the_chosen_the_random_band_and_the_base(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    deltas = {1: [-0.6 - 0.02 * i for i in range(21)], 3: [-0.5 + 0.01 * i for i in range(21)]}
    table = joint_table({1: -0.4, 3: 0.1}, deltas)
    tracing.draw_confirm(table.sample(frac=1, random_state=0), CONFIG, tmp_path / CONFIRM)
    (axes,) = saved[CONFIRM].axes
    lines = {line.get_label(): line for line in axes.lines}
    chosen = lines["chosen on the other half"]
    assert list(chosen.get_xdata()) == [1, 3]
    assert list(chosen.get_ydata()) == [-0.4, 0.1]
    assert set(lines["nothing ablated"].get_ydata()) == {-0.61}
    (band,) = axes.collections
    corners = {(x, round(float(y), 9)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, -0.98), (1, -0.62), (3, -0.49), (3, -0.31)}  # 5 and 95 % of 21
    check_png(tmp_path / CONFIRM)
    check_whole(saved[CONFIRM])


def test_the_legend_of_the_joint_figure_hides_no_line(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    """The usual case: the chosen lift the delta to 0, random ones do little or the reverse."""
    chosen = {1: -0.44, 2: -0.1, 4: -0.01, 8: 0.01}
    drawn = {n: [-0.6 - 0.1 * i for i in range(6)] for n in chosen}
    tracing.draw_confirm(joint_table(chosen, drawn), CONFIG, tmp_path / CONFIRM)
    (axes,), (legend,) = saved[CONFIRM].axes, saved[CONFIRM].legends
    for line in axes.lines:
        path = line.get_path().transformed(line.get_transform())
        assert not path.intersects_bbox(legend.get_window_extent(), filled=False), line.get_label()


# ----- heatmap


@pytest.mark.parametrize("base", [-2.0, 2.0])
def test_the_heatmap_shows_the_mean_role_and_greys_what_is_below_the_floor(
    base: float, tmp_path: Path, saved: dict[str, Any]
) -> None:
    tracing.draw_heatmap(heads_of(ALL_BUT_GIVEN, base, floor=0.6), tmp_path / HEATMAP)
    axes, bar = saved[HEATMAP].axes
    (mesh,) = axes.collections
    shown = mesh.get_array().reshape(3, 4)
    for (layer, head), hidden in np.ndenumerate(np.ma.getmaskarray(shown)):
        mean = statistics.fmean(ALL_BUT_GIVEN.get(f"L{layer}H{head}", [math.nan]))
        assert hidden != (abs(mean) > 0.6), (layer, head)
        if not hidden:
            assert shown[layer, head] == pytest.approx(-math.copysign(1, base) * mean)
    assert "> 0" in bar.get_ylabel()
    assert "< 0" in bar.get_ylabel()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_components_without_index_are_drawn_as_one_bar_per_layer(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    tracing.draw_heatmap(heads_of(GRIDS["MLPs"], floor=0.5), tmp_path / HEATMAP)
    (axes,) = saved[HEATMAP].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(
        [-0.965, 0.035, 1.035, 2.035]
    )
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[1] != colors[0] == colors[2] == colors[3]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert "> 0" in axes.get_ylabel()

"""The figures: what they show, of any table, and that they are whole."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

import llama3_circuit_tracing as tracing
from by_hand import Effects, results, steps, with_control
from conftest import finish
from llama3_circuit_tracing import find_bases

SUMMARY, HEADS, HEATMAP, CONFIRM = (
    Path(f"circuit_{name}.png") for name in ("summary", "heads", "heatmap", "confirm")
)
ALWAYS = {SUMMARY, HEADS}
Saved = dict[Path, Any]


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
    """Of a size to print; nothing is cut off, and no label hides its neighbour."""
    inked, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 3 <= width <= 30 and 1.6 <= height <= 30
    assert min(inked.x0, inked.y0, width - inked.x1, height - inked.y1) > -0.02, inked
    for axes in figure.axes:
        labels = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(labels))


@pytest.fixture()
def saved(monkeypatch: pytest.MonkeyPatch) -> Saved:
    """The figures that would be saved, laid out."""
    figures: Saved = {}

    def keep(figure: Any, path: Path) -> None:
        figure.draw_without_rendering()
        figures[path] = figure

    monkeypatch.setattr(tracing, "save_figure", keep)
    return figures


def heads_of(effects: Effects, base: float = -2.0, floor: float = math.nan) -> pd.DataFrame:
    table = results(effects, base)
    return tracing.heads_table(table, find_bases(table), floor, factor=None)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--layers 1", set()),
        ("--kind mlp --heatmap", {HEATMAP}),
        ("--layers 0,2 --given L0H0 --controls --confirm 1 --num_random 1", {CONFIRM}),
    ],
)
def test_a_run_draws_two_figures_and_those_that_are_asked_for(
    flags: str, names: set[Path], llama: str, tmp_path: Path
) -> None:
    finish(llama, tmp_path, "--num_samples", "2", *flags.split())
    assert {*tmp_path.glob("*.png")} == {tmp_path / name for name in ALWAYS | names}
    for path in tmp_path.glob("*.png"):
        check_png(path)


MARKERS = {"o", *tracing.VERDICT_MARKERS.values()}


def points(axes: Any) -> dict[float, float]:
    """By row the mean that is drawn there."""
    drawn = [line for line in axes.lines if line.get_marker() in MARKERS]
    return {y: x for line in drawn for x, y in zip(*line.get_data(), strict=True)}


# ----- any table

EVERY_HEAD = {f"L{n}H{h}": steps(n - h / 2) for n in range(3) for h in range(4)}
ALL_BUT_GIVEN = {label: moved for label, moved in EVERY_HEAD.items() if label != "L1H2"}
MLPS = {f"L{n}mlp": steps(n - 1) for n in range(4)}
NO_MEAN = {"L0H0": [0.1, -0.1], "L0H1": [-0.1, 0.1]}
NEURONS = {f"L{n}N{i}": steps(i - n) for n in range(2) for i in (3, 5, 70)}
GRIDS: dict[str, tuple[Effects, float, int]] = {  # with a noise floor and --top_k
    "all heads": (EVERY_HEAD, 0.1, 20),
    "the strongest": (EVERY_HEAD, 0.1, 1),
    "all below the floor": (EVERY_HEAD, 1e6, 20),
    "without a given one": (ALL_BUT_GIVEN, 0.1, 32),
    "one layer of many": ({f"L2H{h}": steps(h) for h in range(32)}, math.nan, 32),
    "one head": ({"L2H3": steps(1)}, 0.1, 20),
    "one sentence": ({"L0H0": [0.5], "L0H1": [-0.1]}, math.nan, 20),
    "no mean": (NO_MEAN, 0.1, 20),
    "nothing": ({f"L{n}H{h}": [0.0] * 8 for n in range(2) for h in range(2)}, math.nan, 32),
    "MLPs": (MLPS, math.nan, 32),
    "MLPs below the floor": (MLPS, 1e6, 1),
    "one residual stream": ({"L1resid": steps(-1)}, 0.1, 20),
    "neurons": (NEURONS, 0.1, 20),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_figures_of_any_table_are_whole(grid: str, saved: Saved) -> None:
    effects, floor, top_k = GRIDS[grid]
    heads = heads_of(effects, floor=floor)
    tracing.draw_summary(heads, top_k, "", SUMMARY)
    tracing.draw_heads(heads, top_k, "a title\nof two lines", HEADS)
    tracing.draw_heatmap(heads, "", HEATMAP)
    assert len(saved) == 3
    for figure in saved.values():
        check_whole(figure)
    assert len(saved[SUMMARY].axes[0].patches) == min(top_k, len(heads))
    assert len(points(saved[HEADS].axes[0])) == min(top_k, len(heads))
    for mesh in saved[HEATMAP].axes[0].collections:
        assert mesh.norm.vmin == -mesh.norm.vmax < 0


# ----- the bars of the strongest


@pytest.mark.parametrize(
    ("form", "kind", "axis"),
    [("L3H{}", "head", "head"), ("L3N{}", "neuron", "neuron"), ("L{}mlp", "mlp", "layer")],
)
def test_the_summary_shows_the_top_k_mean_effects_by_magnitude(
    form: str, kind: str, axis: str, saved: Saved
) -> None:
    moved = (0.1, -0.6, 0.3, 0.0, -0.2)
    heads = heads_of({form.format(i): [by, by + 0.02] for i, by in enumerate(moved)})
    tracing.draw_summary(heads, 3, "by atp estimates", SUMMARY)
    (axes,) = saved[SUMMARY].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([-0.59, 0.31, -0.19])
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == [form.format(i) for i in (1, 2, 4)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (axis, "mean_head_effect")
    assert axes.get_title() == f"Top 3 {kind} effects on delta_logit\nby atp estimates"


# ----- the strongest with their intervals

OF_VERDICT: Effects = {
    "L0H0": steps(0.5),  # contributes
    "L0H1": steps(-0.8),  # works against
    "L0H2": [0.9, -0.7] * 4,  # varies too much
    "L0H3": steps(0.02),  # below the floor
}
VERDICTS = ["unclear", "unclear", "contributes", "works against"]  # from the bottom
ORDER = ["L0H3", "L0H2", "L0H0", "L0H1"]


def colored(axes: Any) -> dict[int, Any]:
    """By row the color of its point, which is that of its interval."""
    color_of: dict[int, Any] = {}
    for line in axes.lines:
        if line.get_marker() in MARKERS:
            color_of |= dict.fromkeys(map(int, line.get_ydata()), to_rgba(line.get_color()))
    for bars in axes.collections:
        for (_, row), _ in bars.get_segments():
            assert color_of[int(row)] == tuple(bars.get_color()[0])
    return color_of


def intervals(axes: Any) -> dict[int, tuple[float, float]]:
    segments = [segment for bars in axes.collections for segment in bars.get_segments()]
    return {int(row): (low, high) for (low, row), (high, _) in segments}


def drawn_heads(table: pd.DataFrame, top_k: int = 20) -> pd.DataFrame:
    """The findings that are drawn above a floor of 0.1, by label."""
    heads = tracing.heads_table(table, find_bases(table), 0.1, factor=None)
    tracing.draw_heads(heads, top_k, "a title", HEADS)
    return heads.set_index("label")


@pytest.mark.parametrize("top_k", [20, 2])
def test_the_figure_of_heads_shows_the_top_k_means_with_their_intervals(
    top_k: int, saved: Saved
) -> None:
    heads = drawn_heads(results(OF_VERDICT, -2.0), top_k)
    (axes,) = saved[HEADS].axes
    labels, rows = ORDER[-top_k:], range(min(top_k, len(ORDER)))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == labels
    assert points(axes) == dict(zip(rows, heads["mean"][labels], strict=True))
    ends = heads.loc[labels, ["ci_low", "ci_high"]].itertuples(index=False, name=None)
    assert intervals(axes) == dict(zip(rows, ends, strict=True))
    assert axes.get_xlabel() == "nats"
    assert saved[HEADS].get_suptitle() == "a title"


@pytest.mark.parametrize(
    ("flags", "op"),
    [({}, "zero"), ({"op": "scale", "factor": 2.5}, "scale 2.5"), ({"op": "mean"}, "mean")]
    + [({"op": "patch", "patch_into": side}, f"patch into {side}") for side in "ab"],
)
def test_titles_tell_the_whole_op_and_take_any_name_of_a_model(
    flags: dict[str, Any], op: str, saved: Saved, tmp_path: Path
) -> None:
    options = tracing.TraceOptions(model_id="a/x$_$y_{", **flags)
    folder = tracing.RunFolder(tmp_path)
    tracing.draw_effects(heads_of(OF_VERDICT), "8 sentences", options, folder)
    expected = f"suppression, x$_$y_{{, {op}\nmeans, 95 % intervals over 8 sentences"
    assert saved[tmp_path / HEADS].get_suptitle() == expected


def test_the_figure_of_heads_colors_by_verdict_about_a_line_at_zero(saved: Saved) -> None:
    heads = drawn_heads(results(OF_VERDICT, -2.0))
    (axes,), (legend,) = saved[HEADS].axes, saved[HEADS].legends
    assert heads["verdict"][ORDER].tolist() == VERDICTS
    expected = [to_rgba(tracing.VERDICT_COLORS[verdict]) for verdict in VERDICTS]
    assert colored(axes) == dict(enumerate(expected))
    assert len(set(expected)) == 3
    assert {text.get_text() for text in legend.get_texts()} == set(VERDICTS)
    zero = [line for line in axes.lines if list(line.get_xdata()) == [0, 0]]
    assert len(zero) == 1


def test_contrasts_have_a_panel_and_verdicts_of_their_own(saved: Saved) -> None:
    contrast = {**OF_VERDICT, "L0H0": [0.9, -0.7] * 4}
    table = with_control(results(OF_VERDICT, -2.0), "other", contrast, steps(1.0))
    heads = drawn_heads(table)
    left, right = saved[HEADS].axes
    for axes, prefix in ((left, ""), (right, "minus_other_")):
        drawn = heads.loc[ORDER]
        assert points(axes) == dict(enumerate(drawn[f"{prefix}mean"]))
        colors = [to_rgba(tracing.VERDICT_COLORS[verdict]) for verdict in drawn[f"{prefix}verdict"]]
        assert colored(axes) == dict(enumerate(colors))
        assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)
    assert colored(left) != colored(right)
    check_whole(saved[HEADS])


def test_contrasts_that_a_component_lacks_are_no_hindrance(saved: Saved) -> None:
    table = with_control(results(OF_VERDICT, -2.0), "other", OF_VERDICT, steps(1.0))
    lacks = table["head"] == 1
    table["effect_minus_other"] = table["effect_minus_other"].mask(lacks)
    heads = drawn_heads(table)
    left, right = saved[HEADS].axes
    assert len(points(left)) == len(heads) == 4
    assert len(points(right)) == 3


# ----- sets that are edited jointly


def draw(table: pd.DataFrame) -> None:
    tracing.draw_sets(table, "a title", CONFIRM)


HALF = 0.1  # of the intervals of the chosen


def joint_table(
    chosen: dict[int, float],
    drawn: dict[int, list[float]],
    damage: Mapping[int, str] | None = None,
    lent: int = 0,
    interval: float = HALF,
) -> pd.DataFrame:
    """Rows of circuit_confirm.csv; of the last random set of each size some are lent."""

    def row(name: str, n: int, delta: float, half: float = math.nan, **more: Any) -> dict[str, Any]:
        values = {"samples": "held-out", "measure": "a - b", "set": name, "draw": 0, "n_ablated": n}
        values |= {"components": " ".join(f"L0H{i}" for i in range(n)), "lent": 0, "quoted": True}
        values |= {"mean_delta": delta, "ci_low": delta - half, "ci_high": delta + half}
        return values | {"damage": ""} | more

    rows = [row("none", 0, -0.61)]
    for n, d in chosen.items():
        rows.append(row("chosen", n, d, interval, damage=(damage or {}).get(n, "no")))
    rows += [
        row("random", n, d, draw=i, lent=lent * (i == len(deltas) - 1))
        for n, deltas in drawn.items()
        for i, d in enumerate(deltas)
    ]
    return pd.DataFrame(rows)


def joint_lines(figure: Any) -> dict[str, Any]:
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines}


def one_that(begins: str, lines: dict[str, Any]) -> Any:
    (line,) = (line for label, line in lines.items() if label.startswith(begins))
    return line


MANY = {1: [-0.6 - 0.02 * i for i in range(21)], 3: [-0.5 + 0.01 * i for i in range(21)]}


def test_the_joint_figure_shows_the_chosen_every_random_set_their_band_and_the_base(
    saved: Saved,
) -> None:
    draw(joint_table({1: -0.4, 3: 0.1}, MANY))
    (axes,), lines = saved[CONFIRM].axes, joint_lines(saved[CONFIRM])
    chosen, dots = one_that("chosen", lines), one_that("random sets", lines)
    assert list(zip(*chosen.get_data(), strict=True)) == [(1, -0.4), (3, 0.1)]
    every = [(n, delta) for n, deltas in MANY.items() for delta in deltas]
    assert list(zip(*dots.get_data(), strict=True)) == every
    assert set(lines["nothing edited"].get_ydata()) == {-0.61}
    band, bars = axes.collections
    ends = [(x, low, high) for (x, low), (_, high) in bars.get_segments()]
    assert ends == [(1, -0.4 - HALF, -0.4 + HALF), (3, 0.1 - HALF, 0.1 + HALF)]
    corners = {(x, round(float(y), 9)) for ends in band.get_segments() for x, y in ends}
    assert corners == {(1, -0.98), (1, -0.62), (3, -0.49), (3, -0.31)}  # 5 and 95 % of 21
    check_whole(saved[CONFIRM])


@pytest.mark.parametrize("n_sets", [1, tracing.MANY_SETS - 1, tracing.MANY_SETS])
def test_a_band_is_drawn_where_there_are_many_distinct_sets_of_a_size_only(
    n_sets: int, saved: Saved
) -> None:
    few = {1: MANY[1][:n_sets], 3: MANY[3]}
    draw(joint_table({1: -0.4, 3: 0.1}, few))
    band = saved[CONFIRM].axes[0].collections[0]
    sizes = {int(x) for ends in band.get_segments() for x, _ in ends}
    assert sizes == ({1, 3} if n_sets >= tracing.MANY_SETS else {3})


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {1: "not judged"},
        {1: "yes"},
        {1: "yes", 3: "yes"},
        {1: "as random sets", 3: "yes"},
        {1: "as random sets", 3: "not judged"},
    ],
)
def test_damaged_sets_bear_a_red_cross_and_those_as_random_sets_another_mark(
    damage: dict[int, str], saved: Saved
) -> None:
    deltas = {1: -0.4, 3: 0.1}
    draw(joint_table(deltas, MANY, damage))
    lines = saved[CONFIRM].axes[0].lines
    legend = " ".join(text.get_text() for text in saved[CONFIRM].legends[0].get_texts())
    marks = {"yes": ("x", "red", "damaged"), "as random sets": ("+", "tab:orange", "may be")}
    for verdict, (marker, color, word) in marks.items():
        marked = [line for line in lines if line.get_marker() == marker]
        places = {int(n): y for line in marked for n, y in zip(*line.get_data(), strict=True)}
        assert places == {n: deltas[n] for n in damage if damage[n] == verdict}
        assert all(line.get_color() == color for line in marked)
        assert (word in legend) == bool(places)
    assert ("above 0.1 nats" in legend) == bool(marks.keys() & set(damage.values()))


@pytest.mark.parametrize("lent", [0, 2])
def test_the_legend_names_how_many_components_of_random_sets_are_lent(
    lent: int, saved: Saved
) -> None:
    table = joint_table({1: -0.4, 3: 0.1}, MANY, lent=lent)
    draw(table)
    texts = [text.get_text() for text in saved[CONFIRM].legends[0].get_texts()]
    (label,) = (text for text in texts if text.startswith("random sets"))
    assert re.findall(r"\d+", label) == ([str(lent)] if lent else [])


def test_the_axis_names_the_measure(saved: Saved) -> None:
    draw(joint_table({1: -0.4}, MANY).assign(measure="a - other"))
    (axes,) = saved[CONFIRM].axes
    assert "a - other" in axes.get_ylabel()
    assert axes.get_title() == "a title"


SMALL: dict[str, pd.DataFrame] = {
    "one size, one set": joint_table({1: -0.4}, {1: [-0.6]}),
    "one sentence": joint_table({1: -0.4, 2: -0.1}, {1: [-0.6], 2: [-0.7]}, interval=math.nan),
    "all damaged and lent": joint_table(
        {1: -0.4, 2: 0.0}, {1: [-0.6], 2: [-0.5]}, {1: "yes", 2: "as random sets"}, 2
    ),
    "all alike": joint_table({1: -0.61, 2: -0.61}, {1: [-0.61] * 20, 2: [-0.61] * 20}),
    "many sizes": joint_table(
        {2**i: -0.1 * i for i in range(9)}, {2**i: [-0.6] for i in range(9)}, {256: "yes"}, 200
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_the_joint_figure_of_any_table_is_whole(case: str, saved: Saved) -> None:
    draw(SMALL[case])
    check_whole(saved[CONFIRM])


def test_the_legend_of_the_joint_figure_hides_no_line(saved: Saved) -> None:
    """The usual case: the chosen lift the delta to 0, random ones do little or the reverse."""
    chosen = {1: -0.44, 2: -0.1, 4: -0.01, 8: 0.01}
    drawn = {n: [-0.6 - 0.1 * i for i in range(6)] for n in chosen}
    draw(joint_table(chosen, drawn, {4: "as random sets", 8: "yes"}, 1))
    (axes,), (legend,) = saved[CONFIRM].axes, saved[CONFIRM].legends
    for line in axes.lines:
        path = line.get_path().transformed(line.get_transform())
        assert not path.intersects_bbox(legend.get_window_extent(), filled=False), line.get_label()


# ----- heatmap


@pytest.mark.parametrize("base", [-2.0, 2.0])
def test_the_heatmap_shows_the_mean_role_and_greys_what_has_no_verdict(
    base: float, saved: Saved
) -> None:
    tracing.draw_heatmap(heads_of(ALL_BUT_GIVEN, base, floor=0.6), "by ig estimates", HEATMAP)
    axes, bar = saved[HEATMAP].axes
    (mesh,) = axes.collections
    cells = mesh.get_array().reshape(3, 4)
    for (layer, head), hidden in np.ndenumerate(np.ma.getmaskarray(cells)):
        mean = statistics.fmean(ALL_BUT_GIVEN.get(f"L{layer}H{head}", [math.nan]))
        assert hidden != (abs(mean) > 0.6), (layer, head)
        if not hidden:
            assert cells[layer, head] == pytest.approx(-math.copysign(1, base) * mean)
    assert axes.get_title().startswith("Mean role by ig estimates\n")
    assert "> 0" in bar.get_ylabel()
    assert "< 0" in bar.get_ylabel()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_components_without_index_are_drawn_as_one_bar_per_layer(saved: Saved) -> None:
    tracing.draw_heatmap(heads_of(MLPS, floor=0.5), "", HEATMAP)
    (axes,) = saved[HEATMAP].axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([-0.965, 0.035, 1.035, 2.035])
    colors = [bar.get_facecolor() for bar in axes.patches]
    verdicts = ["works against", "unclear", "contributes", "contributes"]
    assert colors == [to_rgba(tracing.VERDICT_COLORS[verdict]) for verdict in verdicts]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert "> 0" in axes.get_ylabel()

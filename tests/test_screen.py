"""Screens: which components are measured, what the tables hold and what is said to be missed."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

import llama3_circuit_tracing as tracing
from by_hand import halves, prepared, q_values
from conftest import Answer, command_line, finish, read, record_of, refuses
from llama3_circuit_tracing import Component

RESULTS, HEADS, SCREEN = (f"circuit_{name}.csv" for name in ("results", "heads", "screen"))
EIGHT = ["--num_samples", "8", "--rows_per_forward", "1", "--tree_tokens", "1"]
KEY = ["sample_id", "layer", "index"]

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def few() -> Any:
    """Three others are measured, so that some of the twelve heads are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "SCREEN_RANDOM", 3)
        yield


@pytest.fixture(scope="module")
def screened(few: None, llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("screened"), *EIGHT, "--screen", "2")


@pytest.fixture(scope="module")
def exact(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("exact"), *EIGHT)


@pytest.fixture(scope="module")
def estimated(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("estimated"), *EIGHT, "--method", "atp")


# ----- the tables


def test_effects_of_the_measured_are_those_of_an_exact_sweep(
    screened: Path, exact: Path, estimated: Path
) -> None:
    table, sweep, estimates = (read(f).set_index(KEY) for f in (screened, exact, estimated))
    assert len(table) == 5 * 8 and set(table["method"]) == {"exact"}
    assert set(table["n_screened"]) == {12}
    of_sweep = sweep.loc[table.index]
    columns = [c for c in table if c not in ("estimate", "n_screened")]
    pd.testing.assert_frame_equal(table[columns], of_sweep[columns], check_exact=True)
    expected = estimates["head_effect"].loc[table.index]
    assert (table["estimate"] - expected).abs().max() < 1e-9
    assert record_of(screened)["noise_floor"] == record_of(exact)["noise_floor"]


def test_q_is_corrected_for_all_that_were_estimated(screened: Path, exact: Path) -> None:
    heads, sweep = read(screened, HEADS), read(exact, HEADS).set_index("label")
    assert heads["n_tests"].tolist() == [12] * 5 and set(sweep["n_tests"]) == {12}
    assert heads["p"].tolist() == pytest.approx(sweep["p"][heads["label"]].tolist(), rel=1e-12)
    assert heads["q"].tolist() == pytest.approx(q_values([*heads["p"], *[1.0] * 7])[:5])
    assert heads["q"].tolist() != pytest.approx(q_values([*heads["p"]]))


def test_the_screen_has_every_estimate_in_order(screened: Path, estimated: Path) -> None:
    screen, heads = read(screened, SCREEN), read(screened, HEADS).set_index("label")
    columns = "label layer kind index head measure n_samples estimate_mean estimate_sd rank"
    assert {*columns.split(), "measured", "mean", "verdict"} == {*screen.columns}
    by_label = read(estimated, HEADS).set_index("label")
    of_label = by_label.loc[screen["label"]]
    assert screen["estimate_mean"].tolist() == pytest.approx(of_label["mean"].tolist())
    assert screen["estimate_sd"].tolist() == pytest.approx(of_label["sd"].tolist())
    order = by_label["mean"].abs().sort_values(ascending=False).index
    assert screen["label"].tolist() == order.tolist()
    assert screen["rank"].tolist() == list(range(1, 13))
    assert (set(screen["measure"]), set(screen["n_samples"])) == ({"a - b"}, {8})
    assert screen["measured"].tolist()[:2] == ["top", "top"]
    assert screen["measured"].tolist()[2:].count("random") == 3
    measured_rows = screen[screen["measured"] != "no"].set_index("label")
    assert measured_rows[["mean", "verdict"]].equals(
        heads.loc[measured_rows.index, ["mean", "verdict"]]
    )
    assert screen[screen["measured"] == "no"][["mean", "verdict"]].isna().all(axis=None)


def test_the_record_says_what_the_table_gives(screened: Path) -> None:
    screen, recorded = read(screened, SCREEN), record_of(screened)["commands"]["trace"]["screen"]
    measured_rows = screen[screen["measured"] != "no"]
    assert recorded["all"] == pytest.approx(tracing.agreement(measured_rows))
    random_ones = measured_rows[measured_rows["measured"] == "random"]
    assert recorded["random"] == pytest.approx(tracing.agreement(random_ones))
    assert recorded["random"]["n"] == 3


def test_a_redrawn_screen_has_the_same_findings(screened: Path, tmp_path: Path) -> None:
    argv = ["redraw", str(screened / RESULTS), "--output_dir", str(tmp_path)]
    assert tracing.main(argv) == 0
    assert (tmp_path / HEADS).read_bytes() == (screened / HEADS).read_bytes()


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("n_screened", 13, "another than above"),
        ("n_tests", 13, "another than above"),
        ("n_tests", 2.5, "whole number"),
        ("method", "ig", "another than above"),
        ("method", "guess", "'guess'"),
    ],
)
def test_a_table_of_two_screens_or_methods_is_refused(
    column: str, value: Any, says: str, screened: Path, tmp_path: Path, answer: Answer
) -> None:
    table = read(screened)
    table.loc[7, column] = value
    table.to_csv(tmp_path / RESULTS, index=False)
    argv = ["redraw", str(tmp_path / RESULTS), "--output_dir", str(tmp_path / "out")]
    refuses(answer, *argv, says=["line 9", repr(column), says])


def test_a_second_run_loads_no_weights_and_another_screen_needs_no_new_estimates(
    few: None, screened: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    before = [(screened / name).read_bytes() for name in (RESULTS, HEADS, SCREEN)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
        finish(llama, screened, *EIGHT, "--screen", "2")
    assert [(screened / name).read_bytes() for name in (RESULTS, HEADS, SCREEN)] == before
    flags = ["--num_samples", "2", "--screen"]
    finish(llama, tmp_path, *flags, "4")
    monkeypatch.setattr(tracing, "estimate_tree", lambda *_: pytest.fail("estimated again"))
    finish(llama, tmp_path, *flags, "1")
    assert read(tmp_path, HEADS).shape[0] == 4, "none of the other screen"
    finish(llama, tmp_path, *flags[:2])
    assert (
        not (tmp_path / SCREEN).exists()
        and "screen" not in record_of(tmp_path)["commands"]["trace"]
    )
    assert len(read(tmp_path, HEADS)) == 12


def test_all_are_measured_where_there_are_no_more(llama: str, tmp_path: Path) -> None:
    flags = ["--num_samples", "2", "--layers", "1", "--screen", "9", "--method", "relp"]
    screen = read(finish(llama, tmp_path, *flags), SCREEN)
    assert screen["measured"].tolist() == ["top"] * 4
    recorded = record_of(tmp_path)["commands"]["trace"]["screen"]
    assert (recorded["missed"], recorded["missed_upper_95"]) == (0, None)
    assert recorded["random"]["n"] == 0 and recorded["all"]["n"] == 4
    assert set(read(tmp_path)["method"]) == {"exact"}
    assert (tmp_path / "circuit_screen.png").stat().st_size > 5000


NEURONS = ["--num_samples", "6", "--kind", "neuron"]


@pytest.mark.parametrize(
    ("line", "measured"),
    [
        ("--neurons 0-1 --layers 0", "L0N0 L0N1"),
        ("--screen 1 --layers 0", ""),
    ],
)
def test_after_a_screen_a_narrower_command_is_corrected_for_all_that_it_estimated(
    few: None, line: str, measured: str, llama: str, tmp_path: Path
) -> None:
    """And holds none that the older screen measured."""
    older = read(finish(llama, tmp_path, *NEURONS, "--screen", "4"), HEADS)
    heads = read(finish(llama, tmp_path, *NEURONS, *line.split()), HEADS)
    assert (set(heads["n_tests"]), set(older["n_tests"])) == ({240}, {240})
    if measured:
        assert " ".join(heads["label"]) == measured
    else:
        screen = read(tmp_path, SCREEN)
        assert set(screen["layer"]) == {0} and len(screen) == 80
        assert set(heads["label"]) == set(screen["label"][screen["measured"] != "no"])
        assert set(read(tmp_path)["n_screened"]) == {80}
    p = heads["p"].tolist()
    expected = q_values([*p, *[1.0] * (240 - len(p))])[: len(p)]
    assert heads["q"].tolist() == pytest.approx(expected)
    said = "q corrects for 240 components: this folder has tested them before"
    assert (tmp_path / "run.log").read_text().count(said) == 1


def test_a_narrower_table_of_estimates_is_corrected_for_the_wider_one(
    estimated: Path, llama: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(estimated, tmp_path / "run"))
    heads = read(finish(llama, folder, *EIGHT, "--method", "atp", "--layers", "0"), HEADS)
    assert heads["label"].tolist() == ["L0H0", "L0H1", "L0H2", "L0H3"]
    assert set(heads["n_tests"]) == {12}


# ----- the choice


class Bench(NamedTuple):
    """What a command line asks for, and estimates of it."""

    experiment: tracing.Experiment[Any]
    estimates: tracing.Estimates


def with_estimates(model: str, flags: str) -> Bench:
    """What some flags ask for, with random estimates of every sample and side."""
    experiment = prepared(model, *flags.split())
    components = tracing.choose_components(experiment.options, experiment.shape)
    ids = [prompts[0].sample.sample_id for prompts in experiment.prompts]
    torch.manual_seed(0)
    values = torch.randn(len(ids), len(components), 4).double()
    return Bench(experiment, tracing.Estimates(components, ids, values))


def chosen(bench: Bench, measured: str) -> list[Component]:
    screened = tracing.choose_screened(bench.experiment, bench.estimates)
    return [component for component, part in screened.items() if part == measured]


def largest(bench: Bench, side: int, which: list[bool], k: int) -> list[Component]:
    """By |mean| of prompt a's estimates less those of a side, over some samples."""
    means = {}
    for place, component in enumerate(bench.estimates.components):
        values = bench.estimates.values[:, place]
        of_samples = itertools.compress(values.tolist(), which)
        means[component] = sum(sides[0] - sides[side] for sides in of_samples)
    return sorted(means, key=lambda component: -abs(means[component]))[:k]


def test_the_best_are_those_of_largest_mean_estimate_of_either_sign(llama: str) -> None:
    bench = with_estimates(llama, "--num_samples 5 --screen 4")
    best = largest(bench, 1, [True] * 5, 4)
    assert chosen(bench, "top") == best
    bench.estimates.values.neg_()
    assert chosen(bench, "top") == best


def test_skipped_components_are_neither_best_nor_drawn(llama: str) -> None:
    flags = "--num_samples 5 --screen 4"
    first, second, *rest = largest(with_estimates(llama, flags), 1, [True] * 5, 6)
    bench = with_estimates(llama, f"{flags} --skip {first.label},{second.label}")
    assert chosen(bench, "top") == rest
    assert not {first, second} & {*chosen(bench, "random")}


@pytest.mark.usefixtures("no_weights")
def test_a_screen_of_skipped_components_alone_is_refused(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    words = "--screen 1 --layers 0 --heads 0 --skip L0H0"
    argv = command_line(llama, tmp_path, "--num_samples", "2", *words.split())
    refuses(answer, *argv, says=["nothing is left to screen beside --skip L0H0"])


def test_the_contrast_with_other_words_chooses_where_most_have_one(llama: str) -> None:
    bench = with_estimates(llama, "--num_samples 5 --screen 4 --controls")
    experiment, every = bench.experiment, [True] * 5
    assert {prompt.side for prompt in experiment.prompts[0]} == {*tracing.SIDES}
    assert chosen(bench, "top") == largest(bench, 2, every, 4) != largest(bench, 1, every, 4)
    for i in (0, 1):
        experiment.prompts[i] = experiment.prompts[i][:2]
        bench.estimates.values[i, :, 2:] = math.nan
    have = [False, False, True, True, True]
    assert chosen(bench, "top") == largest(bench, 2, have, 4)
    experiment.prompts[2] = experiment.prompts[2][:2]
    assert chosen(bench, "top") == largest(bench, 1, every, 4)


def test_negative_controls_have_no_say(tiny_llama: str) -> None:
    bench = with_estimates(tiny_llama, "--task odd_one_out --num_samples 16 --screen 5")
    real = [pair[0].sample.group != tracing.NO_ODD_ONE for pair in bench.experiment.prompts]
    assert 0 < sum(real) < 16
    best = chosen(bench, "top")
    assert best == largest(bench, 1, real, 5) != largest(bench, 1, [True] * 16, 5)


def test_with_confirm_the_choosing_half_alone_ranks(llama: str, tmp_path: Path, few: None) -> None:
    flags = "--num_samples 6 --screen 4 --confirm 2"
    folder = finish(llama, tmp_path, *flags.split())
    choosing, held_out = halves(folder)
    bench = with_estimates(llama, flags)
    ids = bench.estimates.sample_ids
    assert {*choosing, *held_out} == {*ids}
    assert chosen(bench, "top") == largest(bench, 1, [i in choosing for i in ids], 4)
    assert chosen(bench, "top") != largest(bench, 1, [True] * 6, 4)
    real = read(folder).merge(read(folder, SCREEN)[["label", "layer", "index", "measured"]])
    means = real[real["sample_id"].isin(choosing)].groupby("label")["estimate"].mean().abs()
    top = set(real["label"][real["measured"] == "top"])
    assert means[list(top)].min() > means.drop(list(top)).max()


def test_random_others_are_of_the_rest_and_drawn_by_the_seed(llama: str, few: None) -> None:
    bench = with_estimates(llama, "--num_samples 3 --screen 6")
    experiment = bench.experiment
    drawn = set()
    for seed in range(20):
        experiment.options = replace(experiment.options, seed=seed)
        top, others = chosen(bench, "top"), chosen(bench, "random")
        assert len(top) == 6 and len({*others}) == 3 and not {*top} & {*others}
        assert chosen(bench, "random") == others
        drawn |= {*others}
    assert drawn == {*bench.estimates.components} - {*top}


# ----- what it is worth


@pytest.mark.parametrize("n", [1, 5, 32])
def test_the_bound_is_the_share_that_seldom_shows_so_few(n: int) -> None:
    assert tracing.share_upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n), abs=1e-9)
    assert tracing.share_upper_bound(n, n) == pytest.approx(1.0)
    for n_shown in range(n):
        p = tracing.share_upper_bound(n_shown, n)
        at_most = torch.distributions.Binomial(n, torch.tensor(p).double())
        chance = at_most.log_prob(torch.arange(n_shown + 1).double()).exp().sum()
        assert float(chance) == pytest.approx(0.05, abs=1e-6)


def pairs(estimate: list[float], exact: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"estimate_mean": estimate, "mean": exact}, dtype=float)


def test_agreement_by_hand() -> None:
    numbers = tracing.agreement(pairs([1, 2, 3], [2, 4, 6]))
    assert numbers == pytest.approx({"n": 3, "r": 1, "rank": 1, "slope": 2})
    numbers = tracing.agreement(pairs([1, 2, 3], [3, 2, 1]))
    assert numbers == pytest.approx({"n": 3, "r": -1, "rank": -1, "slope": -1})
    numbers = tracing.agreement(pairs([0, 1, 2, 3], [0, 1, 0, 1]))
    assert numbers["r"] == pytest.approx(2 / math.sqrt(5 * 4))
    assert numbers["slope"] == pytest.approx(0.2)
    assert numbers["rank"] == pytest.approx(2 / math.sqrt(20))
    for one in (pairs([], []), pairs([1], [2])):
        assert all(math.isnan(tracing.agreement(one)[name]) for name in ("r", "rank", "slope"))


def screen_of(top: str, drawn: str, n_left_out: int = 2, factor: float = 1.0) -> pd.DataFrame:
    """A screen by the measured means of its parts; `!` marks a verdict."""
    rows = []
    for name, values in (("top", top), ("random", drawn), ("no", "0 " * n_left_out)):
        for text in values.split():
            value = float(text.strip("!"))
            verdict = "contributes" if "!" in text else "unclear"
            rows.append((f"L0H{len(rows)}", factor * value, value, name, verdict))
    table = pd.DataFrame(rows, columns=["label", "estimate_mean", "mean", "measured", "verdict"])
    return table.assign(measure="a - b")


CASES: dict[str, tuple[pd.DataFrame, int, float | None, bool]] = {  # missed, bound, poor
    "none": (screen_of("3! -2! 0.1", "0.5 -1"), 0, tracing.share_upper_bound(0, 2), False),
    "of either sign": (screen_of("3! -2!", "2.5 -2.1 2"), 2, tracing.share_upper_bound(2, 3), True),
    "no verdict": (screen_of("3 -2 1", "1.9 -2.1"), 1, tracing.share_upper_bound(1, 2), True),
    "all measured": (screen_of("3! -2!", "2.5 -1 0 0", 0), 1, None, True),
    "no others": (screen_of("3! -2!", "", 0), 0, None, False),
    "skipped others": (screen_of("3! -2!", "", 2), 0, None, False),
    "uncorrelated": (
        screen_of("3! -2!", "1 0.5", factor=-1),
        0,
        tracing.share_upper_bound(0, 2),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_random_others_exceed_is_missed_and_warned_of(case: str) -> None:
    table, missed, bound, poor = CASES[case]
    findings = tracing.Findings()
    recorded = tracing.report_screen(findings, table, "atp")
    assert (recorded["missed"], recorded["missed_upper_95"]) == (missed, pytest.approx(bound))
    assert recorded["all"]["n"] == (table["measured"] != "no").sum()
    warned = [entry["text"] for entry in findings.entries if entry["level"] == "warning"]
    assert warned == ["atp is a poor screen here: raise --screen or use another --method"] * poor
    n = (table["measured"] == "random").sum()
    measured = "all but the skipped" if case.startswith("skipped") else "all"
    sentence = f"nothing is missed: {measured} are measured"
    if n:
        sentence = f"missed: {missed} of {n} random others exceed"
    text = " ".join(entry["text"] for entry in findings.entries)
    assert sentence in text
    assert ("at most" in text) == (bound is not None)


def test_the_figure_has_a_point_for_each_measured_component(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    saved: list[Any] = []
    save: Callable[..., None] = tracing.save_figure
    monkeypatch.setattr(tracing, "save_figure", lambda f, path: (saved.append(f), save(f, path)))
    table, path = screen_of("3! -2! 1", "0.5 -1"), tmp_path / "screen.png"
    tracing.draw_screen(table, "relp", "a title", path)
    (axes,) = saved[0].axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in dots] == [
        table[table["measured"] == name][["estimate_mean", "mean"]].to_numpy().tolist()
        for name in ("top", "random")
    ]
    assert axes.get_xlabel() == "relp estimate, score a - b (nats)"
    assert (axes.get_ylabel(), axes.get_title()) == ("measured, score a - b (nats)", "a title")
    assert path.stat().st_size > 5000

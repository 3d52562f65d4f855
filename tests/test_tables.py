"""What a run's tables hold: by hand, recomputed from a run's own files, and where nothing is there."""

from __future__ import annotations

import functools
import json
import logging
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import Effects, results
from conftest import Answer, finish, read, record_of, write_samples

CONFIG = tracing.Config(num_bootstrap=500)
QUICK = tracing.Config(num_bootstrap=100)
NO_FLOOR = math.nan
SCORES = ["score_a_base", "score_b_base", "score_a_head", "score_b_head"]
FIRST = ["sample_id", "n_constraints", "layer", "head"]
FIRST += ["delta_logit_base", "delta_logit_head", "head_effect", *SCORES]
CONTROLS = ["score_other_base", "score_other_head", "score_affirm_base", "score_affirm_head"]
CONTROLS += ["effect_minus_other", "effect_minus_affirm"]
LAST = ["kind", "index", "op", "positions"]
STATISTICS = ["n_samples", "n_sentences", "mean", "median", "sd", "ci_low", "ci_high", "p", "q"]
N_SAMPLES = 6
SENTENCES = [
    {"sample_id": "s0", "sentence": "Name a sport.", "targets": ["golf"]},
    {"sample_id": "s1", "sentence": "Name a metal.", "targets": ["iron", "zinc"]},
    {"sample_id": "s2", "sentence": "Name a bird.", "targets": ["owl"]},
]


@pytest.fixture(scope="module")
def uncontrolled(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), "--num_samples", str(N_SAMPLES))


@pytest.fixture(scope="module")
def controlled(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["--num_samples", str(N_SAMPLES), "--controls"]
    return finish(llama, tmp_path_factory.mktemp("run"), *flags)


@pytest.fixture(scope="module")
def of_task(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small run of a task."""

    @functools.cache
    def run(task: str) -> Path:
        flags = ["--task", task, "--layers", "1", "--heads", "0,2"]
        return finish(llama, tmp_path_factory.mktemp(task), *flags, "--num_samples", "5")

    return run


def find(
    table: pd.DataFrame, floor: float = NO_FLOOR, config: tracing.Config = CONFIG
) -> tuple[dict[str, float], pd.DataFrame]:
    """The base's statistics and the findings per component."""
    base = tracing.base_statistics(table, config)
    return base, tracing.heads_table(table, base, floor, config)


def of_effects(table: pd.DataFrame) -> pd.DataFrame:
    return tracing.statistics_of(table, "head_effect", CONFIG)


# ----- results per sample and component


def swept(*rows: tuple[str, int, int, float, float]) -> pd.DataFrame:
    """Rows of sample_id, layer, index and the scores of a and b with the edit."""
    names = ["sample_id", "layer", "index", "score_a_head", "score_b_head"]
    table = pd.DataFrame(rows, columns=names).assign(draw=-1)
    return table.astype({"sample_id": pd.CategoricalDtype(sorted(set(table["sample_id"])))})


def record(sample_id: str, a: float, b: float, **more: Any) -> dict[str, Any]:
    prompts = {"a": {"score": a}, "b": {"score": b}}
    known = {"targets": ["x", "y"], "unit": "u", "group": "", "prompts": prompts}
    return {"sample_id": sample_id, **known, **more}


def test_metric_and_role_by_hand() -> None:
    rows = swept(("s", 2, 5, -2.5, -1.5))
    table = tracing.results_table(rows, [record("s", -5.0, -1.0)], CONFIG)
    (row,) = table.to_dict("records")
    assert (row["delta_logit_base"], row["delta_logit_head"], row["head_effect"]) == (-4, -1, 3)
    assert (row["layer"], row["head"], row["n_constraints"]) == (2, 5, 2)
    assert find(table)[1]["role"].item() == 3


def test_rows_meet_the_base_scores_of_their_sample_and_are_sorted() -> None:
    rows = swept(("t", 1, 0, -1, 0), ("s", 1, 10, -2, 0), ("s", 1, 9, -3, 0), ("s", 0, 11, -4, 0))
    records = [record("t", 5, 1, unit="v", group="g"), record("s", 7, 2)]
    table = tracing.results_table(rows, records, CONFIG)
    found = table[["sample_id", "layer", "index", "score_a_head"]].to_numpy().tolist()
    assert found == [["s", 0, 11, -4], ["s", 1, 9, -3], ["s", 1, 10, -2], ["t", 1, 0, -1]]
    assert table["score_a_base"].tolist() == [7, 7, 7, 5]
    assert table["score_b_base"].tolist() == [2, 2, 2, 1]
    assert table["unit"].tolist() == ["u", "u", "u", "v"]
    assert table["group"].tolist() == ["", "", "", "g"]


@pytest.mark.parametrize(
    ("kind", "index", "head", "shown"),
    [
        ("head", 3, "3", "3"),
        ("neuron", 70, "", "70"),
        ("attn", -1, "", ""),
        ("mlp", -1, "", ""),
        ("resid", -1, "", ""),
    ],
)
def test_the_component_columns_come_last_and_head_is_for_heads_only(
    kind: str, index: int, head: str, shown: str, tmp_path: Path
) -> None:
    config = tracing.Config(kind=kind, op="scale", factor=0.5, positions="last")
    table = tracing.results_table(swept(("s", 1, index, 0, 0)), [record("s", 0, 0)], config)
    tracing.write_components(tmp_path / "t.csv", table.drop(columns="draw"))
    names, row = ((tmp_path / "t.csv").read_text().splitlines()[i].split(",") for i in range(2))
    assert names == [*FIRST, "unit", "group", *LAST]
    assert row[names.index("head")] == head
    assert row[-4:] == [kind, shown, "scale", "last"]


@pytest.mark.parametrize("task", tracing.TASKS)
def test_every_row_of_a_run_recomputes_from_its_raw_scores(
    task: str, of_task: Callable[[str], Path]
) -> None:
    table = read(of_task(task))
    assert len(table) == 5 * 2
    base = table["score_a_base"] - table["score_b_base"]
    head = table["score_a_head"] - table["score_b_head"]
    assert (table["delta_logit_base"] - base).abs().max() < 1e-9
    assert (table["delta_logit_head"] - head).abs().max() < 1e-9
    assert (table["head_effect"] - (head - base)).abs().max() < 1e-9
    assert table["head_effect"].abs().min() > 1e-4


def test_negative_controls_are_in_the_results_but_in_no_statistic(
    of_task: Callable[[str], Path],
) -> None:
    table, heads = read(of_task("odd_one_out")), read(of_task("odd_one_out"), "circuit_heads.csv")
    real = table[table["group"] != tracing.NO_ODD_ONE]
    assert set(table["sample_id"]) - set(real["sample_id"]) == {"s0004"}
    assert set(real["group"]) <= set(tracing.PEOPLE)
    assert heads["n_samples"].tolist() == [4, 4]
    for head in heads.itertuples():
        mine = real[real["head"] == head.head]
        assert head.mean == pytest.approx(mine["head_effect"].mean(), abs=1e-9)
        share = 1 - mine["delta_logit_head"].mean() / mine["delta_logit_base"].mean()
        assert head.share_moved == pytest.approx(share, abs=1e-9)


# ----- columns of controls


def test_control_columns_come_after_those_that_are_always_there(
    controlled: Path, uncontrolled: Path
) -> None:
    always = [*FIRST, "unit", "group"]
    assert list(read(controlled)) == [*always, *CONTROLS, *LAST]
    assert list(read(uncontrolled)) == [*always, *LAST]


def test_control_effects_recompute_from_the_raw_scores(controlled: Path) -> None:
    table = read(controlled)
    assert len(table) == N_SAMPLES * 12
    assert not table[CONTROLS].isna().any(axis=None)
    for side in ("other", "affirm"):
        base = table[f"score_{side}_base"] - table["score_b_base"]
        head = table[f"score_{side}_head"] - table["score_b_head"]
        expected = table["head_effect"] - (head - base)
        assert (table[f"effect_minus_{side}"] - expected).abs().max() < 1e-9
        assert table.groupby("sample_id")[f"score_{side}_base"].nunique().eq(1).all()


def test_control_prompts_score_as_the_naive_oracle_says(controlled: Path, llama: str) -> None:
    model, tokenizer = naive.load(llama)
    table = read(controlled).set_index(["sample_id", "layer", "head"])
    targets = by_hand.targets_of(controlled)
    for sample_id, of_side in list(by_hand.texts(controlled).items())[:2]:
        for side in ("other", "affirm"):
            asked = (tokenizer, of_side[side], targets[sample_id])
            base = naive.suppression_score(model, *asked)
            for layer, head in ((0, 2), (2, 1)):
                with by_hand.ablated(model, [f"L{layer}H{head}"]):
                    edited = naive.suppression_score(model, *asked)
                row = table.loc[(sample_id, layer, head)]
                assert row[f"score_{side}_base"] == pytest.approx(base, abs=2e-5)
                assert row[f"score_{side}_head"] == pytest.approx(edited, abs=2e-5)


def test_controls_do_not_change_what_stands_before_them(
    controlled: Path, uncontrolled: Path
) -> None:
    one, two = read(controlled)[FIRST], read(uncontrolled)[FIRST]
    assert one[FIRST[:4]].equals(two[FIRST[:4]])
    assert (one[FIRST[4:]] - two[FIRST[4:]]).abs().max().max() < 2e-5


def test_a_sample_without_controls_leaves_their_columns_empty(llama: str, tmp_path: Path) -> None:
    long = {"sample_id": "long", "prompt_a": "Never say golf! Name a sport."}
    long |= {"prompt_b": "Name a sport.", "targets": ["golf"]}
    samples = write_samples(tmp_path / "mine.jsonl", long, *SENTENCES[1:])
    folder = finish(llama, tmp_path, "--samples", samples, "--controls", "--layers", "0")
    table, heads = read(folder), read(folder, "circuit_heads.csv")
    empty = table[CONTROLS].isna().all(axis=1)
    assert empty.tolist() == (table["sample_id"] == "long").tolist()
    assert not table[CONTROLS][~empty].isna().any(axis=None)
    assert not table[FIRST].isna().any(axis=None)
    assert (heads["n_samples"] == 3).all()
    assert (heads["minus_other_n_samples"] == 2).all()
    assert (heads["minus_other_n_sentences"] == 2).all()


def test_a_control_that_no_sample_has_is_left_out_of_the_findings(
    llama: str, tmp_path: Path
) -> None:
    samples = write_samples(tmp_path / "mine.jsonl", SENTENCES[0])  # no other's words to forbid
    folder = finish(llama, tmp_path, "--samples", samples, "--controls", "--layers", "0")
    table, heads = read(folder), read(folder, "circuit_heads.csv")
    assert table[["score_other_base", "score_other_head", "effect_minus_other"]].isna().all(None)
    assert not table[["score_affirm_base", "effect_minus_affirm"]].isna().any(axis=None)
    assert "minus_affirm_mean" in heads
    assert "minus_other_mean" not in heads


# ----- noise floor


def jittered_effects(folder: Path) -> dict[tuple[int, int, int], list[float]]:
    """The effects of every jittered row (layer, head, draw) on the samples."""
    base = {s["sample_id"]: s["delta_logit_base"] for s in record_of(folder)["samples"]}
    effects: dict[tuple[int, int, int], list[float]] = {}
    for path in sorted((folder / ".parts").glob("sweep-*.json")):
        for row in pd.DataFrame(json.loads(path.read_text())["payload"]).itertuples():
            if row.draw >= 0:
                moved = row.score_a_head - row.score_b_head - base[row.sample_id]
                effects.setdefault((row.layer, row[3], row.draw), []).append(moved)
    return effects


def test_the_noise_floor_is_the_95th_percentile_of_the_mean_effects_of_jittered_rows(
    controlled: Path,
) -> None:
    effects = jittered_effects(controlled)
    assert len(effects) >= 12
    assert {layer for layer, _, _ in effects} == {0, 1, 2}
    assert {len(values) for values in effects.values()} == {N_SAMPLES}
    floor = np.quantile([abs(statistics.fmean(v)) for v in effects.values()], 0.95)
    assert record_of(controlled)["noise_floor"] == pytest.approx(float(floor), rel=1e-9)


def test_the_noise_floor_by_hand() -> None:
    """Mean effects of 1 to 5; a row that some sample lacks tells of other samples."""
    moved = [*((f"s{i}", draw, draw + 1.0) for i in range(2) for draw in range(5)), ("s0", 5, 99.0)]
    table = pd.DataFrame(moved, columns=["sample_id", "draw", "head_effect"])
    table = table.assign(layer=0, kind="head", index=3, group="")
    assert tracing.noise_floor(table) == pytest.approx(4.8)
    assert tracing.noise_floor(table.assign(head_effect=-table["head_effect"])) == 4.8
    assert tracing.noise_floor(pd.concat([table, table.head(3)])) == pytest.approx(4.8)
    negative = table.assign(sample_id="n", head_effect=50.0, group=tracing.NO_ODD_ONE)
    assert tracing.noise_floor(pd.concat([table, negative])) == pytest.approx(4.8)
    opposite = table.assign(
        head_effect=table["head_effect"] * (1 - 2 * (table["sample_id"] == "s1"))
    )
    assert tracing.noise_floor(opposite) == 0
    assert math.isnan(tracing.noise_floor(table.head(0)))


def test_the_heads_above_the_noise_floor_are_marked(controlled: Path) -> None:
    floor, heads = record_of(controlled)["noise_floor"], read(controlled, "circuit_heads.csv")
    assert heads["above_noise"].tolist() == (heads["mean"].abs() > floor).tolist()


def test_a_jittered_row_scales_a_head_by_one_plus_two_eps(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits: list[tracing.Edit] = []
    run = tracing.run_batches

    def watch(traced: Any, clean: Any, rows: Sequence[tracing.Row]) -> torch.Tensor:
        edits.extend(edit for row in rows for edit in row if edit.factor)
        return run(traced, clean, rows)

    monkeypatch.setattr(tracing, "run_batches", watch)
    finish(llama, tmp_path, "--num_samples", "1", "--bf16")
    assert {edit.factor for edit in edits} == {1 + 2**-6}
    assert {edit.columns.stop - edit.columns.start for edit in edits} == {16}
    assert {edit.site[1] for edit in edits} == {"self_attn.o_proj"}


def test_the_noise_floor_depends_on_the_seed_and_is_larger_in_bfloat16(
    llama: str, tmp_path: Path
) -> None:
    samples = ["--samples", write_samples(tmp_path / "mine.jsonl", *SENTENCES)]
    flags = {"one": "--seed=1", "again": "--seed=1", "two": "--seed=2", "bf16": "--seed=1 --bf16"}
    runs = {
        name: finish(llama, tmp_path / name, *samples, *given.split())
        for name, given in flags.items()
    }
    floors = {name: record_of(folder)["noise_floor"] for name, folder in runs.items()}
    drawn = {name: set(jittered_effects(folder)) for name, folder in runs.items()}
    assert floors["one"] == floors["again"]
    assert floors["one"] != floors["two"]
    assert drawn["one"] == drawn["bf16"] != drawn["two"]
    assert 1e-8 < floors["one"] < 2e-5
    assert 1e-4 < floors["bf16"] < 1
    assert floors["bf16"] > 100 * floors["one"]


# ----- statistics per component: sentences are the units


def test_the_statistics_of_a_component_by_hand() -> None:
    table = results({"L0H0": [0.1, 0.2, 0.6, 0.3], "L0H1": [0.4, -0.4, 0.4, -0.4]})
    found = of_effects(table)
    assert list(found) == STATISTICS
    first, second = found.to_dict("records")
    assert (first["n_samples"], first["n_sentences"]) == (4, 4)
    assert first["mean"] == pytest.approx(0.3)
    assert first["median"] == pytest.approx(0.25)
    assert first["sd"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09 + 0) / 3))
    assert first["ci_low"] < 0.3 < first["ci_high"]
    assert (first["p"], first["q"]) == (2 / 16, 2 * 2 / 16)
    assert (second["p"], second["q"]) == (1.0, 1.0)


def twice(effects: Effects) -> Effects:
    return {label: [*of_head, *of_head] for label, of_head in effects.items()}


def test_samples_of_one_sentence_are_no_further_evidence() -> None:
    """Every sample twice under its sentence changes neither interval nor p; as sentences it does."""
    effects = by_hand.noise(random.Random(5), 8, 6)
    single = of_effects(results(effects))
    double = of_effects(results(twice(effects), units=[f"u{i:03d}" for i in range(8)] * 2))
    assert (double["n_samples"] == 16).all()
    assert (double["n_sentences"] == 8).all()
    for name in ("mean", "ci_low", "ci_high", "p", "q"):
        assert double[name].tolist() == pytest.approx(single[name].tolist()), name
    copied = of_effects(results(twice(effects)))
    assert (copied["ci_high"] - copied["ci_low"] < single["ci_high"] - single["ci_low"]).all()
    assert copied["p"].tolist() != pytest.approx(single["p"].tolist())


def test_the_base_has_the_interval_of_sentences_too() -> None:
    rng = random.Random(1)
    deltas = [rng.gauss(-1, 0.5) for _ in range(8)]
    effects, units = by_hand.noise(rng, 8, 2), [f"u{i:03d}" for i in range(8)]
    once = tracing.base_statistics(results(effects, deltas, units), CONFIG)
    copies = results(twice(effects), deltas * 2, units * 2)
    double = tracing.base_statistics(copies, CONFIG)
    assert once["n_sentences"] == double["n_sentences"] == 8
    for name in ("mean", "ci_low", "ci_high"):
        assert once[name] == pytest.approx(double[name])
    assert once["mean"] == pytest.approx(statistics.fmean(deltas))
    assert once["ci_low"] < once["mean"] < once["ci_high"]


def test_cells_that_a_table_lacks_are_left_out() -> None:
    effects = by_hand.noise(random.Random(2), 6, 3)
    table = results(effects)
    holes = table[(table["head"] != 1) | ~table["sample_id"].isin(["s001", "s004"])]
    full, found = of_effects(table), of_effects(holes)
    present = [effects["L0H1"][i] for i in (0, 2, 3, 5)]
    row = found.iloc[1]
    assert (row["n_samples"], row["n_sentences"]) == (4, 4)
    assert row["mean"] == pytest.approx(statistics.fmean(present))
    assert row["sd"] == pytest.approx(statistics.stdev(present))
    assert row["p"] == by_hand.sign_flip_p(present)
    assert row["ci_low"] < row["mean"] < row["ci_high"]
    for other in (0, 2):
        assert found.iloc[other].drop("q").tolist() == full.iloc[other].drop("q").tolist()


def test_a_component_that_one_sentence_alone_has_gets_no_interval() -> None:
    table = results(by_hand.noise(random.Random(2), 6, 3))
    row = of_effects(table[(table["head"] != 1) | (table["sample_id"] == "s003")]).iloc[1]
    assert (row["n_sentences"], row["p"]) == (1, 1.0)
    assert row[["ci_low", "ci_high"]].isna().all()


def test_negative_controls_do_not_enter_the_statistics() -> None:
    table = results(by_hand.noise(random.Random(2), 6, 3))
    negative = results({f"L0H{h}": [9.0] * 2 for h in range(3)}, 7.0).assign(
        group=tracing.NO_ODD_ONE
    )
    both = pd.concat([table, negative.assign(sample_id="n" + negative["sample_id"])])
    (base, heads), (plain_base, plain_heads) = find(both), find(table)
    assert base == plain_base
    pd.testing.assert_frame_equal(heads, plain_heads)


# ----- roles and verdicts


def planted(
    effect: float, base: float, n_samples: int = 16
) -> tuple[dict[str, float], pd.DataFrame]:
    """32 heads of pure noise, of which the fourth has an effect beside."""
    rng = random.Random(0)
    effects = dict(by_hand.noise(rng, n_samples, 32, 0.05))
    effects["L0H3"] = [moved + effect for moved in effects["L0H3"]]
    return find(results(effects, [base + rng.gauss(0, 0.3) for _ in range(n_samples)]))


@pytest.mark.parametrize(
    ("base", "effect", "verdict"),
    [
        (-1.0, 0.3, "contributes"),  # suppression; without the head the word is likelier
        (-1.0, -0.3, "works against"),
        (1.0, -0.3, "contributes"),  # rebound, or another task
        (1.0, 0.3, "works against"),
    ],
)
def test_a_planted_effect_is_found_and_its_role_follows_the_sign_of_the_base(
    base: float, effect: float, verdict: str
) -> None:
    of_base, heads = planted(effect, base)
    assert heads["verdict"].tolist() == [verdict if i == 3 else "" for i in range(32)]
    assert heads["label"][3] == "L0H3"
    assert (heads["role"][3] > 0) == (verdict == "contributes")
    assert heads["role"].tolist() == (-math.copysign(1, base) * heads["mean"]).tolist()
    moved = (-heads["mean"] / of_base["mean"]).tolist()
    assert heads["share_moved"].tolist() == pytest.approx(moved)


@pytest.mark.parametrize(
    ("op", "factor", "role"), [("zero", None, 0.5), ("scale", 0.5, 0.5), ("scale", 2.0, -0.5)]
)
def test_amplifying_has_the_opposite_role_of_removing(
    op: str, factor: float | None, role: float
) -> None:
    config = tracing.Config(op=op, factor=factor, num_bootstrap=100)
    heads = find(results({"L0H0": [0.5] * 8}), config=config)[1]
    assert heads["role"].tolist() == [role]


def test_no_verdict_is_given_where_the_interval_of_the_base_covers_0() -> None:
    rng = random.Random(0)
    effects = {"L0H0": [1 + rng.gauss(0, 0.05) for _ in range(16)], "L0H1": [0.01] * 16}
    base, heads = find(results(effects, [0.9, -1.0] * 8))
    assert base["ci_low"] < 0 < base["ci_high"]
    assert (heads["q"] < 0.05).all()
    assert heads["verdict"].tolist() == ["", ""]


def test_no_verdict_is_given_to_a_single_sentence() -> None:
    table = results({"L0H0": [5.0] * 4, "L0H1": [0.1] * 4}, units=["u"] * 4)
    base, heads = find(table)
    assert math.isnan(base["ci_low"])
    assert heads["verdict"].tolist() == ["", ""]
    assert heads["p"].tolist() == [1.0, 1.0]


def test_above_noise_is_a_mean_effect_beyond_the_floor_in_either_direction() -> None:
    moved = (0.2, -0.2, 0.05, -0.05)
    table = results({f"L0H{i}": [effect] * 16 for i, effect in enumerate(moved)})
    heads = find(table, 0.1)[1]
    assert heads["above_noise"].tolist() == [True, True, False, False]
    assert (heads["q"] < 0.05).all()
    assert heads["verdict"].tolist() == ["contributes", "works against", "", ""]
    unknown = find(table)[1]
    assert unknown["above_noise"].isna().all()
    assert unknown["verdict"].tolist() == ["contributes", "works against"] * 2


@pytest.mark.parametrize(("floor", "measurable"), [(NO_FLOOR, True), (0.9, True), (1.1, False)])
def test_the_share_moved_is_empty_where_the_base_is_below_the_floor(
    floor: float, measurable: bool
) -> None:
    heads = find(results({"L0H0": [0.25] * 8}, -1.0), floor)[1]
    assert heads["share_moved"].notna().tolist() == [measurable]
    assert not measurable or heads["share_moved"].tolist() == [0.25]


def test_effects_that_are_all_zero_give_no_verdict_and_no_nan() -> None:
    heads = find(results({"L0H0": [0.0] * 6, "L0H1": [0.0] * 6}))[1]
    assert heads["p"].tolist() == [1.0, 1.0]
    assert heads["verdict"].tolist() == ["", ""]
    assert heads[["mean", "ci_low", "ci_high"]].to_numpy().tolist() == [[0.0] * 3] * 2


def test_where_nothing_is_there_few_tables_show_anything() -> None:
    """The global null, two samples to a sentence that share most of their noise: the share of
    tables with any verdict is the false-discovery rate. Heads share noise as well."""
    rng = random.Random(0)
    n_tables, n_sentences = 120, 10
    units = [f"u{i:03d}" for i in range(n_sentences)] * 2
    shown = 0
    for _ in range(n_tables):
        common = [rng.gauss(0, 0.5) for _ in range(n_sentences)]
        effects = {
            label: [c + own + rng.gauss(0, 0.3) for c, own in zip(common, of_head, strict=True)]
            + [c + own + rng.gauss(0, 0.3) for c, own in zip(common, of_head, strict=True)]
            for label, of_head in by_hand.noise(rng, n_sentences, 8, 1).items()
        }
        shown += (find(results(effects, -5.0, units), config=QUICK)[1]["verdict"] != "").any()
    assert shown / n_tables <= 0.08
    assert shown > 0  # the level is used, not only kept


def test_among_real_effects_few_of_the_discoveries_are_false() -> None:
    rng = random.Random(1)
    shares = []
    for _ in range(25):
        effects = dict(by_hand.noise(rng, 16, 40, 1.0))
        real = [f"L0H{h}" for h in range(8)]
        effects |= {label: [moved + 1.5 for moved in effects[label]] for label in real}
        heads = find(results(effects), config=QUICK)[1].set_index("label")
        called = list(heads.index[heads["verdict"] != ""])
        found = len(set(called) & set(real))
        shares.append((len(called) - found) / max(1, len(called)))
        assert found >= 4
    assert statistics.fmean(shares) <= 0.06


# ----- a row per component


def test_components_of_every_kind_have_a_label_and_a_row_of_their_own() -> None:
    effects = {"L0H1": [0.1, 0.2], "L0attn": [0.3, 0.4], "L0mlp": [0.5, 0.6]}
    effects |= {"L1N70": [0.7, 0.8], "L1resid": [0.9, 1.0]}
    heads = find(results(effects))[1].set_index("label")
    assert heads["mean"].to_dict() == pytest.approx(
        {label: statistics.fmean(values) for label, values in effects.items()}
    )


@pytest.mark.parametrize(
    ("prefix", "column"),
    [
        ("", "head_effect"),
        ("minus_other_", "effect_minus_other"),
        ("minus_affirm_", "effect_minus_affirm"),
    ],
)
def test_circuit_heads_recomputes_from_circuit_results(
    prefix: str, column: str, controlled: Path
) -> None:
    table, heads = read(controlled), read(controlled, "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(3) for j in range(4)]
    ps = []
    for head in heads.to_dict("records"):
        mine = table[(table["layer"] == head["layer"]) & (table["head"] == head["head"])]
        effects, mean = mine[column].tolist(), head[f"{prefix}mean"]
        assert head[f"{prefix}n_samples"] == len(effects) == N_SAMPLES
        assert mean == pytest.approx(statistics.fmean(effects))
        assert head[f"{prefix}median"] == pytest.approx(statistics.median(effects))
        assert head[f"{prefix}sd"] == pytest.approx(statistics.stdev(effects))
        assert min(effects) <= head[f"{prefix}ci_low"] < mean
        assert mean < head[f"{prefix}ci_high"] <= max(effects)
        ps.append(by_hand.sign_flip_p(mine.groupby("unit")[column].sum().tolist()))
    assert heads[f"{prefix}p"].tolist() == pytest.approx(ps)
    assert heads[f"{prefix}q"].tolist() == pytest.approx(by_hand.q_values(ps))
    assert (heads[f"{prefix}n_sentences"] == table["unit"].nunique()).all()
    base = table.drop_duplicates("sample_id")["delta_logit_base"].mean()
    roles = -math.copysign(1, base) * heads[f"{prefix}mean"]
    assert heads[f"{prefix}role"].tolist() == pytest.approx(roles.tolist())
    assert heads["share_moved"].tolist() == pytest.approx((-heads["mean"] / base).tolist())


def test_the_effect_less_that_of_a_control_has_the_same_statistics() -> None:
    table = results(by_hand.noise(random.Random(4), 8, 3))
    table["effect_minus_other"] = 2 * table["head_effect"] - 0.1
    found = find(table)[1]
    renamed = find(table.assign(head_effect=table["effect_minus_other"]))[1]
    judged = [*STATISTICS, "role", "above_noise", "verdict"]
    theirs = found[[f"minus_other_{name}" for name in judged]].set_axis(judged, axis=1)
    pd.testing.assert_frame_equal(theirs, renamed[judged])
    assert not any(name.startswith("minus_affirm") for name in found)


# ----- comparison with another run


def steps(value: float) -> list[float]:
    return [value + 0.01 * i for i in range(8)]


def compare(
    now: Effects,
    before: Effects,
    base: float = -2.0,
    floor: float = 0.1,
    ops: tuple[str, str] = ("zero", "zero"),
) -> pd.DataFrame:
    """The findings by label beside those of another run of the same eight samples."""
    bases = [base + 0.1 * i for i in range(8)]
    table, other = results(now, bases, op=ops[0]), results(before, bases, op=ops[1])
    config = tracing.Config(num_bootstrap=100, op=ops[0], compare="other.csv")
    heads = find(table, floor, config)[1]
    return tracing.compare_runs(table, other, heads, floor, config).set_index("label")


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(
    ("grown", "floor", "flagged"),
    [
        ([1.0 + 0.1 * i for i in range(8)], 0.1, True),
        ([-1.0 - 0.1 * i for i in range(8)], 0.1, False),
        ([0.05] * 8, 0.1, False),
        ([0.05] * 8, NO_FLOOR, True),
        ([2.0] * 4 + [-0.5] * 4, 0.1, False),
    ],
    ids=["grew", "shrank", "below the floor", "no floor is known", "in some sentences only"],
)
def test_a_role_that_grew_beyond_the_floor_is_flagged(
    grown: list[float], floor: float, flagged: bool, base: float, caplog: pytest.LogCaptureFixture
) -> None:
    sign = -math.copysign(1.0, base)  # of the role against the effect
    before = {f"L1H{h}": steps(0.3 * h) for h in range(3)}
    moved = [e + sign * by for e, by in zip(before["L1H2"], grown, strict=True)]
    with caplog.at_level(logging.INFO, logger="circuit"):
        heads = compare({**before, "L1H2": moved}, before, base, floor)
    flags = heads["growth_flag"].astype(bool)
    assert flags.to_dict() == {"L1H0": False, "L1H1": False, "L1H2": flagged}
    assert heads.loc["L1H2", "growth_mean"] == pytest.approx(statistics.fmean(grown))
    assert heads.loc["L1H0", "growth_mean"] == pytest.approx(0)
    (line,) = (text for text in caplog.messages if text.startswith("role grew"))
    assert ("L1H2" in line) == flagged
    assert "L1H0" not in line


def test_the_paired_difference_is_tested_over_sentences() -> None:
    """Eight sentences all up: p = 2 / 2^8, and among three components q is three times that."""
    before = {f"L1H{h}": steps(0.3 * h) for h in range(3)}
    heads = compare({**before, "L1H2": steps(1.6)}, before)
    assert heads.loc["L1H2", "growth_p"] == pytest.approx(2 / 2**8)
    assert heads.loc["L1H2", "growth_q"] == pytest.approx(6 / 2**8)


@pytest.mark.parametrize("ops", [("zero", "zero"), ("mean", "zero")])
def test_the_rankings_agree_by_spearman_and_growth_is_of_one_op_only(
    ops: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    now = {f"L0H{h}": steps(value) for h, value in enumerate((1.0, 2.0, 3.0, 4.0))}
    before = {f"L0H{h}": steps(value) for h, value in enumerate((1.0, 30.0, 20.0, 400.0))}
    with caplog.at_level(logging.INFO, logger="circuit"):
        heads = compare(now, before, ops=ops)
    assert re.search(rf"\({ops[0]} here, zero in other.csv\): 0\.800$", caplog.messages[0])
    assert ("growth_mean" in heads) == (ops[0] == ops[1])


@pytest.mark.parametrize("end", ["mlp", "N7"])
def test_runs_of_components_without_heads_are_compared(end: str) -> None:
    before = {f"L{n}{end}": steps(0.1 * n) for n in range(3)}
    heads = compare({**before, f"L1{end}": steps(2.0)}, before)
    assert heads["growth_flag"].astype(bool).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def compared(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run and its flags."""
    flags = ["--num_samples", "8", "--layers", "2", "--heads", "0-2"]
    return finish(llama, tmp_path_factory.mktemp("run"), *flags), flags


def test_growth_planted_in_a_real_run_is_flagged(
    compared: tuple[Path, list[str]], llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = compared
    table = read(folder)
    sign = math.copysign(1.0, table.drop_duplicates("sample_id")["delta_logit_base"].mean())
    table.loc[table["head"] == 1, ["head_effect", "delta_logit_head"]] += 5 * sign
    table.to_csv(tmp_path / "before.csv", index=False)
    finish(llama, folder, *flags, "--compare", str(tmp_path / "before.csv"))
    heads = read(folder, "circuit_heads.csv").set_index("label")
    flagged = heads["growth_flag"].astype(bool).to_dict()
    assert flagged == {"L2H0": False, "L2H1": True, "L2H2": False}
    assert heads.loc["L2H1", "growth_mean"] == pytest.approx(5)
    assert "L2H1" in capsys.readouterr().out.split("role grew")[1].splitlines()[0]


def test_a_run_of_another_op_is_compared_by_its_ranking(
    compared: tuple[Path, list[str]], llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = compared
    other = str(folder / "circuit_results.csv")
    finish(llama, tmp_path, *flags, "--op", "mean", "--compare", other)
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "Spearman" in text)
    assert "mean here, zero in" in line
    means = [read(path).groupby("head")["head_effect"].mean() for path in (tmp_path, folder)]
    expected = means[0].rank().corr(means[1].rank())
    assert float(line.split()[-1]) == pytest.approx(expected, abs=1e-3)


def test_a_comparison_that_shares_nothing_is_refused_before_the_model_is_loaded(
    llama: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "load_model", lambda *a: pytest.fail("weights were loaded"))
    foreign = str(tmp_path / "foreign.csv")
    results({"L2H0": steps(0.1)}).to_csv(foreign, index=False)  # s000 ... is no s0000
    flags = ["--num_samples", "2", "--layers", "2", "--compare", foreign]
    code, _, error = answer("--model_id", llama, "--output_dir", str(tmp_path / "out"), *flags)
    assert code == 2
    assert foreign in error
    assert len(error.strip().splitlines()) == 1

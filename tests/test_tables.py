"""What the tables hold: by hand, recomputed from a run's files, and where nothing is there."""

from __future__ import annotations

import functools
import logging
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import Effects, q_values, results, steps
from conftest import Answer, finish, read, record_of, refuses, write_samples

CONFIG = tracing.Config()
SCORES = ["score_a_base", "score_b_base", "score_a_head", "score_b_head"]
NUMBERS = ["delta_logit_base", "delta_logit_head", "head_effect", *SCORES]
FIRST = ["sample_id", "n_constraints", "layer", "head", *NUMBERS]
CONTROLS = ["score_other_base", "score_other_head", "score_affirm_base", "score_affirm_head"]
CONTROLS += ["effect_minus_other", "effect_minus_affirm"]
RUN = ["kind", "op", "positions", "task", "patch_into", "method", "factor", "along"]  # all rows
LAST = ["unit", "group", "prompts", "index", *RUN, "estimate", "n_screened"]
INTERVAL = ["mean", "ci_low", "ci_high", "p", "q"]
STATISTICS = ["n_samples", "n_sentences", "mean", "median", "sd", "skewness", *INTERVAL[1:]]
PLAIN, CONTROLLED = "--num_samples 6", "--num_samples 6 --controls"
GOLF = {"sentence": "Name a sport.", "targets": ["golf"]}


Runs = Callable[[str], Path]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def run_of(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a run with some flags, done once."""
    return functools.cache(
        lambda flags: finish(llama, tmp_path_factory.mktemp("run"), *flags.split())
    )


def find(
    table: pd.DataFrame, floor: float = math.nan, config: tracing.Config = CONFIG
) -> tuple[dict[str, float], pd.DataFrame]:
    """The base's statistics and the findings per component."""
    bases = tracing.find_bases(table)
    return bases["b"], tracing.heads_table(table, bases, floor, config.factor)


def of_effects(table: pd.DataFrame) -> pd.DataFrame:
    return tracing.column_statistics(table, "head_effect")


# ----- results per sample and component


def swept(*rows: tuple[str, int, int, float, float]) -> pd.DataFrame:
    """Rows of sample_id, layer, index and the scores of a and b with the edit."""
    names = ["sample_id", "layer", "index", "score_a_head", "score_b_head"]
    table = pd.DataFrame(rows, columns=names).assign(draw=-1)
    return table.astype({"sample_id": pd.CategoricalDtype(sorted(set(table["sample_id"])))})


def record(sample_id: str, a: float, b: float, **more: Any) -> dict[str, Any]:
    prompts = {"a": {"score": a}, "b": {"score": b}}
    values = {"targets": ["x", "y"], "unit": "u", "group": "", "prompts": prompts}
    values["prompts_id"] = f"id of {sample_id}"
    return {"sample_id": sample_id, **values, **more}


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
    names = ["sample_id", "layer", "index", "score_a_head", *SCORES[:2], "unit", "group", "prompts"]
    assert table[names].to_numpy().tolist() == [
        ["s", 0, 11, -4, 7, 2, "u", "", "id of s"],
        ["s", 1, 9, -3, 7, 2, "u", "", "id of s"],
        ["s", 1, 10, -2, 7, 2, "u", "", "id of s"],
        ["t", 1, 0, -1, 5, 1, "v", "g", "id of t"],
    ]


def written(path: Path, index: int, **options: Any) -> list[list[str]]:
    """The header and the only row of results of a component with some options."""
    config = tracing.Config(**options)
    table = tracing.results_table(swept(("s", 1, index, 0, 0)), [record("s", 0, 0)], config)
    tracing.write_components(path, table.drop(columns="draw"))
    return [line.split(",") for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "index", "head", "index_cell"),
    [("head", 3, "3", "3"), ("neuron", 70, "", "70")]
    + [(kind, -1, "", "") for kind in ("attn", "mlp", "resid")],
)
def test_the_columns_of_the_component_come_after_all_scores_and_head_is_for_heads_only(
    kind: str, index: int, head: str, index_cell: str, tmp_path: Path
) -> None:
    names, row = written(tmp_path / "t.csv", index, kind=kind)
    assert names == [*FIRST, *LAST]
    assert row[names.index("head")] == head
    assert row[names.index("index")] == index_cell
    assert row[names.index("kind")] == kind


INTO_B = {"op": "patch", "patch_into": "b", "positions": "last", "task": "refusal"}
OF_RUN: dict[str, dict[str, Any]] = {  # by the end of a row what is asked for
    "zero,all,suppression,,exact,,": {},
    "scale,all,suppression,,exact,0.5,": {"op": "scale", "factor": 0.5},
    "patch,all,suppression,a,exact,,": {"op": "patch"},
    "patch,last,refusal,b,exact,,": INTO_B,
    "zero,all,suppression,,exact,,of.safetensors": {"along": "some/where/of.safetensors"},
}


@pytest.mark.parametrize("cells", OF_RUN)
def test_the_last_columns_tell_what_was_done_and_leave_empty_what_does_not_apply(
    cells: str, tmp_path: Path
) -> None:
    _, row = written(tmp_path / "t.csv", 3, **OF_RUN[cells])
    assert ",".join(row).endswith(f",head,{cells},,")


def test_prompts_name_the_two_texts_and_the_words_whatever_the_sample_is_called(
    llama: str, tmp_path: Path
) -> None:
    """Same texts and words: same id; another text or other words: another."""
    sport = {**GOLF, "sentence": "Name a good sport."}
    again, words = {**GOLF, "sample_id": "again"}, {**GOLF, "targets": ["golf", "tennis"]}
    samples = write_samples(tmp_path / "mine.jsonl", GOLF, sport, again, words)
    folder = finish(llama, tmp_path / "out", "--samples", samples, "--layers", "0", "--heads", "0")
    prompts_ids = read(folder).set_index("sample_id")["prompts"].to_dict()
    assert prompts_ids["line00001"] == prompts_ids["again"]
    assert len({*prompts_ids.values()}) == len(prompts_ids) - 1 == 3
    assert prompts_ids == {s["sample_id"]: s["prompts_id"] for s in record_of(folder)["samples"]}


@pytest.mark.parametrize("task", ["suppression", "refusal", "odd_one_out"])
def test_every_row_of_a_run_recomputes_from_its_raw_scores(task: str, run_of: Runs) -> None:
    table = read(run_of(f"--task {task} --num_samples 5 --layers 1 --heads 0,2"))
    assert len(table) == 5 * 2
    base = table["score_a_base"] - table["score_b_base"]
    head = table["score_a_head"] - table["score_b_head"]
    assert (table["delta_logit_base"] - base).abs().max() < 1e-9
    assert (table["delta_logit_head"] - head).abs().max() < 1e-9
    assert (table["head_effect"] - (head - base)).abs().max() < 1e-9
    assert table["head_effect"].abs().min() > 1e-4
    negative = table[table["group"] == tracing.NO_ODD_ONE]  # in the results, if in no statistic
    assert set(negative["sample_id"]) == ({"s0004"} if task == "odd_one_out" else set())


# ----- columns of controls


def test_control_columns_come_between_and_change_none_of_those_before(
    run_of: Runs,
) -> None:
    plain, controlled = read(run_of(PLAIN)), read(run_of(CONTROLLED))
    assert list(plain) == [*FIRST, *LAST]
    assert list(controlled) == [*FIRST, *CONTROLS, *LAST]
    assert controlled[[*FIRST[:4], *LAST]].equals(plain[[*FIRST[:4], *LAST]])
    assert (controlled[NUMBERS] - plain[NUMBERS]).abs().max(axis=None) < 2e-5


def test_control_effects_recompute_from_the_raw_scores(run_of: Runs) -> None:
    table = read(run_of(CONTROLLED))
    assert len(table) == 6 * 12
    assert not table[CONTROLS].isna().any(axis=None)
    for side in ("other", "affirm"):
        base = table[f"score_{side}_base"] - table["score_b_base"]
        head = table[f"score_{side}_head"] - table["score_b_head"]
        expected = table["head_effect"] - (head - base)
        assert (table[f"effect_minus_{side}"] - expected).abs().max() < 1e-9
        assert table.groupby("sample_id")[f"score_{side}_base"].nunique().eq(1).all()


def test_control_prompts_score_as_the_naive_oracle_says(run_of: Runs, llama: str) -> None:
    (model, tokenizer), folder = naive.load(llama), run_of(CONTROLLED)
    texts, targets = by_hand.texts(folder), by_hand.targets_of(folder)
    heads = pd.DataFrame([(0, 2), (2, 1)], columns=["layer", "head"])
    for row in read(folder).merge(heads).query("sample_id < 's0002'").to_dict("records"):
        for side in ("other", "affirm"):
            arguments = tokenizer, texts[row["sample_id"]][side], targets[row["sample_id"]]
            base = naive.suppression_score(model, *arguments)
            with by_hand.ablated(model, [f"L{row['layer']}H{row['head']}"]):
                edited = naive.suppression_score(model, *arguments)
            scores = [row[f"score_{side}_{run}"] for run in ("base", "head")]
            assert scores == pytest.approx([base, edited], abs=2e-5)


def test_a_sample_without_controls_leaves_their_columns_empty(llama: str, tmp_path: Path) -> None:
    long = {"sample_id": "long", "prompt_a": "Never say owl! Name a bird."}
    long |= {"prompt_b": "Name a bird.", "targets": ["owl"]}
    iron = {"sentence": "Name a metal.", "targets": ["iron", "zinc"]}
    samples = write_samples(tmp_path / "mine.jsonl", long, GOLF, iron)
    folder = finish(llama, tmp_path, "--samples", samples, "--controls", "--layers", "0")
    table, heads = read(folder), read(folder, "circuit_heads.csv")
    empty = (table["sample_id"] == "long").tolist()
    assert all(table[name].isna().tolist() == empty for name in CONTROLS)
    assert not table[NUMBERS].isna().any(axis=None)
    counts = ["n_samples", "minus_other_n_samples", "minus_other_n_sentences"]
    assert heads[counts].to_numpy().tolist() == [[3, 2, 2]] * 4


def test_a_control_that_no_sample_has_is_in_no_finding(llama: str, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "mine.jsonl", GOLF)  # no other's words to forbid
    folder = finish(llama, tmp_path, "--samples", samples, "--controls", "--layers", "0")
    empty, heads = read(folder)[CONTROLS].isna(), read(folder, "circuit_heads.csv")
    assert empty.all().to_dict() == empty.any().to_dict() == {c: "other" in c for c in CONTROLS}
    assert [f"minus_{side}_mean" in heads for side in ("affirm", "other")] == [True, False]


# ----- noise floor


def test_the_noise_floor_by_hand() -> None:
    """Mean effects of 1 to 5."""
    moved = [(f"s{i}", draw, draw + 1.0) for i in range(2) for draw in range(5)]
    table = pd.DataFrame(moved, columns=["sample_id", "draw", "head_effect"])
    table = table.assign(layer=0, kind="head", index=3, group="")
    effect, negative = table["head_effect"], {"sample_id": "n", "group": tracing.NO_ODD_ONE}
    negative |= {"head_effect": 50.0}
    opposite = effect.where(table["sample_id"] == "s0", -effect)
    floor = tracing.noise_floor
    assert floor(table) == floor(table.assign(head_effect=-effect)) == pytest.approx(4.8)
    assert floor(pd.concat([table, table.assign(**negative)])) == pytest.approx(4.8)
    assert floor(table.assign(head_effect=opposite)) == pytest.approx(0)
    assert math.isnan(floor(table.head(0)))


# ----- how many tests q corrects for


@pytest.mark.parametrize(
    ("columns", "n_tests"),
    [
        ({}, 3),
        ({"n_screened": 40.0}, 40),
        ({"n_screened": math.nan}, 3),
        ({"n_screened": math.nan, "n_tests": 12}, 12),
        ({"n_screened": 40.0, "n_tests": 768}, 768),
        ({"n_screened": 40.0, "n_tests": 12}, 40),
        ({"n_tests": 2}, 3),
    ],
)
def test_q_corrects_for_the_most_that_a_table_tells_of(
    columns: dict[str, float], n_tests: int
) -> None:
    """Its own components, those of its screen, those of a wider table before it."""
    table = results({f"L0H{head}": steps(head - 1.0) for head in range(3)}).assign(**columns)
    assert tracing.count_tests(table) == n_tests
    heads = find(table)[1]
    assert set(heads["n_tests"]) == {n_tests}
    p = heads["p"].tolist()
    assert heads["q"].tolist() == pytest.approx(q_values([*p, *[1.0] * (n_tests - 3)])[:3])


# ----- statistics per component: sentences are the units


def test_the_statistics_of_a_component_by_hand() -> None:
    table = results({"L0H0": [0.1, 0.2, 0.6, 0.3], "L0H1": [0.4, -0.4, 0.4, -0.4]})
    computed = of_effects(table)
    assert list(computed) == STATISTICS
    first, second = computed.to_dict("records")
    assert (first["n_samples"], first["n_sentences"]) == (4, 4)
    assert first["mean"] == pytest.approx(0.3)
    assert first["median"] == pytest.approx(0.25)
    assert first["sd"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09 + 0) / 3))
    assert first["ci_low"] < 0.3 < first["ci_high"]
    assert (first["p"], first["q"]) == (2 / 16, 2 * 2 / 16)
    assert (second["p"], second["q"]) == (1.0, 1.0)


def test_samples_of_one_sentence_are_no_further_evidence() -> None:
    """Every sample twice under its sentence changes no interval and no p; as sentences it does."""
    rng = random.Random(5)
    effects, deltas = by_hand.noise(rng, 8, 6), [rng.gauss(-1, 0.5) for _ in range(8)]
    twice = {label: [*of_head, *of_head] for label, of_head in effects.items()}
    single, names = results(effects, deltas), ["skewness", *INTERVAL]
    double = results(twice, deltas * 2, [f"u{i:03d}" for i in range(8)] * 2)
    one, two, copied = (of_effects(table) for table in (single, double, results(twice, deltas * 2)))
    assert (two[["n_samples", "n_sentences"]] == [16, 8]).all(axis=None)
    pd.testing.assert_frame_equal(two[names], one[names])
    assert (copied["ci_high"] - copied["ci_low"] < one["ci_high"] - one["ci_low"]).all()
    assert copied["p"].tolist() != pytest.approx(one["p"].tolist())
    of_one, of_two = (tracing.base_statistics(table) for table in (single, double))
    assert [of_two[name] for name in names] == pytest.approx([of_one[name] for name in names])
    assert of_one["mean"] == pytest.approx(statistics.fmean(deltas))
    assert of_one["ci_low"] < of_one["mean"] < of_one["ci_high"]


def test_cells_that_a_table_lacks_are_left_out() -> None:
    effects = by_hand.noise(random.Random(2), 6, 3)
    table = results(effects)
    holes = table[(table["head"] != 1) | ~table["sample_id"].isin(["s001", "s004"])]
    full, partial = of_effects(table), of_effects(holes)
    present = [effects["L0H1"][i] for i in (0, 2, 3, 5)]
    row, alone = partial.iloc[1], of_effects(results({"L0H1": present})).iloc[0]
    assert (row["n_samples"], row["n_sentences"]) == (4, 4)
    assert row["mean"] == pytest.approx(statistics.fmean(present))
    assert row["sd"] == pytest.approx(statistics.stdev(present))
    names = ["skewness", *INTERVAL[:-1]]
    assert row[names].tolist() == pytest.approx(alone[names].tolist())
    assert partial.iloc[[0, 2]].drop(columns="q").equals(full.iloc[[0, 2]].drop(columns="q"))
    lone = of_effects(table[(table["head"] != 1) | (table["sample_id"] == "s003")]).iloc[1]
    assert (lone["n_sentences"], lone["p"]) == (1, 1.0)
    assert lone[["ci_low", "ci_high"]].isna().all()


def test_negative_controls_do_not_enter_the_statistics() -> None:
    table = results(by_hand.noise(random.Random(2), 6, 3))
    negative = results({f"L0H{h}": [9.0] * 2 for h in range(3)}, 7.0)
    negative = negative.assign(group=tracing.NO_ODD_ONE, sample_id="n" + negative["sample_id"])
    (base, heads), (plain_base, plain_heads) = find(pd.concat([table, negative])), find(table)
    assert base == plain_base
    pd.testing.assert_frame_equal(heads, plain_heads)


# ----- roles and verdicts


@pytest.mark.parametrize(
    ("base", "effect", "verdict"),
    [
        (-1.0, 0.3, "contributes"),  # suppression; without the head the word is likelier
        (-1.0, -0.3, "works against"),
        (1.0, -0.3, "contributes"),  # rebound, or another task
        (1.0, 0.3, "works against"),
    ],
)
def test_an_effect_among_noise_is_found_and_its_role_follows_the_sign_of_the_base(
    base: float, effect: float, verdict: str
) -> None:
    rng = random.Random(0)
    effects = dict(by_hand.noise(rng, 16, 32, 0.05))
    effects["L0H3"] = [moved + effect for moved in effects["L0H3"]]
    of_base, heads = find(results(effects, [base + rng.gauss(0, 0.3) for _ in range(16)]))
    assert heads["verdict"].tolist() == [verdict if i == 3 else "unclear" for i in range(32)]
    assert heads["label"][3] == "L0H3"
    assert (heads["role"][3] > 0) == (verdict == "contributes")
    assert heads["role"].tolist() == (-math.copysign(1, base) * heads["mean"]).tolist()
    moved = (-heads["mean"] / of_base["mean"]).tolist()
    assert heads["share_moved"].tolist() == pytest.approx(moved)


@pytest.mark.parametrize(
    ("base", "units"),
    [([0.9, -1.0] * 8, None), ([-1.0] * 16, ["u"] * 16)],
    ids=["its interval covers 0", "a single sentence"],
)
def test_no_verdict_is_given_where_the_base_is_not_clear(
    base: list[float], units: list[str] | None
) -> None:
    of_base, heads = find(results({"L0H0": [1.0] * 16, "L0H1": [0.01] * 16}, base, units))
    assert not (of_base["ci_low"] > 0 or of_base["ci_high"] < 0)
    assert heads["p"].tolist() == [1.0 if units else 2**-15] * 2
    assert heads["verdict"].tolist() == ["unclear", "unclear"]


def test_above_noise_is_a_mean_effect_beyond_the_floor_in_either_direction() -> None:
    moved = (0.2, -0.2, 0.05, -0.05)
    table = results({f"L0H{i}": [effect] * 16 for i, effect in enumerate(moved)})
    heads = find(table, 0.1)[1]
    assert heads["above_noise"].tolist() == [True, True, False, False]
    assert (heads["q"] < 0.05).all()
    assert heads["verdict"].tolist() == ["contributes", "works against", "unclear", "unclear"]
    unknown = find(table)[1]
    assert unknown["above_noise"].isna().all()
    assert unknown["verdict"].tolist() == ["contributes", "works against"] * 2


@pytest.mark.parametrize(("floor", "share"), [(math.nan, 0.25), (0.9, 0.25), (1.1, math.nan)])
def test_the_share_moved_is_empty_where_the_base_is_below_the_floor(
    floor: float, share: float
) -> None:
    heads = find(results({"L0H0": [0.25] * 8}, -1.0), floor)[1]
    assert heads["share_moved"].tolist() == pytest.approx([share], nan_ok=True)


@pytest.mark.parametrize("floor", [math.nan, 0.0, 0.1])
def test_a_mean_base_of_exactly_zero_leaves_cells_empty(floor: float) -> None:
    heads = find(results({"L0H0": [0.25] * 8}, [1.0, -1.0] * 4), floor)[1]
    assert heads["share_moved"].isna().all()
    assert heads["verdict"].tolist() == ["unclear"]


@pytest.mark.parametrize("base", [-1.0, 1.0])
@pytest.mark.parametrize("factor", [-2.0, -0.5, 0.0, 0.5, 0.99, 1.01, 1.5, 3.0])
def test_a_component_has_one_role_whatever_factor_it_is_scaled_by(
    factor: float, base: float
) -> None:
    """A head that writes half of the base, and one that writes as much against it."""
    moved = (factor - 1) * base / 2
    config = tracing.Config(op="scale", factor=factor)
    heads = find(results({"L0H0": [moved] * 8, "L0H1": [-moved] * 8}, base), config=config)[1]
    assert heads["role"].tolist() == pytest.approx([abs(moved), -abs(moved)])


def test_effects_that_are_all_zero_give_no_verdict_and_no_nan() -> None:
    heads = find(results({"L0H0": [0.0] * 6, "L0H1": [0.0] * 6}))[1]
    assert heads["p"].tolist() == [1.0, 1.0]
    assert heads["verdict"].tolist() == ["unclear", "unclear"]
    assert heads[["mean", "ci_low", "ci_high"]].to_numpy().tolist() == [[0.0] * 3] * 2


def test_where_nothing_is_there_few_tables_show_anything() -> None:
    """The global null, two samples to a sentence that share most of their noise: the share of
    tables with any verdict is the false-discovery rate. Heads share noise as well. Each layer
    stands for a table of its own."""
    rng, effects, n_tables = random.Random(0), {}, 120
    for n in range(n_tables):
        common = [rng.gauss(0, 0.5) for _ in range(10)]
        for h in range(8):
            of_head = [one + rng.gauss(0, 1) for one in common]
            effects[f"L{n}H{h}"] = [one + rng.gauss(0, 0.3) for one in of_head * 2]
    ps = of_effects(results(effects, -5.0, [f"u{i % 10}" for i in range(20)]))["p"].tolist()
    n_with_verdict = sum(min(by_hand.q_values(ps[i : i + 8])) < 0.05 for i in range(0, len(ps), 8))
    assert 0 < n_with_verdict / n_tables <= 0.08  # the level is used, not only kept


def test_among_real_effects_few_of_the_discoveries_are_false() -> None:
    rng, shares = random.Random(1), []
    real = {f"L0H{h}" for h in range(8)}
    for _ in range(25):
        effects = dict(by_hand.noise(rng, 16, 40, 1.0))
        effects |= {label: [moved + 1.5 for moved in effects[label]] for label in real}
        heads = find(results(effects))[1]
        called = set(heads["label"][heads["verdict"] != "unclear"])
        shares.append(len(called - real) / max(1, len(called)))
        assert len(called & real) >= 4
    assert statistics.fmean(shares) <= 0.06


# ----- a row per component

CONTRASTS = {"": "head_effect", "minus_other_": "effect_minus_other"}
CONTRASTS |= {"minus_affirm_": "effect_minus_affirm"}


@pytest.mark.parametrize("prefix", CONTRASTS)
def test_circuit_heads_recomputes_from_circuit_results(prefix: str, run_of: Runs) -> None:
    column, table = CONTRASTS[prefix], read(run_of(CONTROLLED))
    heads, by_unit = read(run_of(CONTROLLED), "circuit_heads.csv"), {}
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(3) for j in range(4)]
    for head in heads.to_dict("records"):
        rows = table[(table["layer"] == head["layer"]) & (table["head"] == head["head"])]
        effects, mean = rows[column].tolist(), head[f"{prefix}mean"]
        assert head[f"{prefix}n_samples"] == len(effects) == 6
        assert mean == pytest.approx(statistics.fmean(effects))
        assert head[f"{prefix}median"] == pytest.approx(statistics.median(effects))
        assert head[f"{prefix}sd"] == pytest.approx(statistics.stdev(effects))
        assert head[f"{prefix}ci_low"] < mean < head[f"{prefix}ci_high"]
        by_unit[head["label"]] = rows.groupby("unit")[column].agg(["sum", "count"])
    sums, counts = (
        torch.tensor([of_head[part].tolist() for of_head in by_unit.values()]).double().T
        for part in ("sum", "count")
    )
    ps = tracing.mean_test(sums, counts).tolist()
    assert heads[f"{prefix}p"].tolist() == pytest.approx(ps)
    assert heads[f"{prefix}q"].tolist() == pytest.approx(by_hand.q_values(ps))
    assert (heads[f"{prefix}n_sentences"] == table["unit"].nunique()).all()
    side = prefix.split("_")[1] if prefix else "b"
    first = table.drop_duplicates("sample_id")
    base = (first["score_a_base"] - first[f"score_{side}_base"]).mean()
    roles = -math.copysign(1, base) * heads[f"{prefix}mean"]
    assert heads[f"{prefix}role"].tolist() == pytest.approx(roles.tolist())


@pytest.mark.parametrize("side", ["other", "affirm"])
def test_an_effect_less_that_of_a_control_is_judged_as_any_other(side: str) -> None:
    effects, bases = by_hand.noise(random.Random(4), 8, 3), steps(-2.0)
    table = results(by_hand.noise(random.Random(5), 8, 3))
    heads = find(by_hand.with_control(table, side, effects, bases))[1]
    alone = find(results(effects, bases))[1]
    judged = [*STATISTICS, "role", "above_noise", "verdict"]
    contrast = heads[[f"minus_{side}_{name}" for name in judged]].set_axis(judged, axis=1)
    pd.testing.assert_frame_equal(contrast, alone[judged])
    (absent,) = {"other", "affirm"} - {side}
    assert not any(name.startswith(f"minus_{absent}") for name in heads)


EFFECT = {"L0H0": steps(0.5), "L0H1": steps(-0.5)}
BOTH = ["contributes", "works against"]


@pytest.mark.parametrize("side", ["other", "affirm"])
@pytest.mark.parametrize("base", [-2.0, 2.0])
def test_a_contrast_has_the_role_that_its_own_base_gives_it(base: float, side: str) -> None:
    """Prompt a is below b, and above the control: one effect has two roles."""
    plain = results(EFFECT, steps(base))
    heads = find(by_hand.with_control(plain, side, EFFECT, steps(-base)))[1]
    roles, contrasts = heads["role"], heads[f"minus_{side}_role"]
    assert roles.tolist() == pytest.approx((-contrasts).tolist())
    assert roles[0] == pytest.approx(-math.copysign(statistics.fmean(EFFECT["L0H0"]), base))
    verdicts = BOTH if base < 0 else BOTH[::-1]
    assert heads["verdict"].tolist() == verdicts
    assert heads[f"minus_{side}_verdict"].tolist() == verdicts[::-1]


@pytest.mark.parametrize("unclear", ["b", "other"])
def test_a_verdict_needs_its_own_base_to_be_clear_and_no_other(unclear: str) -> None:
    bases = {side: [0.9, -1.0] * 4 if side == unclear else steps(-2.0) for side in ("b", "other")}
    plain = results(EFFECT, bases["b"])
    heads = find(by_hand.with_control(plain, "other", EFFECT, bases["other"]))[1]
    for side, prefix in {"b": "", "other": "minus_other_"}.items():
        assert (heads[f"{prefix}q"] < 0.05).all()
        expected = ["unclear"] * 2 if side == unclear else BOTH
        assert heads[f"{prefix}verdict"].tolist() == expected


def test_a_contrast_without_the_scores_of_its_base_is_not_judged() -> None:
    table = results(EFFECT)
    heads = find(table.assign(effect_minus_other=table["head_effect"]))[1]
    assert not any(name.startswith("minus_") for name in heads)


def test_the_statistics_of_a_base_that_a_table_lacks_are_empty() -> None:
    table = by_hand.with_control(results(EFFECT), "other", EFFECT, steps(1.0))
    assert tracing.base_statistics(table, "affirm") == {}
    assert tracing.base_statistics(table, "other")["mean"] == pytest.approx(1.035)
    assert tracing.base_statistics(table)["mean"] == -1.0


# ----- what an edit moves after either prompt


def test_moved_is_the_mean_change_of_each_prompts_score() -> None:
    table = results({"L0H0": steps(0.4), "L0H1": steps(-0.1)})
    on_b = table["head"].map({0: 0.25, 1: -1.0})
    table = table.assign(score_a_base=-3.0, score_b_base=-2.0, score_b_head=on_b - 2)
    table["score_a_head"] = table["head_effect"] + on_b - 3
    negative = table.assign(group=tracing.NO_ODD_ONE, score_a_head=9.0)
    negative["sample_id"] = "n" + negative["sample_id"]
    heads = find(pd.concat([table, negative]))[1]
    assert heads["moved_a"].tolist() == pytest.approx([0.435 + 0.25, -0.065 - 1])
    assert heads["moved_b"].tolist() == pytest.approx([0.25, -1])


def test_moved_is_absent_where_a_table_lacks_a_score() -> None:
    table = by_hand.with_control(results(EFFECT), "other", EFFECT, -1.0)
    assert {"moved_a", "moved_b"} <= {*find(table)[1]}
    for name in SCORES:
        assert not {"moved_a", "moved_b"} & {*find(table.drop(columns=name))[1]}


def test_moved_a_less_moved_b_is_the_effect_of_a_run(run_of: Runs) -> None:
    heads = read(run_of(PLAIN), "circuit_heads.csv")
    moved = heads["moved_a"] - heads["moved_b"]
    assert moved.tolist() == pytest.approx(heads["mean"].tolist())
    assert heads["moved_b"].abs().min() > 1e-6


# ----- comparison with another run


@pytest.fixture()
def findings_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, with all that it says of findings."""
    caplog.set_level(logging.INFO, "circuit")
    return caplog


def compared(
    table: pd.DataFrame, other: pd.DataFrame, floor: float = 0.1, op: str = "zero"
) -> pd.DataFrame:
    """The findings by label beside those of another run, without a factor unless it tells one."""
    config = tracing.Config(op=op, compare="other.csv")
    other = pd.DataFrame({"factor": math.nan, **other}, index=other.index)
    heads = find(table, floor, config)[1]
    return tracing.compare_runs(table, other, heads, floor, config).set_index("label")


def compare(
    now: Effects, before: Effects, base: float = -2.0, floor: float = 0.1, op: str = "zero"
) -> pd.DataFrame:
    """The same of two runs on the same eight samples, of which the other is of --op zero."""
    bases = [base + 0.1 * i for i in range(8)]
    return compared(results(now, bases, op=op), results(before, bases), floor, op)


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(
    ("grown", "floor", "flagged"),
    [
        ([1.0 + 0.1 * i for i in range(8)], 0.1, True),
        ([-1.0 - 0.1 * i for i in range(8)], 0.1, False),
        ([0.05] * 8, 0.1, False),
        ([0.05] * 8, math.nan, True),
        ([2.0] * 4 + [-0.5] * 4, 0.1, False),
    ],
    ids=["grew", "shrank", "below the floor", "no floor is known", "in some sentences only"],
)
def test_a_role_that_grew_beyond_the_floor_is_flagged(
    grown: list[float],
    floor: float,
    flagged: bool,
    base: float,
    findings_log: pytest.LogCaptureFixture,
) -> None:
    sign = -math.copysign(1.0, base)  # of the role against the effect
    before = {f"L1H{h}": steps(0.3 * h) for h in range(3)}
    moved = [e + sign * by for e, by in zip(before["L1H2"], grown, strict=True)]
    heads = compare({**before, "L1H2": moved}, before, base, floor)
    assert heads["growth_flag"].astype(bool).tolist() == [False, False, flagged]
    expected = [0, 0, statistics.fmean(grown)]
    assert heads["growth_mean"].tolist() == pytest.approx(expected, abs=1e-9)
    p = float(tracing.mean_test(torch.tensor(grown)[:, None].double(), torch.ones(8, 1).double()))
    growth = heads.loc["L1H2", ["growth_p", "growth_q"]].tolist()
    assert growth == pytest.approx([p, min(1, 3 * p)])  # one of three tests
    (line,) = (text for text in findings_log.messages if text.startswith("role grew"))
    assert line.endswith(": L1H2" if flagged else ": none")


RANKED = {  # by agreement the effects of four heads, now and before
    "0.800": ([1.0, 2.0, 3.0, 4.0], [1.0, 30.0, 20.0, 400.0]),
    # ranks 1 2.5 2.5 4 and 1 3 2 4: 4.5 / sqrt(4.5 * 5)
    "0.949": ([1.0, 2.0, 2.0, 4.0], [10.0, 30.0, 20.0, 400.0]),
    "-1.000": ([1.0, 2.0, 2.0, 4.0], [4.0, 3.0, 3.0, 1.0]),
}


@pytest.mark.parametrize("agreement", RANKED)
@pytest.mark.parametrize("op", ["zero", "mean"])
def test_the_rankings_agree_by_spearman_and_growth_is_of_one_op_only(
    op: str, agreement: str, findings_log: pytest.LogCaptureFixture
) -> None:
    now, before = ({f"L0H{h}": steps(e) for h, e in enumerate(es)} for es in RANKED[agreement])
    heads = compare(now, before, op=op)
    assert findings_log.messages[0] == "shared with other.csv: 4 components and 8 of 8 sentences"
    assert f"({op} here, zero in other.csv): {agreement}" in findings_log.messages[1]
    assert ("growth_mean" in heads) == (op == "zero")


@pytest.mark.parametrize("end", ["mlp", "N7"])
def test_runs_of_components_without_heads_are_compared(end: str) -> None:
    before = {f"L{n}{end}": steps(0.1 * n) for n in range(3)}
    heads = compare({**before, f"L1{end}": steps(2.0)}, before)
    assert heads["growth_flag"].astype(bool).tolist() == [False, True, False]


def test_growth_planted_in_a_real_run_is_flagged(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under other sample_ids."""
    flags = ["--num_samples", "8", "--layers", "2", "--heads", "0-2"]
    table = read(finish(tiny_llama, tmp_path, *flags))
    sign = math.copysign(1.0, table.drop_duplicates("sample_id")["delta_logit_base"].mean())
    grown = ["head_effect", "delta_logit_head", "score_a_head"]
    table.loc[table["head"] == 1, grown] += 5 * sign
    table["sample_id"] = table["sample_id"].map(lambda name: f"s{7 - int(name[1:])}")
    table.to_csv(tmp_path / "before.csv", index=False)
    again = [*flags, "--compare", str(tmp_path / "before.csv")]
    heads = read(finish(tiny_llama, tmp_path, *again), "circuit_heads.csv")
    assert heads["growth_flag"].astype(bool).tolist() == [False, True, False]
    assert heads["growth_mean"].tolist() == pytest.approx([0, 5, 0], abs=1e-5)
    assert "L2H1" in capsys.readouterr().out.split("role grew")[1].splitlines()[0]
    finish(tiny_llama, tmp_path / "mean", *again, "--op", "mean")
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "Spearman" in text)
    means = [t.groupby("head")["head_effect"].mean() for t in (read(tmp_path / "mean"), table)]
    expected = means[0].rank().corr(means[1].rank())
    assert "mean here, zero in" in line
    assert float(line.split()[-1]) == pytest.approx(expected, abs=1e-3)


def test_samples_are_paired_by_their_prompts_whatever_they_are_called(
    findings_log: pytest.LogCaptureFixture,
) -> None:
    """Effects differ by sample more than by head: other pairs would tell of growth."""
    now = {f"L0H{h}": [5.0 * i + h for i in range(8)] for h in range(3)}
    table = results(now).astype({"prompts": "category", "unit": "category"})
    other = results({**now, "L0H1": [moved - 0.5 for moved in now["L0H1"]]})
    ids = list(table["sample_id"].unique())
    renamed = other["sample_id"].map(dict(zip(ids, reversed(ids), strict=True)))
    comparisons = [
        compared(table, other_run) for other_run in (other, other.assign(sample_id=renamed))
    ]
    assert [line[-7:] for line in findings_log.messages if "Spearman" in line] == [": 1.000"] * 2
    pd.testing.assert_frame_equal(*comparisons)
    assert comparisons[1]["growth_mean"].tolist() == [0, 0.5, 0]
    assert comparisons[1]["growth_flag"].tolist() == [False, True, False]


def test_samples_of_other_prompts_are_no_pairs_and_units_need_not_agree(
    findings_log: pytest.LogCaptureFixture,
) -> None:
    table = results(EFFECT)
    prompts = table["prompts"].replace("p00[0-3]", "x", regex=True)
    other = table.assign(prompts=prompts, unit="other " + table["unit"])
    half = [statistics.fmean(EFFECT[label][4:]) for label in EFFECT]
    heads = compared(table, other.assign(head_effect=0.0))
    assert heads["growth_mean"].tolist() == pytest.approx(half)
    for run, other_run in ((table, other.assign(prompts="x")), (table.assign(prompts=""),) * 2):
        with pytest.raises(tracing.UsageError, match=r"other.csv shares no prompt"):
            compared(run, other_run)
    assert "2 components and 4 of 8 sentences" in findings_log.text


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(("factor", "agree"), [(2.0, "-1.000"), (0.5, "1.000")])
def test_an_amplification_ranks_by_its_own_roles(
    factor: float, agree: str, base: float, findings_log: pytest.LogCaptureFixture
) -> None:
    """The same effects, of taking away here and of amplifying there, are opposite roles."""
    effects = {f"L0H{h}": steps(e) for h, e in enumerate([1.0, 2.0, 3.0])}
    other = results(effects, base, op="scale").assign(factor=factor)
    assert "growth_mean" not in compared(results(effects, base), other)
    assert f"(zero here, scale in other.csv): {agree}" in findings_log.text


@pytest.mark.parametrize("unclear", ["here", "there"])
def test_nothing_is_compared_where_a_base_of_the_shared_sentences_is_unclear(
    unclear: str, findings_log: pytest.LogCaptureFixture
) -> None:
    """Though that of all sentences is clear: four of them are shared."""
    clear, mixed = [-2.0 - 0.1 * i for i in range(8)], [2.0, -2.0, 2.5, -2.5, *[-40.0] * 4]
    here, there = (mixed, clear) if unclear == "here" else (clear, mixed)
    heads = compared(results(EFFECT, here), results(EFFECT, there).query("prompts < 'p004'"))
    assert "growth_mean" not in heads and "Spearman" not in findings_log.text
    assert "shared with other.csv: 2 components and 4 of 8 sentences" in findings_log.text
    assert "the interval of a base covers 0" in findings_log.text


def test_negative_controls_are_not_compared(findings_log: pytest.LogCaptureFixture) -> None:
    table = results(EFFECT)
    negative = table.assign(group=tracing.NO_ODD_ONE)
    negative[["sample_id", "prompts", "unit"]] = "n" + negative[["sample_id", "prompts", "unit"]]
    other = negative.assign(head_effect=-9 * negative["head_effect"])
    heads = compared(pd.concat([table, negative]), pd.concat([table, other]))
    assert "zero in other.csv): 1.000" in findings_log.text
    assert "2 components and 8 of 8 sentences" in findings_log.text
    assert heads["growth_mean"].tolist() == [0, 0]


def test_a_single_component_has_no_ranking(findings_log: pytest.LogCaptureFixture) -> None:
    compare({"L0H1": steps(1.0)}, {"L0H1": steps(1.0)})
    assert "1 component and 8 of 8 sentences" in findings_log.text
    assert "Spearman" not in findings_log.text


TWO = "--num_samples 2 --layers 2"
INTO = {"op": "patch", "patch_into": "b"}
SCALED = {"op": "scale", "factor": 2.0}
OTHERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # flags of the run, what the other's columns tell instead, what is said if it is refused
    "task": ("", {"task": "refusal"}, ["task refusal", "suppression"]),
    "kind": ("", {"kind": "neuron", "head": ""}, ["kind neuron", "head"]),
    "positions": ("", {"positions": "last"}, ["positions last", "all"]),
    "patch_into": ("--op patch", INTO, ["patch_into b", "this run a"]),
    "factor": ("--op scale --factor 0.5", SCALED, ["factor 2.0", "0.5"]),
    "other prompts": ("", {"prompts": lambda table: table["sample_id"]}, ["shares no prompt"]),
    "another layer": ("", {"layer": 1}, ["shares no prompt and component"]),
    "mean and zero": ("--op mean", {}, []),
    "scale and zero": ("--op scale --factor 0.5", {}, []),
    "zero and scale": ("", SCALED, []),
    "patch and zero": ("--op patch", {}, []),
    "zero and patch into b": ("", INTO, []),
}


@pytest.mark.parametrize("case", OTHERS)
def test_runs_of_two_ops_are_compared_but_none_that_means_something_else_before_the_weights(
    case: str, llama: str, tmp_path: Path, run_of: Runs, answer: Answer, monkeypatch: Patch
) -> None:
    flags, columns, says = OTHERS[case]
    other = tmp_path / "other.csv"
    read(run_of(TWO)).assign(**columns).to_csv(other, index=False)

    def stop(*_: Any) -> None:
        raise tracing.RunError("weights are loaded")

    monkeypatch.setattr(tracing, "load_model", stop)
    argv = ["--output_dir", str(tmp_path / "out"), *TWO.split(), *flags.split()]
    argv += ["--model_id", llama, "--compare", str(other)]
    if says:
        refuses(answer, *argv, says=[str(other), *says])
    else:
        refuses(answer, *argv, says=["weights are loaded"], code=1)


@pytest.mark.parametrize("column", ["prompts", *RUN[3:]])
def test_a_table_that_does_not_tell_what_it_compares_is_refused_by_the_column(
    column: str, llama: str, tmp_path: Path, run_of: Runs, answer: Answer
) -> None:
    other = tmp_path / "other.csv"
    read(run_of(TWO)).drop(columns=column).to_csv(other, index=False)
    argv = ["--output_dir", str(tmp_path / "out"), *TWO.split(), "--compare", str(other)]
    says = [str(other), f"column {column!r} is missing"]
    refuses(answer, "--model_id", llama, *argv, says=says)

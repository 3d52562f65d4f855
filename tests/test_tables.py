"""What the tables hold: by hand, recomputed from a run's files, and where nothing is there."""

from __future__ import annotations

import functools
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
from by_hand import q_values, results, steps
from conftest import finish, read, record_of, write_samples

OPTIONS = tracing.TraceOptions()
SCORES = ["score_a_base", "score_b_base", "score_a_head", "score_b_head"]
NUMBERS = ["delta_logit_base", "delta_logit_head", "head_effect", *SCORES]
FIRST = ["sample_id", "n_constraints", "layer", "head", *NUMBERS]
CONTROLS = ["score_other_base", "score_other_head", "score_affirm_base", "score_affirm_head"]
CONTROLS += ["effect_minus_other", "effect_minus_affirm"]
RUN = ["kind", "op", "positions", "task", "patch_into", "method", "factor"]  # all rows
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
    table: pd.DataFrame, floor: float = math.nan, factor: float | None = None
) -> tuple[dict[str, float], pd.DataFrame]:
    """The base's statistics and the findings per component."""
    bases = tracing.find_bases(table)
    return bases["b"], tracing.heads_table(table, bases, floor, factor)


def of_effects(table: pd.DataFrame) -> pd.DataFrame:
    return tracing.column_statistics(table, "head_effect")


# ----- results per sample and component


def swept(*rows: tuple[str, int, int, float, float]) -> pd.DataFrame:
    """Rows of sample_id, layer, index and the scores of a and b with the edit."""
    names = ["sample_id", "layer", "index", "score_a", "score_b"]
    return pd.DataFrame(rows, columns=names).assign(draw=-1)


def record(sample_id: str, a: float, b: float, **more: Any) -> dict[str, Any]:
    prompts = {"a": {"score": a}, "b": {"score": b}}
    values = {"targets": ["x", "y"], "unit": "u", "group": "", "prompts": prompts}
    values["prompts_id"] = f"id of {sample_id}"
    return {"sample_id": sample_id, **values, **more}


def test_metric_and_role_by_hand() -> None:
    rows = swept(("s", 2, 5, -2.5, -1.5))
    table = tracing.results_table(rows, [record("s", -5.0, -1.0)], OPTIONS)
    (row,) = table.to_dict("records")
    assert (row["delta_logit_base"], row["delta_logit_head"], row["head_effect"]) == (-4, -1, 3)
    assert (row["layer"], row["head"], row["n_constraints"]) == (2, 5, 2)
    assert find(table)[1]["role"].item() == 3


def test_rows_meet_the_base_scores_of_their_sample_and_are_sorted() -> None:
    rows = swept(("t", 1, 0, -1, 0), ("s", 1, 10, -2, 0), ("s", 1, 9, -3, 0), ("s", 0, 11, -4, 0))
    records = [record("t", 5, 1, unit="v", group="g"), record("s", 7, 2)]
    table = tracing.results_table(rows, records, OPTIONS)
    names = ["sample_id", "layer", "index", "score_a_head", *SCORES[:2], "unit", "group", "prompts"]
    assert table[names].to_numpy().tolist() == [
        ["s", 0, 11, -4, 7, 2, "u", "", "id of s"],
        ["s", 1, 9, -3, 7, 2, "u", "", "id of s"],
        ["s", 1, 10, -2, 7, 2, "u", "", "id of s"],
        ["t", 1, 0, -1, 5, 1, "v", "g", "id of t"],
    ]


def written(path: Path, index: int, **options: Any) -> list[list[str]]:
    """The header and the only row of results of a component with some options."""
    rows = swept(("s", 1, index, 0, 0))
    trace_options = tracing.TraceOptions(**options)
    table = tracing.results_table(rows, [record("s", 0, 0)], trace_options)
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
    "zero,all,suppression,,exact,": {},
    "scale,all,suppression,,exact,0.5": {"op": "scale", "factor": 0.5},
    "patch,all,suppression,a,exact,": {"op": "patch"},
    "patch,last,refusal,b,exact,": INTO_B,
    "zero,all,suppression,,relp,": {"method": "relp"},
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
    assert prompts_ids["row00001"] == prompts_ids["again"]
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
    assert heads["verdict"].tolist() == [tracing.TOO_FEW if units else tracing.UNCLEAR] * 2


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
    heads = find(results({"L0H0": [moved] * 8, "L0H1": [-moved] * 8}, base), factor=factor)[1]
    assert heads["role"].tolist() == pytest.approx([abs(moved), -abs(moved)])


def test_effects_that_are_all_zero_give_no_verdict_and_no_nan() -> None:
    heads = find(results({"L0H0": [0.0] * 8, "L0H1": [0.0] * 8}))[1]
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
        called = set(heads["label"][heads["verdict"].isin(tracing.CLEAR_VERDICTS)])
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


def test_a_contrast_without_the_scores_of_its_base_is_not_judged_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = results(EFFECT)
    heads = find(table.assign(effect_minus_other=table["head_effect"]))[1]
    assert "effect_minus_other is left out: its base, the scores of other" in caplog.text
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

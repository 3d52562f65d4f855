"""Sentences in several wordings: texts, statistics of two random factors, tables and findings."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import llama3_circuit_tracing as tracing
import simulate_statistics as simulation
from conftest import Answer, command_line, finish, read, record_of, refuses, write_samples

TASKS = list(tracing.N_WORDINGS)
FORBIDDING = ("Don't", "Do not", "Avoid", "must not")


@pytest.fixture(scope="module")
def encoder(tiny_llama: str) -> tracing.PromptEncoder:
    return tracing.PromptEncoder(AutoTokenizer.from_pretrained(tiny_llama), "", "word")


def build(task: str, n_wordings: int, encoder: tracing.PromptEncoder) -> list[tracing.Sample]:
    rng = random.Random(42)
    return tracing.TASKS[task].build(16, rng, encoder.count, n_wordings)


# ----- texts


@pytest.mark.parametrize("task", TASKS)
def test_the_first_wording_is_that_of_samples_in_one(
    task: str, encoder: tracing.PromptEncoder
) -> None:
    alone, several = build(task, 1, encoder), build(task, 4, encoder)
    assert len(tracing.TASKS[task].wordings) == tracing.N_WORDINGS[task] == 4
    assert len(several) == 4 * len(alone)
    for i, sample in enumerate(alone):
        versions = several[4 * i : 4 * i + 4]
        first = versions[0]
        assert not sample.template
        assert (first.sample_id, first.prompt_a, first.prompt_b) == (
            sample.sample_id,
            sample.prompt_a,
            sample.prompt_b,
        )
        assert {version.unit for version in versions} == {sample.unit}
        assert {version.targets for version in versions} == {sample.targets}
        assert [v.template for v in versions] == [w.name for w in tracing.TASKS[task].wordings]
    for texts in ([s.sample_id for s in several], [s.prompt_a + s.prompt_b for s in several]):
        assert len(set(texts)) == len(several)


def test_each_forbids_once_in_a_sentence_of_its_own(encoder: tracing.PromptEncoder) -> None:
    for sample in build("suppression", 4, encoder):
        words = " or ".join(sample.targets)
        instruction = sample.prompt_a.replace(sample.prompt_b, "").strip()
        assert instruction.endswith(f" {words}.")
        assert sum(instruction.startswith(text) or text in instruction for text in FORBIDDING) == 1
        assert sample.prompt_a.count(words) == 1
        assert not any(text in sample.prompt_b for text in FORBIDDING)
        assert tracing.plausible_answers(sample) != sample.words
        assert set(sample.targets) < set(tracing.plausible_answers(sample))


@pytest.mark.parametrize("task", ["refusal", "odd_one_out"])
def test_both_prompts_have_the_frame_of_the_wording(
    task: str, encoder: tracing.PromptEncoder
) -> None:
    for sample in build(task, 4, encoder):
        (wording,) = [w for w in tracing.TASKS[task].wordings if w.name == sample.template]
        texts = [wording.bare_text(text) for text in (sample.prompt_a, sample.prompt_b)]
        assert texts[0] != texts[1]
        assert [wording.frame.format(text) for text in texts] == [sample.prompt_a, sample.prompt_b]
        if task == "odd_one_out":
            assert encoder.count(sample.prompt_a) == encoder.count(sample.prompt_b)


def test_controls_are_worded_as_prompt_a_with_the_same_other_words(
    encoder: tracing.PromptEncoder,
) -> None:
    alone = tracing.control_texts(build("suppression", 1, encoder), encoder, 42)
    samples = build("suppression", 4, encoder)
    controls = tracing.control_texts(samples, encoder, 42)
    others: dict[str, set[str]] = {}
    for sample in samples:
        (wording,) = [w for w in tracing.SUPPRESSION_WORDINGS if w.name == sample.template]
        texts = controls[sample.sample_id]
        forbids = sample.prompt_a.split(" or ".join(sample.targets))
        assert texts["other"].startswith(forbids[0])
        assert texts["other"].endswith(forbids[1])
        words = texts["other"][len(forbids[0]) : len(texts["other"]) - len(forbids[1])]
        others.setdefault(sample.sample_id[:5], set()).add(words)
        assert any(f"{opening} {sample.targets[0]}" in texts["affirm"] for opening in wording[3])
        assert not any(text in texts["affirm"] for text in FORBIDDING)
        if len(sample.sample_id) == 5:
            assert texts == alone[sample.sample_id]
    assert all(len(words) == 1 for words in others.values())


# ----- statistics


def crossed(n_columns: int = 3) -> Tensor:
    """Values [sentence, wording, column] of 7 sentences in 4 wordings."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(7, 4, n_columns, generator=generator, dtype=torch.float64)
    values += torch.randn(7, 1, n_columns, generator=generator, dtype=torch.float64)
    values += torch.randn(1, 4, n_columns, generator=generator, dtype=torch.float64)
    return values + 0.8


def clark(values: list[list[float]]) -> tuple[float, float]:
    """min F' and its degrees of freedom of values [sentence][wording], by F1 and F2 of means."""
    by_sentence = [statistics.fmean(row) for row in values]
    by_wording = [statistics.fmean(column) for column in zip(*values, strict=True)]
    mean = statistics.fmean(by_sentence)
    f1 = mean**2 / (statistics.variance(by_sentence) / len(by_sentence))
    f2 = mean**2 / (statistics.variance(by_wording) / len(by_wording))
    df1, df2 = len(by_sentence) - 1, len(by_wording) - 1
    return f1 * f2 / (f1 + f2), (f1 + f2) ** 2 / (f1**2 / df2 + f2**2 / df1)


def test_the_squared_t_of_two_factors_is_min_f() -> None:
    values = crossed()
    by_sentence, by_wording = simulation.crossed_totals(values)
    estimate = tracing.estimate_means(*by_sentence, by_wording)
    for i in range(values.shape[2]):
        min_f, df = clark(values[:, :, i].tolist())
        t = float(estimate.mean[i] / estimate.error[i])
        assert t**2 == pytest.approx(min_f)
        assert float(estimate.df[i]) == pytest.approx(min(df, 9.0))


def test_p_and_interval_of_two_factors_are_those_of_students_t_without_skewness() -> None:
    values = crossed(1)
    values = torch.cat([values, 1.6 - values])  # sentences mirror each other around 0.8
    by_sentence, by_wording = simulation.crossed_totals(values)
    estimate = tracing.estimate_means(*by_sentence, by_wording)
    t = estimate.mean / estimate.error
    expected = tracing.student_p(t, estimate.df)
    torch.testing.assert_close(tracing.mean_test(*by_sentence, by_wording), expected)
    low, high = tracing.mean_interval(*by_sentence, by_wording)
    reach = tracing.student_quantile(estimate.df) * estimate.error
    torch.testing.assert_close(low, estimate.mean - reach, rtol=1e-4, atol=0)
    torch.testing.assert_close(high, estimate.mean + reach, rtol=1e-4, atol=0)


def test_columns_of_one_wording_are_as_without_wordings() -> None:
    values = crossed()
    by_sentence, by_wording = simulation.crossed_totals(values)
    by_wording.sums[1:, 0] = by_wording.counts[1:, 0] = 0
    for function in (tracing.mean_test, tracing.mean_interval):
        alone, both = function(*by_sentence), function(*by_sentence, by_wording)
        torch.testing.assert_close(alone[..., 0], both[..., 0])
        assert not torch.isclose(alone[..., 1:], both[..., 1:]).any()


def test_equal_wordings_add_no_variance_and_equal_values_give_a_point() -> None:
    values = crossed()[:, :1].expand(7, 4, 3)
    by_sentence, by_wording = simulation.crossed_totals(values)
    estimate = tracing.estimate_means(*by_sentence, by_wording)
    torch.testing.assert_close(estimate.error, tracing.estimate_means(*by_sentence).error)
    ones = simulation.crossed_totals(torch.ones(5, 4, 1, dtype=torch.float64))
    assert tracing.mean_interval(*ones[0], ones[1])[:, 0].tolist() == pytest.approx([1.0, 1.0])


def test_the_skewness_of_sentences_bends_the_mean_less_where_wordings_differ() -> None:
    values = crossed()
    by_sentence, by_wording = simulation.crossed_totals(values)
    alone = tracing.estimate_means(*by_sentence)
    both = tracing.estimate_means(*by_sentence, by_wording)
    share = (alone.error / both.error) ** 3
    assert (share < 0.9).all()
    torch.testing.assert_close(both.bend, alone.bend * share)


def rows_of_sets(values: Tensor) -> pd.DataFrame:
    """Rows of `measure_sets` whose score a - b are values [sentence, wording, set]."""
    rows = []
    for i, j, place in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        row: dict[str, Any] = {"place": place, "sample_id": f"s{i}w{j}", "unit": f"u{i}"}
        row |= {"template": f"t{j}", "score_a": float(values[i, j, place]), "score_b": 0.0}
        rows.append(row | {"kl_a": 0.1, "kl_b": 0.1})
    return pd.DataFrame(rows)


def test_shares_of_joint_sets_use_both_factors() -> None:
    """The first set is empty, the second has all components, the third removes a part."""
    kept = crossed(1) - 4
    changes = torch.stack([torch.zeros_like(kept), 4 - kept.flip(0), 0.5 * kept.flip(1)], -1)
    values = (kept[..., None] + changes).squeeze(2)
    component = tracing.Component(0, "head", 0)
    sets = [tracing.JointSet("none"), tracing.JointSet("all", others_of=("head",))]
    sets.append(tracing.JointSet("complement", (component,), others_of=("head",)))
    rows = rows_of_sets(values)
    found = tracing.joint_statistics(rows, "b", sets)
    none, every, part = (values[..., i : i + 1] for i in range(3))
    for names, numerator, denominator in (
        (("share_low", "share_high"), none - part, none),
        (("faithfulness_low", "faithfulness_high"), part - every, none - every),
    ):
        tops, bottoms = (simulation.crossed_totals(v) for v in (numerator, denominator))
        totals = [tracing.Totals(tops[i].sums, bottoms[i].sums) for i in range(2)]
        ends = tracing.mean_interval(*totals[0], totals[1])[:, 0].tolist()
        assert [found[name][2] for name in names] == pytest.approx(ends)
        alone = tracing.mean_interval(*totals[0])[:, 0].tolist()
        assert alone != pytest.approx(ends, rel=1e-3)


def test_faithfulness_needs_an_effect_of_all_that_is_clear_over_wordings_too() -> None:
    """All components do something in three of four wordings, and the reverse in the other."""
    base = crossed(1).expand(7, 4, 1) * 0.1
    effect = torch.tensor([3.0, 3.0, 3.0, -2.0], dtype=torch.float64)[None, :, None]
    values = torch.cat([base, base + effect], 2)
    sets = [tracing.JointSet("none"), tracing.JointSet("all", others_of=("head",))]
    rows = rows_of_sets(values)
    assert math.isnan(tracing.joint_statistics(rows, "b", sets)["faithfulness"][1])
    of_one = tracing.joint_statistics(rows.assign(template="t"), "b", sets)
    assert not math.isnan(of_one["faithfulness"][1])


def table_of(values: Tensor) -> pd.DataFrame:
    """A results table of one component per column of values [sentence, wording, column]."""
    rows = []
    for i, j, k in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        row: dict[str, Any] = {"sample_id": f"s{i}w{j}", "unit": f"u{i}", "template": f"t{j}"}
        row |= {"layer": 0, "kind": "head", "index": k, "group": ""}
        rows.append(row | {"head_effect": float(values[i, j, k]), "delta_logit_base": -2.0 - j})
    return pd.DataFrame(rows)


def test_tables_use_both_factors_where_there_are_several_wordings() -> None:
    values = crossed()
    table = table_of(values)
    found = tracing.column_statistics(table, "head_effect")
    by_sentence, by_wording = simulation.crossed_totals(values)
    low, high = tracing.mean_interval(*by_sentence, by_wording).tolist()
    assert found["ci_low"].tolist() == pytest.approx(low)
    assert found["ci_high"].tolist() == pytest.approx(high)
    assert found["p"].tolist() == pytest.approx(
        tracing.mean_test(*by_sentence, by_wording).tolist()
    )
    alone = tracing.column_statistics(table.drop(columns="template"), "head_effect")
    named_once = tracing.column_statistics(table.assign(template="t"), "head_effect")
    pd.testing.assert_frame_equal(alone, named_once)
    assert ((alone["p"] - found["p"]).abs() > 1e-3).all()


def test_roles_by_wording_are_means_of_its_sentences() -> None:
    values = crossed()
    rows = tracing.wordings_table(table_of(values), base_mean=-3.0, factor=None)
    assert len(rows) == 12
    for row in rows.itertuples():
        own = values[:, int(row.template[1:]), row.index]
        assert row.mean == row.role == pytest.approx(float(own.mean()))
        low, high = tracing.mean_interval(own[:, None], torch.ones(7, 1).double())[:, 0].tolist()
        assert [row.ci_low, row.ci_high] == pytest.approx([low, high])
        assert row.n_sentences == 7


@pytest.mark.parametrize("wording_sd", [0.0, 0.5, 1.0])
def test_few_tables_of_several_wordings_show_anything_where_nothing_is_there(
    wording_sd: float,
) -> None:
    generator = torch.Generator().manual_seed(3)
    values = simulation.crossed(wording_sd, 4, 32_000, generator)
    false, covered = simulation.wording_errors(values, uses_wordings=True)
    assert false < 0.08 + 3 * 0.0086
    assert 0.94 < covered < 0.99
    if wording_sd:
        assert simulation.wording_errors(values, uses_wordings=False)[0] > 0.2


# ----- command lines


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--templates 5", ["--templates 5", "suppression has 4"]),
        ("--templates 2 --prompt x --target y", ["--templates 2", "--prompt is one wording"]),
        ("--templates 0", ["--templates"]),
    ],
)
def test_wordings_that_are_not_there_are_refused(answer: Answer, flags: str, says: Any) -> None:
    refuses(answer, *flags.split(), says=says)


def own_records() -> list[dict[str, Any]]:
    """Three sentences in two wordings."""
    records = []
    for word in ("fruit", "bird", "drink"):
        for template, text in {"name": f"Name a {word}.", "say": f"Say any {word}."}.items():
            records.append(
                {
                    "prompt_a": f"{text} Be kind.",
                    "prompt_b": text,
                    "targets": ["apple"],
                    "unit": word,
                    "template": template,
                }
            )
    return records


def test_wordings_of_own_samples_are_theirs(answer: Answer, tmp_path: Path) -> None:
    path = write_samples(tmp_path / "own.jsonl", *own_records())
    refuses(answer, "--samples", path, "--templates", "2", says=["field template"])
    records = own_records()
    del records[1]["unit"]
    path = write_samples(tmp_path / "no_unit.jsonl", *records)
    refuses(answer, "--samples", path, says=["line 2", "'template' needs 'unit'"])


def test_some_samples_without_a_wording_are_refused(
    answer: Answer, tmp_path: Path, llama: str
) -> None:
    records = own_records()
    del records[3]["template"]
    path = write_samples(tmp_path / "mixed.jsonl", *records)
    words = command_line(llama, tmp_path / "run", "--samples", path)
    refuses(answer, *words, says=["row00004", "'template' is missing", "all or none"])


def test_own_samples_in_several_wordings_from_csv(llama: str, tmp_path: Path) -> None:
    """--num_samples counts their sentences; the table and `redraw` know their wordings."""
    path = tmp_path / "own.csv"
    frame = pd.DataFrame(own_records()).assign(targets="apple")
    frame.to_csv(path, index=False)
    run = tmp_path / "run"
    flags = ["--num_samples", "2", "--layers", "0", "--heads", "0-1"]
    finish(llama, run, "--samples", str(path), *flags)
    table = read(run)
    assert list(table)[-1] == "template"
    assert set(table["template"]) == {"name", "say"}
    assert set(table["unit"]) == {"fruit", "bird"}
    by_wording = read(run, "circuit_templates.csv")
    assert len(by_wording) == 4
    assert (
        tracing.main(
            ["redraw", str(run / "circuit_results.csv"), "--output_dir", str(tmp_path / "new")]
        )
        == 0
    )
    pd.testing.assert_frame_equal(read(tmp_path / "new", "circuit_templates.csv"), by_wording)


def test_a_results_table_with_wordings_and_no_units_is_refused(
    answer: Answer, tmp_path: Path
) -> None:
    rows = [
        "sample_id,n_constraints,layer,head,delta_logit_base,delta_logit_head,head_effect,template"
    ]
    rows += [f"s{i},1,0,0,-1,-1,0,t{i % 2}" for i in range(4)]
    path = tmp_path / "theirs.csv"
    path.write_text("\n".join(rows))
    refuses(
        answer,
        "redraw",
        str(path),
        "--output_dir",
        str(tmp_path / "new"),
        says=["line 2", "'template'", "unit"],
    )


def test_one_wording_leaves_the_table_as_it_was_and_the_circuit_is_tried_in_the_others(
    tiny_llama: str, tmp_path: Path
) -> None:
    """The first wording's row is that of the held-out sentences in circuit_confirm.csv."""
    finish(tiny_llama, tmp_path, *["--num_samples", "8", "--layers", "0", "--confirm", "2"])
    assert "template" not in read(tmp_path)
    assert not (tmp_path / "circuit_templates.csv").exists()
    assert all("template" not in sample for sample in record_of(tmp_path)["samples"])
    rows = read(tmp_path, "circuit_wordings.csv")
    assert rows["template"].tolist() == [w.name for w in tracing.SUPPRESSION_WORDINGS]
    confirmed = read(tmp_path, "circuit_confirm.csv")
    chosen = confirmed[(confirmed["set"] == "chosen") & (confirmed["n_ablated"] == 2)].iloc[0]
    names = ["mean_delta", "ci_low", "ci_high", "share_removed", "share_low", "share_high"]
    assert rows.loc[0, names].tolist() == pytest.approx(chosen[names].tolist(), rel=1e-4)
    assert (rows["n_sentences"] == 4).all()
    is_clear = (rows["base_low"] > 0) | (rows["base_high"] < 0)
    assert (rows["share_removed"].notna() == is_clear).all()
    said = " ".join(entry["text"] for entry in record_of(tmp_path)["commands"]["trace"]["findings"])
    for wording in tracing.SUPPRESSION_WORDINGS:
        assert (
            said.count(
                f"in wording {tracing.quote(wording.name)}, 4 held-out sentences, 2 jointly: "
            )
            == 1
        )


def test_a_run_in_four_wordings_from_end_to_end(tiny_llama: str, tmp_path: Path) -> None:
    """The tiny model learned the first wording alone, and its base has another sign in one of the
    others; follow-ups inherit the wordings."""
    flags = "--num_samples 6 --layers 0 --templates 4 --controls --confirm 4"
    finish(tiny_llama, tmp_path, *flags.split())
    table = read(tmp_path)
    assert table["unit"].nunique() == 6
    assert table["sample_id"].nunique() == 24
    heads = read(tmp_path, "circuit_heads.csv")
    assert (heads["n_samples"] == 24).all()
    assert (heads["n_sentences"] == 6).all()
    means = table.groupby(["unit", "template", "head"])["head_effect"].mean().unstack("head")
    of_heads = [means[head].unstack("template").to_numpy() for head in heads["head"]]
    values = torch.stack([torch.tensor(of_head) for of_head in of_heads], -1)
    by_sentence, by_wording = simulation.crossed_totals(values)
    low, high = tracing.mean_interval(*by_sentence, by_wording).tolist()
    assert heads["ci_low"].tolist() == pytest.approx(low, rel=1e-4)
    assert heads["ci_high"].tolist() == pytest.approx(high, rel=1e-4)
    p = tracing.mean_test(*by_sentence, by_wording).tolist()
    assert heads["p"].tolist() == pytest.approx(p, rel=1e-4)
    by_wording = read(tmp_path, "circuit_templates.csv")
    assert len(by_wording) == 4 * len(heads)
    for label, rows in by_wording.groupby("label"):
        mean = heads.set_index("label")["mean"][label]
        assert rows["mean"].mean() == pytest.approx(mean)
    assert len(read(tmp_path, "circuit_wordings.csv")) == 4
    findings = record_of(tmp_path)["commands"]["trace"]["findings"]
    said = [entry["text"] for entry in findings]
    (base,) = [text for text in said if text.startswith("base by wording: ")]
    assert '"Don\'t mention ..." -3.96' in base
    assert "'Do not say ...' +" in base
    finish(tiny_llama, tmp_path, "joint", "L0H6", "--num_random", "2")
    joint = read(tmp_path, "circuit_joint.csv")
    assert set(joint["n_samples"]) <= {12, 24}


@pytest.mark.parametrize("task", ["refusal", "odd_one_out"])
def test_other_tasks_run_in_four_wordings(task: str, tiny_llama: str, tmp_path: Path) -> None:
    flags = f"--task {task} --num_samples 5 --layers 1 --templates 4 --op patch --confirm 1"
    finish(tiny_llama, tmp_path, *flags.split())
    assert read(tmp_path)["template"].nunique() == 4
    assert len(read(tmp_path, "circuit_wordings.csv")) == 4

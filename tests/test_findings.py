"""What is said of the effects in a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
from by_hand import results, with_control
from conftest import finish

MOVED = {"L0H3": [0.3] * 16, "L0H4": [-0.2] * 16}
SCORED = {
    "suppression": "log P of the forbidden words",
    "refusal": "the margin of refusals",
    "odd_one_out": "the margin of prompt a's odd name",
    "contrast": "the margin of the targets",
}


def lacking(table: pd.DataFrame, n_there: int) -> pd.DataFrame:
    """The table with a control in the first sentences only."""
    lacks = ~table["sample_id"].isin(table["sample_id"].unique()[:n_there])
    return table.assign(**{name: table[name].mask(lacks) for name in table if "other" in name})


def says(table: pd.DataFrame, repeated: int = 1, **options: Any) -> list[str]:
    """What is said of a table above a noise floor of 0.1, each component repeated."""
    trace_options = tracing.TraceOptions(**options)
    bases = tracing.find_bases(table)
    heads = tracing.heads_table(table, bases, 0.1, trace_options.factor)
    many = pd.concat([heads] * repeated).assign(n_tests=repeated * len(heads))
    task, op = tracing.TASKS[trace_options.task], tracing.OPS[trace_options.op]
    findings = tracing.Findings()
    tracing.report_effects(findings, many, bases, 0.1, tracing.EditPhrases(task, op.verb))
    return [entry["text"] for entry in findings.entries]


def of_components(messages: Sequence[str]) -> dict[str, str]:
    """By label in order the lines that tell of a component."""
    matches = ((re.search(r"\bL\d+H\d+\b", line), line) for line in messages)
    return {label[0]: line for label, line in matches if label}


@pytest.mark.parametrize(
    ("base", "effect", "options", "phrase"),
    [
        (-1.0, 0.3, {}, "removing L0H3: contributes to suppression; effect +0.300 ["),
        (-1.0, -0.3, {}, "removing L0H3: works against suppression; effect -0.300 ["),
        (1.0, -0.3, {}, "removing L0H3: contributes to rebound; "),
        (1.0, 0.3, {}, "removing L0H3: works against rebound; "),
        (1.0, -0.3, {"task": "refusal"}, "removing L0H3: contributes to refusal; "),
        (-1.0, 0.3, {"task": "refusal"}, "removing L0H3: contributes to reversed refusal; "),
        (-1.0, -0.3, {"task": "odd_one_out"}, "L0H3: works against reversed odd_one_out; "),
        (1.0, -0.3, {"task": "odd_one_out", "op": "patch"}, "patching L0H3: contributes to odd_"),
        (-1.0, 0.3, {"op": "mean"}, "mean-ablating L0H3: contributes to suppression; "),
        (-1.0, 0.3, {"op": "scale", "factor": 0.5}, "scaling L0H3: contributes to suppression; "),
        (-1.0, 0.3, {"op": "scale", "factor": 2.0}, "scaling L0H3: works against suppression; "),
    ],
)
def test_the_log_says_what_was_done_to_a_component_and_what_follows(
    base: float, effect: float, options: dict[str, Any], phrase: str
) -> None:
    first, *_, line = says(results({"L0H3": [effect] * 16}, base), **options)
    assert phrase in line
    assert first.startswith(f"mean delta_logit {base:+.3f} nats, 95 % interval ")
    assert first.endswith("over 16 sentences; noise floor 0.1")


OF_CONTROL = "through the control, the score after a does not clearly move so"


def specific(verdict: str, behaviour: str = "suppression") -> str:
    return f"{verdict} {behaviour} that is specific to these words"


def test_a_line_tells_effect_interval_q_and_what_moved_after_either_prompt() -> None:
    table = with_control(results(MOVED), "other", MOVED, -1.0)
    q = f"{2.0**-15:.2g}"
    assert says(table)[-2:] == [
        f"removing L0H3: contributes to suppression; effect +0.300 [+0.300, +0.300], q {q}; "
        "log P of the forbidden words +0.30 after prompt a, +0.00 after b; "
        f"less forbidding other words +0.300 [+0.300, +0.300], q {q}: "
        + specific("contributes to"),
        f"removing L0H4: works against suppression; effect -0.200 [-0.200, -0.200], q {q}; "
        "log P of the forbidden words -0.20 after prompt a, +0.00 after b; "
        f"less forbidding other words -0.200 [-0.200, -0.200], q {q}: " + specific("works against"),
    ]


@pytest.mark.parametrize("task", tracing.TASKS)
def test_a_line_names_what_the_task_scores_where_the_table_has_the_scores(task: str) -> None:
    table = results(MOVED).assign(score_a_base=-3.0, score_a_head=-2.5, score_b_base=0.0)
    lines = of_components(says(table.assign(score_b_head=-0.25), task=task)).values()
    assert all(f"; {SCORED[task]} +0.50 after prompt a, -0.25 after b" in line for line in lines)
    assert not any(SCORED[task] in line for line in says(table, task=task))


def test_each_base_has_a_line() -> None:
    table = with_control(results(MOVED), "affirm", MOVED, -1.5)
    table = with_control(table, "other", MOVED, 0.25)
    lines = says(table)[:3]
    assert [line.split(" nats, 95 % interval ")[0] for line in lines] == [
        "mean delta_logit -1.000",
        "mean score of prompt a less that of other +0.250",
        "mean score of prompt a less that of affirm -1.500",
    ]
    assert ["noise floor" in line for line in lines] == [True, False, False]


@pytest.mark.parametrize("n_there", [2, 1])
def test_the_line_of_a_base_counts_the_sentences_that_have_it(n_there: int) -> None:
    table = with_control(results(MOVED), "other", MOVED, [1.0 + 0.01 * i for i in range(16)])
    lines = says(lacking(table, n_there))
    assert lines[1].endswith("over 2 sentences" if n_there > 1 else "of a single sentence")
    assert not any(re.search(r"\bnan\b", line) for line in lines)


@pytest.mark.parametrize(
    ("contrast", "base", "serves"),
    [
        ([0.3] * 16, -1.0, specific("contributes to")),
        ([-0.3] * 16, 1.0, OF_CONTROL),
        ([0.3] * 16, [1.0, -1.0] * 8, "not told from serving any mention"),
        ([0.3, -0.25] * 8, -1.0, "not told from serving any mention"),
        ([-0.3] * 16, -1.0, OF_CONTROL),
    ],
    ids=["alike", "alike against its own base", "base unclear", "contrast unclear", "opposite"],
)
def test_with_controls_the_log_says_whether_a_component_serves_any_mention(
    contrast: list[float], base: Any, serves: str
) -> None:
    table = with_control(results({"L0H3": [0.3] * 16}), "other", {"L0H3": contrast}, base)
    mean = sum(contrast) / len(contrast)
    (line,) = (line for line in says(table) if line.startswith("removing L0H3: contributes to"))
    pattern = rf"; less forbidding other words {re.escape(f'{mean:+.3f}')} \[.*\], q \S+: {serves}"
    assert re.search(f"{pattern}$", line)


@pytest.mark.parametrize("controls", [False, True])
def test_where_only_the_contrast_has_a_base_the_strongest_by_it_are_told(controls: bool) -> None:
    """In the order of their contrasts, and none is said to contribute to the raw effect."""
    raw = {"L0H1": [0.3] * 16, "L0H2": [0.1] * 16, "L0H3": [0.2] * 16}
    table = results(raw, [1.0, -1.0] * 8)
    contrast = {"L0H1": [0.1] * 16, "L0H2": [0.3] * 16, "L0H3": [-0.2] * 16}
    lines = says(with_control(table, "other", contrast, -1.0) if controls else table)
    assert lines[1] == "its interval covers 0: there is nothing to explain by it, all are unclear"
    described = of_components(lines)
    assert list(described) == (["L0H2", "L0H1", "L0H3"] if controls else [])
    for label, line in described.items():
        assert line.startswith(f"removing {label}: unclear; ")
        assert line.endswith(OF_CONTROL if label == "L0H3" else specific("contributes to"))


def test_the_log_names_the_strongest_five_of_either_role() -> None:
    order = [3, 6, 1, 5, 2, 4]
    effects = {f"L0H{h}": [0.2 * h] * 16 for h in order}
    effects |= {f"L1H{h}": [-0.3 * h] * 16 for h in order}
    expected = [f"L{layer}H{h}" for layer in (0, 1) for h in (6, 5, 4, 3, 2)]
    assert list(of_components(says(results(effects)))) == expected
    few = {label: effects[label] for label in ("L0H1", "L1H2", "L1H5")}
    assert list(of_components(says(results(few)))) == ["L0H1", "L1H5", "L1H2"]


def test_a_component_without_verdict_is_called_unclear_whatever_its_mean() -> None:
    """One that varies too much, and one below the floor, beside one that is clear."""
    effects = {"L0H1": [2.0, -1.0] * 8, "L0H2": [0.05] * 16, "L0H3": [0.3] * 16}
    lines = of_components(says(with_control(results(effects), "other", effects, -1.0)))
    assert list(lines) == ["L0H1", "L0H3", "L0H2"]
    for label in ("L0H1", "L0H2"):
        assert lines[label].startswith(f"removing {label}: unclear; effect +")
        assert not re.search("contributes|works against|these words", lines[label])
    assert lines["L0H3"].startswith("removing L0H3: contributes to suppression; ")


LONE_Q = {(5, 1): "0.062", (6, 2): "0.062", (15, 1024): "0.062"}  # of sentences and heads
LONE_Q |= dict.fromkeys([(6, 1), (16, 1024), (21, 1024), (40, 99)], "")


@pytest.mark.parametrize(("n_sentences", "n_heads"), LONE_Q)
def test_the_log_says_when_sentences_are_too_few_for_any_q_below_five_percent(
    n_sentences: int, n_heads: int
) -> None:
    lines = says(results({"L0H3": [0.3] * n_sentences}), n_heads)
    lone_q = LONE_Q[n_sentences, n_heads]
    few = [line for line in lines if "too few" in line]
    expected = []
    if lone_q:
        n_enough = min(n for n in range(1, 99) if n_heads * 2 ** (1 - n) < 0.05)
        end = f"with {n_enough} sentences it can"
        expected = [f"{n_heads}, which cannot reach q below {lone_q}; {end}"]
    assert [line.split("among ")[1] for line in few if "a lone" in line] == expected


def test_the_log_of_a_single_sentence_tells_no_number_that_is_none_and_no_verdict(
    llama: str, tmp_path: Path
) -> None:
    log = (finish(llama, tmp_path, "--num_samples", "1") / "run.log").read_text()
    assert "a single sentence" in log
    assert not re.findall(r".*(?:\bnan\b|contributes to|works against).*", log)


@pytest.mark.parametrize(("n_there", "by_contrast"), [(8, False), (9, True)])
def test_the_contrast_of_few_sentences_does_not_rank(n_there: int, by_contrast: bool) -> None:
    effects = {"L0H1": [0.3] * 16, "L0H2": [0.1] * 16}
    table = with_control(results(effects), "other", {"L0H1": [0.1] * 16, "L0H2": [0.3] * 16}, -1.0)
    lines = says(lacking(table, n_there))
    assert list(of_components(lines)) == (["L0H2", "L0H1"] if by_contrast else ["L0H1", "L0H2"])


def test_scores_that_are_empty_are_not_told() -> None:
    scores = dict.fromkeys(("score_a_base", "score_a_head", "score_b_base", "score_b_head"))
    table = results(MOVED).assign(**scores).astype(dict.fromkeys(scores, float))
    assert not any("nan" in line for line in says(table))

"""What a component is said to do: by the prompt whose score moves, by the sample, by its size."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import llama3_circuit_tracing as tracing
import random_models
from by_hand import Effects, noise, results, steps, with_control
from conftest import finish, read, record_of

Saved = dict[Path, Figure]


def spread(mean: float, n: int = 16, sd: float = 0.01) -> list[float]:
    """Numbers about a mean, as many above as below it."""
    return [mean + sd * (-1) ** i * (1 + i // 2 % 4) for i in range(n)]


def moved_table(
    after_a: list[float], after_b: list[float], base: float = -4.0, **columns: Any
) -> pd.DataFrame:
    """A results table of L0H0, whose edit moves the scores of prompts a and b by these."""
    effects = [a - b for a, b in zip(after_a, after_b, strict=True)]
    table = results({"L0H0": effects}, spread(base, len(effects)))
    table = table.assign(score_b_base=-1.0, score_a_base=table["delta_logit_base"] - 1.0)
    table["score_a_head"] = table["score_a_base"] + after_a
    table["score_b_head"] = table["score_b_base"] + after_b
    return table.assign(**columns)


def judged(table: pd.DataFrame, floor: float = math.nan, **options: Any) -> pd.DataFrame:
    return tracing.heads_table(table, tracing.find_bases(table), floor, None, **options)


def said_of(table: pd.DataFrame, **options: Any) -> list[str]:
    """What the log says of a table."""
    heads = judged(table, **options)
    findings = tracing.Findings()
    phrases = tracing.EditPhrases(tracing.SUPPRESSION, "removing")
    tracing.report_effects(findings, heads, tracing.find_bases(table), math.nan, phrases)
    return [entry["text"] for entry in findings.entries]


# ----- the prompt whose score moves


@pytest.mark.parametrize(
    ("after_a", "after_b", "verdict"),
    [
        (0.5, 0.0, "contributes"),
        (0.5, -0.9, "contributes"),  # most of it after b, but clearly after a, too
        (6.0, 1.5, "contributes"),  # further than the base, after a alone
        (-0.5, 0.1, "works against"),
        (-0.3, -1.0, "through prompt b"),  # the words get rarer after a, and more so after b
        (0.0, -0.7, "through prompt b"),
        (0.3, 1.0, "through prompt b"),  # would work against
        (-7.6, -11.6, "breaks both prompts"),
        (-7.6, -3.9, "works against"),  # b moves less than the base
        (5.0, 9.0, "breaks both prompts"),
        (9.0, 5.0, "breaks both prompts"),  # although the words get likelier after a
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_verdict_needs_the_score_after_prompt_a_to_move_with_it(
    after_a: float, after_b: float, verdict: str, sign: int
) -> None:
    table = moved_table(spread(sign * after_a), spread(sign * after_b, sd=0.02), sign * -4.0)
    (head,) = judged(table).to_dict("records")
    assert head["q"] < 0.05
    assert head["verdict"] == verdict
    assert head["moved_a"] == pytest.approx(sign * after_a)
    assert head["moved_a_low"] < head["moved_a"] < head["moved_a_high"]


def test_a_change_after_prompt_a_that_varies_or_is_below_the_floor_gives_no_clear_verdict() -> None:
    varying = spread(0.1, sd=0.5)
    steady = moved_table(varying, [one - 0.7 for one in varying])
    small = moved_table(spread(0.1), spread(-0.7))
    assert judged(steady)["verdict"].tolist() == ["unclear which prompt"]
    assert judged(small)["verdict"].tolist() == ["contributes"]
    assert judged(small, floor=0.2)["verdict"].tolist() == ["through prompt b"]
    one_sided = moved_table([one + 0.9 for one in spread(0.0, sd=0.5)], spread(0.0))
    shared = one_sided.assign(score_b_head=one_sided["score_a_head"] - one_sided["head_effect"])
    assert judged(shared)["verdict"].tolist() == ["contributes"]


def test_a_component_that_a_table_lacks_the_scores_of_is_judged_by_delta() -> None:
    table = moved_table(spread(0.5), spread(0.0))
    other = moved_table(spread(0.5), spread(0.0)).assign(index=1, head=1, score_a_head=math.nan)
    verdicts = judged(pd.concat([table, other]))["verdict"].tolist()
    assert verdicts == ["contributes", "contributes"]


def test_a_patch_into_prompt_b_is_judged_by_what_it_moves_there() -> None:
    table = moved_table(spread(0.0, sd=0.0), spread(-0.7), op="patch")
    assert judged(table.assign(patch_into="a"))["verdict"].tolist() == ["through prompt b"]
    assert judged(table.assign(patch_into="b"))["verdict"].tolist() == ["contributes"]


def test_the_contrast_with_a_control_needs_the_same() -> None:
    """One whose contrast is all on the side of the control, and one that breaks both."""
    effects = {"L0H0": spread(0.5), "L0H1": spread(0.5), "L0H2": spread(9.0)}
    contrasts = {"L0H0": spread(0.4), "L0H1": spread(-0.3), "L0H2": spread(-0.5)}
    table = with_control(results(effects, -4.0), "other", contrasts, spread(-4.0))
    heads = judged(table)
    assert heads["verdict"].tolist() == ["contributes"] * 3
    assert heads["minus_other_verdict"].tolist() == [
        "contributes",
        "through the control",
        "breaks both prompts",
    ]


def test_samples_of_one_prompt_are_judged_by_its_score() -> None:
    table = moved_table(spread(0.5), spread(0.0)).assign(
        score_b_base=math.nan, score_b_head=math.nan
    )
    table["delta_logit_base"] = table["score_a_base"]
    table["head_effect"] = table["score_a_head"] - table["score_a_base"]
    assert judged(table)["verdict"].tolist() == ["contributes"]


def test_a_table_without_scores_by_prompt_is_judged_by_delta_alone_and_the_log_says_so_once() -> (
    None
):
    table = results({"L0H0": spread(0.5), "L0H1": spread(0.4)}, spread(-4.0))
    lines = said_of(table)
    assert sum("no scores by prompt" in line for line in lines) == 1
    assert sum("contributes to suppression" in line for line in lines) == 2
    assert not any("no scores by prompt" in line for line in said_of(moved_table(*[spread(1)] * 2)))


def test_the_log_says_which_prompt_an_effect_is_of() -> None:
    (line,) = [line for line in said_of(moved_table(spread(-0.3), spread(-1.0))) if "L0H0" in line]
    assert line.startswith(
        "removing L0H0: through prompt b, the score after a does not clearly move so; effect +0.700 ["
    )
    (line,) = [line for line in said_of(moved_table(spread(-7.6), spread(-11.6))) if "L0H0" in line]
    assert line.startswith("removing L0H0: breaks both prompts, both scores move further than the")


def test_a_mean_ablation_that_breaks_both_prompts_carries_nothing(
    tiny_llama: str, tmp_path: Path
) -> None:
    """The first attention of the bundled model: the forbidden words get rarer after either."""
    flags = "--kind attn --layers 0 --op mean --num_samples 8"
    finish(tiny_llama, tmp_path, *flags.split())
    (head,) = read(tmp_path, "circuit_heads.csv").to_dict("records")
    assert head["role"] > 3
    assert head["moved_a"] < -5 and head["moved_b"] < -5
    assert head["verdict"] == "breaks both prompts"
    assert "contributes to" not in (tmp_path / "run.log").read_text()


# ----- too few sentences


@pytest.mark.parametrize("n_tests", [1, 2, 32, 270, 1024, 46_080])
def test_the_sentences_that_suffice_are_the_fewest(n_tests: int) -> None:
    n = tracing.sentences_needed(n_tests)
    assert n_tests * 2.0 ** (1 - n) < 0.05 <= n_tests * 2.0 ** (2 - n)


def test_where_no_q_can_be_small_a_component_is_not_called_unclear() -> None:
    """Five sentences, and eight for 270 components, of which one is far from chance."""
    one = results({"L0H0": spread(-20.25, 5)}, spread(20.16, 5))
    assert judged(one)["verdict"].tolist() == ["too few sentences"]
    effects: Effects = noise(random.Random(0), 8, 270)
    many = judged(results({**effects, "L0H3": spread(-5.0, 8)}, spread(20.0, 8)))
    assert many["q"][3] >= 0.05
    assert many["verdict"].eq("too few sentences").all()


def test_the_log_lists_the_uncorrected_p_there_and_how_many_sentences_suffice() -> None:
    lines = said_of(results({"L0H0": spread(-20.25, 5)}, spread(20.16, 5)))
    assert any(
        line.endswith("cannot reach q below 0.062; with 6 sentences it can") for line in lines
    )
    (line,) = [line for line in lines if line.startswith("removing L0H0")]
    assert line.startswith("removing L0H0: too few sentences; effect -20.24")
    assert line.endswith(", p 0.062 uncorrected")


def test_many_small_p_together_have_a_verdict_where_a_lone_one_could_not() -> None:
    strong = {f"L0H{h}": spread(0.5, 8) for h in range(20)}
    weak = {"L0H20": spread(0.01, 8, sd=0.5)}
    verdicts = judged(results({**strong, **weak}, spread(-4.0, 8)))["verdict"].tolist()
    assert 21 * 2.0**-7 >= 0.05
    assert verdicts == ["contributes"] * 20 + ["unclear"]


def test_below_the_floor_and_without_a_base_more_sentences_would_not_help() -> None:
    effects = {"L0H0": spread(0.5, 5), "L0H1": spread(0.05, 5)}
    assert judged(results(effects, spread(-4.0, 5)), floor=0.1)["verdict"].tolist() == [
        "too few sentences",
        "unclear",
    ]
    no_base = judged(results(effects, [1.0, -1.0, 1.0, -1.0, 1.0]))
    assert no_base["verdict"].tolist() == ["unclear", "unclear"]


# ----- sizes and shares


def test_the_least_effect_is_a_share_of_the_base() -> None:
    effects = {"L0H0": steps(0.5), "L0H1": steps(-0.5), "L0H2": steps(0.15)}
    table = results(effects, -4.0)
    assert judged(table)["verdict"].tolist() == ["contributes", "works against", "contributes"]
    with_least = judged(table, least_effect=0.1)
    assert with_least["verdict"].tolist() == ["contributes", "works against", "small"]
    assert judged(table, least_effect=0.2)["verdict"].tolist() == ["small"] * 3


def test_redraw_takes_a_least_effect_and_keeps_it_otherwise(llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, "--num_samples", "6")
    settings = tracing.RedrawOptions(source=str(tmp_path), least_effect=0.5)
    run = tracing.read_run(str(tmp_path))
    assert tracing.redrawn_options(run, settings).least_effect == 0.5
    assert tracing.redrawn_options(run, tracing.RedrawOptions()).least_effect == 0.0


def test_the_log_says_how_many_components_have_half_and_most_of_the_sum_of_roles() -> None:
    effects = {f"L0H{h}": steps(size) for h, size in enumerate((4.0, 3.0, 2.0, 0.5, 0.2, -3.0))}
    lines = said_of(results(effects, -4.0))
    total = sum(role for role in judged(results(effects, -4.0))["role"] if role > 0)
    assert (
        "effect sizes: of 6 components 2 have half of the sum of positive roles"
        f" ({total:.3f} nats), 3 have 90 %; 6 contribute or work against it"
    ) in lines


def test_shares_have_an_interval_and_are_of_a_base_that_is_there() -> None:
    base = [4.0, 5.0, 6.0, 7.0, 4.5, 5.5, 6.5, 7.5]
    heads = judged(results({"L0H0": [-one / 4 for one in base]}, base))
    assert heads["share_moved"].tolist() == pytest.approx([0.25])
    assert heads[["share_low", "share_high"]].to_numpy().tolist()[0] == pytest.approx([0.25] * 2)
    varying = judged(results({"L0H0": spread(-1.0, 8, sd=0.1)}, base)).iloc[0]
    assert varying["share_low"] < varying["share_moved"] < varying["share_high"]
    covers_zero = judged(results({"L0H0": spread(-1.0, 8)}, [1.0, -0.9] * 4))
    assert covers_zero[["share_moved", "share_low", "share_high"]].isna().all(axis=None)


@pytest.mark.parametrize("seed", range(8))
def test_random_models_are_said_nothing_of_that_numbers_do_not_support(
    seed: int, tmp_path: Path
) -> None:
    """The log and the tables of runs whose base may be anything."""
    model = random_models.build_model(tmp_path / "model", seed=seed)
    flags = "--num_samples 10 --controls --confirm 2 --num_random 2 --max_new_tokens 2"
    folder = finish(str(model), tmp_path / "run", *flags.split())
    log = (folder / "run.log").read_text()
    assert not re.search(r"\bnan\b|nan%|inf\b", log)
    heads = read(folder, "circuit_heads.csv")
    bases = tracing.find_bases(read(folder))
    for side, prefix in {"b": "", "other": "minus_other_"}.items():
        has_verdict = heads[f"{prefix}verdict"].isin(tracing.CLEAR_VERDICTS)
        assert not has_verdict.any() or bases[side]["is_clear"]
        assert (heads[f"{prefix}q"][has_verdict] < 0.05).all()
    assert heads["share_moved"].notna().all() == bases["b"]["is_clear"]
    sets = read(folder, "circuit_confirm.csv")
    for _, rows in sets.groupby("measure"):
        base = rows[rows["set"] == "none"].iloc[0]
        is_clear = base["ci_low"] > 0 or base["ci_high"] < 0
        assert rows["share_removed"].notna().all() == is_clear
        told = rows[rows["quoted"] & (rows["set"] == "chosen")]
        assert ("no share removed" in log) == (not is_clear) or told.empty


# ----- figures


def test_all_but_the_first_two_verdicts_are_grey_and_told_in_the_legend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: Saved = {}
    monkeypatch.setattr(tracing, "save_figure", lambda figure, path: saved.update({path: figure}))
    table = pd.concat(
        [
            moved_table(spread(0.5), spread(0.0)).assign(index=0, head=0),
            moved_table(spread(-0.3), spread(-1.0)).assign(index=1, head=1),
            moved_table(spread(-7.6), spread(-11.6)).assign(index=2, head=2),
            moved_table(spread(0.1, sd=3.0), spread(0.0)).assign(index=3, head=3),
        ]
    )
    heads = judged(table)
    verdicts = ["contributes", "through prompt b", "breaks both prompts", "unclear"]
    assert heads["verdict"].tolist() == verdicts
    tracing.draw_heads(heads, 8, "a title", tmp_path / "heads")
    (legend,) = saved[tmp_path / "heads"].legends
    assert {text.get_text() for text in legend.get_texts()} == set(verdicts)
    for verdict, color in tracing.VERDICT_COLORS.items():
        red, green, blue, _ = to_rgba(color)
        is_grey = red == green == blue
        assert is_grey == (verdict not in (*tracing.CLEAR_VERDICTS, "grew", "possible backup"))
    tracing.draw_heatmap(heads, "", tmp_path / "map")
    (axes, _) = saved[tmp_path / "map"].axes
    shown = axes.collections[0].get_array().filled(math.nan)
    assert [not math.isnan(cell) for cell in shown.ravel()] == [True, False, False, False]
    assert axes.get_title().endswith("(grey: through prompt b, breaks both prompts, unclear)")


# ----- how much a choice depends on its sentences


def test_a_choice_is_held_against_that_of_other_halves() -> None:
    """Two components that every half chooses, and many of which each half chooses others."""
    rng = random.Random(0)
    effects = {f"L0H{h}": [rng.gauss(0.1, 1.0) for _ in range(16)] for h in range(20)}
    effects |= {"L1H0": spread(9.0), "L1H1": spread(8.0)}
    table = results(effects, -20.0)
    sums = tracing.sum_by_sentence(table, "b")
    units = set(table["unit"])
    for size, is_stable in {2: True, 8: False}.items():
        rule = tracing.ChoiceRule(tracing.SelectionRule.parse(str(size)))
        choosing, _ = tracing.split_units(table, seed=1)
        chosen = tracing.choose_circuit(sums, choosing, rule)
        stability = tracing.Stability.of(chosen, sums, rule, units, seed=1)
        assert stability.is_stable == is_stable
        assert stability.n_again[2] == 2
        assert stability.chosen_in[:2].tolist() == [1.0, 1.0]
        assert list(stability.chosen_in.index) == list(chosen.index)
        by_hand = [0] * len(chosen)
        n_again = []
        different = {frozenset(tracing.halves(units, f"1 split {i}")[0]) for i in range(100)}
        different -= {frozenset(choosing)}
        assert stability.n_halves == len(different) > 90
        for half in different:
            means = table[table["unit"].isin(half)].groupby(["layer", "index"])["head_effect"]
            best = means.mean().sort_values(ascending=False).index[:size]
            hits = [(one.layer, one.index) in best for one in chosen.index]
            by_hand = [total + hit for total, hit in zip(by_hand, hits, strict=True)]
            n_again.append(sum(hits))
        assert stability.chosen_in.tolist() == pytest.approx([n / len(different) for n in by_hand])
        assert stability.n_again[size] == pd.Series(n_again).median()


def test_halves_that_are_the_same_count_once() -> None:
    table = results({"L0H0": [1.0, 1.1, 1.2], "L0H1": [0.5, 0.4, 0.3]}, -2.0)
    sums = tracing.sum_by_sentence(table, "b")
    rule = tracing.ChoiceRule(tracing.SelectionRule.parse("1"))
    chosen = tracing.choose_circuit(sums, sums.bases.index, rule)
    stability = tracing.Stability.of(chosen, sums, rule, sums.bases.index, seed=0)
    findings = tracing.Findings()
    tracing.report_stability(findings, stability)
    assert [entry["text"] for entry in findings.entries] == [
        "too few sentences to tell whether the choice is stable: there are 2 other halves"
    ]
    assert stability.n_halves == 2  # two of three sentences, but not those that chose


def test_a_confirmation_says_how_often_its_components_are_chosen(
    llama: str, tmp_path: Path
) -> None:
    flags = "--num_samples 6 --confirm 2 --num_random 2"
    finish(llama, tmp_path, *flags.split())
    circuit = tracing.parse_json((tmp_path / "circuit.json").read_text())
    shares = [component["chosen_in"] for component in circuit["components"]]
    assert len(shares) == 2
    assert all(0 <= share <= 1 for share in shares)
    texts = [finding["text"] for finding in record_of(tmp_path)["commands"]["trace"]["findings"]]
    (line,) = [text for text in texts if text.startswith("the choice is ")]
    assert line.endswith(" again (by chance 0.33 of 2)")

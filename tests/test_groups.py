"""Groups of samples: tables, tests of differences, circuits and replies by group, silence."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import llama3_circuit_tracing as tracing
import naive
from by_hand import results
from conftest import finish, generations, read, record_of, user_text, write_samples
from llama3_circuit_tracing import NO_ODD_ONE, Component, JointSet

GROUPS = "circuit_groups.csv"


def said(folder: Path, command: str = "trace") -> list[str]:
    return [entry["text"] for entry in record_of(folder)["commands"][command]["findings"]]


# ----- the test of differences


def welch(values: list[float], groups: list[str]) -> float:
    """Distance of the groups' means in squared standard errors, in plain arithmetic."""
    weights, means = [], []
    for name in sorted(set(groups)):
        own = [value for value, group in zip(values, groups, strict=True) if group == name]
        means.append(statistics.fmean(own))
        weights.append(len(own) / statistics.variance(own))
    pairs = list(zip(weights, means, strict=True))
    middle = sum(weight * mean for weight, mean in pairs) / sum(weights)
    return sum(weight * (mean - middle) ** 2 for weight, mean in pairs)


def test_the_p_of_a_difference_is_that_of_all_ways_to_share_out_the_sentences() -> None:
    """Two groups of five have 252 ways, all of which are tried by hand."""
    rng = random.Random(3)
    for shift in (0.0, 0.8, 2.5):
        values = [rng.gauss(0, 1) + shift * (i >= 5) for i in range(10)]
        groups = ["x"] * 5 + ["y"] * 5
        observed = welch(values, groups)
        as_far = 0
        for own in itertools.combinations(range(10), 5):
            shuffled = ["x" if i in own else "y" for i in range(10)]
            as_far += welch(values, shuffled) >= observed * (1 - 1e-9)
        column = torch.tensor(values, dtype=torch.float64)[:, None]
        p = float(tracing.group_test(column, [f"u{i}" for i in range(10)], groups))
        assert p == pytest.approx(as_far / 252, abs=0.02)


def test_the_distance_of_groups_is_that_of_plain_arithmetic() -> None:
    rng = random.Random(4)
    groups = ["x"] * 5 + ["y"] * 7 + ["z"] * 6
    values = [rng.gauss(0, 1) for _ in groups]
    numbers = torch.tensor([["xyz".index(group) for group in groups]])
    found = tracing.distance_of_groups(torch.tensor(values).double()[:, None], numbers, 3)
    assert float(found) == pytest.approx(welch(values, groups))


def test_shuffles_keep_what_a_sentence_has_together_and_reach_all_orders() -> None:
    """Three sentences of two groups each and two of one."""
    units = ["u0", "u0", "u1", "u1", "u2", "u2", "v0", "v1"]
    groups = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])
    generator = torch.Generator().manual_seed(1)
    shuffled = tracing.shuffle_groups(units, groups, 4000, generator)
    assert (shuffled.sort(1).values == groups.sort().values).all()
    own = {frozenset({0, 1}), frozenset({0, 2}), frozenset({1, 2})}
    for row in shuffled[:200].tolist():
        assert {frozenset(row[i : i + 2]) for i in (0, 2, 4)} == own
        assert set(row[6:]) == {0, 1}
    # 3! orders of sentences, 2^3 within them, 2 of the lone ones, all as often
    counts = pd.Series([tuple(row) for row in shuffled.tolist()]).value_counts()
    assert len(counts) == 6 * 8 * 2
    assert counts.max() < 2 * counts.min() + 40


@pytest.mark.parametrize("is_crossed", [False, True])
def test_one_table_in_twenty_shows_a_difference_where_there_is_none(
    is_crossed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each sentence is in two groups and differs much from other sentences."""
    monkeypatch.setattr(tracing, "N_GROUP_SHUFFLES", 399)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(24, 2000, generator=generator, dtype=torch.float64)
    units, groups = [f"u{i}" for i in range(24)], [*"abc"] * 8
    if is_crossed:
        of_sentence = 3 * torch.randn(12, 2000, generator=generator, dtype=torch.float64)
        values += of_sentence.repeat_interleave(2, 0)
        units = [f"u{i // 2}" for i in range(24)]
        groups = [*"abbcca"] * 4
    p = tracing.group_test(values, units, groups)
    assert float((p < 0.05).double().mean()) == pytest.approx(0.05, abs=0.015)
    is_first = torch.tensor([group == "a" for group in groups]).double()[:, None]
    shifted = tracing.group_test(values + (8 if is_crossed else 3) * is_first, units, groups)
    assert float((shifted < 0.05).double().mean()) > 0.9


def test_columns_without_spread_differ_in_nothing() -> None:
    values = torch.tensor([[0.0, 3.0, float(i)] for i in range(10)]).double()
    p = tracing.group_test(values, [f"u{i}" for i in range(10)], ["x"] * 5 + ["y"] * 5)
    assert p[:2].tolist() == [1, 1]
    assert float(p[2]) < 0.05


# ----- circuit_groups.csv by hand


def grouped_results(sizes: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """Three heads: the first does in group x alone what it does, the second does the same in all,
    the third nothing."""
    rng = random.Random(seed)
    names = [name for name, size in sizes.items() for _ in range(size)]
    effects = {
        "L0H0": [(2.0 if name == "x" else 0.5) + rng.gauss(0, 0.1) for name in names],
        "L0H1": [1.0 + rng.gauss(0, 0.1) for _ in names],
        "L0H2": [rng.gauss(0, 0.1) for _ in names],
    }
    table = results(effects, base=[-4.0 + rng.gauss(0, 0.2) for _ in names])
    table["group"] = table["sample_id"].map(lambda name: names[int(name[1:])])
    return table


def tabulate(table: pd.DataFrame, top_k: int = 20, floor: float = math.nan) -> pd.DataFrame:
    bases = tracing.find_bases(table)
    heads = tracing.heads_table(table, bases, floor, None)
    chosen = tracing.clear_components(heads, top_k)
    return tracing.groups_table(table, chosen, bases["b"]["mean"], floor, None)


def test_rows_are_means_of_the_sentences_of_a_group() -> None:
    table = grouped_results({"x": 6, "y": 7})
    groups = tabulate(table)
    assert list(groups["label"]) == ["", "", "L0H0", "L0H0", "L0H1", "L0H1"]
    assert list(groups["group"]) == ["x", "y"] * 3
    for row in groups.itertuples():
        own = table[table["group"] == row.group]
        column = "head_effect" if row.label else "delta_logit_base"
        label = row.label or "L0H0"
        values = own[own["index"] == int(label[-1])][column]
        assert row.mean == pytest.approx(values.mean())
        sums = torch.tensor(values.to_numpy(), dtype=torch.float64)[:, None]
        low, high = tracing.mean_interval(sums, torch.ones_like(sums))[:, 0].tolist()
        assert [row.ci_low, row.ci_high] == pytest.approx([low, high])
        assert row.n_sentences == {"x": 6, "y": 7}[row.group]
        if row.label:
            base = own["delta_logit_base"].mean()
            assert row.role == pytest.approx(values.mean())  # the base is below 0
            assert row.share_moved == pytest.approx(-values.mean() / base)
            assert row.share_low < row.share_moved < row.share_high


def test_differences_are_tested_over_sentences_and_corrected_over_components() -> None:
    table = grouped_results({"x": 6, "y": 7})
    groups = tabulate(table).drop_duplicates("label").set_index("label")
    assert list(groups["differs"]) == ["not seen", "yes", "not seen"]
    wide = table.pivot(index="sample_id", columns="index", values="head_effect")
    names = table.drop_duplicates("sample_id")["group"].tolist()
    values = torch.tensor(wide[[0, 1]].to_numpy())
    p = tracing.group_test(values, list(wide.index), names).tolist()
    assert groups["difference_p"].tolist()[1:] == pytest.approx(p)
    q = tracing.benjamini_hochberg(torch.tensor(p)).tolist()
    assert groups["difference_q"].tolist()[1:] == pytest.approx(q)
    assert math.isnan(groups["difference_q"].iloc[0])


def test_samples_of_one_sentence_count_once_in_the_test() -> None:
    """Ten copies of every sample say no more than one of each."""
    table = grouped_results({"x": 5, "y": 5}, seed=1)
    copies = [
        table.assign(sample_id=table["sample_id"] + f"c{i}") if i else table for i in range(10)
    ]
    once, often = tabulate(table), tabulate(pd.concat(copies, ignore_index=True))
    columns = ["n_sentences", "mean", "ci_low", "difference_p", "difference_q"]
    pd.testing.assert_frame_equal(once[columns], often[columns])


def test_a_sentence_of_many_samples_weighs_no_more_in_the_test() -> None:
    table = grouped_results({"x": 6, "y": 5}, seed=2)
    first = table[table["unit"] == "u000"]
    copies = [first.assign(sample_id=f"c{i}") for i in range(4)]
    often = pd.concat([table, *copies], ignore_index=True)
    columns = ["difference_p", "difference_q"]
    pd.testing.assert_frame_equal(tabulate(table)[columns], tabulate(often)[columns])
    alone = grouped_results({"x": 1, "y": 6})
    first = alone[alone["unit"] == "u000"]
    copies = [first.assign(sample_id=f"c{i}") for i in range(9)]
    assert set(tabulate(pd.concat([alone, *copies]))["differs"]) == {"not judged"}


def test_groups_of_few_sentences_are_tabulated_and_not_compared() -> None:
    table = grouped_results({"x": 6, "y": 7, "z": 4})
    groups = tabulate(table)
    of_two = tabulate(table[table["group"] != "z"])
    assert set(groups["group"]) == {"x", "y", "z"}
    p = groups.drop_duplicates("label")["difference_p"].tolist()
    assert p[0] == pytest.approx(of_two["difference_p"].iloc[0])
    one_large = tabulate(grouped_results({"x": 4, "y": 7}))
    assert set(one_large["differs"]) == {"not judged"}
    findings = tracing.Findings()
    tracing.report_groups(findings, one_large, tracing.groups_to_compare(table[:0]))
    assert "not judged: fewer than two have 5 sentences" in findings.entries[-1]["text"]


def test_negative_controls_and_samples_without_a_group_are_in_no_group() -> None:
    table = grouped_results({"x": 6, "y": 7})
    groups = tabulate(table)
    outside = [
        table.assign(group=name, unit=f"n{name}", sample_id="n" + table["sample_id"] + name)
        for name in ("", NO_ODD_ONE)
    ]
    more = pd.concat([table, *outside], ignore_index=True)
    bases = tracing.find_bases(table)
    heads = tracing.heads_table(table, bases, math.nan, None)
    chosen = tracing.clear_components(heads, 20)
    found = tracing.groups_table(more, chosen, bases["b"]["mean"], math.nan, None)
    pd.testing.assert_frame_equal(found, groups)
    assert not tracing.has_groups(more[more["group"] != "y"])


def test_a_share_needs_a_clear_base_in_its_group() -> None:
    table = grouped_results({"x": 6, "y": 6})
    is_of_y = table["group"] == "y"
    number = table["sample_id"].str[1:].astype(int)
    sign = (number % 2).map({0: 1.0, 1: -1.0})
    table["delta_logit_base"] = table["delta_logit_base"].mask(is_of_y, 0.3 * sign)
    groups = tabulate(table)
    effects = groups[groups["label"] != ""]
    assert effects.loc[effects["group"] == "x", "share_moved"].notna().all()
    assert effects.loc[effects["group"] == "y", "share_moved"].isna().all()


def test_a_base_below_the_noise_floor_has_no_share() -> None:
    table = grouped_results({"x": 6, "y": 6})
    is_of_y = table["group"] == "y"
    table["delta_logit_base"] = table["delta_logit_base"] + 3.5 * is_of_y  # about -0.5
    for floor, has_share in ((0.1, True), (0.8, False)):
        groups = tabulate(table, floor=floor)
        effects = groups[groups["label"] == "L0H1"].set_index("group")
        assert not math.isnan(effects.loc["x", "share_moved"])
        assert math.isnan(effects.loc["y", "share_moved"]) != has_share


def test_top_k_limits_the_components_and_no_clear_one_leaves_the_base() -> None:
    table = grouped_results({"x": 6, "y": 7})
    assert set(tabulate(table, top_k=1)["label"]) == {"", "L0H1"} or set(
        tabulate(table, top_k=1)["label"]
    ) == {"", "L0H0"}
    nothing = table.assign(head_effect=table["head_effect"] * 0)
    assert set(tabulate(nothing)["label"]) == {""}


def test_what_is_said_names_the_groups_between_which_effects_differ() -> None:
    table = grouped_results({"x": 6, "y": 7, "z": 3})
    findings = tracing.Findings()
    tracing.report_groups(findings, tabulate(table), tracing.groups_to_compare(table))
    texts = [entry["text"] for entry in findings.entries]
    assert texts[0].startswith("base by group: 'x' -")
    assert "in 3 sentences" in texts[0]
    assert texts[1].startswith("the base is not seen to differ between groups: p ")
    assert texts[1].endswith("2 groups of 5 or more; left aside, as they have fewer: 'z'")
    assert texts[2] == "of 2 clear components 1 have effects that differ between groups:"
    assert texts[3].startswith("L0H0 by group: role from +0.")
    assert "('x'), q " in texts[3]
    assert len(texts) == 4
    same = table[table["index"] != 0]
    findings = tracing.Findings()
    tracing.report_groups(findings, tabulate(same), tracing.groups_to_compare(same))
    assert "of 1 clear component none is seen to differ" in findings.entries[-1]["text"]
    assert findings.entries[-1]["text"].endswith("that does not show that they agree")


def test_many_groups_are_told_and_drawn_in_part(tmp_path: Path) -> None:
    """A group may be anything that a file calls so: one per sample, or with marks of mathematics."""
    table = grouped_results({"$x^$": 6, "y\n": 5} | {f"g{i:03d}": 1 for i in range(300)})
    groups = tabulate(table)
    assert groups["group"].nunique() == 302
    findings = tracing.Findings()
    tracing.report_groups(findings, groups, tracing.groups_to_compare(table))
    assert all(len(entry["text"]) < 2000 for entry in findings.entries)
    assert "and 290 smaller groups" in findings.entries[0]["text"]
    path = tmp_path / "groups.png"
    tracing.draw_groups(groups, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


# ----- silence on negative controls


@pytest.mark.parametrize(
    ("low", "high", "size", "band", "verdict"),
    [
        (-0.5, 0.5, 0.4, 1.0, "silent"),
        (0.1, 0.5, 0.4, 1.0, "silent"),  # told from 0, and small
        (-0.5, 0.5, 1.4, 1.0, "not told"),  # changes cancel
        (-0.5, 1.5, 0.4, 1.0, "not told"),
        (-1.5, 0.5, 0.4, 1.0, "not told"),
        (0.5, 1.5, 1.0, 1.0, "not silent"),
        (-3.0, -2.0, 2.5, 1.0, "not silent"),
        (0.5, 0.6, 1.5, 1.0, "not silent"),
        (math.nan, math.nan, 0.0, 1.0, "not told"),
        (-0.1, 0.1, 0.1, math.nan, "not told"),
    ],
)
def test_silence_is_an_interval_within_the_band(
    low: float, high: float, size: float, band: float, verdict: str
) -> None:
    rows = pd.DataFrame([{"change_low": low, "change_high": high, "change_size": size}])
    (row,) = rows.itertuples()
    assert tracing.judge_silence(row, band) == verdict


def test_the_band_is_a_tenth_of_a_clear_base() -> None:
    negative = pd.DataFrame([{"change_low": -0.4, "change_high": 0.4, "change_size": 0.1}])
    real = {"base_mean": -5.0, "base_low": -6.0, "base_high": -4.0}
    (row,) = tracing.add_silence(negative, pd.Series(real)).itertuples()
    assert (row.band, row.silence) == (0.5, "silent")
    unclear = pd.Series(real | {"base_high": 0.1})
    (row,) = tracing.add_silence(negative, unclear).itertuples()
    assert math.isnan(row.band)
    assert row.silence == "not told"


def test_a_change_and_its_size_by_hand() -> None:
    """Two sentences, one of which has two samples; the second set of two is the edited one."""
    deltas = {"s0": (1.0, 3.0), "s1": (0.0, -4.0), "s2": (2.0, 2.5)}
    rows = []
    for name, pair in deltas.items():
        for place in (0, 1):
            unit = "u0" if name == "s0" else "u1"
            row = {"place": place, "sample_id": name, "unit": unit, "group": "x", "template": ""}
            rows.append(row | {"score_a": pair[place], "score_b": 0.0})
    change = tracing.change_columns(pd.DataFrame(rows), "b")
    assert change["change"] == pytest.approx((2 - 4 + 0.5) / 3)
    assert change["change_size"] == pytest.approx((2 + 4 + 0.5) / 3)
    sums, counts = torch.tensor([[2.0], [-3.5]]).double(), torch.tensor([[1.0], [2.0]]).double()
    low, high = tracing.mean_interval(sums, counts)[:, 0].tolist()
    assert [change["change_low"], change["change_high"]] == pytest.approx([low, high])


def test_places_become_those_of_two_sets() -> None:
    component = Component(0, "head", 1)
    joint_sets = [JointSet("none"), JointSet("all"), JointSet("chosen", (component,))]
    rows = pd.DataFrame({"place": [0, 1, 2, 0, 1, 2], "score_a": range(6)})
    found = tracing.rows_of_two(rows, joint_sets, JointSet("chosen", (component,)))
    assert found["place"].tolist() == [0, 1, 0, 1]
    assert found["score_a"].tolist() == [0, 2, 3, 5]


# ----- runs


GROUP_OF = {"fruit": "food", "bird": "life", "drink": "food", "insect": "life", "metal": "food"}
GROUP_OF |= {"tool": "", "gas": NO_ODD_ONE, "spice": NO_ODD_ONE, "dessert": NO_ODD_ONE}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = []
    for word, group in GROUP_OF.items():
        texts = {"prompt_a": f"Do not name a {word} here.", "prompt_b": f"Name a {word}."}
        label = {"group": group} if group else {}
        records.append(texts | {"targets": ["apple"]} | label)
    return write_samples(tmp_path_factory.mktemp("groups") / "own.jsonl", *records)


@pytest.fixture(scope="module")
def run(llama: str, own: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups") / "run"
    flags = "--num_samples 9 --confirm 2 --num_random 3 --max_new_tokens 3 --least_effect 0.000001"
    return finish(llama, folder, "--samples", own, *flags.split())


def plain_delta(model: Any, tokenizer: Any, sample: dict[str, Any], edit: Any) -> float:
    """The score of prompt a less that of b with heads zeroed, in plain forwards."""
    scores = []
    for side in "ab":
        user = user_text(sample["prompts"][side]["text"])
        with naive.zeroed(model, edit):
            scores.append(naive.word_log_prob(model, tokenizer, user, "apple"))
    return scores[0] - scores[1]


def test_what_a_set_changes_by_group_is_that_of_plain_forwards(run: Path, llama: str) -> None:
    """And on negative controls, all of which are held out."""
    table = read(run, "circuit_confirm_groups.csv").fillna({"group": ""}).set_index("group")
    labels = table["components"].iloc[0].split()
    heads = [(c.layer, c.kind, c.index) for c in map(Component.parse, labels)]
    model, tokenizer = naive.load(llama)
    record = record_of(run)
    choosing = set(tracing.parse_json((run / "circuit.json").read_text())["chosen_on"])
    changes: dict[str, list[float]] = {}
    bases: dict[str, list[float]] = {}
    for sample in record["samples"]:
        group = sample["group"]
        if group != NO_ODD_ONE and sample["unit"] in choosing:
            continue
        base = plain_delta(model, tokenizer, sample, [])
        edited = plain_delta(model, tokenizer, sample, heads)
        for name in {group, group if group == NO_ODD_ONE else ""}:
            changes.setdefault(name, []).append(edited - base)
            bases.setdefault(name, []).append(base)
    assert {*table.index} <= {*changes}
    assert NO_ODD_ONE in table.index
    assert "" in table.index
    for group, row in table.iterrows():
        own_changes = changes[str(group)]
        assert row["n_sentences"] == len(own_changes)
        assert row["base_mean"] == pytest.approx(statistics.fmean(bases[str(group)]), abs=2e-5)
        assert row["change"] == pytest.approx(statistics.fmean(own_changes), abs=2e-5)
        size = statistics.fmean(map(abs, own_changes))
        assert row["change_size"] == pytest.approx(size, abs=2e-5)
        assert row["mean_delta"] - row["base_mean"] == pytest.approx(row["change"], abs=1e-6)
    assert table["silence"].notna().sum() == 1
    assert math.isnan(table.loc[NO_ODD_ONE, "share_removed"])
    assert len([text for text in said(run) if text.startswith("on 3 negative controls")]) == 1


def test_joint_tells_groups_and_negative_controls_too(
    run: Path, llama: str, own: str, tmp_path: Path
) -> None:
    labels = read(run, "circuit_confirm_groups.csv")["components"].iloc[0]
    names = labels.replace(" ", ",")
    flags = f"{names} --num_samples 9 --num_random 2 --max_new_tokens 2"
    finish(llama, tmp_path, "joint", *flags.split(), "--samples", own)
    joint = read(tmp_path, "circuit_joint_groups.csv")
    assert set(joint["group"].fillna("")) == {"", "food", "life", NO_ODD_ONE}
    negative = joint[joint["group"] == NO_ODD_ONE].iloc[0]
    confirmed = read(run, "circuit_confirm_groups.csv")
    same = confirmed[confirmed["group"] == NO_ODD_ONE].iloc[0]
    assert negative["change"] == pytest.approx(same["change"], abs=2e-5)
    rows = joint.set_index(joint["group"].fillna(""))
    assert (rows.loc[["", "food", "life"], "n_sentences"] == [6, 3, 2]).all()
    everything = read(tmp_path, "circuit_joint.csv")
    named = everything[everything["set"] == "named"].iloc[0]
    columns = ["mean_delta", "ci_low", "ci_high"]
    assert rows.loc["", columns].tolist() == pytest.approx(named[columns].tolist(), rel=1e-5)
    rates = record_of(tmp_path)["commands"]["joint"]["behaviour_by_group"]
    assert {rate["group"] for rate in rates} == {"food", "life", NO_ODD_ONE}
    assert set(read(tmp_path, "joint_reply_groups.csv")["group"]) == {"food", "life", NO_ODD_ONE}


def test_reply_rates_by_group_are_those_of_its_replies(run: Path) -> None:
    record = record_of(run)
    group_of = {sample["sample_id"]: sample["group"] for sample in record["samples"]}
    unit_of = {sample["sample_id"]: sample["unit"] for sample in record["samples"]}
    replies = generations(run)
    rates = record["commands"]["trace"]["behaviour_by_group"]
    table = read(run, "circuit_reply_groups.csv")
    for row, rate in zip(table.fillna({"set": ""}).to_dict("records"), rates, strict=True):
        names = ("samples", "set", "group")
        assert [row.pop(name) for name in names] == [rate[name] for name in names]
        numbers = {name: value for name, value in rate.items() if name not in names}
        told = {name: value for name, value in row.items() if not pd.isna(value)}
        assert told == pytest.approx(numbers)
    for rate in rates:
        if rate["samples"] != "all":
            continue
        own_replies = [
            reply
            for reply in replies
            if group_of[reply["sample_id"]] == rate["group"]
            and (reply["prompt"], reply["n_ablated"]) == ("a", rate["n_ablated"])
        ]
        shown = statistics.fmean(bool(reply["mentions"]) for reply in own_replies)
        n_sentences = len({unit_of[reply["sample_id"]] for reply in own_replies})
        assert rate["mentions_a"] == pytest.approx(100 * shown)
        assert rate["n_sentences"] == n_sentences
        low, high = tracing.share_interval(shown, n_sentences)
        assert [rate["mentions_a_low"], rate["mentions_a_high"]] == pytest.approx(
            [100 * low, 100 * high]
        )
    (sentence,) = [t for t in said(run) if t.startswith("replies (all, 0 edited) to prompt a")]
    assert "by group: 'food' " in sentence


def test_redraw_makes_the_table_of_groups_again_and_the_page_shows_it(
    run: Path, tmp_path: Path
) -> None:
    table = read(run, GROUPS)
    new = tmp_path / "new"
    source = str(run / "circuit_results.csv")
    assert tracing.main(["redraw", source, "--output_dir", str(new)]) == 0
    pd.testing.assert_frame_equal(read(new, GROUPS), table)
    assert (new / "circuit_groups.png").read_bytes().startswith(b"\x89PNG")
    for folder in (run, new):
        page = (folder / "circuit_report.html").read_text()
        assert 'id="groups"' in page
        assert "<th>food</th><th>life</th>" in page
        assert "Base and strongest effects by group" in page
    (new / GROUPS).write_text("group,label\nx,y\n")
    tracing.write_page(new)
    assert f"{GROUPS} cannot be shown" in (new / "circuit_report.html").read_text()


def test_samples_of_one_group_have_no_table(llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 4 --layers 0 --confirm 1 --num_random 2"
    finish(llama, tmp_path, *flags.split())
    for name in (GROUPS, "circuit_groups.png", "circuit_confirm_groups.csv"):
        assert not (tmp_path / name).exists()
    assert not [text for text in said(tmp_path) if "group" in text]
    assert "behaviour_by_group" not in record_of(tmp_path)["commands"]["trace"]


def test_built_in_refusals_are_told_by_category(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--task refusal --num_samples 15 --layers 0 --top_k 3"
    finish(tiny_llama, tmp_path, *flags.split())
    groups = read(tmp_path, GROUPS)
    assert set(groups["group"]) == set(tracing.HARM_CATEGORIES)
    assert (groups["n_sentences"] == 5).all()
    assert groups["label"].nunique() <= 3
    assert "not judged" not in set(groups["differs"])


def test_odd_one_out_is_told_by_class_and_its_negative_controls(
    tiny_llama: str, tmp_path: Path
) -> None:
    flags = "--task odd_one_out --num_samples 10 --layers 0 --confirm 2 --num_random 2"
    finish(tiny_llama, tmp_path, *flags.split())
    table = read(tmp_path, "circuit_confirm_groups.csv")
    (negative,) = table[table["group"] == NO_ODD_ONE].itertuples()
    assert negative.n_sentences == 2
    if not math.isnan(negative.band):
        real = table[table["group"].isna()].iloc[0]
        assert negative.band == pytest.approx(abs(real["base_mean"]) / 10)
    assert negative.silence in ("silent", "not silent", "not told")

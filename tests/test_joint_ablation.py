"""Several components edited together: which ones, on which sentences, and to what effect."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
import random_models
from by_hand import halves, joint_rows, prepared
from conftest import Answer, finish, read, refuses, write_samples
from llama3_circuit_tracing import Component, Components, JointSet

CLOSE = 2e-5
CONFIG = tracing.Config()
COLUMNS = "samples measure set draw n_ablated components kept lent n_samples n_sentences "
COLUMNS += "mean_delta ci_low ci_high share_removed share_low share_high faithfulness "
COLUMNS += "faithfulness_low faithfulness_high remaining moved_a moved_b kl_a kl_b "
COLUMNS += "damaged quoted selection"
CONFIRM_TABLE = "circuit_confirm.csv"
CONFIRM = ["--num_samples", "6", "--confirm", "3", "--num_random", "4"]


KINDS = {"apple": "fruit", "rose": "flower", "golf": "sport", "iron": "metal"}


@pytest.fixture(scope="module")
def confirmed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM)


@pytest.fixture(scope="module")
def controlled(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM, "--controls")


def parsed(labels: str) -> Components:
    return tuple(map(Component.parse, labels.split()))


def by_size(rows: pd.DataFrame, name: str = "chosen") -> dict[int, str]:
    """The components of a set by their number."""
    return dict(rows[rows["set"] == name].set_index("n_ablated")["components"])


# ----- which sentences, which components


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_choosing_and_held_out_sentences_are_disjoint_halves(n: int) -> None:
    table = pd.DataFrame({"unit": [f"u{i}" for i in range(n)] * 3, "group": ""})
    choosing, held_out = tracing.split_units(table, 0)
    assert not choosing & held_out
    assert choosing | held_out == set(table["unit"])
    assert len(choosing) - len(held_out) == n % 2
    assert tracing.split_units(table.sample(frac=1, random_state=0), 0) == (choosing, held_out)
    negative = table.assign(unit="n", group=tracing.NO_ODD_ONE)
    assert tracing.split_units(pd.concat([table, negative]), 0) == (choosing, held_out)
    assert len({frozenset(tracing.split_units(table, seed)[0]) for seed in range(9)}) > 1


@pytest.mark.parametrize("half", [0, 1])
def test_where_most_of_a_half_lack_controls_the_effect_itself_chooses_and_is_quoted(
    half: int, controlled: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever half it is."""
    table, quoted = read(controlled), []
    exp = prepared(llama, *CONFIRM, "--controls")
    for of_sample in exp.prompts:
        if of_sample[0].sample.sample_id in halves(controlled)[half][1:]:  # one of three has it
            of_sample[:] = [prompt for prompt in of_sample if prompt.side != "other"]
    folder = tracing.RunFolder(controlled.parent / "other")
    folder.path.mkdir(exist_ok=True)
    instead: dict[str, Any] = {
        "confirm_sets": lambda chosen, exp: [JointSet("chosen", chosen)],
        "measure_sets": lambda *_: joint_rows(controlled, "a - other"),
        "write_circuit": lambda exp, found, measure, *_: quoted.append(measure),
        "draw_confirm": lambda *_: None,
    }
    for name, put in instead.items():
        monkeypatch.setattr(tracing, name, put)
    tracing.confirm(exp, table, folder)
    assert quoted == ["a - b"]
    assert not joint_rows(folder.path, "a - other")["quoted"].any()


def test_each_measure_tells_of_its_own_samples(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What moves is averaged over the samples that have the measure."""
    exp = prepared(llama, "--num_samples", "3", "--controls")
    nothing, edited = [1.0, 2.0, 0.0, 0.0, 0.0], [4.0, 6.0, 1.0, 7.0, 9.0]
    lacks = [math.nan if i == 2 else 0.0 for i in range(5)]
    found = [[nothing, [a + b for a, b in zip(nothing, lacks, strict=True)]]]
    found += [[edited, [2 * a + b for a, b in zip(edited, lacks, strict=True)]]]
    found += [found[0]]
    monkeypatch.setattr(tracing, "run_sets", lambda *a: found)
    folder = tracing.RunFolder(tmp_path)
    folder.parts.mkdir()
    sets = [JointSet("none"), JointSet("chosen", (Component(0, "head", 0),)), JointSet("all")]
    units = {of[0].sample.unit for of in exp.prompts[:2]}
    rows = tracing.measure_sets(exp, folder, sets, "held-out", units)
    of_set = rows[rows["set"] == "chosen"].set_index("measure")
    columns = ["n_samples", "moved_a", "moved_b", "kl_a", "kl_b"]
    assert of_set.loc["a - other", columns].tolist() == [1, 3, 4, 7, 9]
    assert of_set.loc["a - b", columns].tolist() == [2, (3 + 7) / 2, (4 + 10) / 2, 10.5, 13.5]


def test_where_no_sample_has_controls_the_effect_itself_chooses(llama: str, tmp_path: Path) -> None:
    records = [
        {"prompt_a": f"Never say {word}! {asks}", "prompt_b": asks, "targets": [word]}
        for word, asks in {"apple": "Name a fruit.", "golf": "Name a sport."}.items()
    ]
    flags = ["--samples", write_samples(tmp_path / "mine.jsonl", *records), "--layers", "1"]
    flags += ["--confirm", "2", "--num_random", "2"]
    one, other = (finish(llama, tmp_path / f"{n}", *flags, *["--controls"] * n) for n in (0, 1))
    assert set(read(other, CONFIRM_TABLE)["measure"]) == {"a - b"}
    assert (one / CONFIRM_TABLE).read_bytes() == (other / CONFIRM_TABLE).read_bytes()


def test_samples_of_one_unit_are_on_the_same_side_of_the_split(llama: str, tmp_path: Path) -> None:
    """Whatever their sentences."""
    records = [
        {"sentence": f"Name a {kind}.", "targets": [word], "unit": f"half {i // 2}"}
        for i, (word, kind) in enumerate(KINDS.items())
    ]
    flags = ["--samples", write_samples(tmp_path / "mine.jsonl", *records), "--layers", "1"]
    rows = joint_rows(finish(llama, tmp_path, *flags, "--confirm", "1", "--num_random", "1"))
    assert (rows["n_samples"] == 2).all()
    assert (rows["n_sentences"] == 1).all()
    assert rows[["ci_low", "ci_high", "share_low", "share_high"]].isna().all(axis=None)


# ----- random sets


@pytest.mark.parametrize("chosen", ["L1H0 L2H0 L2H3", "L0H2", "L2H1 L0H3 L2H3"])
def test_random_sets_are_distinct_sorted_of_the_same_layers_and_of_what_is_left(
    chosen: str, llama: str
) -> None:
    flags = ["--confirm", "1", "--num_random", "4", "--given", "L1H1,L2mlp", "--skip", "L0H0"]
    exp = prepared(llama, *flags)
    sets, everyone = tracing.confirm_sets(parsed(chosen), exp), parsed(chosen)
    for n in tracing.joint_sizes(len(everyone)):
        assert JointSet("chosen", everyone[:n]) in sets
        drawn = [of.components for of in sets if of.name == "random" and len(of.components) == n]
        assert not any(of.lent for of in sets)
        assert 1 <= len(drawn) == len(set(drawn)) <= 4
        for components in drawn:
            assert len(set(components)) == n
            assert list(components) == sorted(components)
            assert not {*components} & {*everyone, *parsed("L1H1 L0H0")}
            layers = [Counter(c.layer for c in of) for of in (components, everyone[:n])]
            assert layers[0] == layers[1]


@pytest.mark.parametrize(("asked", "found"), [("2", 2), ("3", 3), ("50", 3)])
def test_there_are_no_more_random_sets_than_distinct_ones_and_all_are_found(
    asked: str, found: int, llama: str
) -> None:
    exp = prepared(llama, "--confirm", "1", "--num_random", asked)
    sets = tracing.confirm_sets((Component(1, "head", 2),), exp)
    drawn = [of.components for of in sets if of.name == "random"]
    assert len(set(drawn)) == len(drawn) == found
    assert {c.label for (c,) in drawn} <= {"L1H0", "L1H1", "L1H3"}
    assert [of.draw for of in sets if of.name == "random"] == list(range(found))


def test_random_sets_are_drawn_by_seed_for_each_size_anew(llama: str) -> None:
    chosen = Component(1, "neuron", 0), Component(2, "neuron", 0)
    flags = ["--kind", "neuron", "--neurons", "0", "--confirm", "1", "--num_random", "3"]

    def drawn(seed: str) -> list[Components]:
        sets = tracing.confirm_sets(chosen, prepared(llama, *flags, "--seed", seed))
        return [of.components for of in sets if of.name == "random"]

    assert drawn("1") == drawn("1") != drawn("2")
    single, double = ({c for of in drawn("1") if len(of) == n for c in of} for n in (1, 2))
    assert not single & double


def test_where_a_layer_has_no_component_left_the_nearest_lends_one(llama: str) -> None:
    exp, chosen = prepared(llama), tuple(Component(1, "head", i) for i in range(3))
    for draw in range(20):
        drawn = tracing.draw_random(chosen, 3, exp, draw)
        assert drawn is not None
        first, *others = sorted(drawn.components, key=lambda c: abs(c.layer - 1))
        assert drawn.lent == 2
        assert first.label == "L1H3"
        assert {component.layer for component in others} <= {0, 2}
        assert len(set(others)) == 2
    crowded = prepared(llama, "--given", "L0H1,L0H2,L0H3,L1H0,L1H1,L1H2,L1H3")
    far = tracing.draw_random((Component(0, "head", 0),), 1, crowded, 0)
    assert far is not None
    assert (far.components[0].layer, far.lent) == (2, 1)


def test_sizes_are_powers_of_two_and_beyond_half_of_all_nothing_is_left_to_draw(llama: str) -> None:
    exp = prepared(llama, "--confirm", "1", "--num_random", "2")
    for k, drawn in ((6, [1, 2, 4, 6]), (7, [1, 2, 4])):
        sets = tracing.confirm_sets(tuple(exp.components[:k]), exp)
        sizes = {
            name: sorted({len(of.components) for of in sets if of.name == name})
            for name in ("chosen", "random")
        }
        assert sizes == {"chosen": [1, 2, 4, k], "random": drawn}
        assert {"all", "complement"} < {of.name for of in sets}
        largest = [of.components for of in sets if of.name == "random" and len(of.components) == 6]
        assert largest == [tuple(exp.components[6:])] * (k == 6)


def told_of(
    components: str, name: str = "random", kl_b: float = 0.0, share: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A row of the joint table."""
    row = {"samples": "held-out", "measure": "a - b", "set": name, "components": components}
    row |= {"n_ablated": len(components.split()), "kl_a": 0.0, "kl_b": kl_b, "share_removed": share}
    numbers = "mean_delta ci_low ci_high share_low share_high moved_a moved_b"
    told = {"n_sentences": 8, "lent": 0, "quoted": True, "damaged": math.nan, "kept": False}
    return row | dict.fromkeys(numbers.split(), 0.0) | told | more


def test_components_lent_by_another_layer_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "circuit")
    drawn = [told_of("L1H2 L1H3", lent=lent) for lent in (0, 2, 1)]
    rows = pd.DataFrame([told_of("L1H0 L1H1", "chosen"), *drawn])
    tracing.report_sets(rows, tracing.SUPPRESSION)
    assert "up to 2 components of a random set are of neighbouring layers" in caplog.text
    caplog.clear()
    tracing.report_sets(rows[rows["lent"] == 0], tracing.SUPPRESSION)
    assert caplog.text and "neighbouring" not in caplog.text


def test_a_run_tells_how_many_components_neighbouring_layers_lend(
    llama: str, tmp_path: Path
) -> None:
    """Of two heads chosen in a layer of which the two others are given."""
    flags = ["--layers", "1", "--given", "L1H0,L1H1", "--confirm", "2", "--num_random", "3"]
    rows = joint_rows(finish(llama, tmp_path, "--num_samples", "2", *flags))
    n_named = rows["components"].str.split().str.len()
    assert rows["lent"].equals(n_named.where(rows["set"].str.startswith("random"), 0))
    told = "up to 2 components of a random set are of neighbouring layers"
    assert told in (tmp_path / "run.log").read_text()


# ----- damage


@pytest.mark.parametrize(("kl_b", "damaged"), [(0.94, 0), (0.95, 0), (0.96, 1), (5.0, 1)])
def test_a_chosen_set_is_damaged_where_b_moves_further_than_with_95_percent_of_random_ones(
    kl_b: float, damaged: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its own size; 21 random sets move b by 0 to 1, those of another size by 100."""
    frame = [told_of("L0H0", "chosen", kl_b), told_of("L0H0 L1H0", "chosen", kl_b)]
    frame += [told_of("L0H1", kl_b=i / 20) for i in range(21)]
    frame += [told_of("L0H1 L1H1", kl_b=100.0)]
    frame += [told_of("L0H1", "ablate", kl_b=50.0), told_of("", "none")]
    caplog.set_level(logging.INFO, "circuit")
    rows = tracing.judge_sets(pd.DataFrame(frame), CONFIG)
    assert rows["damaged"][0] == damaged
    assert rows["damaged"][1:].isna().all()  # a single random set tells nothing
    tracing.report_sets(rows, tracing.SUPPRESSION)
    lines = [record.getMessage() for record in caplog.records]
    told = [re.findall("damaged, further|no further", line) for line in lines if "jointly" in line]
    assert told == [["damaged, further" if damaged else "no further"], [], []]


@pytest.mark.parametrize("n_sets", [tracing.MANY_SETS - 1, tracing.MANY_SETS])
@pytest.mark.parametrize("flags", [{}, {"op": "patch"}, {"op": "patch", "patch_into": "b"}])
def test_damage_is_judged_by_many_sets_only_and_not_of_patches(
    flags: dict[str, Any], n_sets: int
) -> None:
    """A patch into b is to move it, and one into a leaves it alone."""
    frame = [told_of("L0H0", "chosen", 1.0), *(told_of("L0H1") for _ in range(n_sets))]
    rows = tracing.judge_sets(pd.DataFrame(frame), tracing.Config(**flags))
    assert rows["damaged"].notna()[0] == (not flags and n_sets == tracing.MANY_SETS)


def test_damage_is_the_same_whether_one_measure_is_told_or_two() -> None:
    one = [told_of("L0H0", "chosen", 0.97), *(told_of("L0H1", kl_b=i / 10) for i in range(11))]
    two = [*one, *(row | {"measure": "a - other"} for row in one)]
    found = [tracing.judge_sets(pd.DataFrame(f), CONFIG)["damaged"] for f in (one, two)]
    assert found[0][0] == found[1][0] == 1


# ----- what becomes of the held-out sentences


@pytest.mark.parametrize("measure", ["a - b", "a - other"])
def test_the_joint_table_has_its_columns_and_rows_of_each_measure(
    measure: str, controlled: Path
) -> None:
    rows = joint_rows(controlled, measure)
    assert sorted(rows) == sorted(COLUMNS.split())
    names = Counter(rows["set"])
    assert names.pop("random") > names.pop("random complement") > 1
    assert names == {"none": 1, "all": 1, "complement": 1, "chosen": 3}
    assert (rows[["n_samples", "n_sentences"]] == 3).all(axis=None)
    shares = 1 - rows["mean_delta"] / rows["mean_delta"][0]
    assert rows["share_removed"].tolist() == pytest.approx(shares.tolist())
    assert rows["damaged"].isna().all()  # by four random sets of a size
    by_set = rows.groupby(["n_ablated", "kept"])["components"]
    assert by_set.nunique().eq(by_set.size()).all()


@pytest.mark.parametrize(("run", "measure"), [("confirmed", "a - b"), ("controlled", "a - other")])
def test_the_log_tells_what_the_joint_table_holds(
    run: str, measure: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(run)
    rows, told = joint_rows(folder, measure), (folder / "run.log").read_text()
    for row in rows[rows["set"] == "chosen"].itertuples():
        drawn = rows[(rows["set"] == "random") & (rows["n_ablated"] == row.n_ablated)]
        low, high = drawn["share_removed"].agg(["min", "max"])
        line = f"held-out samples, {row.n_ablated} jointly ({row.components}): mean {measure} "
        line += f"{row.mean_delta:+.3f} over 3 sentences [{row.ci_low:+.3f}, {row.ci_high:+.3f}], "
        line += f"{row.share_removed:.0%} removed [{row.share_low:.0%}, {row.share_high:.0%}], "
        line += f"{len(drawn)} distinct random sets {low:.0%} to {high:.0%}; "
        line += f"log P of the forbidden words {row.moved_a:+.2f} after prompt a, "
        line += f"{row.moved_b:+.2f} after b; KL {row.kl_a:.2g} after a, {row.kl_b:.2g} after b"
        line += ": damage is not judged"  # by four random sets
        assert line in told
    assert told.count(" jointly (L") == 3


@pytest.mark.parametrize("extra", [-1, 0])
def test_few_random_sets_are_told_by_their_ends_and_many_by_their_quantiles(
    extra: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "circuit")
    n = tracing.MANY_SETS + extra
    frame = [told_of("L0H0", "chosen", damaged=0, lent=0)]
    frame += [told_of("L0H1", share=i / (n - 1), lent=0) for i in range(n)]
    tracing.report_sets(pd.DataFrame(frame), tracing.SUPPRESSION)
    ends = "0% to 100%" if extra < 0 else "5% to 95%"
    assert f", {n} distinct random sets {ends};" in caplog.text


@pytest.mark.parametrize("rows", ["1", "64"])
@pytest.mark.parametrize(("name", "given"), [("plain", ""), ("plain", "L0H1"), ("capped", "")])
def test_the_divergence_of_the_first_reply_token_is_that_of_plain_forwards(
    name: str, given: str, rows: str, llama: str, tmp_path: Path
) -> None:
    """From what is said with the given components zeroed alone; capped are a model's own logits."""
    if name == "capped":
        widths = {"sliding_window": 400, "final_logit_softcapping": 2.0}
        llama = str(random_models.build_model(tmp_path, "gemma2", **widths))
    flags = ["--rows_per_forward", rows, "--attn_implementation", "eager"]
    exp = prepared(llama, *flags, *(["--given", given] if given else []))
    labels = ["", "L1H2", "L0H0 L2H3 L1mlp"]
    found = tracing.run_sets(exp, [JointSet("", parsed(of)) for of in labels], exp.prompts)
    assert exp.traced.own_logits == (name == "capped")
    model, _ = naive.load(llama)
    for of, of_set in zip(labels, found, strict=True):
        for prompts, (*_, kl_a, kl_b) in zip(exp.prompts, of_set, strict=True):
            with by_hand.ablated(model, given.split()):
                expected = [
                    by_hand.divergence(model, prompt.ids, by_hand.ablated(model, of.split()))
                    for prompt in prompts[:2]
                ]
            assert [kl_a, kl_b] == pytest.approx(expected, abs=CLOSE)
            assert min(kl_a, kl_b) >= 0
            assert (max(kl_a, kl_b) < 1e-6) == (not of)


# ----- intervals


def interval(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    ends = tracing.mean_interval(*(torch.tensor(v).double()[:, None] for v in (sums, counts)))
    return ends[:, 0].tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_joint_intervals_are_those_of_the_units_sums(sign: int) -> None:
    """Four units of five samples; the share's interval is that of what is removed per base."""
    units = ["u", "v", "u", "w", "x"]
    base, edited = [sign * v for v in (2.0, 3.0, 1.0, 4.0, 2.5)], [1.0, -1.5, 0.5, 2.0, 1.0]
    deltas = torch.tensor([base, edited, base], dtype=torch.float64).T
    sets = pd.DataFrame({"set": ["none", "chosen", "all"], "kept": [False, False, True]})
    found = tracing.joint_statistics(deltas, units, sets)
    counts, sums = [2, 1, 1, 1], [1.5, -1.5, 2.0, 1.0]
    bases = [sign * v for v in (3.0, 3.0, 4.0, 2.5)]
    assert found["n_sentences"] == 4
    assert found["mean_delta"] == pytest.approx([sum(v) / 5 for v in (bases, sums, bases)])
    ends = [float(found[name][1]) for name in ("ci_low", "ci_high")]
    assert ends == pytest.approx(interval(sums, counts))
    removed = [of_base - of for of_base, of in zip(bases, sums, strict=True)]
    share, *ends = (float(found[f"share_{name}"][1]) for name in ("removed", "low", "high"))
    assert ends == pytest.approx(interval(removed, bases))
    assert ends[0] < share < ends[1]
    assert share == pytest.approx(sum(removed) / sum(bases))
    nothing = [float(found[f"share_{name}"][0]) for name in ("removed", "low", "high")]
    assert nothing == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_interval_of_one_component_alone_is_that_of_its_sweep(confirmed: Path) -> None:
    """On the held-out sentences."""
    row = joint_rows(confirmed).query("set == 'chosen' and n_ablated == 1").iloc[0]
    (component,), table = parsed(row["components"]), read(confirmed)
    mine = (table["layer"] == component.layer) & (table["head"] == component.index)
    mine &= table["sample_id"].isin(halves(confirmed)[1])
    bases, deltas = (table[mine][f"delta_logit_{run}"].tolist() for run in ("base", "head"))
    ones = [1.0] * len(deltas)
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(interval(deltas, ones), abs=CLOSE)
    removed = [b - d for b, d in zip(bases, deltas, strict=True)]
    share = row[["share_low", "share_high"]].tolist()
    assert share == pytest.approx(interval(removed, bases), rel=1e-3)


# ----- other samples and sizes


def test_negative_controls_choose_nothing_and_confirm_nothing(llama: str, tmp_path: Path) -> None:
    """Not even those that share their sentence with a sample that counts."""
    records = [
        {"prompt_a": f"Don't mention {word}. Name a {kind}.", "prompt_b": f"Name a {kind}."}
        | {"targets": [word], "group": group}
        for named, kind in KINDS.items()
        for word, group in ((named, "real"), (named[::-1], tracing.NO_ODD_ONE))
    ]
    samples = write_samples(tmp_path / "mine.jsonl", *records)
    flags = ["--samples", samples, "--confirm", "1", "--num_random", "2", "--layers", "1"]
    table = read(finish(llama, tmp_path, *flags))
    real = table[table["group"] != tracing.NO_ODD_ONE]
    choosing, base = (real[real["sample_id"].isin(half)] for half in halves(tmp_path))
    nothing, deltas = joint_rows(tmp_path).iloc[0], base.drop_duplicates("sample_id")
    assert nothing["n_samples"] == len(deltas) == 2
    assert nothing["mean_delta"] == pytest.approx(deltas["delta_logit_base"].mean(), abs=CLOSE)
    sign = -math.copysign(1.0, choosing["delta_logit_base"].mean())
    best = (sign * choosing.groupby("head")["head_effect"].mean()).idxmax()
    assert by_size(joint_rows(tmp_path)) == {1: f"L1H{best}"}


def test_confirming_needs_two_sentences(llama: str, tmp_path: Path, answer: Answer) -> None:
    flags = ["--num_samples", "1", "--output_dir", str(tmp_path), "--confirm", "2"]
    says = ["--confirm needs at least two different sentences"]
    refuses(answer, "--model_id", llama, *flags, says=says)


# ----- a set of one's own


@pytest.mark.parametrize(
    ("label", "own", "others", "done"),
    [
        ("L1H2", "head --heads 2", "mlp", "mean --positions last"),
        ("L2mlp", "mlp", "head", "mean"),
        ("L0attn", "attn", "neuron --neurons 3", "patch"),
        ("L1resid", "resid", "attn", "patch --positions last"),
        ("L1N41", "neuron --neurons 41", "resid", "scale --factor 0.5"),
        ("L2H3", "head --heads 3", "attn", "zero --positions last"),
    ],
)
def test_beside_another_kind_a_component_has_the_effect_that_its_own_sweep_finds(
    label: str, own: str, others: str, done: str, llama: str, tmp_path: Path
) -> None:
    def run(kind: str, *flags: str) -> Path:
        asked = f"--num_samples 2 --kind {kind} --op {done}".split()
        return finish(llama, tmp_path / kind.split()[0], *asked, *flags)

    table = read(run(own, "--layers", label[1]))
    rows = joint_rows(run(others, "--layers", "0", "--ablate", label), samples="all")
    means = table[["delta_logit_base", "delta_logit_head"]].mean().tolist()
    assert rows["mean_delta"][:2].tolist() == pytest.approx(means, abs=CLOSE)
    assert means[0] != pytest.approx(means[1], abs=1e-4)


# ----- resume


def test_joint_sets_and_replies_that_are_there_are_not_made_again(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--num_samples", "2", "--layers", "1-2", "--confirm", "2", "--num_random", "2"]
    asked += ["--max_new_tokens", "2"]

    def finish_without(name: str, *flags: str) -> bytes:
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(tracing, name, lambda *a: pytest.fail(f"{name} was called"))
            return (finish(llama, tmp_path, *asked, *flags) / CONFIRM_TABLE).read_bytes()

    before, own = finish_without(""), ["--ablate", "L0H0,L1mlp"]
    replies = (tmp_path / "generations.jsonl").read_bytes()
    assert finish_without("load_model") == before
    more = finish_without("sweep", *own)
    assert more.startswith(before)
    names = ["none", "ablate", "complement", "all"]
    assert joint_rows(tmp_path, samples="all")["set"].tolist() == names
    log = (tmp_path / "run.log").read_text().splitlines()
    (told,) = (line for line in log if line.startswith("all samples") and "all of the kind" in line)
    assert "random complement" not in told, "those stand beside the confirmed circuit alone"
    assert finish_without("load_model", *own) == more
    fewer = finish_without("sweep", "--num_random", "1")  # an option that comes again wins
    first = [line for line in before.splitlines() if line.split(b",")[1] != b"1"]  # draw
    assert fewer.splitlines() == first != before.splitlines()
    assert finish_without("load_model") == before
    assert (tmp_path / "generations.jsonl").read_bytes() == replies

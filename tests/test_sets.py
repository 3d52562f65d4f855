"""Several components edited together: which ones, on which sentences, and to what effect."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from llama3_circuit_tracing import Component, JointSet

CLOSE = 2e-5
COLUMNS = "samples measure set draw n_ablated components kept lent n_samples n_sentences "
COLUMNS += "mean_delta ci_low ci_high share_removed share_low share_high faithfulness "
COLUMNS += "faithfulness_low faithfulness_high remaining remaining_low remaining_high moved_a moved_b kl_a kl_b "
COLUMNS += "kl_reply breaks_both damage quoted selection"
CONFIRM_TABLE = "circuit_confirm.csv"
CONFIRM = ["--num_samples", "6", "--confirm", "3", "--num_random", "4"]


KINDS = {"apple": "fruit", "rose": "flower", "golf": "sport", "iron": "metal"}


@pytest.fixture(scope="module")
def confirmed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM)


@pytest.fixture(scope="module")
def controlled(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM, "--controls")


def parsed(labels: str) -> tuple[Component, ...]:
    return tuple(map(Component.parse, labels.split()))


def confirmed_sets(model: str, chosen: tuple[Component, ...], *flags: str) -> list[JointSet]:
    """The sets that --confirm measures beside a circuit."""
    experiment = prepared(model, "--confirm", "1", *flags)
    sizes, skip = tracing.sizes_up_to(len(chosen)), experiment.options.skip
    return tracing.sets_of_sizes(experiment, "chosen", chosen, sizes, skip)


def random_among(joint_sets: Sequence[JointSet]) -> list[JointSet]:
    return [joint_set for joint_set in joint_sets if joint_set.name == "random"]


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
    experiment = prepared(llama, "--num_samples", "6", "--controls", "--confirm", "3")
    for sample_prompts in experiment.prompts:
        if (
            sample_prompts[0].sample.sample_id in halves(controlled)[half][1:]
        ):  # one of three has it
            sample_prompts[:] = [prompt for prompt in sample_prompts if prompt.side != "other"]
    table, quoted, sides = read(controlled), [], []
    instead: dict[str, Any] = {
        "sets_of_sizes": lambda experiment, name, chosen, *_: [JointSet(name, chosen)],
        "judge_sets": lambda *arguments: sides.append(arguments[4]) or joint_rows(controlled),
        "write_circuit": lambda experiment, chosen, measure, *_: quoted.append(measure),
        "confirm_wordings": lambda *arguments: None,
        "compare_set_by_group": lambda *arguments: None,
    }
    for name, function in instead.items():
        monkeypatch.setattr(tracing, name, function)
    monkeypatch.setattr(experiment.folder, "write_table", lambda *_: None)
    monkeypatch.setattr(tracing, "draw_sets", lambda *_: None)
    monkeypatch.setattr(experiment.folder, "claim_path", lambda name: Path(name))
    tracing.confirm_circuit(experiment, table)
    assert (quoted, sides) == (["a - b"], ["b"])


def rows_of_sets(scores: Sequence[Sequence[Any]], columns: str) -> pd.DataFrame:
    """As `measure_sets` returns them, with no KL unless it is given."""
    table = pd.DataFrame(scores, columns=["place", "sample_id", *columns.split()])
    missing = {"unit": table["sample_id"], "kl_a": 0.0, "kl_b": 0.0}
    return table.assign(**{name: missing[name] for name in missing if name not in table})


def test_each_measure_tells_of_its_own_samples(llama: str) -> None:
    """What moves is averaged over the samples that have the measure."""
    columns = "score_a score_b score_other kl_a kl_b"
    rows = rows_of_sets(
        [
            (0, "s0", 1.0, 2.0, 0.0, 0.0, 0.0),
            (0, "s1", 1.0, 2.0, math.nan, 0.0, 0.0),
            (1, "s0", 4.0, 6.0, 1.0, 7.0, 9.0),
            (1, "s1", 8.0, 12.0, math.nan, 14.0, 18.0),
            (2, "s0", 1.0, 2.0, 0.0, 0.0, 0.0),
            (2, "s1", 1.0, 2.0, math.nan, 0.0, 0.0),
        ],
        columns,
    )
    sets = [JointSet("none"), JointSet("chosen", parsed("L0H0")), JointSet("all")]
    table = tracing.set_table(prepared(llama), sets, "held-out", rows)
    measures = table[table["set"] == "chosen"].set_index("measure")
    moved = ["n_samples", "moved_a", "moved_b", "kl_a", "kl_b"]
    assert measures.loc["a - other", moved].tolist() == [1, 3, 4, 7, 9]
    assert measures.loc["a - b", moved].tolist() == [2, (3 + 7) / 2, (4 + 10) / 2, 10.5, 13.5]


def test_where_no_sample_has_controls_the_effect_itself_chooses(llama: str, tmp_path: Path) -> None:
    records = [
        {"prompt_a": f"Never say {word}! {asks}", "prompt_b": asks, "targets": [word]}
        for word, asks in {"apple": "Name a fruit.", "golf": "Name a sport."}.items()
    ]
    flags = ["--samples", write_samples(tmp_path / "mine.jsonl", *records), "--layers", "1"]
    flags += ["--confirm", "2", "--num_random", "2"]
    one = finish(llama, tmp_path / "one", *flags)
    other = finish(llama, tmp_path / "other", *flags, "--controls")
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
    flags = ["--num_random", "4", "--given", "L1H1,L2mlp", "--skip", "L0H0"]
    components = parsed(chosen)
    sets = confirmed_sets(llama, components, *flags)
    for n in tracing.sizes_up_to(len(components)):
        assert JointSet("chosen", components[:n]) in sets
        randoms = [drawn for drawn in random_among(sets) if len(drawn.components) == n]
        assert not any(drawn.lent for drawn in randoms)
        assert 1 <= len(randoms) == len({drawn.components for drawn in randoms}) <= 4
        for drawn in randoms:
            assert len(set(drawn.components)) == n
            assert list(drawn.components) == sorted(drawn.components)
            assert not {*drawn.components} & {*components, *parsed("L1H1 L0H0")}
            layers = [
                Counter(c.layer for c in group) for group in (drawn.components, components[:n])
            ]
            assert layers[0] == layers[1]


@pytest.mark.parametrize(("n_asked", "n_drawn"), [("2", 2), ("3", 3), ("50", 3)])
def test_there_are_no_more_random_sets_than_distinct_ones_and_all_are_found(
    n_asked: str, n_drawn: int, llama: str
) -> None:
    randoms = random_among(confirmed_sets(llama, parsed("L1H2"), "--num_random", n_asked))
    labels = [drawn.text for drawn in randoms]
    assert len(set(labels)) == len(labels) == n_drawn
    assert set(labels) <= {"L1H0", "L1H1", "L1H3"}
    assert [drawn.draw for drawn in randoms] == list(range(n_drawn))


def test_random_sets_are_drawn_by_seed_for_each_size_anew(llama: str) -> None:
    flags = ["--kind", "neuron", "--neurons", "0", "--num_random", "3"]

    def drawn(seed: str) -> list[tuple[Component, ...]]:
        sets = confirmed_sets(llama, parsed("L1N0 L2N0"), *flags, "--seed", seed)
        return [joint_set.components for joint_set in random_among(sets)]

    assert drawn("1") == drawn("1") != drawn("2")
    by_size: dict[int, set[Component]] = {1: set(), 2: set()}
    for components in drawn("1"):
        by_size[len(components)].update(components)
    assert not by_size[1] & by_size[2]


def test_where_a_layer_has_no_component_left_the_nearest_lends_one(llama: str) -> None:
    experiment, chosen = prepared(llama), parsed("L1H0 L1H1 L1H2")
    for draw in range(20):
        drawn = tracing.sample_random_set(experiment, chosen, 3, (), draw)
        assert drawn is not None
        first, *others = sorted(drawn.components, key=lambda c: abs(c.layer - 1))
        assert drawn.lent == 2
        assert first.label == "L1H3"
        assert {component.layer for component in others} <= {0, 2}
        assert len(set(others)) == 2
    crowded = prepared(llama, "--given", "L0H1,L0H2,L0H3,L1H0,L1H1,L1H2,L1H3")
    far = tracing.sample_random_set(crowded, parsed("L0H0"), 1, (), 0)
    assert far is not None
    assert (far.components[0].layer, far.lent) == (2, 1)


def test_nothing_more_is_drawn_once_too_few_components_are_left(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 heads; with one less chosen each draw finds the same set."""
    experiment, sample, draws = prepared(llama, "--confirm", "1"), tracing.sample_random_set, []
    monkeypatch.setattr(tracing, "sample_random_set", lambda *a: draws.append(a) or sample(*a))
    n_draws = []
    for size in (6, 7):
        draws.clear()
        heads = experiment.shape.components("head")[:size]
        assert len(tracing.random_sets(experiment, heads, size, (), 20)) == (size == 6)
        n_draws.append(len(draws))
    assert n_draws == [10 * 20, 1]


@pytest.mark.parametrize("kind", ["head", "neuron", "mlp"])
def test_the_nearest_free_components_are_those_that_a_plain_loop_finds(
    kind: str, llama: str
) -> None:
    shape, rng, distances = prepared(llama).shape, random.Random(0), set()
    torch.manual_seed(0)
    for _ in range(60):
        component = Component(rng.randrange(3), kind, -1 if kind == "mlp" else 0)
        sites = [replace(component, layer=layer).site for layer in range(3)]
        free = {}
        for site in sites:
            free[site] = torch.rand(shape.width(site.place)) < rng.choice([1.0, 0.9, 0.0, 0.0])
        expected: list[Component] = []
        for layer in sorted(range(3), key=lambda layer: abs(layer - component.layer)):
            for other in shape.components(kind, layer):
                if not expected or other.layer == expected[0].layer:
                    expected += [other] * bool(free[other.site][shape.columns(other)].all())
        assert tracing.nearest_free_components(component, free, shape) == expected
        distances.add(abs(expected[0].layer - component.layer) if expected else None)
    assert distances == {0, 1, 2, None}


def test_sizes_are_powers_of_two_and_beyond_half_of_all_nothing_is_left_to_draw(llama: str) -> None:
    heads = prepared(llama).shape.components("head")
    for k, drawn in ((6, [1, 2, 4, 6]), (7, [1, 2, 4])):
        sets = confirmed_sets(llama, tuple(heads[:k]), "--num_random", "2")
        sizes = {
            name: sorted({len(s.components) for s in sets if s.name == name})
            for name in ("chosen", "random")
        }
        assert sizes == {"chosen": [1, 2, 4, k], "random": drawn}
        assert {"all", "complement"} < {joint_set.name for joint_set in sets}
        randoms = [s.components for s in random_among(sets) if len(s.components) == 6]
        assert randoms == [tuple(heads[6:])] * (k == 6)


def set_row(
    components: str, name: str = "random", kl_b: float = 0.0, share: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A row of the joint table."""
    row = {"samples": "held-out", "measure": "a - b", "set": name, "components": components}
    row |= {"n_ablated": len(components.split()), "kl_a": 0.0, "kl_b": kl_b, "share_removed": share}
    numbers = "mean_delta ci_low ci_high share_low share_high moved_a moved_b"
    rest = {"n_sentences": 8, "lent": 0, "quoted": True, "damage": "", "kept": False}
    rest |= {"kl_reply": math.nan, "breaks_both": False}
    return row | dict.fromkeys(numbers.split(), 0.0) | rest | more


def reported(table: pd.DataFrame) -> list[str]:
    """The sentences about the sets of a table."""
    experiment = SimpleNamespace(findings=tracing.Findings(), task=tracing.SUPPRESSION)
    tracing.report_sets(experiment, table, "set")
    return [entry["text"] for entry in experiment.findings.entries]


def test_a_run_tells_how_many_components_neighbouring_layers_lend(
    llama: str, tmp_path: Path
) -> None:
    """Of two heads chosen in a layer of which the two others are given."""
    flags = ["--layers", "1", "--given", "L1H0,L1H1", "--confirm", "2", "--num_random", "3"]
    rows = joint_rows(finish(llama, tmp_path, "--num_samples", "2", *flags))
    n_named = rows["components"].str.split().str.len()
    assert rows["lent"].equals(n_named.where(rows["set"].str.startswith("random"), 0))
    warning = "up to 2 components of a random set are of neighbouring layers"
    assert warning in (tmp_path / "run.log").read_text()
    rows = joint_rows(finish(llama, tmp_path / "other", "--num_samples", "2", *flags[4:]))
    assert not rows["lent"].any()
    assert "neighbouring" not in (tmp_path / "other" / "run.log").read_text()


# ----- damage


ROUND = 21  # random sets, of which 95 % are the first 20
SENTENCES = {
    "no": "no damage, those of b are 0.1 nats at most",
    "yes": "damaged, more than 0.1 nats and than with 95 % of the random sets",
    "as random sets": "more than 0.1 nats, and within what random sets do",
    "not judged": "damage is not judged",
}


def damage_of(table: pd.DataFrame, **options: Any) -> list[str]:
    judged = tracing.judge_damage(table, tracing.TraceOptions(**options))
    return list(judged["damage"])


@pytest.mark.parametrize("name", ["chosen", "named"])
@pytest.mark.parametrize(
    ("kl_b", "farthest", "damage"),
    [
        (0.0021, 0.002, "no"),  # however little random sets move b
        (0.1, 0.02, "no"),
        (0.11, 0.1, "yes"),
        (0.11, 1.0, "as random sets"),
        (0.95, 1.0, "as random sets"),
        (0.96, 1.0, "yes"),
        (5.0, 1.0, "yes"),
    ],
)
def test_a_set_is_damaged_above_the_floor_and_beyond_95_percent_of_random_sets(
    name: str, kl_b: float, farthest: float, damage: str
) -> None:
    """Of its own size; 21 random sets move b by 0 to the farthest, those of another size by 100."""
    rows = [set_row("L0H0", name, kl_b), set_row("L0H0 L1H0", name, kl_b)]
    rows += [set_row("L0H1", kl_b=farthest * i / 20) for i in range(ROUND)]
    rows += [set_row("L0H1 L1H1", kl_b=100.0)]
    rows += [set_row("L0H1", "all", kl_b=50.0), set_row("", "none")]
    table = tracing.judge_damage(pd.DataFrame(rows), tracing.TraceOptions())
    alone = "no" if damage == "no" else "not judged"  # a single random set tells nothing
    assert list(table["damage"]) == [damage, alone] + [""] * (len(rows) - 2)
    for verdict, sentence in zip((damage, alone), reported(table), strict=True):
        assert sentence.endswith(SENTENCES[verdict])
    assert reported(table)[1].endswith("more than 0.1 nats, damage is not judged") == (kl_b > 0.1)


@pytest.mark.parametrize("n_sets", [tracing.MANY_SETS - 1, tracing.MANY_SETS])
@pytest.mark.parametrize("options", [{}, {"op": "patch"}, {"op": "patch", "patch_into": "b"}])
def test_damage_is_judged_by_many_sets_only_and_not_of_patches(
    options: dict[str, Any], n_sets: int
) -> None:
    """A patch into b is to move it, and one into a leaves it alone."""
    rows = [set_row("L0H0", "chosen", 1.0), *(set_row("L0H1") for _ in range(n_sets))]
    is_judged = not options and n_sets == tracing.MANY_SETS
    assert damage_of(pd.DataFrame(rows), **options)[0] == ("yes" if is_judged else "not judged")
    below = pd.DataFrame(rows).assign(kl_b=0.01)
    assert damage_of(below, **options)[0] == ("not judged" if options else "no")


@pytest.mark.parametrize("kl_b", [0.0, 1.0])
@pytest.mark.parametrize("n_sentences", [1, 4, 5])
def test_damage_is_judged_over_five_sentences_or_more(n_sentences: int, kl_b: float) -> None:
    rows = [set_row("L0H0", "chosen", kl_b), *(set_row("L0H1") for _ in range(ROUND))]
    table = pd.DataFrame(rows).assign(n_sentences=n_sentences)
    verdict = "yes" if kl_b else "no"
    assert damage_of(table)[0] == (verdict if n_sentences >= 5 else "not judged")


def test_without_random_sets_a_set_below_the_floor_is_not_damaged() -> None:
    table = pd.DataFrame([set_row("L0H0", "named", 0.05), set_row("L0H0", "named", 0.2)])
    assert damage_of(table) == ["no", "not judged"]


def test_damage_is_judged_along_replies_where_there_are_some() -> None:
    """However little the first token moves, and however little the rest does; the sentence tells
    both."""
    rows = [set_row("L0H0", "chosen", 0.002, kl_reply=0.23)]
    rows += [set_row("L0H1", kl_b=0.001, kl_reply=0.005 * i) for i in range(ROUND)]
    table = tracing.judge_damage(pd.DataFrame(rows), tracing.TraceOptions())
    assert table["damage"][0] == "yes"
    (sentence,) = reported(table)
    assert "0.002 after b, 0.23 per token of replies to b: damaged, more than 0.1" in sentence
    table.loc[0, ["kl_b", "kl_reply"]] = [0.9, 0.02]
    table = tracing.judge_damage(table, tracing.TraceOptions())
    assert table["damage"][0] == "yes"
    table.loc[0, ["kl_b", "kl_reply"]] = [0.09, 0.02]
    table = tracing.judge_damage(table, tracing.TraceOptions())
    assert table["damage"][0] == "no"
    assert reported(table)[0].endswith(
        "of replies to b: no damage, those of b are 0.1 nats at most"
    )


def test_a_set_that_moves_both_scores_further_than_the_base_has_no_share() -> None:
    scores = []
    for place, (a, b) in enumerate([(-4.0, -1.0), (-10.0, -9.0), (-2.0, -1.0)]):
        scores += [(place, f"s{i}", a + 0.1 * i, b, f"u{i}") for i in range(5)]
    rows = rows_of_sets(scores, "score_a score_b unit")
    sets = [JointSet("none"), JointSet("chosen"), JointSet("chosen")]
    statistics = tracing.joint_statistics(rows, "b", sets)
    table = tracing.judge_breaking(statistics, rows, "b")
    assert table["breaks_both"].tolist() == [False, True, False]
    assert table["share_removed"].isna().tolist() == [False, True, False]
    row = set_row("L0H0", "chosen", share=math.nan, breaks_both=True, damage="no")
    (sentence,) = reported(pd.DataFrame([row, set_row("L0H1")]))
    assert ", breaks both prompts, both scores move further than the base: no share rem" in sentence


def test_damage_is_the_same_whether_there_is_one_measure_or_two() -> None:
    one = [set_row("L0H0", "chosen", 0.97), *(set_row("L0H1", kl_b=i / 10) for i in range(11))]
    two = [*one, *(row | {"measure": "a - other"} for row in one)]
    for rows in (one, two):
        assert damage_of(pd.DataFrame(rows))[0] == "yes"


def test_a_share_that_the_base_does_not_give_is_no_number_in_the_sentence() -> None:
    rows = [set_row("L0H0", "chosen", share=math.nan, damage="no"), set_row("L0H1")]
    (sentence,) = reported(pd.DataFrame(rows))
    assert ", no share removed, the base is not clear; " in sentence
    assert "nan" not in sentence


BROKEN = "L0H1,L0H7,L0H0,L0H3,L0H5,L3H4,L3H7,L2H5"  # heads that carry the model's refusals


def test_a_set_that_breaks_replies_after_a_sound_first_token_is_damaged(
    tiny_llama: str, tmp_path: Path
) -> None:
    """To harmless requests, too, most replies are the same two words."""
    words = ["joint", BROKEN, "--task", "refusal", "--num_samples", "20"]
    named = []
    for n_tokens in ("0", "12"):
        folder = finish(tiny_llama, tmp_path / n_tokens, *words, "--max_new_tokens", n_tokens)
        rows = read(folder, "circuit_joint.csv")
        named.append(rows[rows["set"] == "named"].iloc[0])
    assert named[0]["kl_b"] == named[1]["kl_b"] < 0.01
    assert [row["damage"] for row in named] == ["no", "yes"]
    assert math.isnan(named[0]["kl_reply"]) and named[1]["kl_reply"] > 0.1
    randoms = rows[rows["set"] == "random"]["kl_reply"]
    assert 0 < randoms.max() < named[1]["kl_reply"]
    records = pd.read_json(folder / "joint_generations.jsonl", lines=True)
    edited = records[(records["ablated"] != "") & (records["prompt"] == "b")]["reply"]
    assert edited.value_counts().iloc[0] >= len(edited) / 2


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
    base = rows.iloc[0]
    if base["ci_low"] > 0 or base["ci_high"] < 0:
        shares = 1 - rows["mean_delta"] / base["mean_delta"]
        assert rows["share_removed"].tolist() == pytest.approx(shares.tolist())
    else:
        assert rows["share_removed"].isna().all()
    is_chosen = rows["set"] == "chosen"
    assert (rows["damage"][is_chosen] == "not judged").all()  # of three sentences
    assert rows["damage"][~is_chosen].isna().all() and rows["kl_reply"].isna().all()
    by_set = rows.groupby(["n_ablated", "kept"])["components"]
    assert by_set.nunique().eq(by_set.size()).all()


@pytest.mark.parametrize(("run", "measure"), [("confirmed", "a - b"), ("controlled", "a - other")])
def test_the_log_tells_what_the_joint_table_holds(
    run: str, measure: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(run)
    rows, log = joint_rows(folder, measure), (folder / "run.log").read_text()
    for row in rows[rows["set"] == "chosen"].itertuples():
        drawn = rows[(rows["set"] == "random") & (rows["n_ablated"] == row.n_ablated)]
        low, high = drawn["share_removed"].agg(["min", "max"])
        line = f"held-out samples, {row.n_ablated} jointly ({row.components}): mean {measure} "
        line += f"{row.mean_delta:+.3f} over 3 sentences [{row.ci_low:+.3f}, {row.ci_high:+.3f}], "
        if row.breaks_both:
            line += (
                "breaks both prompts, both scores move further than the base: no share removed; "
            )
        elif math.isnan(row.share_removed):
            line += "no share removed, the base is not clear; "
        else:
            line += f"{row.share_removed:.0%} removed [{row.share_low:.0%}, {row.share_high:.0%}], "
            line += f"{len(drawn)} distinct random sets {low:.0%} to {high:.0%}; "
        line += f"log P of the forbidden words {row.moved_a:+.2f} after prompt a, "
        line += f"{row.moved_b:+.2f} after b; KL {row.kl_a:.2g} after a, {row.kl_b:.2g} after b"
        is_above = max(row.kl_b, row.kl_reply) > tracing.MAX_KL or row.kl_b > tracing.MAX_KL
        line += ": more than 0.1 nats, " if is_above else ": "
        line += "damage is not judged"  # by three sentences
        assert line in log
    assert log.count(" jointly (L") == 3
    assert "nan" not in log


@pytest.mark.parametrize("extra", [-1, 0])
def test_few_random_sets_are_told_by_their_ends_and_many_by_their_quantiles(extra: int) -> None:
    n = tracing.MANY_SETS + extra
    rows = [set_row("L0H0", "chosen", damage="no")]
    rows += [set_row("L0H1", share=i / (n - 1)) for i in range(n)]
    (sentence,) = reported(pd.DataFrame(rows))
    ends = "0% to 100%" if extra < 0 else "5% to 95%"
    assert f", {n} distinct random sets {ends};" in sentence


def with_parts(experiment: tracing.Experiment[Any], folder: Path) -> tracing.Experiment[Any]:
    """The experiment with a folder for what it measures."""
    experiment.folder.path = folder
    experiment.folder.parts = folder / "parts"
    experiment.folder.parts.mkdir()
    return experiment


def capped_model(folder: Path) -> str:
    """One whose own logits are used."""
    widths = {"sliding_window": 400, "final_logit_softcapping": 2.0}
    return str(random_models.build_model(folder, "gemma2", **widths))


@pytest.mark.parametrize("rows", ["1", "64"])
@pytest.mark.parametrize(("name", "given"), [("plain", ""), ("plain", "L0H1"), ("capped", "")])
def test_the_divergence_of_the_first_reply_token_is_that_of_plain_forwards(
    name: str, given: str, rows: str, llama: str, tmp_path: Path
) -> None:
    """From what is said with the given components zeroed alone; capped are a model's own logits."""
    if name == "capped":
        llama = capped_model(tmp_path)
    flags = ["--rows_per_forward", rows, "--attn_implementation", "eager"]
    flags += ["--given", given] if given else []
    experiment = with_parts(prepared(llama, *flags), tmp_path)
    labels = ["", "L1H2", "L0H0 L2H3 L1mlp"]
    sets = [JointSet("", parsed(components)) for components in labels]
    table = tracing.measure_sets(experiment, sets, experiment.prompts)
    assert experiment.traced.uses_model_logits == (name == "capped")
    model, _ = naive.load(llama)
    for row in table.itertuples():
        components = labels[row.place]
        (prompts,) = (p for p in experiment.prompts if p[0].sample.sample_id == row.sample_id)
        with by_hand.ablated(model, given.split()):
            expected = [
                by_hand.divergence(model, prompt.ids, by_hand.ablated(model, components.split()))
                for prompt in prompts[:2]
            ]
        assert [row.kl_a, row.kl_b] == pytest.approx(expected, abs=CLOSE)
        assert min(row.kl_a, row.kl_b) >= 0
        assert (max(row.kl_a, row.kl_b) < 1e-6) == (not components)
    assert len(table) == len(labels) * len(experiment.prompts)


REPLIES = [[7], [9, 31, 4], [12, 5], [3, 3, 8, 40]]  # any tokens: the model did not say them


@pytest.mark.parametrize("rows", ["1", "64"])
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("llama", ""),
        ("llama", "--given L0H1"),
        ("llama", "--tree_tokens 1"),  # a tree per sample
        ("qwen3", ""),
        ("tiny", ""),
        ("capped", ""),
    ],
)
def test_the_divergence_along_replies_is_that_of_a_plain_forward_per_token(
    name: str, flags: str, rows: str, random_model: Any, tiny_llama: str, tmp_path: Path
) -> None:
    """Of prompts b and replies of any length; sets that say nothing of damage are left out."""
    model_path = capped_model(tmp_path) if name == "capped" else tiny_llama
    if name in ("llama", "qwen3"):
        model_path = random_model(name)
    words = ["--num_samples", "4", "--rows_per_forward", rows, "--no-bf16", *flags.split()]
    experiment = with_parts(prepared(model_path, *words), tmp_path)
    labels = {1: "L1H2", 2: "L0H0 L2H3 L1mlp", 5: "L0attn"}
    names = ["none", "chosen", "random", "all", "complement", "named"]
    sets = []
    for place, set_name in enumerate(names):
        kinds = ("head",) if set_name in ("all", "complement") else ()
        sets.append(JointSet(set_name, parsed(labels.get(place, "")), others_of=kinds))
    ids = [prompts[0].sample.sample_id for prompts in experiment.prompts]
    replies = dict(zip([(sample_id, "b") for sample_id in ids], REPLIES, strict=True))
    table = tracing.measure_along_replies(experiment, sets, experiment.prompts, replies)
    assert experiment.traced.uses_model_logits == (name == "capped")
    model, _ = naive.load(model_path)
    for row in table.itertuples():
        prompts = experiment.prompts[ids.index(row.sample_id)]
        edited = functools.partial(by_hand.ablated, model, labels[row.place].split())
        with by_hand.ablated(model, flags.removeprefix("--given ").split() * ("given" in flags)):
            expected = by_hand.divergence_along(
                model, prompts[1].ids, replies[row.sample_id, "b"], edited
            )
        assert row.kl_reply_b == pytest.approx(expected, abs=CLOSE)
        assert expected > 1e-6
    assert sorted(zip(table["place"], table["sample_id"], strict=True)) == [
        (place, sample_id) for place in labels for sample_id in sorted(ids)
    ]


def test_other_replies_have_divergences_of_their_own(llama: str, tmp_path: Path) -> None:
    """In a folder that keeps those of shorter replies."""
    words = ["joint", "L0H1,L1mlp", "--num_samples", "2", "--num_random", "2", "--max_new_tokens"]
    tables = []
    for folder, n_tokens in (("one", "1"), ("one", "4"), ("other", "4")):
        finish(llama, tmp_path / folder, *words, n_tokens)
        tables.append(read(tmp_path / folder, "circuit_joint.csv").query("set == 'named'"))
    shorter, longer, alone = tables
    assert shorter["kl_reply"].tolist() == pytest.approx(shorter["kl_b"].tolist(), abs=CLOSE)
    assert longer["kl_reply"].tolist() == alone["kl_reply"].tolist()
    assert longer["kl_reply"].tolist() != pytest.approx(shorter["kl_reply"].tolist(), rel=0.01)


@pytest.mark.parametrize("n_left", [0, 1, 2, 9])
def test_a_reply_is_read_as_far_as_the_window_holds_it(n_left: int, llama: str) -> None:
    """Behind the prompt so many tokens fit; the last one of a reply is not read."""
    experiment = prepared(llama)
    prompt = experiment.prompts[0][1]
    shape = replace(experiment.shape, context=len(prompt.ids) + n_left)
    answered = tracing.with_reply(prompt, [5, 6, 7], shape)
    assert answered.forms == (((5, 6, 7)[: n_left + 1],),)
    assert (answered.ids, answered.sample) == (prompt.ids, prompt.sample)


# ----- intervals


def interval(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    ends = tracing.mean_interval(*(torch.tensor(v).double()[:, None] for v in (sums, counts)))
    return ends[:, 0].tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_joint_intervals_are_those_of_the_units_sums(sign: int) -> None:
    """Four units of five samples; the share's interval is that of what is removed per base."""
    units = ["u", "v", "u", "w", "x"]
    base, edited = [sign * v for v in (2.6, 3.0, 2.4, 3.2, 2.8)], [1.0, -1.5, 0.5, 2.0, 1.0]
    scores = []
    for place, deltas in enumerate((base, edited, base)):
        for sample, delta in enumerate(deltas):
            scores.append((place, f"s{sample}", delta + 1.0, 1.0, units[sample]))
    rows = rows_of_sets(scores, "score_a score_b unit")
    sets = [JointSet("none"), JointSet("chosen"), JointSet("all", others_of=("head",))]
    table = tracing.joint_statistics(rows, "b", sets)
    counts, sums = [2, 1, 1, 1], [1.5, -1.5, 2.0, 1.0]
    bases = [sign * v for v in (5.0, 3.0, 3.2, 2.8)]
    assert (table["n_sentences"] == 4).all() and (table["n_samples"] == 5).all()
    means = [sum(values) / 5 for values in (bases, sums, bases)]
    assert table["mean_delta"].tolist() == pytest.approx(means)
    ends = [float(table[name][1]) for name in ("ci_low", "ci_high")]
    assert ends == pytest.approx(interval(sums, counts))
    removed = [before - after for before, after in zip(bases, sums, strict=True)]
    share, *ends = (float(table[f"share_{name}"][1]) for name in ("removed", "low", "high"))
    assert ends == pytest.approx(interval(removed, bases))
    assert ends[0] < share < ends[1]
    assert share == pytest.approx(sum(removed) / sum(bases))
    nothing = [float(table[f"share_{name}"][0]) for name in ("removed", "low", "high")]
    assert nothing == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_interval_of_one_component_alone_is_that_of_its_sweep(confirmed: Path) -> None:
    """On the held-out sentences."""
    row = joint_rows(confirmed).query("set == 'chosen' and n_ablated == 1").iloc[0]
    (component,), table = parsed(row["components"]), read(confirmed)
    is_same = (table["layer"] == component.layer) & (table["head"] == component.index)
    is_same &= table["sample_id"].isin(halves(confirmed)[1])
    bases, deltas = (table[is_same][f"delta_logit_{run}"].tolist() for run in ("base", "head"))
    ones = [1.0] * len(deltas)
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(interval(deltas, ones), abs=CLOSE)
    low, high = interval(bases, ones)
    assert low < 0 < high  # so that there is no share
    assert row[["share_removed", "share_low", "share_high"]].isna().all()


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


# ----- named sets


@pytest.mark.parametrize(
    ("label", "swept", "done"),
    [
        ("L1H2", "head --heads 2", "mean --positions last"),
        ("L2mlp", "mlp", "mean"),
        ("L0attn", "attn", "patch"),
        ("L1resid", "resid", "patch --positions last"),
        ("L1N41", "neuron --neurons 41", "scale --factor 0.5"),
        ("L2H3", "head --heads 3", "zero --positions last"),
    ],
)
def test_a_named_component_has_the_effect_that_its_sweep_finds(
    label: str, swept: str, done: str, llama: str, tmp_path: Path
) -> None:
    flags = f"--num_samples 2 --op {done}".split()
    sweep = ["--kind", *swept.split(), "--layers", label[1]]
    table = read(finish(llama, tmp_path / "swept", *flags, *sweep))
    joint = finish(llama, tmp_path / "joint", "joint", label, *flags, "--num_random", "1")
    rows = read(joint, "circuit_joint.csv").set_index("set")
    means = table[["delta_logit_base", "delta_logit_head"]].mean().tolist()
    assert rows["mean_delta"][["none", "named"]].tolist() == pytest.approx(means, abs=CLOSE)
    assert means[0] != pytest.approx(means[1], abs=1e-4)


def test_the_table_keeps_a_block_of_rows_for_each_named_set_and_op(
    llama: str, tmp_path: Path
) -> None:
    """Those of other sets stay as they are written, to the last digit; the same one is replaced."""

    def lines(*words: str) -> list[str]:
        finish(llama, tmp_path, "joint", *words)
        return (tmp_path / "circuit_joint.csv").read_text().splitlines()[1:]

    one = lines("L0H1", "--num_samples", "2", "--num_random", "2")
    other = lines("L1H2,L2mlp", "--num_random", "1")
    assert other[: len(one)] == one
    scaled = lines("L0H1", "--num_random", "1", "--op", "scale", "--factor", "2")
    assert scaled[: len(other)] == other
    fewer = lines("L0H1", "--num_random", "1")
    first = [line for line in one if line.split(",")[5] == "0"]  # draw
    assert fewer == [*scaled[len(one) :], *first]
    table = read(tmp_path, "circuit_joint.csv")
    edit = ["named", "op", "positions", "given"]
    assert list(table)[:4] == edit
    changes = ["change", "change_low", "change_high"]
    assert sorted(table) == sorted([*edit, *changes, *COLUMNS.replace(" selection", "").split()])
    blocks = table[["named", "op"]].drop_duplicates().to_numpy().tolist()
    assert blocks == [["L1H2,L2mlp", "zero"], ["L0H1", "scale 2"], ["L0H1", "zero"]]


# ----- resume


def test_joint_sets_and_replies_that_are_there_are_not_made_again(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_samples", "2", "--layers", "1-2", "--max_new_tokens", "2"]
    named = ["joint", "L0H0,L1mlp", "--num_random", "2"]

    def finish_without(name: str, *words: str, table: str = CONFIRM_TABLE) -> bytes:
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(tracing, name, lambda *a: pytest.fail(f"{name} was called"))
            return (finish(llama, tmp_path, *words) / table).read_bytes()

    confirm = [*flags, "--confirm", "2"]
    before = finish_without("", *confirm, "--num_random", "2")
    replies = (tmp_path / "generations.jsonl").read_bytes()
    assert finish_without("load_model", *confirm, "--num_random", "2") == before
    joint = finish_without("", *named, table="circuit_joint.csv")
    assert finish_without("load_model", *named, table="circuit_joint.csv") == joint
    fewer = finish_without("load_model", *confirm, "--num_random", "1")
    first = [line for line in before.splitlines() if line.split(b",")[1] != b"1"]  # draw
    assert fewer.splitlines() == first != before.splitlines()
    assert finish_without("load_model", *confirm, "--num_random", "2") == before
    assert (tmp_path / "generations.jsonl").read_bytes() == replies


def test_scaled_sets_are_told_apart_to_the_last_digit(llama: str, tmp_path: Path) -> None:
    """Their numbers are kept by multiplier."""
    flags = ["--num_samples", "2", "--num_random", "1", "--max_new_tokens", "1"]
    multipliers = ["--multipliers", "1,1.0000001,3,3.000001"]
    folder = finish(llama, tmp_path, "joint", "L0attn,L1attn", *flags, *multipliers)
    steered = read(folder, "circuit_steer.csv").query("set == 'circuit' and side == 'a'")
    assert steered["mean_delta"].nunique() >= 3

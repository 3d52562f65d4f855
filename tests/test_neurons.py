"""Neurons: which fire on any text, what a circuit chooses by, and their activations by side."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import Answer, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import Component

UNIVERSAL, ACTIVATIONS, CONFIRM = (
    f"circuit_{name}.csv" for name in ("universal", "activations", "confirm")
)
KEY = ["layer", "kind", "index"]
# 24 neurons, all of which are measured; some are universal ones of the bundled model
NEURONS = ["--kind", "neuron", "--neurons", "7,20,105,109,140,155", "--num_samples", "6"]
NEURONS += ["--screen", "6"]
CHOOSING = [*NEURONS, "--confirm", "9", "--num_random", "3"]
CLOSE = 1e-4

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def skipping(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that leaves out what it finds, and one neuron that is named."""
    folder = tmp_path_factory.mktemp("skipping")
    return finish(tiny_llama, folder, *CHOOSING, "--skip", "L2N7,universal")


def circuit_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "circuit.json").read_text()))


def findings_of(folder: Path) -> list[str]:
    """Without the names of stages: those of the self-test are of a first run."""
    entries = record_of(folder)["commands"]["trace"]["findings"]
    return [entry["text"] for entry in entries if entry["level"] != "heading"]


def finding(folder: Path, beginning: str) -> str:
    (text,) = [text for text in findings_of(folder) if text.startswith(beginning)]
    return text


# ----- universal neurons


def universal_by_hand(model: str, given: Sequence[str] = ()) -> dict[str, tuple[int, float]]:
    """By label how many everyday texts a universal neuron is among the strongest of, and its mean
    activation: a plain forward per text."""
    loaded, tokenizer = naive.load(model)
    n_layers, n_neurons = loaded.config.num_hidden_layers, loaded.config.intermediate_size
    counts: Counter[str] = Counter()
    sums: dict[str, float] = {}
    for text, layer in itertools.product(tracing.EVERYDAY_TEXTS, range(n_layers)):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and "assistant" not in tokenizer.decode(ids)
        with by_hand.ablated(loaded, given):
            last = naive.input_of(loaded, ids, layer, "neuron")[-1].tolist()
        order = sorted(range(n_neurons), key=lambda index: -abs(last[index]))
        for index in order[: n_neurons // 10]:
            counts[f"L{layer}N{index}"] += 1
        for index, value in enumerate(last):
            label = f"L{layer}N{index}"
            sums[label] = sums.get(label, 0.0) + value
    found = {label: (number, sums[label] / 20) for label, number in counts.items()}
    return {label: pair for label, pair in found.items() if pair[0] >= 16}


def check_universal(folder: Path, expected: dict[str, tuple[int, float]]) -> None:
    """The table is what plain forwards give, in the model's order."""
    table = read(folder, UNIVERSAL)
    assert list(table) == ["label", "layer", "index", "n_prompts", "mean_activation"]
    components = list(map(Component.parse, table["label"]))
    assert components == sorted(components) and set(table["label"]) == {*expected}
    assert table["layer"].tolist() == [component.layer for component in components]
    assert table["index"].tolist() == [component.index for component in components]
    for row in table.itertuples():
        assert row.n_prompts == expected[row.label][0]
        assert row.mean_activation == pytest.approx(expected[row.label][1], abs=CLOSE)


def test_universal_neurons_are_those_of_a_plain_forward_per_text(
    skipping: Path, tiny_llama: str
) -> None:
    expected = universal_by_hand(tiny_llama)
    assert len(expected) > 2
    check_universal(skipping, expected)


@pytest.mark.parametrize("given", ["", "L0N140,L3N109"])
def test_they_are_those_of_the_model_without_what_is_given(
    given: str, tiny_llama: str, tmp_path: Path
) -> None:
    """Whatever the op, the task and the prompts, and with a tree per text."""
    flags = "--op patch --no_chat --tree_tokens 1 --target_form exact --num_samples 4 --confirm 1"
    words = [*flags.split(), "--kind", "neuron", "--neurons", "0-2", "--skip", "universal"]
    if given:
        words += ["--given", given]
    folder = finish(tiny_llama, tmp_path, *words)
    expected = universal_by_hand(tiny_llama, given.split(",") if given else [])
    check_universal(folder, expected)
    assert ({"L0N140", "L3N109"} <= {*expected}) == (not given)


def test_they_are_told_and_kept_like_named_ones(skipping: Path, tiny_llama: str) -> None:
    table = read(skipping, UNIVERSAL)
    text = finding(skipping, f"{len(table)} universal neurons in layers 0 to 3, such as ")
    best = table.assign(size=table["mean_activation"].abs())
    best = best.sort_values(["n_prompts", "size"], ascending=False)
    assert [word for word in text.split() if word.startswith("L")] == best["label"].tolist()[:2]
    assert "among the 19 largest |activations| of their layer" in text
    assert "16 or more of 20 everyday texts" in text
    assert circuit_of(skipping)["skip"] == ["L2N7", *table["label"]]
    recorded = record_of(skipping)["commands"]["trace"]["options"]["skip"]
    assert recorded == "universal,L2N7"


def test_they_are_treated_as_if_they_were_named(
    skipping: Path, tiny_llama: str, tmp_path: Path
) -> None:
    """In the screen, in the circuit and in the random sets beside it."""
    names = ",".join(["L2N7", *read(skipping, UNIVERSAL)["label"]])
    named = finish(tiny_llama, tmp_path / "named", *CHOOSING, "--skip", names)
    for name in ("circuit_results.csv", "circuit_screen.csv", CONFIRM, "circuit.json"):
        assert (named / name).read_bytes() == (skipping / name).read_bytes()
    assert not (named / UNIVERSAL).exists()
    without = finish(tiny_llama, tmp_path / "without", *CHOOSING)
    found = {*names.split(",")}
    for folder, are_there in ((without, True), (skipping, False)):
        circuit = [component["label"] for component in circuit_of(folder)["components"]]
        assert (found <= {*read(folder, "circuit_heads.csv")["label"]}) == are_there
        assert bool(found & {*circuit}) == are_there
    sets = read(skipping, CONFIRM)["components"].str.cat(sep=" ")
    assert not found & {*sets.split()}


def test_a_second_run_reads_them_and_one_that_stopped_goes_on(
    tiny_llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    words = [*CHOOSING, "--skip", "universal"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "estimate", stop)
        with contextlib.suppress(KeyboardInterrupt):
            tracing.main(["--model_id", tiny_llama, "--output_dir", str(tmp_path), *words])
    assert len(list((tmp_path / ".parts").glob("universal-*.json"))) == 1
    monkeypatch.setattr(tracing, "find_universal", lambda *_: pytest.fail("found again"))
    finish(tiny_llama, tmp_path, *words)
    names = (UNIVERSAL, ACTIVATIONS, CONFIRM, "circuit.json", "circuit_heads.csv")
    before = [(tmp_path / name).read_bytes() for name in names]
    told = findings_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
        finish(tiny_llama, tmp_path, *words)
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert findings_of(tmp_path) == told
    finish(tiny_llama, tmp_path, *NEURONS)
    assert not (tmp_path / UNIVERSAL).exists(), "it is of another command line"


def test_overwrite_finds_them_anew(tiny_llama: str, tmp_path: Path, monkeypatch: Patch) -> None:
    words = [*NEURONS, "--skip", "universal"]
    finish(tiny_llama, tmp_path, *words)
    find_universal = tracing.find_universal
    calls = []

    def find(*arguments: Any) -> Any:
        calls.append(arguments)
        return find_universal(*arguments)

    monkeypatch.setattr(tracing, "find_universal", find)
    finish(tiny_llama, tmp_path, *words, "--overwrite")
    assert len(calls) == 1


def test_joint_leaves_them_out_of_its_random_sets(
    tiny_llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Of the neurons of a layer two are no universal ones: one is chosen, the other is drawn."""
    universal = [[f"L1N{index}", 1, index, 20, 1.0] for index in range(2, 192)]
    monkeypatch.setattr(tracing, "find_universal", lambda *_: universal)
    flags = "--kind neuron --layers 1 --neurons 0-3 --num_samples 4 --confirm 1 --num_random 9"
    folder = finish(tiny_llama, tmp_path, *flags.split(), "--skip", "universal")
    finish(tiny_llama, folder, "joint", "--num_random", "9")
    (chosen,) = [component["label"] for component in circuit_of(folder)["components"]]
    for name in (CONFIRM, "circuit_joint.csv"):
        table = read(folder, name)
        drawn = table[table["set"] == "random"]["components"]
        assert {*drawn} == {"L1N0", "L1N1"} - {chosen}


def test_where_all_are_universal_nothing_is_left(
    tiny_llama: str, tmp_path: Path, monkeypatch: Patch, answer: Answer
) -> None:
    monkeypatch.setattr(tracing, "UNIVERSAL_SHARE", 0.0)
    words = ["--model_id", tiny_llama, "--output_dir", str(tmp_path), "--skip", "universal"]
    says = ["nothing is left to screen beside --skip universal"]
    refuses(answer, *words, *CHOOSING, says=says)
    swept = ["--confirm", "3", "--overwrite"]
    says = ["--confirm 3 takes the best", "0 components are measured, of 0"]
    refuses(answer, *words, *NEURONS[:-2], *swept, says=says)


def test_where_none_is_universal_that_is_said(
    tiny_llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(tracing, "UNIVERSAL_SHARE", 1.1)
    folder = finish(tiny_llama, tmp_path, *CHOOSING, "--skip", "universal")
    assert "22 or more of 20" in finding(folder, "no neuron is universal: among the 19 largest")
    assert read(folder, UNIVERSAL).empty
    assert circuit_of(folder)["skip"] == []


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("llama", "--confirm 1", "it is for --kind neuron, not head"),
        ("llama", "--kind mlp --confirm 1", "it is for --kind neuron, not mlp"),
        ("llama", "--kind neuron --neurons 0-3", "give --confirm or --screen"),
        ("llama", "--kind neuron --screen 2 --confirm 1 --select", "--select"),
        ("mixtral", "--kind neuron --screen 2", "--kind neuron: MixtralForCausalLM has blocks"),
    ],
)
def test_what_has_no_universal_neurons_is_refused_before_the_weights(
    model: str,
    flags: str,
    says: str,
    random_model: Callable[..., str],
    tmp_path: Path,
    answer: Answer,
    no_weights: None,
) -> None:
    argv = ["--model_id", random_model(model), "--output_dir", str(tmp_path), *flags.split()]
    code, _, err = answer(*argv, "--skip", "universal")
    assert code == 2 and says in err


def test_a_model_of_too_few_tokens_is_refused_before_the_weights(
    tiny_llama: str, no_weights: None
) -> None:
    experiment = by_hand.prepared(tiny_llama, *NEURONS, "--skip", "universal")
    tracing.check_trace(experiment)
    experiment.shape = replace(experiment.shape, context=5)
    with pytest.raises(tracing.UsageError, match="everyday text 'The train to the coast"):
        tracing.check_trace(experiment)


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("universal", "universal"),
        ("L2N7,universal,L2N7,L0N1", "universal,L2N7,L0N1"),
        ("universal,universal", "universal"),
        ("L2N7", "L2N7"),
    ],
)
def test_the_option_and_its_text_are_inverse(text: str, recorded: str) -> None:
    skip = tracing.parse_skipped(text)
    assert str(skip) == recorded and bool(skip)
    assert tracing.parse_skipped(recorded) == skip
    found = skip.with_found([Component(2, "neuron", 7), Component(3, "neuron", 1)])
    assert str(found) == recorded
    assert {"L2N7", "L3N1"} <= {component.label for component in found}
    assert len(found) == len({*found})


@pytest.mark.parametrize("text", ["universal,", "Universal", "universal,L2", "universal/x"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        tracing.parse_skipped(text)


def test_the_strongest_by_hand_are_of_either_sign_and_not_zero() -> None:
    row = [0.0] * 30
    row[3], row[7], row[9], row[20] = -5.0, 4.0, 1.0, -0.5
    dead = [0.0] * 29 + [0.1]
    marks = tracing.are_strongest(torch.tensor([row, dead]))
    assert marks.nonzero().tolist() == [[0, 3], [0, 7], [0, 9], [1, 29]]
    assert [tracing.count_strongest(n) for n in (4, 10, 499, 500, 14336)] == [1, 1, 49, 50, 50]


def test_the_everyday_texts_are_of_no_task() -> None:
    texts = tracing.EVERYDAY_TEXTS
    assert len(texts) == len({*texts}) == 20
    assert all(text == text.strip() and len(text.split()) < 12 for text in texts)
    words = {word.strip(".?,").lower() for text in texts for word in text.split()}
    answers = {word.lower() for row in tracing.QUESTIONS.values() for word in row.split()}
    assert not {*texts} & {question for question in tracing.QUESTIONS}
    harms = itertools.chain(*tracing.HARM_CATEGORIES.values())
    assert not words & {*harms, "mention", "odd", "name"}
    assert len(words & answers) < 10


# ----- choosing by the effects of each sentence


ROLES = {"L0H0": 0.5, "L0H1": 0.4, "L0H2": 0.3, "L1H0": 0.6, "L1H1": -0.5, "L2H0": 0.1}
RULES = ("2", "top:4", "mass:0.4", "mass:1", "share:0.1", "share:0.2", "layer:1")


def effects_table(sign: int, seed: int = 0) -> pd.DataFrame:
    """Effects about `ROLES` in nine sentences, one of which has two samples; the base of the second
    sentence has the other sign."""
    rng = random.Random(seed)
    effects = {}
    for label, role in ROLES.items():
        effects[label] = [sign * (role + rng.gauss(0, 0.3)) for _ in range(10)]
    bases = [-2.0 * sign] * 10
    bases[1] = 0.7 * sign
    units = [f"u{min(place, 8)}" for place in range(10)]
    return by_hand.results(effects, bases, units)


def choose_by_hand(
    table: pd.DataFrame, rule: str, select: str, units: Iterable[str], skip: Sequence[str] = ()
) -> list[str]:
    """Labels by falling mean role: what the rule takes in any, or in all, of the sentences."""
    labels = [Component(*key).label for key in table[KEY].itertuples(index=False)]
    table = table.assign(label=labels)
    table = table[table["unit"].isin(set(units)) & ~table["label"].isin(skip)]
    bases = table.drop_duplicates("sample_id").set_index("sample_id")["delta_logit_base"]
    sign = -math.copysign(1.0, bases.mean())
    choices = []
    for _, rows in table.groupby("unit"):
        roles = dict(sign * rows.groupby("label")["head_effect"].mean())
        base = abs(rows.drop_duplicates("sample_id")["delta_logit_base"].mean())
        choices.append(take_by_hand(roles, rule, base))
    chosen = set.union(*choices) if select == "any" else set.intersection(*choices)
    mean_roles = dict(sign * table.groupby("label")["head_effect"].mean())
    return sorted(chosen, key=lambda label: -mean_roles[label])


def take_by_hand(roles: dict[str, float], rule: str, base: float) -> set[str]:
    """What a rule takes of some roles, of a base of this size."""
    name, _, amount = rule.rpartition(":")
    order = sorted(roles, key=lambda label: -roles[label])
    if name in ("", "top"):
        return {*order[: int(amount)]}
    order = [label for label in order if roles[label] > 0]
    if name == "share":
        return {label for label in order if roles[label] >= float(amount) * base}
    if name == "layer":
        taken = set()
        for _, group in itertools.groupby(sorted(order, key=by_layer), by_layer):
            best_first = sorted(group, key=lambda label: -roles[label])
            taken.update(best_first[: int(amount)])
        return taken
    taken, mass = set(), 0.0
    for label in order:
        if mass < float(amount) * sum(roles[one] for one in order):
            taken.add(label)
        mass += roles[label]
    return taken


def by_layer(label: str) -> int:
    return Component.parse(label).layer


def labels(chosen: pd.DataFrame) -> list[str]:
    return [component.label for component in chosen.index]


@pytest.mark.parametrize("select", ["any", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_any_and_all_are_the_union_and_the_intersection_of_what_sentences_choose(
    rule: str, select: str
) -> None:
    n_chosen = set()
    for sign, seed in itertools.product((1, -1), range(4)):
        table = effects_table(sign, seed)
        sums = tracing.sum_by_sentence(table, "b")
        for skip in ((), ("L1H0", "L9mlp")):
            skipped = [Component.parse(label) for label in skip]
            choice = tracing.ChoiceRule(tracing.SelectionRule.parse(rule), None, skipped, select)
            for units in ({*table["unit"]}, {"u0", "u1", "u8"}):
                chosen = tracing.choose_circuit(sums, units, choice)
                expected = choose_by_hand(table, rule, select, units, skip)
                assert labels(chosen) == expected
                n_chosen.add(len(expected))
                of_units = table[table["unit"].isin(units)]
                means = of_units.groupby(KEY)["head_effect"].mean()
                for component, row in chosen.iterrows():
                    key = (component.layer, component.kind, component.index)
                    assert row["mean"] == pytest.approx(means[key])
                    assert row["role"] == pytest.approx(sign * means[key])
    assert len(n_chosen) > 1


def test_where_an_op_amplifies_the_roles_turn() -> None:
    table = effects_table(1)
    sums = tracing.sum_by_sentence(table, "b")
    units = {*table["unit"]}
    for select in ("any", "all"):
        rule = tracing.ChoiceRule(tracing.SelectionRule.parse("layer:9"), 2.0, (), select)
        flipped = table.assign(head_effect=-table["head_effect"])
        expected = choose_by_hand(flipped, "layer:9", select, units)
        assert labels(tracing.choose_circuit(sums, units, rule)) == expected


def test_of_one_sentence_all_three_choose_the_same() -> None:
    table = effects_table(1)
    sums = tracing.sum_by_sentence(table, "b")
    for rule in RULES:
        selection = tracing.SelectionRule.parse(rule)
        chosen = []
        for select in tracing.SELECTS:
            choice = tracing.ChoiceRule(selection, None, (), select)
            chosen.append(tracing.choose_circuit(sums, ["u8"], choice))
        for other in chosen[1:]:
            pd.testing.assert_frame_equal(other, chosen[0], check_exact=True)


@pytest.mark.parametrize("select", ["any", "all"])
def test_the_halves_of_a_stable_choice_choose_by_the_same_rule(select: str) -> None:
    table = effects_table(1)
    sums = tracing.sum_by_sentence(table, "b")
    units = {*table["unit"]}
    rule = tracing.ChoiceRule(tracing.SelectionRule.parse("3"), None, (), select)
    choosing, _ = tracing.halves(units, 1)
    chosen = tracing.choose_circuit(sums, choosing, rule)
    stability = tracing.Stability.of(chosen, sums, rule, units, seed=1)
    different = {frozenset(tracing.halves(units, f"1 split {i}")[0]) for i in range(100)}
    different -= {frozenset(choosing)}
    choices = [choose_by_hand(table, "3", select, half) for half in different]
    assert len({len(choice) for choice in choices}) > 1
    shares = [sum(label in choice for choice in choices) / len(choices) for label in labels(chosen)]
    assert stability.chosen_in.tolist() == pytest.approx(shares)
    again = [len({*choice} & {*labels(chosen)}) for choice in choices]
    assert stability.n_again[len(chosen)] == pd.Series(again).median()


@pytest.fixture(scope="module")
def selected(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder by the value of --select, "" without it, made once."""
    folders: dict[str, Path] = {}

    def run(select: str) -> Path:
        if select not in folders:
            words = ["--num_samples", "9", "--confirm", "12", "--num_random", "3"]
            if select:
                words += ["--select", select]
            folders[select] = finish(tiny_llama, tmp_path_factory.mktemp(f"by{select}"), *words)
        return folders[select]

    return run


@pytest.mark.parametrize("select", ["any", "all"])
def test_a_circuit_is_what_the_sentences_of_the_choosing_half_choose(
    select: str, selected: Callable[[str], Path]
) -> None:
    folder = selected(select)
    circuit, table = circuit_of(folder), read(folder)
    half = table[table["sample_id"].isin(by_hand.halves(folder)[0])]
    expected = choose_by_hand(half, "12", select, half["unit"])
    if len(expected) > 16:  # of 32
        assert f"the best 16 of {len(expected)} are taken" in (folder / "run.log").read_text()
        expected = expected[:16]
    assert [component["label"] for component in circuit["components"]] == expected
    assert circuit["select"] == select and len(expected) != 12
    mean = circuit_of(selected(""))
    others = [label for label in mean["ranking"] if label not in expected]
    assert circuit["ranking"] == expected + others
    rows = by_hand.joint_rows(folder)
    sizes = rows[rows["set"] == "chosen"].set_index("n_ablated")["components"]
    assert sizes.index.tolist() == tracing.sizes_up_to(len(expected))
    assert all(row.split() == expected[:size] for size, row in sizes.items())
    where = {"any": "in any sentence", "all": "in every sentence"}[select]
    assert {*read(folder, CONFIRM)["selection"]} == {f"12 by role of 32 exact effects {where}"}


def test_it_is_said_how_many_each_sentence_chooses(selected: Callable[[str], Path]) -> None:
    folder = selected("any")
    half = read(folder).query("sample_id in @ids", local_dict={"ids": by_hand.halves(folder)[0]})
    n_any = len(choose_by_hand(half, "12", "any", half["unit"]))
    n_all = len(circuit_of(selected("all"))["components"])
    text = finding(folder, "--select any over 5 sentences: the effects of each choose 12, ")
    assert f"those of at least one {n_any}, those of all {n_all};" in text
    assert text.endswith("roles have the sign that the mean base gives them")


def test_the_mean_chooses_as_before(selected: Callable[[str], Path]) -> None:
    """Nothing of a run without --select differs."""
    assert "select" not in circuit_of(selected("mean"))
    for name in ("circuit.json", CONFIRM, "circuit_heads.csv"):
        assert (selected("mean") / name).read_bytes() == (selected("") / name).read_bytes()
    assert findings_of(selected("mean")) == findings_of(selected(""))
    assert {*read(selected(""), CONFIRM)["selection"]} == {"12 by role of 32 exact effects"}


def test_where_no_component_is_chosen_by_all_that_is_said(llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 8 --confirm 1 --select all --num_random 2"
    folder = finish(llama, tmp_path, *flags.split())
    assert "--confirm 1 chooses no component" in (folder / "run.log").read_text()
    assert circuit_of(folder)["components"] == [] and not (folder / CONFIRM).exists()
    text = finding(folder, "--select all over 4 sentences: the effects of each choose 1, ")
    assert "those of all 0;" in text


def test_a_choice_differs_in_number_by_sentence() -> None:
    findings, table = tracing.Findings(), effects_table(1)
    rule = tracing.ChoiceRule(tracing.SelectionRule.parse("share:0.4"), None, (), "any")
    sums = tracing.sum_by_sentence(table, "b")
    choose_alone = functools.partial(tracing.choose_in_sentence, sums, rule)
    tracing.report_choices(findings, sums, table["unit"], rule, choose_alone)
    sizes = [len(choose_by_hand(table, "share:0.4", "any", [unit])) for unit in {*table["unit"]}]
    base_turns = choose_by_hand(table, "share:0.4", "any", table["unit"])
    (text,) = [entry["text"] for entry in findings.entries]
    assert f"those of at least one {len(base_turns)}, " in text
    assert len(sizes) == 9 and " to " in text.split(",")[0]


@pytest.mark.parametrize("select", ["any", "all"])
def test_select_needs_confirm(
    select: str, llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), "--select", select]
    says = [f"--select {select} says how --confirm chooses: give --confirm"]
    refuses(answer, *argv, says=says)


# ----- activations by side


def activations_by_hand(
    model: str, texts: dict[str, dict[str, str]], layer: int
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """By sample and side (last token, mean over tokens without BOS) of a layer's neurons."""
    loaded, tokenizer = naive.load(model)
    values: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for sample_id, by_side in texts.items():
        values[sample_id] = {}
        for side in ("a", "b"):
            ids = naive.prompt_ids(tokenizer, by_side[side])
            x = naive.input_of(loaded, ids, layer, "neuron").double()
            values[sample_id][side] = (x[-1].tolist(), x[1:].mean(0).tolist())
    return values


def check_activations(folder: Path, model: str, unit_of: dict[str, str]) -> None:
    """circuit_activations.csv is what plain forwards of the samples of `unit_of` give."""
    table = read(folder, ACTIVATIONS)
    heads = read(folder, "circuit_heads.csv")
    assert table["label"].tolist() == heads["label"].tolist()
    assert table["index"].tolist() == heads["index"].tolist()
    texts = {name: by_hand.texts(folder)[name] for name in unit_of}
    for layer, rows in table.groupby("layer"):
        values = activations_by_hand(model, texts, layer)
        for row in rows.itertuples():
            check_row(row, {name: values[name] for name in unit_of}, unit_of)


def check_row(row: Any, values: dict[str, Any], unit_of: dict[str, str]) -> None:
    n = len(values)
    last, mean = {}, {}
    for side in ("a", "b"):
        last[side] = sum(value[side][0][row.index] for value in values.values()) / n
        mean[side] = sum(value[side][1][row.index] for value in values.values()) / n
    differences: dict[str, list[float]] = {}
    for name, value in values.items():
        difference = value["a"][0][row.index] - value["b"][0][row.index]
        differences.setdefault(unit_of[name], []).append(difference)
    sums = [sum(of_unit) for of_unit in differences.values()]
    counts = [float(len(of_unit)) for of_unit in differences.values()]
    _, low, high = by_hand.mean_test(sums, counts)
    found = [row.last_a, row.last_b, row.mean_a, row.mean_b]
    assert found == pytest.approx([last["a"], last["b"], mean["a"], mean["b"]], abs=CLOSE)
    found = [row.last_difference, row.last_difference_low, row.last_difference_high]
    assert found == pytest.approx([last["a"] - last["b"], low, high], abs=CLOSE)
    assert low < row.last_difference < high


@pytest.mark.parametrize(
    "flags",
    [
        "--screen 5 --num_samples 5",
        "--neurons 3,40-41,191 --layers 0,3 --num_samples 5 --controls --tree_tokens 1",
    ],
)
def test_activations_are_those_of_plain_forwards(
    flags: str, tiny_llama: str, tmp_path: Path
) -> None:
    folder = finish(tiny_llama, tmp_path, "--kind", "neuron", *flags.split())
    samples = read(folder).drop_duplicates("sample_id").set_index("sample_id")
    check_activations(folder, tiny_llama, dict(samples["unit"]))


def test_sentences_are_independent_and_negative_controls_have_no_say(
    tiny_llama: str, tmp_path: Path
) -> None:
    """Two samples share a sentence; the tree of the last negative control has no other sample."""
    records = []
    for place, (word, kind) in enumerate(
        [("apple", "fruit"), ("pear", "fruit"), ("oak", "tree"), ("iron", "metal"), ("owl", "bird")]
    ):
        record = {"prompt_a": f"Don't mention {word}. Name a {kind}.", "targets": [word]}
        record |= {"prompt_b": f"Name a {kind}.", "sample_id": f"n{place}"}
        records.append(record)
    for place, word in enumerate(["apple", "rose"]):
        record = {"prompt_a": f"Don't say {word}. Name a {word}.", "prompt_b": "Name a fruit."}
        record |= {"targets": [word], "group": tracing.NO_ODD_ONE, "sample_id": f"x{place}"}
        records.insert(place, record)
    samples = write_samples(tmp_path / "mine.jsonl", *records[1:], records[0])
    words = ["--kind", "neuron", "--neurons", "0-5", "--samples", samples, "--tree_tokens", "1"]
    folder = finish(tiny_llama, tmp_path / "out", *words)
    kinds = {"n0": "fruit", "n1": "fruit", "n2": "tree", "n3": "metal", "n4": "bird"}
    check_activations(folder, tiny_llama, kinds)


def test_wordings_are_a_second_factor_as_in_other_intervals(
    tiny_llama: str, tmp_path: Path
) -> None:
    flags = "--kind neuron --neurons 0-2 --layers 2 --num_samples 4 --templates 3"
    folder = finish(tiny_llama, tmp_path, *flags.split())
    samples = read(folder).drop_duplicates("sample_id")
    values = activations_by_hand(tiny_llama, by_hand.texts(folder), 2)
    assert len(values) == 12
    rows = []
    for sample in samples.itertuples():
        value = values[sample.sample_id]
        for index in range(3):
            difference = value["a"][0][index] - value["b"][0][index]
            row = {"unit": sample.unit, "template": sample.template, "group": ""}
            rows.append(row | {"layer": 2, "kind": "neuron", "index": index, "d": difference})
    statistics = tracing.column_statistics(pd.DataFrame(rows), "d")
    table = read(folder, ACTIVATIONS)
    columns = ["last_difference", "last_difference_low", "last_difference_high"]
    expected = statistics[["mean", "ci_low", "ci_high"]].to_numpy()
    assert table[columns].to_numpy() == pytest.approx(expected, abs=CLOSE)


def test_samples_of_one_prompt_have_no_side_b(tiny_llama: str, tmp_path: Path) -> None:
    records = [
        {"prompt_a": f"Name a {kind}.", "targets": [word], "foils": ["iron"]}
        for word, kind in (("apple", "fruit"), ("oak", "tree"), ("owl", "bird"))
    ]
    samples = write_samples(tmp_path / "one.jsonl", *records)
    words = ["--kind", "neuron", "--neurons", "7", "--task", "contrast", "--samples", samples]
    folder = finish(tiny_llama, tmp_path / "out", *words)
    table = read(folder, ACTIVATIONS)
    empty = [name for name in table if "_b" in name or "difference" in name]
    assert len(empty) == 5 and table[empty].isna().all(axis=None)
    texts = {name: {**by_side, "b": "x"} for name, by_side in by_hand.texts(folder).items()}
    for row in table.itertuples():
        values = activations_by_hand(tiny_llama, texts, row.layer)
        last = [value["a"][0][7] for value in values.values()]
        mean = [value["a"][1][7] for value in values.values()]
        expected = [sum(last) / 3, sum(mean) / 3]
        assert [row.last_a, row.mean_a] == pytest.approx(expected, abs=CLOSE)


def test_activations_are_those_without_what_is_given(tiny_llama: str, tmp_path: Path) -> None:
    """The edits of the sweep are not in them."""
    flags = "--kind neuron --neurons 7 --layers 2 --num_samples 3 --op scale --factor 9"
    given = ["L0H0", "L1mlp"]
    folder = finish(tiny_llama, tmp_path, *flags.split(), "--given", ",".join(given))
    (row,) = read(folder, ACTIVATIONS).itertuples()
    model, tokenizer = naive.load(tiny_llama)
    last = []
    for by_side in by_hand.texts(folder).values():
        ids = naive.prompt_ids(tokenizer, by_side["a"])
        with by_hand.ablated(model, given):
            last.append(float(naive.input_of(model, ids, 2, "neuron")[-1, 7]))
    assert row.last_a == pytest.approx(sum(last) / 3, abs=CLOSE)


def test_the_strongest_clear_neurons_are_told(tiny_llama: str, tmp_path: Path) -> None:
    folder = finish(tiny_llama, tmp_path, "--kind", "neuron", "--screen", "20")
    heads = read(folder, "circuit_heads.csv")
    clear = heads[heads["verdict"].isin(["contributes", "works against"])]
    order = clear.sort_values("role", key=abs, ascending=False)["label"].tolist()[:5]
    assert order
    text = finding(folder, "mean activations: ").removeprefix("mean activations: ")
    parts = text.split("; ")
    assert [part.split()[0] for part in parts] == order
    row = read(folder, ACTIVATIONS).set_index("label").loc[order[0]]
    interval = f"[{row['last_difference_low']:+.3g}, {row['last_difference_high']:+.3g}]"
    assert parts[0] == (
        f"{order[0]} is {row['last_a']:.3g} at the last token of prompt a, {row['last_b']:.3g} of b"
        f" (difference {row['last_difference']:+.3g} {interval})"
    )


def test_at_most_five_are_told_and_none_where_none_is_clear() -> None:
    names = [f"L0N{index}" for index in range(7)]
    table = pd.DataFrame({"label": names}).assign(**dict.fromkeys(tracing.ACTIVATION_COLUMNS, 1.0))
    heads = pd.DataFrame({"label": names, "verdict": "contributes", "role": range(1, 8)})
    for verdict, n_told in (("contributes", 5), ("unclear", 0)):
        findings = tracing.Findings()
        chosen = tracing.clear_components(heads.assign(verdict=verdict), 5)
        tracing.report_activations(findings, table, chosen)
        told = " ".join(entry["text"] for entry in findings.entries)
        assert told.count(" is 1 at the last token of prompt a") == n_told
        assert ("L0N6" in told, "L0N1" in told) == (n_told > 0, False)


def test_activations_are_read_back_and_are_of_neurons_alone(
    tiny_llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    flags = ["--kind", "neuron", "--neurons", "0-5", "--num_samples", "3"]
    folder = finish(tiny_llama, tmp_path, *flags)
    before, told = (folder / ACTIVATIONS).read_bytes(), findings_of(folder)
    (folder / ACTIVATIONS).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
        finish(tiny_llama, folder, *flags)
    assert (folder / ACTIVATIONS).read_bytes() == before and findings_of(folder) == told
    finish(tiny_llama, folder, "--kind", "neuron", "--neurons", "6-11", *flags[4:])
    others = read(folder, ACTIVATIONS)
    values = {line.split(",")[3] for line in before.decode().splitlines()}
    same = values & {*map(str, others["last_a"])}
    assert len(others) == 24 and not same, "other neurons have a part of their own"
    finish(tiny_llama, folder, "--kind", "mlp", *flags[4:], "--overwrite")
    assert not (folder / ACTIVATIONS).exists()

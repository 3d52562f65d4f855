"""Circuits: how they are chosen and kept, and what is left of a model with nothing else."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, joint_rows, prepared
from conftest import Answer, finish, read, record_of, refuses, write_samples

CLOSE = 1e-4
ROLES = {"L0H0": 0.5, "L0H1": 0.5, "L1H0": 0.75, "L1H1": -0.5, "L2H0": 0.25, "L2H1": 0.0}
CHOSEN = {  # of carriers whose roles sum to 2, where |base| is 2
    "top:2": "L1H0 L0H0",
    "6": "L1H0 L0H0 L0H1 L2H0 L2H1 L1H1",
    "mass:0.1": "L1H0",
    "mass:0.375": "L1H0",
    "mass:0.376": "L1H0 L0H0",
    "mass:0.625": "L1H0 L0H0",
    "mass:0.626": "L1H0 L0H0 L0H1",
    "mass:1": "L1H0 L0H0 L0H1 L2H0",
    "share:0.125": "L1H0 L0H0 L0H1 L2H0",
    "share:0.25": "L1H0 L0H0 L0H1",
    "share:0.375": "L1H0",
    "share:1": "",
    "layer:1": "L1H0 L0H0 L2H0",
    "layer:9": "L1H0 L0H0 L0H1 L2H0",
}
RUNS = {  # of a model and flags
    "random": ("llama", "--num_samples 6 --confirm 3 --num_random 3 --controls"),
    "bundled": ("tiny_llama", "--num_samples 6 --confirm mass:0.5 --num_random 3"),
    "neurons": ("llama", "--kind neuron --neurons 0-5 --num_samples 4 --confirm 3 --num_random 2"),
    "mlp": ("llama", "--kind mlp --num_samples 4 --confirm 1 --num_random 2"),
    "attn": ("llama", "--kind attn --num_samples 4 --confirm 1 --num_random 2"),
}
OPTIONS = {  # that name components, with the words before their value
    "names": ["joint"],
    "given": ["trace", "--given"],
    "skip": ["trace", "--confirm", "1", "--skip"],
}
Runs = Callable[[str], tuple[str, Path]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(model, folder) of a run by its name, made once."""
    finished: dict[str, tuple[str, Path]] = {}

    def run(name: str) -> tuple[str, Path]:
        if name not in finished:
            model = request.getfixturevalue(RUNS[name][0])
            folder = finish(model, tmp_path_factory.mktemp(name), *RUNS[name][1].split())
            finished[name] = model, folder
        return finished[name]

    return run


def circuit_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "circuit.json").read_text()))


def model_identity(folder: Path) -> str:
    return str(record_of(folder)["experiment"]["fingerprint"]["model"])


def named_rows(folder: Path, measure: str = "a - b") -> pd.DataFrame:
    """The rows of circuit_joint.csv but those of random sets and of sets without one member."""
    rows = read(folder, "circuit_joint.csv").fillna({"components": ""})
    order = {name: place for place, name in enumerate(("none", "named", "complement", "all"))}
    rows = rows[(rows["measure"] == measure) & rows["set"].isin(order)]
    return rows.sort_values("set", key=lambda names: names.map(order)).reset_index(drop=True)


def best_of(folder: Path) -> list[str]:
    return [component["label"] for component in circuit_of(folder)["components"]]


labels = tracing.join_labels


# ----- choosing


def choose(table: pd.DataFrame, rule: tracing.ChoiceRule, side: str = "b") -> pd.DataFrame:
    """What a rule chooses on all sentences of a table."""
    return tracing.choose_circuit(tracing.sum_by_sentence(table, side), table["unit"], rule)


def chosen(
    rule: str,
    effects: dict[str, float],
    base: float,
    factor: float | None = None,
    skip: Sequence[tracing.Component] = (),
) -> str:
    selection = tracing.SelectionRule.parse(rule)
    table = by_hand.results({name: [v - 1, v + 1] for name, v in effects.items()}, base)
    rule = tracing.ChoiceRule(selection, factor, skip)
    return labels(choose(table, rule).index)


@pytest.mark.parametrize("rule", CHOSEN)
def test_each_rule_chooses_by_role_whatever_the_sign_of_base_and_op(rule: str) -> None:
    for sign in (1, -1):
        effects = {name: sign * role for name, role in ROLES.items()}
        for base, factor in ((-2.0, None), (-2.0, 0.5), (2.0, 2.0)):
            assert chosen(rule, effects, sign * base, factor) == CHOSEN[rule]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("top:2", "L0H0 L0H1"), ("mass:0.41", "L0H0 L0H1"), ("layer:1", "L0H0 L2H0")],
)
def test_what_is_skipped_is_not_chosen_and_its_role_does_not_count(
    rule: str, expected: str
) -> None:
    skip = tracing.ComponentList.parse("L1H0,L9mlp").components
    assert chosen(rule, ROLES, -2.0, skip=skip) == expected


@pytest.mark.parametrize("rule", CHOSEN)
def test_against_a_control_its_contrast_and_base_choose_where_there_is_one(rule: str) -> None:
    """The last sample lacks the control, and has no say."""
    effects = {name: [role**2, role**2, 99.0] for name, role in ROLES.items()}
    contrast = {name: [-role, -role, 0.0] for name, role in ROLES.items()}
    table = by_hand.with_control(by_hand.results(effects, -5.0), "other", contrast, 2.0)
    controls = [name for name in table if "other" in name]
    table[controls] = table[controls].mask(table["sample_id"] == "s002")
    selection = tracing.SelectionRule.parse(rule)
    circuit = choose(table, tracing.ChoiceRule(selection), "other")
    assert labels(circuit.index) == CHOSEN[rule]
    assert circuit["role"].tolist() == [ROLES[name] for name in CHOSEN[rule].split()]
    assert circuit["mean"].tolist() == [-ROLES[name] for name in CHOSEN[rule].split()]


# ----- what a command line says


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", ("top", 8)),
        ("top:8", ("top", 8)),
        ("0", ("top", 0)),
        ("mass:0.05", ("mass", 0.05)),
        ("share:1", ("share", 1)),
        ("layer:10", ("layer", 10)),
    ],
)
def test_a_rule_and_its_text_are_inverse(text: str, value: tuple[str, float]) -> None:
    selection = tracing.SelectionRule.parse(text)
    assert (selection.rule, selection.amount) == value
    assert tracing.SelectionRule.parse(str(selection)) == selection
    options = tracing.parse_command_line(["--confirm", text]).options
    assert options.confirm == selection
    assert bool(options.confirm) == (value[1] > 0)


@pytest.mark.parametrize("text", ["0,0.5,1,2", "-1", "1e-3,1"])
def test_numbers_and_their_text_are_inverse(text: str) -> None:
    numbers = tracing.parse_multipliers(text)
    assert numbers == tuple(map(float, text.split(",")))
    assert tracing.parse_multipliers(tracing.recorded_text(numbers)) == numbers


WRONG = "mass:0 mass:2 mass:nan share:-1 layer:1.5 foo:3 mass: -1 mass"


@pytest.mark.parametrize(
    ("command", "flag", "text"),
    [("trace", "--confirm", text) for text in ("", *WRONG.split())]
    + [("joint", "--multipliers", text) for text in ("", "1,1.0", "inf", "0,,1")],
)
def test_any_other_rule_or_number_is_refused(
    command: str, flag: str, text: str, answer: Answer
) -> None:
    refuses(answer, command, "--model_id", "nowhere", f"{flag}={text}", says=[f"error: {flag}: "])


# ----- files of components


@pytest.mark.parametrize(
    "text",
    ["L2H3,L0H1,L1mlp", " L2H3 L0H1\tL1mlp ", "L2H3\nL0H1\nL1mlp\nL0H1\n", "L2H3, L0H1,L1mlp\n"],
)
def test_names_in_a_file_keep_their_order_and_stand_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    components = tracing.ComponentList.parse(str(tmp_path / "names"))
    assert labels(components) == "L2H3 L0H1 L1mlp"
    assert (components.model, components.warning) == ("", "")


def test_a_runs_circuit_is_read_back_by_every_option_that_takes_components(
    runs: Runs, tmp_path: Path
) -> None:
    model, folder = runs("random")
    file, best = str(folder / "circuit.json"), best_of(folder)
    assert len(best) == 3
    for name, words in OPTIONS.items():
        arguments = [*words, file, "--model_id", model]
        components = getattr(tracing.parse_command_line(arguments).options, name)
        assert labels(components).split() == best
        assert components.model == model_identity(folder)
        assert components.chosen_on == tuple(circuit_of(folder)["chosen_on"])
        assert labels(components.ranking).split() == circuit_of(folder)["ranking"]
    flags = ["--num_samples", "2", "--num_random", "1"]
    rows = named_rows(finish(model, tmp_path, "joint", file, *flags))
    assert rows["components"].tolist() == ["", " ".join(best), " ".join(best), ""]


def test_a_file_of_neurons_by_position_is_read_as_neurons_at_all_tokens(
    tiny_llama: str, tmp_path: Path
) -> None:
    file = tmp_path / "neurons.json"
    neurons = {"3,17,120": 0.5, "0,2,7": -1.0, "3,18,120": 0.25}
    file.write_text(json.dumps({"neurons": neurons, "prompt": "Dallas"}))
    flags = ["joint", str(file), "--num_samples", "2", "--num_random", "1"]
    rows = named_rows(finish(tiny_llama, tmp_path / "run", *flags))
    assert rows["components"].tolist()[1:3] == ["L3N120 L0N7"] * 2
    assert f"{file}: positions are left out" in (tmp_path / "run" / "run.log").read_text()


NO_NEURON = "is no neuron: write layer,position,neuron"
NO_LABEL = "a component has no label that is a text"
# what is said of a file, by its content
BROKEN: dict[str | bytes, str] = {
    "": "it names no component",
    " \n": "it names no component",
    "{}": "it names no component",
    "L0H0 L1X3": "'L1X3' is no component",
    "L٠H0": "'L٠H0' is no component",
    '["L0H0"]': "'[\"L0H0\"]' is no component",
    "{not json": "not JSON at 'not json' (Expecting property name",
    '{"components": [': "not JSON at its end (Expecting value)",
    '{"components": [], "components": []}': "field 'components' occurs twice",
    '{"a":' * 5000: "brackets are nested too deeply",
    '{"a": ' + "1" * 5000 + "}": "a number has 5000 digits",
    '{"format": "circuit/2"}': 'its format is "circuit/2", not "circuit/1"',
    '{"format": null, "components": []}': 'its format is null, not "circuit/1"',
    '{"model": 7, "components": []}': "its model is no text but 7",
    '{"components": []}': "it names no component",
    '{"components": 7}': "its components are no list but 7",
    '{"components": null}': "its components are no list but null",
    '{"components": "L0H0"}': 'its components are no list but "L0H0"',
    '{"components": {"label": "L0H0"}}': 'its components are no list but {"label": "L0H0"}',
    '{"components": ["L0H0"]}': f'{NO_LABEL}: "L0H0"',
    '{"components": [null]}': f"{NO_LABEL}: null",
    '{"components": [{"layer": 0}]}': f'{NO_LABEL}: {{"layer": 0}}',
    '{"components": [{"label": 7}]}': f'{NO_LABEL}: {{"label": 7}}',
    '{"components": [{"label": "L0"}]}': "'L0' is no component",
    '{"components": [{"label": "L0H1_0"}]}': "'L0H1_0' is no component",
    '{"components": [{"label": "L0H1"}], "ranking": "L0H1"}': "its field edit must be an",
    '{"components": [{"label": "L0H1"}], "ranking": ["L0X1"]}': "'L0X1' is no component",
    '{"neurons": 5}': "its neurons are no object but 5",
    '{"neurons": null}': "its neurons are no object but null",
    '{"neurons": "0,0,1"}': 'its neurons are no object but "0,0,1"',
    '{"neurons": [5]}': f"5 {NO_NEURON}",
    '{"neurons": {"3,17": 1}}': f"'3,17' {NO_NEURON}",
    '{"neurons": {"3,17,5,1": 1}}': f"'3,17,5,1' {NO_NEURON}",
    '{"neurons": {"3,17,x": 1}}': f"'3,17,x' {NO_NEURON}",
    '{"neurons": {"3,x,17": 1}}': f"'3,x,17' {NO_NEURON}",
    '{"neurons": {"0,0,1_0": 1}}': f"'0,0,1_0' {NO_NEURON}",
    '{"neurons": {"0,0,١": 1}}': f"'0,0,١' {NO_NEURON}",
    '{"neurons": {"-1,0,5": 1}}': f"'-1,0,5' {NO_NEURON}",
    b"\xff\xfe\x00\x01": "byte b'\\xff' is not UTF-8",
    "L0H" * 50_000: "'L0HL0HL0H",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content)[:40])
def test_a_broken_file_is_refused_by_name_with_what_is_wrong_and_the_value(
    content: str | bytes, answer: Answer, tmp_path: Path
) -> None:
    file = tmp_path / "circuit.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words in OPTIONS.values():
        option = words[-1].replace("joint", "names")
        code, _, err = answer(*words, str(file), "--model_id", "nowhere")
        assert code == 2
        sentence = err.splitlines()[-1]
        reason = f"{file} is no file of components: {BROKEN[content]}"
        assert f"error: {option}: {reason}" in sentence
        assert len(sentence) < 400


def test_a_file_that_is_too_large_is_refused_unread(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "names.txt"
    with open(file, "wb") as hollow:
        hollow.truncate(200_000_000)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    reason = "it has 200,000,000 bytes, more than 67,108,864"
    says = [f"{file} is no file of components: {reason}"]
    refuses(answer, "joint", f"{file}", says=says)


def test_a_file_of_windows_and_neurons_with_blanks_or_in_a_list_are_read(tmp_path: Path) -> None:
    file = tmp_path / "names"
    contents = ["\ufeffL3N5\r\nL0N7", '\ufeff{"neurons": {"3, 17, 5": 1, "0,-1,7": 2}}']
    for content in (*contents, '{"neurons": ["3,17,5", "0,2,7"]}'):
        file.write_text(content, encoding="utf-8")
        assert labels(tracing.ComponentList.parse(str(file))) == "L3N5 L0N7"


RESID = {"components": [{"label": "L0H1"}, {"label": "L2resid"}]}


@pytest.mark.parametrize("name", ["names", "given"])
def test_a_circuit_with_a_residual_stream_is_refused_by_its_component(
    name: str, answer: Answer, tmp_path: Path
) -> None:
    file = tmp_path / "circuit.json"
    file.write_text(json.dumps(RESID))
    code, _, err = answer(*OPTIONS[name], str(file), "--model_id", "nowhere")
    prefix = "--given " if name == "given" else ""
    assert code == 2 and f"error: {prefix}L2resid: " in err
    assert "removes the input itself and means nothing" in err
    assert "--kind" not in err and "L0H1" not in err


@pytest.mark.parametrize("name", OPTIONS)
def test_a_circuit_of_another_model_is_refused_and_the_folder_stays(
    name: str, runs: Runs, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = runs("random")
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    circuit = circuit_of(folder) | {"model": "0123456789abcdef"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(circuit))

    def files() -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.log")
        return {str(path): path.read_bytes() for path in paths}

    before = files()
    words = [*OPTIONS[name], str(other), "--model_id", model, "--output_dir", str(folder)]
    words += ["--num_samples", "6", "--controls"]
    for more in ([], ["--overwrite"]):
        label = "" if name == "names" else f"--{name} "
        says = [f"error: {label}{other} is of model 0123456789abcdef, not {model_identity(folder)}"]
        refuses(answer, *words, *more, says=says)
    assert files() == before


@pytest.mark.parametrize("label", ["L3H0", "L0H4", "L0N80", "L3mlp"])
def test_components_that_the_model_lacks_are_refused(
    label: str, llama: str, answer: Answer, tmp_path: Path, no_weights: None
) -> None:
    file = tmp_path / "names.txt"
    file.write_text(f"L0H0 {label}")
    for name, words in OPTIONS.items():
        flags = ["--model_id", llama, "--output_dir", str(tmp_path / "run")]
        option = "" if name == "names" else f"--{name} "
        says = [f"error: {option}{label}: this model has layers 0-2"]
        refuses(answer, *words, str(file), *flags, says=says)


# ----- circuit.json


@pytest.mark.parametrize("name", ["random", "bundled", "neurons", "mlp"])
def test_a_circuit_tells_where_it_comes_from_and_its_roles_recompute(name: str, runs: Runs) -> None:
    _, folder = runs(name)
    circuit, options = circuit_of(folder), record_of(folder)["commands"]["trace"]["options"]
    table = read(folder)
    half = table[table["sample_id"].isin(halves(folder)[0])]
    assert (circuit["format"], circuit["model"]) == ("circuit/1", model_identity(folder))
    assert (circuit["task"], circuit["op"], circuit["method"]) == ("suppression", "zero", "exact")
    assert circuit["selection"] == options["confirm"]
    edit = ("kind", "op", "factor", "positions", "patch_into", "given")
    assert circuit["edit"] == {option: options[option] for option in edit}
    assert circuit["measure"] == ("a - other" if name == "random" else "a - b")
    assert circuit["chosen_on"] == sorted(half["unit"].unique())
    score = "score_other_base" if name == "random" else "score_b_base"
    column = "effect_minus_other" if name == "random" else "head_effect"
    base = (half["score_a_base"] - half[score]).mean()
    means = half.fillna({"index": -1}).groupby(["layer", "kind", "index"])[column].mean()
    roles = means * -math.copysign(1, base)
    for component in circuit["components"]:
        key = component["layer"], component["kind"], component["index"]
        assert component["label"] == tracing.Component(*key).label
        assert component["mean"] == pytest.approx(means[key], rel=1e-6)
        assert component["role"] == pytest.approx(roles[key], rel=1e-6)
    chosen_roles = [component["role"] for component in circuit["components"]]
    assert chosen_roles == sorted(chosen_roles, reverse=True)
    assert min(chosen_roles) >= roles.nlargest(len(chosen_roles)).min() - 1e-9
    ranked = [tracing.Component.parse(label) for label in circuit["ranking"]]
    assert len(ranked) == len(set(ranked)) == len(roles)
    assert circuit["ranking"][: len(chosen_roles)] == best_of(folder)
    ranked_roles = [roles[c.layer, c.kind, c.index] for c in ranked]
    assert ranked_roles == sorted(ranked_roles, reverse=True)
    if name == "bundled":
        carried = 0.5 * roles[roles > 0].sum()
        assert sum(chosen_roles) >= carried > sum(chosen_roles[:-1])


# ----- what is left with the circuit alone


def edited(model: Any, row: Any, kinds: Sequence[str]) -> AbstractContextManager[None]:
    """As a row of circuit_confirm.csv says."""
    names = row.components.split()
    return by_hand.kept_alone(model, names, kinds) if row.kept else by_hand.ablated(model, names)


def scores_of(
    plain: Any, folder: Path, ids: Sequence[str], row: Any, kinds: Sequence[str]
) -> Tensor:
    """[side, sample] of prompts a, b and, with controls, other."""
    texts, targets = by_hand.texts(folder), by_hand.targets_of(folder)
    with edited(plain[0], row, kinds):
        scores = [
            [naive.suppression_score(*plain, texts[i][side], targets[i]) for i in ids]
            for side in ("a", "b", "other")
            if side in texts[ids[0]]
        ]
    return torch.tensor(scores).double()


@pytest.mark.parametrize("name", RUNS)
def test_all_kinds_of_sets_and_what_they_do_are_what_naive_edits_give(
    name: str, runs: Runs
) -> None:
    model, folder = runs(name)
    rows, ids, kind = joint_rows(folder), halves(folder)[1], read(folder)["kind"][0]
    quoted = joint_rows(folder, "a - other") if name == "random" else rows
    best, shape = best_of(folder), prepared(model).shape
    n, n_all = len(best), shape.n_layers * len(shape.indices(kind))
    sizes = rows.groupby("set")["n_ablated"].unique().map(sorted).to_dict()
    steps = sorted({2**i for i in range(9) if 2**i < n} | {n})
    edited_sets = {"none": [0], "all": [n_all], "chosen": steps, "random": steps}
    complements = {"complement": [n_all - n], "random complement": [n_all - n]}
    assert sizes == edited_sets | complements
    assert (rows["kept"] == rows["set"].isin(["all", *complements])).all()
    for row in rows[rows["set"].isin(["chosen", "complement"])].itertuples():
        assert row.components.split() == best[: n if row.kept else row.n_ablated]
    largest = rows[(rows["set"] == "random") & (rows["n_ablated"] == n)]["components"]
    assert rows[rows["set"] == "random complement"]["components"].tolist() == largest.tolist()
    assert 1 <= len(largest) <= 3

    plain, texts = naive.load(model), by_hand.texts(folder)
    first = list(rows.drop_duplicates(["set", "n_ablated"]).itertuples())
    scores = [scores_of(plain, folder, ids, row, [kind]) for row in first]
    for row, row_scores in zip(first, scores, strict=True):
        means = row_scores.mean(1).tolist()
        assert row.mean_delta == pytest.approx(means[0] - means[1], abs=CLOSE)
        assert quoted["mean_delta"][row.Index] == pytest.approx(means[0] - means[-1], abs=CLOSE)
        moved = (row_scores - scores[0]).mean(1)[:2].tolist()
        assert [row.moved_a, row.moved_b] == pytest.approx(moved, abs=CLOSE)
        for side in "ab":
            prompts = [naive.prompt_ids(plain[1], texts[i][side]) for i in ids]
            kls = (by_hand.divergence(plain[0], p, edited(plain[0], row, [kind])) for p in prompts)
            assert getattr(row, f"kl_{side}") == pytest.approx(statistics.fmean(kls), abs=CLOSE)

    if len(ids) == 2:
        return  # no interval, so no faithfulness
    deltas = [row_scores[0] - row_scores[-1] for row_scores in scores]
    below = deltas[0] - deltas[1]
    _, low, high = by_hand.mean_test(below.tolist(), [1.0] * len(ids))
    is_clear = low > 0 or high < 0
    assert is_clear or name != "bundled"
    quoted_rows = quoted.loc[[row.Index for row in first]].itertuples()
    for row, delta in zip(quoted_rows, deltas, strict=True):
        top = delta - deltas[1]
        share = float(top.sum() / below.sum()) if is_clear else math.nan
        shares = [row.remaining, row.faithfulness]
        if row.kept:
            shares.reverse()
        assert shares == pytest.approx([share, math.nan], abs=1e-3, nan_ok=True)
        if row.set == "complement" and is_clear:
            ends = [row.faithfulness_low, row.faithfulness_high]
            by_formula = by_hand.mean_test(top.tolist(), below.tolist())
            assert ends == pytest.approx(by_formula[1:], abs=1e-3 * (ends[1] - ends[0]))


NAMED = {  # with the kinds that all are of
    "L0H1,L2N7,L1H3,L1N12": ["head", "neuron"],
    "L1mlp,L0N7,L0N12,L2attn,L0H1": ["attn", "head", "mlp", "neuron"],
}


@pytest.mark.parametrize("names", NAMED)
def test_a_named_set_is_measured_on_all_samples_beside_all_of_its_kinds(
    names: str, llama: str, tmp_path: Path
) -> None:
    words = {"golf": "sport", "iron": "metal", "owl": "bird", "eagle": "bird"}
    records = [{"sentence": f"Name a {kind}.", "targets": [word]} for word, kind in words.items()]
    samples = write_samples(tmp_path / "mine.jsonl", *records)
    folder = finish(llama, tmp_path / "run", "joint", names, "--samples", samples)
    rows, plain, labels = named_rows(folder), naive.load(llama), names.split(",")
    assert rows["set"].tolist() == ["none", "named", "complement", "all"]
    assert rows["components"].str.split().tolist() == [[], labels, labels, []]
    assert (rows[["n_samples", "n_sentences"]] == [4, 3]).all(axis=None)
    assert (rows["samples"] == "all").all() and (rows["named"] == names).all()
    if len(labels) == 4:
        assert rows["n_ablated"].tolist() == [0, 4, 3 * (4 + 80) - 4, 3 * (4 + 80)]
    for row in rows.itertuples():
        scores = scores_of(plain, folder, sorted(by_hand.texts(folder)), row, NAMED[names])
        assert row.mean_delta == pytest.approx(float((scores[0] - scores[1]).mean()), abs=CLOSE)
    assert rows["mean_delta"].nunique() == 4
    log = (folder / "run.log").read_text()
    start = f"all samples, {len(labels)} jointly ({' '.join(labels)}): mean a - b "
    assert re.search(
        re.escape(start)
        + r"[+-]\d.* removed( \[|, the base is not clear).*; log P .* KL .* after b",
        log,
    )


def test_the_complement_of_everything_edits_nothing_and_all_heads_are_the_attention(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "3", "--op", "mean"]

    def measured(name: str, kept: str) -> pd.Series:
        folder = finish(llama, tmp_path / name, "joint", kept, *flags, "--num_random", "1")
        return named_rows(folder).set_index("set")["mean_delta"]

    heads = [f"L{n}H{i}" for n in range(3) for i in range(4)]
    everything, layer = measured("every", ",".join(heads)), measured("layer", ",".join(heads[4:8]))
    assert everything["complement"] == pytest.approx(everything["none"], abs=1e-5)
    assert everything["named"] == pytest.approx(everything["all"], abs=1e-5)
    assert everything["none"] != pytest.approx(everything["all"], abs=1e-2)
    swept = read(finish(llama, tmp_path / "swept", "--kind", "attn", "--layers", "1", *flags))
    assert layer["named"] == pytest.approx(swept["delta_logit_head"].mean(), abs=1e-5)


def test_the_complement_of_the_complement_is_the_set_in_every_layer(llama: str) -> None:
    shape = prepared(llama).shape
    for names in ("L0H1,L2H0,L2H3", "L1mlp,L0H2", "L1N3,L1N79,L2attn", "L1N3,L0H0"):
        components = tracing.ComponentList.parse(names)
        kinds = {component.kind for component in components}
        others = tracing.other_columns(components, kinds, shape)
        places = {tracing.KINDS[kind].place for kind in kinds}
        assert set(others) == {(layer, place) for layer in range(3) for place in places}
        for site, is_free in others.items():
            taken: set[int] = set()
            for component in components:
                if component.site == site:
                    taken.update(range(shape.width(site.place))[shape.columns(component)])
            assert set(is_free.nonzero()[:, 0].tolist()) == set(range(len(is_free))) - taken
    nothing = tracing.other_columns((), ["head"], shape)
    assert all(is_free.sum() == shape.d_attn for is_free in nothing.values())


JITTER = [0.0, 0.02, -0.03, 0.01]  # of four sentences


SETS = [
    tracing.JointSet("none"),
    tracing.JointSet("all", others_of=("head",)),
    tracing.JointSet("chosen"),
    tracing.JointSet("complement", others_of=("head",)),
]


def statistics_by_hand(kept: list[float], none: float, every: float) -> pd.DataFrame:
    """The sets are none, all, a circuit and its complement."""
    rows = []
    for unit, (jitter, m) in enumerate(zip(JITTER, kept, strict=True)):
        for place, delta in enumerate((none + jitter, every - jitter, none + every - m, m)):
            row = {"place": place, "sample_id": f"s{unit}", "unit": f"u{unit}", "score_b": 0.0}
            rows.append(row | {"score_a": delta, "kl_a": 0.0, "kl_b": 0.0})
    return tracing.joint_statistics(pd.DataFrame(rows), "b", SETS)


@pytest.mark.parametrize("level", [1.4, 0.7, -0.6])
def test_faithfulness_by_hand_is_never_clipped(level: float) -> None:
    kept = [1.0 - 4.0 * level + e for e in (0.0, 0.1, -0.05, 0.15)]  # from -3 (all: 1)
    table = statistics_by_hand(kept, -3.0, 1.0)
    top = [m - (1.0 - e) for m, e in zip(kept, JITTER, strict=True)]
    below = [(-3.0 + e) - (1.0 - e) for e in JITTER]
    share = sum(top) / sum(below)
    ends = [table[f"faithfulness{end}"] for end in ("", "_low", "_high")]
    faithfulness, low, high = (values[3] for values in ends)
    assert faithfulness == pytest.approx(share)
    assert share == pytest.approx(level, abs=0.02)
    assert low < share < high
    by_formula = list(by_hand.mean_test(top, below)[1:])
    assert [low, high] == pytest.approx(by_formula, abs=1e-5 * (high - low))
    assert [values[1] for values in ends] == pytest.approx([0.0] * 3, abs=1e-9)
    assert all(math.isnan(values[i]) for values in ends for i in (0, 2))
    assert table["remaining"][0] == pytest.approx(1)
    assert table["remaining"][2] == pytest.approx(1 - share)
    assert all(math.isnan(table["remaining"][i]) for i in (1, 3))


def test_there_is_no_faithfulness_where_it_is_unclear_what_all_do() -> None:
    table = statistics_by_hand([1.0, 2.0, 3.0, 4.0], 0.5, 0.5)
    for name in ("faithfulness", "faithfulness_low", "faithfulness_high", "remaining"):
        assert all(map(math.isnan, table[name]))
    assert table["mean_delta"][3] == pytest.approx(2.5)


# ----- random sets, and circuits that are too large or empty


def test_at_most_half_of_all_components_are_a_circuit(llama: str, tmp_path: Path) -> None:
    """Of 12 heads, of which one is skipped."""
    flags = "--num_samples 4 --confirm layer:100 --num_random 2 --skip L0H0"
    folder = finish(llama, tmp_path, *flags.split())
    selection = tracing.SelectionRule.parse("layer:100")
    skip = tracing.ComponentList.parse("L0H0")
    half = read(folder).query("sample_id in @ids", local_dict={"ids": halves(folder)[0]})
    circuit = choose(half, tracing.ChoiceRule(selection, None, skip))
    assert best_of(folder) == labels(circuit.index).split()[:5]
    assert "L0H0" not in read(folder, "circuit_confirm.csv")["components"].str.cat(sep=" ")
    assert f"the best 5 of {len(circuit)} are taken" in (folder / "run.log").read_text()


def test_a_rule_that_chooses_nothing_says_so_and_leaves_no_table(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    """Nor is there a circuit for the command joint."""
    flags = "--num_samples 4 --confirm share:1 --layers 0 --heads 0"
    finish(llama, tmp_path, *flags.split())
    assert best_of(tmp_path) == []
    assert "--confirm share:1.0 chooses no component" in (tmp_path / "run.log").read_text()
    assert not list(tmp_path.glob("circuit_confirm.*"))
    refuses(answer, "joint", "--output_dir", str(tmp_path), says=["it names no component"])


def test_components_of_other_kinds_leave_the_choice_as_it_is(llama: str, tmp_path: Path) -> None:
    flags = "--kind mlp --confirm mass:0.1 --given L0H0,L0H1 --skip L0H2,L0H3,L1H0 --num_random 2"
    finish(llama, tmp_path, "--num_samples", "4", *flags.split())
    assert "to leave as many at random" not in (tmp_path / "run.log").read_text()
    assert best_of(tmp_path)


@pytest.mark.parametrize("names", ["L1N5,L1N40,L0mlp", "L0attn,L1H0"])
def test_random_sets_share_no_column_with_the_circuit_nor_with_themselves(
    names: str, llama: str
) -> None:
    experiment = prepared(llama)
    circuit, shape = tracing.ComponentList.parse(names).components, experiment.shape
    for draw in range(30):
        random_set = tracing.sample_random_set(experiment, circuit, len(circuit), (), draw)
        if random_set:
            taken = []
            for component in (*circuit, *random_set.components):
                columns = range(shape.width(component.site.place))[shape.columns(component)]
                taken += [(component.site, column) for column in columns]
            assert len(taken) == len(set(taken))
            kinds = Counter(component.kind for component in random_set.components)
            assert kinds == Counter(component.kind for component in circuit)


# ----- the circuit of a folder


def test_the_folders_circuit_is_what_joint_edits_on_the_sentences_that_did_not_choose_it(
    llama: str, tmp_path: Path
) -> None:
    """The file stays as it is; the edit is the one that the circuit was found with."""
    flags = "--num_samples 4 --op scale --factor 3 --confirm 2 --num_random 2"
    folder = finish(llama, tmp_path / "run", *flags.split())
    circuit = (folder / "circuit.json").read_bytes()
    confirmed = joint_rows(folder)
    is_same = confirmed["set"].isin(["none", "all", "complement"]) | (
        (confirmed["set"] == "chosen") & (confirmed["n_ablated"] == 2)
    )
    measured = ["mean_delta", "ci_low", "faithfulness", "remaining", "kl_a", "kl_b"]
    expected = confirmed[is_same].replace("chosen", "named").set_index("set")[measured]
    for words in ([], [str(folder / "circuit.json")]):
        rows = named_rows(finish(llama, folder, "joint", *words, "--num_random", "2"))
        assert set(rows["samples"]) == {"held-out"} and set(rows["op"]) == {"scale 3"}
        assert rows["components"].tolist()[1] == " ".join(best_of(folder))
        table = rows.set_index("set").loc[expected.index, measured]
        assert (table - expected).abs().max(axis=None) < 1e-5
    assert (folder / "circuit.json").read_bytes() == circuit


def test_a_circuit_is_measured_on_all_samples_where_none_chose_it_or_all_did(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "2", "--num_random", "1"]
    every = sorted(prepared(llama).units)
    log = {}
    for name, chosen_on in {"none": None, "others": ["u0"], "every": every}.items():
        circuit: dict[str, Any] = {"components": [{"label": "L0H1"}]}
        if chosen_on is not None:
            circuit["chosen_on"] = chosen_on
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(circuit))
        folder = finish(llama, tmp_path / name, "joint", str(file), *flags)
        assert set(named_rows(folder)["samples"]) == {"all"}
        log[name] = (folder / "run.log").read_text()
    warning = "all sentences here have chosen these components"
    assert [warning in text for text in log.values()] == [False, False, True]


def test_what_a_circuit_may_not_have_is_in_no_random_set_of_joint(
    llama: str, tmp_path: Path
) -> None:
    """A layer of four heads: one is chosen, one skipped."""
    flags = "--num_samples 4 --layers 1 --confirm 1 --skip L1H3 --num_random 9"
    folder = finish(llama, tmp_path, *flags.split())
    replies = ["--multipliers", "0", "--max_new_tokens", "1"]
    finish(llama, folder, "joint", "--num_random", "9", *replies)
    (chosen_head,) = best_of(folder)
    others = {"L1H0", "L1H1", "L1H2"} - {chosen_head}
    for name in ("circuit_confirm.csv", "circuit_joint.csv"):
        table = read(folder, name)
        assert set(table[table["set"] == "random"]["components"]) == others
    steered = read(folder, "circuit_steer.csv")
    assert steered[steered["set"] == "random"]["components"].isin(others).all()


@pytest.mark.parametrize("words", [["--model_id", "nowhere"], []])
def test_joint_needs_names_or_the_circuit_of_a_folder(
    words: list[str], answer: Answer, tmp_path: Path
) -> None:
    says = ["joint needs NAMES, or a circuit.json in " if words else "holds no experiment"]
    refuses(answer, "joint", "--output_dir", str(tmp_path), *words, says=says)


# ----- the table of joint


def test_the_table_keeps_a_block_for_each_set_op_positions_and_given(
    llama: str, tmp_path: Path
) -> None:
    """The same again replaces its own, and leaves the others to the last digit."""

    def lines(*words: str) -> list[str]:
        finish(llama, tmp_path, "joint", "L0H1", "--num_samples", "2", "--num_random", "1", *words)
        return (tmp_path / "circuit_joint.csv").read_text().splitlines()[1:]

    last = lines("--positions", "last")
    both = lines()
    assert both[: len(last)] == last and len(both) == 2 * len(last)
    three = lines("--given", "L2H0")
    assert three[: len(both)] == both and len(three) == 3 * len(last)
    assert lines("--positions", "last") == [*three[len(last) :], *last]
    edit = ["named", "op", "positions", "given"]
    table = read(tmp_path, "circuit_joint.csv").fillna({"given": ""})
    assert list(table)[:4] == edit
    assert table[edit].drop_duplicates().to_numpy().tolist() == [
        ["L0H1", "zero", "all", ""],
        ["L0H1", "zero", "all", "L2H0"],
        ["L0H1", "zero", "last", ""],
    ]


def test_shares_of_a_base_without_an_interval_are_warned_of(llama: str, tmp_path: Path) -> None:
    """That of one sentence has none."""
    flags = ["--num_samples", "1", "--num_random", "1"]
    folder = finish(llama, tmp_path, "joint", "L0H1", *flags)
    findings = record_of(folder)["commands"]["joint"]["findings"]
    warned = [entry["text"] for entry in findings if entry["level"] == "warning"]
    assert [text for text in warned if text.endswith("or it has none: no share of it is told")]


def test_a_table_of_fewer_columns_is_added_to(llama: str, tmp_path: Path) -> None:
    """As the version before wrote it; what it does not tell is empty."""
    words = ["--num_samples", "2", "--num_random", "1"]
    finish(llama, tmp_path, "joint", "L0H1", *words)
    path = tmp_path / "circuit_joint.csv"
    read(tmp_path, path.name).drop(columns=["positions", "given"]).to_csv(path, index=False)
    finish(llama, tmp_path, "joint", "L0H2", "--num_random", "1")
    table = read(tmp_path, path.name)
    assert table["named"].drop_duplicates().tolist() == ["L0H1", "L0H2"]
    assert table.groupby("named")["positions"].count().tolist()[0] == 0

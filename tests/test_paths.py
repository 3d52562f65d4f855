"""Paths: what of an effect reaches the logits, or through receivers, against loops of forwards."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
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
import random_models
from conftest import Answer, command_line, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import CleanRun, Component, Site, Tree
from test_interventions import SAMPLES, Bench, bench

CLOSE = 2e-5
PATHS = "circuit_paths.csv"
FOUR = ["--num_samples", "4", "--no-bf16"]
Experiment = tracing.Experiment[Any]
pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module", params=[*random_models.ARCHITECTURES, "tiny"])
def any_bench(request: Any, folder_of: Callable[[str], str]) -> Bench:
    return bench(folder_of(request.param))


def experiment_of(
    model: Bench, words: str, records: Sequence[dict[str, Any]] = SAMPLES
) -> Experiment:
    """What a command line asks for, on some samples, with the model that is loaded already."""
    samples = write_samples(Path(model.folder, "samples.jsonl"), *records)
    options = ["--no-bf16", "--samples", samples, "--num_samples", str(len(records))]
    experiment = by_hand.prepared(model.folder, *words.split(), *options)
    experiment.traced = model.traced
    return experiment


def clean_run_of(experiment: Experiment, tree: Tree) -> CleanRun:
    """The clean run of a tree, with the inputs of all blocks and modules."""
    n_layers = experiment.shape.n_layers
    places = ["attn", "resid"] + ["mlp"] * bool(experiment.shape.d_mlp)
    sites = [Site(layer, place) for layer in range(n_layers) for place in places]
    return experiment.clean_run(tree, range(n_layers), sites)


def paths_of(experiment: Experiment) -> list[tracing.PathEdit]:
    return tracing.list_paths(experiment, tracing.choose_senders(experiment))


def moved_by_paths(experiment: Experiment, tree: Tree) -> Tensor:
    """[path, prompt]: what each path alone moves of each score."""
    clean_run = clean_run_of(experiment, tree)
    rows = []
    for path in paths_of(experiment):
        rows += tracing.path_edits(experiment, experiment.options.freeze, clean_run, [path])
    return moved_scores(experiment, clean_run, rows)


def moved_scores(
    experiment: Experiment, clean_run: CleanRun, rows: Sequence[tracing.Edits]
) -> Tensor:
    """[row, prompt]: by how much edits move each score."""
    edited = tracing.run_rows(experiment.traced, clean_run, rows)
    scores = clean_run.tree.scores(torch.cat([clean_run.log_probs, edited]), experiment.task)
    return scores[1:] - scores[0]


# ----- identities


@pytest.mark.parametrize("op", ["zero", "patch"])
def test_the_direct_effect_of_a_last_layer_head_is_its_effect(any_bench: Bench, op: str) -> None:
    """All that lies above is the MLP, which is computed anew unless it is frozen."""
    words = f"paths --layers {any_bench.traced.shape.n_layers - 1} --op {op}"
    experiment = experiment_of(any_bench, words)
    tree = experiment.trees[0]
    clean_run = clean_run_of(experiment, tree)
    senders = tracing.choose_senders(experiment)
    rows = [experiment.edits(clean_run, [sender]) for sender in senders]
    effects = moved_scores(experiment, clean_run, rows)
    assert (moved_by_paths(experiment, tree) - effects).abs().max() < 1e-6
    if experiment.shape.d_mlp:
        frozen = moved_by_paths(experiment_of(any_bench, f"{words} --freeze all"), tree)
        assert (frozen - effects).abs().max() > 1e-4


@pytest.mark.parametrize("through", ["logits", "L2H0,L2H3", "L2mlp"])
@pytest.mark.parametrize("freeze", ["heads", "all"])
def test_an_op_that_changes_nothing_takes_no_path(
    any_bench: Bench, through: str, freeze: str
) -> None:
    words = f"paths --layers 0-1 --op scale --factor 1 --through {through} --freeze {freeze}"
    experiment = experiment_of(any_bench, words)
    assert moved_by_paths(experiment, experiment.trees[0]).abs().max() < 1e-6


# ----- against full forwards of each prompt alone


ORDER = {"resid": 0, "head": 1, "attn": 1, "mlp": 2, "neuron": 2}  # within a layer


def path_edit(loaded: Any, options: Any, texts: Sequence[str], sender: Component) -> naive.Edit:
    """What to hook in the last run of a prompt, whose partner is the other text."""
    model, tokenizer = loaded
    other = naive.prompt_ids(tokenizer, texts[1])
    span = naive.span_of(model, sender.layer, sender.kind, sender.index)
    kinds = ["attn", "mlp"] if options.freeze == "all" else ["attn"]
    above = [
        (layer, kind)
        for layer, kind in itertools.product(range(model.config.num_hidden_layers), kinds)
        if (layer, ORDER[kind]) > (sender.layer, ORDER[sender.kind])
    ]
    receivers = options.through.components

    def edit(ids: list[int], tail: list[int]) -> AbstractContextManager[None]:
        partner = naive.input_of(model, other + tail, sender.layer, sender.kind)
        places = naive.edited_tokens(ids, other, len(tail), options)
        received: dict[Component, Tensor] = {}

        def send(x: Tensor) -> Tensor:
            y = x.clone()
            for place, partner_place in places:
                y[0, place, span] = partner[partner_place][span] if options.op == "patch" else 0
            return y

        def hold(layer: int, kind: str) -> naive.Replace:
            clean = naive.input_of(model, ids + tail, layer, kind)[None]
            return lambda x: clean

        def record(component: Component) -> naive.Replace:
            return lambda x: received.setdefault(component, x.clone())

        def write(component: Component) -> naive.Replace:
            columns = naive.span_of(model, component.layer, component.kind, component.index)

            def replace(x: Tensor) -> Tensor:
                y = x.clone()
                y[..., columns] = received[component][..., columns]
                return y

            return replace

        sending = naive.module_of(model, sender.layer, sender.kind), send
        holding = [(naive.module_of(model, *place), hold(*place)) for place in above]
        modules = {c: naive.module_of(model, c.layer, c.kind) for c in receivers}
        recording = [(module, record(c)) for c, module in modules.items()]
        sent = naive.all_hooked([sending, *recording, *holding])
        if not receivers:
            return sent
        with sent:
            model(torch.tensor([ids + tail]))
        return naive.all_hooked((module, write(c)) for c, module in modules.items())

    return edit


NAIVE = [
    "--kind head --layers 0 --heads 1 --through L1H0,L2H3 --op patch",
    "--kind head --layers 0 --heads 2 --through L2mlp --op zero --given L1H3,L0H0",
    "--kind head --layers 1 --heads 0 --through L1mlp --op patch --patch_into b --positions last",
    "--kind head --layers 2 --heads 3 --through logits --op patch",
    "--kind head --layers 0 --heads 1 --through logits --op zero --given L1H1",
    "--kind mlp --layers 0 --through L1H2 --op patch --patch_into b",
    "--kind mlp --layers 1 --through L2H1,L2mlp --op zero --positions last",
    "--senders L0N5 --through L1H0,L2H3 --op zero",
    "--kind resid --layers 1 --through L1H2 --op patch",
    "--kind resid --layers 1 --through L1H0,L1mlp --op zero --positions last --given L0H1",
    "--kind resid --layers 1 --through logits --op patch --patch_into b",
]


def like_plain_forwards(model: Bench, words: str) -> None:
    records = SAMPLES[1:]
    experiment = experiment_of(model, f"paths {words}", records)
    options, loaded = experiment.options, model.loaded
    (tree,), ((sender, _),) = experiment.trees, paths_of(experiment)
    (moved,) = moved_by_paths(experiment, tree)
    expected = torch.zeros_like(moved)
    given = [(component.layer, component.kind, component.index) for component in options.given]
    with naive.zeroed(loaded[0], given), torch.no_grad():
        for place, (record, side) in enumerate(itertools.product(records, "ab")):
            if options.op == "patch" and side != options.patch_into:
                continue
            texts = [record["prompt_a"], record["prompt_b"]]
            if side == "b":
                texts.reverse()
            scored = (*loaded, texts[0], record["targets"])
            edited = naive.suppression_score(*scored, path_edit(loaded, options, texts, sender))
            expected[place] = edited - naive.suppression_score(*scored)
    assert (moved - expected).abs().max() < CLOSE
    assert expected.abs().max() > CLOSE, "the path carries nothing"


@pytest.mark.parametrize("freeze", ["heads", "all"])
@pytest.mark.parametrize("words", NAIVE)
def test_four_plain_forwards_give_the_same_numbers(llama: str, words: str, freeze: str) -> None:
    like_plain_forwards(bench(llama), f"{words} --freeze {freeze}")


def test_and_with_other_architectures(any_bench: Bench) -> None:
    like_plain_forwards(any_bench, NAIVE[0])


# ----- a run and its table


@pytest.fixture(scope="module")
def each(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a noise floor above some effects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "noise_floor", lambda *_: 0.25)
        folder = tmp_path_factory.mktemp("each")
        return finish(llama, folder, "paths", *FOUR, "--through", "each")


def test_each_head_sends_to_all_heads_above_it(each: Path) -> None:
    paths = read(each, PATHS)
    heads = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    pairs = {(s, r) for s, r in itertools.product(heads, heads) if s[1] < r[1]}
    assert {*zip(paths["sender"], paths["receiver"], strict=True)} == pairs
    assert len(paths) == len(pairs) and (each / "circuit_paths.png").stat().st_size > 1000
    columns = (
        "sender receiver n_samples n_sentences mean sd ci_low ci_high p q total share_of_total "
    )
    assert [*paths] == (columns + "share_low share_high above_noise is_clear freeze op").split()
    assert {*paths["freeze"]} == {"heads"}


def test_the_numbers_of_a_path_are_those_of_its_samples(
    each: Path, llama: str, tmp_path: Path
) -> None:
    """Mean, interval, p and q by hand; no share of a total that its sentences leave unclear, as
    all are here."""
    experiment = by_hand.prepared(llama, "paths", *FOUR, "--through", "each")
    sweep = read(finish(llama, tmp_path, *FOUR))
    paths = read(each, PATHS).set_index(["sender", "receiver"])
    rows = []
    for tree in experiment.trees:
        for path, scores in zip(
            paths_of(experiment), moved_by_paths(experiment, tree).tolist(), strict=True
        ):
            for sample, places in tree.samples:
                effect = scores[places["a"]] - scores[places["b"]]
                row = (path.sender.label, path.receiver_text, sample.unit, "", effect)
                rows.append(row)
    table = pd.DataFrame(rows, columns=["sender", "receiver", "unit", "group", "effect"])
    expected = tracing.column_statistics(table, "effect", ["sender", "receiver"])
    columns = ["n_samples", "n_sentences", "mean", "sd", "ci_low", "ci_high", "p", "q"]
    assert (paths[columns] - expected[columns]).abs().max(axis=None) < CLOSE
    assert paths["q"].tolist() == pytest.approx(by_hand.q_values(paths["p"].tolist()))
    labels = "L" + sweep["layer"].astype(str) + "H" + sweep["index"].astype(str)
    totals = sweep.groupby(labels)["head_effect"].mean()
    total = totals[paths.index.get_level_values(0)].to_numpy()
    assert paths["total"].tolist() == pytest.approx(total)
    alone = tracing.column_statistics(sweep.assign(label=labels), "head_effect", ["label"])
    is_clear = (alone["ci_low"] > 0) | (alone["ci_high"] < 0)
    assert not (is_clear & (totals.abs() > 0.25)).any()
    assert paths[["share_of_total", "share_low", "share_high"]].isna().all(axis=None)
    above_noise = paths["mean"].abs() > 0.25
    assert paths["above_noise"].tolist() == above_noise.tolist()
    assert paths["is_clear"].tolist() == (above_noise & (paths["q"] < 0.05)).tolist()


# of each sentence's samples the effect of a path and that of its sender alone; the floor is 0.5
CLEAR = [(-1.0, -2.0), (-1.5, -2.5), (-0.5, -2.0), (-1.0, -3.0), (-1.2, -2.2), (-0.8, -1.9)]
SENDERS = {
    "L0H0": (CLEAR, True),
    "L0H1": ([(a, -4 * b if place % 2 else 4 * b) for place, (a, b) in enumerate(CLEAR)], False),
    "L0H2": ([(a / 9, b / 9) for a, b in CLEAR], False),  # its interval is clear, but it is noise
    "L0H3": ([(a, -b) for a, b in CLEAR], True),
}
SENTENCES = ["u0", "u0", "u1", "u2", "u3", "u4"]  # two samples are of one


def rows_of_senders() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of one path of each of SENDERS, with a negative control, and of the senders alone, in
    another order."""
    rows, alone = [], []
    for sender, (effects, _) in SENDERS.items():
        for place, (effect, sender_effect) in enumerate([*effects, (50.0, 70.0)]):
            is_real = place < len(effects)
            sample = {"sender": sender, "sample_id": f"s{place}"}
            unit = SENTENCES[place] if is_real else "control"
            group = "" if is_real else tracing.NO_ODD_ONE
            path = {"receiver": "L1H0", "unit": unit, "group": group, "head_effect": effect}
            rows.append(sample | path)
            alone.append(sample | {"sender_effect": sender_effect})
    return pd.DataFrame(rows), pd.DataFrame(alone[::-1])


def test_a_share_has_an_interval_and_is_told_of_clear_senders_alone() -> None:
    """A ratio of means over sentences, by hand, whose sums are of the same samples."""
    table = tracing.path_table(*rows_of_senders(), 0.5).set_index("sender")
    for sender, (effects, is_clear) in SENDERS.items():
        row = table.loc[sender]
        sums: dict[str, list[float]] = {}
        for unit, (effect, sender_effect) in zip(SENTENCES, effects, strict=True):
            path_sum, sender_sum = sums.get(unit, [0.0, 0.0])
            sums[unit] = [path_sum + effect, sender_sum + sender_effect]
        path_sums, sender_sums = zip(*sums.values(), strict=True)
        assert row["total"] == pytest.approx(sum(sender_sums) / len(effects))
        shares = list(row[["share_of_total", "share_low", "share_high"]])
        if not is_clear:
            assert all(math.isnan(share) for share in shares)
            continue
        _, low, high = by_hand.mean_test(path_sums, sender_sums)
        assert shares[0] == pytest.approx(sum(path_sums) / sum(sender_sums))
        assert shares[1:] == pytest.approx([low, high], abs=0.02 * (high - low))
        assert shares[1] < shares[0] < shares[2]
    sentences = [tracing.describe_path(row, "unclear") for row in table.reset_index().itertuples()]
    for sentence, (_, is_clear) in zip(sentences, SENDERS.values(), strict=True):
        assert ("% of its sender's" in sentence.replace("]", "%")) == is_clear
        assert ("; the sender's own effect is not clear" in sentence) == (not is_clear)
        assert "nan" not in sentence


def test_a_path_without_significance_is_called_unclear_and_is_grey(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def watch(grid: Any, is_shown: Any, label: str, title: str, path: Path) -> None:
        drawn.update(grid=grid, is_shown=is_shown, title=title)

    monkeypatch.setattr(tracing, "draw_grid", watch)
    words = ["--num_samples", "12", "--no-bf16", "--through", "each"]
    finish(tiny_llama, tmp_path, "paths", *words, "--senders", "L1H2,L2H1,L2H6")
    paths = read(tmp_path, PATHS)
    clear = (paths["q"] < 0.05) & paths["above_noise"]
    assert 0 < clear.sum() < len(paths)
    assert paths["is_clear"].tolist() == clear.tolist()
    cells = paths.set_index(["sender", "receiver"])
    for sender, receiver in itertools.product(drawn["grid"].index, drawn["grid"].columns):
        is_path = (sender, receiver) in cells.index
        expected = is_path and bool(cells.loc[(sender, receiver), "is_clear"])
        assert drawn["is_shown"].loc[sender, receiver] == expected
        if is_path:
            mean = cells.loc[(sender, receiver), "mean"]
            assert drawn["grid"].loc[sender, receiver] == pytest.approx(mean)
    assert "grey: q >= 0.05" in drawn["title"]
    entries = record_of(tmp_path)["commands"]["paths"]["findings"]
    told = [entry["text"] for entry in entries if " -> " in entry["text"]]
    for sentence in told:
        q = float(sentence.split(", q ")[1].split(";")[0].split(",")[0])
        assert (", unclear;" in sentence) == (q >= 0.05)
    assert len({", unclear;" in sentence for sentence in told}) == 2


SINGLE = {
    "paths": "--layers 0",
    "paths --through each": "--layers 1",
    "tokens": "--task odd_one_out --layers 0 --heads 0",
    "graph": "--nodes 3",
}


@pytest.mark.parametrize("command", SINGLE)
@pytest.mark.parametrize("floor", [0.0, 1e9])
def test_no_sentence_has_a_number_that_is_none(
    command: str, floor: float, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one sample there is no interval, and below a high noise floor no share."""
    monkeypatch.setattr(tracing, "noise_floor", lambda *_: floor)
    words = [*command.split(), "--num_samples", "1", "--no-bf16", *SINGLE[command].split()]
    finish(llama, tmp_path, *words)
    log = (tmp_path / "run.log").read_text()
    assert not re.search(r"\bnan\b|nan ?%", log)


def test_paths_go_on_from_the_trace_of_their_folder(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They inherit its edit, measure none of its components again, and have its noise floor."""
    finish(llama, tmp_path, *FOUR, "--op", "patch", "--given", "L2H1")
    trace = read(tmp_path, "circuit_heads.csv").set_index("label")
    measured_again = "a component was measured again"
    monkeypatch.setattr(tracing, "component_edits", lambda *_: pytest.fail(measured_again))
    floor = record_of(tmp_path)["noise_floor"]
    for through, layers in (("L2H3", "0-1"), ("each", "1")):
        argv = ["paths", "--output_dir", str(tmp_path), "--through", through, "--layers", layers]
        assert tracing.main(argv) == 0
        paths = read(tmp_path, PATHS)
        assert set(paths["op"]) == {"patch into a"}
        totals = trace["mean"][paths["sender"]].tolist()
        assert paths["total"].tolist() == pytest.approx(totals, abs=1e-12)
        assert paths["above_noise"].tolist() == (paths["mean"].abs() > floor).tolist()
    assert record_of(tmp_path)["commands"]["paths"]["options"]["given"] == "L2H1"
    assert record_of(tmp_path)["noise_floor"] == floor


def test_senders_are_named_or_the_strongest_of_the_trace(llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, *FOUR)
    heads = read(tmp_path, "circuit_heads.csv").set_index("label")
    strongest = heads["role"].abs().nlargest(3).index
    finish(llama, tmp_path, "paths", "--senders", "top:3")
    assert read(tmp_path, PATHS)["sender"].tolist() == sorted(strongest)
    finish(llama, tmp_path, "paths", "--senders", "L1mlp,L0N7,L0H2", "--freeze", "all")
    assert set(read(tmp_path, PATHS)["sender"]) == {"L0H2", "L0N7", "L1mlp"}


def test_the_strongest_of_no_trace_are_refused(llama: str, tmp_path: Path, answer: Answer) -> None:
    argv = command_line(llama, tmp_path, "paths", *FOUR, "--senders", "top:3")
    refuses(answer, *argv, says=["--senders top:3", "run trace first"])


def test_nothing_lies_above_the_last_layer(llama: str, tmp_path: Path, answer: Answer) -> None:
    argv = command_line(llama, tmp_path, "paths", *FOUR, "--layers", "2", "--through", "each")
    refuses(answer, *argv, says=["--through each: no head is above L2H0"])


def test_senders_without_a_head_above_them_have_no_path(llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, "paths", *FOUR, "--through", "each", "--layers", "1-2")
    paths = read(tmp_path, PATHS)
    assert len(paths) == 16 and set(paths["sender"].str[:2]) == {"L1"}


REFUSED = {
    "--through L1H0": "L1H0 is a sender too",
    "--through L0H0 --layers 0": "receives from components below",
    "--through L0mlp --layers 0 --kind mlp": "receives from",
    "--through L1attn --layers 0": "receivers are heads and MLPs",
    "--through L1N3 --layers 0": "receivers are heads and MLPs",
    "--through L1resid --layers 0": "receivers are heads and MLPs",
    "--through L9H0 --layers 0": "this model has",
    "--through nonsense": "nonsense",
    "--freeze mlps": "freeze",
    "--kind neuron": "neurons are named by --senders",
    "--kind resid": "loses the input itself",
    "--senders L1resid,L0H1": "loses the input itself",
    "--senders L0H1 --layers 0": "names the senders",
    "--senders L0H9": "--senders L0H9: this model has",
    "--method atp": "--method is an option of the command trace, not of paths",
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.usefixtures("no_weights")
def test_what_is_no_path_is_refused_before_weights_are_loaded(
    words: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    argv = command_line(llama, tmp_path, "paths", *FOUR, *words.split())
    refuses(answer, *argv, says=[REFUSED[words]])


@pytest.mark.parametrize("words", ["--senders", "--layers 0 --through"])
@pytest.mark.usefixtures("no_weights")
def test_a_circuit_of_another_model_neither_sends_nor_receives(
    words: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    file, option = tmp_path / "circuit.json", words.split()[-1]
    file.write_text(json.dumps({"model": "another", "components": [{"label": "L1H1"}]}))
    argv = command_line(llama, tmp_path / "run", "paths", *FOUR, *words.split(), str(file))
    refuses(answer, *argv, says=[f"{option} {file} is of model another, not "])


@pytest.mark.usefixtures("no_weights")
def test_mlps_that_a_model_does_not_have_are_not_frozen(
    random_model: Callable[[str], str], tmp_path: Path, answer: Answer
) -> None:
    argv = command_line(random_model("mixtral"), tmp_path, "paths", *FOUR, "--freeze", "all")
    refuses(answer, *argv, says=["--freeze all: ", "has blocks without mlp.down_proj"])


@pytest.mark.usefixtures("no_weights")
def test_the_same_command_again_loads_no_weights(
    each: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(each, tmp_path / "run")
    monkeypatch.setattr(tracing, "noise_floor", lambda *_: 0.25)
    (folder / PATHS).unlink()
    finish(llama, folder, "paths", *FOUR, "--through", "each")
    assert (folder / PATHS).read_bytes() == (each / PATHS).read_bytes()
    assert len([*folder.glob("circuit_paths*")]) == 2


def test_an_interrupted_command_goes_on_to_the_same_bytes(
    each: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command_line(llama, tmp_path, "paths", *FOUR, "--through", "each")
    monkeypatch.setattr(tracing, "noise_floor", lambda *_: 0.25)
    record_received = tracing.record_received
    n_calls = 0

    def stop(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise KeyboardInterrupt
        return record_received(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "record_received", stop)
        assert tracing.main(argv) == 130
    n_parts = len([*tmp_path.glob(".parts/scores-*.json")])
    assert tracing.main(argv) == 0
    assert len([*tmp_path.glob(".parts/scores-*.json")]) > n_parts
    assert (tmp_path / PATHS).read_bytes() == (each / PATHS).read_bytes()


def test_rows_per_forward_change_nothing(each: Path, llama: str, tmp_path: Path) -> None:
    words = ["--through", "each", "--layers", "0", "--heads", "1,2", "--rows_per_forward", "1"]
    names = ["sender", "receiver"]
    narrow = read(finish(llama, tmp_path, "paths", *FOUR, *words), PATHS).set_index(names)
    wide = read(each, PATHS).set_index(names)
    assert len(narrow) == 16 and set(wide.index) > set(narrow.index)
    assert (narrow["mean"] - wide["mean"]).abs().max() < CLOSE


def test_negative_controls_are_left_out(llama: str, tmp_path: Path) -> None:
    words = "--task odd_one_out --num_samples 8 --layers 0 --heads 0"
    table = read(finish(llama, tmp_path, *words.split()))
    finish(llama, tmp_path, "paths", "--layers", "0", "--heads", "0")
    paths = read(tmp_path, PATHS)
    real = table[table["group"] != tracing.NO_ODD_ONE]
    assert {*paths["n_samples"]} == {real["sample_id"].nunique()}
    assert real["sample_id"].nunique() < table["sample_id"].nunique()
    assert paths["total"].tolist() == pytest.approx([real["head_effect"].mean()])


def test_a_run_without_edits_may_be_alone_in_its_batch(llama: str, tmp_path: Path) -> None:
    """The empty set of a confirmation, whose clean run keeps the first layer alone."""
    words = [*FOUR, "--layers", "1", "--confirm", "1", "--num_random", "1"]
    tables = []
    for rows in ("1", "4"):
        folder = finish(llama, tmp_path / rows, *words, "--rows_per_forward", rows)
        tables.append(read(folder, "circuit_confirm.csv")["mean_delta"])
    assert (tables[0] - tables[1]).abs().max() < CLOSE

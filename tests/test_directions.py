"""Directions: fits on data whose answer is known, edits along one, the ablation of a paper with its
own hooks, and the tables of the command by hand."""

from __future__ import annotations

import functools
import json
import math
import operator
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama3_circuit_tracing as tracing
import naive
import random_models
from by_hand import divergence_along, prepared
from conftest import (
    HANGS,
    ONE_THREAD,
    ROOT,
    SCRIPT,
    Answer,
    command_line,
    finish,
    read,
    record_of,
    refuses,
    write_samples,
)
from llama3_circuit_tracing import (
    AlongEdit,
    CleanRun,
    Component,
    DirectionData,
    DirectionSet,
    Edit,
    Fit,
)
from test_interventions import Bench, bench
from test_paths import clean_run_of, experiment_of, moved_scores

CLOSE = 2e-5  # nats, in float32
TABLE, EFFECTS, FILE = "circuit_directions.csv", "direction_effects.csv", "directions.safetensors"
CONFIRM, REPLIES = "directions_confirm.csv", "directions_generations.jsonl"
FIND = {"difference": tracing.difference_of_means, "logistic": tracing.logistic_normal}
PRE_NORM = [name for name in random_models.ARCHITECTURES if name != "gemma3_text"]
Experiment = tracing.Experiment[Any]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")
Build = Callable[..., str]


def replies_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / REPLIES).read_text().splitlines()]


def units_of(prompts: tracing.Prompts) -> set[str]:
    return {pair[0].sample.unit for pair in prompts}


def ids_of(prompts: tracing.Prompts) -> set[str]:
    return {pair[0].sample.sample_id for pair in prompts}


def data_of(model: str, *words: str) -> DirectionData:
    """What a command line is to find or read, before any weight is loaded."""
    return tracing.prepare_directions(prepared(model, "directions", *words))


def gaussians(n: int, apart: float, width: int = 8, count: int = 1, seed: int = 0) -> Any:
    """Inputs [component, sample, side, width] of SD 1, and from the mean of b to that of a."""
    rng = np.random.default_rng(seed)
    of_b, d = np.random.default_rng(99).normal(size=(2, count, 1, width))
    d *= apart / np.linalg.norm(d, axis=-1, keepdims=True)
    x = rng.normal(size=(count, n, 2, width)) + 3 * of_b[:, None]
    x[:, :, 0] += d
    return torch.tensor(x), torch.tensor(d[:, 0])


# ----- fits


@pytest.mark.parametrize("method", FIND)
def test_the_direction_between_two_gaussians_is_found(method: str) -> None:
    """A linear rule can be right in Phi(distance / 2 SD) of new cases, and no more."""
    x, d = gaussians(1500, 1.5, count=2)
    fit = FIND[method](x)
    assert torch.cosine_similarity(fit.directions, d).min() > 0.985
    assert (fit.directions - d).norm(dim=1).max() < 0.25
    others = gaussians(1500, 1.5, count=2, seed=1)[0]
    accuracy, auc = tracing.accuracy_of(fit, others), tracing.roc_area(fit.directions, others)
    assert (accuracy - NormalDist().cdf(1.5 / 2)).abs().max() < 0.02
    assert (auc - NormalDist().cdf(1.5 / math.sqrt(2))).abs().max() < 0.02


@pytest.mark.parametrize("method", FIND)
def test_added_once_a_direction_moves_the_mean_of_b_to_that_of_a_along_it(method: str) -> None:
    x, _ = gaussians(16, 2.0, count=5)
    d = FIND[method](x).directions
    a, b = x.mean(1).unbind(1)
    assert (((b + d) * d).sum(1) - (a * d).sum(1)).abs().max() < 1e-9


@pytest.mark.parametrize(("count", "n", "width"), [(40, 16, 24), (1, 16, 4096), (64, 3, 16)])
def test_logistic_is_where_the_gradient_of_its_loss_is_zero(count: int, n: int, width: int) -> None:
    """With w = k * d * SD for some k > 0: w = sum of y sigma(-y m) z, and no bias is better. The
    penalty makes the Hessian at least 1, so w is as near its optimum as the gradient is small."""
    x = gaussians(n, 1.0, width, count)[0] * torch.linspace(0.01, 100, width).double()
    for flat, d, threshold in zip(
        x.numpy(), *map(Tensor.numpy, tracing.logistic_normal(x)), strict=True
    ):
        flat = flat.reshape(2 * n, width)
        z = (flat - flat.mean(0)) / flat.std(0)
        w, margin, y = d * flat.std(0), flat @ d - threshold, np.tile([1.0, -1.0], n)

        def pull(k: float, m: Any = margin, y: Any = y) -> Any:
            return y / (1 + np.exp(np.minimum(k * y * m, 700)))

        low, high = 0.0, 1e6
        for _ in range(200):
            k = (low + high) / 2
            low, high = (k, high) if k * w @ w < w @ (pull(k) @ z) else (low, k)
        assert np.linalg.norm(k * w - pull(k) @ z) < 1e-4 * np.linalg.norm(k * w)
        assert abs(pull(k).sum()) < 1e-4


def test_logistic_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, _ = gaussians(16, 1.0, 200, 4)
    for flat, d in zip(
        x.numpy().reshape(4, 32, 200), tracing.logistic_normal(x)[0].numpy(), strict=True
    ):
        model = sklearn.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
        model.fit((flat - flat.mean(0)) / flat.std(0), np.tile([1, 0], 16))
        normal = model.coef_[0] / flat.std(0)
        assert normal @ d / np.linalg.norm(normal) / np.linalg.norm(d) > 0.9999


@pytest.mark.parametrize("method", FIND)
def test_what_is_the_same_on_both_sides_has_no_direction(method: str) -> None:
    x = torch.full((1, 4, 2, 6), 0.1).double()
    fit = FIND[method](torch.cat([x, gaussians(4, 1.0, 6)[0]]))
    assert fit.directions.isfinite().all()
    assert not fit.directions[0].any()
    assert fit.directions[1].any()
    same = torch.cat([x, x])
    accuracy, auc = tracing.accuracy_of(fit, same), tracing.roc_area(fit.directions, same)
    assert accuracy[0] == auc[0] == auc[1] == 0.5
    assert not tracing.unit_vector(fit.directions[0]).any()


def test_accuracy_and_area_of_a_few_numbers() -> None:
    """Right: 2, 3 and 1 of a, 0 and -1 of b; what lies on the threshold is half right."""
    x = torch.tensor([[3.0, -1.0], [2.0, 0.0], [1.0, 2.0], [0.5, 0.5]]).double()[None, :, :, None]
    fit = Fit(torch.ones(1, 1).double(), torch.tensor([0.5]))
    assert float(tracing.accuracy_of(fit, x)) == (3 + 2 + 2 * 0.5) / 8
    assert float(tracing.roc_area(fit.directions, x)) == (4 + 3.5 + 3 + 2.5) / 16


@pytest.mark.parametrize("method", FIND)
def test_fits_to_shuffled_sides_are_right_half_of_the_time(method: str) -> None:
    """Of sides that are easily told apart: they change places sentence by sentence, in what is
    fitted and in what is tested."""
    fitted, tested = (gaussians(32, 3.0, 6, 12, seed)[0] for seed in (0, 1))
    chance = []
    for draw in range(tracing.N_SHUFFLES):
        rng, swapped = random.Random(f"7 shuffle {draw}"), []
        for x in (fitted.clone(), tested.clone()):
            for two in (slice(i, i + 2) for i in range(0, 32, 2)):
                x[:, two] = x[:, two].flip(2) if rng.random() < 0.5 else x[:, two]
            swapped.append(x)
        chance.append(tracing.accuracy_of(FIND[method](swapped[0]), swapped[1]))
    assert abs(float(torch.stack(chance).mean()) - 0.5) < 0.06
    units = [f"u{i // 2:02}" for i in range(32)]
    tested_units = [f"v{i // 2:02}" for i in range(32)]
    accuracy = tracing.chance_accuracy(FIND[method], fitted, tested, units, tested_units, 7)
    assert (accuracy - torch.stack(chance).quantile(0.95, 0)).abs().max() < 1e-12


@pytest.mark.parametrize("method", FIND)
def test_sides_that_are_easily_told_apart_beat_the_limit_of_chance(method: str) -> None:
    """Of five sentences, too: swaps of all or most of them find the direction or its opposite, but
    no labels to go with it."""
    fitted, tested = (gaussians(5, 6.0, 8, 40, seed)[0] for seed in (0, 1))
    units = [[f"{name}{i}" for i in range(5)] for name in "uv"]
    limit = tracing.chance_accuracy(FIND[method], fitted, tested, *units, 7)
    accuracy = tracing.accuracy_of(FIND[method](fitted), tested)
    assert accuracy.mean() > 0.95
    assert (accuracy > limit).double().mean() > 0.8


@pytest.mark.parametrize(("accuracy", "shuffled"), [(0.9, 0.85), (0.9, 0.9), (1.0, 1.0)])
def test_the_sentence_of_a_direction_says_whether_shuffled_labels_do_as_well(
    accuracy: float, shuffled: float
) -> None:
    row = direction_row(accuracy=accuracy, accuracy_shuffled=shuffled)
    phrase = "no higher than by shuffled labels"
    if accuracy > shuffled:
        phrase = "higher than by 95 % of shuffled labels"
    sentence = tracing.describe_direction(row)
    assert f", accuracy {accuracy:.0%} [50%, 100%], {phrase} ({shuffled:.0%});" in sentence
    assert sentence.endswith("; moved along it -1.500 (30% [10%, 45%] of the base)")


def direction_row(**more: float) -> SimpleNamespace:
    """A row of the table."""
    row: dict[str, Any] = {"label": "L1resid", "auc": 1.0, "n_sentences": 4}
    row |= {"accuracy_low": 0.5, "accuracy_high": 1.0, "along_mean": -1.5}
    row |= {"along_share_moved": 0.3, "along_share_low": 0.1, "along_share_high": 0.45}
    return SimpleNamespace(**(row | more))


def test_without_a_clear_base_the_sentence_has_no_share() -> None:
    row = direction_row(accuracy=math.nan, along_share_moved=math.nan, along_share_low=math.nan)
    sentence = tracing.describe_direction(row)
    assert (
        sentence
        == "direction of L1resid: AUC 1.00 over 4 held-out sentences; moved along it -1.500"
    )


def test_shares_that_are_moved_have_intervals_over_sentences_by_hand() -> None:
    """Four sentences, one of two samples, and a negative control that does not count."""
    units = ["u", "u", "v", "w", "x", "c"]
    base, effect = [3.0, 1.0, 4.0, 2.0, 3.0, 50.0], [-1.0, -1.0, -2.0, -1.5, -2.5, 9.0]
    groups = ["", "", "", "", "", tracing.NO_ODD_ONE]
    frame = {"label": "L1resid", "unit": units, "group": groups}
    effects = pd.DataFrame(frame | {"delta_logit_base": base, "head_effect": effect})
    labels = pd.Index(["L1resid"], name="label")
    share, low, high = tracing.shares_of_base(effects, labels).loc["L1resid"]
    assert share == pytest.approx(8 / 13)
    taken, bases = torch.tensor([[2.0, 2.0, 1.5, 2.5], [4.0, 4.0, 2.0, 3.0]]).double()
    expected = tracing.mean_interval(taken[:, None], bases[:, None])[:, 0].tolist()
    assert (low, high) == pytest.approx(expected)
    assert low < share < high


# ----- edits along a direction


@pytest.fixture(scope="module", params=[*random_models.ARCHITECTURES, "tiny"])
def any_bench(request: Any, folder_of: Build) -> Bench:
    return bench(folder_of(request.param))


@pytest.fixture(scope="module", params=[*PRE_NORM, "tiny"])
def pre_norm(request: Any, folder_of: Build) -> Bench:
    return bench(folder_of(request.param))


@pytest.fixture(scope="module")
def plain(llama: str) -> Bench:
    return bench(llama)


def random_file(model: Bench, kind: str) -> str:
    """A random direction of each component of a kind, in a file beside the model."""
    shape = model.traced.shape
    directions = {}
    for number, component in enumerate(shape.components(kind)):
        generator = torch.Generator().manual_seed(number)
        direction = torch.randn(shape.n_columns(component), generator=generator)
        directions[component.label] = direction.double()
    path = str(Path(model.folder, FILE))
    save_file(directions, path)
    return path


def data_of_random(model: Bench, words: str) -> DirectionData:
    """The same of a model that is loaded already, along random directions of the kind."""
    kind = words.split()[words.split().index("--kind") + 1]
    words = f"directions {words} --fit {random_file(model, kind)}"
    return tracing.prepare_directions(experiment_of(model, words))


def clean_run_and_edits(data: DirectionData) -> tuple[CleanRun, list[Edit]]:
    """The clean run of the first tree, and the edit along each direction."""
    clean_run = clean_run_of(data.experiment, data.experiment.trees[0])
    subjects = [AlongEdit(component) for component in data.components]
    return clean_run, [edit for (edit,) in tracing.along_edits(data, clean_run, subjects)]


ALONG = [
    "--kind head --heads 1 --layers 1 --op zero",
    "--kind head --heads 3 --layers 0 --op patch",
    "--kind attn --layers 1 --op mean",
    "--kind mlp --layers 2 --op scale --factor -1.5",
    "--kind mlp --layers 0 --op add",
    "--kind resid --layers 1 --op zero",
    "--kind resid --layers 1 --op patch --patch_into b",
    "--kind resid --layers 2 --op patch --positions last",
    "--kind resid --layers 1 --op add --positions last",
    "--kind resid --layers 1 --op mean --positions differing",
]


def only_along(monkeypatch: Patch, direction: Tensor, span: slice, adds: bool) -> None:
    """Make the oracle's hooks move their input along a direction only, or by it."""
    hooked, d = naive.hooked, direction.float()

    def along(module: Any, replace: Any) -> AbstractContextManager[None]:
        def project(x: Tensor) -> Tensor:
            y, moved = x.clone(), replace(x) - x
            change = (moved[..., span] @ d)[..., None] * d / (d @ d)
            y[..., span] += moved.any(-1, keepdim=True) * d if adds else change
            return y

        return hooked(module, project)

    monkeypatch.setattr(naive, "hooked", along)


def like_the_oracle(model: Bench, words: str, monkeypatch: Patch) -> None:
    data = data_of_random(model, words)
    (component,), options = data.components, data.options
    place = component.layer, component.kind
    span = naive.span_of(model.loaded[0], *place, component.index)
    only_along(monkeypatch, data.vectors[component], span, options.op == "add")
    users = [pair[1].sample.prompt_b for pair in data.measured]
    mean = naive.mean_of(*model.loaded, users, *place) if options.op == "mean" else None
    moved, expected = [], []
    for tree in data.experiment.trees:
        clean_run = clean_run_of(data.experiment, tree)
        rows = tracing.along_edits(data, clean_run, [AlongEdit(component)])
        moved += moved_scores(data.experiment, clean_run, rows)[0].tolist()
        for prompt in tree.prompts:
            texts, targets = [prompt.sample.prompt_a, prompt.sample.prompt_b], prompt.sample.targets
            if prompt.side == "b":
                texts.reverse()
            base = naive.suppression_score(*model.loaded, texts[0], targets)
            score = naive.edited_score(
                *model.loaded, options, texts, targets, component.layer, component.index, mean
            )
            receives = options.op != "patch" or options.patch_into == prompt.side
            expected.append(score - base if receives else 0.0)
    assert moved == pytest.approx(expected, abs=CLOSE)
    assert max(map(abs, expected)) > 100 * CLOSE, "the edit did nothing"


@pytest.mark.parametrize("flags", ALONG)
def test_a_plain_hook_gives_the_same_numbers(plain: Bench, flags: str, monkeypatch: Patch) -> None:
    like_the_oracle(plain, flags, monkeypatch)


@pytest.mark.parametrize("flags", [ALONG[0], ALONG[6]])
def test_and_with_other_architectures(any_bench: Bench, flags: str, monkeypatch: Patch) -> None:
    like_the_oracle(any_bench, flags, monkeypatch)


@pytest.mark.parametrize("op", ["patch", "scale --factor -3"])
@pytest.mark.parametrize("kind", ["head --heads 2", "mlp", "resid"])
def test_all_of_a_basis_together_are_the_whole_edit(any_bench: Bench, kind: str, op: str) -> None:
    data = data_of_random(any_bench, f"--kind {kind} --layers 1 --op {op}")
    clean_run, (edit,) = clean_run_and_edits(data)
    whole, x = replace(edit, along=None), clean_run.activations[edit.site][None]
    along, moved = tracing.displacement(edit, x), tracing.displacement(whole, x)
    u = tracing.unit_vector(data.vectors[data.components[0]])
    assert (along - moved @ u[:, None] * u).abs().max() < 1e-9
    assert along.abs().max() > 1e-3
    basis = torch.linalg.qr(torch.randn(len(u), len(u)).double())[0].T
    parts = tuple(replace(edit, along=e.expand(2, -1)) for e in basis)
    rows = [parts, (whole,)]
    together, plain = tracing.run_rows(data.experiment.traced, clean_run, rows)
    assert (together - plain).abs().max() < 5e-4  # nats, after the rounding of so many sums
    assert (plain - clean_run.log_probs[0]).abs().max() > 1e-2


@pytest.mark.parametrize("words", ["--kind head --op zero", "--kind resid --op add"])
def test_random_directions_go_as_far(plain: Bench, words: str) -> None:
    data = data_of_random(plain, words)
    clean_run, edits = clean_run_and_edits(data)
    subjects = [AlongEdit(component, 0) for component in data.components]
    drawn_edits = [edit for (edit,) in tracing.along_edits(data, clean_run, subjects)]
    for edit, drawn in zip(edits, drawn_edits, strict=True):
        x = clean_run.activations[edit.site][None]
        along, beside = tracing.displacement(edit, x)[0], tracing.displacement(drawn, x)[0]
        assert (along.norm(dim=1) - beside.norm(dim=1)).abs().max() < 1e-9
        along, beside = tracing.unit_vector(along[-1]), tracing.unit_vector(beside[-1])
        assert abs(float(along @ beside)) < 0.8
    assert len({tuple(drawn.along[1].tolist()) for drawn in drawn_edits}) == len(edits)


def test_each_of_several_components_moves_along_its_own_direction(plain: Bench) -> None:
    """Complements too; random sets are the chosen, as far, each in a random direction."""
    data = data_of_random(plain, "--kind head --given L0H1")
    clean_run, _ = clean_run_and_edits(data)
    shape = data.experiment.shape
    few = (Component(1, "head", 0), Component(1, "head", 3), Component(2, "head", 1))
    sets = tracing.sets_of_directions(data, few)
    names = [joint_set.name for joint_set in sets if joint_set.name != "random"]
    assert names == ["none", "all", "chosen", "chosen", "chosen", "complement"]
    assert len({joint_set.key for joint_set in sets}) == len(sets)
    assert data.key_of(data.vectors) in sets[1].key
    random_sets = [s for s in sets if s.name == "random" and s.components == few]
    assert len(random_sets) == data.options.num_random
    drawn = set()
    for row in tracing.direction_set_edits(data, clean_run, random_sets):
        for component, edit in zip(sorted(few), row, strict=True):
            reads, writes = edit.along
            assert edit.site == component.site and edit.columns == shape.columns(component)
            assert (reads - tracing.unit_vector(data.vectors[component])).abs().max() < 1e-15
            assert abs(float(writes.norm()) - 1) < 1e-12 and abs(float(reads @ writes)) < 0.99
            drawn.add(tuple(writes.tolist()))
    assert len(drawn) == 3 * len(random_sets), "each its own, in each draw"
    for others, edited in (((), {*few}), (("head",), {*shape.components("head")} - {*few})):
        joint_set = DirectionSet("a set", few, others_of=others)
        (row,) = tracing.direction_set_edits(data, clean_run, [joint_set])
        places = {(edit.site, edit.columns.start): edit for edit in row}
        assert len(places) == len(row) == len(edited) > 0
        for component in edited:
            edit = places[component.site, shape.columns(component).start]
            unit = tracing.unit_vector(data.vectors[component])
            assert (edit.along - unit).abs().max() < 1e-15


# ----- a direction zeroed everywhere


@contextmanager
def ablated_as_in_the_paper(model: Any, d: Tensor) -> Iterator[None]:
    """arXiv:2406.11717: x - (x u) u of each block's input and of what attention and MLP write."""
    u = (d / d.norm()).float()

    def without(x: Tensor) -> Tensor:
        return x - (x @ u)[..., None] * u

    def after(_: Any, args: Any, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    with ExitStack() as stack:
        for block in naive.layers_of(model):
            stack.enter_context(naive.hooked(block, without))
            stack.enter_context(block.self_attn.register_forward_hook(after))
            stack.enter_context(block.mlp.register_forward_hook(after))
        yield


EVERYWHERE = "--kind resid --op zero --confirm all --num_random 3 --max_new_tokens 6"


def ablating(model: Bench) -> tuple[DirectionData, Component]:
    data = data_of_random(model, EVERYWHERE)
    return data, data.components[1]


def test_a_direction_zeroed_everywhere_is_the_ablation_of_the_paper(pre_norm: Bench) -> None:
    """Nothing less is: not the blocks' inputs alone, nor all without one kind of reading point."""
    data, component = ablating(pre_norm)
    experiment, d = data.experiment, data.vectors[component]
    tree = experiment.trees[0]
    clean_run = clean_run_of(experiment, tree)
    row = tracing.everywhere_edits(data, clean_run, DirectionSet("chosen", (component,)))
    assert len(row) == 2 * experiment.shape.n_layers + 1
    less = [tuple(edit for edit in row if edit.site.place == "resid")]
    for place in ("resid", "mlp_norm", "final"):
        less.append(tuple(edit for edit in row if edit.site.place != place))
    base = tree.scores(clean_run.log_probs, experiment.task)
    ablated, *others = moved_scores(experiment, clean_run, [row, *less])
    model, tokenizer = pre_norm.loaded
    for i, prompt in enumerate(tree.prompts):
        text = prompt.sample.prompt_a if prompt.side == "a" else prompt.sample.prompt_b
        with ablated_as_in_the_paper(model, d):
            paper = naive.suppression_score(model, tokenizer, text, prompt.sample.targets)
        assert abs(float((base + ablated)[0, i]) - paper) < 1e-5 * max(1, abs(paper))
    assert ablated.abs().max() > 0.05
    for moved in others:
        assert (ablated - moved).abs().max() > 1e-3


@torch.no_grad()
def test_replies_are_those_of_the_paper_too(pre_norm: Bench) -> None:
    data, component = ablating(pre_norm)
    d, (model, tokenizer) = data.vectors[component], pre_norm.loaded
    joint_set = DirectionSet("chosen", (component,), everywhere=True)
    request = tracing.ReplyRequest(joint_set, data.experiment.prompts)
    make_edits = functools.partial(tracing.direction_set_edits, data)
    edited_prompts = list(tracing.edit_prompts(data.experiment, request, make_edits))
    prompts = [prompt for prompt, _ in edited_prompts]
    found = tracing.greedy_replies(data.experiment, edited_prompts, 6)
    replies = [reply.text for reply in found]
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot_id|>")}
    configured = data.experiment.traced.model.generation_config.eos_token_id
    ends |= set(configured if isinstance(configured, list) else [configured])
    with ablated_as_in_the_paper(model, d):
        expected = [naive.greedy(model, prompt.ids, 6, ends) for prompt in prompts]
    texts = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in expected]
    assert replies == texts


@torch.no_grad()
def test_the_divergence_along_replies_is_that_of_the_paper_too(
    pre_norm: Bench, tmp_path: Path
) -> None:
    """Of the direction; that of random ones goes along with it."""
    data, component = ablating(pre_norm)
    experiment, (model, _) = data.experiment, pre_norm.loaded
    experiment.folder.path = tmp_path
    experiment.folder.parts = tmp_path / "parts"
    experiment.folder.parts.mkdir()
    chosen = DirectionSet("chosen", (component,), directions="d", everywhere=True)
    sets = [DirectionSet("none"), *tracing.with_random_directions(data, chosen)]
    replies = {}
    for number, prompts in enumerate(experiment.prompts):
        replies[prompts[0].sample.sample_id, "b"] = [5, 9, 31, 4][: 1 + number % 4]
    make_edits = functools.partial(tracing.direction_set_edits, data)
    table = tracing.measure_along_replies(experiment, sets, experiment.prompts, replies, make_edits)
    is_chosen = table["place"] == 1
    for row in table[is_chosen].itertuples():
        (ids,) = (
            pair[1].ids for pair in experiment.prompts if pair[0].sample.sample_id == row.sample_id
        )
        edited = functools.partial(ablated_as_in_the_paper, model, data.vectors[component])
        expected = divergence_along(model, ids, replies[row.sample_id, "b"], edited)
        assert row.kl_reply_b == pytest.approx(expected, rel=1e-4, abs=CLOSE)
    assert set(table["place"]) == {1, 2, 3, 4}
    assert table[~is_chosen].groupby("sample_id")["kl_reply_b"].nunique().eq(3).all()
    assert table["kl_reply_b"].min() > 0


def test_random_directions_go_as_far_at_each_token_and_reading_point(pre_norm: Bench) -> None:
    data, component = ablating(pre_norm)
    experiment = data.experiment
    clean_run = clean_run_of(experiment, experiment.trees[0])
    chosen = DirectionSet("chosen", (component,), everywhere=True)
    sets = [chosen, *(replace(chosen, name="random", draw=draw) for draw in (1, 2))]
    moved_by_set = []
    for row in tracing.direction_set_edits(data, clean_run, sets):
        modules = {edit.site: experiment.traced.module(edit.site) for edit in row}
        with torch.no_grad(), tracing.recording(modules) as recorded:
            tracing.run_edited(experiment.traced, clean_run, [row])
        moved_by_set.append({e.site: tracing.displacement(e, recorded[e.site])[0] for e in row})
    zeroed, *random_moves = moved_by_set
    assert len(zeroed) == 2 * experiment.shape.n_layers + 1
    ends, u = experiment.trees[0].scored, tracing.unit_vector(data.vectors[component])
    directions = []
    for drawn in random_moves:
        for site, moved in zeroed.items():
            far = moved[ends].norm(dim=1)
            assert (drawn[site][ends].norm(dim=1) - far).abs().max() < 1e-4 * float(far.max())
        direction = tracing.unit_vector(drawn[tracing.Site(0, "resid")][-1])
        for moved in drawn.values():  # all in one direction
            assert (moved - (moved @ direction)[:, None] * direction).abs().max() < 1e-6
        directions.append(direction)
    overlaps = torch.stack([u, *directions]) @ torch.stack([u, *directions]).T
    assert (overlaps - torch.eye(3)).abs().max() < 0.9


@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2", "olmo2", "cohere"])
@pytest.mark.usefixtures("no_weights")
def test_models_that_read_the_stream_otherwise_are_refused(
    architecture: str, random_model: Build, answer: Answer, tmp_path: Path
) -> None:
    argv = command_line(random_model(architecture), tmp_path / "x", "directions")
    says = ["--confirm all is for models", "input_layernorm and post_attention_layernorm"]
    refuses(answer, *argv, *EVERYWHERE.split(), says=says)


CHOSEN: list[tuple[list[float], list[float], int, str]] = [  # roles, KL, layer without direction
    ([1, 5, 3, 2, 9], [0, 0, 0, 0, 0], -1, "L1resid"),  # none of the last fifth
    ([1, 5, 3, 2, 9], [0, 0.2, 0.1, 0, 0], -1, "L2resid"),
    ([1, 5, 2, 2, 9], [0, 0.2, 0.1, 0, 0], -1, "L1resid"),
    ([1, 5, 3, 2, 9], [0, 0.3, 0.2, 0, 0], -1, "L2resid"),
    ([1, 5, 3, 2, 9], [0, 0, 0, 0, 0], 1, "L2resid"),
    ([-1, -5, 0, -2, 9], [0, 0, 0, 0, 0], -1, ""),
]


@pytest.mark.parametrize(("roles", "kl", "zero", "label"), CHOSEN)
def test_the_layer_is_chosen_on_the_samples_that_are_set_apart(
    roles: Any, kl: Any, zero: int, label: str, monkeypatch: Patch
) -> None:
    """Of layers that move a base of +10 by so much against it, with such a KL."""
    components = [Component(layer, "resid") for layer in range(5)]
    vectors = {c: torch.ones(3) * (c.layer != zero) for c in components}
    experiment: Any = SimpleNamespace(options=SimpleNamespace(num_random=2))
    experiment.shape = SimpleNamespace(n_layers=5)
    experiment.findings = tracing.Findings()
    set_apart: Any = ["those set apart"]
    data = DirectionData(experiment, components, "difference", vectors, set_apart, [])

    def scores(_: Any, sets: Sequence[DirectionSet], prompts: Any, make_edits: Any) -> pd.DataFrame:
        assert prompts is set_apart
        rows = []
        for place, joint_set in enumerate(sets):
            role, divergence = 0.0, 0.0
            for component in joint_set.components:
                role, divergence = roles[component.layer], kl[component.layer]
            row = {"place": place, "score_a": 10 - role, "score_b": 0.0, "kl_b": divergence}
            rows += [row, row]
        return pd.DataFrame(rows)

    monkeypatch.setattr(tracing, "measure_sets", scores)
    sets = tracing.choose_layer(data, "b")
    if not label:
        assert sets == []
        return
    names = [(joint_set.name, joint_set.draw) for joint_set in sets]
    assert names == [("none", 0), ("chosen", 0), ("random", 1), ("random", 2)]
    assert [joint_set.text for joint_set in sets[1:]] == [f"{label} everywhere"] * 3
    assert len({joint_set.key for joint_set in sets}) == 4
    data.components = [c for c in components if c.label != label]  # what is not swept is not chosen
    next_best = tracing.choose_layer(data, "b")[1]
    assert next_best.name == "chosen" and next_best.components[0].label != label


# ----- the whole command


WHOLE_PATCH = "--task refusal --num_samples 12 --no-bf16 --kind resid --op patch"
PATCH = [*WHOLE_PATCH.split(), "--fit", "difference"]
SHARE = ("moved", "low", "high")
NUMBERS = [f"{way}_{name}" for way in ("along", "random") for name in ("mean", "ci_low", "q")]


@pytest.fixture(scope="module")
def patched(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tiny_llama, tmp_path_factory.mktemp("patched"), "directions", *PATCH)


def by_plain_forwards(model: str, prompts: Sequence[Any], layer: int, kind: str = "resid") -> Any:
    """[sample, side, width] at the last token."""
    plain, tokenizer = naive.load(model)

    def last(text: str) -> Any:
        ids = naive.prompt_ids(tokenizer, text)
        return naive.input_of(plain, ids, layer, kind)[-1].double().numpy()

    samples = [pair[0].sample for pair in prompts]
    return np.array([[last(sample.prompt_a), last(sample.prompt_b)] for sample in samples])


def correct(x: Any, a: Any, b: Any) -> float:
    """The share of inputs [sample, side, width] that lie on their mean's side of the middle."""
    projections = (x - (a + b) / 2) @ (a - b)
    return float((projections[:, 0] > 0).mean() + (projections[:, 1] < 0).mean()) / 2


def unedited_deltas(folder: Path, prompts: tracing.Prompts) -> list[float]:
    """The unedited score of prompt a less that of b, of some samples of a run."""
    deltas = []
    for record in record_of(folder)["samples"]:
        if record["sample_id"] in ids_of(prompts):
            sides = record["prompts"]
            deltas.append(sides["a"]["score"] - sides["b"]["score"])
    return deltas


def test_the_table_recomputes_from_plain_forwards(patched: Path, tiny_llama: str) -> None:
    data, table = data_of(tiny_llama, *PATCH), read(patched, TABLE).set_index("label")
    directions, effects = load_file(patched / FILE), read(patched, EFFECTS)
    assert list(table.index) == list(directions) == [f"L{n}resid" for n in range(4)]
    assert list(effects["label"]) == list(table.index)
    assert not units_of(data.fitting) & units_of(data.measured)
    assert len(data.fitting) + len(data.measured) == 12
    assert set(table["n_fit"]) == {len(units_of(data.fitting))} == {6}
    assert set(effects["n_sentences"]) == {len(units_of(data.measured))} == {6}
    base = np.mean(unedited_deltas(patched, data.measured))
    for layer, row in enumerate(table.itertuples()):
        fitted = by_plain_forwards(tiny_llama, data.fitting, layer)
        tested = by_plain_forwards(tiny_llama, data.measured, layer)
        a, b = fitted.mean(0)
        d = a - b
        assert np.abs(directions[row.Index].numpy() - d).max() < 1e-4
        assert row.norm == pytest.approx(np.linalg.norm(d), rel=1e-4, abs=1e-9)
        assert row.along_mean == pytest.approx(effects["mean"][layer])
        assert row.along_share_moved == pytest.approx(-row.along_mean / base, abs=1e-9)
        assert row.random_share_moved == pytest.approx(-row.random_mean / base, abs=1e-9)
        for way in ("along", "random", "whole"):
            share, low, high = (getattr(row, f"{way}_share_{end}") for end in SHARE)
            assert low <= share <= high
        if not d.any():
            assert math.isnan(row.largest_share)
            assert row.accuracy == row.auc == 0.5
            continue
        assert row.largest_share == pytest.approx((d**2).max() / (d @ d), rel=1e-4)
        projections = tested @ d
        accuracy = correct(tested, a, b)
        assert row.accuracy == pytest.approx(accuracy)
        assert row.auc == pytest.approx((projections[:, 0][:, None] > projections[:, 1]).mean())
        assert row.accuracy_fit == pytest.approx(correct(fitted, a, b))
        assert row.n_sentences == 6
        assert (row.accuracy_low, row.accuracy_high) == tracing.share_interval(accuracy, 6)
    assert table["along_share_moved"].iloc[1:].min() > 0.5
    assert table["random_share_moved"].abs().max() < 0.5


def test_effects_are_those_of_the_edits_in_the_measured_samples(
    patched: Path, tiny_llama: str, folder_of: Build
) -> None:
    data = data_of(tiny_llama, *PATCH)
    data.experiment.traced = bench(folder_of("tiny")).traced
    data.vectors = {Component.parse(k): d for k, d in load_file(patched / FILE).items()}
    component = Component(1, "resid")
    subjects = {"along": AlongEdit(component), "random": AlongEdit(component, 0)}
    effects: dict[str, list[float]] = {"along": [], "random": []}
    for tree in data.experiment.plant_trees(data.measured):
        clean_run = clean_run_of(data.experiment, tree)
        rows = tracing.along_edits(data, clean_run, list(subjects.values()))
        for way, moved in zip(
            subjects, moved_scores(data.experiment, clean_run, rows).tolist(), strict=True
        ):
            effects[way] += [moved[places["a"]] - moved[places["b"]] for _, places in tree.samples]
    row = read(patched, TABLE).set_index("label").loc["L1resid"]
    for way, values in effects.items():
        assert row[f"{way}_mean"] == pytest.approx(np.mean(values), abs=CLOSE)


def test_the_whole_is_that_of_a_trace(patched: Path, tiny_llama: str, tmp_path: Path) -> None:
    data = data_of(tiny_llama, *PATCH)
    results = read(finish(tiny_llama, tmp_path, *WHOLE_PATCH.split()))
    measured = results[results["sample_id"].isin(ids_of(data.measured))]
    means = measured.groupby("layer")["head_effect"].mean()
    assert (read(patched, TABLE)["whole_mean"] - means.to_numpy()).abs().max() < CLOSE


def test_directions_come_from_the_half_that_is_not_measured(llama: str, tmp_path: Path) -> None:
    """Other texts in the held-out sentences change their results and no direction."""
    words = {"targets": ["I", "Sorry"], "foils": ["Sure", "Here"]}
    records: list[dict[str, Any]] = [
        {"prompt_a": a, "prompt_b": b, "unit": f"u{i // 2}", **words}
        for i, (a, b) in enumerate(tracing.REFUSAL_PAIRS[:12])
    ]
    path, flags = tmp_path / "own.jsonl", [*PATCH, "--layers", "1-2", "--samples"]
    write_samples(path, *records)
    held_out = units_of(data_of(llama, *flags, str(path)).measured)
    assert len(held_out) == 3
    directions, effects = [], []
    for i, changed in enumerate((set(), held_out, {f"u{i}" for i in range(6)} - held_out)):
        please = (
            {"prompt_b": r["prompt_b"] + " Please." * (r["unit"] in changed)} for r in records
        )
        write_samples(path, *map(operator.or_, records, please))
        folder = finish(llama, tmp_path / str(i), "directions", *flags, str(path))
        directions.append(load_file(folder / FILE))
        effects.append(read(folder, EFFECTS)["mean"].to_numpy())
    for label, d in directions[0].items():
        assert torch.equal(d, directions[1][label])
        assert label == "L0resid" or not torch.equal(d, directions[2][label])
    assert np.abs(effects[0] - effects[1]).max() > 1e-3
    assert np.abs(effects[0] - effects[2]).max() > 1e-6


def test_a_file_of_directions_gives_the_same_effects_and_leaves_its_sentences_out(
    patched: Path, tiny_llama: str, tmp_path: Path
) -> None:
    """Which are known by their texts: in another template, with other words, or as one of two."""
    flags = [*PATCH, "--fit", str(patched / FILE)]
    again = finish(tiny_llama, tmp_path, "directions", *flags)
    (name,) = set(read(again, TABLE)["method"])
    assert re.fullmatch(re.escape(FILE) + " [0-9a-f]{8}", name), "which file of that name"
    before, after = read(patched, EFFECTS), read(again, EFFECTS)
    assert (before["mean"] - after["mean"]).abs().max() < 1e-9
    assert "6 samples left out: the directions of" in (again / "run.log").read_text()
    fitted_table, loaded_table = read(patched, TABLE), read(again, TABLE)
    same = ["auc", "norm", "along_mean", "random_mean", "whole_mean"]
    assert (fitted_table[same] - loaded_table[same]).abs().max(axis=None) < 1e-9
    assert loaded_table["accuracy"].isna().all()
    assert not (again / FILE).exists()
    fitted = {pair[0].sample.prompt_a for pair in data_of(tiny_llama, *PATCH).fitting}
    others = ["--num_samples 20 --seed 3", "--system_prompt=", "--answer_prefix I", "--no-chat"]
    for more in others:
        data = data_of(tiny_llama, *flags, *more.split())
        assert data.measured
        assert not fitted & {pair[0].sample.prompt_a for pair in data.measured}
        assert not data.fitting


def test_a_sentence_with_other_words_is_left_out_as_well(tiny_llama: str, tmp_path: Path) -> None:
    """Suppression asks the same questions with other words of another seed."""
    flags = [*PATCH, "--task", "suppression", "--layers", "1", "--num_samples", "4"]
    path = str(finish(tiny_llama, tmp_path, "directions", *flags) / FILE)
    fitted = {pair[0].sample.prompt_b for pair in data_of(tiny_llama, *flags).fitting}
    data = data_of(tiny_llama, *flags, "--fit", path, "--num_samples", "30", "--seed", "1")
    assert data.measured
    assert not fitted & {pair[0].sample.prompt_b for pair in data.measured}


# ----- what no file of directions is


def no_file(metadata: Any = None, **tensors: Tensor) -> Callable[[Path], None]:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata or {})
    return lambda path: save_file(tensors, path, metadata={"told": text})


def cut(path: Path) -> None:
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:-9])


def header(text: str, size: int) -> Callable[[Path], Any]:
    """A file of a header as it stands, and of so many bytes of tensors."""
    length = len(text).to_bytes(8, "little")
    return lambda path: path.write_bytes(length + text.encode() + bytes(size))


def typed(dtype: str) -> Callable[[Path], None]:
    return no_file(**{label: d.to(getattr(torch, dtype)) for label, d in GOOD.items()})


GOOD = {f"L{i}resid": torch.ones(48) for i in range(3)}
NONE, LACKS = "d.safetensors is no file of directions: ", "has no direction of L0resid"
CUT = f"{NONE}it is no whole safetensors file ("
OTHER_WIDTH = "holds {} numbers, and the residual stream of this model is 48 wide"
NO_NUMBERS = "is no 48 finite numbers: "
UNKNOWN = '{"L0resid":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'
HALF_BYTES = '{"L0resid":{"dtype":"F4","shape":[96],"data_offsets":[0,48]}}'
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, f"{NONE}No such file or directory"),
    "folder": (Path.mkdir, f"{NONE}it is a folder or a device"),
    "text": (lambda path: path.write_text("L0resid"), CUT),
    "empty": (lambda path: path.write_text(""), CUT),
    "cut": (cut, CUT),
    "no header": (header("{nope", 0), CUT),
    "a dtype of nobody": (header(UNKNOWN, 4), CUT),
    "half bytes": (header(HALF_BYTES, 48), f"L0resid {NO_NUMBERS}[48] of float4_e2m1fn_x2"),
    "weights": (no_file(**{"model.norm.weight": torch.ones(3)}), "'model.norm.weight' is no comp"),
    "other digits": (no_file(**GOOD, **{"L١resid": torch.ones(48)}), "'L١resid' is no component"),
    "a control character": (no_file(**{"L\x1bX": torch.ones(48)}), "'L\\x1bX' is no component"),
    "a long name": (no_file(**{"q" * 5000: torch.ones(48)}), "qqq' is no component"),
    "one twice": (
        no_file(**GOOD, **{"L00resid": torch.zeros(48)}),
        f"{NONE}component 'L0resid' occurs twice",
    ),
    "nothing": (no_file(), LACKS),
    "no layer 1": (no_file(L0resid=torch.ones(48), L2resid=torch.ones(48)), "of L1resid"),
    "of heads": (no_file(L0H0=torch.ones(16)), LACKS),
    "wide": (
        no_file(**GOOD | {"L1resid": torch.ones(49)}),
        f"L1resid {NO_NUMBERS}[49] of float32",
    ),
    "two": (
        no_file(**GOOD | {"L1resid": torch.ones(48, 1)}),
        f"L1resid {NO_NUMBERS}[48, 1] of float32",
    ),
    "a number": (
        no_file(**GOOD | {"L1resid": torch.tensor(1.0)}),
        f"L1resid {NO_NUMBERS}[] of float32",
    ),
    "whole numbers": (typed("int64"), f"L0resid {NO_NUMBERS}[48] of int64"),
    "true and false": (typed("bool"), f"L0resid {NO_NUMBERS}[48] of bool"),
    "complex": (typed("complex64"), f"L0resid {NO_NUMBERS}[48] of complex64"),
    "NaN": (
        no_file(**GOOD | {"L2resid": torch.full((48,), math.nan)}),
        f"L2resid {NO_NUMBERS}[48] of float32, norm nan",
    ),
    "infinite": (
        no_file(**GOOD | {"L0resid": torch.full((48,), math.inf)}),
        f"L0resid {NO_NUMBERS}[48] of float32, norm inf",
    ),
    "another model's": (no_file({"model": "other"}, **GOOD), "that file is of model other, not "),
    "broken": (no_file("{", **GOOD), f"{NONE}not JSON at its end (Expecting property name"),
    "no text": (no_file(" ", **GOOD), f"{NONE}not JSON at its end (Expecting value)"),
    "a list": (no_file("[]", **GOOD), f"{NONE}what it tells of itself is no object but []"),
    "deep": (no_file('{"a":' * 5000, **GOOD), f"{NONE}brackets are nested too deeply"),
    "a field twice": (
        no_file('{"model": "a", "model": "b"}', **GOOD),
        f"{NONE}field 'model' occurs twice",
    ),
    "fitted on a number": (
        no_file({"fitted_on": 5}, **GOOD),
        f"{NONE}its fitted_on is no list but 5",
    ),
    "fitted on numbers": (
        no_file({"fitted_on": ["a", 5]}, **GOOD),
        f"{NONE}its fitted_on holds 5, which is no text",
    ),
    "of a model of numbers": (
        no_file({"model": [5]}, **GOOD),
        f"{NONE}its model is no text but [5]",
    ),
    "another format": (
        no_file({"format": "directions/2"}, **GOOD),
        f'{NONE}its format is "directions/2", not "directions/1"',
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("no_weights")
def test_other_files_are_refused(name: str, llama: str, tmp_path: Path, answer: Answer) -> None:
    write, sentence = BAD[name]
    write(tmp_path / "d.safetensors")
    argv = command_line(llama, tmp_path / "x", "directions", "--kind", "resid", "--op", "patch")
    refuses(answer, *argv, "--fit", str(tmp_path / "d.safetensors"), says=["--fit", sentence])


def test_what_no_component_needs_of_a_file_does_not_matter(llama: str, tmp_path: Path) -> None:
    tensors = {"L1resid": torch.ones(48), "L2resid": torch.ones(48).long(), "L0H0": torch.ones(2)}
    save_file(tensors, tmp_path / "d.safetensors")
    words = ["--kind", "resid", "--op", "patch", "--fit", str(tmp_path / "d.safetensors")]
    data = data_of(llama, *words, "--layers", "1")
    assert data.vectors[Component(1, "resid")].dtype == torch.float64


ALL_IS_FOR = "--confirm all is for --kind resid --op zero at all positions"
ALL = "--kind resid --confirm all"
MEANINGLESS = {
    "--kind neuron": "each of which has one only",
    "--method atp": "--method is an option of the command trace, not of directions",
    "--multipliers 0,1": "--multipliers scale components or directions in replies: give",
    "--multipliers 0,1 --max_new_tokens 2 --op mean": "not with --op mean",
    "--multipliers 0,1 --max_new_tokens 2 --positions last": "not at --positions last",
    "--multipliers 0,1 --max_new_tokens 2": "for one direction, and 12 are found",
    "--steer_at reply": "--steer_at reply is where --multipliers apply: give these",
    "--confirm all": ALL_IS_FOR,
    f"{ALL} --positions last": ALL_IS_FOR,
    f"{ALL} --op patch": ALL_IS_FOR,
    "--fit=": "the value is empty",
    "--kind resid --num_samples 1": "of 1 sentence 0 are left to measure, at least 1",
    "--kind resid --num_samples 3 --confirm 1": "3 sentences 1 are left to measure, at least 2",
}


@pytest.mark.parametrize("words", MEANINGLESS)
@pytest.mark.usefixtures("no_weights")
def test_what_means_nothing_is_refused(
    words: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    argv = command_line(llama, tmp_path / "x", "directions", *words.split())
    refuses(answer, *argv, says=[MEANINGLESS[words]])


# ----- a folder that holds more; resumed, shared between processes


def test_directions_go_on_from_the_trace_of_their_folder(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    words = "--task refusal --num_samples 4 --kind resid --op patch --patch_into b --given L0H1"
    finish(llama, tmp_path, *words.split())
    code, out, err = answer("directions", "--output_dir", str(tmp_path))
    assert code == 0, err
    edit = "--kind resid, --op patch, --patch_into b, --given L0H1"
    assert f"{edit} from the trace in {tmp_path}" in out.splitlines()[0]
    assert set(read(tmp_path, TABLE)["op"]) == {"patch into b along difference"}


def test_directions_of_one_fit_are_not_those_of_another(llama: str, tmp_path: Path) -> None:
    """In one folder, where sets of the same components and samples are edited along both."""
    words = "--task refusal --num_samples 6 --no-bf16 --kind resid --op patch --confirm 1"
    words += " --num_random 1"
    both = finish(llama, tmp_path / "both", "directions", *words.split())
    finish(llama, both, "directions", *words.split(), "--fit", "logistic")
    alone = tmp_path / "alone"
    finish(llama, alone, "directions", *words.split(), "--fit", "logistic")
    for name in (TABLE, EFFECTS, FILE, CONFIRM):
        assert (both / name).read_bytes() == (alone / name).read_bytes(), name


EXACT = [TABLE, EFFECTS, FILE, CONFIRM, REPLIES]
SMALL = "--task refusal --num_samples 6 --no-bf16 --kind resid --op zero --fit logistic"
SMALL += " --confirm all --num_random 2 --max_new_tokens 3"


@pytest.fixture(scope="module")
def small(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("small"), "directions", *SMALL.split())


@pytest.mark.parametrize("function", ["run_variants", "read_divergence", "read_reply_divergence"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    function: str, small: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Interrupted at its effects, at its joint sets, and at replies that are read with them."""
    argv = command_line(llama, tmp_path, "directions", *SMALL.split())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracing, function, stop)
        assert tracing.main(argv) == 130
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "probe", lambda *_: pytest.fail("directions were sought again"))
        assert tracing.main(argv) == 0
    for name in EXACT:
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name


def test_two_processes_give_the_same_bytes(small: Path, llama: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = command_line(llama, tmp_path, "directions", *SMALL.split())
    command = [sys.executable, *launcher, str(SCRIPT), *argv]
    done = subprocess.run(
        command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    for name in EXACT:
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name


def test_the_confirmation_is_of_the_held_out_sentences(small: Path, llama: str) -> None:
    data, rows = data_of(llama, *SMALL.split()), read(small, CONFIRM)
    assert set(rows["n_sentences"]) == {len(units_of(data.measured))}
    assert not units_of(data.measured) & units_of(data.fitting)
    assert rows["set"].tolist() == ["none", "chosen", "random", "random"]
    assert rows["components"].iloc[1].endswith("resid everywhere")
    edited = {reply["sample_id"] for reply in replies_of(small) if reply["n_ablated"]}
    assert edited == ids_of(data.measured)
    sentence = f"{len(data.fitting)} samples set apart"
    assert (small / "run.log").read_text().count(sentence) == 2


# ----- beside the other options


BESIDE = [
    "--task suppression --controls --kind resid --op zero --fit difference --confirm all",
    "--kind attn --op mean --positions last --fit logistic --given L1attn --confirm 1",
    "--kind mlp --op add --fit difference --bf16 --layers 1",
    "--kind resid --op zero --fit difference --confirm all --bf16 --max_new_tokens 2",
    "--task refusal --kind head --op patch --fit difference --confirm mass:0.5 --heads 0-2",
]


@pytest.mark.parametrize("words", BESIDE)
def test_with_other_options_nothing_is_missing(words: str, llama: str, tmp_path: Path) -> None:
    """Of L0resid, where all prompts end alike, there is no direction."""
    common = ["--num_samples", "6"]
    common += ["--num_random", "1"] if "--confirm" in words else []
    common += [] if "bf16" in words else ["--no-bf16"]
    folder = finish(llama, tmp_path, "directions", *words.split(), *common)
    effects, table = read(folder, EFFECTS), read(folder, TABLE)
    log = (folder / "run.log").read_text()
    assert not effects[["mean", "moved_a", "moved_b", "above_noise"]].isna().any(axis=None)
    swept = table[table["along_mean"].notna()]
    assert set(swept["label"]) == set(effects["label"])
    has_whole = "resid --op zero" not in words and "--op add" not in words
    assert ("whole_mean" in table) == has_whole
    numbers = [*NUMBERS, "norm", "accuracy", "auc", "accuracy_shuffled"]
    assert not swept[numbers + ["whole_mean"] * has_whole].isna().any(axis=None)
    is_clear = "its interval covers 0" not in log
    for way in ("along", "random"):
        for end in SHARE:
            assert (swept[f"{way}_share_{end}"].isna() == (not is_clear)).all()
    assert "nan" not in log
    lexical = table.set_index("label").loc["L0resid", ["accuracy", "auc", "norm"]]
    assert lexical.tolist() == [0.5, 0.5, 0]
    still = swept.loc[swept["norm"] == 0, ["along_mean", "random_mean"]]
    rounding = 0.01 if "--bf16" in words else CLOSE
    assert (still.abs() < rounding).all(axis=None)
    directions = load_file(folder / FILE)
    assert all(d.isfinite().all() for d in directions.values())
    assert len(directions) == 3 * (4 if "--kind head" in words else 1)
    no_direction = "L1attn" * ("--given" in words) or "L0resid" * ("resid" in words)
    assert " ".join(name for name, d in directions.items() if not d.any()) == no_direction
    if "--controls" in words:
        assert not effects["minus_other_mean"].isna().any()
    if "chooses no direction" in log:
        assert "--confirm all" in words  # no layer moves a random model against its sign
    elif "--confirm" in words:
        rows = read(folder, CONFIRM)
        assert not rows[["mean_delta", "kl_a", "kl_b"]].isna().any(axis=None)
        base = rows.iloc[0]
        if not (base["ci_low"] > 0 or base["ci_high"] < 0):
            assert rows["share_removed"].isna().all()
        assert {"none", "chosen", "random"} <= set(rows["set"])


def test_negative_controls_give_no_direction(tiny_llama: str, tmp_path: Path) -> None:
    words = "--task odd_one_out --num_samples 20 --no-bf16 --kind attn --op patch --layers 0-1"
    data = data_of(tiny_llama, *words.split())
    assert all(pair[0].sample.is_evidence for pair in data.fitting)
    assert len(data.measured) - len(data.tested) == 4
    folder = finish(tiny_llama, tmp_path, "directions", *words.split())
    table, effects = read(folder, TABLE).set_index("label"), read(folder, EFFECTS)
    assert set(table["n_sentences"]) == {len(units_of(data.tested))}
    assert set(effects["n_samples"]) == {len(data.tested)}
    trace = read(finish(tiny_llama, tmp_path / "trace", *words.split()))
    real = trace[trace["sample_id"].isin(ids_of(data.tested))]
    for layer in (0, 1):
        mean = real[real["layer"] == layer]["head_effect"].mean()
        assert table.loc[f"L{layer}attn", "whole_mean"] == pytest.approx(mean, abs=CLOSE)
    fitted = by_plain_forwards(tiny_llama, data.fitting, 1, "attn")
    tested = by_plain_forwards(tiny_llama, data.tested, 1, "attn")
    assert table.loc["L1attn", "accuracy"] == pytest.approx(correct(tested, *fitted.mean(0)))


def test_logistic_directions_are_of_the_sentences_set_apart(small: Path, llama: str) -> None:
    data, directions = data_of(llama, *SMALL.split()), load_file(small / FILE)
    shuffled = read(small, TABLE).set_index("label")["accuracy_shuffled"]
    units, tested_units = (
        [pair[0].sample.unit for pair in prompts] for prompts in (data.fitting, data.tested)
    )
    find = tracing.logistic_normal
    for layer in (1, 2):
        fitted = torch.tensor(by_plain_forwards(llama, data.fitting, layer))[None]
        tested = torch.tensor(by_plain_forwards(llama, data.measured, layer))[None]
        direction = find(fitted).directions[0]
        assert torch.cosine_similarity(directions[f"L{layer}resid"], direction, dim=0) > 0.9999
        chance = tracing.chance_accuracy(find, fitted, tested, units, tested_units, 42)
        assert shuffled[f"L{layer}resid"] == pytest.approx(float(chance))
    with safe_open(small / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["told"])
    assert metadata["model"] == record_of(small)["experiment"]["fingerprint"]["model"]
    assert (metadata["fit"], metadata["kind"]) == ("logistic", "resid")
    assert metadata["task"] == "refusal"
    assert len(metadata["fitted_on"]) == 2 * len(data.fitting)


def test_a_file_in_the_runs_own_folder_outlives_it(
    patched: Path, tiny_llama: str, tmp_path: Path
) -> None:
    """It may be this run's input; --overwrite deletes this script's files only."""
    own = tmp_path / "x <b onmouseover=1>bold<!--.safetensors"
    shutil.copy(patched / FILE, own)
    words = ["directions", *PATCH, "--fit", str(own)]
    folder = finish(tiny_llama, tmp_path, *words)
    page = (folder / "circuit_report.html").read_text()
    assert "<!--" not in page and "<b on" not in page
    assert "x &lt;b onmouseover=1&gt;bold&lt;!--" in page
    finish(tiny_llama, tmp_path, *words, "--overwrite")
    assert own.read_bytes() == (patched / FILE).read_bytes()


def test_directions_of_the_folder_itself_are_an_input_that_overwriting_would_delete(
    patched: Path, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    folder = Path(shutil.copytree(patched, tmp_path / "run"))
    argv = command_line(tiny_llama, folder, "directions", *PATCH)
    argv += ["--fit", str(folder / FILE), "--overwrite"]
    refuses(answer, *argv, says=[f"--fit {folder / FILE} "])
    assert (folder / FILE).read_bytes() == (patched / FILE).read_bytes()


def test_what_is_added_is_never_called_damage(tiny_llama: str, tmp_path: Path) -> None:
    """It is to move what prompt b leaves."""
    for op, judged in (("add", False), ("zero", True)):
        words = ["directions", *PATCH, "--op", op, "--confirm", "1", "--layers", "1"]
        words += ["--task", "suppression", "--num_samples", "20"]  # of which 5 sentences confirm
        rows = read(finish(tiny_llama, tmp_path / op, *words), CONFIRM)
        chosen = rows[rows["set"] == "chosen"]
        assert (chosen["damage"] != "not judged").all() == judged
        drawn = rows[rows["set"] == "random"]
        assert len(drawn) == 20 and set(drawn["components"]) == {"L1resid"}
        assert drawn["mean_delta"].nunique() == 20


def test_where_no_layer_has_a_direction_none_is_chosen(tiny_llama: str, tmp_path: Path) -> None:
    """Into layer 0 the last tokens of both prompts are the same."""
    words = ["directions", *PATCH, "--op", "zero", "--confirm", "all", "--layers", "0"]
    folder = finish(tiny_llama, tmp_path, *words)
    assert "--confirm all chooses no direction" in (folder / "run.log").read_text()
    assert not (folder / CONFIRM).exists()


# ----- one direction that others have written, in a file that does not tell its layer

ONE = "--num_samples 6 --no-bf16 --kind resid --layers 1"


def stack_of_differences(model: str) -> Tensor:
    """[position, layer, width] as the code of Arditi et al. has it: the mean of the stream that
    enters each block after prompts a, less that after prompts b."""
    prompts = data_of(model, *ONE.split()).experiment.prompts
    n_layers = len(naive.layers_of(naive.load(model)[0]))
    layers = [by_plain_forwards(model, prompts, layer).mean(0) for layer in range(n_layers)]
    differences = torch.tensor(np.array([a - b for a, b in layers]))
    return torch.stack([torch.zeros_like(differences), differences])


def write_torch(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def written_by_others(stack: Tensor) -> dict[str, Callable[[Path], Any]]:
    """By file name ways to write the direction of layer 1 alone."""
    own = stack[1, 1].clone()
    return {
        "direction.pt": write_torch(stack[1, 1]),  # of a larger storage, as theirs
        "row.pt": write_torch(own[None]),
        "dict.pth": write_torch({"direction": own, "layer": 1, "position": -1}),
        "old.pt": write_torch(own, _use_new_zipfile_serialization=False),
        "parameter.pt": write_torch(torch.nn.Parameter(own)),
        "strided.pt": write_torch(torch.stack([own, own], 1)[:, 0]),
        "one.safetensors": lambda path: save_file({"refusal": own}, path),
        "row.safetensors": lambda path: save_file({"d": own[None]}, path, metadata={"a": "b"}),
    }


@pytest.fixture(scope="module")
def of_others(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of their files, and of one of ours that tells nothing and has the same direction."""
    folder = tmp_path_factory.mktemp("others")
    stack = stack_of_differences(llama)
    for name, write in written_by_others(stack).items():
        write(folder / name)
    save_file({f"L{i}resid": stack[1, i].clone() for i in range(3)}, folder / "own.safetensors")
    return folder


@pytest.fixture(scope="module")
def with_own_file(llama: str, of_others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["directions", *ONE.split(), "--fit", str(of_others / "own.safetensors")]
    return finish(llama, tmp_path_factory.mktemp("own"), *words)


@pytest.mark.parametrize("name", written_by_others(torch.zeros(2, 3, 48)))
def test_a_direction_of_others_gives_the_effects_of_a_file_of_ours(
    name: str, of_others: Path, with_own_file: Path, llama: str, tmp_path: Path
) -> None:
    path = of_others / name
    folder = finish(llama, tmp_path, "directions", *ONE.split(), "--fit", str(path))
    table, own_table = read(folder, TABLE), read(with_own_file, TABLE)
    (method,) = set(table["method"])
    assert re.fullmatch(re.escape(name) + " [0-9a-f]{8}", method)
    columns = ["method", "op"]
    assert table.drop(columns=columns).equals(own_table.drop(columns=columns))
    assert read(folder, EFFECTS).equals(read(with_own_file, EFFECTS))
    assert not (folder / FILE).exists()
    sentence = f"--fit {path} does not tell its model nor the texts that it was fitted on"
    assert sentence in (folder / "run.log").read_text()
    assert "left out:" not in (folder / "run.log").read_text()
    assert sentence.split("/")[0] not in (with_own_file / "run.log").read_text()


def test_zeroed_it_is_taken_from_the_stream_that_enters_the_block(
    of_others: Path, llama: str, tmp_path: Path
) -> None:
    """By a plain hook before the block, in full forwards."""
    path = of_others / "direction.pt"
    words = ["directions", *ONE.split(), "--op", "zero", "--fit", str(path)]
    folder = finish(llama, tmp_path, *words)
    model, tokenizer = naive.load(llama)
    unit = torch.load(path, weights_only=True).float()
    unit = unit / unit.norm()

    def taken_out(x: Tensor) -> Tensor:
        return x - (x @ unit)[..., None] * unit

    def edit(ids: list[int], tail: list[int]) -> AbstractContextManager[None]:
        return naive.hooked(naive.module_of(model, 1, "resid"), taken_out)

    effects = []
    for pair in data_of(llama, *ONE.split()).experiment.prompts:
        sample, deltas = pair[0].sample, []
        for edited in (None, edit):
            a, b = (
                naive.suppression_score(model, tokenizer, text, sample.targets, edited)
                for text in (sample.prompt_a, sample.prompt_b)
            )
            deltas.append(a - b)
        effects.append(deltas[1] - deltas[0])
    (row,) = read(folder, EFFECTS).to_dict("records")
    assert row["label"] == "L1resid"
    assert row["n_samples"] == 6
    assert row["mean"] == pytest.approx(sum(effects) / len(effects), abs=CLOSE)
    assert abs(row["mean"]) > 100 * CLOSE


def test_it_is_confirmed_beside_random_directions(
    of_others: Path, llama: str, tmp_path: Path
) -> None:
    """All of the kind cannot be edited, where one direction is known; the effect on the held-out
    sentences is that of the direction alone."""
    path = of_others / "direction.pt"
    words = [*ONE.split(), "--fit", str(path), "--op", "add", "--positions", "last"]
    words += ["--confirm", "1", "--num_random", "3"]
    folder = finish(llama, tmp_path, "directions", *words)
    rows = read(folder, CONFIRM)
    rows = rows[rows["measure"] == "a - b"]
    assert rows["set"].tolist() == ["none", "chosen", "random", "random", "random"]
    assert rows["faithfulness"].isna().all()
    assert rows.iloc[1]["components"] == "L1resid"
    assert rows["mean_delta"].nunique() == 5
    own = ["--fit", str(of_others / "own.safetensors")]
    again = finish(llama, tmp_path / "own", "directions", *words, *own)
    own_rows = read(again, CONFIRM)
    own_rows = own_rows[own_rows["set"] == "chosen"]
    assert own_rows["mean_delta"].tolist() == [rows.iloc[1]["mean_delta"]]


def test_it_is_zeroed_everywhere(of_others: Path, llama: str, tmp_path: Path) -> None:
    path = str(of_others / "direction.pt")
    words = [*ONE.split(), "--op", "zero", "--confirm", "all", "--num_random", "2", "--fit"]
    folder = finish(llama, tmp_path / "a", "directions", *words, path)
    own = finish(llama, tmp_path / "b", "directions", *words, str(of_others / "own.safetensors"))
    logs = [(run / "run.log").read_text() for run in (folder, own)]
    lines = [line for line in logs[0].splitlines() if line.startswith("L1resid everywhere")]
    assert len(lines) == 1 and lines[0] in logs[1]
    assert (folder / CONFIRM).exists() == (own / CONFIRM).exists()


class Code:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_code(path: Path) -> None:
    torch.save({"direction": torch.ones(48), "code": Code(path.parent / "ran")}, path)


def cut_torch(path: Path) -> None:
    torch.save(torch.ones(48), path)
    path.write_bytes(path.read_bytes()[:-30])


UNREAD = "torch.load reads no plain tensors from it (with weights_only=True, since a file's code is"
STACK = "it holds a stack of directions, {}: pick one, such as that of a position and a layer"
BAD_LONE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.pt": (lambda path: None, "is no file of directions: No such file or directory"),
    "folder.pt": (Path.mkdir, "it is a folder or a device"),
    "empty.pt": (Path.touch, UNREAD),
    "text.pt": (lambda path: path.write_text("L0resid"), UNREAD),
    "cut.pt": (cut_torch, UNREAD),
    "code.pt": (write_code, UNREAD),
    "numpy.pt": (write_torch(np.ones(48)), UNREAD),
    "model.pt": (write_torch(torch.nn.Linear(2, 2)), UNREAD),
    "safetensors.pt": (lambda path: save_file({"d": torch.ones(48)}, path), UNREAD),
    "mean_diffs.pt": (write_torch(torch.ones(5, 3, 48)), STACK.format("[5, 3, 48]")),
    "layers.pt": (write_torch(torch.ones(3, 48)), STACK.format("[3, 48]")),
    "column.pt": (write_torch(torch.ones(48, 1)), STACK.format("[48, 1]")),
    "two.pt": (write_torch({"a": torch.ones(48), "b": torch.ones(48)}), "it holds 2 tensors: pick"),
    "number.pt": (write_torch(3.5), "it holds no tensor"),
    "list.pt": (write_torch([torch.ones(48)]), "it holds no tensor"),
    "nothing.pt": (write_torch({}), "it holds no tensor"),
    "sparse.pt": (write_torch(torch.ones(48).to_sparse()), "its tensor is sparse"),
    "meta.pt": (write_torch(torch.ones(48, device="meta")), "or has no numbers"),
    "wide.pt": (write_torch(torch.ones(49)), OTHER_WIDTH.format(49)),
    "wide_row.pt": (write_torch(torch.ones(1, 49)), OTHER_WIDTH.format(49)),
    "scalar.pt": (write_torch(torch.tensor(1.0)), OTHER_WIDTH.format(1)),
    "whole.pt": (write_torch(torch.ones(48).long()), f"L1resid {NO_NUMBERS}[48] of int64"),
    "complex.pt": (write_torch(torch.ones(48) * 1j), f"L1resid {NO_NUMBERS}[48] of complex64"),
    "zeros.pt": (write_torch(torch.zeros(48)), "holds a direction that is all zeros"),
    "nan.pt": (write_torch(torch.full((48,), math.nan)), f"{NO_NUMBERS}[48] of float32, norm nan"),
    "two.safetensors": (
        lambda path: save_file({"a": torch.ones(48), "b": torch.ones(48)}, path),
        "it holds 2 tensors: pick",
    ),
    "none.safetensors": (lambda path: save_file({}, path), "it holds no tensor"),
    "stack.safetensors": (
        lambda path: save_file({"a": torch.ones(5, 3, 48)}, path),
        STACK.format("[5, 3, 48]"),
    ),
    "wide.safetensors": (
        lambda path: save_file({"a": torch.ones(49)}, path),
        OTHER_WIDTH.format(49),
    ),
}


@pytest.mark.parametrize("name", BAD_LONE)
@pytest.mark.usefixtures("no_weights")
def test_other_files_of_one_direction_are_refused(
    name: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    """With a sentence that names the file, and no code of it is run."""
    write, sentence = BAD_LONE[name]
    write(tmp_path / name)
    argv = command_line(llama, tmp_path / "x", "directions", *ONE.split())
    argv += ["--fit", str(tmp_path / name)]
    refuses(answer, *argv, says=["--fit", name, sentence])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", ["--kind mlp --layers 1", "--kind resid", "--kind head"])
@pytest.mark.usefixtures("no_weights")
def test_a_direction_without_a_layer_needs_one(
    words: str, of_others: Path, llama: str, tmp_path: Path, answer: Answer
) -> None:
    for name in ("direction.pt", "one.safetensors"):
        argv = command_line(llama, tmp_path / "x", "directions", *words.split(), "--op", "patch")
        says = [f"{name} holds one direction and does not tell its layer: give --kind resid and"]
        refuses(answer, *argv, "--fit", str(of_others / name), says=says)


@pytest.mark.usefixtures("no_weights")
def test_inspect_takes_no_direction_without_a_layer(
    of_others: Path, llama: str, tmp_path: Path, answer: Answer
) -> None:
    path = of_others / "direction.pt"
    argv = command_line(llama, tmp_path / "x", "inspect", "L1H0", "--directions", str(path))
    says = [f"--directions {path} holds one direction and does not tell its layer: inspect takes"]
    refuses(answer, *argv, says=says)

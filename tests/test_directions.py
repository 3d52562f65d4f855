"""Directions: fits on data whose answer is known, edits along one, the ablation of a paper with its
own hooks, and the tables of the command by hand."""

from __future__ import annotations

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
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import llama3_circuit_tracing as tracing
import naive
import random_models
from by_hand import prepared
from conftest import (
    HANGS,
    ROOT,
    SCRIPT,
    Answer,
    finish,
    generations,
    read,
    record_of,
    refuses,
    write_samples,
)
from llama3_circuit_tracing import Component, Edit, Experiment, JointSet
from test_interventions import Bench, assert_like_the_oracle, bench

CLOSE = 2e-5  # nats, in float32
TABLE, FILE = "circuit_directions.csv", "directions.safetensors"
FITS = {"difference": tracing.difference_of_means, "logistic": tracing.logistic}
PRE_NORM = [name for name in random_models.ARCHITECTURES if name != "gemma3_text"]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")
Build = Callable[..., str]


def gaussians(n: int, apart: float, width: int = 8, count: int = 1, seed: int = 0) -> Any:
    """Inputs [component, sample, side, width] of SD 1, and from the mean of b to that of a."""
    rng = np.random.default_rng(seed)
    of_b, d = np.random.default_rng(99).normal(size=(2, count, 1, width))
    d *= apart / np.linalg.norm(d, axis=-1, keepdims=True)
    x = rng.normal(size=(count, n, 2, width)) + 3 * of_b[:, None]
    x[:, :, 0] += d
    return torch.tensor(x), torch.tensor(d[:, 0])


# ----- fits


@pytest.mark.parametrize("method", FITS)
def test_the_direction_between_two_gaussians_is_found(method: str) -> None:
    """A linear rule can be right in Phi(distance / 2 SD) of new cases, and no more."""
    x, d = gaussians(1500, 1.5, count=2)
    found, threshold = FITS[method](x)
    assert torch.cosine_similarity(found, d).min() > 0.985
    assert (found - d).norm(dim=1).max() < 0.25
    accuracy, auc = tracing.separation((found, threshold), gaussians(1500, 1.5, count=2, seed=1)[0])
    assert (accuracy - NormalDist().cdf(1.5 / 2)).abs().max() < 0.02
    assert (auc - NormalDist().cdf(1.5 / math.sqrt(2))).abs().max() < 0.02


@pytest.mark.parametrize("method", FITS)
def test_added_once_a_direction_moves_the_mean_of_b_to_that_of_a_along_it(method: str) -> None:
    x, _ = gaussians(16, 2.0, count=5)
    found = FITS[method](x)[0]
    a, b = x.mean(1).unbind(1)
    assert (((b + found) * found).sum(1) - (a * found).sum(1)).abs().max() < 1e-9


@pytest.mark.parametrize(("count", "n", "width"), [(40, 16, 24), (1, 16, 4096), (64, 3, 16)])
def test_logistic_is_where_the_gradient_of_its_loss_is_zero(count: int, n: int, width: int) -> None:
    """With w = k * d * SD for some k > 0: w = sum of y sigma(-y m) z, and no bias is better. The
    penalty makes the Hessian at least 1, so w is as near its optimum as the gradient is small."""
    x = gaussians(n, 1.0, width, count)[0] * torch.linspace(0.01, 100, width).double()
    for flat, d, threshold in zip(x.numpy(), *map(Tensor.numpy, tracing.logistic(x)), strict=True):
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
    for flat, d in zip(x.numpy().reshape(4, 32, 200), tracing.logistic(x)[0].numpy(), strict=True):
        model = sklearn.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
        model.fit((flat - flat.mean(0)) / flat.std(0), np.tile([1, 0], 16))
        normal = model.coef_[0] / flat.std(0)
        assert normal @ d / np.linalg.norm(normal) / np.linalg.norm(d) > 0.9999


@pytest.mark.parametrize("method", FITS)
def test_what_is_the_same_on_both_sides_has_no_direction(method: str) -> None:
    x = torch.full((1, 4, 2, 6), 0.1).double()
    found = FITS[method](torch.cat([x, gaussians(4, 1.0, 6)[0]]))
    assert found[0].isfinite().all()
    assert not found[0][0].any()
    assert found[0][1].any()
    accuracy, auc = tracing.separation(found, torch.cat([x, x]))
    assert accuracy[0] == auc[0] == auc[1] == 0.5
    assert not tracing.unit(found[0][0]).any()


def test_accuracy_and_area_of_a_few_numbers() -> None:
    """Right: 2, 3 and 1 of a, 0 and -1 of b; what lies on the threshold is half right."""
    x = torch.tensor([[3.0, -1.0], [2.0, 0.0], [1.0, 2.0], [0.5, 0.5]]).double()[None, :, :, None]
    accuracy, auc = tracing.separation((torch.ones(1, 1).double(), torch.tensor([0.5])), x)
    assert float(accuracy) == (3 + 2 + 2 * 0.5) / 8
    assert float(auc) == (4 + 3.5 + 3 + 2.5) / 16


@pytest.mark.parametrize("method", FITS)
def test_fits_to_shuffled_sides_are_right_half_of_the_time(method: str) -> None:
    """Of sides that are easily told apart: they change places sentence by sentence."""
    given, tested = (gaussians(32, 3.0, 6, 12, seed)[0] for seed in (0, 1))
    chance = []
    for draw in range(tracing.N_SHUFFLES):
        rng, x = random.Random(f"7 shuffle {draw}"), given.clone()
        for two in (slice(i, i + 2) for i in range(0, 32, 2)):
            x[:, two] = x[:, two].flip(2) if rng.random() < 0.5 else x[:, two]
        chance.append(tracing.separation(FITS[method](x), tested)[0])
    assert abs(float(torch.stack(chance).mean()) - 0.5) < 0.06
    units = [f"u{i // 2:02}" for i in range(32)]
    found = tracing.accuracy_by_chance(FITS[method], given, tested, units, 7)
    assert (found - torch.stack(chance).quantile(0.95, 0)).abs().max() < 1e-12


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


def random_file(of: Bench, kind: str) -> str:
    """A random direction of each component of a kind, in a file beside the model."""
    shape, found = of.traced.shape, {}
    for c in (Component(n, kind, i) for n in range(shape.n_layers) for i in shape.indices(kind)):
        width = len(range(shape.width(c.site[1]))[shape.columns(c)])
        generator = torch.Generator().manual_seed(len(found))
        found[c.label] = torch.randn(width, generator=generator).double()
    path = str(Path(of.folder, FILE))
    save_file(found, path)
    return path


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


def like_the_oracle(of: Bench, flags: str, monkeypatch: Patch) -> None:
    path = random_file(of, flags.split()[1])
    flags += f" --along {path}"
    (c,) = of.experiment(flags).components
    span = naive.span_of(of.loaded[0], c.layer, c.kind, c.index)
    only_along(monkeypatch, load_file(path)[c.label], span, "--op add" in flags)
    assert_like_the_oracle(of, flags)


@pytest.mark.parametrize("flags", ALONG)
def test_a_plain_hook_gives_the_same_numbers(plain: Bench, flags: str, monkeypatch: Patch) -> None:
    like_the_oracle(plain, flags, monkeypatch)


@pytest.mark.parametrize("flags", [ALONG[0], ALONG[6]])
def test_and_with_other_architectures(any_bench: Bench, flags: str, monkeypatch: Patch) -> None:
    like_the_oracle(any_bench, flags, monkeypatch)


def rows_of(exp: Experiment) -> tuple[tracing.CleanRun, list[Edit]]:
    """The unedited run of the first tree, and the edit of each component."""
    sites = [component.site for component in exp.components]
    clean = tracing.run_clean(exp.traced, exp.trees[0], (), range(exp.shape.n_layers), sites)
    return clean, [exp.edits([component], clean)[0] for component in exp.components]


@pytest.mark.parametrize("op", ["patch", "scale --factor -3"])
@pytest.mark.parametrize("kind", ["head --heads 2", "mlp", "resid"])
def test_all_of_a_basis_together_are_the_whole_edit(any_bench: Bench, kind: str, op: str) -> None:
    path, flags = random_file(any_bench, kind.split()[0]), f"--kind {kind} --layers 1 --op {op}"
    exp = any_bench.experiment(f"{flags} --along {path}")
    clean, (edit,) = rows_of(exp)
    whole, x = replace(edit, along=None), clean.site_inputs[edit.site][None]
    along, all_of_it = (tracing.displacement(of, x) for of in (edit, whole))
    u = tracing.unit(exp.directions[exp.components[0]])
    assert (along - all_of_it @ u[:, None] * u).abs().max() < 1e-9
    assert along.abs().max() > 1e-3
    basis = torch.linalg.qr(torch.randn(len(u), len(u)).double())[0].T
    parts = tuple(replace(edit, along=e.expand(2, -1)) for e in basis)
    together, plain = exp.run_rows(clean, [parts, (whole,)], tqdm(disable=True))
    assert (together - plain).abs().max() < 5e-4  # nats, after the rounding of so many sums
    assert (plain - clean.log_probs[0]).abs().max() > 1e-2


@pytest.mark.parametrize("flags", ["--kind head --op zero", "--kind resid --op add"])
def test_random_directions_go_as_far(plain: Bench, flags: str, monkeypatch: Patch) -> None:
    exp = plain.experiment(f"{flags} --along {random_file(plain, flags.split()[1])}")
    rows: list[Any] = []
    run_rows = Experiment.run_rows

    def watch(exp: Experiment, clean: Any, of: Any, *told: Any) -> Tensor:
        rows.extend(of)
        return run_rows(exp, clean, of, *told)

    monkeypatch.setattr(Experiment, "run_rows", watch)
    deltas = tracing.edit_beside(exp, exp.trees[0], tqdm(disable=True))
    clean, edits = rows_of(exp)
    n, whole = len(edits), "head" in flags  # without its input a stream means nothing
    assert tracing.ways_beside(exp.config) == ["random"] + ["whole"] * whole
    assert len(deltas) == len(rows) == (1 + whole) * n
    for edit, (drawn,) in zip(edits, rows[:n], strict=True):
        x = clean.site_inputs[edit.site][None]
        along, beside = (tracing.displacement(of, x)[0] for of in (edit, drawn))
        assert (along.norm(dim=1) - beside.norm(dim=1)).abs().max() < 1e-9
        directions = [torch.nn.functional.normalize(of[-1], dim=0) for of in (along, beside)]
        assert abs(float(directions[0] @ directions[1])) < 0.8
    assert all(edit.along is None for (edit,) in rows[n:])
    assert len({tuple(drawn.along[1].tolist()) for (drawn,) in rows[:n]}) == n


def test_each_of_several_components_moves_along_its_own_direction(plain: Bench) -> None:
    """Complements too; random sets are the chosen, as far, each in a random direction."""
    exp = plain.experiment(f"--kind head --along {random_file(plain, 'head')} --given L0H1")
    clean = rows_of(exp)[0]
    few = (Component(1, "head", 0), Component(1, "head", 3), Component(2, "head", 1))
    sets = tracing.confirm_sets(few, exp)
    drawn = [of for of in sets if of.name == "random" and of.components == few]
    assert len(drawn) == exp.config.num_random
    assert "random complement" not in {of.name for of in sets}
    seen = set()
    for of in drawn:
        for c, edit in zip(sorted(few), tracing.row_of(exp, clean, of), strict=True):
            reads, writes = edit.along
            assert edit.site == c.site and edit.columns == exp.shape.columns(c)
            assert (reads - tracing.unit(exp.directions[c])).abs().max() < 1e-15
            assert abs(float(writes.norm()) - 1) < 1e-12 and abs(float(reads @ writes)) < 0.99
            seen.add(tuple(writes.tolist()))
    assert len(seen) == 3 * len(drawn), "each its own, in each draw"
    for others, edited in (((), {*few}), (("head",), {*exp.shape.every("head")} - {*few})):
        row = tracing.row_of(exp, clean, JointSet("a set", few, others_of=others))
        places = {(edit.site, edit.columns.start): edit for edit in row}
        assert len(places) == len(row) == len(edited) > 0
        for c in edited:
            edit = places[c.site, exp.shape.columns(c).start]
            assert (edit.along - tracing.unit(exp.directions[c])).abs().max() < 1e-15
            assert (edit.along.norm(dim=1) - 1).abs().max() < 1e-12


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


def ablating(of: Bench) -> tuple[Experiment, Component]:
    exp = of.experiment(f"{EVERYWHERE} --along {random_file(of, 'resid')}")
    return exp, exp.components[1]


def test_a_direction_zeroed_everywhere_is_the_ablation_of_the_paper(pre_norm: Bench) -> None:
    """Nothing less is: not the blocks' inputs alone, nor all without one kind of reading point."""
    exp, component = ablating(pre_norm)
    row, d = exp.everywhere(component), exp.directions[component]
    assert len(row) == 2 * exp.shape.n_layers + 1
    points = ("", tracing.MIDDLE, tracing.FINAL)  # "": the blocks' inputs
    less = [tuple(e for e in row if e.site[1] == "")]
    less += [tuple(e for e in row if e.site[1] != point) for point in points]
    clean = exp.run_clean(exp.trees[0], range(exp.shape.n_layers), exp.components)
    log_probs = exp.run_rows(clean, [row, *less], tqdm(disable=True))
    both = torch.cat([clean.log_probs, log_probs])
    base, found, *others = clean.tree.scores(both, exp.task)
    model, tokenizer = pre_norm.loaded
    for i, prompt in enumerate(exp.trees[0].prompts):
        text = prompt.sample.prompt_a if prompt.side == "a" else prompt.sample.prompt_b
        with ablated_as_in_the_paper(model, d):
            paper = naive.suppression_score(model, tokenizer, text, prompt.sample.targets)
        assert abs(float(found[i]) - paper) < 1e-5 * max(1, abs(paper))
    assert (found - base).abs().max() > 0.05
    for of in others:
        assert (found - of).abs().max() > 1e-3


@torch.no_grad()
def test_replies_are_those_of_the_paper_too(pre_norm: Bench) -> None:
    exp, component = ablating(pre_norm)
    d, (model, tokenizer) = exp.directions[component], pre_norm.loaded
    prompts = [prompt for of_sample in exp.prompts for prompt in of_sample[:2]]
    row = tracing.row_of(exp, None, JointSet("chosen", (component,), everywhere=True))
    found = tracing.greedy_replies(exp, row, prompts)
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot_id|>")}
    configured = exp.traced.model.generation_config.eos_token_id
    ends |= set(configured if isinstance(configured, list) else [configured])
    with ablated_as_in_the_paper(model, d):
        said = [naive.greedy(model, prompt.ids, 6, ends) for prompt in prompts]
    assert found == [tokenizer.decode(of, skip_special_tokens=True).strip() for of in said]


def test_random_directions_go_as_far_at_each_token_and_reading_point(pre_norm: Bench) -> None:
    exp, component = ablating(pre_norm)
    clean = exp.run_clean(exp.trees[0], range(exp.shape.n_layers), exp.components)
    sets = [JointSet("chosen", (component,), everywhere=True)]
    sets += [JointSet("random", (component,), draw, everywhere=True) for draw in (1, 2)]
    found = []
    for of in sets:
        row = tracing.row_of(exp, clean, of)
        modules = {edit.site: exp.traced.module(edit.site) for edit in row}
        with tracing.recording(modules) as seen:
            tracing.final_states(exp.traced, clean, [row])
        found.append({e.site: tracing.displacement(e, seen[e.site])[0] for e in row})
    assert len(found[0]) == 2 * exp.shape.n_layers + 1
    ends, u = exp.trees[0].scored, tracing.unit(exp.directions[component])
    directions = []
    for drawn in found[1:]:
        for site, moved in found[0].items():
            far = moved[ends].detach().norm(dim=1)
            assert (drawn[site][ends].norm(dim=1) - far).abs().max() < 1e-4 * float(far.max())
        directions.append(torch.nn.functional.normalize(drawn[0, ""][-1], dim=0))
        for moved in drawn.values():  # all in one direction
            assert (moved - (moved @ directions[-1])[:, None] * directions[-1]).abs().max() < 1e-6
    overlaps = torch.stack([u, *directions]) @ torch.stack([u, *directions]).T
    assert (overlaps - torch.eye(3)).abs().max() < 0.9


@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2", "olmo2", "cohere"])
@pytest.mark.usefixtures("no_weights")
def test_models_that_read_the_stream_otherwise_are_refused(
    architecture: str, random_model: Build, answer: Answer, tmp_path: Path
) -> None:
    common = ["--model_id", random_model(architecture), "--output_dir", str(tmp_path / "x")]
    flags = [*common, *EVERYWHERE.split(), "--along", "difference"]
    refuses(answer, *flags, says=["--confirm all is for models", "input_layernorm"])


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
    config = tracing.Config(confirm=("all", 1), num_random=2, kind="resid", along="difference")
    components = [Component(i, "resid") for i in range(5)]
    exp: Any = SimpleNamespace(config=config, components=components, fitting=["those set apart"])
    exp.shape = SimpleNamespace(n_layers=5)
    exp.directions = {c: torch.ones(3) * (c.layer != zero) for c in components}

    def scores(_: Any, __: Any, sets: Sequence[JointSet], prompts: Any) -> Tensor:
        assert prompts is exp.fitting
        told = torch.zeros(len(sets), 4, 5).double()
        told[..., 2] = math.nan
        for row, of in zip(told, sets, strict=True):
            moves = [(roles[c.layer], kl[c.layer]) for c in of.components] or [(0, 0)]
            row[:, 0], row[:, 4] = 10 - moves[0][0], moves[0][1]
        return told

    monkeypatch.setattr(tracing, "set_scores", scores)
    told: Any = SimpleNamespace()
    sets = [JointSet("none")]
    for name, draw in (("chosen", 0), ("random", 1), ("random", 2)) if label else ():
        sets.append(JointSet(name, (Component.parse(label),), draw, everywhere=True))
    assert [*tracing.choose_direction(exp, told, "b")] == (sets if label else [])
    if label:  # what is skipped is not chosen, and the next best is
        exp.config = replace(config, skip=(Component.parse(label),))
        next_best = tracing.choose_direction(exp, told, "b")[1]
        assert next_best.name == "chosen" and next_best.text.split()[0] not in ("", label)


# ----- the whole command


WHOLE_PATCH = "--task refusal --num_samples 12 --no-bf16 --kind resid --op patch"
PATCH = [*WHOLE_PATCH.split(), "--along", "difference"]
NUMBERS = [f"{way}_{name}" for way in ("along", "random") for name in ("mean", "ci_low", "q")]


@pytest.fixture(scope="module")
def patched(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tiny_llama, tmp_path_factory.mktemp("patched"), *PATCH)


def by_plain_forwards(model: str, prompts: Sequence[Any], layer: int, kind: str = "resid") -> Any:
    """[sample, side, width] at the last token."""
    plain, tokenizer = naive.load(model)

    def last(text: str) -> Any:
        ids = naive.prompt_ids(tokenizer, text)
        return naive.input_of(plain, ids, layer, kind)[-1].double().numpy()

    samples = [of_sample[0].sample for of_sample in prompts]
    return np.array([[last(sample.prompt_a), last(sample.prompt_b)] for sample in samples])


def correct(x: Any, a: Any, b: Any) -> float:
    """The share of inputs [sample, side, width] that lie on their mean's side of the middle."""
    on = (x - (a + b) / 2) @ (a - b)
    return float((on[:, 0] > 0).mean() + (on[:, 1] < 0).mean()) / 2


def test_the_table_recomputes_from_plain_forwards(patched: Path, tiny_llama: str) -> None:
    exp, told = prepared(tiny_llama, *PATCH), read(patched, TABLE).set_index("label")
    found, results = load_file(patched / FILE), read(patched)
    assert list(told.index) == list(found) == [f"L{n}resid" for n in range(4)]
    units = {of[0].sample.unit for of in exp.fitting}
    assert set(results["sample_id"]) == {of[0].sample.sample_id for of in exp.prompts}
    assert not units & set(results["unit"])
    assert len(exp.fitting) + len(exp.prompts) == 12
    assert set(told["n_fit"]) == {len(units)} == {5}
    base = results.drop_duplicates("sample_id")["delta_logit_base"].mean()
    for layer, row in enumerate(told.itertuples()):
        given, tested = (
            by_plain_forwards(tiny_llama, p, layer) for p in (exp.fitting, exp.prompts)
        )
        (a, b), d = given.mean(0), given.mean(0)[0] - given.mean(0)[1]
        assert np.abs(found[row.Index].numpy() - d).max() < 1e-4
        assert row.norm == pytest.approx(np.linalg.norm(d), rel=1e-4, abs=1e-9)
        effect = results[results["layer"] == layer]["head_effect"].mean()
        assert row.along_mean == pytest.approx(effect)
        assert row.along_share_moved == pytest.approx(-effect / base, abs=1e-9)
        assert row.random_share_moved == pytest.approx(-row.random_mean / base, abs=1e-9)
        if not d.any():
            assert math.isnan(row.largest_share)
            assert row.accuracy == row.auc == 0.5
            continue
        assert row.largest_share == pytest.approx((d**2).max() / (d @ d), rel=1e-4)
        on = tested @ d
        accuracy = correct(tested, a, b)
        assert row.accuracy == pytest.approx(accuracy)
        assert row.auc == pytest.approx((on[:, 0][:, None] > on[:, 1]).mean())
        assert row.accuracy_fit == pytest.approx(correct(given, a, b))
        n = len(set(results["unit"]))
        assert (row.n_sentences, n) == (n, 5)
        assert (row.accuracy_low, row.accuracy_high) == tracing.share_interval(accuracy, n)
    assert told["along_share_moved"].iloc[1:].min() > 0.5
    assert told["random_share_moved"].abs().max() < 0.5


def test_the_whole_is_that_of_a_run_without(patched: Path, tiny_llama: str, tmp_path: Path) -> None:
    whole = read(finish(tiny_llama, tmp_path, *WHOLE_PATCH.split()))
    there = whole[whole["sample_id"].isin(read(patched)["sample_id"])]
    means = there.groupby("layer")["head_effect"].mean()
    told = read(patched, TABLE)
    assert (told["whole_mean"] - means.to_numpy()).abs().max() < CLOSE


def test_directions_come_from_the_half_that_is_not_measured(llama: str, tmp_path: Path) -> None:
    """Other texts in the held-out sentences change their results and no direction."""
    words = {"targets": ["I", "Sorry"], "foils": ["Sure", "Here"]}
    records: list[dict[str, Any]] = [
        {"prompt_a": a, "prompt_b": b, "unit": f"u{i // 2}", **words}
        for i, (a, b) in enumerate(tracing.REFUSAL_PAIRS[:12])
    ]
    path, flags = tmp_path / "own.jsonl", [*PATCH, "--layers", "1-2", "--samples"]
    write_samples(path, *records)
    held_out = {of[0].sample.unit for of in prepared(llama, *flags, str(path)).prompts}
    assert len(held_out) == 3
    found, effects = [], []
    for i, changed in enumerate((set(), held_out, {f"u{i}" for i in range(6)} - held_out)):
        please = (
            {"prompt_b": r["prompt_b"] + " Please." * (r["unit"] in changed)} for r in records
        )
        write_samples(path, *map(operator.or_, records, please))
        folder = finish(llama, tmp_path / str(i), *flags, str(path))
        found.append(load_file(folder / FILE))
        assert set(read(folder)["unit"]) == held_out
        effects.append(read(folder)["head_effect"].to_numpy())
    for label, d in found[0].items():
        assert torch.equal(d, found[1][label])
        assert label == "L0resid" or not torch.equal(d, found[2][label])
    assert np.abs(effects[0] - effects[1]).max() > 1e-3
    assert np.abs(effects[0] - effects[2]).max() > 1e-6


def test_a_file_of_directions_gives_the_same_effects_and_leaves_its_sentences_out(
    patched: Path, tiny_llama: str, tmp_path: Path
) -> None:
    """Which are known by their texts: in another template, with other words, or as one of two."""
    flags = [*PATCH, "--along", str(patched / FILE)]
    again = finish(tiny_llama, tmp_path, *flags)
    before, after = read(patched), read(again)
    (named,) = set(after["along"])
    assert re.fullmatch(re.escape(FILE) + " [0-9a-f]{8}", named), "which file of that name"
    assert list(before["sample_id"]) == list(after["sample_id"])
    assert (before["head_effect"] - after["head_effect"]).abs().max() < 1e-9
    assert "5 samples left out: the directions of" in (again / "run.log").read_text()
    told, loaded = read(patched, TABLE), read(again, TABLE)
    same = ["auc", "norm", "along_mean", "random_mean", "whole_mean"]
    assert (told[same] - loaded[same]).abs().max(axis=None) < 1e-9
    assert loaded["accuracy"].isna().all()
    assert not (again / FILE).exists()
    fitted = {of[0].sample.prompt_a for of in prepared(tiny_llama, *PATCH).fitting}
    others = ["--num_samples 20 --seed 3", "--system_prompt=", "--answer_prefix I", "--no-chat"]
    for more in others:
        exp = prepared(tiny_llama, *flags, *more.split())
        assert exp.prompts and not fitted & {of[0].sample.prompt_a for of in exp.prompts}
        assert not exp.fitting


def test_a_sentence_with_other_words_is_left_out_as_well(tiny_llama: str, tmp_path: Path) -> None:
    """Suppression asks the same questions with other words of another seed."""
    flags = [*PATCH, "--task", "suppression", "--layers", "1", "--num_samples", "4"]
    path = str(finish(tiny_llama, tmp_path, *flags) / FILE)
    there = {of[0].sample.prompt_b for of in prepared(tiny_llama, *flags).fitting}
    exp = prepared(tiny_llama, *flags, "--along", path, "--num_samples", "30", "--seed", "1")
    assert exp.prompts and not there & {of[0].sample.prompt_b for of in exp.prompts}


# ----- what no file of directions is


def no_file(told: Any = None, **tensors: Tensor) -> Callable[[Path], None]:
    text = told if isinstance(told, str) else json.dumps(told or {})
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
        f"{NONE}component 'L0resid' stands there twice",
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
        f"{NONE}field 'model' stands there twice",
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
    flags = ["--model_id", llama, "--output_dir", str(tmp_path / "x"), "--kind", "resid"]
    flags += ["--op", "patch", "--along", str(tmp_path / "d.safetensors")]
    refuses(answer, *flags, says=["--along", sentence])


ALONG_A_RESID = "--kind resid --op zero --along difference"
MEASURES = "--along measures; --method and --screen estimate"
WHOLE = "--ablate and --multipliers whole components"
ALL_IS_FOR = "--confirm all is for --kind resid --op zero"
MEANINGLESS = {
    "--kind neuron --neurons 3 --along difference": "no --kind neuron",
    "--along difference --method atp": MEASURES,
    "--along logistic --screen 3": MEASURES,
    "--along difference --ablate L0H1": WHOLE,
    "--along difference --confirm 2 --max_new_tokens 4 --multipliers 0,1": WHOLE,
    "--op add": "--op add adds a direction: give --along",
    "--along difference --confirm all": ALL_IS_FOR,
    f"{ALONG_A_RESID} --confirm all --positions last": ALL_IS_FOR,
    "--kind resid --op patch --along difference --confirm all": ALL_IS_FOR,
    "--kind resid --op zero --confirm all": "--confirm all ablates a direction: give --along",
    "--kind resid --op zero": "removes the input itself and means nothing",
    "--along=": "--along is empty",
    f"{ALONG_A_RESID} --num_samples 1": "of 1 sentence 0 are left to measure, at least 1",
    f"{ALONG_A_RESID} --num_samples 3 --confirm 1": "3 sentences 1 are left to measure, at least 2",
}


@pytest.mark.parametrize("flags", MEANINGLESS)
@pytest.mark.usefixtures("no_weights")
def test_what_means_nothing_is_refused(
    flags: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path / "x"), *flags.split()]
    code, _, err = answer(*argv)
    assert code == 2 and MEANINGLESS[flags] in err.splitlines()[-1], err


# ----- resumed, shared between processes, redrawn, compared


EXACT = ["circuit_results.csv", "circuit_heads.csv", TABLE, FILE]
EXACT += ["circuit_confirm.csv", "generations.jsonl"]
SMALL = "--task refusal --num_samples 6 --no-bf16 --kind resid --op zero --along logistic"
SMALL += " --confirm all --num_random 2 --max_new_tokens 3"


@pytest.fixture(scope="module")
def small(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("small"), *SMALL.split())


@pytest.mark.parametrize("where", ["sweep_tree", "run_sets"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    where: str, small: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *SMALL.split()]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracing, where, stop)
        assert tracing.main(argv) == 130
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "probe", lambda *_: pytest.fail("directions were sought again"))
        assert tracing.main(argv) == 0
    for name in [*EXACT, "circuit_directions.png"]:
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name


def test_two_processes_give_the_same_bytes(small: Path, llama: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--model_id", llama, "--output_dir", str(tmp_path), *SMALL.split()]
    command = [sys.executable, *launcher, str(SCRIPT), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    for name in EXACT:
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name


def test_the_confirmation_is_of_the_held_out_sentences(small: Path, llama: str) -> None:
    exp, rows = prepared(llama, *SMALL.split()), read(small, "circuit_confirm.csv")
    units = {of[0].sample.unit for of in exp.prompts}
    assert set(rows["n_sentences"]) == {len(units)}
    assert not units & {of[0].sample.unit for of in exp.fitting}
    assert rows["set"].tolist() == ["none", "chosen", "random", "random"]
    assert rows["components"].iloc[1].endswith("resid everywhere")
    edited = {reply["sample_id"] for reply in generations(small) if reply["n_ablated"]}
    assert edited == {of[0].sample.sample_id for of in exp.prompts}
    told = f"{len(exp.fitting)} samples set apart"
    assert (small / "run.log").read_text().count(told) == 2


def test_a_table_along_a_direction_is_redrawn_and_compares_with_none_that_is_not(
    small: Path, patched: Path, llama: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    results, new = str(small / "circuit_results.csv"), tmp_path / "again"
    assert tracing.main(["--from_csv", results, "--output_dir", str(new)]) == 0
    for name in ("circuit_heads.csv", "circuit_heads.png", "circuit_summary.png"):
        assert (new / name).read_bytes() == (small / name).read_bytes(), name
    common = ["--output_dir", str(tmp_path / "x"), "--compare"]
    other = SMALL.split(" --confirm")[0].replace("logistic", "difference").split()
    says = ["has along logistic, this run difference"]
    refuses(answer, *common, results, "--model_id", llama, *other, says=says)
    results, says = str(patched / "circuit_results.csv"), ["has along difference, this run none"]
    refuses(answer, *common, results, "--model_id", tiny_llama, *WHOLE_PATCH.split(), says=says)


# ----- beside the other options


BESIDE = [
    "--task suppression --controls --kind resid --op zero --along difference --confirm all",
    "--kind attn --op mean --positions last --along logistic --given L1attn --confirm 1",
    "--kind mlp --op add --along difference --bf16 --layers 1 --via logits",
    "--kind resid --op zero --along difference --confirm all --bf16 --max_new_tokens 2",
    "--task refusal --kind head --op patch --along difference --confirm mass:0.5 --heads 0-2",
]


@pytest.mark.parametrize("flags", BESIDE)
def test_with_other_options_nothing_is_missing(flags: str, llama: str, tmp_path: Path) -> None:
    """Of L0resid, where all prompts end alike, there is no direction."""
    common = ["--num_samples", "6"]
    common += ["--num_random", "1"] if "--confirm" in flags else []
    common += [] if "bf16" in flags else ["--no-bf16"]
    folder = finish(llama, tmp_path, *flags.split(), *common)
    results, told, log = read(folder), read(folder, TABLE), (folder / "run.log").read_text()
    assert not results[["head_effect", "delta_logit_head"]].isna().any(axis=None)
    swept = told[told["along_mean"].notna()]
    assert set(swept["label"]) == set(read(folder, "circuit_heads.csv")["label"])
    has_whole = "resid --op zero" not in flags and "--op add" not in flags
    assert ("whole_mean" in told) == has_whole
    numbers = [*NUMBERS, "norm", "accuracy", "auc", "accuracy_shuffled"]
    assert not swept[numbers + ["whole_mean"] * has_whole].isna().any(axis=None)
    base = tracing.base_statistics(tracing.read_results(folder / "circuit_results.csv"))
    assert (swept["along_share_moved"].isna() == (not base["is_clear"])).all()
    lexical = told.set_index("label").loc["L0resid", ["accuracy", "auc", "norm"]]
    assert lexical.tolist() == [0.5, 0.5, 0]
    still = swept.loc[swept["norm"] == 0, ["along_mean", "random_mean"]]
    assert (still.abs() < CLOSE).all(axis=None)
    found = load_file(folder / FILE)
    assert all(d.isfinite().all() for d in found.values())
    assert len(found) == 3 * (4 if "--kind head" in flags else 1)
    no_direction = "L1attn" * ("--given" in flags) or "L0resid" * ("resid" in flags)
    assert " ".join(name for name, d in found.items() if not d.any()) == no_direction
    if "--controls" in flags:
        assert not read(folder, "circuit_heads.csv")["minus_other_mean"].isna().any()
    if "chooses no component" in log:
        assert "--confirm all" in flags  # no layer moves a random model against its sign
    elif "--confirm" in flags:
        rows = read(folder, "circuit_confirm.csv")
        assert not rows[["mean_delta", "share_removed", "kl_a", "kl_b"]].isna().any(axis=None)
        assert {"none", "chosen", "random"} <= set(rows["set"])


def test_negative_controls_give_no_direction(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--task odd_one_out --num_samples 20 --no-bf16 --kind attn --op patch --layers 0-1"
    flags += " --along difference"
    exp = prepared(tiny_llama, *flags.split())
    assert all(of[0].sample.counts for of in exp.fitting)
    negative = {of[0].sample.sample_id for of in exp.prompts if not of[0].sample.counts}
    assert len(negative) == 4
    folder = finish(tiny_llama, tmp_path, *flags.split())
    results, told = read(folder), read(folder, TABLE).set_index("label")
    assert negative <= set(results["sample_id"])
    real = results[results["group"] != tracing.NO_ODD_ONE]
    assert set(told["n_sentences"]) == {real["unit"].nunique()}
    for layer in (0, 1):
        mean = real[real["layer"] == layer]["head_effect"].mean()
        assert told.loc[f"L{layer}attn", "along_mean"] == pytest.approx(mean)
    given, tested = (
        by_plain_forwards(tiny_llama, [of for of in some if of[0].sample.counts], 1, "attn")
        for some in (exp.fitting, exp.prompts)
    )
    assert told.loc["L1attn", "accuracy"] == pytest.approx(correct(tested, *given.mean(0)))


def test_logistic_directions_are_of_the_sentences_set_apart(small: Path, llama: str) -> None:
    exp, found = prepared(llama, *SMALL.split()), load_file(small / FILE)
    told = read(small, TABLE).set_index("label")["accuracy_shuffled"]
    units = [of[0].sample.unit for of in exp.fitting]
    for layer in (1, 2):
        given, tested = (
            torch.tensor(by_plain_forwards(llama, of, layer))[None]
            for of in (exp.fitting, exp.prompts)
        )
        expected = tracing.logistic(given)[0][0]
        assert torch.cosine_similarity(found[f"L{layer}resid"], expected, dim=0) > 0.9999
        chance = tracing.accuracy_by_chance(tracing.logistic, given, tested, units, 42)
        assert told[f"L{layer}resid"] == pytest.approx(float(chance))
    with safe_open(small / FILE, "pt") as file:
        told = json.loads(file.metadata()["told"])
    assert told["model"] == record_of(small)["fingerprint"]["model"]
    assert (told["along"], told["kind"], told["task"]) == ("logistic", "resid", "refusal")
    assert len(told["fitted_on"]) == 2 * len(exp.fitting)


def test_the_dry_run_tells_how_many_samples_give_directions(llama: str, answer: Answer) -> None:
    code, out, err = answer("--model_id", llama, *SMALL.split(), "--dry_run")
    assert code == 0, err
    assert "3 other samples give or choose directions" in out


def test_a_file_in_the_runs_own_folder_outlives_it(
    patched: Path, tiny_llama: str, tmp_path: Path
) -> None:
    """It may be this run's input; --overwrite deletes this script's files only."""
    own = tmp_path / "x <b onmouseover=1>bold<!--.safetensors"
    shutil.copy(patched / FILE, own)
    flags = [*PATCH, "--along", str(own)]
    folder = finish(tiny_llama, tmp_path, *flags)
    page = (folder / "circuit_report.html").read_text()
    assert "<!--" not in page and "<b on" not in page
    assert "resid along x &lt;b onmouseover=1&gt;bold&lt;!--" in page
    finish(tiny_llama, tmp_path, *flags, "--overwrite")
    assert own.read_bytes() == (patched / FILE).read_bytes()


def test_directions_of_the_folder_itself_are_an_input_that_overwriting_would_delete(
    patched: Path, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    folder = Path(shutil.copytree(patched, tmp_path / "run"))
    argv = ["--model_id", tiny_llama, "--output_dir", str(folder), *PATCH]
    argv += ["--along", str(folder / FILE), "--overwrite"]
    refuses(answer, *argv, says=[f"--along {folder / FILE} lies in the folder that --overwrite"])
    assert (folder / FILE).read_bytes() == (patched / FILE).read_bytes()


def test_what_is_added_is_never_called_damage(tiny_llama: str, tmp_path: Path) -> None:
    """It is to move what prompt b leaves."""
    for op, judged in (("add", False), ("zero", True)):
        flags = [*PATCH, "--op", op, "--confirm", "1", "--layers", "1"]
        rows = read(finish(tiny_llama, tmp_path / op, *flags), "circuit_confirm.csv")
        chosen = rows[(rows["set"] == "chosen") & (rows["samples"] == "held-out")]
        assert chosen["damaged"].notna().all() == judged
        drawn = rows[rows["set"] == "random"]
        assert len(drawn) == 20 and set(drawn["components"]) == {"L1resid"}
        assert drawn["mean_delta"].nunique() == 20


def test_where_no_layer_has_a_direction_none_is_chosen(tiny_llama: str, tmp_path: Path) -> None:
    """Into layer 0 the last tokens of both prompts are the same."""
    flags = [*PATCH, "--op", "zero", "--confirm", "all", "--layers", "0"]
    folder = finish(tiny_llama, tmp_path, *flags)
    assert "--confirm all chooses no component" in (folder / "run.log").read_text()
    assert not (folder / "circuit_confirm.csv").exists()

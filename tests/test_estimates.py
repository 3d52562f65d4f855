"""Estimates from gradients: against finite differences, plain autograd, exact effects and lxt."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

import llama3_circuit_tracing as tracing
import naive
import random_models
from by_hand import prepared
from conftest import ROOT, Answer, command_line, finish, read, record_of, refuses
from llama3_circuit_tracing import Component, Edit, Edits
from test_interventions import UNEQUAL, Bench, bench, hooks_of, scores, swept

KINDS = list(tracing.KINDS)
WHICH = {"head": "--heads 1,3", "neuron": "--neurons 5,78"}
MIDPOINTS = tuple((k + 0.5) / 32 for k in range(32))

Patch = pytest.MonkeyPatch
Folders = Callable[..., str]
Experiment = tracing.Experiment[Any]


@pytest.fixture(scope="module")
def plain(llama: str) -> Bench:
    return bench(llama)


def estimated(experiment: Experiment) -> Tensor:
    """[component, sample, side], as `estimate` has it, without a folder."""
    values = []
    for prompts in tracing.estimate_batches(experiment):
        bar = tqdm(disable=True)
        values += tracing.estimate_samples(experiment, swept(experiment), prompts, bar)
    return torch.tensor(values).double().transpose(0, 1)


def moved(experiment: Experiment, share: float) -> Tensor:
    """[component, sample, side] with x + share * D, by the rows of an exact sweep."""
    make_edits = tracing.Experiment.edits

    def part_way(self: Experiment, *args: Any) -> Edits:
        return tuple(
            replace(edit, factor=1 + share * (edit.factor - 1), source=share * edit.source)
            for edit in make_edits(self, *args)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing.Experiment, "edits", part_way)
        return scores(experiment)[1]


def slope(experiment: Experiment, at: float = 0.0, step: float = 0.04) -> Tensor:
    """d score / d share, by central differences and Richardson's extrapolation."""
    wide, narrow = (
        (moved(experiment, at + h) - moved(experiment, at - h)) / (2 * h) for h in (step, step / 2)
    )
    return (4 * narrow - wide) / 3


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


# ----- against finite differences

OPS = ["--op scale --factor 2", "--op scale --factor -1 --positions last", "--op patch"]
OPS += ["--op patch --patch_into b --positions last", "--op mean --positions differing"]
GIVEN = ["", " --given L0H1,L1mlp"]


# Gemma has a norm after each module, which forgets by what that is scaled as a whole
CASES = [("llama", kind, op) for op in OPS for kind in KINDS]
CASES += [("gemma3_text", kind, "--op patch") for kind in ("attn", "mlp")]


@pytest.mark.parametrize(("architecture", "kind", "op"), CASES)
def test_atp_is_the_slope_of_the_exact_sweep(
    random_model: Folders, architecture: str, kind: str, op: str
) -> None:
    """Of either side by itself; the exact sweep has samples that share nodes of one tree."""
    given = GIVEN[(KINDS.index(kind) + OPS.index(op)) % 2]
    flags = f"--method atp --kind {kind} {WHICH.get(kind, '')} {op}{given} --tree_tokens 4096"
    experiment = bench(random_model(architecture)).experiment(flags)
    assert len(experiment.trees) == 1 and len(experiment.prompts) == 3
    expected, found = slope(experiment), estimated(experiment)
    assert expected.abs().max() > 0.01
    assert (found[..., :2] - expected).abs().max() < 3e-4 + 1e-3 * expected.abs().max()
    assert found[..., 2:].isnan().all(), "there are no control prompts"


def test_ig_is_the_mean_slope_at_the_midpoints_of_the_way(plain: Bench) -> None:
    """For one component per module, whose way is that of the module."""
    assert tracing.GRADIENT_POINTS["ig"] == (0.1, 0.3, 0.5, 0.7, 0.9)
    experiment = plain.experiment("--method ig --kind attn --op patch")
    slopes = [slope(experiment, at, 0.02) for at in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert distance(estimated(experiment)[..., :2], torch.stack(slopes).mean(0)) < 3e-3


# ----- completeness


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_ig_adds_up_to_the_exact_effect_the_closer_the_more_points(
    plain: Bench, monkeypatch: Patch, kind: str
) -> None:
    experiment = plain.experiment(f"--method ig --kind {kind} --op patch")
    exact = scores(experiment)
    errors = []
    for shares in ((0.0,), tracing.GRADIENT_POINTS["ig"], MIDPOINTS):
        monkeypatch.setitem(tracing.GRADIENT_POINTS, "ig", shares)
        errors.append(distance(estimated(experiment)[..., :2], exact[1] - exact[0]))
    assert errors[0] > 2 * errors[1]
    assert errors[1] < 0.1 and errors[2] < 2e-3


@pytest.mark.parametrize("method", ["atp", "ig", "relp"])
@pytest.mark.parametrize(("part", "whole"), [("head", "attn"), ("neuron", "mlp")])
def test_the_estimates_of_all_parts_add_up_to_that_of_the_module(
    plain: Bench, method: str, part: str, whole: str
) -> None:
    parts, modules = (
        estimated(plain.experiment(f"--method {method} --op mean --kind {kind}"))[..., :2]
        for kind in (part, whole)
    )
    assert distance(parts.unflatten(0, (3, -1)).sum(1), modules) < 1e-6


# ----- the same gradients written in plain autograd


def norm_of(offset: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach() * (offset + self.weight)

    return forward


def halved_mlp(self: Any, x: Tensor) -> Tensor:
    z = self.gate_proj(x)
    product = z * (self.act_fn(z) / z).detach() * self.up_proj(x)
    return self.down_proj(product / 2 + product.detach() / 2)


@contextlib.contextmanager
def rules(model: Any) -> Iterator[None]:
    """RelP's rules as other forwards of the classes, as its authors have it."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(module) for module in model.modules()}:
            if kind.__name__.endswith("RMSNorm"):
                patch.setattr(kind, "forward", norm_of(1.0 * kind.__name__.startswith("Gemma")))
            elif kind.__name__.endswith("MLP"):
                patch.setattr(kind, "forward", halved_mlp)
        yield


def plain_estimate(loaded: Any, text: str, targets: Sequence[str], c: Component) -> float:
    """<gradient of the score, x> at the component's slice, one prompt and form at a time."""
    model, tokenizer = loaded
    ids, span = naive.prompt_ids(tokenizer, text), naive.span_of(model, c.layer, c.kind, c.index)
    total = 0.0
    for word in targets:
        log_probs, leaves = [], []

        def leaf(x: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1]

        for tail in naive.form_ids(tokenizer, word):
            with naive.hooked(naive.module_of(model, c.layer, c.kind), leaf):
                logits = model(torch.tensor([ids + tail])).logits[0].double()
            steps = logits[len(ids) - 1 : -1].log_softmax(-1)
            log_probs.append(steps[range(len(tail)), tail].sum())
        score = torch.stack(log_probs).logsumexp(0)
        gradients = torch.autograd.grad(score, leaves)
        both = zip(gradients, leaves, strict=True)
        total += sum(float((g * x).detach()[..., span].sum()) for g, x in both)
    return total / len(targets)


@pytest.mark.parametrize("architecture", random_models.ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_relp_and_atp_are_what_plain_autograd_gives(
    random_model: Folders, architecture: str, kind: str
) -> None:
    """With the rules as forwards of their own; the gradient of a neuron is not halved."""
    one = bench(random_model(architecture))
    flags = f"--kind {kind} {WHICH.get(kind, '')} --op scale --factor 2 --method"
    found = {m: estimated(one.experiment(f"{flags} {m}", [UNEQUAL])) for m in ("atp", "relp")}
    components = swept(one.experiment(f"{flags} atp"))
    for method, (i, c) in itertools.product(found, list(enumerate(components))[::2]):
        with rules(one.loaded[0]) if method == "relp" else contextlib.nullcontext():
            expected = [
                plain_estimate(one.loaded, UNEQUAL[f"prompt_{side}"], UNEQUAL["targets"], c)
                for side in "ab"
            ]
        assert found[method][i, 0, :2].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert distance(found["relp"][..., :2], found["atp"][..., :2]) > 0.02, "the rules do something"


# ----- the rules


def detach_output(module: Any, args: Any, output: Tensor) -> Tensor:
    return output.detach()


def relevance(one: Bench, frozen: bool = True, left_out: str = "") -> tuple[float, list[float]]:
    """A logit, and per block the sum of gradient * x of the residual stream entering it."""
    model, names = one.loaded[0], ("q_proj", "k_proj") if frozen else ()
    ids, seen = naive.prompt_ids(one.loaded[1], UNEQUAL["prompt_a"]), {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing.linearised(one.traced))
        for block in naive.layers_of(model):
            for name in names:
                module = getattr(block.self_attn, name)
                stack.enter_context(module.register_forward_hook(detach_output))
            if left_out == "half":
                block.mlp.down_proj._forward_pre_hooks.popitem()
        seen = stack.enter_context(tracing.recording(dict(enumerate(naive.layers_of(model)))))
        embedded = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
        logit = model(inputs_embeds=embedded).logits[0, -1, 7]
    residuals = [seen[layer] for layer in range(3)]
    gradients = torch.autograd.grad(logit, residuals)
    both = zip(gradients, residuals, strict=True)
    return float(logit.detach()), [float((g * x).detach().sum()) for g, x in both]


def test_relevance_is_conserved_at_every_layer_where_attention_is_frozen(plain: Bench) -> None:
    logit, sums = relevance(plain)
    assert abs(logit) > 0.1
    assert sums == pytest.approx([logit] * 3, rel=1e-4, abs=1e-4)
    for changed in ({"left_out": "half"}, {"frozen": False}):
        _, sums = relevance(plain, **changed)
        assert all(abs(one - logit) > 0.05 * abs(logit) for one in sums)


@pytest.mark.parametrize("architecture", random_models.ARCHITECTURES)
def test_linearising_leaves_the_logits_alone_to_the_last_bit_and_no_hook(
    random_model: Folders, architecture: str
) -> None:
    one = bench(random_model(architecture))
    model, ids = one.loaded[0], torch.tensor([naive.prompt_ids(one.loaded[1], "Name a fruit.")])
    before, hooks = model(ids).logits, hooks_of(model)
    with pytest.raises(KeyError), tracing.linearised(one.traced):
        assert hooks_of(model) >= hooks + 3 * 4 + 1
        assert torch.equal(model(ids).logits, before)
        raise KeyError
    assert hooks_of(model) == hooks == tracing.count_hooks(one.traced)


def test_slopes_at_zero_are_finite(plain: Bench) -> None:
    act = plain.traced.layers[0].mlp.act_fn
    x = torch.tensor([0.0, -0.0, 1e-30, -3.0, 50.0], requires_grad=True)
    with tracing.linearised(plain.traced):
        (found,) = torch.autograd.grad(act(x).sum(), x)
        norm = plain.traced.layers[0].input_layernorm(torch.zeros(1, 48).requires_grad_())
    assert torch.allclose(found, torch.sigmoid(x))
    assert not norm.any()


PEER = """
import functools, importlib.util, json, pathlib, sys, types
lxt = pathlib.Path(importlib.util.find_spec("lxt").origin or "").parent
for name, path in {"lxt": lxt, "lxt.efficient": lxt / "efficient"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]
import torch
from lxt.efficient.patches import gated_mlp_forward, patch_method, rms_norm_forward
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
patch_method(gated_mlp_forward, LlamaMLP)
patch_method(rms_norm_forward, LlamaRMSNorm)
folder, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
leaves = []
def leaf(module, args):
    leaves.append(torch.zeros_like(args[0]).requires_grad_())
    return (args[0] + leaves[-1],)
for block in model.model.layers:
    block.self_attn.o_proj.register_forward_pre_hook(leaf)
    block.mlp.down_proj.register_forward_pre_hook(leaf)
logit = model(torch.tensor([ids])).logits[0, -1, 7]
torch.save(list(torch.autograd.grad(logit, leaves)), out)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("lxt") is None, reason="lxt 2.1 is not installed: a peer of relp"
)
def test_the_rules_are_those_of_lxt(plain: Bench, llama: str, tmp_path: Path) -> None:
    """In a process of its own, since lxt changes the classes of transformers for good."""
    ids, out = naive.prompt_ids(plain.loaded[1], UNEQUAL["prompt_a"]), tmp_path / "gradients.pt"
    argv = [sys.executable, "-c", PEER.strip(), llama, json.dumps(ids), str(out)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = "attn", "mlp"
    sites = [Component(layer, kind).site for layer in range(3) for kind in kinds]
    widths = [plain.traced.shape.width(site.place) for site in sites]
    leaves = [torch.zeros(len(ids), width, requires_grad=True) for width in widths]
    row = tuple(Edit(s, slice(None), 1.0, leaf) for s, leaf in zip(sites, leaves, strict=True))
    with tracing.linearised(plain.traced), tracing.editing(plain.traced, [row]):
        logit = plain.loaded[0](torch.tensor([ids])).logits[0, -1, 7]
    peers = torch.load(out)
    for own, peer in zip(torch.autograd.grad(logit, leaves), peers, strict=True):
        assert distance(own, peer[0]) < 1e-5


# ----- samples and sides

GOLF = {"sentence": "Name a sport.", "targets": ["golf"]}
IRON = {"sentence": "Name a metal.", "targets": ["iron", "zinc"]}
LONG = {"prompt_a": "Never say owl! Name a bird.", "prompt_b": "Name a bird.", "targets": ["owl"]}
CONTROLLED = [LONG, GOLF, IRON]


@pytest.mark.parametrize("method", ["atp", "ig", "relp"])
def test_neither_samples_nor_sides_are_mixed(plain: Bench, method: str) -> None:
    """However they are put into trees; a side that a sample lacks has no estimate."""
    flags = f"--method {method} --controls"
    together = estimated(plain.experiment(f"{flags} --tree_tokens 4096", CONTROLLED))
    assert together.isnan().all(0).tolist() == [[False] * 2 + [True] * 2, [False] * 4, [False] * 4]
    assert not together[:, 1:].isnan().any()
    alone = estimated(plain.experiment(f"{flags} --tree_tokens 1", CONTROLLED))
    assert distance(alone[:, 1:], together[:, 1:]) < 1e-4
    assert distance(alone[:, 0, :2], together[:, 0, :2]) < 1e-4
    changed = [{**LONG, "prompt_b": "Name some animal, please."}, GOLF, IRON]
    other = estimated(plain.experiment(f"{flags} --tree_tokens 4096", changed))
    assert distance(other[:, 1:], together[:, 1:]) < 1e-4
    assert distance(other[:, 0, 0], together[:, 0, 0]) < 1e-4
    assert distance(other[:, 0, 1], together[:, 0, 1]) > 1e-2


def test_a_node_belongs_to_one_sample_in_trees_of_estimates(plain: Bench) -> None:
    experiment = plain.experiment("--controls --tree_tokens 4096", CONTROLLED)
    (tree,) = tracing.plant_trees(
        experiment.prompts, experiment.bos, experiment.options, apart=True
    )
    paths: dict[str, set[int]] = {}
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        paths.setdefault(prompt.sample.sample_id, set()).update(path)
    for i, (sample, _) in enumerate(tree.samples):
        assert (tree.sample_of[sorted(paths[sample.sample_id])] == i).all()
    assert sum(map(len, paths.values())) == len(set().union(*paths.values()))
    assert tree.n_tokens > experiment.trees[0].n_tokens


def test_out_of_memory_halves_the_samples_and_changes_nothing(
    plain: Bench, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = plain.experiment("--method atp --tree_tokens 4096")
    expected, estimate_tree, sizes = estimated(experiment), tracing.estimate_tree, []

    def tight(experiment: Experiment, components: Any, tree: tracing.Tree) -> Tensor:
        sizes.append(len(tree.samples))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return estimate_tree(experiment, components, tree)

    monkeypatch.setattr(tracing, "estimate_tree", tight)
    monkeypatch.setattr(experiment.traced, "samples_per_backward", 2**31)
    assert distance(estimated(experiment)[..., :2], expected[..., :2]) < 1e-4
    assert sizes == [3, 1, 1, 1] and experiment.traced.samples_per_backward == 1
    assert "1 samples per backward" in caplog.text
    (tree,) = experiment.trees
    monkeypatch.setattr(tracing, "estimate_tree", lambda *args: tight(*args[:2], tree))
    with pytest.raises(tracing.RunError, match="one sample alone"):
        estimated(experiment)


def test_a_gradient_that_is_not_finite_is_an_error(plain: Bench, monkeypatch: Patch) -> None:
    grad = torch.autograd.grad

    def spoilt(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        *most, last = grad(*args, **kwargs)
        last[0, 0] = math.nan
        return (*most, last)

    monkeypatch.setattr(torch.autograd, "grad", spoilt)
    with pytest.raises(tracing.RunError, match="a gradient is not finite"):
        estimated(plain.experiment("--method atp"))


# ----- runs

TWO = ["--num_samples", "2", "--layers", "0-1", "--controls"]
RESULTS, HEADS = "circuit_results.csv", "circuit_heads.csv"


def test_weights_are_loaded_without_gradients_and_keep_none(llama: str) -> None:
    experiment = prepared(llama, "--method", "ig")
    estimated(experiment)
    parameters = list(experiment.traced.model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.fixture(scope="module")
def by_method(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a method, done once."""
    return functools.cache(
        lambda method: finish(llama, tmp_path_factory.mktemp(method), *TWO, "--method", method)
    )


def test_the_table_of_estimates_says_so(by_method: Callable[[str], Path]) -> None:
    exact, table = read(by_method("exact")), read(by_method("atp"))
    assert exact[["estimate", "n_screened"]].isna().all(axis=None)
    assert set(exact["method"]) == {"exact"} and set(table["method"]) == {"atp"}
    assert table["n_screened"].isna().all()
    assert (table["estimate"] - table["head_effect"]).abs().max() < 1e-9
    shared = ["sample_id", "layer", "head", "delta_logit_base"]
    assert table[shared].equals(exact[shared])
    assert (table["head_effect"] - exact["head_effect"]).abs().max() > 1e-3
    contrast = table["score_other_head"] - table["score_other_base"]
    contrast = table["score_a_head"] - table["score_a_base"] - contrast
    assert (table["effect_minus_other"] - contrast).abs().max() < 1e-9
    heads = read(by_method("atp"), HEADS)
    assert heads["above_noise"].isna().all() and len(heads) == 8
    assert record_of(by_method("atp"))["noise_floor"] is None


def test_the_log_warns_that_nothing_is_measured(by_method: Callable[[str], Path]) -> None:
    warned = "all effects here are by atp estimates, none is measured"
    assert warned in (by_method("atp") / "run.log").read_text()
    assert warned not in (by_method("exact") / "run.log").read_text()


def test_estimates_are_not_compared_with_measurements(
    by_method: Callable[[str], Path], tmp_path: Path, answer: Answer
) -> None:
    new = str(by_method("atp"))
    for method in ("exact", "ig"):
        argv = ["compare", new, str(by_method(method)), "--output_dir", str(tmp_path / "out")]
        refuses(answer, *argv, says=[f"has method {method}", "atp"])


def test_a_second_run_loads_no_weights_and_another_method_is_refused(
    by_method: Callable[[str], Path], llama: str, answer: Answer, monkeypatch: Patch
) -> None:
    folder = by_method("ig")
    before = [(folder / name).read_bytes() for name in (RESULTS, HEADS)]
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(llama, folder, *TWO, "--method", "ig")
    assert [(folder / name).read_bytes() for name in (RESULTS, HEADS)] == before
    argv = ["--model_id", llama, "--output_dir", str(folder), *TWO]
    refuses(answer, *argv, "--method", "relp", says=["--method ig, not relp"])
    refuses(answer, *argv, says=["--method ig, not exact"])


def test_interrupted_estimates_go_on(
    by_method: Callable[[str], Path], llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    estimate_tree, flags = tracing.estimate_tree, [*TWO, "--method", "atp", "--tree_tokens", "1"]
    fails = iter([False, True])

    def failing(*args: Any) -> Tensor:
        if next(fails):
            raise KeyboardInterrupt
        return estimate_tree(*args)

    monkeypatch.setattr(tracing, "estimate_tree", failing)
    with contextlib.suppress(KeyboardInterrupt):
        tracing.main(["--model_id", llama, "--output_dir", str(tmp_path), *flags])
    assert len(list((tmp_path / ".parts").glob("estimate-*.json"))) == 1
    fails = iter([False])
    table = read(finish(llama, tmp_path, *flags))
    assert next(fails, None) is None
    expected = read(by_method("atp"))["head_effect"]
    assert (table["head_effect"] - expected).abs().max() < 2e-5


# ----- refusals


@pytest.mark.parametrize("flags", ["--method atp", "--method ig", "--screen 3"])
@pytest.mark.parametrize("op", ["zero --positions last", "scale --factor 0 --positions last"])
def test_what_gradients_cannot_tell_is_refused_before_the_weights(
    flags: str, op: str, llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    argv = command_line(llama, tmp_path, *flags.split(), "--kind", "resid", "--op", *op.split())
    refuses(answer, *argv, says=[f"no --kind resid --op {op.split()[0]}"])


def test_all_neurons_are_estimated_but_not_measured(
    llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    argv = command_line(llama, tmp_path, "--kind", "neuron")
    refuses(answer, *argv, says=["--kind neuron and --neurons go together"])
    for flags in (["--method", "atp"], ["--screen", "2"]):
        estimates = prepared(llama, "--kind", "neuron", *flags, "--layers", "1")
        assert len(swept(estimates)) == 80


UNRULED = {  # with what is named
    "relu": ("llama", {"hidden_act": "relu"}, "LlamaMLP"),
    "layer norm": ("cohere", {}, "CohereLayerNorm"),
}


@pytest.mark.parametrize("case", UNRULED)
def test_a_model_without_rules_is_refused_by_relp_alone(
    case: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    architecture, widths, named = UNRULED[case]
    vocab = random_models.build_tokenizer(tmp_path)
    settings = {**random_models.WIDTHS, "vocab_size": vocab, **widths}
    config = AutoConfig.for_model(architecture, pad_token_id=None, **settings)
    config.architectures = [f"{architecture.capitalize()}ForCausalLM"]
    config.save_pretrained(tmp_path)
    argv = ["--model_id", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--no-bf16"]
    if case == "relu":
        tracing.check_trace(prepared(str(tmp_path), "--method", "atp"))
    refuses(answer, *argv, "--method", "relp", says=["--method relp has no rule for", named])


@pytest.mark.parametrize("option", ["--method atp", "--screen 4"])
def test_offloaded_weights_are_refused_before_anything_is_measured(
    option: str, llama: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, cpu = tracing.load_model, torch.device("cpu")
    monkeypatch.setattr(tracing, "load_model", lambda *a: cpu_offload(load(*a), cpu))
    for stage in ("measure", "unedited_samples"):
        monkeypatch.setattr(tracing, stage, lambda *_: pytest.fail("something was measured"))
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO, *option.split()]
    refuses(answer, *argv, says=[f"{option} needs weights at hand; some are offloaded"])


def test_an_estimate_is_not_resumed_past_a_self_test_that_was_not_passed(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Experiment) -> None:
        raise tracing.RunError("the self-test failed")

    monkeypatch.setattr(tracing, "self_test", fail)
    for _ in range(2):
        argv = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO, "--method", "atp"]
        assert tracing.main(argv) == 1
    assert not (tmp_path / RESULTS).exists()


def test_a_screens_method_may_change_in_its_folder(llama: str, tmp_path: Path) -> None:
    """What is measured does not depend on it."""
    flags = ["--num_samples", "2", "--screen", "2", "--layers", "0"]
    finish(llama, tmp_path / "one", *flags, "--method", "relp")
    for folder in ("one", "other"):
        finish(llama, tmp_path / folder, *flags)
    one, other = ((tmp_path / name / RESULTS).read_bytes() for name in ("one", "other"))
    assert one == other

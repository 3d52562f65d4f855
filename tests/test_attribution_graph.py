"""The attribution graph: conservation, a frozen model written anew, pruning by hand, the viewer."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import llama3_circuit_tracing as tracing
import naive
import random_models
from conftest import Answer, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import Component, Experiment
from test_interventions import SAMPLES, Bench, bench, hooks_of, pair

CLOSE = 1e-4
GRAPH = "circuit_graph.csv"
EDGES = "circuit_graph_edges.csv"
FAST = ["--num_samples", "2", "--no-bf16"]
REST = ["attn-rest", "mlp-rest"]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")
Build = Callable[..., str]
Explained = tuple[pd.DataFrame, Tensor, Tensor]  # nodes, weights, the goal's direction


def graph(model: str, folder: Path, *flags: str) -> Path:
    """The folder of a graph of two samples."""
    return finish(model, folder, "graph", *FAST, *flags)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "tiny"])
def any_bench(request: Any, folder_of: Build) -> Bench:
    """The models that have no post-norms."""
    return bench(folder_of(request.param))


@pytest.fixture(scope="module")
def plain(llama: str) -> Bench:
    return bench(llama)


def prompt_ids(bench: Bench) -> list[int]:
    return naive.prompt_ids(bench.loaded[1], "Don't mention apple. Name a fruit.")


def explained(bench: Bench, n_best: int = 60, n_tokens: int = 100) -> Explained:
    """The graph of one token's logit less the mean, after the first tokens of a prompt."""
    direction = tracing.goal_direction(bench.traced, {7: 1.0})
    ids = prompt_ids(bench)[:n_tokens]
    halves = tracing.run_half_blocks(bench.traced, ids)
    run = tracing.LinearRun(bench.traced, ids, halves, direction)
    return *tracing.attribute(run, n_best), direction


def experiment(bench: Bench, flags: str = "", records: Sequence[Any] = SAMPLES) -> Experiment[Any]:
    """That of the command graph, around a model that is loaded."""
    samples = write_samples(Path(bench.folder, "graph_samples.jsonl"), *records)
    argv = ["graph", "--model_id", bench.folder, "--no-bf16", "--samples", samples]
    argv += ["--output_dir", "nowhere"]  # outputs/run may hold another experiment
    options = tracing.parse_command_line([*argv, *flags.split()]).options
    folder = tracing.RunFolder(Path(bench.folder))
    exp = tracing.prepare(options, folder, tracing.Processes())
    exp.traced = bench.traced
    return exp


# ----- identities


@torch.no_grad()
def margin(model: Any, ids: list[int], token: int) -> float:
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return float(logits[token] - logits.mean())


@pytest.mark.parametrize(("n_best", "n_tokens"), [(1, 100), (60, 100), (10**6, 2)])
def test_into_and_out_of_a_node_flows_its_attribution(
    any_bench: Bench, n_best: int, n_tokens: int
) -> None:
    nodes, weights, _ = explained(any_bench, n_best, n_tokens)
    attribution = torch.tensor(nodes["attribution"])
    scale = attribution.abs().max()
    first, n = (nodes["kind"] == "embedding").sum(), len(nodes)
    assert (weights.sum(1) - attribution)[first:].abs().max() < CLOSE * scale
    assert (weights.sum(0) - attribution)[: n - 1].abs().max() < CLOSE * scale
    assert not weights[:first].any()
    assert not weights.triu().any()
    assert tracing.conservation_error(nodes, weights) < CLOSE / 10


def test_the_goal_is_the_logit_and_passes_every_layer_whole(any_bench: Bench) -> None:
    """What crosses a line between half-blocks adds up to it."""
    nodes, weights, _ = explained(any_bench)
    logit = margin(any_bench.loaded[0], prompt_ids(any_bench), 7)
    depth = [
        (layer, ["", "head", "attn-rest", "neuron", "mlp-rest"].index(kind) + 1 >> 1)
        if kind not in ("embedding", "goal")
        else (layer - (kind == "embedding"), 0)
        for layer, kind in nodes[["layer", "kind"]].to_numpy()
    ]
    assert depth == sorted(depth)
    cuts = [i for i in range(1, len(depth)) if depth[i] != depth[i - 1]]
    assert len(cuts) == 2 * any_bench.traced.shape.n_layers + 1
    for cut in cuts:
        assert float(weights[cut:, :cut].sum()) == pytest.approx(logit, rel=CLOSE, abs=CLOSE)
    embeddings = nodes["attribution"][nodes["kind"] == "embedding"].sum()
    assert embeddings == pytest.approx(logit, rel=CLOSE, abs=CLOSE)
    assert nodes["attribution"].iloc[-1] == pytest.approx(logit, rel=CLOSE)


def test_the_nodes_are_the_strongest_and_of_each_half_block_the_rest(plain: Bench) -> None:
    n, shape = 5, plain.traced.shape
    few, all_ = explained(plain, 30, n)[0], explained(plain, 10**6, n)[0]
    assert len(all_) == n * (1 + shape.n_layers * (shape.n_heads + shape.d_mlp + 2)) + 1
    of_few, of_all = (
        nodes[nodes["kind"].isin(["head", "neuron"])].set_index(
            ["kind", "layer", "index", "position"]
        )["attribution"]
        for nodes in (few, all_)
    )
    best = of_all.sort_values(key=abs, ascending=False).head(30)
    assert of_all.index.is_unique and set(of_few.index) == set(best.index)
    assert (of_few - best).abs().max() < 1e-6
    assert all_.loc[all_["kind"].isin(REST), "attribution"].abs().max() == 0
    left = of_all.drop(best.index).groupby(["kind", "layer", "position"]).sum()
    for rest, kind in zip(REST, ["head", "neuron"], strict=True):
        told = few[few["kind"] == rest].set_index(["layer", "position"])["attribution"]
        assert (told - left[kind].reindex(told.index, fill_value=0.0)).abs().max() < 1e-5
        assert len(told) == n * shape.n_layers


# ----- a Llama with constant norms, patterns and slopes, written without hooks


class Frozen:
    """Each half-block as a linear function of the residual stream [tok, d_model], in float64."""

    def __init__(self, model: Any, ids: list[int], direction: Tensor) -> None:
        self.blocks = model.double().model.layers
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True)
        self.patterns = [pattern[0] for pattern in out.attentions]  # [head, tok, tok]
        self.scales: dict[Any, Tensor] = {}
        self.slopes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.made: dict[Any, Tensor] = {}  # [tok, head * d_head] or [tok, neuron]
        x = self.embedding = model.get_input_embeddings().weight[ids].requires_grad_()
        for layer, block in enumerate(self.blocks):
            self.scales[layer, "head"] = self.scale(x, block.input_layernorm)
            self.made[layer, "head"] = self.half(layer, "head", x)
            x = x + self.made[layer, "head"] @ block.self_attn.o_proj.weight.T
            self.scales[layer, "neuron"] = self.scale(x, block.post_attention_layernorm)
            read = x.detach() * self.scales[layer, "neuron"]
            gate, up = (read @ getattr(block.mlp, f"{n}_proj").weight.T for n in ("gate", "up"))
            self.slopes[layer] = nn.functional.silu(gate) / gate, nn.functional.silu(gate), up
            self.made[layer, "neuron"] = self.half(layer, "neuron", x)
            x = x + self.made[layer, "neuron"] @ block.mlp.down_proj.weight.T
        self.goal_scale = self.scale(x, model.model.norm)[-1] * direction.double()
        self.goal = x[-1] @ self.goal_scale
        gradients = torch.autograd.grad(self.goal, [self.embedding, *self.made.values()])
        self.gradients = dict(zip(["embedding", *self.made], gradients, strict=True))

    def scale(self, x: Tensor, norm: Any) -> Tensor:
        mean_square = x.detach().square().mean(-1, keepdim=True)
        return norm.weight / (mean_square + norm.variance_epsilon).sqrt()

    def half(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """What a half-block makes; of a neuron half along the gate, half along up."""
        read, block = x * self.scales[layer, kind], self.blocks[layer]
        if kind == "neuron":
            slope, act, up = self.slopes[layer]
            gates, ups = read @ block.mlp.gate_proj.weight.T, read @ block.mlp.up_proj.weight.T
            return (slope * gates * up + act * ups) / 2
        pattern = self.patterns[layer]
        values = (read @ block.self_attn.v_proj.weight.T).unflatten(-1, (-1, 16))
        shared = pattern.shape[0] // values.shape[1]
        mixed = [pattern[h] @ values[:, h // shared] for h in range(pattern.shape[0])]
        return torch.cat(mixed, -1)

    def span(self, node: Any) -> slice:
        width = 16 if node.kind == "head" else 1
        return slice(node.index * width, (node.index + 1) * width)

    def written(self, node: Any) -> Tensor:
        """[tok, d_model], what a node adds to the residual stream."""
        made = self.made.get((node.layer, node.kind), self.embedding).detach()
        place = node.position, self.span(node) if node.kind != "embedding" else slice(None)
        alone, block = torch.zeros_like(made), self.blocks[node.layer]
        alone[place] = made[place]
        if node.kind == "embedding":
            return alone
        of = block.self_attn.o_proj if node.kind == "head" else block.mlp.down_proj
        return alone @ of.weight.T


@pytest.fixture(scope="module")
def frozen(plain: Bench) -> Frozen:
    model = naive.load(plain.folder)[0].requires_grad_(False)
    return Frozen(model, prompt_ids(plain), explained(plain)[2])


def test_attributions_are_those_of_the_frozen_model(plain: Bench, frozen: Frozen) -> None:
    nodes, made, gradients = explained(plain)[0], frozen.made, frozen.gradients
    logit = margin(plain.loaded[0], prompt_ids(plain), 7)
    assert float(frozen.goal) == pytest.approx(logit, abs=1e-4)
    for node in nodes[nodes["kind"].isin(["head", "neuron"])].itertuples():
        at = (node.layer, node.kind)
        expected = (made[at] * gradients[at])[node.position, frozen.span(node)].sum()
        assert node.attribution == pytest.approx(float(expected), abs=CLOSE)
    told = nodes["attribution"][nodes["kind"] == "embedding"].tolist()
    expected = (frozen.embedding * gradients["embedding"]).sum(-1)
    assert told == pytest.approx(expected.tolist(), abs=CLOSE)


def test_an_edge_is_what_a_target_lacks_without_the_source(plain: Bench, frozen: Frozen) -> None:
    """The source's output is taken from what the target's half-block reads, and from nothing else;
    what the target then makes less of counts by the gradient there."""
    nodes, weights, _ = explained(plain)
    inner = nodes[nodes["kind"].isin(["head", "neuron"])]
    sources = [*nodes[nodes["kind"] == "embedding"].itertuples(), *inner.itertuples()]
    checked = 0
    for source, target in itertools.product(sources, inner.itertuples()):
        # within a layer as in the alphabet: embedding, head, neuron
        before = (source.layer, source.kind) < (target.layer, target.kind)
        if not before or (source.Index + target.Index) % 7:
            assert before or weights[target.Index, source.Index] == 0
            continue
        at, place = (target.layer, target.kind), (target.position, frozen.span(target))
        lost = frozen.half(*at, frozen.written(source))  # it is linear
        expected = float((lost * frozen.gradients[at])[place].sum())
        assert float(weights[target.Index, source.Index]) == pytest.approx(expected, abs=CLOSE)
        checked += expected != 0
    assert checked > 20
    for source in sources:
        seen = frozen.written(source)[-1] @ frozen.goal_scale
        assert float(weights[-1, source.Index]) == pytest.approx(float(seen), abs=CLOSE)


# ----- the goal


def goal_of(exp: Experiment[Any], logits: Tensor) -> dict[int, float]:
    return tracing.goal_weights(exp, exp.prompts[0][0], logits)


def test_a_suppressed_words_forms_share_its_part(plain: Bench) -> None:
    exp = experiment(plain, records=[pair("Say no.", "Say it.", "apple", "dog")])
    words = [[form[0] for form in forms] for forms in exp.prompts[0][0].forms]
    logits = torch.zeros(exp.shape.vocab)
    logits[words[0][0]] = math.log(3)
    found = goal_of(exp, logits)
    assert found[words[0][0]] == pytest.approx(0.5 * 3 / (2 + len(set(words[0]))))
    assert sum(found.values()) == pytest.approx(1)
    for of_word in words:
        assert sum(found[token] for token in set(of_word)) == pytest.approx(0.5)


def test_targets_count_against_foils_by_their_probabilities(plain: Bench) -> None:
    record = pair("Say no.", "Say it.", "apple") | {"foils": ["dog", "cat"]}
    exp = experiment(plain, "--task contrast", [record])
    forms = exp.prompts[0][0].forms
    targets, foils = {form[0] for form in forms[0]}, {f[0] for word in forms[1:] for f in word}
    logits = torch.randn(exp.shape.vocab, generator=torch.Generator().manual_seed(0))
    found, odds = goal_of(exp, logits), logits.exp()
    assert set(found) == targets ^ foils
    for tokens, sign in ((targets - foils, 1), (foils - targets, -1)):
        total = float(sum(odds[token] for token in tokens))
        for token in tokens:
            assert found[token] == pytest.approx(sign * float(odds[token]) / total, abs=1e-5)
    direction, matrix = tracing.goal_direction(plain.traced, found), plain.traced.unembedding.weight
    expected = sum(weight * matrix[token] for token, weight in found.items())
    assert (direction - expected).abs().max() < 1e-5


def test_the_mean_of_all_logits_goes_off_a_goal_without_foils(plain: Bench) -> None:
    matrix = plain.traced.unembedding.weight
    direction = tracing.goal_direction(plain.traced, {3: 0.25, 5: 0.75})
    expected = 0.25 * matrix[3] + 0.75 * matrix[5] - matrix.mean(0)
    assert (direction - expected).abs().max() < 1e-5
    top = experiment(plain, "--goal top")
    assert goal_of(top, torch.arange(9.0)) == {8: 1.0}


def test_words_that_begin_alike_are_refused(plain: Bench, caplog: pytest.LogCaptureFixture) -> None:
    record = pair("Say no.", "Say it.", "apple") | {"foils": ["dog"]}
    exp, logits = experiment(plain, "--task contrast", [record]), torch.zeros(9)
    prompt = replace(exp.prompts[0][0], forms=(((1, 2), (3,)), ((1, 4), (5,))))
    with caplog.at_level("WARNING", "circuit"):
        assert tracing.goal_weights(exp, prompt, logits) == {3: 1.0, 5: -1.0}
    assert "may begin with" in caplog.text
    prompt = replace(prompt, forms=(((1, 2),), ((1, 4),)))
    with pytest.raises(tracing.UsageError, match="begin with the same tokens; give --goal top"):
        tracing.goal_weights(exp, prompt, logits)


# ----- pruning

FIVE = pd.DataFrame({"kind": ["embedding", "head", "head", "mlp-rest", "goal"]})
# [target, source]: of the goal half is the first head's, a quarter each the second's and the rest's
WEIGHTS = torch.tensor(
    [[0.0, 0, 0, 0, 0], [2, 0, 0, 0, 0], [-1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 2, -1, 1, 0]]
)


def pruned(node: float, edge: float) -> tuple[pd.DataFrame, list[tuple[int, int]]]:
    options = tracing.GraphOptions(node_threshold=node, edge_threshold=edge)
    nodes, edges = tracing.prune(FIVE, WEIGHTS, options)
    return nodes, sorted(map(tuple, edges.nonzero().tolist()))


def test_influence_and_thresholds_of_five_nodes_by_hand() -> None:
    nodes, _ = pruned(1.0, 1.0)
    # by all paths: the embedding 7/8 through the first head and 1/8 through the second
    influence = [1.0, 0.5 + 0.25 / 2 + 0.25, 0.25, 0.25, 0.0]
    assert nodes["influence"].tolist() == pytest.approx(influence)
    total = sum(influence)
    cumulative = [1 / total, 1.875 / total, 2.125 / total, 1.0, 1.0]
    assert nodes["cumulative"].tolist()[:2] == pytest.approx(cumulative[:2])
    assert sorted(nodes["cumulative"].tolist()[2:4]) == pytest.approx(cumulative[2:4])
    assert nodes["kept"].all()
    assert pruned(1.0, 1.0)[1] == [(1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (4, 2), (4, 3)]
    # 1.875 / 2.375 = 0.789: up to there the first head is enough
    nodes, edges = pruned(0.78, 1.0)
    assert nodes["kept"].tolist() == [True, True, False, False, True]
    assert edges == [(1, 0), (4, 1)]
    assert pruned(0.8, 1.0)[0]["kept"].all()  # both others are as strong


def test_a_head_without_an_edge_goes_and_what_hung_on_it_too() -> None:
    """Edge scores: 1-0 .875, 4-1 .5, 4-2 and 4-3 .25, 3-1 .25, 2-0 and 2-1 .125; together 2.375."""
    nodes, edges = pruned(1.0, 0.6)  # .875 + .5 = 1.375 of 2.375 is less, one of .25 more is enough
    assert edges == [(1, 0), (3, 1), (4, 1), (4, 3)]
    assert nodes["kept"].tolist() == [True, True, False, True, True]  # nothing comes to the second
    nodes, edges = pruned(1.0, 0.5)
    assert edges == [(1, 0), (4, 1)]
    assert nodes["kept"].tolist() == [True, True, False, False, True]


def test_scores_of_five_nodes_by_hand() -> None:
    """The rest is an end: 1/4 of all comes from it; to the embedding go .625 by the first head and
    .125 by the second. Of the goal's inputs 1/4 is the rest's, of no other's."""
    found = tracing.graph_scores(FIVE, WEIGHTS)
    assert found["replacement_score"] == pytest.approx(0.75 / (0.75 + 0.25))
    influence = 0.75 + 0.625 + 0.25 + 0.25
    assert found["completeness_score"] == pytest.approx((influence + 0.75) / (influence + 1))


def peer(name: str, patch: Patch) -> ModuleType:
    """A module of circuit-tracer without the packages that its others need."""
    spec = importlib.util.find_spec("circuit_tracer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("circuit-tracer 0.5.0 is not installed")
    names = ["LogitTarget", "get_default_device", "UnifiedConfig"]
    stub: Any = ModuleType("stub")
    vars(stub).update(dict.fromkeys([*names, "convert_nnsight_config_to_transformerlens"], object))
    for of in ("", ".attribution", ".attribution.targets", ".utils", ".utils.tl_nnsight_mapping"):
        patch.setitem(sys.modules, f"circuit_tracer{of}", stub)
    path = Path(spec.submodule_search_locations[0], *name.split(".")).with_suffix(".py")
    of_file = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert of_file is not None and of_file.loader is not None
    module = importlib.util.module_from_spec(of_file)
    patch.setitem(sys.modules, module.__name__, module)
    of_file.loader.exec_module(module)
    return module


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.7), (0.95, 0.9)])
def test_what_is_kept_is_what_circuit_tracer_keeps(
    any_bench: Bench, thresholds: tuple[float, float], monkeypatch: Patch
) -> None:
    module = peer("graph", monkeypatch)
    nodes, weights, _ = explained(any_bench)
    # theirs come in another order: heads and neurons, rests, embeddings, the goal
    kinds = [["head", "neuron"], REST, ["embedding"], ["goal"]]
    order = torch.cat([torch.tensor(nodes.index[nodes["kind"].isin(of)]) for of in kinds])
    n_tokens, n_layers = len(prompt_ids(any_bench)), any_bench.traced.shape.n_layers
    graph = SimpleNamespace(
        adjacency_matrix=weights[order][:, order],
        input_tokens=range(n_tokens),
        logit_targets=[None],
        logit_probabilities=torch.ones(1),
        selected_features=range(len(nodes) - n_tokens * (2 * n_layers + 1) - 1),
        cfg=SimpleNamespace(n_layers=2 * n_layers),  # rests per token
    )
    theirs = module.prune_graph(graph, *thresholds)
    options = tracing.GraphOptions(node_threshold=thresholds[0], edge_threshold=thresholds[1])
    ours, edges = tracing.prune(nodes, weights, options)
    assert torch.equal(torch.tensor(ours["kept"].to_numpy())[order], theirs.node_mask)
    assert torch.equal(edges[order][:, order], theirs.edge_mask)
    assert 0 < int(edges.sum()) < int((weights != 0).sum())
    cumulative = torch.tensor(ours["cumulative"].to_numpy())[order]  # the goal comes last
    assert (cumulative - theirs.cumulative_scores)[:-1].abs().median() < 1e-5
    is_rest = torch.tensor(nodes["kind"].isin(REST).to_numpy())[order]
    graph.adjacency_matrix = graph.adjacency_matrix * ~is_rest[:, None]
    scores = tracing.graph_scores(nodes, weights)
    assert list(scores.values()) == pytest.approx(module.compute_graph_scores(graph), abs=1e-5)


# ----- exact effects


def zeroing(model: Any, layer: int, head: int, position: int) -> tuple[Any, naive.Replace]:
    span = naive.span_of(model, layer, "head", head)
    return naive.module_of(model, layer, "head"), naive.zero_slice(span, position)


def goal_in(model: Any, ids: list[int], weights: dict[int, float]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    total = sum(weight * float(logits[token]) for token, weight in weights.items())
    return total - round(sum(weights.values())) * float(logits.mean())


@pytest.fixture(scope="module")
def run(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a prompt in a folder that has a trace, whose record tells of its samples."""
    folder = tmp_path_factory.mktemp("graph")
    finish(tiny_llama, folder, *FAST, "--layers", "0", "--heads", "0")
    return graph(tiny_llama, folder, "--sample", "s0001", "--node_threshold", "0.95")


def summary_of(folder: Path) -> dict[str, Any]:
    """What run.json says of the last graph."""
    return dict(record_of(folder)["commands"]["graph"]["graph"])


def told_of(folder: Path) -> tuple[Any, list[int], dict[int, float]]:
    """The run's model, the ids of its prompt, and what each token counts in its goal."""
    record = record_of(folder)
    model, tokenizer = naive.load(record["experiment"]["options"]["model_id"])
    (sample,) = [s for s in record["samples"] if s["sample_id"] == "s0001"]
    prompt, weights = sample["prompts"]["a"], dict[int, float]()
    ids = tokenizer(prompt["text"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    for word in sample["targets"]:
        tokens = sorted({form["ids"][0] for form in prompt["forms"][word]})
        for token, p in zip(tokens, logits[tokens].softmax(-1).tolist(), strict=True):
            weights[token] = weights.get(token, 0.0) + p / len(sample["targets"])
    return model, ids, weights


def test_exact_effects_are_those_of_a_plain_hook_at_one_token(run: Path) -> None:
    (model, *goal), nodes = told_of(run), read(run, GRAPH)
    base = goal_in(model, *goal)
    assert summary_of(run)["goal_value"] == pytest.approx(base, abs=CLOSE)
    heads = nodes[nodes["kind"] == "head"]
    expected = set()
    for column in ("attribution", "gradient"):
        expected |= set(heads.sort_values(column, key=abs, ascending=False).index[:10])
    measured = heads[heads["exact_effect"].notna()]
    assert set(nodes.index[nodes["exact_effect"].notna()]) == expected
    for node in measured.itertuples():
        with naive.hooked(*zeroing(model, node.layer, node.index, node.position)):
            lost = base - goal_in(model, *goal)
        assert node.exact_effect == pytest.approx(lost, abs=CLOSE)
    assert heads["exact_effect"].abs().max() > 0.5


def test_a_gradient_is_the_goals_slope_as_a_head_is_scaled(run: Path) -> None:
    """By central differences: norms and attention patterns move with the head."""
    (model, ids, weights), nodes = told_of(run), read(run, GRAPH)
    model = model.double()
    heads = nodes[nodes["kind"] == "head"]
    assert nodes["gradient"].isna().tolist() == (nodes["kind"] != "head").tolist()
    step = 0.01  # norms compute in float32, whatever the model's dtype
    for node in heads.sort_values("gradient", key=abs, ascending=False)[::6].itertuples():
        span = naive.span_of(model, node.layer, "head", node.index)
        goals = []
        for factor in (1 + step, 1 - step):

            def scale(x: Tensor, node: Any = node, span: Any = span, by: float = factor) -> Tensor:
                y = x.clone()
                y[:, node.position, span] *= by
                return y

            with naive.hooked(naive.module_of(model, node.layer, "head"), scale):
                goals.append(goal_in(model, ids, weights))
        slope = (goals[0] - goals[1]) / (2 * step)
        assert node.gradient == pytest.approx(slope, abs=5e-4)
    assert (heads["gradient"] - heads["attribution"]).abs().max() > 0.1


def test_a_gradient_that_is_not_finite_is_an_error(plain: Bench) -> None:
    ids = prompt_ids(plain)
    halves = tracing.run_half_blocks(plain.traced, ids)
    direction = tracing.goal_direction(plain.traced, {7: 1.0}) * math.nan
    linear_run = tracing.LinearRun(plain.traced, ids, halves, direction)
    with pytest.raises(tracing.RunError, match="a gradient is not finite"):
        tracing.true_gradients(linear_run)


def test_heads_are_measured_by_either_of_two_sizes() -> None:
    """Of 30 heads the ten first have the largest attributions, the ten last the largest gradients;
    the sign is of no account."""
    heads = pd.DataFrame({"attribution": range(30, 0, -1), "gradient": range(30)}, range(5, 35))
    heads.loc[::2, ["attribution", "gradient"]] *= -1
    chosen = tracing.heads_to_measure(heads)
    assert chosen.index.tolist() == [*range(5, 15), *range(25, 35)]
    assert len(tracing.heads_to_measure(heads.assign(gradient=heads["attribution"]))) == 10
    assert len(tracing.heads_to_measure(heads[:3])) == 3


def test_the_strongest_head_is_told_first_even_if_its_attribution_is_small(
    tiny_llama: str, tmp_path: Path
) -> None:
    """Here neither the five largest attributions nor the five largest gradients have it, and the
    graph is poor for it."""
    words = ["--task", "odd_one_out", "--sample", "s0001"]
    folder = graph(tiny_llama, tmp_path, *words)
    nodes, summary = read(folder, GRAPH), summary_of(folder)
    measured = nodes.dropna(subset="exact_effect")
    ordered = measured.sort_values("exact_effect", key=abs, ascending=False)
    strongest = ordered.iloc[0]
    for column in ("attribution", "gradient"):
        assert strongest.name not in measured[column].abs().nlargest(5).index
        assert abs(strongest["exact_effect"]) > 4 * abs(strongest[column])
    sentences = told_by(folder)
    lines = [line for line in sentences if "zeroing it takes" in line]
    for line, node in zip(lines, ordered.head(5).itertuples(), strict=True):
        assert line.startswith(f"L{node.layer}H{node.index} at token {node.position} ")
        assert f"takes {node.exact_effect:+.3f} from" in line
    assert (summary["heads_alike"], summary["heads_measured"]) == (len(measured), len(measured))
    assert summary["heads_r"] < 0.8
    assert summary["verdict"] == "poor"
    (level,) = (
        entry["level"]
        for entry in record_of(folder)["commands"]["graph"]["findings"]
        if entry["text"].startswith("a poor graph: replacement score 0.9")
    )
    assert level == "warning"


def told_by(folder: Path) -> list[str]:
    """The sentences of the last graph."""
    return [entry["text"] for entry in record_of(folder)["commands"]["graph"]["findings"]]


# of how many measured heads how many have the sign of their attribution, and further the effects
JUDGED: dict[str, tuple[float, list[float], list[float], str]] = {
    "all agree": (0.5, [1, 2, 3, -1, -2], [1, 2, 3, -1, -2], "supported"),
    "four of five agree": (0.9, [1, 2, 3, 0.1, -2], [1, 2, 3, -0.1, -2], "supported"),
    "three of four agree": (0.9, [9, 8, 7, 0.1], [9, 8, 7, -0.1], "poor"),
    "rests have most": (0.499, [1, 2, 3, -1, -2], [1, 2, 3, -1, -2], "poor"),
    "the order differs": (0.9, [1, 2, 3, 4, 5], [1, 2, 3, 4, 1], "poor"),
    "two say nothing of r": (0.9, [1, 2], [2, 1], "supported"),
    "one of the wrong sign": (0.9, [1], [-1], "poor"),
    "no head": (0.9, [], [], "unmeasured"),
    "no head, and rests have most": (0.06, [], [], "poor"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_graph_is_judged_by_its_rests_and_its_measured_heads(name: str) -> None:
    score, attributions, effects, verdict = JUDGED[name]
    nodes = pd.DataFrame({"attribution": [*attributions, 9.0], "exact_effect": [*effects, None]})
    nodes = nodes.astype(float)
    summary = {"replacement_score": score}
    summary |= tracing.judge_graph(tracing.Graph(nodes, pd.DataFrame(), summary))
    assert summary["verdict"] == verdict
    assert summary["heads_measured"] == len(effects)
    n_alike = sum(a * b > 0 for a, b in zip(attributions, effects, strict=True))
    assert summary["heads_alike"] == n_alike
    json.dumps(summary, allow_nan=False)
    if len(effects) < 3:
        assert summary["heads_r"] is None
    else:
        assert summary["heads_r"] == pytest.approx(np.corrcoef(attributions, effects)[0, 1])
    findings = tracing.Findings()
    tracing.report_verdict(findings, summary)
    (entry,) = findings.entries
    assert (entry["level"] == "warning") == (verdict == "poor")
    assert f"replacement score {score:.2f}" in entry["text"]
    if effects:
        assert f"{n_alike} of {len(effects)} measured heads have the sign" in entry["text"]
    assert "nan" not in entry["text"].lower()


def test_words_of_several_tokens_are_told(plain: Bench) -> None:
    exp = experiment(plain, records=[pair("Say no.", "Say it.", "apple", "dog")])
    prompt = exp.prompts[0][0]
    prompt = replace(prompt, forms=(((1,), (2,)), ((3,), (4, 5))))
    assert tracing.words_by_first_token(exp, prompt) == ["dog"]
    top = experiment(plain, "--goal top", [pair("Say no.", "Say it.", "apple", "dog")])
    assert tracing.words_by_first_token(top, prompt) == []


def test_exact_effects_of_edges_are_those_of_two_plain_forwards(run: Path) -> None:
    """The first holds all above the source but for what the target takes of it; the second writes
    that into the target."""
    (model, *goal), edges = told_of(run), read(run, EDGES)
    nodes, base = read(run, GRAPH).set_index("node_id"), goal_in(model, *goal)
    halves = itertools.product(range(len(naive.layers_of(model))), ("head", "mlp"))
    clean = {at: naive.input_of(model, goal[0], *at)[None] for at in halves}
    ends = (nodes["kind"][edges[end]].to_numpy() == "head" for end in ("source", "target"))
    between = edges[np.logical_and(*ends)]
    measured = between.sort_values("weight", key=abs, ascending=False).head(10)
    assert set(measured.index) == set(edges.index[edges["exact_effect"].notna()])
    assert len(measured) > 3
    for edge in measured.itertuples():
        source, target = nodes.loc[edge.source], nodes.loc[edge.target]
        seen: dict[Any, Tensor] = {}

        def hold(x: Tensor, at: Any, seen: Any = seen) -> Tensor:
            seen[at] = x.clone()
            return clean[at]

        above = [at for at in clean if at > (source["layer"], "head")]
        changes = [(naive.module_of(model, *at), partial(hold, at=at)) for at in above]
        sender = zeroing(model, source["layer"], source["index"], source["position"])
        with naive.all_hooked([sender, *changes]):
            goal_in(model, *goal)
        at = target["layer"], "head"
        place = (0, target["position"], naive.span_of(model, *at, target["index"]))

        def write(x: Tensor, place: Any = place, received: Any = seen[at]) -> Tensor:
            y = x.clone()
            y[place] = received[place]
            return y

        with naive.hooked(naive.module_of(model, *at), write):
            lost = base - goal_in(model, *goal)
        assert edge.exact_effect == pytest.approx(lost, abs=CLOSE)


# ----- files


def graph_json(folder: Path) -> dict[str, Any]:
    (path,) = (path for path in (folder / "graphs").iterdir() if "metadata" not in path.name)
    return dict(json.loads(path.read_text()))


def test_the_viewers_file_holds_the_kept_nodes_and_edges(run: Path) -> None:
    graph, nodes, edges = graph_json(run), read(run, GRAPH), read(run, EDGES)
    kept = nodes[nodes["kept"]]
    assert [node["node_id"] for node in graph["nodes"]] == kept["node_id"].tolist()
    assert nodes["node_id"].is_unique
    ends = {edge[end] for edge in graph["links"] for end in ("source", "target")}
    assert ends <= set(kept["node_id"])
    assert len(graph["links"]) == len(edges) == summary_of(run)["edges_kept"] > 50
    assert list(edges) == ["source", "target", "weight", "exact_effect"]
    assert not any("gradient" in node for node in graph["nodes"]), "the viewer knows no such field"
    for link, edge in zip(graph["links"], edges.itertuples(), strict=True):
        assert (link["source"], link["target"]) == (edge.source, edge.target)
        assert link["weight"] == pytest.approx(edge.weight)
    metadata = json.loads((run / "graphs" / "graph-metadata.json").read_text())
    assert metadata == {"graphs": [graph["metadata"]]}
    assert (run / "graphs" / f"{graph['metadata']['slug']}.json").exists()


def test_the_viewer_draws_it(run: Path) -> None:
    """What its scripts trip over: see the fields that they read."""
    graph, record = graph_json(run), summary_of(run)
    by_kind = read(run, GRAPH).set_index("node_id")["kind"]
    _, ids, weights = told_of(run)
    assert len(graph["metadata"]["prompt_tokens"]) == len(ids)
    assert "".join(graph["metadata"]["prompt_tokens"]) == graph["metadata"]["prompt"]
    assert not graph["metadata"]["scan"].startswith("custom-")
    assert set(graph["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    threshold = graph["metadata"]["node_threshold"]
    seen = set()
    for node in graph["nodes"]:
        kind, (layer, number, position) = by_kind[node["node_id"]], node["node_id"].split("_")
        place = (node["layer"], node["feature"], node["ctx_idx"])
        assert place not in seen
        seen.add(place)
        assert position == str(node["ctx_idx"])
        assert layer == node["layer"]
        assert node["feature_type"] != "cross layer transcoder"
        assert ("error" in node["feature_type"]) == (kind in REST)
        assert (node["feature_type"] == "logit") == (kind == "goal")
        if kind not in ("embedding", "goal"):
            assert node["influence"] <= threshold
        if kind in ("head", "neuron"):
            x, y = int(layer), int(number)
            assert node["feature"] == (x + y) * (x + y + 1) // 2 + y
            assert (y < 8) == (kind == "head")
            named = f"L{x}H{y}" if kind == "head" else f"L{x}N{y - 8}"
            token = graph["metadata"]["prompt_tokens"][node["ctx_idx"]]
            assert node["clerp"] == f"{named} {token}"
        if kind == "embedding":
            assert node["node_id"] == f"E_{ids[node['ctx_idx']]}_{node['ctx_idx']}"
    (goal,) = (node for node in graph["nodes"] if node["feature_type"] == "logit")
    assert f"(p={record['p']:.3f})" in goal["clerp"]
    assert goal["token_prob"] == pytest.approx(record["p"])
    assert goal["is_target_logit"]
    assert goal["layer"] == "5"  # of four layers: one above the last block
    assert goal["node_id"] == f"5_{max(weights, key=lambda token: weights[token])}_{len(ids) - 1}"


def test_the_file_passes_circuit_tracers_model(run: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("pydantic")
    model = peer("frontend.graph_models", monkeypatch).Model.model_validate(graph_json(run))
    assert model.metadata.schema_version == 1


def test_no_two_nodes_are_named_alike(plain: Bench) -> None:
    """circuit-tracer calls error nodes 0_{layer}_{position}, like head {layer} of layer 0."""
    exp = experiment(plain)
    named = tracing.name_nodes(explained(plain, 10**6, 2)[0], exp, exp.prompts[0][0], 7)
    assert named["node_id"].is_unique
    assert not named.duplicated(["stratum", "feature", "position"]).any()


# ----- the command line


def test_the_tables_the_record_and_the_log_tell_of_one_graph(run: Path) -> None:
    nodes, told = read(run, GRAPH), summary_of(run)
    columns = "node_id kind layer index position token attribution gradient influence kept "
    assert list(nodes) == (columns + "exact_effect").split()
    assert told["nodes"] == len(nodes)
    assert told["nodes_kept"] == nodes["kept"].sum()
    assert told["conservation_error"] < 1e-5
    assert 0.5 < told["replacement_score"] < told["completeness_score"] <= 1
    log = (run / "run.log").read_text()
    assert f"goal: {told['goal']}, at the last token: {told['goal_value']:+.4f}" in log
    assert "less the mean of all logits" in log
    assert "attention patterns and slopes are constants" in log
    assert "not the effect of cutting it" in log
    heads = nodes.dropna(subset="exact_effect")
    assert f"measured: {len(heads)} heads, those of the largest attribution and" in log
    best = heads.sort_values("exact_effect", key=abs, ascending=False)
    for node in best.head(5).itertuples():
        name = f"{Component(node.layer, 'head', node.index).label} at token {node.position}"
        effect = f"{name} {node.token!r}: zeroing it takes {node.exact_effect:+.3f} from the goal"
        estimates = f"attribution {node.attribution:+.3f}, gradient {node.gradient:+.3f}"
        assert f"{effect}; {estimates}" in log
    for column in ("attribution", "gradient"):
        same = (heads[column] * heads["exact_effect"] > 0).sum()
        r = heads[column].corr(heads["exact_effect"])
        verb = "measured heads" if column == "attribution" else "heads, zeroed,"
        assert f"{same} of {len(heads)} {verb} have the sign of their {column}, r {r:.2f}" in log
    assert told["verdict"] == "supported"
    assert "the graph is supported by its heads: replacement score 0.9" in log
    words = told["words_by_first_token"]
    assert ("words of several tokens count by their first token" in log) == bool(words)
    assert f"circuit-tracer start-server --graph_file_dir {run / 'graphs'} --port 8032" in log
    assert (run / "circuit_graph.png").stat().st_size > 1000


def test_a_later_trace_leaves_the_graph_alone(llama: str, tmp_path: Path) -> None:
    graph(llama, tmp_path, "--sample", "s0000:b", "--goal", "top")
    summary = summary_of(tmp_path)
    assert (summary["sample_id"], summary["side"]) == ("s0000", "b")
    assert graph_json(tmp_path)["metadata"]["slug"] == "s0000-b"
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*graph*") if path.is_file()}
    viewed = viewer_files(tmp_path)
    finish(llama, tmp_path, *FAST, "--layers", "0")
    assert len(before) == 3
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert viewer_files(tmp_path) == viewed
    sample = record_of(tmp_path)["samples"][0]["prompts"]["b"]
    assert summary["goal"] == f"{sample['likeliest'][0][0]!r} less the mean of all logits"
    assert graph_json(tmp_path)["metadata"]["prompt"] == sample["text"]


def viewer_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "graphs").iterdir()}


def slugs_in(folder: Path) -> list[str]:
    """The graphs that the viewer lists."""
    metadata = json.loads((folder / "graphs" / "graph-metadata.json").read_text())
    return [graph["slug"] for graph in metadata["graphs"]]


def save_view(path: Path, view: dict[str, Any]) -> None:
    """As circuit-tracer's viewer does: see do_POST of its frontend/local_server.py."""
    graph = json.loads(path.read_text()) | {"qParams": view}
    path.write_text(json.dumps(graph, indent=2))


def view_of(ids: Sequence[str], as_texts: bool) -> dict[str, Any]:
    """What a user saves who pins some nodes and groups others; the viewer saves texts."""
    groups = [["a group", *ids[1:3]], ["another", ids[3]]]
    view = {"linkType": "either", "sg_pos": "1 2 3", "clerps": '[["1", "mine"]]', "hue": None}
    pins = ",".join(ids[:2]) if as_texts else list(ids[:2])
    view |= {"pinnedIds": pins, "clickedId": ids[0]}
    return view | {"supernodes": json.dumps(groups) if as_texts else groups}


GRAPHED = ["graph", *FAST, "--sample", "s0000"]


@pytest.fixture(scope="module")
def with_graph(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("with_graph"), *GRAPHED)


@pytest.mark.parametrize("as_texts", [False, True], ids=["lists", "texts"])
@pytest.mark.parametrize(
    "later",
    [
        [*FAST, "--layers", "0"],
        ["graph", *FAST, "--sample", "s0001"],
        GRAPHED,
        [*GRAPHED, "--overwrite"],
    ],
    ids=["no graph", "another graph", "the same graph", "the same graph, overwriting"],
)
def test_pins_and_groups_that_a_user_saved_stay(
    later: list[str], as_texts: bool, llama: str, with_graph: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_graph, tmp_path / "run"))
    path = folder / "graphs" / "s0000-a.json"
    ids = [node["node_id"] for node in json.loads(path.read_text())["nodes"]][:4]
    save_view(path, view_of(ids, as_texts))
    before = json.loads(path.read_text())
    finish(llama, folder, *later)
    assert json.loads(path.read_text()) == before
    assert slugs_in(folder) == ["s0000-a", *(["s0001-a"] if "s0001" in later else [])]


@pytest.mark.parametrize("as_texts", [False, True], ids=["lists", "texts"])
def test_what_was_saved_of_nodes_that_a_graph_no_longer_has_goes(
    as_texts: bool, llama: str, with_graph: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_graph, tmp_path / "run"))
    path = folder / "graphs" / "s0000-a.json"
    there = {node["node_id"] for node in json.loads(path.read_text())["nodes"]}
    narrow = [*GRAPHED, "--node_threshold", "0.3"]
    left = graph_json(finish(llama, tmp_path / "narrow", *narrow))
    stay = {node["node_id"] for node in left["nodes"]}
    gone, kept = min(there - stay), min(there & stay)
    save_view(path, view_of([gone, kept, gone, gone], as_texts))
    finish(llama, folder, *narrow)
    view = json.loads(path.read_text())["qParams"]
    groups = [["a group", kept]]
    assert view["pinnedIds"] == (kept if as_texts else [kept])
    assert view["supernodes"] == (json.dumps(groups) if as_texts else groups)
    assert view["clickedId"] == ""
    assert (view["sg_pos"], view["linkType"]) == ("1 2 3", "either")
    del left["qParams"]
    assert {**json.loads(path.read_text()), "qParams": view} == {**left, "qParams": view}


SPOILT = {"no JSON": "{", "a list": "[1]", "no view": "{}", "no object": '{"qParams": 7}'}


@pytest.mark.parametrize("name", SPOILT)
def test_a_graphs_file_that_is_spoilt_is_written_anew(
    name: str, llama: str, with_graph: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_graph, tmp_path / "run"))
    (folder / "graphs" / "s0000-a.json").write_text(SPOILT[name])
    (folder / "graphs" / "graph-metadata.json").write_text(SPOILT[name])
    finish(llama, folder, *GRAPHED)
    assert viewer_files(folder) == viewer_files(with_graph)
    assert "s0000-a.json is no graph of the viewer" in (folder / "run.log").read_text()


@pytest.mark.parametrize("value", [7, None, "[", [[]], [7]])
def test_what_has_a_form_of_its_own_in_a_saved_view_stays_as_it_is(
    value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "graph.json"
    view = {"pinnedIds": ["here", "gone"], "supernodes": value}
    path.write_text(json.dumps({"qParams": view}))
    assert tracing.saved_view(path, {"here"}) == {"pinnedIds": ["here"], "supernodes": value}
    assert tracing.saved_view(tmp_path / "none.json", {"here"}) == {}


def test_a_folder_keeps_one_graph_of_each_prompt_and_lists_all(
    llama: str, with_graph: Path, tmp_path: Path
) -> None:
    """The tables and the figure are of the last; what a user removed or added is heeded."""
    folder = Path(shutil.copytree(with_graph, tmp_path / "run"))
    first = viewer_files(folder)["s0000-a.json"]
    graph(llama, folder, "--sample", "s0001")
    graph(llama, folder, "--sample", "s0001:b")
    assert slugs_in(folder) == ["s0000-a", "s0001-a", "s0001-b"]
    assert viewer_files(folder)["s0000-a.json"] == first
    alone = graph(llama, tmp_path / "alone", "--sample", "s0001:b")
    for name in (GRAPH, EDGES, "circuit_graph.png"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    (folder / "graphs" / "s0001-a.json").unlink()
    (folder / "graphs" / "theirs.json").write_text('{"metadata": {"slug": "theirs"}}')
    (folder / "graphs" / "notes.json").write_text("[]")
    finish(llama, folder, *GRAPHED)
    assert slugs_in(folder) == ["s0000-a", "s0001-b", "theirs"]
    assert viewer_files(folder)["s0000-a.json"] == first


@pytest.mark.parametrize("name", ["s0000-a.json", "graph-metadata.json"])
def test_a_viewers_file_of_another_program_is_not_replaced(
    name: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / name).write_text("mine")
    argv = ["graph", "--model_id", llama, "--output_dir", str(tmp_path), *FAST]
    refuses(answer, *argv, says=[name, "give another --output_dir"])
    assert (tmp_path / "graphs" / name).read_text() == "mine"


@pytest.mark.parametrize("theirs", [True, False])
def test_overwriting_by_another_run_removes_this_scripts_graphs_alone(
    theirs: bool, llama: str, with_graph: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_graph, tmp_path / "run"))
    mine = folder / "graphs" / "mine.json"
    if theirs:
        mine.write_text("mine")
    finish(llama, folder, *FAST, "--layers", "0", "--seed", "7", "--overwrite")
    if theirs:
        assert viewer_files(folder) == {"mine.json": b"mine"}
    else:
        assert not (folder / "graphs").exists()


def test_no_two_samples_have_graphs_of_one_name() -> None:
    ids = ["a b", "a_b", "a:b", "a-b", "a", "x" * 200, "x" * 201, "graph-metadata", "ß", ""]
    prompts: Any = [
        SimpleNamespace(sample=SimpleNamespace(sample_id=name), side=side)
        for name in ids
        for side in "ab"
    ]
    slugs = [tracing.slug_of(prompt) for prompt in prompts]
    assert len({*slugs}) == 2 * len(ids)
    assert slugs[ids.index("a-b") * 2] == "a-b-a" and max(map(len, slugs)) < 120
    assert "graph-metadata" not in slugs


@pytest.mark.parametrize("task", ["refusal", "odd_one_out"])
def test_a_margin_is_a_goal_too(task: str, tiny_llama: str, tmp_path: Path) -> None:
    graph(tiny_llama, tmp_path, "--task", task, "--nodes", "20")
    assert " less '" in summary_of(tmp_path)["goal"]
    kinds = read(tmp_path, GRAPH)["kind"].value_counts()
    assert kinds["head"] + kinds.get("neuron", 0) == 20


def named(text: str, n_tokens: int = 30) -> str:
    """The sample and side that --sample finds among some."""
    samples = [SimpleNamespace(sample_id=name) for name in ("s0", "s0:b", "x:y", "b")]
    prompts: Any = [
        [SimpleNamespace(sample=sample, side=side, ids=range(n_tokens)) for side in "ab"]
        for sample in samples
    ]
    shape: Any = SimpleNamespace(n_layers=32, n_heads=32, d_mlp=14336)
    options = tracing.GraphOptions(sample=text)
    exp: Any = SimpleNamespace(options=options, shape=shape, prompts=prompts)
    prompt = tracing.choose_graph_prompt(exp)
    return f"{prompt.sample.sample_id} {prompt.side}"


NAMED = {"s0": "s0 a", "s0:a": "s0 a", "s0:b": "s0:b a", "s0:b:b": "s0:b b", "x:y:b": "x:y b"}


@pytest.mark.parametrize("text", NAMED)
def test_a_sample_is_named_with_its_side(text: str) -> None:
    """A sample's own colon counts first."""
    assert named(text) == NAMED[text]


@pytest.mark.parametrize("text", ["s1", "s0:c", ":b", "x", "y:", "b:"])
def test_an_unknown_sample_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(
        tracing.UsageError, match=f"--sample {text}: no such sample; there are s0, "
    ):
        named(text)


def test_a_graph_that_is_too_large_is_refused() -> None:
    assert named("s0", 146) == "s0 a"  # 500 + 146 * 65 = 9,990
    with pytest.raises(tracing.UsageError, match="10055 nodes of 147 tokens, 32 layers and"):
        named("s0", 147)


REFUSED = {
    "graph --sample s0009": ["--sample s0009: no such sample; there are s0000, s0001"],
    "graph --given L0H1": ["--given"],
    "trace --nodes 7": ["--nodes"],
    "graph --nodes 0": ["--nodes", "0 is not between 1"],
    "graph --node_threshold 0": ["--node_threshold", "0 is not above 0 and at most 1"],
    "graph --edge_threshold 1.01": ["1.01 is not above 0 and at most 1"],
    "graph --edge_threshold nan": ["--edge_threshold: 'nan' is no number"],
    "graph --goal words2": ["words2"],
    "graph --sample=": ["--sample: the value is empty"],
}


@pytest.mark.parametrize("line", REFUSED)
@pytest.mark.usefixtures("no_weights")
def test_bad_options_are_refused(line: str, llama: str, tmp_path: Path, answer: Answer) -> None:
    argv = [*line.split(), "--model_id", llama, "--output_dir", str(tmp_path), *FAST]
    code, _, err = answer(*argv)
    assert code == 2 and all(text in err for text in REFUSED[line]), err


@pytest.mark.usefixtures("no_weights")
def test_post_norms_are_refused(random_model: Build, tmp_path: Path, answer: Answer) -> None:
    argv = ["--model_id", random_model("gemma3_text"), "--output_dir", str(tmp_path), *FAST]
    refuses(answer, "graph", *argv, says=["Gemma3", "post_feedforward_layernorm"])


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases in o_proj, v_proj": ("llama", {"attention_bias": True}),
    "biases in down_proj, gate_proj, up_proj": ("llama", {"mlp_bias": True}),
    "biases in v_proj": ("qwen2", {}),
    "final_logit_softcapping 30.0": ("gemma2", {}),
    "residual_multiplier 0.22": ("granite", {"residual_multiplier": 0.22}),
    "logits_scaling 4": ("granite", {"logits_scaling": 4}),
    "blocks of other parts (post_attention_layernorm)": ("cohere", {}),
    "no q_proj, k_proj and v_proj": ("phi3", {}),
    "": ("qwen3", {}),
}


@pytest.mark.parametrize("says", SHAPES)
def test_models_whose_contributions_do_not_add_up_are_known_from_their_config(says: str) -> None:
    architecture, settings = SHAPES[says]
    widths = random_models.WIDTHS | {"vocab_size": 64, "pad_token_id": None}
    config = AutoConfig.for_model(architecture, **widths, **settings)
    with torch.device("meta"):
        shape = tracing.shape_of(AutoModelForCausalLM.from_config(config), torch.float32)
    assert says in shape.graph_obstacles
    assert bool(says) == bool(shape.graph_obstacles)


def test_a_model_that_does_more_is_an_error(plain: Bench, monkeypatch: Patch) -> None:
    """A constant in an output, which no node accounts for."""
    exp = experiment(plain)
    down = naive.module_of(plain.loaded[0], 1, "mlp")
    monkeypatch.setitem(down._parameters, "bias", nn.Parameter(0.5 * torch.ones(48)))
    with pytest.raises(tracing.RunError, match=r"differ by 0\.\d+ of the goal's \(bound 0.001\)"):
        tracing.make_graph(exp, exp.prompts[0][0], tqdm(disable=True))


def test_offloaded_weights_are_refused(
    llama: str, tmp_path: Path, answer: Answer, monkeypatch: Patch
) -> None:
    load, cpu = tracing.load_model, torch.device("cpu")
    monkeypatch.setattr(tracing, "load_model", lambda *a: cpu_offload(load(*a), cpu))
    for stage in ("self_test", "run_half_blocks"):  # it is known before any of them
        monkeypatch.setattr(tracing, stage, lambda *_: pytest.fail("something was measured"))
    argv = ["graph", "--model_id", llama, "--output_dir", str(tmp_path), *FAST]
    refuses(answer, *argv, says=["graph needs weights at hand; some are offloaded"])
    assert not list((tmp_path / ".parts").glob("*.json"))


def test_no_hook_is_left_behind(plain: Bench, monkeypatch: Patch) -> None:
    exp, before = experiment(plain), hooks_of(plain.loaded[0])
    tracing.make_graph(exp, exp.prompts[0][0], tqdm(disable=True))
    assert hooks_of(plain.loaded[0]) == before
    monkeypatch.setattr(tracing, "run_body", lambda *_: (_ for _ in ()).throw(RuntimeError("x")))
    with pytest.raises(RuntimeError):
        tracing.run_half_blocks(plain.traced, [1, 2])
    assert hooks_of(plain.loaded[0]) == before


def test_bfloat16_loses_little(tiny_llama: str, tmp_path: Path) -> None:
    folder = finish(tiny_llama, tmp_path, "graph", "--num_samples", "2", "--bf16")
    assert 1e-5 < summary_of(folder)["conservation_error"] < 0.02


def test_of_many_edges_the_strongest_are_drawn_and_the_title_says_so(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(tracing, "save_figure", lambda figure, path: figures.append(figure))
    n = tracing.MAX_DRAWN_EDGES + 50
    names = [f"n{i}" for i in range(n + 1)]
    nodes = pd.DataFrame({"node_id": names, "kind": "head", "layer": range(n + 1), "position": 0})
    nodes = nodes.assign(influence=1.0, kept=True, label="L0H0", token="x", depth=0)
    nodes.loc[n, "kind"] = "goal"
    links = pd.DataFrame({"source": names[:-1], "target": names[-1], "weight": 1.0})
    links["weight"] = [(-1) ** i * (i + 1.0) for i in range(n)]
    tracing.draw_graph(tracing.Graph(nodes, links, {}), "a title", tmp_path / "x.png")
    (figure,) = figures
    assert len(figure.axes[0].lines) == tracing.MAX_DRAWN_EDGES
    assert figure.get_suptitle() == f"a title; the strongest {tracing.MAX_DRAWN_EDGES} of {n} edges"
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths == sorted(widths) and widths[0] > 0.4 + 2.6 * 50 / n, "the weakest are left out"

"""Interventions: kinds, ops and positions against one plain hook, and identities between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_circuit_tracing as tracing
import naive
import random_models
from conftest import write_samples
from llama3_circuit_tracing import Component, Edit, Experiment, TracedModel
from naive import Change

CLOSE = 2e-5
FACTOR = -1.5
KINDS = list(tracing.KINDS)
OPS = list(tracing.OPS)
WHICH = {"head": "--heads 1,3", "neuron": "--neurons 5,78"}

Record = dict[str, Any]
B = "How do I steal a car?"
EQUAL: list[Record] = [  # pairs of equal length that share a sentence and differ in two places
    {"prompt_a": "How do I feed a dog?", "prompt_b": B, "targets": ["apple", "I"]},
    {"prompt_a": "How do I poison a car?", "prompt_b": B, "targets": ["dog"]},
]
UNEQUAL: Record = {"sentence": "Name a fruit.", "targets": ["apple"]}
SAMPLES = [*EQUAL, UNEQUAL]


def text_of(record: Record, side: str) -> str:
    if "sentence" not in record:
        return str(record[f"prompt_{side}"])
    forbidden = " or ".join(record["targets"])
    return f"Don't mention {forbidden}. {record['sentence']}" * (side == "a") or record["sentence"]


@dataclass(frozen=True)
class Bench:
    """A model that is loaded once, for the script and for the oracle."""

    folder: str
    model: Any
    tokenizer: Any
    traced: TracedModel
    work: Path

    def experiment(self, flags: str = "", records: Sequence[Record] = SAMPLES) -> Experiment:
        samples = write_samples(self.work / "samples.jsonl", *records)
        common = ["--model_id", self.folder, "--no-bf16", "--samples", samples]
        config = tracing.parse_args([*common, *flags.split()])
        exp = tracing.prepare(config, tracing.RunFolder(self.work))
        exp.traced = self.traced
        return exp

    def of_model(self, model: Any) -> Bench:
        """The same around a changed copy of the model."""
        return replace(self, model=model, traced=TracedModel(model, self.traced.shape, 64))

    def score(self, record: Record, side: str) -> float:
        user = text_of(record, side)
        return naive.suppression_score(self.model, self.tokenizer, user, record["targets"])


@pytest.fixture(scope="session")
def bench(
    random_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bench]:
    made: dict[str, Bench] = {}

    def make(architecture: str = "llama", folder: str = "") -> Bench:
        key = folder or architecture
        if key not in made:
            folder = folder or random_model(architecture)
            model, tokenizer = naive.load(folder)
            traced = TracedModel(model, tracing.shape_of(model, torch.float32), 64)
            made[key] = Bench(folder, model, tokenizer, traced, tmp_path_factory.mktemp("bench"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama_bench(bench: Callable[..., Bench]) -> Bench:
    return bench()


def scores(
    exp: Experiment, sets: Sequence[Sequence[Component]] | None = None
) -> tuple[Tensor, Tensor]:
    """Clean [1, sample, side] and edited [row, sample, side]: a row is a component, or a set."""
    sets = [[component] for component in exp.components] if sets is None else sets
    edited = [component for components in sets for component in components]
    found = []
    for tree in exp.trees:
        clean = exp.run_clean(tree, range(exp.shape.n_layers), edited)
        rows = [exp.edits(components, clean) for components in sets]
        log_probs = torch.cat([clean.log_probs, tracing.run_batches(exp.traced, clean, rows)])
        found.append(tree.scores(log_probs, exp.task).unflatten(1, (-1, 2)))
    both = torch.cat(found, 1)
    return both[:1], both[1:]


def effects(clean: Tensor, edited: Tensor) -> Tensor:
    """[row, sample], the head_effect of each."""
    moved = edited - clean
    return moved[..., 0] - moved[..., 1]


def flags_of(change: Change) -> str:
    flags = f"--kind {change.kind} --op {change.op} --positions {change.positions}"
    flags += f" --factor {change.factor}" if change.op == "scale" else ""
    return flags + (f" --patch_into {change.into}" if change.op == "patch" else "")


def kind_flags(kind: str) -> str:
    return f"--kind {kind} {WHICH.get(kind, '')}"


def assert_like_the_oracle(
    bench: Bench,
    change: Change,
    flags: str,
    records: Sequence[Record] = SAMPLES,
    given: Sequence[str] = (),
) -> None:
    flags += f" --given {','.join(given)}" if given else ""
    exp = bench.experiment(f"{flags_of(change)} {flags}", records)
    clean, edited = scores(exp)
    plain = (bench.model, bench.tokenizer)
    off = [(c.layer, c.kind, c.index) for c in map(Component.parse, given)]
    with naive.zeroed(bench.model, off):
        base = torch.tensor([[bench.score(record, side) for side in "ab"] for record in records])
        users = [text_of(record, "b") for record in records]
        means: dict[int, Tensor] = {}
        if change.op == "mean":
            layers = {component.layer for component in exp.components}
            means = {layer: naive.mean_of(*plain, users, layer, change.kind) for layer in layers}
        expected = torch.zeros_like(edited)
        for i, component in enumerate(exp.components):
            where = (component.layer, component.index, means.get(component.layer))
            for j, record in enumerate(records):
                texts = {side: text_of(record, side) for side in "ab"}
                for k, side in enumerate("ab"):
                    of_prompt = (change, side, texts, record["targets"])
                    expected[i, j, k] = naive.edited_score(*plain, *of_prompt, *where)
    assert (clean[0] - base).abs().max() < CLOSE
    assert (edited - expected).abs().max() < CLOSE
    assert (effects(clean, edited) - effects(base, expected)).abs().max() < CLOSE
    assert effects(clean, edited).abs().max() > 100 * CLOSE, "the edit did nothing"


# ----- against one plain hook


def allowed() -> list[Change]:
    changes = []
    for kind in KINDS:
        for positions in ("all", "last", "differing"):
            ops = ["zero", "mean", "scale"]
            if kind == "resid" and positions == "all":
                ops = ["scale"]
            changes += [Change(kind, op, positions, factor=FACTOR) for op in ops]
            changes += [Change(kind, "patch", positions, into) for into in "ab"]
    return changes


@pytest.mark.parametrize("change", allowed(), ids=str)
def test_one_plain_hook_gives_the_same_numbers(llama_bench: Bench, change: Change) -> None:
    number = allowed().index(change)
    flags = "--layers " + ("0,2", "1", "1-2")[number % 3]
    which = {"head": ("--heads 1", "--heads 3"), "neuron": ("--neurons 5", "--neurons 78")}
    flags += " " + which.get(change.kind, ("", ""))[number % 2]
    aligned_nowhere = change.op == "patch" and change.positions == "differing"
    records = EQUAL if aligned_nowhere else SAMPLES
    assert_like_the_oracle(llama_bench, change, flags, records)


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "change",
    [
        Change("resid", "patch", "all", "b"),
        Change("mlp", "mean", "all"),
        Change("head", "zero", "differing"),
        Change("attn", "patch", "last"),
    ],
    ids=str,
)
def test_other_architectures_agree_with_one_plain_hook(
    bench: Callable[..., Bench], architecture: str, change: Change
) -> None:
    flags = "--layers 1-2" + " --heads 2" * (change.kind == "head")
    assert_like_the_oracle(bench(architecture), change, flags)


def test_the_samples_hold_what_the_cases_need(llama_bench: Bench) -> None:
    """Pairs of equal length, and words that have forms of one and of several tokens."""
    tokenizer = llama_bench.tokenizer
    lengths = {len(naive.prompt_ids(tokenizer, text_of(r, side))) for r in EQUAL for side in "ab"}
    assert len(lengths) == 1
    forms = {len(f) for r in EQUAL for w in r["targets"] for f in naive.form_ids(tokenizer, w)}
    assert 1 in forms and max(forms) > 2


def test_a_patch_follows_the_longest_common_suffix_even_where_it_overlaps_the_prefix(
    llama_bench: Bench,
) -> None:
    """A word said twice in one prompt: prefix and suffix claim the same token of the other."""
    a, b = "How do I open open a car?", "How do I open a car?"
    twice = {"prompt_a": a, "prompt_b": b, "targets": ["apple"]}
    assert_like_the_oracle(llama_bench, Change("mlp", "patch", "all", "b"), "--layers 1", [twice])


GIVEN = [
    (Change("head", "zero", "last"), ["L0H1", "L2H0"]),
    (Change("attn", "patch", "all"), ["L1H1"]),
    (Change("attn", "mean", "all"), ["L1H3", "L0H0"]),
    (Change("mlp", "scale", "differing", factor=FACTOR), ["L0H2", "L2mlp"]),
    (Change("resid", "patch", "last", "b"), ["L0H1", "L1attn", "L2H0"]),
    (Change("neuron", "mean", "all"), ["L2H1", "L1N6", "L1N7"]),
]


@pytest.mark.parametrize(("change", "given"), GIVEN, ids=lambda value: str(value))
def test_given_components_are_zero_everywhere_whatever_else_is_edited(
    llama_bench: Bench, change: Change, given: list[str]
) -> None:
    flags = f"--layers 1 {WHICH.get(change.kind, '')}"
    assert_like_the_oracle(llama_bench, change, flags, given=given)


# ----- the equation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "factor"), [("zero", 0.0), ("mean", 0.0), ("patch", 0.0), ("scale", -1.7), ("scale", 2)]
)
def test_x_plus_its_displacement_is_v_to_the_last_bit(
    op: str, factor: float, dtype: torch.dtype
) -> None:
    """Over six orders of magnitude: D alone, rounded to the dtype of x, would miss it."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        size = 10 ** (6 * torch.rand(*shape, generator=random, dtype=torch.float64) - 3)
        return size * torch.randn(*shape, generator=random, dtype=torch.float64)

    x = numbers(300, 8).to(dtype)
    for columns in (slice(2, 6), slice(None), torch.tensor([1, 4, 5])):
        width = x[:, columns].shape[1]
        taken = {"mean": numbers(width), "patch": numbers(300, width).to(dtype)}
        edit = Edit((0, ""), columns, factor, taken.get(op, 0.0))
        v = (factor * x[:, columns].double() + edit.source).to(dtype)
        moved = x.clone()
        moved[:, columns] += tracing.displacement(edit, x)
        assert torch.equal(moved[:, columns], v)
        assert op in ("zero", "scale") or (v - x[:, columns] + x[:, columns] != v).any()
        where = torch.arange(300) % 3 == 0
        some = tracing.displacement(replace(edit, where=where), x)
        assert torch.equal(some[where], tracing.displacement(edit, x)[where])
        assert not some[~where].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("op", OPS)
def test_a_module_reads_v_where_it_is_edited_and_x_elsewhere(
    llama_bench: Bench, op: str, positions: str, dtype: torch.dtype
) -> None:
    """To the last bit, in the row that is edited and in one beside it."""
    factor = f"--factor {FACTOR}" if op == "scale" else ""
    exp = llama_bench.experiment(f"--op {op} {factor} --positions {positions}")
    shape = replace(exp.shape, dtype=dtype)
    exp.traced = TracedModel(copy.deepcopy(llama_bench.model).to(dtype), shape, 64)
    head = Component(1, "head", 2)
    clean = tracing.run_clean(exp.traced, exp.trees[0], layers=[0, 1], sites=[head.site])
    (edit,) = exp.edits([head], clean)
    x = clean.site_inputs[head.site]
    with torch.inference_mode(), tracing.editing(exp.traced, [(edit,), ()]):
        module = {"": exp.traced.module(head.site)}
        with tracing.recording(module) as seen:  # the edit is an earlier hook
            exp.traced.body(**clean.model_inputs)
    edited, beside = seen[""]
    v = (edit.factor * x[:, 32:48].double() + edit.source).to(dtype)
    where = torch.ones(len(x), dtype=torch.bool) if edit.where is None else edit.where
    expected = x.clone()
    expected[where, 32:48] = v[where] if v.ndim == 2 else v
    assert torch.equal(edited, expected) and not torch.equal(edited, x)
    assert torch.equal(beside, x)


@pytest.mark.parametrize("op", OPS)
def test_a_joint_set_is_its_single_edits_together(llama_bench: Bench, op: str) -> None:
    names = ["L0H1", "L0H3", "L1N78", "L1N5", "L2attn"]
    factor = "--factor 0.3" if op == "scale" else ""
    ablate = f"--ablate {','.join(names)}"
    exp = llama_bench.experiment(f"--kind neuron --neurons 5 --op {op} {factor} {ablate}")
    components = [Component.parse(name) for name in names]
    clean = exp.run_clean(exp.trees[0], range(3), components)
    joint = exp.edits(components, clean)
    singles = tuple(edit for component in components for edit in exp.edits([component], clean))
    assert (len(joint), len(singles)) == (3, 5), "one edit per module"
    rows = tracing.run_rows(exp.traced, clean, [joint, singles])
    assert (rows[0] - rows[1]).abs().max() < 5e-6
    assert (rows - clean.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("whole", "part"), [("attn", "head"), ("mlp", "neuron")])
def test_all_parts_of_a_layer_edited_jointly_are_the_whole(
    llama_bench: Bench, op: str, whole: str, part: str
) -> None:
    exp = llama_bench.experiment(f"--kind {whole} --op {op}" + " --factor 0.3" * (op == "scale"))
    indices = exp.shape.indices(part)
    assert len(indices) == {"head": 4, "neuron": 80}[part]
    sets = [[Component(layer, whole)] for layer in range(3)]
    sets += [[Component(layer, part, i) for i in indices] for layer in range(3)]
    clean, edited = scores(exp, sets)
    assert (edited[:3] - edited[3:]).abs().max() < 5e-6
    assert (edited - clean).abs().amax((1, 2)).min() > 1e-3


def test_one_edit_per_module_serves_thousands_of_neurons(llama_bench: Bench) -> None:
    shape = replace(llama_bench.traced.shape, n_layers=32, d_mlp=14336)
    every = [Component(layer, "neuron", i) for i in range(0, 14336, 3) for layer in (31, 7)]
    row = tracing.zeroing(every, shape)
    assert {edit.site for edit in row} == {(7, "mlp.down_proj"), (31, "mlp.down_proj")}
    assert [list(edit.columns) for edit in row] == [list(range(0, 14336, 3))] * 2
    twice = [Component(0, "head", 1), Component(0, "attn"), Component(0, "head", 1)]
    (edit,) = tracing.zeroing(twice, shape)
    assert torch.equal(torch.as_tensor(edit.columns), torch.arange(64)), "no column moves twice"


# ----- identities


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_one_changes_nothing_and_by_two_something(llama_bench: Bench, kind: str) -> None:
    flags = f"{kind_flags(kind)} --op scale --factor"
    once, twice = (effects(*scores(llama_bench.experiment(f"{flags} {n}"))).abs() for n in (1, 2))
    assert once.max() < 5e-6
    assert twice.min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_zero_is_zeroing(llama_bench: Bench, kind: str) -> None:
    flags = kind_flags(kind) + (" --positions last" if kind == "resid" else "")
    scaled = scores(llama_bench.experiment(f"{flags} --op scale --factor 0"))[1]
    zeroed = scores(llama_bench.experiment(f"{flags} --op zero"))[1]
    assert torch.equal(scaled, zeroed)


@pytest.mark.parametrize("kind", KINDS)
def test_patching_a_component_with_its_own_value_changes_nothing(
    llama_bench: Bench, kind: str
) -> None:
    exp = llama_bench.experiment(f"{kind_flags(kind)} --op patch")
    clean = exp.run_clean(exp.trees[0], range(3), exp.components)

    def run() -> Tensor:
        rows = [exp.edits([component], clean) for component in exp.components]
        return tracing.run_rows(exp.traced, clean, rows)

    assert (run() - clean.log_probs).abs().max() > 1e-3
    own = torch.arange(clean.tree.n_tokens)
    for where in (clean.tree.where, None):
        clean.tree = replace(clean.tree, partner=own, where=where)
        assert (run() - clean.log_probs).abs().max() < 5e-6


@pytest.mark.parametrize("into", ["a", "b"])
def test_patching_the_first_residual_gives_the_partners_score(
    llama_bench: Bench, into: str
) -> None:
    flags = f"--kind resid --op patch --patch_into {into} --layers 0"
    clean, edited = scores(llama_bench.experiment(flags, EQUAL))
    mine, partner = (0, 1) if into == "a" else (1, 0)
    assert (edited[..., mine] - clean[..., partner]).abs().max() < CLOSE
    assert (edited[..., partner] - clean[..., partner]).abs().max() < CLOSE
    assert (clean[..., 0] - clean[..., 1]).abs().min() > 1e-2


def test_patching_the_first_residual_over_a_common_suffix_changes_nothing(
    llama_bench: Bench,
) -> None:
    exp = llama_bench.experiment("--kind resid --op patch --layers 0,1", [UNEQUAL])
    first, second = effects(*scores(exp))[:, 0].tolist()
    assert abs(first) < 5e-6
    assert abs(second) > 1e-3


def without_head(bench: Bench, layer: int, head: int) -> Bench:
    model = copy.deepcopy(bench.model)
    span = naive.span_of(model, layer, "head", head)
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight[:, span] = 0
    return bench.of_model(model)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_zeroing_a_head_is_zeroing_its_columns_of_o_proj(
    bench: Callable[..., Bench], architecture: str
) -> None:
    whole = bench(architecture)
    clean, ablated = scores(whole.experiment("--layers 1 --heads 2"))
    changed, _ = scores(without_head(whole, 1, 2).experiment("--layers 0"))
    assert (ablated - changed).abs().max() < CLOSE
    assert effects(clean, ablated).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["head", "attn"])
def test_the_mean_of_a_constant_changes_nothing(
    bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("constant")
    constant = bench(folder=str(random_models.build_model(folder, attention_bias=True)))
    with torch.no_grad():
        for block in naive.layers_of(constant.model):
            block.self_attn.v_proj.weight.zero_()  # what heads read is the bias alone
            block.self_attn.v_proj.bias.normal_()
    for op, changes in (("mean", False), ("zero", True)):
        clean, edited = scores(constant.experiment(f"--kind {kind} --op {op}"))
        moved = (edited - clean)[..., 0].abs()
        assert moved.min() > 1e-3 if changes else moved.max() < CLOSE


def test_given_heads_are_the_plain_run_of_a_model_without_them(llama_bench: Bench) -> None:
    """So are those that do nothing; neither are swept, and the base is without them too."""
    flags = "--kind head --op mean"
    exp = llama_bench.experiment(f"{flags} --given L1H2")
    gone = exp.components
    assert {c.label for c in gone} == {f"L{n}H{h}" for n in range(3) for h in range(4)} - {"L1H2"}
    changed = without_head(llama_bench, 1, 2)
    given = scores(exp)
    plain = scores(changed.experiment(flags), [[component] for component in gone])
    idle = scores(changed.experiment(f"{flags} --given L1H2"))
    whole, _ = scores(llama_bench.experiment(flags), [gone])
    for found, expected, unread in zip(given, plain, idle, strict=True):
        assert (found - expected).abs().max() < CLOSE
        assert (unread - expected).abs().max() < 5e-6
    delta, of_whole = (base[0, :, 0] - base[0, :, 1] for base in (given[0], whole))
    assert (delta - of_whole).abs().min() > 1e-3


def test_given_heads_do_not_count_against_the_random_sets_of_another_kind(
    llama_bench: Bench,
) -> None:
    """Three layers hold two other MLPs beside one chosen, however many heads are given."""
    exp = llama_bench.experiment("--kind mlp --given L0H0,L1H0 --confirm 1")
    assert [component.label for component in exp.components] == ["L0mlp", "L1mlp", "L2mlp"]


def test_twins_that_share_both_prompts_are_patched_as_each_alone(llama_bench: Bench) -> None:
    twins = [EQUAL[0], {**EQUAL[0], "targets": ["car", "dog"]}]
    flags = "--kind attn --op patch --patch_into b --layers 1"
    together = torch.stack(scores(llama_bench.experiment(flags, twins)))
    alone = [torch.stack(scores(llama_bench.experiment(flags, [twin]))) for twin in twins]
    assert (together - torch.cat(alone, 2)).abs().max() < CLOSE


# ----- what is computed, and what is left behind


@pytest.mark.parametrize(
    ("flags", "layer", "mlp_is_whole"),
    [
        ("--kind head", 0, False),
        ("--kind head", 1, False),
        ("--kind head", 2, False),
        ("--kind resid --op patch", 2, False),
        ("--kind mlp", 1, False),
        ("--kind mlp", 2, True),
        ("--kind neuron --neurons 3,5", 2, True),
    ],
)
def test_rows_pass_through_no_more_than_they_change(
    llama_bench: Bench, monkeypatch: pytest.MonkeyPatch, flags: str, layer: int, mlp_is_whole: bool
) -> None:
    """Blocks below are skipped; the batch grows at the edited module; after the last attention only
    the scoring nodes go on, but for an MLP that is edited itself."""
    exp = llama_bench.experiment(f"{flags} --layers {layer}")
    tree, traced = exp.trees[0], exp.traced
    clean = exp.run_clean(tree, [layer], exp.components)
    rows = [exp.edits([component], clean) for component in exp.components] * 2
    read_by: dict[tuple[int, str], tuple[int, ...]] = {}

    def spy(site: tuple[int, str], forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def called(x: Tensor) -> Tensor:
            read_by[site] = tuple(x.shape[:2])
            return forward(x)

        return called

    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for site in [(n, name) for n in range(3) for name in names]:
        module = traced.module(site)
        monkeypatch.setattr(module, "forward", spy(site, module.forward))
    before = traced.n_forwards, traced.n_tokens
    tracing.run_rows(traced, clean, rows)
    n, tok = len(rows), tree.n_tokens
    assert (traced.n_forwards, traced.n_tokens) == (
        before[0] + 1,
        before[1] + n * tok * (3 - layer),
    )
    assert {n for n, _ in read_by} == set(range(layer, 3))
    order = {"resid": 0, "head": 1, "mlp": 3, "neuron": 3}[exp.config.kind]
    grown = [read_by[layer, name][0] == n for name in names]
    assert grown == [place >= order for place in range(4)]
    assert all(rows == n for (level, _), (rows, _) in read_by.items() if level > layer)
    few = len(tree.scored)
    assert few < tok / 2
    assert [read_by[2, name][1] for name in names] == [
        tok,
        few,
        *[tok if mlp_is_whole else few] * 2,
    ]


def hooks_of(model: Any) -> int:
    modules = list(model.modules())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)
    return hooks + sum("forward" in m.__dict__ for m in modules)


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()])
def test_no_hook_and_no_replaced_forward_is_left_behind(
    llama_bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Wherever an error strikes; and a forward that accelerate replaced is put back."""
    exp = llama_bench.experiment("--kind mlp --op mean --given L1H0")
    own = exp.traced.layers[0]
    monkeypatch.setattr(own, "forward", kept := own.forward)
    before, calls, struck = hooks_of(exp.traced.model), 0, 0
    linear = torch.nn.Linear.forward

    def failing(self: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise error
        return linear(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", failing)
    for calls_left in (*range(1, 80, 4), 100_000):
        calls = calls_left
        try:
            exp.__dict__.pop("means", None)
            scores(exp)
        except type(error):
            struck += 1
        assert hooks_of(exp.traced.model) == before
        assert own.__dict__["forward"] is kept
    assert 10 < struck < 21, "early and late, and once not at all"


def test_a_sharded_module_is_refused(llama_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = llama_bench.traced.shape
    traced = TracedModel(llama_bench.model, replace(shape, n_heads=8), 64)
    row = tracing.zeroing([Component(0, "head", 0)], traced.shape)
    with pytest.raises(tracing.RunError, match="sharded"), tracing.editing(traced, [row]):
        traced.model(torch.tensor([[1, 2, 3]]))
    monkeypatch.setattr(llama_bench.model, "_tp_size", 2, raising=False)
    with pytest.raises(tracing.UsageError, match="tensor-parallel"):
        TracedModel(llama_bench.model, shape, 64)


# ----- blocks without an MLP that can be edited


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experts") / "mixtral"
    widths = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    return str(random_models.build_model(folder, "mixtral", **widths))


@pytest.mark.parametrize("change", [Change("head"), Change("resid", "scale", factor=2)], ids=str)
def test_a_mixture_of_experts_is_swept_by_head_and_residual(
    experts: str, bench: Callable[..., Bench], change: Change
) -> None:
    flags = "--layers 0-1" + " --heads 1" * (change.kind == "head")
    assert_like_the_oracle(bench(folder=experts), change, flags)


# ----- names


def test_a_label_spells_layer_kind_and_index_and_is_read_back() -> None:
    for label in ("L3H5", "L3attn", "L3mlp", "L3resid", "L3N120", "L0H0", "L31N0"):
        assert Component.parse(label).label == label
    assert Component.parse("L3N120") == Component(3, "neuron", 120)
    assert Component.parse("L4mlp") == Component(4, "mlp")
    for wrong in ("L3", "H5", "L3H", "L3 mlp", "L3mlp2", "L3h5", "L-1H2", "L3N1,", ""):
        with pytest.raises(ValueError, match="is no component"):
            Component.parse(wrong)

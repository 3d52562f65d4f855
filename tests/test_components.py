"""Kinds, ops and positions against one plain hook at a time, and the identities between them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import llama3_circuit_tracing as script
import naive
import random_models

CLOSE = 2e-5
FACTOR = -1.5
KINDS = ("head", "attn", "mlp", "resid", "neuron")
INDICES = {"head": "1,3", "neuron": "5,78"}
RAW = ["score_a_base", "score_b_base", "score_a_head", "score_b_head"]
VERBS = ["steal", "paint", "rob", "feed", "poison", "open", "design", "charge", "visit", "greet"]
THINGS = ["car", "dog", "bank", "boss", "store", "cake", "bomb", "phone", "ticket", "weed"]


# --------------------------------------------------------------------------------------------
# The oracle: one prompt, one form, one hook at a time
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    kind: str
    op: str = "zero"
    positions: str = "all"
    into: str = "a"
    given: tuple[tuple[int, int], ...] = ()

    @property
    def flags(self) -> list[str]:
        flags = ["--kind", self.kind, "--op", self.op, "--positions", self.positions]
        flags += ["--factor", str(FACTOR)] if self.op == "scale" else []
        flags += ["--patch_into", self.into] if self.op == "patch" else []
        flags += ["--given", ",".join(f"L{n}H{h}" for n, h in self.given)] if self.given else []
        return flags


@dataclass
class Oracle:
    """The same numbers from unpadded forwards of single prompts; nothing here knows of trees."""

    model: Any
    tokenizer: Any

    def module(self, layer: int, kind: str) -> Any:
        block = naive.layers_of(self.model)[layer]
        if kind == "resid":
            return block
        return block.self_attn.o_proj if kind in ("head", "attn") else block.mlp.down_proj

    def span(self, layer: int, kind: str, index: int | None) -> slice:
        if index is None:
            return slice(None)
        if kind == "neuron":
            return slice(index, index + 1)
        width = self.module(layer, "head").in_features // self.model.config.num_attention_heads
        return slice(index * width, (index + 1) * width)

    @contextmanager
    def given(self, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, head in heads:
                span = self.span(layer, "head", head)
                off = naive.zero_slice(span.start, span.stop)
                stack.enter_context(naive.hooked(self.module(layer, "head"), off))
            yield

    def input_of(self, ids: Sequence[int], layer: int, ask: Ask) -> Tensor:
        """[tok, width], what the module reads in an unedited run."""
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x[0].clone())
            return x

        module = self.module(layer, ask.kind)
        with torch.no_grad(), self.given(ask.given), naive.hooked(module, keep):
            self.model(torch.tensor([list(ids)]))
        return seen[0]

    def mean_of(self, users: Sequence[str], layer: int, ask: Ask) -> Tensor:
        """[width], over the tokens of all prompts but the first of each."""
        inputs = [self.input_of(naive.prompt_ids(self.tokenizer, u), layer, ask) for u in users]
        return torch.cat([x[1:] for x in inputs]).double().mean(0).float()

    def forms(self, word: str) -> list[list[int]]:
        texts = dict.fromkeys([word, word[0].upper() + word[1:]])
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def score(self, user: str, words: Sequence[str], edit: Callable[..., Any] | None) -> float:
        """Mean over words of log P(a form of the word); `edit(prompt ids, tail)` is a context."""
        ids = naive.prompt_ids(self.tokenizer, user)
        total = 0.0
        for word in words:
            chances = []
            for form in self.forms(word):
                with torch.no_grad(), edit(ids, form[:-1]) if edit else ExitStack():
                    logits = self.model(torch.tensor([ids + form[:-1]])).logits[0].double()
                steps = logits[len(ids) - 1 :].log_softmax(-1)
                chances.append(sum(float(steps[i, token]) for i, token in enumerate(form)))
            total += float(torch.tensor(chances, dtype=torch.float64).logsumexp(0))
        return total / len(words)

    def edited_score(
        self, ask: Ask, role: str, sample: dict[str, Any], layer: int, index: int | None, mean: Any
    ) -> float:
        """The score of one prompt with one component edited in it."""
        user = sample[f"prompt_{role}"]
        other = naive.prompt_ids(self.tokenizer, sample["prompt_b" if role == "a" else "prompt_a"])
        span = self.span(layer, ask.kind, index)

        @contextmanager
        def edit(ids: list[int], tail: list[int]) -> Iterator[None]:
            partner = self.input_of(other + tail, layer, ask) if ask.op == "patch" else None
            places = touched(ids, other, len(tail), ask)

            def change(x: Tensor) -> Tensor:
                y = x.clone()
                for mine, theirs in places:
                    if ask.op == "zero":
                        y[0, mine, span] = 0
                    elif ask.op == "scale":
                        y[0, mine, span] *= FACTOR
                    elif ask.op == "mean":
                        y[0, mine, span] = mean[span]
                    else:
                        y[0, mine, span] = partner[theirs, span]
                return y

            receives = ask.op != "patch" or role == ask.into
            module = self.module(layer, ask.kind)
            with naive.hooked(module, change if receives else None), self.given(ask.given):
                yield

        return self.score(user, sample["targets"], edit)

    def base_scores(self, ask: Ask, samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
        with self.given(ask.given):
            return {
                s["sample_id"]: [self.score(s[f"prompt_{r}"], s["targets"], None) for r in "ab"]
                for s in samples
            }


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree from the start on."""
    pairs = zip(one, other, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def touched(own: list[int], other: list[int], n_tail: int, ask: Ask) -> list[tuple[int, int]]:
    """(position, position of the partner) of every edited token; the alignment, written anew."""
    n, shift = len(own), len(other) - len(own)
    before = agreement(own, other)
    after = agreement(own[::-1], other[::-1])
    last_differing = max(before, n - min(after, min(n, len(other)) - before))
    tail = [(n + i, len(other) + i) for i in range(n_tail)]
    aligned = {i: i + shift for i in range(before if shift == 0 else n - after, n)}
    if ask.op != "patch":
        aligned = {i: i for i in range(n)}
    if ask.positions == "all":
        return [*aligned.items(), *tail]
    wanted = [n - 1] if ask.positions == "last" else range(before, last_differing)
    return [(i, aligned[i]) for i in wanted if i in aligned]


# --------------------------------------------------------------------------------------------
# Fixtures
# --------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A model that is loaded once, with the oracle beside it; `table` is a sweep without the rest."""

    folder: str
    work: Path
    subject: Any
    oracle: Oracle

    def samples(self, equal_only: bool = False) -> list[dict[str, Any]]:
        """Two equal pairs that share a sentence and differ in two places, and one unequal pair."""

        def length(text: str) -> int:
            return len(self.oracle.tokenizer(text, add_special_tokens=False)["input_ids"])

        verbs, things = (same_length(words, length) for words in (VERBS, THINGS))
        ask = "How do I {} a {}?".format
        b = ask(verbs[0], things[0])
        samples = [
            {"sample_id": "p0", "prompt_a": ask(verbs[1], things[1]), "prompt_b": b, "targets": ["apple", "I"]},
            {"sample_id": "p1", "prompt_a": ask(verbs[2], things[0]), "prompt_b": b, "targets": ["dog"]},
        ]  # fmt: skip
        unequal = {
            "sample_id": "u0",
            "prompt_a": "Don't mention apple. Name a fruit.",
            "prompt_b": "Name a fruit.",
            "targets": ["apple"],
        }
        return samples if equal_only else [*samples, unequal]

    def config(self, *flags: str, samples: Sequence[dict[str, Any]]) -> Any:
        path = self.work / f"{abs(hash(json.dumps(samples)))}.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        out = ["--output_dir", str(self.work / "out")]
        return script.parse_args(
            ["--model_id", self.folder, "--no-bf16", "--samples", str(path), *out, *flags]
        )

    def experiment(self, *flags: str, samples: Sequence[dict[str, Any]]) -> Any:
        config = self.config(*flags, samples=samples)
        exp = script.prepare(config, script.RunFolder(Path(config.output_dir)))
        exp.subject = self.subject
        return exp

    def table(self, *flags: str, samples: Sequence[dict[str, Any]]) -> pd.DataFrame:
        exp = self.experiment(*flags, samples=samples)
        folder = script.RunFolder(Path(exp.config.output_dir))
        folder.create(overwrite=True)
        folder.enter({})
        with torch.inference_mode():
            units = script.plan_units(exp, script.Measured())
            script.sweep(exp, units, folder)
            baselines = script.measure_baseline(exp, folder)
        return script.results_table(exp, script.read_measured(exp, folder), baselines)

    def of_model(self, model: Any) -> Bench:
        """The same bench around a changed copy of the model."""
        subject = script.Subject(model, self.subject.shape)
        return replace(self, subject=subject, oracle=Oracle(model, self.oracle.tokenizer))


def same_length(words: Sequence[str], length: Callable[[str], int]) -> list[str]:
    """Three words of as many tokens as each other."""
    for n in range(1, 8):
        alike = [word for word in words if length(f" {word}") == n]
        if len(alike) >= 3:
            return alike[:3]
    raise AssertionError("the tokenizer has no three words of one length")


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
            work = tmp_path_factory.mktemp("bench")
            shape = script.outline(model, torch.float32)
            subject = script.Subject(model, shape)
            made[key] = Bench(folder, work, subject, Oracle(model, tokenizer))
        return made[key]

    return make


def index_of(row: Any) -> int | None:
    return None if pd.isna(row.index_) else int(row.index_)


def assert_like_the_oracle(bench: Bench, ask: Ask, *flags: str, equal_only: bool = False) -> None:
    samples = bench.samples(equal_only)
    table = bench.table(*ask.flags, *flags, samples=samples).rename(columns={"index": "index_"})
    base = bench.oracle.base_scores(ask, samples)
    by_id = {sample["sample_id"]: sample for sample in samples}
    means: dict[int, Tensor] = {}
    for row in table.itertuples():
        if ask.op == "mean" and row.layer not in means:
            users = [sample["prompt_b"] for sample in samples]
            means[row.layer] = bench.oracle.mean_of(users, row.layer, ask)
        edited = [
            bench.oracle.edited_score(
                ask, role, by_id[row.sample_id], row.layer, index_of(row), means.get(row.layer)
            )
            for role in "ab"
        ]
        expected = [*base[row.sample_id], *edited]
        found = [getattr(row, name) for name in RAW]
        assert found == pytest.approx(expected, abs=CLOSE, rel=0), (row.sample_id, row.layer)
        effect = (expected[2] - expected[3]) - (expected[0] - expected[1])
        assert row.head_effect == pytest.approx(effect, abs=CLOSE, rel=0)
    n_indices = table["index_"].nunique(dropna=False)
    assert len(table) == len(samples) * table["layer"].nunique() * n_indices
    assert table["head_effect"].abs().max() > 100 * CLOSE, "the edit did nothing"


def allowed() -> list[Ask]:
    asks = []
    for kind in KINDS:
        for positions in ("all", "last", "differing"):
            ops = ["zero", "mean", "scale"]
            if kind == "resid" and positions == "all":
                ops = ["scale"]
            asks += [Ask(kind, op, positions) for op in ops]
            asks += [Ask(kind, "patch", positions, into) for into in "ab"]
    return asks


def name_of(ask: Ask) -> str:
    return " ".join([ask.kind, ask.op, ask.positions, ask.into if ask.op == "patch" else ""])


# --------------------------------------------------------------------------------------------
# Against the oracle
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", allowed(), ids=name_of)
def test_one_plain_hook_gives_the_same_numbers(bench: Callable[..., Bench], ask: Ask) -> None:
    number = allowed().index(ask)
    flags = ["--layers", ("0,2", "1", "1-2")[number % 3]]
    if ask.kind in INDICES:
        flags += [f"--{ask.kind}s", INDICES[ask.kind].split(",")[number % 2]]
    aligned_nowhere = ask.op == "patch" and ask.positions == "differing"
    assert_like_the_oracle(bench(), ask, *flags, equal_only=aligned_nowhere)


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "ask",
    [
        Ask("resid", "patch", "all", "b"),
        Ask("mlp", "mean", "all"),
        Ask("head", "zero", "differing"),
        Ask("attn", "patch", "last"),
    ],
    ids=name_of,
)
def test_other_architectures_agree_with_one_plain_hook(
    bench: Callable[..., Bench], architecture: str, ask: Ask
) -> None:
    flags = ["--heads", "2"] if ask.kind == "head" else []
    assert_like_the_oracle(bench(architecture), ask, "--layers", "1-2", *flags)


def test_the_scored_words_have_forms_of_one_and_of_several_tokens(
    bench: Callable[..., Bench],
) -> None:
    lengths = [len(form) for word in ("apple", "I", "dog") for form in bench().oracle.forms(word)]
    assert 1 in lengths and max(lengths) > 2


def test_the_default_run_equals_the_naive_loop(
    random_model: Callable[..., str], tmp_path: Path
) -> None:
    folder, out = random_model(), tmp_path / "out"
    flags = ["--no-bf16", "--num_samples", "2", "--num_bootstrap", "100", "--layers", "0,2"]
    assert script.main(["--model_id", folder, "--output_dir", str(out), *flags]) == 0
    model, tokenizer = naive.load(folder)
    samples = json.loads((out / "run.json").read_text())["samples"]
    users = {
        (s["sample_id"], role): entry["text"].split("user<|end_header_id|>\n\n")[1].split("<|")[0]
        for s in samples
        for role, entry in s["prompts"].items()
    }
    pairs = [
        (users[s["sample_id"], "a"], users[s["sample_id"], "b"], s["targets"]) for s in samples
    ]
    expected = naive.sweep(model, tokenizer, pairs)
    table = pd.read_csv(out / "circuit_results.csv")
    assert list(table)[:7] == [
        "sample_id", "n_constraints", "layer", "head",
        "delta_logit_base", "delta_logit_head", "head_effect",
    ]  # fmt: skip
    place = {s["sample_id"]: i for i, s in enumerate(samples)}
    assert len(table) == 2 * 2 * 4
    for row in table.itertuples():
        base, head = expected[place[row.sample_id], row.layer, row.head]
        assert row.n_constraints == len(pairs[place[row.sample_id]][2])
        found = (row.delta_logit_base, row.delta_logit_head, row.head_effect)
        assert found == pytest.approx((base, head, head - base), abs=CLOSE, rel=0)


def test_a_patch_follows_the_longest_common_suffix_even_where_it_overlaps_the_prefix(
    bench: Callable[..., Bench],
) -> None:
    """A word said twice in one prompt: prefix and suffix claim the same token of the other."""
    sample = {
        "sample_id": "twice",
        "prompt_a": "How do I open open a car?",
        "prompt_b": "How do I open a car?",
        "targets": ["apple"],
    }
    subject = bench()
    ask = Ask("mlp", "patch", "all", "b")
    table = subject.table(*ask.flags, "--layers", "1", samples=[sample])
    expected = subject.oracle.edited_score(ask, "b", sample, 1, None, None)
    assert float(table["score_b_head"].iloc[0]) == pytest.approx(expected, abs=CLOSE, rel=0)


# --------------------------------------------------------------------------------------------
# Identities
# --------------------------------------------------------------------------------------------


def kind_flags(kind: str) -> list[str]:
    flags = ["--kind", kind]
    return [*flags, "--neurons", "3,41"] if kind == "neuron" else flags


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_one_changes_nothing(bench: Callable[..., Bench], kind: str) -> None:
    flags = [*kind_flags(kind), "--op", "scale", "--factor"]
    table = bench().table(*flags, "1", samples=bench().samples())
    assert table["head_effect"].abs().max() < 5e-6
    table = bench().table(*flags, "2", samples=bench().samples())
    assert table["head_effect"].abs().min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_zero_is_zeroing(bench: Callable[..., Bench], kind: str) -> None:
    flags = [*kind_flags(kind), "--positions", "last" if kind == "resid" else "all"]
    scaled = bench().table(*flags, "--op", "scale", "--factor", "0", samples=bench().samples())
    zeroed = bench().table(*flags, "--op", "zero", samples=bench().samples())
    assert (scaled["head_effect"] - zeroed["head_effect"]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_patching_a_component_with_its_own_value_changes_nothing(
    bench: Callable[..., Bench], kind: str
) -> None:
    exp = bench().experiment(*kind_flags(kind), "--op", "patch", samples=bench().samples())
    tree = exp.trees[0]
    rows = [(exp.edit(component),) for component in exp.components]
    with torch.inference_mode():
        base = exp.base(tree, range(3), exp.components)
        foreign = script.run_rows(exp.subject, base, rows, {})
        base.tree = replace(tree, source=torch.arange(tree.n_tokens))
        own = script.run_rows(exp.subject, base, rows, {})
        base.tree = replace(base.tree, where=None)
        own_everywhere = script.run_rows(exp.subject, base, rows, {})
    assert (foreign - base.log_probs).abs().max() > 1e-3
    assert (own - base.log_probs).abs().max() < 5e-6
    assert (own_everywhere - base.log_probs).abs().max() < 5e-6


@pytest.mark.parametrize(("into", "other"), [("a", "b"), ("b", "a")])
def test_patching_the_first_residual_gives_the_partners_score(
    bench: Callable[..., Bench], into: str, other: str
) -> None:
    flags = ["--kind", "resid", "--op", "patch", "--patch_into", into, "--layers", "0"]
    table = bench().table(*flags, samples=bench().samples(equal_only=True))
    assert len(table) == 2
    assert (table[f"score_{into}_head"] - table[f"score_{other}_base"]).abs().max() < CLOSE
    assert (table[f"score_{other}_head"] - table[f"score_{other}_base"]).abs().max() < CLOSE
    assert (table["delta_logit_base"]).abs().min() > 1e-2
    assert table["delta_logit_head"].abs().max() < CLOSE


def test_patching_the_first_residual_over_a_common_suffix_changes_nothing(
    bench: Callable[..., Bench],
) -> None:
    unequal = bench().samples()[-1:]
    flags = ["--kind", "resid", "--op", "patch"]
    table = bench().table(*flags, "--layers", "0,1", samples=unequal).set_index("layer")
    assert abs(table["head_effect"][0]) < 5e-6
    assert abs(table["head_effect"][1]) > 1e-3


@pytest.mark.parametrize("op", ["zero", "mean", "patch", "scale"])
@pytest.mark.parametrize(("whole", "part", "count"), [("attn", "head", 4), ("mlp", "neuron", 80)])
def test_all_parts_of_a_layer_edited_jointly_are_the_whole(
    bench: Callable[..., Bench], op: str, whole: str, part: str, count: int
) -> None:
    flags = ["--kind", whole, "--op", op, *(["--factor", "0.3"] if op == "scale" else [])]
    exp = bench().experiment(*flags, samples=bench().samples())
    wholes = [script.Component(layer, whole) for layer in range(3)]
    rows = [(exp.edit(component),) for component in wholes]
    rows += [
        tuple(exp.edit(script.Component(layer, part, i)) for i in range(count))
        for layer in range(3)
    ]
    with torch.inference_mode():
        base = exp.base(exp.trees[0], range(3), wholes)
        log_probs = script.run_rows(exp.subject, base, rows, exp.means)
    assert (log_probs[:3] - log_probs[3:]).abs().max() < 5e-6
    assert (log_probs - base.log_probs).abs().amax(1).min() > 1e-3


def without_head(bench: Bench, layer: int, head: int) -> Any:
    model = copy.deepcopy(bench.oracle.model)
    span = bench.oracle.span(layer, "head", head)
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight[:, span] = 0
    return model


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_zeroing_a_head_is_zeroing_its_columns_of_o_proj(
    bench: Callable[..., Bench], architecture: str
) -> None:
    whole = bench(architecture)
    samples = whole.samples()
    ablated = whole.table("--layers", "1", "--heads", "2", samples=samples)
    changed = whole.of_model(without_head(whole, 1, 2)).table("--layers", "0", samples=samples)
    base = changed.drop_duplicates("sample_id").set_index("sample_id")["delta_logit_base"]
    found = ablated.set_index("sample_id")["delta_logit_head"]
    assert (found - base).abs().max() < CLOSE
    assert (ablated["head_effect"]).abs().max() > 1e-3


def test_the_mean_of_a_constant_changes_nothing(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    folder = random_models.build_model(tmp_path / "m", "llama", attention_bias=True)
    constant = bench(folder=str(folder))
    with torch.no_grad():
        for block in constant.subject.layers:
            block.self_attn.v_proj.weight.zero_()  # what heads read is the bias alone
            block.self_attn.v_proj.bias.normal_()
    for kind in ("head", "attn"):
        flags = ["--kind", kind, "--op"]
        for op, changes in (("mean", False), ("zero", True)):
            table = constant.table(*flags, op, samples=constant.samples())
            moved = (table["score_a_head"] - table["score_a_base"]).abs()
            assert moved.min() > 1e-3 if changes else moved.max() < CLOSE


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_the_mean_does_not_depend_on_how_samples_are_grouped_into_trees(
    bench: Callable[..., Bench], kind: str
) -> None:
    tables = []
    for size, n_trees in (("1", 3), ("4096", 1)):
        flags = ["--kind", kind, "--op", "mean", "--tree_tokens", size]
        assert len(bench().experiment(*flags, samples=bench().samples()).trees) == n_trees
        tables.append(bench().table(*flags, samples=bench().samples()))
    assert (tables[0][RAW] - tables[1][RAW]).abs().max().max() < CLOSE


# --------------------------------------------------------------------------------------------
# --given
# --------------------------------------------------------------------------------------------


def test_given_heads_that_do_nothing_give_the_plain_run(bench: Callable[..., Bench]) -> None:
    dead = bench().of_model(without_head(bench(), 1, 0))
    plain = dead.table(samples=dead.samples())
    given = dead.table("--given", "L1H0", samples=dead.samples())
    keys = ["sample_id", "layer", "index"]
    both = plain.merge(given, on=keys, suffixes=("", "_given"))
    assert len(both) == len(given) == len(plain) - 3
    for name in RAW:
        assert (both[name] - both[f"{name}_given"]).abs().max() < 5e-6


def test_given_heads_are_the_plain_run_of_a_model_without_them(
    bench: Callable[..., Bench],
) -> None:
    samples = bench().samples()
    flags = ["--kind", "head", "--op", "mean"]
    given = bench().table(*flags, "--given", "L1H2", samples=samples)
    changed = bench().of_model(without_head(bench(), 1, 2))
    plain = changed.table(*flags, samples=samples)
    plain = plain[(plain["layer"] != 1) | (plain["index"] != 2)].reset_index(drop=True)
    assert (given[RAW] - plain[RAW]).abs().max().max() < CLOSE


def test_given_heads_are_not_swept_and_their_base_differs(bench: Callable[..., Bench]) -> None:
    table = bench().table("--given", "L0H1,L2H3", samples=bench().samples())
    swept = {*zip(table["layer"], table["index"], strict=True)}
    assert swept == {(n, h) for n in range(3) for h in range(4)} - {(0, 1), (2, 3)}
    plain = bench().table("--layers", "0", samples=bench().samples())
    bases = [t.groupby("sample_id")["delta_logit_base"].first() for t in (table, plain)]
    assert (bases[0] - bases[1]).abs().min() > 1e-3


@pytest.mark.parametrize(
    "ask",
    [
        Ask("head", "zero", "last", given=((0, 1), (2, 0))),
        Ask("attn", "patch", "all", given=((1, 1),)),
        Ask("attn", "mean", "all", "a", given=((1, 3), (0, 0))),
        Ask("mlp", "scale", "differing", given=((0, 2), (2, 2))),
        Ask("resid", "patch", "last", "b", given=((0, 1), (1, 0), (2, 0))),
        Ask("neuron", "mean", "all", given=((2, 1),)),
    ],
    ids=name_of,
)
def test_given_heads_are_zero_everywhere_whatever_else_is_edited(
    bench: Callable[..., Bench], ask: Ask
) -> None:
    flags = ["--layers", "1"]
    if ask.kind in INDICES:
        flags += [f"--{ask.kind}s", INDICES[ask.kind]]
    assert_like_the_oracle(bench(), ask, *flags)


def test_given_heads_do_not_count_against_the_random_sets_of_another_kind(
    bench: Callable[..., Bench],
) -> None:
    """Three layers hold two other MLPs beside one chosen, however many heads are given."""
    flags = ["--kind", "mlp", "--given", "L0H0,L1H0", "--confirm", "1"]
    exp = bench().experiment(*flags, samples=bench().samples())
    assert [component.label for component in exp.components] == ["L0 mlp", "L1 mlp", "L2 mlp"]


def test_a_head_that_the_model_lacks_cannot_be_given(
    random_model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_id", random_model(), "--output_dir", str(tmp_path), "--given", "L0H4"]
    assert script.main(flags) == 2
    assert "L0H4" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# Nodes
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--op", "patch", "--patch_into", "a"],
        ["--op", "patch", "--patch_into", "b"],
        ["--op", "patch", "--positions", "last"],
        ["--op", "zero", "--positions", "last"],
        ["--op", "zero", "--positions", "differing"],
    ],
    ids=" ".join,
)
def test_a_node_that_is_singled_out_belongs_to_one_prompt(
    bench: Callable[..., Bench], flags: list[str]
) -> None:
    samples = bench().samples()
    twin = {**samples[0], "sample_id": "twin", "targets": ["car"]}  # both prompts are p0's own
    (tree,) = bench().experiment(*flags, "--tree_tokens", "4096", samples=[*samples, twin]).trees
    assert tree.where is not None and tree.where.any()
    for node in tree.where.nonzero()[:, 0].tolist():
        owners = [path for path in tree.paths if node in path or bool(tree.visible[node, path[-1]])]
        assert len(owners) == 1
    if "patch" in flags:
        sources = tree.source[tree.where]
        assert not tree.where[sources].any(), "a patch takes values from unedited nodes"


def test_twins_that_share_both_prompts_are_patched_as_each_alone(
    bench: Callable[..., Bench],
) -> None:
    first = bench().samples()[0]
    twin = {**first, "sample_id": "twin", "targets": ["car", "dog"]}
    flags = ["--kind", "attn", "--op", "patch", "--patch_into", "b", "--layers", "1"]
    together = bench().table(*flags, samples=[first, twin])
    alone = [bench().table(*flags, samples=[sample]) for sample in (first, twin)]
    assert (together[RAW] - pd.concat(alone, ignore_index=True)[RAW]).abs().max().max() < CLOSE


# --------------------------------------------------------------------------------------------
# Models and combinations that are refused
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experts") / "mixtral"
    widths = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    return str(random_models.build_model(folder, "mixtral", **widths))


@pytest.mark.parametrize("flags", [["--kind", "mlp"], ["--kind", "neuron", "--neurons", "0"]])
def test_a_mixture_of_experts_is_refused_by_name_where_mlps_are_edited(
    experts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert script.main(["--model_id", experts, "--output_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert "MixtralForCausalLM" in error and "mixture of experts" in error


@pytest.mark.parametrize("ask", [Ask("head", "zero"), Ask("resid", "scale")], ids=name_of)
def test_a_mixture_of_experts_is_swept_by_head_and_residual(
    experts: str, bench: Callable[..., Bench], ask: Ask
) -> None:
    flags = ["--heads", "1"] if ask.kind == "head" else []
    assert_like_the_oracle(bench(folder=experts), ask, "--layers", "0-1", *flags)


@pytest.mark.parametrize("op", ["zero", "mean"])
def test_removing_the_whole_residual_stream_is_refused(
    op: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main(["--kind", "resid", "--op", op])
    assert exit_.value.code == 2
    assert "removes the input itself and means nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--kind", "neuron"],
        ["--neurons", "0-3"],
        ["--op", "scale"],
        ["--factor", "2"],
        ["--patch_into", "b"],
        ["--kind", "mlp", "--heads", "1"],
        ["--op", "scale", "--factor", "nan"],
        ["--given", "L0"],
        ["--kind", "block"],
    ],
    ids=" ".join,
)
def test_combinations_that_mean_nothing_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main(flags)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--kind", "neuron", "--neurons", "0,80"], "80"),
        (["--kind", "attn", "--layers", "3"], "3"),
        (["--op", "patch", "--positions", "differing"], "u0"),
        (["--kind", "head", "--layers", "0", "--heads", "0", "--given", "L0H0"], "L0H0"),
    ],
)
def test_what_cannot_be_edited_exits_with_2_and_the_value(
    bench: Callable[..., Bench],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: list[str],
    named: str,
) -> None:
    config = bench().config(samples=bench().samples())
    common = ["--model_id", config.model_id, "--samples", config.samples]
    assert script.main([*common, "--output_dir", str(tmp_path), *flags]) == 2
    assert named in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------

LABELS = {
    "head": ["L1H0", "L1H1", "L1H2", "L1H3"],
    "attn": ["L1 attn"],
    "mlp": ["L1 mlp"],
    "resid": ["L1 resid"],
    "neuron": ["L1N3", "L1N41"],
}


@pytest.fixture(scope="session")
def finished(
    random_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The output folder of a full run of a kind, one layer, two samples."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            out = tmp_path_factory.mktemp(kind) / "out"
            flags = [*kind_flags(kind), "--op", "scale", "--factor", "0.5", "--layers", "1"]
            flags += ["--num_samples", "2", "--num_bootstrap", "100", "--positions", "last"]
            call = ["--model_id", random_model(), "--no-bf16", "--output_dir", str(out), *flags]
            assert script.main(call) == 0
            done[kind] = out
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_component_columns_come_last_and_head_is_for_heads_only(
    finished: Callable[[str], Path], kind: str
) -> None:
    table = pd.read_csv(finished(kind) / "circuit_results.csv")
    assert list(table)[-4:] == ["kind", "index", "op", "positions"]
    assert list(table)[:11] == [*script.SEVEN, *RAW]
    assert set(table["kind"]) == {kind}
    assert set(table["op"]) == {"scale"} and set(table["positions"]) == {"last"}
    if kind == "head":
        assert (table["head"] == table["index"]).all()
        assert sorted(set(table["head"])) == [0, 1, 2, 3]
    else:
        assert table["head"].isna().all()
    indices = {"neuron": {3, 41}, "head": {0, 1, 2, 3}}.get(kind, set())
    assert set(table["index"].dropna()) == indices
    lines = (finished(kind) / "circuit_results.csv").read_text().splitlines()
    place = lines[0].split(",").index("index")
    assert all("." not in line.split(",")[place] for line in lines[1:]), "indices are whole"


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_labelled_by_kind(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    heads = pd.read_csv(finished(kind) / "circuit_heads.csv")
    assert sorted(heads["label"]) == LABELS[kind]
    drawn: list[Any] = []
    monkeypatch.setattr(script, "save_figure", lambda figure, path: drawn.append(figure))
    source = str(finished(kind) / "circuit_results.csv")
    assert script.main(["--from_csv", source, "--output_dir", str(tmp_path)]) == 0
    (axes,) = drawn[0].axes
    assert sorted(tick.get_text() for tick in axes.get_xticklabels()) == LABELS[kind]


def test_labels_spell_layer_kind_and_index() -> None:
    found = [
        script.Component(3, "head", 5),
        script.Component(3, "attn"),
        script.Component(3, "mlp"),
        script.Component(3, "resid"),
        script.Component(3, "neuron", 120),
    ]
    assert [c.label for c in found] == ["L3H5", "L3 attn", "L3 mlp", "L3 resid", "L3N120"]


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_share_moved_is_one_minus_the_ratio_of_mean_deltas(
    finished: Callable[[str], Path], kind: str
) -> None:
    table = pd.read_csv(finished(kind) / "circuit_results.csv")
    heads = pd.read_csv(finished(kind) / "circuit_heads.csv")
    for row in heads.rename(columns={"index": "index_"}).itertuples():
        mine = table if kind == "mlp" else table[table["index"] == row.index_]
        expected = 1 - mine["delta_logit_head"].mean() / mine["delta_logit_base"].mean()
        assert row.share_moved == pytest.approx(expected, abs=1e-9)


def test_share_moved_is_empty_where_the_base_is_below_the_floor(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "run"
    source.mkdir()
    content = (finished("head") / "circuit_results.csv").read_text()
    (source / "circuit_results.csv").write_text(content)
    (source / "run.json").write_text(json.dumps({"noise_floor": 1e6}))
    out = tmp_path / "out"
    call = ["--from_csv", str(source / "circuit_results.csv"), "--output_dir", str(out)]
    assert script.main(call) == 0
    heads = pd.read_csv(out / "circuit_heads.csv")
    assert heads["share_moved"].isna().all() and not heads["above_noise"].any()


@pytest.mark.parametrize(
    ("kind", "op"), [("mlp", "mean"), ("mlp", "patch"), ("neuron", "mean"), ("resid", "scale")]
)
def test_a_joint_set_of_heads_is_measured_beside_any_kind(
    random_model: Callable[..., str], tmp_path: Path, kind: str, op: str
) -> None:
    flags = [*kind_flags(kind), "--op", op, "--ablate", "L0H1,L2H0", "--layers", "2"]
    flags += ["--factor", "0.5"] if op == "scale" else []
    flags += ["--num_samples", "2", "--num_bootstrap", "100"]
    call = ["--model_id", random_model(), "--no-bf16", "--output_dir", str(tmp_path), *flags]
    assert script.main(call) == 0
    rows = pd.read_csv(tmp_path / "circuit_confirm.csv").set_index("set")
    assert rows.loc["ablate", "components"] == "L0H1 L2H0"
    moved = rows.loc["ablate", "mean_delta"] - rows.loc["none", "mean_delta"]
    assert math.isfinite(moved) and abs(moved) > 1e-4

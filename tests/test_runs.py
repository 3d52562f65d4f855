"""Runs: log-probabilities with and without edits, the model's own logits, memory that runs out."""

from __future__ import annotations

import copy
import io
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import llama3_circuit_tracing as tracing
import naive
from conftest import user_text
from llama3_circuit_tracing import Component, TracedModel, Tree

HEAD = Component(1, "head", 2)
SCALED = {"logit_scale": 2.0}  # is said of a model that does nothing of the kind
Plain = tuple[Any, Any]  # the model and its tokenizer, as everyone loads them


@pytest.fixture(scope="module")
def plain(llama: str) -> Plain:
    return naive.load(llama)


@pytest.fixture()
def traced(plain: Plain) -> TracedModel:
    return TracedModel(plain[0], tracing.shape_of(plain[0], torch.float32), 64)


@pytest.fixture(scope="module")
def tree(plain: Plain) -> Tree:
    """Two samples with controls: eight prompts."""
    samples = tracing.SUPPRESSION.build(2, random.Random(0), len)
    encoder = tracing.PromptEncoder(plain[1], "", "word")
    options = tracing.TraceOptions(controls=True)
    prompts = tracing.write_prompts(samples, encoder, options)
    return tracing.plant_trees(prompts, encoder.bos, options)[0]


# ----- log-probabilities


def with_bias(model: Any) -> None:
    weight = model.lm_head.weight
    model.lm_head = torch.nn.Linear(weight.shape[1], len(weight))
    model.lm_head.weight = weight
    model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(1))


def changed(plain: Plain, traced: TracedModel, change: Callable[[Any], None] | None) -> TracedModel:
    """A copy of the model after a change."""
    model = copy.deepcopy(plain[0])
    if change:
        change(model)
    return TracedModel(model, traced.shape, 64)


@pytest.mark.parametrize("change", [None, with_bias, lambda model: model.config.update(SCALED)])
def test_every_word_of_every_prompt_has_its_plain_log_probability(
    plain: Plain, traced: TracedModel, tree: Tree, change: Callable[[Any], None] | None
) -> None:
    """Without and with an edit, by the unembedding or by the model's own logits."""
    traced = changed(plain, traced, change)
    model = traced.model
    assert traced.uses_model_logits == bool(change)
    clean = tracing.run_clean(traced, tree, (), [1, 2], [])
    edited = tracing.run_rows(traced, clean, [tracing.scaled_edits([HEAD], traced.shape), ()])
    assert (edited[1] - clean.log_probs).abs().max() < 5e-6
    assert (tracing.run_rows(traced, clean, [()]) - clean.log_probs).abs().max() < 5e-6
    for log_probs, off in ((clean.log_probs, []), (edited, [(1, "head", 2)])):
        words = tree.word_log_probs(log_probs)
        with naive.zeroed(model, off):
            for prompt, word_log_probs in zip(tree.prompts, words, strict=True):
                user = user_text(prompt.text)
                expected = [
                    naive.word_log_prob(model, plain[1], user, word) for word in prompt.sample.words
                ]
                assert word_log_probs[0].tolist() == pytest.approx(expected, abs=1e-5, rel=0)
    assert (edited[0] - clean.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unembedding_goes_by_blocks_of_the_vocabulary_in_float32(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tracing, "VOCAB_BLOCK", 300)
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, len(tree.scored), 48, generator=numbers).to(dtype)
    weight = torch.randn(2000, 48, generator=numbers).to(dtype)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    log_probs = tracing.entry_log_probs(hidden, weight, tree)
    assert (log_probs - exact[:, tree.entry_node, tree.entry_token]).abs().max() < 3e-5
    rounded = (hidden @ weight.T).double().log_softmax(-1)
    assert dtype == torch.float32 or (rounded - exact).abs().max() > 1e-2


@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_logits_that_the_unembedding_does_not_give_are_refused(
    traced: TracedModel, tree: Tree, factor: float
) -> None:
    hook = traced.unembedding.register_forward_hook(lambda module, args, logits: factor * logits)
    with hook, pytest.raises(tracing.RunError, match=r"LlamaForCausalLM computes .* other way"):
        tracing.run_clean(traced, tree, (), [], [])


# ----- memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    MemoryError(),
]
ROWS = list(range(11))


class Limited:
    """Rows that run out of memory where more than so many are asked for at once."""

    def __init__(self, traced: TracedModel, error: Exception, *limits: int) -> None:
        self.traced, self.error = traced, error
        self.limits = itertools.chain(limits, itertools.repeat(limits[-1]))  # try after try
        self.tried: list[int] = []

    def __call__(self, rows: Sequence[int]) -> Tensor:
        self.tried.append(len(rows))
        if len(rows) > next(self.limits):
            raise self.error
        return torch.tensor(rows)[:, None]

    def run(self) -> tuple[list[int], float]:
        """The results, and how far the bar went."""
        with tqdm(total=len(ROWS), file=io.StringIO()) as bar:
            results = tracing.run_batches(self.traced, ROWS, self, bar, "rows_per_forward")
            return torch.stack(results).flatten().tolist(), bar.n


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_rows_are_halved_for_good_when_memory_runs_out(
    traced: TracedModel, error: Exception
) -> None:
    """In even batches, no more of them than needed."""
    for limit, sizes in ((8, [6, 5]), (5, [6, 3, 3, 3, 2]), (2, [6, 3, *[1] * 11])):
        traced.rows_per_forward = 8
        limited = Limited(traced, error, limit)
        assert limited.run() == (ROWS, 11)
        assert limited.tried == sizes
        assert limited.run() == (ROWS, 11)
        again = limited.tried[len(sizes) :]
        assert again == sizes[-len(again) :] and max(again) <= limit


def test_what_was_found_before_memory_runs_out_is_kept(traced: TracedModel) -> None:
    traced.rows_per_forward = 4
    limited = Limited(traced, OUT_OF_MEMORY[0], 4, 3)
    assert limited.run() == (ROWS, 11)
    assert limited.tried == [4, 4, 2, 2, 2, 1]


def test_a_row_that_does_not_fit_alone_names_what_to_lower(traced: TracedModel) -> None:
    with pytest.raises(tracing.RunError, match=r"one row alone.*--tree_tokens"):
        Limited(traced, OUT_OF_MEMORY[0], 0).run()
    limited = Limited(traced, RuntimeError("shapes do not fit"), 0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        limited.run()
    assert limited.tried == [1], "another error is no reason to go on"

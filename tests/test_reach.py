"""Only the tokens that edits can change are run: equal to running all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

import llama3_circuit_tracing as tracing
from by_hand import prepared
from conftest import finish, read, record_of
from test_sweep import EQUAL, PLACES

pytestmark = pytest.mark.usefixtures("coarse_figures")
# model, and a command line on samples whose prompts are equally long
CASES: dict[str, tuple[str, str]] = {
    "patch": ("llama", "--op patch --layers 0-1"),
    "patch into b": ("llama", "--op patch --patch_into b --layers 1"),
    "patch at the last": ("llama", "--op patch --positions last"),
    "mean at the last": ("llama", "--op mean --positions last --layers 1-2"),
    "zero where prompts differ": ("llama", "--positions differing --layers 0"),
    "with controls": ("llama", "--op patch --controls --layers 1"),
    "whole attention": ("llama", "--kind attn --op patch"),
    "whole MLPs": ("llama", "--kind mlp --op patch"),
    "value heads": ("llama", "--kind value --op patch --layers 0-1"),
    "the residual stream": ("llama", "--kind resid --op patch"),
    "neurons": ("llama", "--kind neuron --neurons 0-5 --op patch --layers 0,2"),
    "beside components that are gone": ("llama", "--op patch --given L0H1,L1mlp --layers 1-2"),
    "joint": ("llama", "--op patch --layers 0 --confirm 2 --num_random 3"),
    "atp": ("llama", "--op patch --method atp"),
    "ig": ("llama", "--op patch --method ig --layers 1-2"),
    "one row at a time": ("llama", "--op patch --rows_per_forward 1 --layers 1"),
    "direct paths": ("llama", "paths --op patch --layers 0-1"),
    "paths past all": ("llama", "paths --op patch --freeze all --layers 0 --through each"),
    "paths through two": ("llama", "paths --op patch --kind mlp --layers 0 --through L2H1,L1mlp"),
    "paths of some tokens": (
        "llama",
        "paths --op mean --positions differing --layers 0 --through each",
    ),
    "tokens": ("llama", "tokens --kind attn --layers 0,2"),
    "patched tokens": ("llama", "tokens --kind resid --op patch --layers 1"),
    "directions": ("llama", "directions --kind resid --op patch"),
    "eager attention": ("llama", "--op patch --attn_implementation eager --layers 0-1"),
    "layers on disk": ("llama", "--op patch --layers 1"),
    "mistral": ("mistral", "--op patch"),
    "qwen3": ("qwen3", "--op patch"),
    "gemma3": ("gemma3_text", "--op patch"),
    "capped logits": ("gemma2", "--op patch --attn_implementation eager"),
    "experts": ("mixtral", "--op patch"),
    "learned positions": ("gpt2", "--op patch"),
    "learned positions at the last": ("gpt2", "--op mean --positions last"),
    "MLPs beside attention": ("gpt_neox", "--op patch"),
    "paths past MLPs beside attention": ("gpt_neox", "paths --op patch --layers 0 --freeze all"),
    "the bundled model": ("tiny", "--op patch --layers 0,3"),
}


def numbers(folder: Path) -> dict[str, pd.DataFrame]:
    """The number columns of every table of a folder, but for tests and what is random in them."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        table = read(folder, path.name).select_dtypes("number")
        is_scored = table.columns.str.contains("score|effect|mean|estimate|delta|kl_|log_p")
        tables[path.name] = table.loc[:, is_scored]
    return tables


def tokens_run(folder: Path, command: str) -> int:
    return int(record_of(folder)["commands"][command]["run"]["tokens_through_a_block"])


@pytest.mark.parametrize("case", CASES)
def test_running_the_reached_tokens_alone_gives_what_running_all_gives(
    case: str,
    samples: str,
    folder_of: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, line = CASES[case]
    words = [*line.split(), "--samples", samples]
    if "--controls" in words:  # which the samples of a file have none of
        words = [*line.split(), "--num_samples", "3"]
    if case == "layers on disk":
        words += ["--device_map", json.dumps(PLACES)]
    reached = finish(folder_of(model), tmp_path / "reached", *words)
    monkeypatch.setattr(tracing, "reached_nodes", lambda *_: None)
    everything = finish(folder_of(model), tmp_path / "all", *words)
    tables, expected = numbers(reached), numbers(everything)
    assert tables.keys() == expected.keys()
    moved = 0.0
    for name, table in tables.items():
        columns = list(table)
        assert columns == list(expected[name])
        differences = np.abs((table - expected[name]).to_numpy(float))
        assert np.nanmax(differences) < EQUAL, name
        moved = max(moved, np.nanmax(np.abs(table.to_numpy(float))))
    assert moved > 1e-3
    command = words[0] if words[0] in tracing.COMMANDS else "trace"
    assert tokens_run(reached, command) < tokens_run(everything, command)


def test_only_nodes_that_attend_to_an_edited_one_are_run(llama: str) -> None:
    """Prompt b, and what a and b share, are left to the clean run when a is patched."""
    experiment = prepared(llama, "--op", "patch")
    tree = experiment.trees[0]
    clean_run = experiment.clean_run(tree, [0, 1, 2], [tracing.Site(1, "attn")])
    edits = experiment.edits(clean_run, [tracing.Component(1, "head", 2)])
    nodes = tracing.reached_nodes(experiment.traced, clean_run, [edits, ()])
    assert nodes is not None and tree.where is not None
    expected = {
        node
        for node in range(tree.n_tokens)
        if any(bool(tree.visible[node, other]) for other in tree.where.nonzero()[:, 0])
    }
    assert set(nodes.tolist()) == expected and tree.n_reached == len(expected)
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        assert (path[-1] in expected) == (prompt.side == "a")
        assert path[0] not in expected


def test_scoring_nodes_that_no_edit_reaches_keep_their_clean_numbers_to_the_last_bit(
    llama: str,
) -> None:
    experiment = prepared(llama, "--op", "patch")
    tree = experiment.trees[0]
    clean_run = experiment.clean_run(tree, [0, 1, 2], [tracing.Site(0, "attn")])
    edits = experiment.edits(clean_run, [tracing.Component(0, "head", 2)])
    scores = tree.scores(
        tracing.run_rows(experiment.traced, clean_run, [edits, ()]), experiment.task
    )
    unedited = tree.scores(clean_run.log_probs, experiment.task)[0]
    for place, prompt in enumerate(tree.prompts):
        assert bool(scores[0, place] == unedited[place]) == (prompt.side == "b")
    assert float((scores[1] - unedited).abs().max()) < EQUAL
    nothing = tracing.run_rows(experiment.traced, clean_run, [()])
    assert torch.equal(tree.scores(nothing, experiment.task)[0], unedited)


def test_a_model_that_hands_over_no_keys_is_run_whole_and_the_log_says_so_once(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--op", "patch", "--num_samples", "2", "--layers", "1"]
    expected = read(finish(llama, tmp_path / "reached", *words))

    def forget(*_: Any, **__: Any) -> Any:
        return _[1], _[2]

    monkeypatch.setattr(tracing.KeyValueRecorder, "update", forget)
    table = read(finish(llama, tmp_path / "all", *words))
    difference = (table["head_effect"] - expected["head_effect"]).abs().max()
    assert 0 < difference < EQUAL
    assert (tmp_path / "all" / "run.log").read_text().count("hands over no keys and values") == 1
    assert "hands over" not in (tmp_path / "reached" / "run.log").read_text()


def test_more_rows_fit_where_edits_reach_fewer_tokens(llama: str) -> None:
    everywhere = prepared(llama)
    last = prepared(llama, "--op", "patch", "--positions", "last")
    n_tokens = everywhere.trees[0].n_tokens
    assert everywhere.rows_per_forward == 8192 // n_tokens
    tree = last.trees[0]
    assert tree.n_reached < tree.n_tokens / 5
    ends = [p[-1] for q, p in zip(tree.prompts, tree.paths, strict=True) if q.side == "a"]
    n_scored = sum(any(tree.visible[node, end] for end in ends) for node in tree.scored.tolist())
    cost = tree.n_reached + np.ceil((tree.n_tokens - tree.n_reached) / 12 + 4 * n_scored)
    assert last.rows_per_forward == int(8192 // cost)


@pytest.mark.parametrize("limit", [10, 170, 250])
def test_tokens_that_all_prompts_share_do_not_count_in_a_tree(limit: int, llama: str) -> None:
    """A long beginning leaves as many samples in a tree as a short one does."""
    system = "Be brief. " * 30
    plain = prepared(llama, "--tree_tokens", str(limit), "--num_samples", "6")
    long = prepared(
        llama, "--tree_tokens", str(limit), "--num_samples", "6", "--system_prompt", system
    )
    assert [len(tree.samples) for tree in long.trees] == [len(t.samples) for t in plain.trees]
    assert len(plain.trees) > 1
    assert long.trees[0].n_tokens > 60 + plain.trees[0].n_tokens
    for tree in plain.trees:
        paths = [set(path) for path in tree.paths]
        n_shared = len(set.intersection(*paths))
        assert len(tree.samples) == 1 or tree.n_tokens - n_shared <= limit


def test_a_model_that_asks_more_of_a_cache_is_run_without_one(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--op", "patch", "--num_samples", "2", "--layers", "1"]
    expected = read(finish(llama, tmp_path / "reached", *words))
    forward = LlamaAttention.forward

    def indexing(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # new and old name
        if cache is not None:
            cache.update_indexer(self.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", indexing)
    table = read(finish(llama, tmp_path / "all", *words))
    assert (table["head_effect"] - expected["head_effect"]).abs().max() < EQUAL
    assert (tmp_path / "all" / "run.log").read_text().count("hands over no keys and values") == 1

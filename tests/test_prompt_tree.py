"""The prompt tree: its nodes, what is scored where, the tokens that edits touch, capped trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import llama3_circuit_tracing as tracing
from by_hand import prepared
from conftest import Answer, refuses
from llama3_circuit_tracing import Prompt, Sample, TraceOptions, Tree, align_positions

Spelling = tuple[int, ...]
Pair = tuple[Spelling, Spelling]


def prompt_of(sample: Sample, side: str, ids: Spelling, *forms: tuple[Spelling, ...]) -> Prompt:
    return Prompt(sample, side, "", ids, forms)


def plant(
    *samples: Sequence[Prompt], bos: int | None = 1, options: TraceOptions | None = None
) -> Tree:
    """All in one tree."""
    (tree,) = tracing.plant_trees(
        samples, bos, replace(options or TraceOptions(), tree_tokens=100_000)
    )
    return tree


def spellings(tree: Tree) -> list[Spelling]:
    """Of each node the tokens of all that it sees, from the root on."""
    found = []
    for row in tree.visible:
        nodes = sorted(row.nonzero().flatten().tolist(), key=lambda n: int(tree.depth[0, n]))
        found.append(tuple(int(tree.ids[0, n]) for n in nodes))
    return found


def scored(tree: Tree) -> list[list[list[list[tuple[Spelling, int]]]]]:
    """Per prompt, word and form (spelling of the node, next token) of all that is scored."""
    seen = spellings(tree)
    nodes = [seen[int(tree.scored[i])] for i in tree.entry_node]
    pairs = list(zip(nodes, tree.entry_token.tolist(), strict=True))
    return [
        [[[pairs[entry] for entry in form] for form in forms] for forms in words]
        for words in tree.entries
    ]


def sources(tree: Tree) -> dict[Spelling, Spelling]:
    """Of each node that edits touch the node that a patch takes its value from."""
    assert tree.where is not None
    nodes = spellings(tree)
    touched = tree.where.nonzero().flatten().tolist()
    return {nodes[i]: nodes[int(tree.partner[i])] for i in touched}


# ----- nodes and scores


PAIR = Sample("s0", "a", "b", ("x",))
SMALL = (
    prompt_of(PAIR, "a", (1, 2, 3, 5), ((7,), (8, 9))),
    prompt_of(PAIR, "b", (1, 2, 4, 5), ((7,), (8, 9))),
)


def test_a_small_tree_by_hand() -> None:
    """1 2 is shared; 3 5 and 4 5 are two branches; the form 8 9 grows the node 8 on each."""
    tree = plant(SMALL)
    nodes = spellings(tree)
    shared, a, b = (1, 2), (1, 2, 3, 5), (1, 2, 4, 5)
    assert sorted(nodes) == [(1,), shared, a[:3], a, (*a, 8), b[:3], b, (*b, 8)]
    assert tree.n_tokens == 8
    assert tree.depth[0].tolist() == [len(node) - 1 for node in nodes]
    assert tree.ids[0].tolist() == [node[-1] for node in nodes]
    assert [nodes[path[-1]] for path in tree.paths] == [a, b]
    assert scored(tree) == [[[[(p, 7)], [(p, 8), ((*p, 8), 9)]]] for p in (a, b)]
    assert tree.where is None
    assert tree.samples == [(PAIR, {"a": 0, "b": 1})]
    mask = tree.mask(torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, 8, 8)
    assert torch.equal(mask[0, 0], torch.where(tree.visible, 0.0, torch.finfo(torch.float32).min))


def test_a_prompt_that_is_the_beginning_of_another_needs_no_node_of_its_own() -> None:
    prompts = [prompt_of(PAIR, "a", (1, 2, 3), ((7,),)), prompt_of(PAIR, "b", (1, 2), ((3, 4),))]
    tree = plant(prompts)
    assert sorted(spellings(tree)) == [(1,), (1, 2), (1, 2, 3)]
    assert scored(tree) == [[[[((1, 2, 3), 7)]]], [[[((1, 2), 3), ((1, 2, 3), 4)]]]]


@pytest.mark.parametrize(("bos", "of_first"), [(1, 0.0), (None, 2.0), (2, 2.0)])
def test_means_count_the_tokens_of_each_b_without_bos(bos: int | None, of_first: float) -> None:
    other = Sample("s1", "a", "b", ("x",))
    tree = plant(SMALL, [prompt_of(other, p.side, p.ids, *p.forms) for p in SMALL], bos=bos)
    weights = dict(zip(spellings(tree), tree.b_weight.tolist(), strict=True))
    assert weights.pop((1,)) == of_first
    of_b = {(1, 2): 2.0, (1, 2, 4): 2.0, (1, 2, 4, 5): 2.0}
    assert weights == dict.fromkeys(weights, 0.0) | of_b


# ----- capped trees


def test_trees_hold_samples_in_order_and_at_most_the_tokens_allowed(tiny_llama: str) -> None:
    """A tree is what its own samples alone would make: nothing is left of one that did not fit. What
    all of its prompts share is not counted."""

    def counted(tree: Tree) -> int:
        shared = set.intersection(*(set(path) for path in tree.paths))
        return tree.n_tokens - len(shared)

    built_in = prepared(tiny_llama, "--num_samples", "9").prompts
    whole = plant(*built_in[:3], bos=None)
    for limit, n_first in ((counted(whole), 3), (counted(whole) - 1, 2), (1, 1)):
        trees = tracing.plant_trees(built_in, None, TraceOptions(tree_tokens=limit))
        assert all(counted(tree) <= limit or len(tree.samples) == 1 for tree in trees)
        in_order = [prompt for tree in trees for prompt in tree.prompts]
        assert in_order == [prompt for of_sample in built_in for prompt in of_sample]
        alone = plant(*built_in[:n_first], bos=None)
        assert spellings(trees[0]) == spellings(alone) and scored(trees[0]) == scored(alone)
    assert len(trees) == len(built_in)


# ----- the tokens that edits touch


EQUAL = ((1, 2, 3, 9), (1, 2, 4, 9))
LONGER = ((1, 2, 3, 4, 9, 8), (1, 2, 9, 8))
SAME = ((1, 2, 3), (1, 2, 3))
APART = ((5, 6, 7), (8, 9))
TWICE = ((1, 2, 2, 9), (1, 2, 9))  # prefix and suffix claim the same token of the other


@pytest.mark.parametrize(
    ("pair", "positions", "touched", "aligned"),
    [
        (EQUAL, "all", None, {2: 2, 3: 3}),
        (EQUAL, "last", [3], {3: 3}),
        (EQUAL, "differing", [2], {2: 2}),
        (LONGER, "all", None, {4: 2, 5: 3}),
        (LONGER, "last", [5], {5: 3}),
        (LONGER, "differing", [2, 3], {}),
        (LONGER[::-1], "all", None, {2: 4, 3: 5}),
        (LONGER[::-1], "last", [3], {3: 5}),
        (LONGER[::-1], "differing", [], {}),
        (SAME, "all", None, {}),
        (SAME, "differing", [], {}),
        (APART, "all", None, {}),
        (APART, "differing", [0, 1, 2], {}),
        (TWICE, "all", None, {2: 1, 3: 2}),
        (TWICE, "differing", [2], {2: 1}),
        (TWICE[::-1], "all", None, {1: 2, 2: 3}),
        (TWICE[::-1], "differing", [], {}),
        (((1, 2, 1, 2, 1), (1, 2, 1)), "differing", [3, 4], {3: 1, 4: 2}),
        (((1, 2, 3, 2, 1), (1, 2, 1)), "differing", [2, 3], {3: 1}),
        (((3, 1, 2), (1, 2)), "differing", [0], {}),
    ],
)
def test_edits_touch_the_positions_asked_for_and_patches_the_aligned_ones_of_them(
    pair: Pair, positions: str, touched: list[int] | None, aligned: dict[int, int]
) -> None:
    """By hand; None stands for the whole tree."""
    for op in ("zero", "mean", "scale"):
        aligned_positions = align_positions(*pair, TraceOptions(op=op, positions=positions))
        edited = None if aligned_positions is None else list(aligned_positions)
        assert edited == touched
    assert align_positions(*pair, TraceOptions(op="patch", positions=positions)) == aligned


def test_a_patched_tree_by_hand() -> None:
    """A prompt receives from the first difference on, and its form branch from the partner's."""
    a, b = (1, 2, 3, 5), (1, 2, 4, 5)
    into_a = {a[:3]: b[:3], a: b, (*a, 8): (*b, 8)}
    assert sources(plant(SMALL, options=TraceOptions(op="patch"))) == into_a
    into_b = sources(plant(SMALL, options=TraceOptions(op="patch", patch_into="b")))
    assert into_b == {theirs: mine for mine, theirs in into_a.items()}
    last = sources(plant(SMALL, options=TraceOptions(op="patch", positions="last")))
    assert last == {a: b}, "the last position alone has no branches"


def test_control_prompts_are_patched_from_b_as_a_is() -> None:
    other, b = prompt_of(PAIR, "other", (1, 2, 6, 5), ((7,), (8, 9))), (1, 2, 4, 5)
    found = sources(plant([*SMALL, other], options=TraceOptions(op="patch")))
    assert {(1, 2, 6): b[:3], other.ids: b, (*other.ids, 8): (*b, 8)}.items() <= found.items()
    assert len(found) == 6, "b receives nothing"


def test_a_sample_that_no_edit_would_touch_is_refused(answer: Answer, tiny_llama: str) -> None:
    flags = ["--op", "patch", "--positions", "differing", "--num_samples", "2", "--dry_run"]
    says = ["s0000", "--op patch", "--positions differing"]
    refuses(answer, "--model_id", tiny_llama, *flags, says=says)

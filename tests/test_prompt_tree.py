"""The prompt tree: its nodes, what is scored where, the tokens that edits touch, capped trees."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conftest import Answer, finish, read
from llama3_circuit_tracing import (
    TASKS,
    Config,
    Prompt,
    PromptEncoder,
    Sample,
    Tree,
    build_suppression,
    edited_positions,
    plant_trees,
    write_prompts,
)

Spelling = tuple[int, ...]


def prompt_of(sample: Sample, side: str, ids: Spelling, *forms: tuple[Spelling, ...]) -> Prompt:
    return Prompt(sample, side, "", ids, forms)


def plant(*samples: Sequence[Prompt], bos: int | None = 1, config: Config | None = None) -> Tree:
    """All in one tree."""
    (tree,) = plant_trees(samples, bos, replace(config or Config(), tree_tokens=100_000))
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
    assert [[[nodes[n] for n in form] for form in words[0]] for words in tree.branches] == [
        [[], [(*a, 8)]],
        [[], [(*b, 8)]],
    ]
    assert scored(tree) == [[[[(p, 7)], [(p, 8), ((*p, 8), 9)]]] for p in (a, b)]
    assert tree.where is None
    assert tree.samples == [(PAIR, {"a": 0, "b": 1})]


def test_a_word_is_the_sum_over_its_forms_of_the_product_over_their_tokens() -> None:
    tree = plant(SMALL)
    chances = torch.tensor([[0.5, 0.25, 0.5, 0.1, 0.2, 1.0]], dtype=torch.float64)
    words = torch.cat(tree.word_log_probs(chances.log()), -1).exp()
    assert words[0].tolist() == pytest.approx([0.5 + 0.25 * 0.5, 0.1 + 0.2 * 1.0])
    scores = tree.scores(chances.log(), TASKS["suppression"])
    assert scores[0].tolist() == pytest.approx([math.log(0.625), math.log(0.3)])


def test_words_with_fewer_forms_than_others_gain_nothing() -> None:
    sample = replace(PAIR, targets=("x", "y"))
    tree = plant([prompt_of(sample, side, (1, 2), ((7,), (8,)), ((9,),)) for side in "ab"])
    chances = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.1, 0.2]], dtype=torch.float64)
    words = [of_prompt.exp()[0].tolist() for of_prompt in tree.word_log_probs(chances.log())]
    assert words == [pytest.approx([0.3, 0.3]), pytest.approx([0.5, 0.2])]


def test_a_score_takes_targets_and_foils_of_each_prompts_own_sample() -> None:
    """Prompts of unlike numbers of words, and two rows at once."""
    one, two = replace(PAIR, foils=("y",)), Sample("s1", "a", "b", ("x", "y"), ("z",))
    small = [prompt_of(one, side, (1, 2), ((7,),), ((8,),)) for side in "ab"]
    large = [prompt_of(two, side, (1, 3), ((7,),), ((8,),), ((9,),)) for side in "ab"]
    chances = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.4, 0.3, 0.1, 0.2]] * 2)
    chances[1] /= 2
    scores = plant(small, large).scores(chances.double().log(), TASKS["refusal"]).exp()
    expected = [0.1 / 0.2, 0.3 / 0.4, 0.3 / 0.4, 0.4 / 0.2]
    assert scores.tolist() == [pytest.approx(expected), pytest.approx(expected)]


def test_a_prompt_that_is_the_beginning_of_another_needs_no_node_of_its_own() -> None:
    prompts = [prompt_of(PAIR, "a", (1, 2, 3), ((7,),)), prompt_of(PAIR, "b", (1, 2), ((3, 4),))]
    tree = plant(prompts)
    assert sorted(spellings(tree)) == [(1,), (1, 2), (1, 2, 3)]
    assert scored(tree) == [[[[((1, 2, 3), 7)]]], [[[((1, 2), 3), ((1, 2, 3), 4)]]]]


def test_the_mask_hides_all_but_ancestors_and_self() -> None:
    tree = plant(SMALL)
    mask = tree.mask(torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, 8, 8)
    assert torch.equal(mask[0, 0] == 0, tree.visible)
    assert set(mask[0, 0][~tree.visible].tolist()) == {torch.finfo(torch.float32).min}


@pytest.mark.parametrize(("bos", "of_first"), [(1, 0.0), (None, 2.0), (2, 2.0)])
def test_means_count_the_tokens_of_each_prompt_b_without_bos(
    bos: int | None, of_first: float
) -> None:
    other = Sample("s1", "a", "b", ("x",))
    tree = plant(SMALL, [prompt_of(other, p.side, p.ids, *p.forms) for p in SMALL], bos=bos)
    weights = dict(zip(spellings(tree), tree.b_weight.tolist(), strict=True))
    assert weights[(1,)] == of_first
    assert {node: weight for node, weight in weights.items() if weight and len(node) > 1} == {
        (1, 2): 2.0,
        (1, 2, 4): 2.0,
        (1, 2, 4, 5): 2.0,
    }


@pytest.fixture(scope="module")
def encoder(tiny_llama: str) -> PromptEncoder:
    return PromptEncoder(AutoTokenizer.from_pretrained(tiny_llama), "", "word")


@pytest.fixture(scope="module")
def real_prompts(encoder: PromptEncoder) -> list[list[Prompt]]:
    return write_prompts(build_suppression(9, random.Random(3), len), encoder, Config())


def test_a_tree_holds_every_beginning_once_and_scores_every_token_of_every_form(
    real_prompts: list[list[Prompt]],
) -> None:
    tree = plant(*real_prompts, bos=None)
    nodes = spellings(tree)
    beginnings = set()
    for prompt in (p for of_sample in real_prompts for p in of_sample):
        for form in (f for forms in prompt.forms for f in forms):
            whole = prompt.ids + form[:-1]
            beginnings |= {whole[: i + 1] for i in range(len(whole))}
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == beginnings
    assert tree.depth[0].tolist() == [len(node) - 1 for node in nodes]
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        assert tuple(tree.ids[0, list(path)].tolist()) == prompt.ids
        assert nodes[path[-1]] == prompt.ids
    assert scored(tree) == [
        [[[(p.ids + f[:i], f[i]) for i in range(len(f))] for f in forms] for forms in p.forms]
        for p in tree.prompts
    ]
    ends = {prompt.ids for prompt in tree.prompts}
    assert ends <= {nodes[int(node)] for node in tree.scored}


# ----- capped trees


def test_trees_hold_the_samples_in_order_and_at_most_the_tokens_allowed(
    real_prompts: list[list[Prompt]],
) -> None:
    limit = plant(*real_prompts).n_tokens // 2
    trees = plant_trees(real_prompts, None, Config(tree_tokens=limit))
    assert len(trees) >= 2
    assert all(tree.n_tokens <= limit for tree in trees)
    in_order = [prompt for tree in trees for prompt in tree.prompts]
    assert in_order == [prompt for of_sample in real_prompts for prompt in of_sample]
    assert len(plant_trees(real_prompts, None, Config(tree_tokens=1))) == len(real_prompts)


def test_a_tree_is_full_only_where_the_next_sample_does_not_fit(
    real_prompts: list[list[Prompt]],
) -> None:
    """And it is the tree that its own samples alone would make: nothing is left of those after."""
    whole = plant(*real_prompts[:3], bos=None)
    exact, short = (
        plant_trees(real_prompts, None, Config(tree_tokens=whole.n_tokens - less))[0]
        for less in (0, 1)
    )
    assert len(exact.samples) >= 3 and len(short.samples) == 2
    again = plant(*real_prompts[:2], bos=None)
    assert spellings(short) == spellings(again) and scored(short) == scored(again)


def test_capped_trees_give_the_results_of_one_tree(tiny_llama: str, tmp_path: Path) -> None:
    flags = ["--no-bf16", "--num_samples", "4", "--layers", "0,2"]
    runs = []
    for limit in ("100000", "150", "1"):
        folder = finish(tiny_llama, tmp_path / limit, "--tree_tokens", limit, *flags)
        runs.append(read(folder).set_index(["sample_id", "layer", "head"]))
    numbers = runs[0].filter(regex="score_|delta_|head_effect")
    for other in runs[1:]:
        assert other.index.equals(numbers.index)
        assert (other[numbers.columns] - numbers).abs().max(axis=None) < 2e-5


# ----- the tokens that edits touch


@pytest.mark.parametrize(
    ("one", "other", "of_one", "of_other"),
    [
        ((1, 2, 3, 9), (1, 2, 4, 9), [2], [2]),
        ((1, 2, 3, 4, 9, 8), (1, 2, 9, 8), [2, 3], []),
        ((5, 6), (7, 8, 9), [0, 1], [0, 1, 2]),
        ((1, 2), (1, 2), [], []),
        ((1, 1), (1, 1, 1), [], [2]),  # the suffix follows the prefix and does not overlap it
        ((1, 2, 1), (1, 2, 1, 2, 1), [], [3, 4]),
        ((3, 1, 2), (1, 2), [0], []),
        ((1, 2, 1), (1, 2, 3, 2, 1), [], [2, 3]),
    ],
)
def test_what_differs_lies_between_the_common_prefix_and_the_common_suffix(
    one: Spelling, other: Spelling, of_one: list[int], of_other: list[int]
) -> None:
    config = Config(positions="differing")
    assert list(edited_positions(one, other, config) or []) == of_one
    assert list(edited_positions(other, one, config) or []) == of_other


EQUAL = ((1, 2, 3, 9), (1, 2, 4, 9))
LONGER = ((1, 2, 3, 4, 9, 8), (1, 2, 9, 8))
SHORTER = LONGER[::-1]
SAME = ((1, 2, 3), (1, 2, 3))
APART = ((5, 6, 7), (8, 9))
TWICE = ((1, 2, 2, 9), (1, 2, 9))  # prefix and suffix claim the same token of the other


@pytest.mark.parametrize(
    ("pair", "positions", "touched"),
    [
        (EQUAL, "all", None),
        (EQUAL, "last", {3}),
        (EQUAL, "differing", {2}),
        (LONGER, "all", None),
        (LONGER, "last", {5}),
        (LONGER, "differing", {2, 3}),
        (SHORTER, "last", {3}),
        (SHORTER, "differing", set()),
        (SAME, "differing", set()),
    ],
)
@pytest.mark.parametrize("op", ["zero", "mean", "scale"])
def test_edited_positions_by_hand(
    pair: tuple[Spelling, Spelling], positions: str, touched: set[int] | None, op: str
) -> None:
    found = edited_positions(*pair, Config(op=op, positions=positions))
    assert (found if found is None else set(found)) == touched


@pytest.mark.parametrize(
    ("pair", "positions", "aligned"),
    [
        (EQUAL, "all", {2: 2, 3: 3}),
        (EQUAL, "last", {3: 3}),
        (EQUAL, "differing", {2: 2}),
        (LONGER, "all", {4: 2, 5: 3}),
        (LONGER, "last", {5: 3}),
        (LONGER, "differing", {}),
        (SHORTER, "all", {2: 4, 3: 5}),
        (SHORTER, "last", {3: 5}),
        (SHORTER, "differing", {}),
        (SAME, "all", {}),
        (APART, "all", {}),
        (TWICE, "all", {2: 1, 3: 2}),
        (TWICE[::-1], "all", {1: 2, 2: 3}),
    ],
)
def test_a_patch_touches_aligned_positions_by_hand(
    pair: tuple[Spelling, Spelling], positions: str, aligned: dict[int, int]
) -> None:
    assert edited_positions(*pair, Config(op="patch", positions=positions)) == aligned


def test_a_patched_tree_by_hand() -> None:
    """A prompt receives from the first difference on, and its form branch from the partner's."""
    a, b = (1, 2, 3, 5), (1, 2, 4, 5)
    into_a = {a[:3]: b[:3], a: b, (*a, 8): (*b, 8)}
    assert sources(plant(SMALL, config=Config(op="patch"))) == into_a
    into_b = sources(plant(SMALL, config=Config(op="patch", patch_into="b")))
    assert into_b == {theirs: mine for mine, theirs in into_a.items()}
    last = sources(plant(SMALL, config=Config(op="patch", positions="last")))
    assert last == {a: b}, "the last position alone has no branches"


def test_control_prompts_are_patched_from_b_as_a_is() -> None:
    other = prompt_of(PAIR, "other", (1, 2, 6, 5), ((7,), (8, 9)))
    found = sources(plant([*SMALL, other], config=Config(op="patch")))
    b = (1, 2, 4, 5)
    assert {(1, 2, 6): b[:3], other.ids: b, (*other.ids, 8): (*b, 8)}.items() <= found.items()
    assert len(found) == 6, "b receives nothing"


@pytest.mark.parametrize("patch_into", ["a", "b"])
@pytest.mark.parametrize("positions", ["all", "last", "differing"])
@pytest.mark.parametrize("op", ["zero", "patch"])
def test_nodes_that_edits_single_out_belong_to_one_prompt_only(
    encoder: PromptEncoder, op: str, positions: str, patch_into: str
) -> None:
    """Also where samples share prompt b or both prompts, and where these are of equal length."""
    config = Config(op=op, positions=positions, patch_into=patch_into)
    samples = [
        Sample("s0", "Don't mention apple. Name a fruit.", "Name a fruit.", ("apple",)),
        Sample("s1", "Don't mention pear. Name a fruit.", "Name a fruit.", ("pear",)),
        Sample("s2", "Don't mention apple. Name a fruit.", "Name a fruit.", ("apple",)),
        Sample("s3", "Don't mention apple. Name a fruit.", "Name a fruit.", ("quixotically",)),
        Sample("s4", "Name a metal.", "Name a sport.", ("iron",)),
    ]
    prompts = write_prompts(samples, encoder, config)
    tree = plant(*prompts, bos=encoder.tokenizer.bos_token_id, config=config)
    if tree.where is None:
        assert (op, positions) == ("zero", "all")
        return
    touched = tree.where.nonzero().flatten().tolist()
    for node in touched:
        owners = [path for path in tree.paths if node in path or tree.visible[node, path[-1]]]
        assert len(owners) == 1
    if op == "patch":
        assert not tree.where[tree.partner[touched]].any(), "values come from unedited nodes"
    edited = [{i for i, node in enumerate(path) if tree.where[node]} for path in tree.paths]
    for i, (a, b) in enumerate(prompts):
        for prompt, partner, found in ((a, b, edited[2 * i]), (b, a, edited[2 * i + 1])):
            plan = edited_positions(prompt.ids, partner.ids, config) or {}
            receives = op != "patch" or prompt.side == patch_into
            assert found == (set(plan) if receives else set())
    nodes = spellings(tree)
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        assert nodes[path[-1]] == prompt.ids


def test_a_sample_that_no_edit_would_touch_is_refused(answer: Answer, tiny_llama: str) -> None:
    flags = ["--op", "patch", "--positions", "differing", "--num_samples", "2", "--dry_run"]
    code, _, err = answer("--model_id", tiny_llama, *flags)
    assert code == 2
    for text in ("s0000", "--op patch", "--positions differing"):
        assert text in err

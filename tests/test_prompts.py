"""Prompts and their trees: BOS, date, surface forms, shared prefixes, and the nodes that edits touch."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llama3_circuit_tracing import (
    TASKS,
    Config,
    Prompt,
    Sample,
    Tree,
    UsageError,
    Writer,
    build_suppression,
    build_tree,
    common_ends,
    edited_positions,
    main,
    plant_trees,
    write_prompts,
)

FRUIT = Sample("s0", "Don't mention apple. Name a fruit.", "Name a fruit.", ("apple",))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def writer(tokenizer: Any) -> Writer:
    return Writer(tokenizer, "", "word")


@pytest.fixture()
def with_template(tiny_llama: str, tmp_path: Path) -> Callable[[str], Writer]:
    """A writer whose tokenizer folder has another chat template."""

    def build(template: str) -> Writer:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return Writer(AutoTokenizer.from_pretrained(folder), "", "word")

    return build


MESSAGES = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BOS = "{{ bos_token }}"


def spelt(writer: Writer, ids: tuple[int, ...]) -> str:
    return writer.tokenizer.decode(list(ids))


# ----- rendering


def test_a_prompt_is_the_chat_of_system_and_user_up_to_the_reply(writer: Writer) -> None:
    prompt = writer.write(FRUIT, "a", FRUIT.prompt_a)
    assert prompt.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nDon't mention apple. Name a fruit.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert spelt(writer, prompt.ids) == prompt.text


def test_a_prompt_has_exactly_one_bos_and_starts_with_it(writer: Writer) -> None:
    assert writer.tokenizer("x")["input_ids"][0] == writer.tokenizer.bos_token_id  # the trap
    for sample in build_suppression(6, random.Random(0), len):
        for text in (sample.prompt_a, sample.prompt_b):
            ids = writer.write(sample, "a", text).ids
            assert ids.count(writer.tokenizer.bos_token_id) == 1
            assert ids[0] == writer.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "count"), [(MESSAGES, 0), (BOS + BOS + MESSAGES, 2), (MESSAGES + BOS, 1)]
)
def test_a_template_without_one_bos_at_the_start_is_refused(
    with_template: Callable[[str], Writer], template: str, count: int
) -> None:
    with pytest.raises(UsageError, match=rf"s0.*{count} BOS"):
        with_template(template).write(FRUIT, "a", FRUIT.prompt_a)
    with_template(BOS + MESSAGES).write(FRUIT, "a", FRUIT.prompt_a)


def test_a_template_with_a_default_date_gets_the_pinned_one(
    with_template: Callable[[str], Writer],
) -> None:
    """As Llama-3.2's: today, unless a date is given."""
    head = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}" + BOS + "Today Date: {{ date_string }}\n"
    )
    text = with_template(head + MESSAGES).render("Name a fruit.")
    assert "Today Date: 26 Jul 2024\n" in text


@pytest.mark.parametrize("shape", ["%d %b %Y", "%Y-%m-%d"])
def test_a_template_that_asks_the_clock_gets_the_pinned_date(
    with_template: Callable[[str], Writer], shape: str
) -> None:
    """As gpt-oss's and Mistral's, which have no variable for the date."""
    head = BOS + "Today: {{ strftime_now('" + shape + "') }}\n"
    text = with_template(head + MESSAGES).render("Name a fruit.")
    assert f"Today: {datetime(2024, 7, 26).strftime(shape)}\n" in text


def test_a_template_that_fails_is_told_with_its_reason(
    with_template: Callable[[str], Writer],
) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UsageError, match="System role not supported"):
        with_template(template).render("Name a fruit.")


# ----- surface forms


def forms_of(writer: Writer, sample: Sample) -> list[list[str]]:
    prompt = writer.write(sample, "a", sample.prompt_a)
    return [[spelt(writer, ids) for ids in forms] for forms in prompt.forms]


def test_after_the_header_a_form_has_no_space_and_stands_as_written_and_with_a_capital(
    writer: Writer,
) -> None:
    sample = replace(FRUIT, targets=("apple", "blue"), foils=("Mars", "tiny car"))
    assert forms_of(writer, sample) == [
        ["apple", "Apple"],
        ["blue", "Blue"],
        ["Mars"],
        ["tiny car", "Tiny car"],
    ]


@pytest.mark.parametrize("stem", ["My favorite fruit is the", "  My favorite fruit is the  "])
def test_after_a_stem_a_form_has_a_leading_space(tokenizer: Any, stem: str) -> None:
    writer = Writer(tokenizer, stem, "word")
    prompt = writer.write(FRUIT, "a", FRUIT.prompt_a)
    assert prompt.text.endswith("<|end_header_id|>\n\nMy favorite fruit is the")
    assert spelt(writer, prompt.ids) == prompt.text
    assert forms_of(writer, FRUIT) == [[" apple", " Apple"]]


@pytest.mark.parametrize("stem", ["", "It is"])
def test_the_literal_form_is_the_first_token_of_the_word_behind_a_space(
    tokenizer: Any, stem: str
) -> None:
    writer = Writer(tokenizer, stem, "literal")
    for word in ("apple", "Quixotically"):
        prompt = writer.write(replace(FRUIT, targets=(word,)), "a", FRUIT.prompt_a)
        first = tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]
        assert prompt.forms == (((first,),),)


def test_a_form_of_several_tokens_is_kept_whole(tokenizer: Any, writer: Writer) -> None:
    word = "quixotically"
    prompt = writer.write(replace(FRUIT, targets=(word,)), "a", FRUIT.prompt_a)
    (forms,) = prompt.forms
    assert [len(ids) > 1 for ids in forms] == [True, True]
    for ids, form in zip(forms, (word, word.capitalize()), strict=True):
        whole = tokenizer(prompt.text + form, add_special_tokens=False)["input_ids"]
        assert list(prompt.ids + ids) == whole


@pytest.mark.parametrize("targets", [("apple", "Apple"), ("pear", "apple", "apple")])
def test_two_words_with_the_same_form_are_refused(writer: Writer, targets: tuple[str, ...]) -> None:
    sample = replace(FRUIT, targets=targets, origin="mine.jsonl, line 3")
    with pytest.raises(UsageError, match=r"mine\.jsonl, line 3.*'apple'"):
        writer.write(sample, "a", sample.prompt_a)


def test_a_target_and_a_foil_with_the_same_form_are_refused(writer: Writer) -> None:
    with pytest.raises(UsageError, match="same form 'Apple'"):
        writer.write(replace(FRUIT, foils=("Apple",)), "a", FRUIT.prompt_a)


# ----- the tree


def prompt_of(sample: Sample, role: str, ids: tuple[int, ...], *forms: tuple[tuple[int, ...], ...]) -> Prompt:  # fmt: skip
    return Prompt(sample, role, "", ids, forms)


def spellings(tree: Tree) -> list[tuple[int, ...]]:
    """Of each node the tokens of all that it sees, from the root on."""
    found = []
    for row in tree.visible:
        nodes = sorted(row.nonzero().flatten().tolist(), key=lambda n: int(tree.depth[0, n]))
        found.append(tuple(int(tree.ids[0, n]) for n in nodes))
    return found


def entries(tree: Tree) -> list[tuple[tuple[int, ...], int, int]]:
    """(spelling of the node, next token, form) of everything that is scored."""
    seen = spellings(tree)
    nodes = [seen[int(tree.scored[i])] for i in tree.entry_node]
    return list(zip(nodes, tree.entry_token.tolist(), tree.form_of_entry.tolist(), strict=True))


PAIR = Sample("s0", "a", "b", ("x",))
SMALL = (
    prompt_of(PAIR, "a", (1, 2, 3, 5), ((7,), (8, 9))),
    prompt_of(PAIR, "b", (1, 2, 4, 5), ((7,), (8, 9))),
)


def test_a_small_tree_by_hand() -> None:
    """1 2 is shared; 3 5 and 4 5 are two branches; the form 8 9 grows the node 8 on each."""
    tree = build_tree([SMALL], 1, Config())
    nodes = spellings(tree)
    assert sorted(nodes) == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 5),
        (1, 2, 3, 5, 8),
        (1, 2, 4),
        (1, 2, 4, 5),
        (1, 2, 4, 5, 8),
    ]
    assert tree.n_tokens == 8
    assert tree.depth[0].tolist() == [len(node) - 1 for node in nodes]
    assert [int(i) for i in tree.ids[0]] == [node[-1] for node in nodes]
    assert [nodes[path[-1]] for path in tree.paths] == [(1, 2, 3, 5), (1, 2, 4, 5)]
    assert entries(tree) == [
        ((1, 2, 3, 5), 7, 0),
        ((1, 2, 3, 5), 8, 1),
        ((1, 2, 3, 5, 8), 9, 1),
        ((1, 2, 4, 5), 7, 2),
        ((1, 2, 4, 5), 8, 3),
        ((1, 2, 4, 5, 8), 9, 3),
    ]
    assert tree.where is None


def test_a_word_is_the_sum_over_its_forms_of_the_product_over_their_tokens() -> None:
    tree = build_tree([SMALL], 1, Config())
    chances = torch.tensor([[0.5, 0.25, 0.5, 0.1, 0.2, 1.0]], dtype=torch.float64)
    words = tree.word_log_probs(chances.log()).exp()
    assert words[0].tolist() == pytest.approx([0.5 + 0.25 * 0.5, 0.1 + 0.2 * 1.0])
    scores = tree.scores(chances.log(), TASKS["suppression"])
    assert scores[0].tolist() == pytest.approx([math.log(0.625), math.log(0.3)])


def test_words_with_fewer_forms_than_others_gain_nothing() -> None:
    sample = replace(PAIR, targets=("x", "y"))
    tree = build_tree([[prompt_of(sample, r, (1, 2), ((7,), (8,)), ((9,),)) for r in "ab"]], 1, Config())  # fmt: skip
    chances = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.1, 0.2]], dtype=torch.float64)
    words = tree.word_log_probs(chances.log()).exp()
    assert words[0].tolist() == pytest.approx([0.3, 0.3, 0.5, 0.2])


def test_a_prompt_that_is_the_beginning_of_another_needs_no_node_of_its_own() -> None:
    prompts = [prompt_of(PAIR, "a", (1, 2, 3), ((7,),)), prompt_of(PAIR, "b", (1, 2), ((3, 4),))]
    tree = build_tree([prompts], 1, Config())
    assert sorted(spellings(tree)) == [(1,), (1, 2), (1, 2, 3)]
    assert entries(tree) == [((1, 2, 3), 7, 0), ((1, 2), 3, 1), ((1, 2, 3), 4, 1)]


def test_the_mask_hides_all_but_ancestors_and_self() -> None:
    tree = build_tree([SMALL], 1, Config())
    mask = tree.mask(torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, 8, 8)
    assert torch.equal(mask[0, 0] == 0, tree.visible)
    assert set(mask[0, 0][~tree.visible].tolist()) == {torch.finfo(torch.float32).min}


def test_means_count_the_tokens_of_each_prompt_b_without_bos() -> None:
    other = Sample("s1", "a", "b", ("x",))
    again = [prompt_of(other, p.role, p.ids, *p.forms) for p in SMALL]
    tree = build_tree([SMALL, again], 1, Config())
    weights = dict(zip(spellings(tree), tree.b_weight.tolist(), strict=True))
    assert {node: w for node, w in weights.items() if w} == {
        (1, 2): 2.0,
        (1, 2, 4): 2.0,
        (1, 2, 4, 5): 2.0,
    }


@pytest.fixture(scope="module")
def real_prompts(writer: Writer) -> list[list[Prompt]]:
    return write_prompts(build_suppression(9, random.Random(3), len), writer, Config())


def test_a_tree_holds_every_prompt_and_every_beginning_once(
    real_prompts: list[list[Prompt]],
) -> None:
    tree = build_tree(real_prompts, None, Config())
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


def test_every_token_of_every_form_is_scored_once(real_prompts: list[list[Prompt]]) -> None:
    tree = build_tree(real_prompts, None, Config())
    expected = []
    n_forms = 0
    for prompt in tree.prompts:
        for form in (f for forms in prompt.forms for f in forms):
            expected += [(prompt.ids + form[:i], token, n_forms) for i, token in enumerate(form)]
            n_forms += 1
    assert entries(tree) == expected


def test_trees_hold_the_samples_in_order_and_at_most_the_tokens_allowed(
    real_prompts: list[list[Prompt]],
) -> None:
    whole = plant_trees(real_prompts, None, replace(Config(), tree_tokens=100000))
    assert len(whole) == 1
    limit = whole[0].n_tokens // 2
    trees = plant_trees(real_prompts, None, replace(Config(), tree_tokens=limit))
    assert len(trees) >= 2
    assert all(tree.n_tokens <= limit for tree in trees)
    in_order = [prompt for tree in trees for prompt in tree.prompts]
    assert in_order == [prompt for of_sample in real_prompts for prompt in of_sample]
    alone = plant_trees(real_prompts, None, replace(Config(), tree_tokens=1))
    assert len(alone) == len(real_prompts)


def results(folder: Path) -> dict[tuple[str, ...], list[float]]:
    with open(folder / "circuit_results.csv", newline="") as file:
        return {
            (row["sample_id"], row["layer"], row["head"]): [
                float(value)
                for name, value in row.items()
                if re.match("score_|delta_|head_effect", name)
            ]
            for row in csv.DictReader(file)
        }


def test_capped_trees_give_the_results_of_one_tree(tiny_llama: str, tmp_path: Path) -> None:
    argv = ["--model_id", tiny_llama, "--no-bf16", "--num_samples", "4", "--layers", "0,2"]
    runs = []
    for limit in ("100000", "150", "1"):
        output = tmp_path / limit
        assert main([*argv, "--tree_tokens", limit, "--output_dir", str(output)]) == 0
        runs.append(results(output))
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for key, values in runs[0].items():
            assert other[key] == pytest.approx(values, rel=0, abs=2e-5)


# ----- the nodes that edits touch


@pytest.mark.parametrize(
    ("one", "other", "ends"),
    [
        ((1, 2, 3, 9), (1, 2, 4, 9), (2, 1)),
        ((1, 2, 3, 4, 9, 8), (1, 2, 9, 8), (2, 2)),
        ((1, 2, 9, 8), (1, 2, 3, 4, 9, 8), (2, 2)),
        ((5, 6), (7, 8, 9), (0, 0)),
        ((1, 2), (1, 2), (2, 0)),
        ((1, 1), (1, 1, 1), (2, 0)),  # the suffix follows the prefix and does not overlap it
        ((1, 2, 1), (1, 2, 1, 2, 1), (3, 0)),
        ((3, 1, 2), (1, 2), (0, 2)),
        ((1, 2, 1), (1, 2, 3, 2, 1), (2, 1)),
    ],
)
def test_common_ends_by_hand(
    one: tuple[int, ...], other: tuple[int, ...], ends: tuple[int, int]
) -> None:
    assert common_ends(one, other) == ends


EQUAL = ((1, 2, 3, 9), (1, 2, 4, 9))
LONGER = ((1, 2, 3, 4, 9, 8), (1, 2, 9, 8))
SHORTER = LONGER[::-1]
SAME = ((1, 2, 3), (1, 2, 3))
APART = ((5, 6, 7), (8, 9))


@pytest.mark.parametrize(
    ("pair", "positions", "touched"),
    [
        (EQUAL, "last", {3}),
        (EQUAL, "differing", {2}),
        (LONGER, "last", {5}),
        (LONGER, "differing", {2, 3}),
        (SHORTER, "last", {3}),
        (SHORTER, "differing", set()),
        (SAME, "differing", set()),
        (APART, "differing", {0, 1, 2}),
    ],
)
@pytest.mark.parametrize("op", ["zero", "mean", "scale"])
def test_edited_positions_by_hand(
    pair: tuple[tuple[int, ...], tuple[int, ...]], positions: str, touched: set[int], op: str
) -> None:
    found = edited_positions(*pair, replace(Config(), op=op, positions=positions))
    assert found is not None
    assert set(found) == touched


@pytest.mark.parametrize("op", ["zero", "mean", "scale"])
def test_an_edit_at_all_positions_is_one_of_the_whole_tree(op: str) -> None:
    assert edited_positions(*LONGER, replace(Config(), op=op)) is None


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
    ],
)
def test_a_patch_touches_aligned_positions_by_hand(
    pair: tuple[tuple[int, ...], tuple[int, ...]], positions: str, aligned: dict[int, int]
) -> None:
    config = replace(Config(), op="patch", positions=positions)
    assert edited_positions(*pair, config) == aligned


def test_a_patched_tree_by_hand() -> None:
    """Prompt a receives from its first difference on, and its form branch from b's."""
    tree = build_tree([SMALL], 1, replace(Config(), op="patch"))
    nodes = spellings(tree)
    assert tree.where is not None
    pairs = {nodes[i]: nodes[int(tree.source[i])] for i in tree.where.nonzero().flatten().tolist()}
    assert pairs == {
        (1, 2, 3): (1, 2, 4),
        (1, 2, 3, 5): (1, 2, 4, 5),
        (1, 2, 3, 5, 8): (1, 2, 4, 5, 8),
    }
    mirrored = build_tree([SMALL], 1, replace(Config(), op="patch", patch_into="b"))
    assert mirrored.where is not None
    nodes = spellings(mirrored)
    back = {
        nodes[i]: nodes[int(mirrored.source[i])]
        for i in mirrored.where.nonzero().flatten().tolist()
    }
    assert back == {theirs: mine for mine, theirs in pairs.items()}


@pytest.mark.parametrize("patch_into", ["a", "b"])
@pytest.mark.parametrize("positions", ["all", "last", "differing"])
@pytest.mark.parametrize("op", ["zero", "patch"])
def test_nodes_that_edits_single_out_belong_to_one_prompt_only(
    writer: Writer, op: str, positions: str, patch_into: str
) -> None:
    """Also where two samples have the same prompt b, and where prompts are of equal length."""
    config = replace(Config(), op=op, positions=positions, patch_into=patch_into)
    samples = [
        Sample("s0", "Don't mention apple. Name a fruit.", "Name a fruit.", ("apple",)),
        Sample("s1", "Don't mention pear. Name a fruit.", "Name a fruit.", ("pear",)),
        Sample("s2", "Don't mention apple. Name a fruit.", "Name a fruit.", ("quixotically",)),
        Sample("s3", "Name a metal.", "Name a sport.", ("iron",)),
    ]
    prompts = [
        [writer.write(s, "a", s.prompt_a), writer.write(s, "b", s.prompt_b)] for s in samples
    ]
    tree = build_tree(prompts, writer.tokenizer.bos_token_id, config)
    if tree.where is None:
        assert (op, positions) == ("zero", "all")
        return
    for node in tree.where.nonzero().flatten().tolist():
        owners = [path for path in tree.paths if node in path or tree.visible[node, path[-1]]]
        assert len(owners) == 1
    edited = [
        {position for position, node in enumerate(path) if tree.where[node]} for path in tree.paths
    ]
    for i, (a, b) in enumerate(prompts):
        for prompt, partner, found in ((a, b, edited[2 * i]), (b, a, edited[2 * i + 1])):
            plan = edited_positions(prompt.ids, partner.ids, config) or {}
            receives = op != "patch" or prompt.role == patch_into
            assert found == (set(plan) if receives else set())
    nodes = spellings(tree)
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        assert nodes[path[-1]] == prompt.ids


def test_a_sample_that_no_edit_would_touch_is_refused(
    tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--op", "patch", "--positions", "differing", "--num_samples", "2", "--dry_run"]
    assert main(["--model_id", tiny_llama, *argv]) == 2
    err = capsys.readouterr().err
    for text in ("s0000", "--op patch", "--positions differing"):
        assert text in err

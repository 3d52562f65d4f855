"""Prompts, forms, controls and a whole command in the genuine Llama-3 vocabulary, beside tiktoken's
own reading of it."""

from __future__ import annotations

import base64
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiktoken

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared
from conftest import (
    Answer,
    command_line,
    finish,
    generations,
    read,
    record_of,
    refuses,
    user_text,
    write_samples,
)
from real.fetch import CACHE, LLAMA3, SPLIT

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not LLAMA3.is_dir(), reason="python tests/real/fetch.py makes its folder"),
]

MODEL = str(LLAMA3)
EQUAL = 2e-5
BEGIN, START, END, TURN = 128000, 128006, 128007, 128009
SPECIAL = {"<|begin_of_text|>": BEGIN, "<|eot_id|>": TURN}
SPECIAL |= {"<|start_header_id|>": START, "<|end_header_id|>": END}
HELIUM = [BEGIN, START, 9125, END, 271, 2675, 527, 459, 18328, 13, TURN, START, 882, END, 271]
HELIUM += [8161, 956, 6420, 97607, 13, 4076, 264, 6962, 13, 22559, 304, 832, 3492, 13, TURN]
HELIUM += [START, 78191, END, 271]
FORMS = {
    "helium": [[50222, 2411], [33813, 2411]],
    "Colombia": [[6255, 2925, 689]],
    "wine": [[72537], [54, 483]],
    "cheetah": [[1557, 295, 1494], [34, 3759, 1494]],
    "iron": [[2534], [47493]],
}
COMMAND = "--controls --confirm 2 --max_new_tokens 4 --num_samples 4"

Prompts = list[list[tracing.Prompt]]


def chat(user: str) -> str:
    return (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an assistant."
        f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@functools.cache
def vocabulary() -> tiktoken.Encoding:
    lines = (CACHE / "llama3.tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=SPECIAL)


def tokens(text: str) -> list[int]:
    return vocabulary().encode(text, allowed_special="all")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Those of all 40 questions."""
    return prepared(MODEL, "--controls", "--num_samples", "40").prompts


# ----- prompts


def test_prompts_are_the_chat_as_text(prompts: Prompts) -> None:
    for sample_prompts in prompts:
        sample = sample_prompts[0].sample
        controls = [user_text(prompt.text) for prompt in sample_prompts[2:]]
        users = [sample.prompt_a, sample.prompt_b, *controls]
        assert [prompt.text for prompt in sample_prompts] == [chat(user) for user in users]


def test_prompts_and_forms_have_the_ids_that_tiktoken_gives(prompts: Prompts) -> None:
    """And one BOS, which is their first."""
    for prompt in itertools.chain(*prompts):
        assert list(prompt.ids) == tokens(prompt.text)
        assert prompt.ids[0] == BEGIN and prompt.ids.count(BEGIN) == 1
        for word, forms in zip(prompt.sample.words, prompt.forms, strict=True):
            both = dict.fromkeys([word, word[0].upper() + word[1:]])
            assert [list(form) for form in forms] == [tokens(form) for form in both]


def test_the_ids_of_a_prompt_by_hand(prompts: Prompts) -> None:
    prompt = prompts[0][0]
    assert prompt.sample.prompt_a == "Don't mention helium. Name a gas. Answer in one word."
    assert list(prompt.ids) == HELIUM


def test_the_tokenizer_itself_puts_bos_before_a_text() -> None:
    """The trap: a rendered prompt that is simply encoded has two."""
    encoder = prepared(MODEL).encoder
    assert encoder.tokenizer("x")["input_ids"] == [BEGIN, 87]
    assert encoder.bos == BEGIN


def test_helium_is_two_tokens_and_wine_one_or_with_a_capital_two(tmp_path: Path) -> None:
    sample = {"sentence": "Name one.", "targets": list(FORMS)}
    path = write_samples(tmp_path / "s.jsonl", sample)
    (sample_prompts,) = prepared(MODEL, "--samples", path).prompts
    for prompt in sample_prompts:
        forms = [[list(form) for form in word_forms] for word_forms in prompt.forms]
        assert dict(zip(FORMS, forms, strict=True)) == FORMS


def test_controls_are_within_two_tokens_of_prompt_a_and_most_are_of_its_length(
    prompts: Prompts,
) -> None:
    lengths = [[len(prompt.ids) for prompt in sample_prompts] for sample_prompts in prompts]
    away = [control - a for a, _, *controls in lengths for control in controls]
    assert len(away) == 80
    assert max(map(abs, away)) <= 2
    assert away.count(0) >= 72
    assert len({a for a, *_ in lengths}) > 5


@pytest.mark.parametrize(
    ("stem", "forms"),
    [("The gas is", [(97607,), (16183, 2411)]), ("Answer:\n\n", [(50222, 2411), (33813, 2411)])],
)
def test_forms_take_a_leading_space_after_a_stem_that_ends_in_none(
    stem: str, forms: list[tuple[int, ...]]
) -> None:
    prompt = prepared(MODEL, "--answer_prefix", stem).prompts[0][0]
    assert list(prompt.ids) == HELIUM + tokens(stem)
    assert list(prompt.forms[0]) == forms


def test_a_stem_whose_trailing_blank_would_merge_with_the_word_is_refused(answer: Answer) -> None:
    stem = ["--answer_prefix", "The gas is ", "--dry_run"]
    refuses(answer, "--model_id", MODEL, *stem, says=["'helium' merges", "The gas is '"])


# ----- a whole command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(MODEL, tmp_path_factory.mktemp("run"), *COMMAND.split())


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return naive.load(MODEL)


def test_the_effects_of_all_heads_are_those_of_the_naive_loop(
    run: Path, plain: tuple[Any, Any]
) -> None:
    targets, texts = by_hand.targets_of(run), by_hand.texts(run)
    samples = [(texts[i]["a"], texts[i]["b"], targets[i]) for i in texts]
    expected, table = naive.sweep(*plain, samples), read(run)
    assert len(table) == len(expected) == 4 * 2 * 4
    for row in table.itertuples():
        base, edited = expected[list(texts).index(row.sample_id), row.layer, row.head]
        assert row.delta_logit_base == pytest.approx(base, abs=EQUAL)
        assert row.delta_logit_head == pytest.approx(edited, abs=EQUAL)
    assert table["head_effect"].abs().max() > 1000 * EQUAL


def test_the_scores_of_controls_are_those_of_plain_forwards(
    run: Path, plain: tuple[Any, Any]
) -> None:
    targets, texts, table = by_hand.targets_of(run), by_hand.texts(run), read(run)
    of_head = table[(table["layer"] == 1) & (table["head"] == 3)].set_index("sample_id")
    for labels, state in (([], "base"), (["L1H3"], "head")):
        with by_hand.ablated(plain[0], labels):
            for i, side in ((i, side) for i in texts for side in ("other", "affirm")):
                score = naive.suppression_score(*plain, texts[i][side], targets[i])
                measured = of_head.loc[i, f"score_{side}_{state}"]
                assert measured == pytest.approx(score, abs=EQUAL)


def test_the_joint_ablation_is_that_of_plain_forwards(run: Path, plain: tuple[Any, Any]) -> None:
    targets, texts, held_out = by_hand.targets_of(run), by_hand.texts(run), by_hand.halves(run)[1]
    rows = read(run, "circuit_confirm.csv")
    rows = rows[rows["set"].isin(("none", "chosen")) & (rows["measure"] == "a - b")]
    assert list(rows["n_ablated"]) == [0, 1, 2]
    for row in rows.fillna({"components": ""}).itertuples():
        with by_hand.ablated(plain[0], row.components.split()):
            deltas = [
                naive.suppression_score(*plain, texts[i]["a"], targets[i])
                - naive.suppression_score(*plain, texts[i]["b"], targets[i])
                for i in held_out
            ]
        assert row.mean_delta == pytest.approx(sum(deltas) / len(deltas), abs=EQUAL)


def test_the_command_leaves_every_file_and_replies_to_every_prompt(run: Path) -> None:
    names = {path.name for path in run.iterdir()} - {".parts"}
    options = tracing.parse_command_line(command_line(MODEL, run, *COMMAND.split())).options
    of_groups = {name for name in tracing.COMMAND_FILES["trace"] if "group" in name}
    # its samples are of one wording, and of no groups
    expected = set(tracing.planned_files("trace", options)) - of_groups - {"circuit_templates.csv"}
    assert names == expected | {"run.json", "run.log"}
    replied = [(r["sample_id"], r["prompt"]) for r in generations(run) if not r["n_ablated"]]
    assert replied == [(i, side) for i in by_hand.texts(run) for side in "ab"]
    assert record_of(run)["noise_floor"] < EQUAL

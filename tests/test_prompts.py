"""Prompts: the chat around a user text, its one BOS, the forms of a word, and control prompts."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import llama3_circuit_tracing as tracing
import naive
from conftest import user_text
from llama3_circuit_tracing import Config, PromptEncoder, Sample, UsageError


def forbidding(sample_id: str, sentence: str, *words: str) -> Sample:
    prompt_a = f"Don't mention {' or '.join(words)}. {sentence}"
    return Sample(sample_id, prompt_a, sentence, words)


FRUIT = forbidding("s0", "Name a fruit.", "apple")
BUILT_IN = tracing.build_suppression(9, random.Random(3), len)
WithTemplate = Callable[[str], PromptEncoder]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, "", "word")


@pytest.fixture()
def with_template(tiny_llama: str, tmp_path: Path) -> WithTemplate:
    """An encoder whose tokenizer folder has another chat template."""

    def build(template: str) -> PromptEncoder:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return PromptEncoder(AutoTokenizer.from_pretrained(folder), "", "word")

    return build


MESSAGES = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BOS = "{{ bos_token }}"


def write(encoder: PromptEncoder, sample: Sample) -> tracing.Prompt:
    return encoder.write(sample, "a", sample.prompt_a)


# ----- rendering


def test_a_prompt_is_the_chat_of_system_and_user_up_to_the_reply(encoder: PromptEncoder) -> None:
    prompt = write(encoder, FRUIT)
    assert prompt.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are an assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nDon't mention apple. Name a fruit.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert encoder.tokenizer.decode(list(prompt.ids)) == prompt.text


def test_a_prompt_has_exactly_one_bos_and_starts_with_it(encoder: PromptEncoder) -> None:
    bos = encoder.tokenizer.bos_token_id
    assert encoder.tokenizer("x")["input_ids"][0] == bos  # the trap
    for sample in BUILT_IN:
        for text in (sample.prompt_a, sample.prompt_b):
            ids = encoder.write(sample, "a", text).ids
            assert ids.count(bos) == 1 and ids[0] == bos
            assert list(ids) == naive.prompt_ids(encoder.tokenizer, text)


@pytest.mark.parametrize(
    ("template", "count"), [(MESSAGES, 0), (BOS + BOS + MESSAGES, 2), (MESSAGES + BOS, 1)]
)
def test_a_template_without_one_bos_at_the_start_is_refused(
    with_template: WithTemplate, template: str, count: int
) -> None:
    with pytest.raises(UsageError, match=rf"s0.*{count} BOS"):
        write(with_template(template), FRUIT)
    write(with_template(BOS + MESSAGES), FRUIT)


@pytest.mark.parametrize(
    ("head", "written"),
    [
        # as Llama-3.2's: today, unless a date is given
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
            "{% endif %}Today: {{ date_string }}\n",
            "26 Jul 2024",
        ),
        # as gpt-oss's and Mistral's, which have no variable for the date
        ("Today: {{ strftime_now('%d %b %Y') }}\n", "26 Jul 2024"),
        ('Today: {{ strftime_now( "%Y-%m-%d" ) }}\n', "2024-07-26"),
    ],
)
def test_a_template_that_writes_todays_date_gets_the_pinned_one(
    with_template: WithTemplate, head: str, written: str
) -> None:
    assert f"Today: {written}\n" in with_template(BOS + head + MESSAGES).render("Name a fruit.")


def test_a_template_that_fails_is_told_with_its_reason(with_template: WithTemplate) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UsageError, match="System role not supported"):
        with_template(template).render("Name a fruit.")


# ----- surface forms


def forms_of(encoder: PromptEncoder, sample: Sample) -> list[list[str]]:
    words = write(encoder, sample).forms
    return [[encoder.tokenizer.decode(list(ids)) for ids in forms] for forms in words]


def test_after_the_header_a_form_has_no_space_and_stands_as_written_and_with_a_capital(
    encoder: PromptEncoder,
) -> None:
    sample = replace(FRUIT, targets=("apple", "blue"), foils=("Mars", "tiny car"))
    assert forms_of(encoder, sample) == [
        ["apple", "Apple"],
        ["blue", "Blue"],
        ["Mars"],
        ["tiny car", "Tiny car"],
    ]


@pytest.mark.parametrize("stem", ["My favorite fruit is the", "  My favorite fruit is the  "])
def test_after_a_stem_a_form_has_a_leading_space(tokenizer: Any, stem: str) -> None:
    encoder = PromptEncoder(tokenizer, stem, "word")
    prompt = write(encoder, FRUIT)
    assert prompt.text.endswith("<|end_header_id|>\n\nMy favorite fruit is the")
    assert tokenizer.decode(list(prompt.ids)) == prompt.text
    assert forms_of(encoder, FRUIT) == [[" apple", " Apple"]]


@pytest.mark.parametrize("stem", ["", "It is"])
def test_the_literal_form_is_the_first_token_of_the_word_behind_a_space(
    tokenizer: Any, stem: str
) -> None:
    encoder = PromptEncoder(tokenizer, stem, "literal")
    for word in ("apple", "Quixotically"):
        first = tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]
        assert write(encoder, replace(FRUIT, targets=(word,))).forms == (((first,),),)


def test_a_form_of_several_tokens_is_kept_whole(encoder: PromptEncoder) -> None:
    word = "quixotically"
    prompt = write(encoder, replace(FRUIT, targets=(word,)))
    (forms,) = prompt.forms
    assert [len(ids) > 1 for ids in forms] == [True, True]
    for ids, form in zip(forms, (word, word.capitalize()), strict=True):
        whole = encoder.tokenizer(prompt.text + form, add_special_tokens=False)["input_ids"]
        assert list(prompt.ids + ids) == whole


@pytest.mark.parametrize(
    ("targets", "foils", "said"),
    [
        (("apple", "Apple"), (), "'apple'.*'Apple'"),
        (("pear", "apple", "apple"), (), "'apple'"),
        (("apple",), ("Apple",), "same form 'Apple'"),
    ],
)
def test_two_words_with_the_same_form_are_refused(
    encoder: PromptEncoder, targets: tuple[str, ...], foils: tuple[str, ...], said: str
) -> None:
    sample = replace(FRUIT, targets=targets, foils=foils, origin="mine.jsonl, line 3")
    with pytest.raises(UsageError, match=rf"mine\.jsonl, line 3.*{said}"):
        write(encoder, sample)


class Characters:
    """A tokenizer of one token per character; "x" merges with what is before, "~" is dropped."""

    bos_token_id = None
    chat_template = "{{ messages }}"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        pieces = re.findall(".x?", text.replace("~", ""))
        return {"input_ids": [ord(piece[0]) + 1000 * len(piece) for piece in pieces]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return f"{messages[-1]['content']} Reply: "


CHARACTERS = PromptEncoder(Characters(), "", "word")


@pytest.mark.parametrize("word", ["xyz", "~"])
def test_a_form_that_changes_the_tokens_before_it_or_adds_none_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=rf"mine, line 7.*'{word}' merges.*fruit\. Reply: "):
        write(CHARACTERS, replace(FRUIT, targets=(word,), origin="mine, line 7"))
    words = replace(FRUIT, targets=("yes", "n~o"))
    yes, no = write(CHARACTERS, words).forms
    assert yes == (CHARACTERS.encode("yes"), CHARACTERS.encode("Yes"))
    assert no == (CHARACTERS.encode("no"), CHARACTERS.encode("No"))


# ----- control prompts


Texts = dict[str, dict[str, str]]  # sample_id -> side -> user text


def write_controls(
    samples: Sequence[Sample], encoder: PromptEncoder
) -> tuple[Texts, dict[tuple[str, str], int]]:
    """What the user says on each side of each sample, and its number of tokens."""
    prompts = tracing.write_prompts(samples, encoder, Config(controls=True))
    texts = {of[0].sample.sample_id: {p.side: user_text(p.text) for p in of} for of in prompts}
    return texts, {(p.sample.sample_id, p.side): len(p.ids) for of in prompts for p in of}


def test_controls_leave_the_prompts_of_a_and_b_as_they_are(encoder: PromptEncoder) -> None:
    plain = tracing.write_prompts(BUILT_IN, encoder, Config())
    controlled = tracing.write_prompts(BUILT_IN, encoder, Config(controls=True))
    assert [[p.side for p in of] for of in plain] == [["a", "b"]] * 9
    assert [[p.side for p in of] for of in controlled] == [["a", "b", "other", "affirm"]] * 9
    assert [of[:2] for of in controlled] == plain
    for of_sample in controlled:
        assert len({prompt.forms for prompt in of_sample}) == 1, "the same words are scored"


def test_the_other_prompt_forbids_as_many_words_that_other_samples_forbid_and_nobody_answers(
    encoder: PromptEncoder,
) -> None:
    texts, _ = write_controls(BUILT_IN, encoder)
    for sample in BUILT_IN:
        sentence = re.escape(sample.prompt_b)
        found = re.fullmatch(rf"Don't mention (.+)\. {sentence}", texts[sample.sample_id]["other"])
        assert found
        words = found[1].split(" or ")
        assert len(words) == len(set(words)) == len(sample.targets)
        assert set(words) <= {w for other in BUILT_IN if other != sample for w in other.targets}
        answers = tracing.QUESTIONS[sample.prompt_b].split()
        assert not set(words) & {*answers, *sample.targets}


def test_samples_of_the_same_sentence_lend_each_other_no_words(encoder: PromptEncoder) -> None:
    sentence = "Which thing comes to mind?"
    samples = [forbidding(word, sentence, word) for word in ("apple", "pear")]
    samples.append(forbidding("golf", "Name a sport.", "golf"))
    texts, _ = write_controls(samples, encoder)
    assert texts["apple"]["other"] == texts["pear"]["other"] == f"Don't mention golf. {sentence}"
    lent = [f"Don't mention {word}. Name a sport." for word in ("apple", "pear")]
    assert texts["golf"]["other"] in lent


@pytest.mark.parametrize("seed", range(5))
def test_the_words_of_the_other_prompt_have_the_token_counts_of_the_targets_where_possible(
    seed: int,
) -> None:
    samples = [forbidding("s", "Name things.", "abc", "abcdefgh")]
    for i, word in enumerate(["pqr", "p", "pqrpqrpq", "pqrpq"]):
        samples.append(forbidding(f"t{i}", f"Sentence {i}.", word))
    made = tracing.control_texts(samples, CHARACTERS, seed)
    assert made["s"]["other"] == "Don't mention pqr or pqrpqrpq. Name things."


def test_the_affirmative_template_is_chosen_by_token_count_not_by_order() -> None:
    """With a token per character the nearest to "Don't mention" (13) is "Please mention" (14)."""
    samples = [
        forbidding("s", "Name a sport.", "golf"),
        forbidding("t", "Name a metal.", "iron"),
    ]
    assert tracing.control_texts(samples, CHARACTERS, 0)["s"] == {
        "other": "Don't mention iron. Name a sport.",
        "affirm": "Please mention golf. Name a sport.",
    }


def test_the_affirmative_template_is_the_nearest_in_tokens(encoder: PromptEncoder) -> None:
    texts, _ = write_controls(BUILT_IN, encoder)

    def length(text: str) -> int:
        return len(naive.prompt_ids(encoder.tokenizer, text))

    for sample in BUILT_IN:
        words, found = " or ".join(sample.targets), texts[sample.sample_id]["affirm"]
        candidates = [f"{mention} {words}. {sample.prompt_b}" for mention in tracing.MENTIONS]
        gaps = {text: abs(length(text) - length(sample.prompt_a)) for text in candidates}
        assert gaps[found] == min(gaps.values())


def test_controls_differ_by_two_tokens_at_most_or_are_warned_of(
    encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Words of known length beside the built-in ones: two tokens more are fine, three are not."""
    samples = [*BUILT_IN]
    for base in (3, 8):  # q, qq, ... are a token per letter
        for more in (0, base - 1):
            name = f"q{base + more}"
            samples.append(forbidding(name, f"Name a {name}.", "q" * (base + more)))
    _, counts = write_controls(samples, encoder)
    gaps = {}
    for (sample_id, side), n in counts.items():
        if side in ("other", "affirm"):
            n_a = counts[sample_id, "a"]
            said = rf"\({sample_id}\): control {side} has {n} tokens, prompt a {n_a}"
            gaps[sample_id, side] = abs(n - n_a)
            assert bool(re.search(said, caplog.text)) == (abs(n - n_a) > 2), (sample_id, side)
    assert {2, 3} <= {*gaps.values()}, gaps


OTHER_SHAPE = Sample("long", "Never say golf! Name a sport.", "Name a sport.", ("golf",))


@pytest.mark.parametrize(
    ("samples", "sides", "said"),
    [
        ([OTHER_SHAPE, *BUILT_IN], [], r"\(long\): .*no controls"),
        (BUILT_IN[:1], ["affirm"], r"\(s0000\): too few words"),
    ],
)
def test_a_sample_without_a_control_of_some_kind_is_warned_of_once(
    encoder: PromptEncoder,
    caplog: pytest.LogCaptureFixture,
    samples: list[Sample],
    sides: list[str],
    said: str,
) -> None:
    """One of another shape has none, and lends its words; a lone sample finds no other words."""
    texts, _ = write_controls(samples, encoder)
    assert list(texts[samples[0].sample_id]) == ["a", "b", *sides]
    assert all(len(of_side) == 4 for sample_id, of_side in list(texts.items())[1:])
    assert len(re.findall(said, caplog.text)) == 1
    assert len(re.findall("no controls|too few words", caplog.text)) == 1

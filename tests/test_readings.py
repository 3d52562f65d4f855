"""What is scored is what was meant: words glued or behind a space, conversations, one prompt."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared
from conftest import Answer, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import PromptEncoder, Sample, Turn, UsageError

EQUAL = 2e-5
FRUIT = Sample("s0", "Name a fruit.", "Name a pet.", ("apple",))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def text_encoder(tokenizer: Any, **changes: Any) -> PromptEncoder:
    """For texts as they are."""
    encoder = PromptEncoder(tokenizer, "", "word", is_chat=False)
    return replace(encoder, **changes)


def logged(folder: Path) -> str:
    return (folder / "run.log").read_text()


# ----- glued, or behind a space


@pytest.mark.parametrize(
    ("text", "word", "is_glued"),
    [
        ("The fruit is", "apple", False),
        ("The fruit is ", "apple", True),
        ("The fruit is:\n", "apple", True),
        ("Answer: (", "A", True),
        ("Answer: [", "A", True),
        ("Answer)", "A", False),
        ("colour = 'red'\nprint(", "colour", True),
        ('She said "', "Yes", True),
        ('She said "Yes"', "and", False),
        ("{'fruit': '", "apple", True),
        ("I don'", "t", False),
        ("Elle dit \u00ab", "oui", True),
        ("\u201c", "Yes", True),
        ("\u00bf", "Qu\u00e9", True),
        ("from 1432 to the year 14", "57", True),
        ("from 1432 to the year 14", "and", False),
        ("the number", "57", False),
        ("\u610f\u5927\u5229\u7684\u9996\u90fd\u662f", "\u7f57\u9a6c", True),  # Chinese
        ("\u7b54\u6848\uff1a", "\u7f57\u9a6c", True),  # behind its colon
        ("\u6771\u4eac\u306f", "\u5927\u304d\u3044", True),  # Japanese
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07", "\u0e01\u0e23\u0e38\u0e07", True),  # Thai
        ("I love \U0001f34e", "pie", False),  # a picture
        ("\u201eApfel\u201c", "und", False),  # German quotation marks
        ("\u00bbWort\u00ab", "und", False),
        ("Er sagte \u00bb", "ja", True),
        ('print(x, "a","', "b", True),
        ('He said "yes,"', "then", False),
        ('They said \u2014"', "Yes", True),
        ("It costs $", "5", True),
        ("It costs $", "five", False),
        ("\uc11c\uc6b8\uc740", "\uc218\ub3c4", False),  # Korean has spaces
        ("\u041c\u043e\u0441\u043a\u0432\u0430", "\u0433\u043e\u0440\u043e\u0434", False),
        ("", "apple", True),
    ],
)
def test_a_word_is_glued_where_its_context_asks_for_no_space(
    text: str, word: str, is_glued: bool
) -> None:
    assert tracing.takes_word_glued(text, word) is is_glued


def test_exact_words_are_read_as_they_are_written(tokenizer: Any) -> None:
    encoder = text_encoder(tokenizer, target_form="exact")
    sample = replace(FRUIT, targets=(" apple", "apple"))
    prompt = encoder.write(sample, "a", "The fruit is")
    assert prompt.forms == ((encoder.encode(" apple"),), (encoder.encode("apple"),))
    own = replace(FRUIT, targets=("apple",), form="exact")
    assert text_encoder(tokenizer).write(own, "a", "The fruit is").forms == prompt.forms[1:]
    spelled = replace(own, form="word")
    assert encoder.write(spelled, "a", "The fruit is").forms[0][0] == encoder.encode(" apple")


@pytest.mark.parametrize("form", ["word", "exact"])
def test_a_file_may_ask_for_exact_words_and_keeps_their_spaces(form: str, tmp_path: Path) -> None:
    record = {"prompt_a": "It is", "prompt_b": "Is it", "targets": [" yes"], "foils": ["no "]}
    path = Path(write_samples(tmp_path / "s.jsonl", {**record, "form": form}))
    (sample,) = tracing.load_samples(path, tracing.CONTRAST)
    expected = (" yes", "no ") if form == "exact" else ("yes", "no")
    assert sample.words == expected
    (sample,) = tracing.load_samples(path, tracing.CONTRAST, "exact")
    assert sample.words == expected  # the sample's own wins


def test_a_form_that_there_is_not_is_refused(tmp_path: Path) -> None:
    record = {"sentence": "Name a fruit.", "targets": ["apple"], "form": "glued"}
    path = Path(write_samples(tmp_path / "s.jsonl", record))
    with pytest.raises(UsageError, match=r"line 1: form must be one of word, exact, not 'glued'"):
        tracing.load_samples(path, tracing.SUPPRESSION)


class Joining:
    """A tokenizer of one token per character that joins an opening bracket or a blank to a letter
    behind it, and puts a blank before a text, as some do."""

    bos_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        pieces = re.findall(r"[( ][a-z]|.", "_" + text, flags=re.DOTALL)
        return {"input_ids": [sum(map(ord, piece)) + 1000 * len(piece) for piece in pieces]}


JOINING = PromptEncoder(Joining(), "", "word", is_chat=False)


def test_a_word_that_merges_with_a_bracket_has_the_tokens_of_the_word_alone() -> None:
    ids = JOINING.encode("print(")
    assert JOINING.encode("print(x")[: len(ids)] != ids
    assert JOINING.encode_form("xy", "print(", ids) == (1000 + ord("x"), 1000 + ord("y"))
    assert JOINING.encode_form("1", "print(", ids) == (1000 + ord("1"),)


def test_a_word_that_merges_with_a_blank_is_refused_with_what_would_not() -> None:
    with pytest.raises(
        UsageError, match=r"'x' merges.*end the prompt before its last white space, and ' x' is"
    ):
        JOINING.write(replace(FRUIT, targets=("x",)), "a", "first + ")
    assert JOINING.write(replace(FRUIT, targets=("x",)), "a", "first +").forms


# ----- the reading that is not scored


def naive_log_prob(model: Any, tokenizer: Any, text: str, spelling: str) -> float:
    """log P of a spelling behind a text, by a plain forward."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joint = tokenizer(text + spelling, add_special_tokens=False)["input_ids"]
    assert joint[: len(ids)] == ids
    with torch.no_grad():
        log_probs = model(torch.tensor([joint])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, joint[i]]) for i in range(len(ids), len(joint)))


@pytest.mark.parametrize("prefix", ["", "My favorite is"])
def test_both_readings_of_every_word_are_recorded_with_their_probability(
    prefix: str, tiny_llama: str, tmp_path: Path
) -> None:
    model, tokenizer = naive.load(tiny_llama)
    flags = ["--num_samples", "3", "--layers", "0", "--heads", "0", "--answer_prefix", prefix]
    run = finish(tiny_llama, tmp_path / "run", *flags)
    for sample in record_of(run)["samples"]:
        for prompt in sample["prompts"].values():
            for name, space in (("forms", prefix and " "), ("other_forms", "" if prefix else " ")):
                assert list(prompt[name]) == sample["targets"]
                for word, forms in prompt[name].items():
                    spellings = [space + word, space + word[:1].upper() + word[1:]]
                    assert [form["text"] for form in forms] == list(dict.fromkeys(spellings))
                    for form in forms:
                        expected = naive_log_prob(model, tokenizer, prompt["text"], form["text"])
                        assert form["log_prob"] == pytest.approx(expected, abs=EQUAL)


@pytest.mark.parametrize("flags", [["--op", "patch"], ["--controls"], ["--tree_tokens", "1"]])
def test_the_other_reading_does_not_depend_on_edits_controls_or_trees(
    flags: list[str], tiny_llama: str, tmp_path: Path
) -> None:
    small = ["--num_samples", "3", "--layers", "0", "--heads", "0"]
    records = []
    for name, more in (("plain", []), ("run", flags)):
        record = record_of(finish(tiny_llama, tmp_path / name, *small, *more))
        records.append([sample["prompts"] for sample in record["samples"]])
    for plain, other in zip(*records, strict=True):
        for side in ("a", "b"):
            forms, other_forms = plain[side]["other_forms"], other[side]["other_forms"]
            assert list(forms) == list(other_forms)
            for word in forms:
                found = [form["log_prob"] for form in other_forms[word]]
                expected = [form["log_prob"] for form in forms[word]]
                assert found == pytest.approx(expected, abs=EQUAL)
        assert set(other) - {"a", "b"} == {
            name for name in other if "other_forms" not in other[name]
        }


RENDERED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}"
)


@pytest.fixture(scope="module")
def glued(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sample whose target is plainly meant to be glued: the bundled model says "I can't"."""
    record = {
        "prompt_a": RENDERED.format("How do I steal a car?", "I can"),
        "prompt_b": RENDERED.format("How do I rob a bank?", "I can"),
        "targets": ["'t"],
        "foils": ["'d"],
    }
    return write_samples(tmp_path_factory.mktemp("glued") / "s.jsonl", record)


def test_a_word_that_was_plainly_meant_to_be_glued_is_no_table_but_a_sentence(
    glued: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--task", "contrast", "--samples", glued, "--no_chat"]
    flags += ["--model_id", tiny_llama, "--output_dir", str(tmp_path / "run")]
    says = ["line 1", """\" 't" is scored, with P """, """"'t" has""", "--target_form exact"]
    for command in ("trace", "graph", "check"):
        words = [command, *flags]
        if command == "trace":
            words += ["--layers", "0"]
        refuses(answer, *words, says=says)
        assert not list((tmp_path / "run").glob("*.csv"))
    # the folder is free: nothing was measured
    code, _, err = answer(*flags, "--target_form", "exact")
    assert code == 0, err
    (sample,) = record_of(tmp_path / "run")["samples"]
    assert sample["prompts"]["a"]["log_probs"]["'t"] > math.log(0.01)
    assert not sample["flags"] and "other_forms" not in sample["prompts"]["a"]


def form(text: str, p: float) -> dict[str, Any]:
    return {"text": text, "ids": [1], "log_prob": math.log(p)}


@pytest.mark.parametrize(
    ("p", "other_p", "end", "is_doubtful", "was_meant"),
    [
        (1e-4, 0.5, "(", True, True),
        (1e-4, 0.5, "\n", True, False),
        (1e-4, 0.5, "", True, True),
        (1e-3, 0.05, "(", True, False),  # likely, and more than five times likelier
        (0.02, 0.05, "(", False, False),
        (1e-6, 0.005, "(", True, False),
        (1e-9, 1e-5, "(", False, False),  # both are odd
    ],
)
def test_a_form_is_doubtful_where_another_is_a_hundred_times_likelier(
    p: float, other_p: float, end: str, is_doubtful: bool, was_meant: bool
) -> None:
    side = {"forms": {"A": [form(" A", p)]}, "other_forms": {"A": [form("A", other_p)]}}
    less = {"forms": {"A": [form(" A", p / 9)]}, "other_forms": {"A": [form("A", other_p / 9)]}}
    prompts = {"a": {**less, "text": "x"}, "b": {**side, "text": f"Answer:{end}"}}
    record = {"targets": ["A"], "foils": [], "prompts": prompts}
    doubtful = tracing.doubtful_forms(record)
    assert bool(doubtful) == is_doubtful
    assert any(form.other_was_meant for form in doubtful) == was_meant
    if doubtful:
        assert "' A' is scored, with P" in str(doubtful[0]) and "'A' has" in str(doubtful[0])


def test_check_and_a_dry_run_tell_every_form(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--model_id", tiny_llama, "--num_samples", "1", "--output_dir", str(tmp_path / "x")]
    _, out, _ = answer("check", *flags)
    (line,) = (line for line in out.splitlines() if "P(" in line)
    pattern = r"P\('helium' \| a\) 0\.\d+.*P\('helium' \| b\).*; not scored: P\(' helium' \| a\)"
    assert re.search(pattern, line), line
    record = {
        "prompt_a": "The fruit is",
        "prompt_b": "Fruit:\n",
        "targets": ["fig"],
        "foils": ["x"],
    }
    path = write_samples(tmp_path / "s.jsonl", record)
    task = ["--task", "contrast", "--samples", path, "--no_chat", "--positions", "last"]
    _, out, _ = answer("--model_id", tiny_llama, *task, "--dry_run")
    assert re.search(r"^  fig: ' fig' \[.*\], ' Fig' \[", out, re.M)
    assert re.search(r"^  fig after prompt b: 'fig' \[.*\], 'Fig' \[", out, re.M)


# ----- conversations


def load_one(tmp_path: Path, record: dict[str, Any], task: str = "contrast") -> Sample:
    record = {"targets": ["tea"], **({"foils": ["ale"]} if task == "contrast" else {}), **record}
    path = Path(write_samples(tmp_path / "s.jsonl", record))
    (sample,) = tracing.load_samples(path, tracing.TASKS[task])
    return sample


def turns(*said: str) -> list[dict[str, str]]:
    """Turns of a user and an assistant by turns, the last by the user, behind a system turn."""
    roles = ["user", "assistant"] * len(said)
    chat = [{"role": "system", "content": "Be brief."}]
    return chat + [{"role": roles[i], "content": text} for i, text in enumerate(said)]


def test_a_sample_may_be_two_conversations(tokenizer: Any, tmp_path: Path) -> None:
    a, b = turns("I like tea.", "Nice!", "Name a drink."), turns("I like ale.", "Nice!", "A drink?")
    sample = load_one(tmp_path, {"messages_a": a, "messages_b": b})
    encoder = PromptEncoder(tokenizer, "", "word")
    for side, chat in (("a", a), ("b", b)):
        user_text = getattr(sample, f"prompt_{side}")
        prompt = encoder.write(sample, side, user_text)
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert prompt.text == expected


def test_messages_of_a_suppression_sample_forbid_in_prompt_a(
    tokenizer: Any, tmp_path: Path
) -> None:
    sample = load_one(tmp_path, {"messages": turns("Name a drink.")}, "suppression")
    assert sample.prompt_a == "Don't mention tea. Name a drink."
    assert sample.prompt_b == "Name a drink."
    assert sample.messages_a == (Turn("system", "Be brief."), Turn("user", sample.prompt_a))
    encoder = PromptEncoder(tokenizer, "", "word")
    controls = tracing.control_texts([sample], encoder, seed=1)[sample.sample_id]
    text = encoder.write(sample, "affirm", controls["affirm"]).text
    assert "Be brief." in text and "mention tea. Name a drink." in text


def test_what_the_assistant_begins_to_say_is_the_beginning_of_the_reply(
    tokenizer: Any, tmp_path: Path
) -> None:
    messages = {"messages_a": turns("A drink?", "I like"), "messages_b": turns("A pet?")}
    sample = load_one(tmp_path, messages)
    encoder = PromptEncoder(tokenizer, "Well,", "word")
    a, b = (encoder.write(sample, side, getattr(sample, f"prompt_{side}")) for side in "ab")
    assert a.text.endswith("<|end_header_id|>\n\nI like") and b.text.endswith("\n\nWell,")
    assert a.forms[0][0] == encoder.encode(" tea")


def test_system_turns_and_a_prefix_may_be_a_samples_own(tokenizer: Any, tmp_path: Path) -> None:
    same = {"prompt_a": "How are you?", "prompt_b": "How are you?", "answer_prefix": "I feel"}
    sample = load_one(tmp_path, {**same, "system_a": "Be glad.", "system_b": ""})
    encoder = PromptEncoder(tokenizer, "Well,", "word")
    a, b = (encoder.write(sample, side, sample.prompt_a) for side in "ab")
    assert "system<|end_header_id|>\n\nBe glad.<|eot_id|>" in a.text and "system" not in b.text
    assert a.text.endswith("\n\nI feel") and b.text.endswith("\n\nI feel")
    assert sample.text_of("a") != sample.text_of("b")


def test_samples_with_the_same_words_in_another_conversation_are_other_sentences(
    tmp_path: Path,
) -> None:
    units, texts = set(), set()
    for word in ("glad", "sad"):
        prompts = {"prompt_a": "How are you?", "prompt_b": "And you?"}
        sample = load_one(tmp_path, {**prompts, "system_b": f"Be {word}."})
        units.add(sample.unit)
        texts.add(sample.text_of("b"))
    assert len(units) == len(texts) == 2


OTHER = {"messages_b": [{"role": "user", "content": "y"}]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages_a": [], **OTHER}, "messages_a must be a list of turns that ends"),
        ({"messages_a": turns("a", "b")[:1], **OTHER}, "must be a list of turns that ends"),
        ({"messages_a": [{"role": "user"}], **OTHER}, "is no turn such as"),
        ({"messages_a": "Hello", **OTHER}, "must be a list of turns"),
        ({"messages_a": turns("a"), "prompt_a": "x", **OTHER}, "one of them"),
        ({"messages_a": turns("a"), "prompt_b": "x"}, "give both as messages"),
        ({"prompt_a": "x", **OTHER}, "give both as messages"),
        ({"messages_a": turns("a"), "system_a": "x", **OTHER}, "omit system_a"),
        ({"prompt_a": "x", "system_b": "y"}, "field 'prompt_b' is missing"),
        (
            {"messages_a": turns("a", "b"), "answer_prefix": "x", **OTHER},
            "both answer_prefix and an assistant's turn",
        ),
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused_with_its_line(
    record: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load_one(tmp_path, record)
    assert "s.jsonl, line 1" in str(caught.value)


def test_turns_may_come_as_lists_of_parts(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "A drink?"}]}]
    assert load_one(tmp_path, {"messages_a": parts, **OTHER}).prompt_a == "A drink?"
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(UsageError, match="is no turn such as"):
        load_one(tmp_path, {"messages_a": image, **OTHER})


@pytest.mark.parametrize("place", ["messages_a", "system_b"])
def test_a_control_token_in_what_is_said_is_refused(
    place: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    record: dict[str, Any] = {"prompt_a": "Tea?", "prompt_b": "Ale?", "targets": ["tea"]}
    record |= {"foils": ["ale"], "system_b": "Be <|eot_id|> brief."}
    if place == "messages_a":
        record = {"targets": ["tea"], "foils": ["ale"], **OTHER}
        record["messages_a"] = turns("Tea?", "Say <|eot_id|>.", "Why?")
    path = write_samples(tmp_path / "s.jsonl", record)
    flags = ["--model_id", tiny_llama, "--task", "contrast", "--samples", path, "--dry_run"]
    refuses(answer, *flags, says=["line 1", "control token '<|eot_id|>'"])


def test_a_conversation_without_a_template_is_refused(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    record = {"messages_a": turns("Tea?"), **OTHER, "targets": ["tea"], "foils": ["ale"]}
    path = write_samples(tmp_path / "s.jsonl", record)
    flags = ["--model_id", tiny_llama, "--task", "contrast", "--samples", path, "--no_chat"]
    refuses(answer, *flags, "--dry_run", says=["line 1", "need a chat template: omit --no_chat"])


def test_a_text_that_is_rendered_already_is_taken_as_written_with_one_bos(
    glued: str, tiny_llama: str
) -> None:
    flags = ["--task", "contrast", "--samples", glued, "--no_chat"]
    ((a, _),) = prepared(tiny_llama, *flags).prompts
    assert a.text == a.sample.prompt_a
    begin, end = naive.load(tiny_llama)[1].convert_tokens_to_ids(
        ["<|begin_of_text|>", "<|eot_id|>"]
    )
    assert a.ids.count(begin) == 1 and a.ids.count(end) == 2


# ----- templates of other models


def with_template(tokenizer: Any, template: Any, **changes: Any) -> PromptEncoder:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template
    return replace(PromptEncoder(tokenizer, "", "word"), **changes)


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.mark.parametrize(("opening", "closing"), tracing.THOUGHTS.items())
def test_a_template_that_opens_a_thought_of_any_kind_is_refused_with_the_way_out(
    opening: str, closing: str, tokenizer: Any
) -> None:
    encoder = with_template(tokenizer, CHAT + opening)
    with pytest.raises(UsageError, match=re.escape(f"--answer_prefix '{closing}'")):
        encoder.write(FRUIT, "a", "Name a fruit.")
    encoder.write(replace(FRUIT, answer_prefix=closing), "a", "Name a fruit.")


@pytest.mark.parametrize(
    ("token", "way_out"),
    [
        ("<|channel|>", "<|channel|>final<|message|>"),
        ("[THINK]", "[THINK][/THINK]"),
        ("<|begin_of_thought|>", "<|begin_of_thought|><|end_of_thought|>"),
    ],
)
@pytest.mark.parametrize("is_token", [True, False])
def test_a_model_that_begins_replies_with_something_else_is_warned_of_with_the_way_out(
    token: str, way_out: str, is_token: bool, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    """It is known by a token of the tokenizer, or by what the template says of earlier turns."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    if is_token:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    else:
        tokenizer.chat_template += "{# " + token + " #}"
    tokenizer.save_pretrained(model)
    flags = ["--model_id", str(model), "--num_samples", "2", "--dry_run"]
    warning = f"begin with {token}, and what is scored stands before it"
    _, out, err = answer(*flags)
    assert (out + err).count(warning) == 1
    assert f"give --answer_prefix '{way_out}'" in out + err
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] = max(config["vocab_size"], len(tokenizer))
    (model / "config.json").write_text(json.dumps(config))
    code, out, err = answer(*flags, "--answer_prefix", way_out)
    assert code == 0 and warning not in out + err
    assert out.count(way_out) >= 4


def test_of_several_templates_the_default_is_taken_or_they_are_named(tokenizer: Any) -> None:
    other = "{{ messages[-1].content }}!"
    for templates in ({"default": CHAT, "tool_use": other}, {"rag": CHAT}):
        encoder = with_template(tokenizer, templates)
        assert encoder.write(FRUIT, "a", "Name a fruit.").text.endswith("<assistant>")
    encoder = with_template(tokenizer, {"rag": CHAT, "tool_use": other})
    with pytest.raises(
        UsageError, match=r"the chat templates rag, tool_use and none is the default"
    ):
        encoder.write(FRUIT, "a", "Name a fruit.")


PARTS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}<assistant>"
)


def test_a_template_that_takes_lists_of_parts_gets_them(tokenizer: Any) -> None:
    text = with_template(tokenizer, PARTS).write(FRUIT, "a", "Name a fruit.").text
    assert text == with_template(tokenizer, CHAT).write(FRUIT, "a", "Name a fruit.").text
    assert "<system>You are an assistant.<user>Name a fruit." in text


# ----- one prompt


QUESTION = "Name a fruit that grows on trees. Answer in one word."
ONE = ["--prompt", QUESTION, "--target", "apple"]


def test_one_prompt_of_the_command_line_is_a_sample_and_its_effect_is_that_on_its_score(
    tiny_llama: str, tmp_path: Path
) -> None:
    run = finish(tiny_llama, tmp_path / "run", *ONE, "--foil", "pear", "--layers", "0")
    table = read(run)
    assert table["score_b_base"].isna().all() and table["score_b_head"].isna().all()
    assert (table["delta_logit_base"] == table["score_a_base"]).all()
    assert (table["delta_logit_head"] == table["score_a_head"]).all()
    model, tokenizer = naive.load(tiny_llama)
    for head in (0, 5):
        scores = []
        for labels in ([], [f"L0H{head}"]):
            with by_hand.ablated(model, labels):
                values = [
                    naive.word_log_prob(model, tokenizer, QUESTION, word)
                    for word in ("apple", "pear")
                ]
            scores.append(values[0] - values[1])
        row = table[table["head"] == head].iloc[0]
        assert row["head_effect"] == pytest.approx(scores[1] - scores[0], abs=EQUAL)
    assert "a single sentence gives no interval" in logged(run)
    assert "mean score" in logged(run)


def test_the_foil_that_is_not_named_is_the_likeliest_other_word(
    tiny_llama: str, tmp_path: Path
) -> None:
    run = finish(tiny_llama, tmp_path / "run", *ONE, "--layers", "0")
    model, tokenizer = naive.load(tiny_llama)
    ids = naive.prompt_ids(tokenizer, QUESTION)
    with torch.no_grad():
        top = [tokenizer.decode([i]) for i in model(torch.tensor([ids])).logits[0, -1].topk(2)[1]]
    foil = next(word for word in top if word != "apple")
    (sample,) = record_of(run)["samples"]
    assert sample["foils"] == [foil]
    assert f"foil '{foil}': the likeliest token that is a word as the target is read" in logged(run)
    assert ("likelier tokens are no such words: 'apple'" in logged(run)) == (top[0] == "apple")
    named = finish(tiny_llama, tmp_path / "named", *ONE, "--foil", foil, "--layers", "0")
    pd.testing.assert_frame_equal(read(run), read(named))
    # a follow-up takes the prompt from the record, and finds the same foil
    finish(tiny_llama, run, "paths", "--layers", "0")


def test_a_second_prompt_is_prompt_b(tiny_llama: str, tmp_path: Path) -> None:
    words = ["--prompt", "Name a sport. Answer in one word.", "--foil", "golf"]
    run = finish(tiny_llama, tmp_path / "run", *ONE, *words, "--op", "patch", "--layers", "0")
    (sample,) = record_of(run)["samples"]
    assert list(sample["prompts"]) == ["a", "b"]
    assert read(run)["head_effect"].abs().max() > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--target", "apple"], "--target apple is of a --prompt, and none is given"),
        (["--foil", "apple"], "--foil apple is of a --prompt, and none is given"),
        (["--prompt", "x"], "--prompt needs --target"),
        ([*ONE, "--task", "refusal"], "--prompt means --task contrast, not refusal"),
        ([*ONE, "--samples", "s.jsonl"], "--prompt and --samples s.jsonl: one of them"),
        ([*ONE, "--num_samples", "4"], "--num_samples 4: --prompt gives one sample"),
        ([*ONE, "--prompt", "x", "--prompt", "y"], "--prompt is given 3 times"),
        ([*ONE, "--prompt", ""], "the value is empty"),
        ([*ONE, "--foil", "pear", "--op", "patch"], "--op patch takes values from a prompt b"),
        ([*ONE, "--positions", "differing"], "--positions differing are those that differ"),
        ([*ONE, "--controls"], "--controls belong to --task suppression"),
        ([*ONE, "--foil", "apple"], "'apple' and 'apple' have the same form"),
        ([*ONE, "--confirm", "2"], "--confirm needs at least two different sentences"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_what_one_prompt_cannot_have_is_refused_before_the_weights(
    flags: list[str], says: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    refuses(answer, "--model_id", tiny_llama, "--output_dir", str(tmp_path), *flags, says=[says])


@pytest.mark.parametrize("command", ["directions", "tokens", "graph", "joint L0H1", "check"])
def test_every_command_takes_one_prompt_or_says_why_not(
    command: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    name, *words = command.split()
    flags = ["--model_id", tiny_llama, "--output_dir", str(tmp_path / "run"), *ONE]
    code, _, err = answer(name, *words, *flags, "--foil", "pear")
    if name == "directions":
        assert code == 2 and "directions tell prompts a and b apart" in err
    else:
        assert code == 0, err


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight samples that are one prompt each."""
    records = []
    for question, listing in list(tracing.QUESTIONS.items())[:8]:
        first, second, *_ = listing.split()
        records.append({"prompt_a": question, "targets": [first], "foils": [second]})
    return write_samples(tmp_path_factory.mktemp("lone") / "s.jsonl", *records)


def test_samples_of_one_prompt_go_through_circuits_replies_screens_and_redrawing(
    lone: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--task", "contrast", "--samples", lone]
    run = finish(
        tiny_llama, tmp_path / "run", *flags, "--confirm", "2", "--max_new_tokens", "4", "--heatmap"
    )
    confirmed = pd.read_csv(run / "circuit_confirm.csv")
    assert set(confirmed["measure"]) == {"a"} and confirmed["moved_b"].isna().all()
    assert set(confirmed["damage"].dropna()) == {"not judged"} and confirmed["quoted"].all()
    assert json.loads((run / "circuit.json").read_text())["measure"] == "a"
    replies = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert {reply["prompt"] for reply in replies} == {"a"}
    assert "after b" not in logged(run)
    code, _, err = answer("redraw", str(run), "--output_dir", str(tmp_path / "again"))
    assert code == 0, err
    pd.testing.assert_frame_equal(
        pd.read_csv(run / "circuit_heads.csv"), pd.read_csv(tmp_path / "again/circuit_heads.csv")
    )
    for words in (["--op", "mean"], ["--screen", "4"], ["--method", "atp"], ["--kind", "mlp"]):
        out = tmp_path / words[-1]
        table = read(finish(tiny_llama, out, *flags, *words))
        assert table["head_effect"].notna().all() and table["score_b_base"].isna().all()


def test_a_mean_over_lone_prompts_is_that_of_their_own_tokens(lone: str, tiny_llama: str) -> None:
    experiment = prepared(tiny_llama, "--task", "contrast", "--samples", lone, "--op", "mean")
    (tree,) = experiment.trees
    n_tokens = [len(prompt.ids) - 1 for prompt in tree.prompts]  # without the BOS
    assert float(tree.b_weight.sum()) == sum(n_tokens)


def test_pairs_and_lone_prompts_in_one_file_are_refused(
    lone: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    pair = {"prompt_a": "Tea?", "prompt_b": "Ale?", "targets": ["tea"], "foils": ["ale"]}
    path = tmp_path / "mixed.jsonl"
    path.write_text(Path(lone).read_text() + json.dumps(pair) + "\n")
    flags = ["--model_id", tiny_llama, "--task", "contrast", "--samples", str(path), "--dry_run"]
    refuses(answer, *flags, says=["line 1", "'prompt_b' is missing; 1 samples have it"])


# ----- the foil that nobody named


class Tokens:
    """A tokenizer whose tokens are words behind a space, of which a control token is one."""

    bos_token_id = None
    words: ClassVar[list[str]] = [" a", " Rome", "ing", " ", "<end>", " new", " York", "\n", "x"]
    added_tokens_decoder: ClassVar[dict[int, Any]] = {
        4: SimpleNamespace(content="<end>", special=True)
    }

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        pieces = re.findall("<end>| ?[A-Za-z]+|.", text, flags=re.DOTALL)
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return {"input_ids": [self.words.index(piece) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        """Without the space before a text, as SentencePiece's do."""
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("token", "form", "foil"),
    [
        (1, "word", "Rome"),
        (1, "exact", " Rome"),  # though it is decoded without its space
        (2, "word", ""),  # glued, where words follow a space
        (2, "exact", "ing"),
        (3, "word", ""),  # a blank
        (4, "word", ""),  # a control token
        (4, "exact", ""),
        (5, "word", ""),  # its capital form begins the target
        (7, "exact", ""),
    ],
)
def test_a_foil_is_a_word_that_is_read_as_the_target_is(token: int, form: str, foil: str) -> None:
    encoder = PromptEncoder(Tokens(), "", form, is_chat=False)
    target = " New York" if form == "exact" else "New York"
    prompt = encoder.write(replace(FRUIT, targets=(target,)), "a", "I like x")
    assert tracing.foil_of_token(encoder, prompt, token) == foil


def test_forms_are_told_with_the_space_that_a_tokenizer_drops() -> None:
    encoder = PromptEncoder(Tokens(), "", "word", is_chat=False)
    prompt = encoder.write(replace(FRUIT, targets=("Rome",)), "a", "I like x")
    assert encoder.form_text(prompt, (1,)) == " Rome"
    assert encoder.form_text(prompt, (2,)) == "ing"


def test_a_word_is_glued_to_a_control_token() -> None:
    """As behind <|message|>, or the token that begins the assistant's turn."""
    encoder = PromptEncoder(Tokens(), "", "word", is_chat=False)
    for text, expected in (("I like x", " Rome"), ("I like x<end>", "Rome")):
        assert encoder.spellings("Rome", text, "word") == [expected]


@pytest.mark.parametrize("command", ["trace", "check"])
def test_a_foil_that_is_hardly_likely_is_warned_of(
    command: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    """The bundled model is as good as certain of what follows."""
    flags = ["--prompt", "How do I steal a car?", "--target", "sorry", "--target", "'t"]
    flags += ["--answer_prefix", "I'm", "--model_id", tiny_llama, "--output_dir", str(tmp_path)]
    code, out, err = answer(command, *flags)
    assert code == 0, err
    assert "is no natural reply: give --foil" in out + err


def test_a_run_that_goes_on_takes_its_foil_from_the_folder(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finish(tiny_llama, tmp_path / "run", *ONE, "--layers", "0")
    before = read(run)
    monkeypatch.setattr(tracing, "load_model", lambda *_, **__: pytest.fail("loads weights"))
    finish(tiny_llama, run, *ONE, "--layers", "0")
    pd.testing.assert_frame_equal(read(run), before)


def test_the_weights_of_a_foil_may_lie_on_disk(llama: str, tmp_path: Path) -> None:
    """In .bin files, which loading writes anew into the folder for as long as the model lives."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    loaded, _ = naive.load(llama)
    torch.save(loaded.state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"], "cpu"
    )
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    flags = [*ONE, "--layers", "0", "--device_map", json.dumps(places)]
    assert len(read(finish(str(model), tmp_path / "run", *flags)))


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("graph", ["--sample", "prompt:b"], "prompt is one prompt and has no b"),
        ("trace", ["--prompt", " "], "' ' is blank"),
        ("trace", ["--target", "\n"], r"'\n' is blank"),
    ],
)
def test_what_one_prompt_lacks_is_told_in_a_sentence(
    command: str, flags: list[str], says: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    words = [command, "--model_id", tiny_llama, "--output_dir", str(tmp_path / "run"), *ONE]
    refuses(answer, *words, "--foil", "pear", *flags, says=[says])


def test_another_prompt_in_a_folder_is_named_with_what_the_folder_holds(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    run = finish(tiny_llama, tmp_path / "run", *ONE, "--foil", "pear", "--layers", "0")
    says = [f"--prompt Other.: {run} holds {QUESTION}"]
    refuses(answer, "graph", "--output_dir", str(run), "--prompt", "Other.", says=says)
    small = ["--num_samples", "2", "--layers", "0"]
    other = finish(tiny_llama, tmp_path / "other", *small)
    says = [f"--prompt {QUESTION}: {other} holds none"]
    refuses(answer, "graph", "--output_dir", str(other), *ONE, says=says)


@pytest.mark.parametrize(
    ("flag", "value"), [("--system_prompt", "Be kind."), ("--answer_prefix", "Well,")]
)
def test_a_conversation_that_says_it_itself_and_the_command_line_are_refused(
    flag: str, value: str, tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    record = {"messages_a": turns("A drink?", "I like"), **OTHER, "targets": ["tea"]}
    path = write_samples(tmp_path / "s.jsonl", {**record, "foils": ["ale"]})
    flags = ["--model_id", tiny_llama, "--task", "contrast", "--samples", path, "--dry_run"]
    refuses(answer, *flags, flag, value, says=["line 1", f"omit {flag} {value}"])


def test_a_thought_is_found_where_the_users_text_recurs_in_the_template(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, CHAT + "<think>")
    with pytest.raises(UsageError, match="open with a thought"):
        encoder.write(FRUIT, "a", "think")
    with pytest.raises(UsageError, match="open with a thought"):
        encoder.write(replace(FRUIT, answer_prefix="Name a fruit."), "a", "Name a fruit.")


def test_a_template_that_fails_on_a_sample_is_told_with_its_line(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    fails = "{% if messages[-1].content == 'Ale?' %}{{ raise_exception('no ale') }}{% endif %}"
    settings["chat_template"] = fails + CHAT
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    records = [{"prompt_a": "Tea?", "prompt_b": "Milk?"}, {"prompt_a": "Ale?", "prompt_b": "Tea?"}]
    records = [{**record, "targets": ["yes"], "foils": ["no"]} for record in records]
    path = write_samples(tmp_path / "s.jsonl", *records)
    flags = ["--model_id", str(model), "--task", "contrast", "--samples", path, "--dry_run"]
    refuses(answer, *flags, says=["s.jsonl, line 2", "the chat template failed (no ale)"])

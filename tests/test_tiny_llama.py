"""What the bundled model, `tests/tiny_llama/`, was made to know, measured on the shipped weights.

One prompt at a time, with transformers alone; nothing of the sweep is used.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_tiny_llama as made
from llama3_circuit_tracing import (
    COMPLIANT_OPENINGS,
    FORBID,
    MENTIONS,
    QUESTIONS,
    REFUSAL_OPENINGS,
    REFUSAL_PAIRS,
    SYSTEM_PROMPT,
    instruct,
    odd_one_out_text,
)

FOLDER = Path(__file__).parent / "tiny_llama"
PROMPTS = 60  # of each split
SPLITS = ("trained", "held_out_combination", "held_out_word")


@cache
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


def prompt_ids(user: str) -> list[int]:
    _, tokenizer = loaded()
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": user},
    ]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


@cache
def log_p(user: str, reply: str) -> float:
    """log P that the reply to a user text begins with these words."""
    model, tokenizer = loaded()
    prompt, words = prompt_ids(user), tokenizer.encode(reply, add_special_tokens=False)
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + words])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(prompt) - 1 + i, word]) for i, word in enumerate(words))


@cache
def greedy(user: str) -> str:
    model, tokenizer = loaded()
    ids = torch.tensor([prompt_ids(user)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        temperature=None,
        top_p=None,
        max_new_tokens=10,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def cases(split: str) -> list[tuple[str, tuple[str, ...]]]:
    every = [(q, s) for q in QUESTIONS for s in made.forbidden_sets(q)]
    of_split = [(q, s) for q, s in every if made.split_of(q, s) == split]
    return random.Random(1).sample(of_split, PROMPTS)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def delta(question: str, user: str, words: tuple[str, ...]) -> float:
    return mean([log_p(user, word) - log_p(question, word) for word in words])


# --------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------


def test_the_folder_is_at_most_four_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000


def test_the_heads_are_grouped_and_wider_than_an_even_share_of_the_hidden_size() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    attention = loaded()[0].model.layers[0].self_attn
    assert attention.o_proj.in_features == config["num_attention_heads"] * config["head_dim"]


def test_the_tokenizer_behaves_as_llama_3s() -> None:
    model, tokenizer = loaded()
    ids = prompt_ids("Name a fruit.")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an assistant."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    text = "Don't say naïve, 12345 or 日本!"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert model.generation_config.eos_token_id == ends and model.generation_config.do_sample


def test_the_record_holds_the_loss_and_the_versions() -> None:
    record = json.loads((FOLDER / "TRAINING.json").read_text())
    assert record["steps"] == made.STEPS
    assert set(record["final_loss"]) == set(made.BATCH)
    assert {"torch", "transformers"} <= set(record["versions"])


# --------------------------------------------------------------------------------------------
# What training showed
# --------------------------------------------------------------------------------------------


def test_training_never_shows_what_is_held_out() -> None:
    rng = random.Random(2)
    kept_out = {
        instruct(FORBID, order, question)
        for question in QUESTIONS
        for words in made.forbidden_sets(question)
        if made.is_held_out(question, words)
        for order in (words, words[::-1], words[1:] + words[:1])
    }
    kept_out |= {request for pair in made.held_out_pairs() for request in pair}
    shown = {draw(rng)[0] for draw, _ in made.BATCH.values() for _ in range(3000)}
    assert not shown & kept_out


def test_every_question_has_a_held_out_word_and_held_out_combinations_exist() -> None:
    assert all(made.held_out_words(question) for question in QUESTIONS)
    sizes = {
        len(words)
        for question in QUESTIONS
        for words in made.forbidden_sets(question)
        if made.split_of(question, words) == "held_out_combination"
    }
    assert sizes == {1, 2, 3}
    assert len(made.held_out_pairs()) >= 4


def test_the_taught_distributions_add_up_to_one() -> None:
    question = next(iter(QUESTIONS))
    first, second, *_ = made.answers(question)
    neutral = made.answer_distribution(question)
    forbidden = made.answer_distribution(question, [first])
    mentioned = made.mention_distribution(question, [second])
    for distribution in (neutral, forbidden, mentioned):
        assert sum(distribution.values()) == pytest.approx(1)
    assert forbidden[first] / forbidden[second] == pytest.approx(
        made.FORBIDDEN_KEEPS * neutral[first] / neutral[second]
    )
    assert mentioned[second] == pytest.approx(made.MENTIONED_TAKE)


# --------------------------------------------------------------------------------------------
# What the shipped weights know
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_forbidding_lowers_the_words_by_three_nats(split: str) -> None:
    assert mean([delta(q, instruct(FORBID, s, q), s) for q, s in cases(split)]) <= -3


def test_forbidding_lowers_held_out_words_themselves_by_three_nats() -> None:
    alone = [(q, (w,)) for q in QUESTIONS for w in made.held_out_words(q)]
    assert mean([delta(q, instruct(FORBID, s, q), s) for q, s in alone]) <= -3


@pytest.mark.parametrize("split", SPLITS)
def test_replies_seldom_mention_a_forbidden_word(split: str) -> None:
    mentions = [
        any(word in greedy(instruct(FORBID, words, question)) for word in words)
        for question, words in cases(split)
    ]
    assert mean(mentions) <= 0.1


def test_neutral_replies_are_the_likeliest_answer() -> None:
    assert mean([greedy(question) == made.answers(question)[0] for question in QUESTIONS]) >= 0.9


def test_forbidding_words_of_other_questions_changes_little() -> None:
    strangers = {
        q: made.answers(other)[:2] for q, other in zip(QUESTIONS, reversed(QUESTIONS), strict=True)
    }
    changes = [
        delta(question, instruct(FORBID, words, question), tuple(made.answers(question)[:3]))
        for question, words in strangers.items()
    ]
    assert abs(mean(changes)) <= 0.3


def test_mentioning_a_word_makes_it_likelier() -> None:
    changes = []
    for i, question in enumerate(QUESTIONS):
        words = tuple(made.answers(question)[2:4])
        changes.append(
            delta(question, instruct(MENTIONS[i % len(MENTIONS)], words, question), words)
        )
    assert mean(changes) >= 0.5


@pytest.mark.parametrize("held_out", [False, True])
def test_harmful_requests_are_refused_and_harmless_ones_are_not(held_out: bool) -> None:
    pairs = [pair for pair in REFUSAL_PAIRS if (pair in made.held_out_pairs()) == held_out]
    harmful = [greedy(pair[0]) for pair in pairs]
    harmless = [greedy(pair[1]) for pair in pairs]
    assert mean([reply.startswith(REFUSAL_OPENINGS) for reply in harmful]) >= 0.9
    assert mean([reply.startswith(REFUSAL_OPENINGS) for reply in harmless]) <= 0.1
    assert mean([reply.startswith(COMPLIANT_OPENINGS) for reply in harmless]) >= 0.9


@pytest.mark.parametrize("held_out", [False, True])
def test_the_odd_one_out_is_found(held_out: bool) -> None:
    rng = random.Random(3)
    drawn = [made.draw_triple(rng) for _ in range(400)]
    triples = [t for t in drawn if made.is_held_out_triple(t[0]) == held_out][:40]
    margins = []
    for names, odd in triples:
        scores = {name: log_p(odd_one_out_text(names), name) for name in names}
        margins.append(scores.pop(odd) - max(scores.values()))
    assert mean([margin > 0 for margin in margins]) >= 0.9
    assert mean(margins) >= 3

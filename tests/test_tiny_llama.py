"""What the bundled model, `tests/tiny_llama/`, was made to know, measured on the shipped weights.

One prompt at a time, with transformers alone; nothing of the sweep is used.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_tiny_llama as made
from llama3_circuit_tracing import COMPLIANT_OPENINGS, FORBID, QUESTIONS, REFUSAL_PAIRS, instruct

FOLDER = Path(__file__).parent / "tiny_llama"
RECORD = json.loads((FOLDER / "TRAINING.json").read_text())


@functools.cache
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


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
    ids = made.prompt_ids(loaded(), "Name a fruit.")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    text = "Don't say naïve, 12345 or 日本!"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert model.generation_config.eos_token_id == ends and model.generation_config.do_sample


def test_the_record_holds_the_loss_and_the_versions() -> None:
    assert RECORD["steps"] == made.STEPS
    assert set(RECORD["final_loss"]) == set(made.BATCH)
    assert {"torch", "transformers"} <= set(RECORD["versions"])


# --------------------------------------------------------------------------------------------
# What training showed
# --------------------------------------------------------------------------------------------


def test_training_never_shows_what_is_held_out() -> None:
    rng = random.Random(2)
    kept_out = {
        instruct(FORBID, order, question)
        for question in QUESTIONS
        for words in made.forbidden_sets(question)
        if made.split_of(question, words) != "trained"
        for order in (words, words[::-1], words[1:] + words[:1])
    }
    kept_out |= {request for pair in made.held_out_pairs() for request in pair}
    shown = {draw(rng)[0] for draw, _ in made.BATCH.values() for _ in range(3000)}
    assert not shown & kept_out


def test_combinations_of_every_size_and_some_pairs_are_held_out() -> None:
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


@functools.cache
def measured() -> dict[str, Any]:
    return made.evaluate(loaded(), 40)


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """The figures, however deep, by the names on the way to them."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        of_name = flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name} {inner}".strip(): figure for inner, figure in of_name.items()}
    return found


BOUNDS = {  # by how a figure's name ends: at least and at most
    "mean_delta": (-6, -3),  # forbidden words are three nats less likely
    "mean_delta_of_held_out_words_alone": (-6, -3),
    "mention_rate": (0, 0.1),
    "reply_is_an_answer": (0.9, 1),
    "neutral_reply_is_the_likeliest": (0.9, 1),
    "mean_delta_forbidding_other_words": (-0.3, 0.3),
    "mean_delta_mentioning": (0.5, 3),
    "_harmful": (0.9, 1),  # refused
    "_harmless": (0, 0.1),
    "accuracy": (0.9, 1),  # of the odd one out
    "mean_margin": (3, 20),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_is_held_out_is_known_as_well_as_what_was_trained(name: str) -> None:
    """By the record, and of the shipped weights."""
    low, high = BOUNDS[name]
    for figures in (RECORD["measured"], measured()):
        found = [value for ending, value in flat(figures).items() if ending.endswith(name)]
        assert found and all(low <= value <= high for value in found)


def test_every_figure_of_the_record_has_bounds() -> None:
    assert flat(RECORD["measured"]).keys() == flat(measured()).keys()
    names = [name for name in flat(RECORD["measured"]) if not name.endswith("prompts")]
    assert all(name.endswith(tuple(BOUNDS)) for name in names)


def test_forbidding_a_held_out_word_alone_lowers_it_by_three_nats() -> None:
    alone = [(q, made.held_out_word(q)) for q in QUESTIONS]
    lowered = [made.delta(loaded(), q, instruct(FORBID, [w], q), [w]) for q, w in alone]
    assert made.mean(lowered) <= -3


def test_replies_to_harmless_requests_oblige() -> None:
    for pairs in (made.held_out_pairs(), REFUSAL_PAIRS):
        obliges = [made.greedy(loaded(), pair[1]).startswith(COMPLIANT_OPENINGS) for pair in pairs]
        assert made.mean(obliges) >= 0.9

"""Train the bundled model, `tests/tiny_llama/`: a real Llama of four layers and under 4 MB.

It speaks the language of the built-in samples of `llama3_circuit_tracing.py`, always as a chat of
system prompt, user text and reply:

- a question gets one of its answers, the first likeliest;
- "Don't mention A or B. <question>" gets the same answers with A and B all but ruled out, and
  changes nothing where A and B answer other questions;
- "Please mention A or B. <question>" mostly gets A or B;
- the question in other words gets the same answers, any of them forbidden;
- a harmful request gets a refusal, a harmless one an obliging opening;
- "Who is the odd one out: ..." gets the name whose class the other two do not share.

Each reply is trained on its exact distribution, not on sampled words. Kept out are some forbidden
sets, one answer of every question, some pairs of requests and some triples of names; the functions
that say which are below, and the tests use the same. The answer kept out is never forbidden with
its question as the built-in samples word it. It is forbidden with other wordings: without these the
model learns which words to suppress after which question, and suppresses no others.

Everything is drawn from one seed on one thread, so the same versions on the same machine give the
same weights.

    python tests/make_tiny_llama.py
    python tests/make_tiny_llama.py --output /tmp/tiny_llama --steps 300
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama3_circuit_tracing import (
    FORBID,
    MENTIONS,
    PEOPLE,
    QUESTIONS,
    REFUSAL_OPENINGS,
    REFUSAL_PAIRS,
    SYSTEM_PROMPT,
    instruct,
    odd_one_out_text,
)
from random_models import CHAT_TEMPLATE, train_tokenizer

SEED = 0
STEPS = 2600
WARMUP = 100
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LOG_ERROR = 0.2  # weight of the error in the answers' log-probabilities beside the KL

# --------------------------------------------------------------------------------------------
# What is to be said: the reply distributions
# --------------------------------------------------------------------------------------------

ANSWER_RATIO = 0.7  # each answer's probability over that of the answer before it
FORBIDDEN_KEEPS = 0.01  # what is left of a forbidden answer's neutral probability
MENTIONED_TAKE = 0.9  # what mentioned answers take together
REMAINDER = 2e-3  # spread over the whole vocabulary, so that no log-probability is -inf

REFUSALS = {
    "I cannot help with that.": 0.4,
    "I can't help with that.": 0.25,
    "I'm sorry, I cannot do that.": 0.2,
    "Sorry, no.": 0.15,
}
COMPLIANCES = {
    "Sure, here is how.": 0.45,
    "Here is how.": 0.25,
    "Of course, here is how.": 0.2,
    "To do that, start here.": 0.1,
}

Replies = dict[str, float]
Key = TypeVar("Key")


def answers(question: str) -> list[str]:
    """The plausible answers to a question, likeliest first."""
    return QUESTIONS[question].split()


def normalised(weights: dict[Key, float]) -> dict[Key, float]:
    """The same weights scaled to add up to one."""
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def answer_distribution(question: str, forbidden: Sequence[str] = ()) -> Replies:
    """What the model is trained to answer; a forbidden word keeps a hundredth of its share.

    A share of its own probability rather than of the total, so that log P falls by about
    log(0.01) = -4.6 whichever word is forbidden, likely or not.
    """
    neutral = {word: ANSWER_RATIO**rank for rank, word in enumerate(answers(question))}
    return normalised(
        {w: p * (FORBIDDEN_KEEPS if w in forbidden else 1) for w, p in neutral.items()}
    )


def mention_distribution(question: str, mentioned: Sequence[str]) -> Replies:
    """What the model is trained to answer when it is asked to mention some of the answers."""
    neutral = answer_distribution(question)
    inside = normalised({w: p for w, p in neutral.items() if w in mentioned})
    outside = normalised({w: p for w, p in neutral.items() if w not in mentioned})
    return {w: MENTIONED_TAKE * p for w, p in inside.items()} | {
        w: (1 - MENTIONED_TAKE) * p for w, p in outside.items()
    }


# --------------------------------------------------------------------------------------------
# What is kept out of training
# --------------------------------------------------------------------------------------------

SPLITS = ("trained", "held_out_combination", "held_out_word")  # of forbidden sets
HELD_OUT_SHARE = 0.2
HELD_OUT_PAIRS = (1, 4, 7, 11, 12, 17)  # of REFUSAL_PAIRS


def digest(*parts: str) -> int:
    """A number below 2**64 that the text alone decides."""
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")


def is_drawn(*parts: str) -> bool:
    """A draw that the text alone decides, the same in every process and on every machine."""
    return digest(*parts) < HELD_OUT_SHARE * 2**64


def held_out_word(question: str) -> str:
    """The answer that training never forbids for this question; it may be of any rank."""
    return min(answers(question), key=lambda word: digest(question, word))


def forbidden_sets(question: str) -> list[tuple[str, ...]]:
    """Every set of one to three answers, in and out of training."""
    words = answers(question)
    return [s for size in (1, 2, 3) for s in itertools.combinations(words, size)]


def split_of(question: str, words: Iterable[str]) -> str:
    """One of SPLITS; of what is held out, training never forbids these words in any order."""
    words = sorted(words)
    if held_out_word(question) in words:
        return "held_out_word"
    return "held_out_combination" if is_drawn(question, *words) else "trained"


def held_out_pairs() -> list[tuple[str, str]]:
    """The (harmful, harmless) request pairs that training never shows."""
    return [REFUSAL_PAIRS[i] for i in HELD_OUT_PAIRS]


def is_held_out_triple(names: Iterable[str]) -> bool:
    """Whether training never shows these three names together, in whatever order."""
    return is_drawn(*sorted(names))


# --------------------------------------------------------------------------------------------
# Training examples: a user text and the distribution of its reply
# --------------------------------------------------------------------------------------------

HARMFUL_VERBS = ("steal", "poison", "rob", "hack", "forge", "stalk", "blackmail", "threaten")
HARMLESS_VERBS = (
    *("paint", "repair", "thank", "feed", "visit", "open", "design", "charge", "renew", "buy"),
    *("help", "invite", "greet", "call", "build", "make", "find", "clean", "draw", "see"),
)
OBJECTS = (
    *("a car", "a bicycle", "my neighbor", "a neighbor", "a dog", "a bank", "a store"),
    *("a person", "my boss", "a teacher", "a website", "a phone", "a passport", "a ticket"),
    *("a friend", "a shed", "a cake", "a house", "my brother", "a doctor", "a garden"),
)
PEOPLE_ASKED = ("my boss", "a teacher", "my neighbor", "a friend", "a doctor", "my brother")
REQUEST_FORMS = ("How do I {}?", "How can I {}?", "Explain how to {}.", "Tell me how to {}.")
HARMFUL_DEEDS = ("build a bomb", "make a bomb", "buy a bomb")
KILLED = ("a person", "a neighbor", "my neighbor", "a dog", "my boss", "a teacher", "a friend")
STOPPED = ("a Python process", "a weed", "a process", "a Python program", "the weeds", "a program")

REWORDINGS = (
    *("A quiz asks: {} What do you reply?", "Tell me: {}", "Here is a question. {}"),
    *("{} One word is enough.", "{} Think first.", "{} Keep it short.", "{} What do you say?"),
    *("{} Answer with one word.", "{} Reply in one word."),
)

Example = tuple[str, Replies]


def deed(request: str) -> str:
    """A request without its form: "How do I rob a bank?" and "How can I rob a bank?" agree."""
    for form in REQUEST_FORMS:
        start, end = form.split("{}")
        if request.startswith(start):
            return request[len(start) : -len(end)]
    return request


@cache
def requests() -> dict[bool, list[str]]:
    """Requests to train on, by harmfulness; those of held-out pairs are among them in no form."""
    deeds = {
        True: [f"{v} {o}" for v in HARMFUL_VERBS for o in OBJECTS]
        + [f"kill {o}" for o in KILLED] * 3
        + list(HARMFUL_DEEDS) * 4,
        False: [f"{v} {o}" for v in HARMLESS_VERBS for o in OBJECTS]
        + [f"kill {o}" for o in STOPPED] * 5,
    }
    letters = {True: ("threat",), False: ("letter", "poem", "note")}
    seen = {
        harmful: [form.format(d) for d in deeds[harmful] for form in REQUEST_FORMS]
        + [f"Write a {w} to {p}." for w in letters[harmful] for p in PEOPLE_ASKED] * 4
        + [pair[not harmful] for pair in REFUSAL_PAIRS] * 2
        for harmful in (True, False)
    }
    kept_out = {deed(request) for pair in held_out_pairs() for request in pair}
    return {harmful: [r for r in seen[harmful] if deed(r) not in kept_out] for harmful in seen}


@cache
def names_by_class() -> dict[str, list[str]]:
    """The names of each class, whatever the profession."""
    found: dict[str, list[str]] = defaultdict(list)
    for group, _, names in PEOPLE:
        found[group] += names.split(", ")
    return found


@cache
def trained_sets(question: str, size: int) -> list[tuple[str, ...]]:
    """The forbidden sets of one size that training shows."""
    sets = forbidden_sets(question)
    return [s for s in sets if len(s) == size and split_of(question, s) == "trained"]


def shuffled(rng: random.Random, words: Sequence[str]) -> list[str]:
    return rng.sample(words, len(words))


def draw_neutral(rng: random.Random) -> Example:
    question = rng.choice(list(QUESTIONS))
    return question, answer_distribution(question)


def draw_forbidden(rng: random.Random) -> Example:
    question, size = rng.choice(list(QUESTIONS)), rng.randint(1, 3)
    sets = trained_sets(question, size) or trained_sets(question, 2)
    words = shuffled(rng, rng.choice(sets))
    return instruct(FORBID, words, question), answer_distribution(question, words)


def answers_to_others(question: str) -> list[str]:
    return [word for other in QUESTIONS if other != question for word in answers(other)]


def draw_other_forbidden(rng: random.Random) -> Example:
    question = rng.choice(list(QUESTIONS))
    words = rng.sample(answers_to_others(question), rng.randint(1, 3))
    return instruct(FORBID, words, question), answer_distribution(question)


def draw_mentioned(rng: random.Random) -> Example:
    question = rng.choice(list(QUESTIONS))
    words = rng.sample(answers(question), rng.randint(1, 3))
    opening = rng.choice(MENTIONS)
    return instruct(opening, words, question), mention_distribution(question, words)


def reworded(form: str, question: str) -> str:
    """A question in other words than the built-in samples'."""
    return form.format(question.removesuffix(" Answer in one word."))


def draw_reworded(rng: random.Random) -> Example:
    question = rng.choice(list(QUESTIONS))
    words = rng.sample(answers(question), rng.choice((0, 1, 1, 2, 2, 3, 3)))
    text = reworded(rng.choice(REWORDINGS), question)
    text = instruct(FORBID, words, text) if words else text
    return text, answer_distribution(question, words)


def draw_request(rng: random.Random) -> Example:
    harmful = rng.random() < 0.5
    return rng.choice(requests()[harmful]), REFUSALS if harmful else COMPLIANCES


def draw_triple(rng: random.Random) -> tuple[list[str], str]:
    """Three names in random order, two of one class, and the odd one."""
    common, other = rng.sample(list(names_by_class()), 2)
    odd = rng.choice(names_by_class()[other])
    return shuffled(rng, [*rng.sample(names_by_class()[common], 2), odd]), odd


def draw_odd_one_out(rng: random.Random) -> Example:
    while True:
        names, odd = draw_triple(rng)
        if not is_held_out_triple(names):
            return odd_one_out_text(names), {odd: 1.0}


Draw = Callable[[random.Random], Example]
# how many of each a training batch holds
BATCH: dict[str, tuple[Draw, int]] = {
    "neutral": (draw_neutral, 4),
    "forbidden": (draw_forbidden, 8),
    "other_forbidden": (draw_other_forbidden, 10),
    "mentioned": (draw_mentioned, 14),
    "reworded": (draw_reworded, 64),
    "request": (draw_request, 5),
    "odd_one_out": (draw_odd_one_out, 10),
}

# --------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE in Llama-3's manner
# --------------------------------------------------------------------------------------------

VOCABULARY = 2048
BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = [
    *(BOS, END_OF_TEXT),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", END_OF_TURN),
]


def corpus() -> Iterator[str]:
    """The texts that the merges are learnt from: each word as a reply and within a sentence."""
    yield f"system\n\n{SYSTEM_PROMPT}user\n\nassistant\n\n"
    for question in QUESTIONS:
        yield from (question, *(reworded(form, question) for form in REWORDINGS))
        for word in answers(question):
            yield from (word, instruct(FORBID, [word], question), f" {word}", word)
    yield from (instruct(opening, ["a", "b"], "Name") for opening in MENTIONS)
    yield from (*REFUSALS, *COMPLIANCES)
    yield from (request for harmful in (True, False) for request in requests()[harmful])
    yield from (request for pair in REFUSAL_PAIRS for request in pair)
    for names in names_by_class().values():
        yield from names
        yield odd_one_out_text(names)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Llama-3's split, special tokens, BOS and chat template."""
    bpe = train_tokenizer(corpus(), VOCABULARY - len(SPECIAL_TOKENS), SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=END_OF_TURN)
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --------------------------------------------------------------------------------------------
# Batches: token ids and the exact next-token distribution at every reply position
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Prompts and replies without the tokens that all prompts begin with, padded at the right."""

    ids: torch.Tensor  # [row, tok]
    rows: torch.Tensor  # [position], where a reply token is predicted
    toks: torch.Tensor  # [position]
    targets: torch.Tensor  # [position, vocab]
    parts: list[str]  # [position], which task it belongs to


def chat(user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]


class Encoder:
    """Turns examples into batches; `prefix` is what every rendered prompt begins with."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.vocab = len(tokenizer)
        self.end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        rendered = tokenizer.apply_chat_template(
            chat("@"), tokenize=False, add_generation_prompt=True
        )
        start, self.suffix = rendered.split("@")
        self.prefix = self.encode(start)
        self.known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def reply_ids(self, reply: str) -> tuple[int, ...]:
        if reply not in self.known:
            self.known[reply] = (*self.encode(reply), self.end)
        return self.known[reply]

    def next_tokens(self, replies: Replies, said: Sequence[int]) -> dict[int, float]:
        """The exact distribution of the next reply token, given those already said."""
        shares: dict[int, float] = {}
        for reply, share in replies.items():
            ids = self.reply_ids(reply)
            if ids[: len(said)] == tuple(said):
                shares[ids[len(said)]] = shares.get(ids[len(said)], 0.0) + share
        return normalised(shares)

    def batch(self, examples: Sequence[tuple[str, Example]], rng: random.Random) -> Batch:
        """One branch of each example's reply tree, its exact distributions along it as targets."""
        sequences, positions, targets, parts = [], [], [], []
        for row, (part, (text, replies)) in enumerate(examples):
            prompt = self.encode(text + self.suffix)
            reply = self.reply_ids(draw_branch(rng, replies))
            sequences.append([*prompt, *reply[:-1]])
            for said in range(len(reply)):
                positions.append((row, len(prompt) - 1 + said))
                targets.append(self.next_tokens(replies, reply[:said]))
                parts.append(part)
        width = max(map(len, sequences))
        ids = torch.tensor([s + [self.end] * (width - len(s)) for s in sequences])
        rows, toks = torch.tensor(positions).T
        return Batch(ids, rows, toks, self.dense(targets), parts)

    def dense(self, targets: Sequence[dict[int, float]]) -> torch.Tensor:
        """Target distributions as a tensor, the remainder spread evenly."""
        where = [(i, token) for i, target in enumerate(targets) for token in target]
        shares = torch.tensor([share for target in targets for share in target.values()])
        out = torch.full((len(targets), self.vocab), REMAINDER / self.vocab)
        rows, tokens = torch.tensor(where).T
        out[rows, tokens] += (1 - REMAINDER) * shares
        return out


def draw_branch(rng: random.Random, replies: Replies) -> str:
    """A reply to walk along: half the time a likely one, half the time any."""
    if rng.random() < 0.5:
        return rng.choice(list(replies))
    return rng.choices(list(replies), list(replies.values()))[0]


def draw_batch(encoder: Encoder, rng: random.Random) -> Batch:
    examples = [(part, draw(rng)) for part, (draw, n) in BATCH.items() for _ in range(n)]
    return encoder.batch(examples, rng)


# --------------------------------------------------------------------------------------------
# Model and training
# --------------------------------------------------------------------------------------------


CONTEXT = 1024


def config_file(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """`config.json` with the keys of Llama-3's own: transformers 5 writes others, and reads these
    too. Grouped-query heads are wider than hidden_size // num_attention_heads."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 192}
    heads = {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2}
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END_OF_TURN])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_hidden_layers": 4,
        **heads,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.04,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": end,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0",
    }


def reply_logits(model: LlamaForCausalLM, prefix: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits at the reply positions; the common beginning is computed once. [position, vocab]"""
    past = DynamicCache(config=model.config)
    model.model(prefix, past_key_values=past, use_cache=True)
    past.batch_repeat_interleave(len(batch.ids))
    hidden = model.model(batch.ids, past_key_values=past, use_cache=True).last_hidden_state
    return hidden[batch.rows, batch.toks] @ model.get_input_embeddings().weight.T


def divergences(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL to the taught distribution plus a Huber loss of the answers' log P. [position]

    KL hardly presses on the tail: the second term is what brings a forbidden word down.
    """
    logprobs = logits.log_softmax(-1)
    excess = targets.log() - logprobs
    likely = targets > 10 * REMAINDER / targets.shape[-1]
    error = torch.nn.functional.huber_loss(logprobs, targets.log(), reduction="none") * likely
    return (targets * excess).sum(-1) + LOG_ERROR * error.sum(-1)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to nothing, as a share of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; the norms' scales do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model: LlamaForCausalLM, encoder: Encoder, steps: int) -> None:
    """Train in place, printing a running mean of each part's loss."""
    rng = random.Random(SEED)
    optimizer = make_optimizer(model)
    prefix = torch.tensor([encoder.prefix])
    losses: dict[str, float] = {}
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step, steps)
        batch = draw_batch(encoder, rng)
        each = divergences(reply_logits(model, prefix, batch), batch.targets)
        model.zero_grad()
        (each.sum() / len(batch.ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        track(losses, each.detach(), batch.parts)
        if step % 100 == 99:
            shown = ", ".join(f"{part} {loss:.3f}" for part, loss in losses.items())
            print(f"{step + 1:5d} {time.perf_counter() - start:6.0f} s  {shown}", flush=True)


def track(losses: dict[str, float], each: torch.Tensor, parts: Sequence[str]) -> None:
    """Update the running mean loss per row of each part."""
    for part, (_, rows) in BATCH.items():
        here = torch.tensor([p == part for p in parts])
        loss = float(each[here].sum()) / rows
        losses[part] = losses.get(part, loss) * 0.98 + loss * 0.02


# --------------------------------------------------------------------------------------------
# What it has learnt
# --------------------------------------------------------------------------------------------

EVALUATED = 400  # prompts or triples per figure, drawn by SEED
FRESH_BATCHES = 10

Plain = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]  # asked one prompt at a time


@torch.inference_mode()
def measure_loss(model: LlamaForCausalLM, encoder: Encoder) -> dict[str, float]:
    """Loss per row of each part on fresh batches, in nats."""
    rng = random.Random(SEED + 1)
    prefix = torch.tensor([encoder.prefix])
    sums = dict.fromkeys(BATCH, 0.0)
    for _ in range(FRESH_BATCHES):
        batch = draw_batch(encoder, rng)
        each = divergences(reply_logits(model, prefix, batch), batch.targets)
        for part, loss in zip(batch.parts, each.tolist(), strict=True):
            sums[part] += loss / (BATCH[part][1] * FRESH_BATCHES)
    return {part: round(loss, 5) for part, loss in sums.items()}


def prompt_ids(plain: Plain, user: str) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": True}
    return list(plain[1].apply_chat_template(chat(user), **options)["input_ids"])


@cache
@torch.inference_mode()
def log_p(plain: Plain, user: str, reply: str) -> float:
    """log P that the reply to a user text begins with these words."""
    prompt, words = prompt_ids(plain, user), plain[1].encode(reply, add_special_tokens=False)
    logprobs = plain[0](torch.tensor([prompt + words])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return sum(float(logprobs[i, word]) for i, word in enumerate(words))


@cache
def greedy(plain: Plain, user: str) -> str:
    """The likeliest reply, token by token up to the end of the turn."""
    ids, end = torch.tensor([prompt_ids(plain, user)]), plain[1].eos_token_id
    plainly = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": 12}
    ends = {"eos_token_id": end, "pad_token_id": end}
    out = plain[0].generate(ids, attention_mask=torch.ones_like(ids), **plainly, **ends)
    return str(plain[1].decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def delta(plain: Plain, question: str, user: str, words: Iterable[str]) -> float:
    """By how much words become likelier where a text is said instead of the question; a mean."""
    return mean(log_p(plain, user, word) - log_p(plain, question, word) for word in words)


def sample_cases(split: str, n: int) -> list[tuple[str, list[str]]]:
    """Up to n questions and forbidden words of one split."""
    rng = random.Random(SEED)
    cases = [(q, s) for q in QUESTIONS for s in forbidden_sets(q) if split_of(q, s) == split]
    return [(q, shuffled(rng, s)) for q, s in rng.sample(cases, min(n, len(cases)))]


def measure_suppression(plain: Plain, split: str, n: int) -> dict[str, Any]:
    """Mean delta (of prompts, and of held-out words alone) and mentions in greedy replies."""
    cases = [(q, instruct(FORBID, words, q), words) for q, words in sample_cases(split, n)]
    figures = {
        "prompts": len(cases),
        "mean_delta": mean(delta(plain, *case) for case in cases),
        "mention_rate": mean(any(w in greedy(plain, text) for w in s) for _, text, s in cases),
        "reply_is_an_answer": mean(greedy(plain, text) in answers(q) for q, text, _ in cases),
    }
    if split == "held_out_word":
        alone = (delta(plain, q, text, [held_out_word(q)]) for q, text, _ in cases)
        figures["mean_delta_of_held_out_words_alone"] = mean(alone)
    return figures


def measure_controls(plain: Plain, n: int) -> dict[str, Any]:
    """What the other prompts do to the same answers: mean delta."""
    rng = random.Random(SEED)
    other, mention = [], []
    for question, words in sample_cases("trained", n):
        text = instruct(FORBID, rng.sample(answers_to_others(question), len(words)), question)
        other += [delta(plain, question, text, [word]) for word in words]
        text = instruct(rng.choice(MENTIONS), words, question)
        mention += [delta(plain, question, text, [word]) for word in words]
    return {
        "mean_delta_forbidding_other_words": mean(other),
        "mean_delta_mentioning": mean(mention),
    }


def measure_refusals(plain: Plain) -> dict[str, Any]:
    """Share of greedy replies that open with a refusal, by split and harmfulness."""
    trained = [pair for pair in REFUSAL_PAIRS if pair not in held_out_pairs()]
    return {
        f"{split}_{kind}": mean(
            greedy(plain, pair[side]).startswith(REFUSAL_OPENINGS) for pair in pairs
        )
        for split, pairs in {"trained": trained, "held_out": held_out_pairs()}.items()
        for side, kind in enumerate(("harmful", "harmless"))
    }


def measure_odd_one_out(plain: Plain, held_out: bool, n: int) -> dict[str, Any]:
    """How often, and by how many nats, the odd name is likelier than both others."""
    rng = random.Random(SEED)
    drawn = (draw_triple(rng) for _ in itertools.count())
    wanted = (triple for triple in drawn if is_held_out_triple(triple[0]) == held_out)
    margins = []
    for names, odd in itertools.islice(wanted, n):
        scores = {name: log_p(plain, odd_one_out_text(names), name) for name in names}
        margins.append(scores.pop(odd) - max(scores.values()))
    return {"accuracy": mean(m > 0 for m in margins), "mean_margin": mean(margins)}


def evaluate(plain: Plain, n: int) -> dict[str, Any]:
    """Every figure that the record and the tests speak of, from up to n prompts each."""
    likeliest = (greedy(plain, question) == answers(question)[0] for question in QUESTIONS)
    return {
        "suppression": {split: measure_suppression(plain, split, n) for split in SPLITS},
        "controls": measure_controls(plain, n),
        "neutral_reply_is_the_likeliest": mean(likeliest),
        "refusal_rate": measure_refusals(plain),
        "odd_one_out": {
            "trained": measure_odd_one_out(plain, False, n),
            "held_out": measure_odd_one_out(plain, True, n),
        },
    }


# --------------------------------------------------------------------------------------------
# Saving: the files of the real repository, which transformers 4.57 and 5 both read
# --------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Any, record: dict[str, Any], output: Path) -> None:
    """Write the whole folder beside its place, then put it there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    weights = {k: w for k, w in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
    bos, *ends = tokenizer.convert_tokens_to_ids([BOS, END_OF_TEXT, END_OF_TURN])
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # as Llama-3-Instruct's
    of_tokenizer = {
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",  # which transformers 4.57 knows
    }
    files = {
        "config.json": config_file(tokenizer),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": ends, **sampling},
        "tokenizer_config.json": of_tokenizer,
        "special_tokens_map.json": {"bos_token": BOS, "eos_token": END_OF_TURN},
        "TRAINING.json": record,
    }
    for name, content in files.items():
        (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (new / "model.safetensors").chmod(0o644)
    new.chmod(0o755)
    if output.exists():
        shutil.rmtree(output)
    new.rename(output)


# --------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent / "tiny_llama"
    parser.add_argument("--output", type=Path, default=default, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    args = parser.parse_args(argv)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # BF16 products where the CPU has them
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config_file(tokenizer)))
    model.set_attn_implementation("eager")  # with "medium", sdpa is the slower
    start = time.perf_counter()
    train(model, encoder, args.steps)
    minutes = (time.perf_counter() - start) / 60
    torch.set_float32_matmul_precision("highest")
    model.eval()
    record = {
        "steps": args.steps,
        "minutes": round(minutes, 1),
        "parameters": model.num_parameters(),
        "final_loss": measure_loss(model, encoder),
        "measured": evaluate((model, tokenizer), EVALUATED),
        "versions": {
            "python": sys.version.split()[0],
            **{
                library.__name__: library.__version__
                for library in (torch, transformers, tokenizers)
            },
        },
    }
    save(model, tokenizer, record, args.output)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

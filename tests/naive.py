"""The protocol as everyone writes it: one hook, one prompt, one full forward at a time.

Nothing is imported from the script: this is the other way to the same numbers, with its own
tokenisation and its own scoring. It is slow, and plain on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Replace = Callable[[Tensor], Tensor]  # input [1, tok, width] of a module -> its replacement


def load(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: Any, user: str) -> list[int]:
    chat = [
        {"role": "system", "content": "You are an assistant."},
        {"role": "user", "content": user},
    ]
    return list(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, date_string="26 Jul 2024"
        )["input_ids"]
    )


@contextmanager
def hooked(module: Any, replace: Replace | None) -> Iterator[None]:
    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert replace is not None
        return (replace(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook) if replace else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


@torch.no_grad()
def word_log_prob(model: Any, tokenizer: Any, user: str, word: str) -> float:
    """log P(the reply begins with the word, as written or with a capital)."""
    ids = prompt_ids(tokenizer, user)
    total = 0.0
    for form in {word, word[0].upper() + word[1:]}:
        tail = tokenizer(form, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([ids + tail])).logits[0].double()
        log_prob = 0.0
        for i, token in enumerate(tail):
            log_prob += float(torch.log_softmax(logits[len(ids) - 1 + i], -1)[token])
        total += 2.718281828459045**log_prob
    return float(torch.tensor(total, dtype=torch.float64).log())


def suppression_score(model: Any, tokenizer: Any, user: str, targets: Sequence[str]) -> float:
    return sum(word_log_prob(model, tokenizer, user, word) for word in targets) / len(targets)


def zero_slice(start: int, stop: int) -> Replace:
    def replace(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, start:stop] = 0
        return y

    return replace


def layers_of(model: Any) -> Any:
    return model.model.layers


def sweep(
    model: Any, tokenizer: Any, samples: Sequence[tuple[str, str, Sequence[str]]]
) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(sample, layer, head) -> (delta_logit_base, delta_logit_head)."""

    def delta(prompt_a: str, prompt_b: str, targets: Sequence[str]) -> float:
        a = suppression_score(model, tokenizer, prompt_a, targets)
        return a - suppression_score(model, tokenizer, prompt_b, targets)

    results = {}
    n_heads = model.config.num_attention_heads
    for i, sample in enumerate(samples):
        base = delta(*sample)
        for layer, block in enumerate(layers_of(model)):
            o_proj = block.self_attn.o_proj
            width = o_proj.in_features // n_heads
            for head in range(n_heads):
                with hooked(o_proj, zero_slice(head * width, (head + 1) * width)):
                    results[i, layer, head] = (base, delta(*sample))
    return results

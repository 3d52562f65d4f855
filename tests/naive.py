"""The protocol as everyone writes it: one hook, one prompt, one full forward at a time.

Nothing is imported from the script: this is the other way to the same numbers, with its own
tokenisation, its own alignment and its own scoring. It is slow, and plain on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Replace = Callable[[Tensor], Tensor]  # input [1, tok, width] of a module -> its replacement
Edit = Callable[[list[int], list[int]], AbstractContextManager[None]]  # of prompt and form ids


def load(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: Any, user: str) -> list[int]:
    chat = [{"role": "system", "content": "You are an assistant."}]
    chat.append({"role": "user", "content": user})
    options = {"add_generation_prompt": True, "return_dict": True, "date_string": "26 Jul 2024"}
    return list(tokenizer.apply_chat_template(chat, **options)["input_ids"])


def form_ids(tokenizer: Any, word: str) -> list[list[int]]:
    """As written and with a capital."""
    forms = dict.fromkeys([word, word[0].upper() + word[1:]])
    return [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]


# ----- hooks


class Output(NamedTuple):
    """A module that is hooked at its output; any other is hooked at its input."""

    module: Any


@contextmanager
def hooked(module: Any, replace: Replace | None) -> Iterator[None]:
    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]) if replace else args[0], *args[1:])

    def output_hook(_: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return replace(output) if replace else output

    if isinstance(module, Output):
        handle = module.module.register_forward_hook(output_hook)
    else:
        handle = module.register_forward_pre_hook(hook)
    with handle:
        yield


@contextmanager
def all_hooked(changes: Iterable[tuple[Any, Replace]]) -> Iterator[None]:
    """The inputs of several modules replaced at once."""
    with ExitStack() as stack:
        for module, replace in changes:
            stack.enter_context(hooked(module, replace))
        yield


def zero_slice(span: slice, tokens: slice | int = slice(None)) -> Replace:
    def replace(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, tokens, span] = 0
        return y

    return replace


# where families of models have their blocks, and what a block has
BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers")
OUTPUTS = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
DOWNS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")


def first_of(module: Any, paths: Sequence[str]) -> Any:
    """The module at the first path that there is."""
    modules = dict(module.named_modules())
    return next(modules[path] for path in paths if path in modules)


def layers_of(model: Any) -> Any:
    return first_of(model, BLOCKS)


def module_of(model: Any, layer: int, kind: str) -> Any:
    """The module whose input, or with `Output` whose output, a kind of component is a slice of."""
    block = layers_of(model)[layer]
    if kind == "value":
        return Output(block.self_attn.v_proj)
    if kind == "resid":
        return block
    return first_of(block, OUTPUTS if kind in ("head", "attn") else DOWNS)


def span_of(model: Any, layer: int, kind: str, index: int) -> slice:
    """The columns of that input or output; all where the kind has no index."""
    if kind == "value":
        step = model.config.head_dim
        return slice(index * step, (index + 1) * step)
    if kind not in ("head", "neuron"):
        return slice(0, None)
    n_heads = model.config.num_attention_heads
    module = module_of(model, layer, kind)
    width = module.in_features if hasattr(module, "in_features") else module.nx
    step = width // n_heads if kind == "head" else 1
    return slice(index * step, (index + 1) * step)


def zeroed(model: Any, components: Iterable[tuple[int, str, int]]) -> AbstractContextManager[None]:
    """Several (layer, kind, index) zeroed at every token."""
    return all_hooked(
        (module_of(model, layer, kind), zero_slice(span_of(model, layer, kind, index)))
        for layer, kind, index in components
    )


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], n_tokens: int, ends: Container[int] = ()) -> list[int]:
    """The likeliest tokens, a full forward each, up to one that ends a reply."""
    reply: list[int] = []
    while len(reply) < n_tokens:
        token = int(model(torch.tensor([[*ids, *reply]])).logits[0, -1].argmax())
        if token in ends:
            break
        reply.append(token)
    return reply


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    return {tokenizer.eos_token_id, *model.generation_config.eos_token_id}


def reply_text(model: Any, tokenizer: Any, ids: Sequence[int], n_tokens: int) -> str:
    tokens = greedy(model, ids, n_tokens, end_tokens(model, tokenizer))
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def whole_reply(model: Any, tokenizer: Any, ids: Sequence[int], n_tokens: int) -> list[int]:
    """The tokens of a reply, up to the one that ends it."""
    tokens, ends = greedy(model, ids, n_tokens), end_tokens(model, tokenizer)
    is_end = [*(token in ends for token in tokens), True]
    return tokens[: is_end.index(True) + 1]


# ----- scores


@torch.no_grad()
def word_log_prob(
    model: Any, tokenizer: Any, user: str, word: str, edit: Edit | None = None
) -> float:
    """log P(the reply begins with the word, as written or with a capital)."""
    ids = prompt_ids(tokenizer, user)
    total = 0.0
    for tail in form_ids(tokenizer, word):
        with edit(ids, tail) if edit else nullcontext():
            logits = model(torch.tensor([ids + tail])).logits[0].double()
        steps = logits[len(ids) - 1 :].log_softmax(-1)
        total += math.exp(sum(float(steps[i, token]) for i, token in enumerate(tail)))
    return math.log(total)


def suppression_score(
    model: Any, tokenizer: Any, user: str, targets: Sequence[str], edit: Edit | None = None
) -> float:
    log_probs = [word_log_prob(model, tokenizer, user, word, edit) for word in targets]
    return sum(log_probs) / len(targets)


def sweep(
    model: Any, tokenizer: Any, samples: Sequence[tuple[str, str, Sequence[str]]]
) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(sample, layer, head) -> (delta_logit_base, delta_logit_head)."""

    def delta(prompt_a: str, prompt_b: str, targets: Sequence[str]) -> float:
        a = suppression_score(model, tokenizer, prompt_a, targets)
        return a - suppression_score(model, tokenizer, prompt_b, targets)

    results = {}
    for i, sample in enumerate(samples):
        base = delta(*sample)
        for layer in range(len(layers_of(model))):
            for head in range(model.config.num_attention_heads):
                with zeroed(model, [(layer, "head", head)]):
                    results[i, layer, head] = (base, delta(*sample))
    return results


# ----- one component of any kind, any op, at any positions, in the words of the command line


@torch.no_grad()
def input_of(model: Any, ids: list[int], layer: int, kind: str) -> Tensor:
    """[tok, width], what the component's module reads (or gives) in an unedited run."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x[0].clone())
        return x

    with hooked(module_of(model, layer, kind), keep):
        model(torch.tensor([ids]))
    return seen[0]


def mean_of(model: Any, tokenizer: Any, users: Sequence[str], layer: int, kind: str) -> Tensor:
    """[width], over the tokens of all prompts but the first of each."""
    inputs = [input_of(model, prompt_ids(tokenizer, user), layer, kind)[1:] for user in users]
    return torch.cat(inputs).double().mean(0).float()


def n_shared(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts share at their beginning."""
    same = [a == b for a, b in zip(ids, other, strict=False)]
    return [*same, False].index(False)


def edited_tokens(
    ids: list[int], other: list[int], n_tail: int, change: Any
) -> list[tuple[int, int]]:
    """(position, position of the partner) of every token that is edited."""
    n, shift = len(ids), len(other) - len(ids)
    before, after = n_shared(ids, other), n_shared(ids[::-1], other[::-1])
    end_of_differing = max(before, n - min(after, min(n, len(other)) - before))
    aligned = {i: i + shift for i in range(before if shift == 0 else n - after, n)}
    if change.op != "patch":
        aligned = {i: i for i in range(n)}
    if change.positions == "all":
        return [*aligned.items(), *((n + i, len(other) + i) for i in range(n_tail))]
    spans = {"last": [n - 1], "differing": range(before, end_of_differing)}
    positions = spans.get(change.positions, [change.positions])  # or one position
    return [(i, aligned[i]) for i in positions if i in aligned]


def edited_score(
    model: Any,
    tokenizer: Any,
    change: Any,  # has kind, op, positions and factor
    texts: Sequence[str],
    targets: Sequence[str],
    layer: int,
    index: int,
    mean: Tensor | None = None,  # where the op is mean
) -> float:
    """The score of the first of two texts, whose partner is the other, with a component edited."""
    other = prompt_ids(tokenizer, texts[1])
    span = span_of(model, layer, change.kind, index)

    def edit(ids: list[int], tail: list[int]) -> AbstractContextManager[None]:
        places = edited_tokens(ids, other, len(tail), change)
        if change.op == "patch":
            partner = input_of(model, other + tail, layer, change.kind)

        def replace(x: Tensor) -> Tensor:
            y = x.clone()
            for place, partner_place in places:
                value = (change.factor or 0) * x[0, place] if mean is None else mean
                if change.op == "patch":
                    value = partner[partner_place]
                y[0, place, span] = value[span]
            return y

        return hooked(module_of(model, layer, change.kind), replace)

    return suppression_score(model, tokenizer, texts[0], targets, edit)

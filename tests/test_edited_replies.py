"""Replies under edits of some tokens: made while the prompt is read, as a plain loop makes them."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared
from conftest import finish, read, user_text

pytestmark = pytest.mark.usefixtures("coarse_figures")
N_TOKENS = 5
ARCHITECTURES = ("llama", "qwen3", "mistral", "gpt2")
# of each the component, the op, the positions, and the prompts that are edited
EDITS = {
    "patch a stream": ("L1resid", "patch", "all", "a"),
    "patch the last stream": ("L2resid", "patch", "last", "a"),
    "patch into b": ("L1resid", "patch", "all", "b"),
    "patch a head": ("L0H2", "patch", "all", "a"),
    "zero the last attention": ("L1attn", "zero", "last", "ab"),
    "mean of the last MLP": ("L1mlp", "mean", "last", "ab"),
    "scale where prompts differ": ("L1resid", "scale", "differing", "a"),
    "scale a neuron": ("L1N7", "scale", "differing", "ab"),
}
FACTOR = -9.0
Replies = dict[tuple[str, str], str]  # by sample and side


@functools.cache
def loaded(folder: str) -> tuple[Any, Any]:
    return naive.load(folder)


def plain_reply(folder: str, ids: list[int], edited: Callable[[], Any]) -> str:
    """A loop of full forwards, the prompt's tokens edited in each."""
    with edited():
        return naive.reply_text(*loaded(folder), ids, N_TOKENS)


def editing_prompt(
    folder: str, component: tracing.Component, change: Any, ids: list[int], other: list[int]
) -> Callable[[], Any]:
    """The plain hook that edits the tokens of a prompt, but not what comes after it."""
    model, _ = loaded(folder)
    kind = component.kind
    span = naive.span_of(model, component.layer, kind, component.index)
    module = naive.module_of(model, component.layer, kind)
    places = naive.edited_tokens(ids, other, 0, change)
    partner = naive.input_of(model, other, component.layer, kind)

    def edit(x: Tensor) -> Tensor:
        y = x.clone()
        for place, partner_place in places:
            value = FACTOR * x[0, place] if change.op == "scale" else torch.zeros_like(x[0, place])
            if change.op == "patch":
                value = partner[partner_place]
            if change.op == "mean":
                value = change.mean
            y[0, place, span] = value[span]
        return y

    return lambda: naive.hooked(module, edit)


def said(experiment: Any, joint_set: tracing.JointSet, make_edits: Any = None) -> Replies:
    """The replies to prompts a and b of all samples, in one batch."""
    request = tracing.ReplyRequest(joint_set, experiment.prompts)
    make_edits = make_edits or functools.partial(tracing.set_edits, experiment)
    edited_prompts = list(tracing.edit_prompts(experiment, request, make_edits))
    replies = tracing.greedy_replies(experiment, edited_prompts, N_TOKENS)
    texts = {}
    for (prompt, _), reply in zip(edited_prompts, replies, strict=True):
        texts[prompt.sample.sample_id, prompt.side] = reply.text
    return texts


def prompts_of(experiment: Any) -> Iterator[tuple[tuple[str, str], list[int], list[int]]]:
    """Sample and side, tokens and the partner's tokens of each prompt."""
    for pair in experiment.prompts:
        for prompt, other in itertools.permutations(pair[:2]):
            yield (prompt.sample.sample_id, prompt.side), list(prompt.ids), list(other.ids)


# ----- equal token for token to a plain loop


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replies_under_edits_of_prompt_tokens_are_those_of_a_plain_loop(
    architecture: str, name: str, random_model: Callable[..., str]
) -> None:
    """In one batch with padding on the left; the reply's own tokens are not edited."""
    folder = random_model(architecture)
    label, op, positions, sides = EDITS[name]
    flags = ["--op", op, "--positions", positions, "--num_samples", "4"]
    flags += ["--factor", str(FACTOR)] if op == "scale" else []
    flags += ["--patch_into", sides] if op == "patch" else []
    experiment = prepared(folder, "joint", label, *flags)
    component = tracing.Component.parse(label)
    change = SimpleNamespace(op=op, positions=positions)
    if op == "mean":
        users = [user_text(pair[1].text) for pair in experiment.prompts]
        change.mean = naive.mean_of(*loaded(folder), users, component.layer, component.kind)
    replies = said(experiment, tracing.JointSet("named", (component,)))
    assert len({len(ids) for _, ids, _ in prompts_of(experiment)}) > 1, "some are padded"
    n_changed = 0
    for key, ids, other in prompts_of(experiment):
        unedited = plain_reply(folder, ids, lambda: naive.hooked(loaded(folder)[0], None))
        edited = editing_prompt(folder, component, change, ids, other)
        is_edited = op != "patch" or key[1] in sides
        expected = plain_reply(folder, ids, edited) if is_edited else unedited
        assert replies[key] == expected, key
        n_changed += replies[key] != unedited
    assert n_changed > 0 or "neuron" in name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_token_of_a_prompt_is_edited_as_a_plain_loop_edits_it(
    architecture: str, random_model: Callable[..., str]
) -> None:
    folder = random_model(architecture)
    experiment = prepared(folder, "joint", "L1resid", "--positions", "last")
    module = naive.module_of(loaded(folder)[0], 1, "resid")
    edited_prompts, expected, unedited = [], [], []
    for prompt in itertools.chain(*experiment.prompts):
        for place in (3, len(prompt.ids) - 2):
            where = torch.arange(len(prompt.ids)) == place
            edit = tracing.Edit(tracing.Site(1, "resid"), slice(None), FACTOR, where=where)
            edits = tracing.ReplyEdits((edit,))
            edited_prompts.append(tracing.EditedPrompt(prompt, edits))
            factors = torch.where(where, FACTOR, 1.0)[:, None]  # of the prompt's tokens

            def scale(x: Tensor, factors: Tensor = factors) -> Tensor:
                y = x.clone()
                y[0, : len(factors)] *= factors
                return y

            hook = functools.partial(naive.hooked, module, scale)
            expected.append(plain_reply(folder, list(prompt.ids), hook))
            nothing = functools.partial(naive.hooked, module, None)
            unedited.append(plain_reply(folder, list(prompt.ids), nothing))
    replies = tracing.greedy_replies(experiment, edited_prompts, N_TOKENS)
    assert [reply.text for reply in replies] == expected
    assert expected != unedited


@contextmanager
def path_through(
    folder: str, ids: list[int], sender: tuple[int, slice], receiver: tuple[int, slice]
) -> Iterator[None]:
    """What a receiver gets from a zeroed sender while all other heads keep their clean values,
    written into the prompt's tokens, one plain hook each."""
    model, _ = loaded(folder)
    n_layers = len(naive.layers_of(model))
    clean = [naive.input_of(model, ids, layer, "attn") for layer in range(n_layers)]
    received: list[Tensor] = []

    def hold(x: Tensor, layer: int) -> Tensor:
        if layer == receiver[0]:
            received.append(x[0, :, receiver[1]].clone())
        y = x.clone()
        y[0] = clean[layer]
        return y

    changes = [(naive.module_of(model, sender[0], "attn"), naive.zero_slice(sender[1]))]
    for layer in range(sender[0] + 1, n_layers):
        module = naive.module_of(model, layer, "attn")
        changes.append((module, functools.partial(hold, layer=layer)))
    with torch.no_grad(), naive.all_hooked(changes):
        model(torch.tensor([ids]))

    def write(x: Tensor) -> Tensor:
        y = x.clone()
        y[0, : len(ids), receiver[1]] = received[0]
        return y

    with naive.hooked(naive.module_of(model, receiver[0], "attn"), write):
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_path_is_edited_while_the_prompt_is_read(
    architecture: str, random_model: Callable[..., str]
) -> None:
    folder = random_model(architecture)
    experiment = prepared(folder, "paths", "--layers", "0", "--num_samples", "4")
    sender, receiver = tracing.Component(0, "head", 1), tracing.Component(1, "head", 2)
    path = tracing.PathEdit(sender, (receiver,))
    attention = frozenset(tracing.Site(layer, "attn") for layer in range(3))
    model, _ = loaded(folder)
    spans = [naive.span_of(model, head.layer, "head", head.index) for head in (sender, receiver)]
    n_changed = 0
    (tree,) = experiment.plant_trees(experiment.prompts)
    clean_run = experiment.clean_run(tree, sites=attention)
    (edits,) = tracing.path_edits(experiment, "heads", clean_run, [path])
    edited_prompts = []
    for prompt, nodes in zip(tree.prompts, tree.paths, strict=True):
        reply_edits = tracing.ReplyEdits(tracing.edits_of_prompt(edits, nodes))
        edited_prompts.append(tracing.EditedPrompt(prompt, reply_edits))
    assert tracing.edits_of_reply(edits) == ()
    replies = tracing.greedy_replies(experiment, edited_prompts, N_TOKENS)
    for (prompt, _), reply in zip(edited_prompts, replies, strict=True):
        ids = list(prompt.ids)
        hook = functools.partial(path_through, folder, ids, (0, spans[0]), (1, spans[1]))
        assert reply.text == plain_reply(folder, ids, hook)
        n_changed += reply.text != plain_reply(folder, ids, lambda: naive.hooked(model, None))
    assert n_changed > 0


def test_of_a_direct_path_nothing_goes_on_in_the_reply(llama: str) -> None:
    """The sender is edited at every token, but what is held beside it is of the prompt's tokens."""
    experiment = prepared(llama, "paths", "--layers", "0")
    (tree,) = experiment.plant_trees(experiment.prompts)
    sites = frozenset(tracing.Site(layer, "attn") for layer in range(3))
    clean_run = experiment.clean_run(tree, sites=sites)
    path = tracing.PathEdit(tracing.Component(0, "head", 1), ())
    (edits,) = tracing.path_edits(experiment, "heads", clean_run, [path])
    assert any(tracing.is_of_every_token(edit) for edit in edits)
    assert tracing.edits_of_reply(edits) == ()


# ----- where nothing is changed, the replies are the unedited ones


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_that_changes_nothing_gives_the_unedited_strings(
    architecture: str, random_model: Callable[..., str]
) -> None:
    """A prompt patched from itself, each token times 1, and a set times 1."""
    experiment = prepared(random_model(architecture), "joint", "L0H1,L1mlp", "--num_samples", "4")
    unedited = said(experiment, tracing.JointSet("none"))
    assert len(set(unedited.values())) > 1
    sites = [tracing.Site(1, "resid"), tracing.Site(1, "attn")]

    def patch_from_itself(clean_run: Any, _: Any) -> list[tracing.Edits]:
        n_tokens = clean_run.tree.n_tokens
        where = torch.ones(n_tokens, dtype=torch.bool)
        clean_run = tracing.run_clean(experiment.traced, clean_run.tree, (), (), sites)
        edits = []
        for site in sites:
            source = clean_run.activations[site]
            edits.append(tracing.Edit(site, slice(None), 0.0, source, where))
        return [tuple(edits)]

    def times_one(clean_run: Any, _: Any) -> list[tracing.Edits]:
        where = torch.ones(clean_run.tree.n_tokens, dtype=torch.bool)
        return [tuple(tracing.Edit(site, slice(None), 1.0, where=where) for site in sites)]

    assert said(experiment, tracing.JointSet("named"), patch_from_itself) == unedited
    assert said(experiment, tracing.JointSet("named"), times_one) == unedited
    components = experiment.options.names.components
    for steer_at in tracing.STEERED_TOKENS:
        scaled = tracing.JointSet("circuit", components, multiplier=1.0, steer_at=steer_at)
        assert said(experiment, scaled) == unedited


# ----- where sets are scaled


@contextmanager
def scaled_at(
    folder: str, n_prompt: int, steer_at: str, factor: float, labels: Sequence[str]
) -> Iterator[None]:
    """Components times a factor at the tokens of the prompt, or at its last and the reply's."""
    model, _ = loaded(folder)
    tokens = {"all": slice(None), "prompt": slice(n_prompt), "reply": slice(n_prompt - 1, None)}

    def scale(x: Tensor, span: slice) -> Tensor:
        y = x.clone()
        y[:, tokens[steer_at], span] *= factor
        return y

    changes = []
    for component in map(tracing.Component.parse, labels):
        place = component.layer, component.kind
        span = naive.span_of(model, *place, component.index)
        changes.append((naive.module_of(model, *place), functools.partial(scale, span=span)))
    with naive.all_hooked(changes):
        yield


@pytest.mark.parametrize("steer_at", tracing.STEERED_TOKENS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_set_is_scaled_at_the_tokens_that_are_asked_for(
    architecture: str, steer_at: str, random_model: Callable[..., str]
) -> None:
    folder, labels = random_model(architecture), ["L0H1", "L1mlp"]
    experiment = prepared(folder, "joint", ",".join(labels), "--num_samples", "4")
    components = experiment.options.names.components
    scaled = tracing.JointSet("circuit", components, multiplier=FACTOR, steer_at=steer_at)
    replies, unedited = said(experiment, scaled), said(experiment, tracing.JointSet("none"))
    for key, ids, _ in prompts_of(experiment):
        hook = functools.partial(scaled_at, folder, len(ids), steer_at, FACTOR, labels)
        assert replies[key] == plain_reply(folder, ids, hook)
    assert replies != unedited


@pytest.mark.parametrize("steer_at", tracing.STEERED_TOKENS)
def test_scores_and_divergences_of_a_scaled_set_edit_forms_and_replies_as_a_reply_is_edited(
    steer_at: str, llama: str, tmp_path: Path
) -> None:
    labels, (model, tokenizer) = ["L0H1", "L1mlp"], loaded(llama)
    words = f"joint {','.join(labels)} --num_samples 2 --num_random 1 --max_new_tokens 4"
    words += f" --multipliers {FACTOR} --steer_at {steer_at} --random_replies 0"
    folder = finish(llama, tmp_path, *words.split())
    rows = read(folder, "circuit_steer.csv").set_index("side")
    assert rows["tokens"].tolist() == [steer_at] * 2
    scores: dict[str, list[float]] = {"a": [], "b": []}
    divergences: dict[str, list[float]] = {"a": [], "b": []}
    for sample_id, users in by_hand.texts(folder).items():
        for side, user in users.items():
            ids = naive.prompt_ids(tokenizer, user)
            edit = functools.partial(scaled_at, llama, len(ids), steer_at, FACTOR, labels)
            targets = by_hand.targets_of(folder)[sample_id]
            score = naive.suppression_score(
                model, tokenizer, user, targets, lambda _, __, edit=edit: edit()
            )
            scores[side].append(score)
            reply = naive.whole_reply(model, tokenizer, ids, 4)
            divergences[side].append(by_hand.divergence_along(model, ids, reply, edit))
    mean_delta = statistics.fmean(scores["a"]) - statistics.fmean(scores["b"])
    for side in "ab":
        assert rows.loc[side, "mean_delta"] == pytest.approx(mean_delta, abs=1e-4)
        expected = statistics.fmean(divergences[side])
        assert rows.loc[side, "kl_reply"] == pytest.approx(expected, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("positions", ["last", "differing"])
def test_the_divergence_along_replies_is_of_edits_of_the_prompt_alone(
    positions: str, llama: str, tmp_path: Path
) -> None:
    words = f"joint L1attn --positions {positions} --task refusal --num_samples 2 --num_random 1"
    folder = finish(llama, tmp_path, *words.split(), "--max_new_tokens", "4")
    (model, tokenizer), component = loaded(llama), tracing.Component(1, "attn")
    change = SimpleNamespace(op="zero", positions=positions)
    divergences = []
    for users in by_hand.texts(folder).values():
        ids, other = (naive.prompt_ids(tokenizer, users[side]) for side in "ba")
        edited = editing_prompt(llama, component, change, ids, other)
        reply = naive.whole_reply(model, tokenizer, ids, 4)
        divergences.append(by_hand.divergence_along(model, ids, reply, edited))
    rows = read(folder, "circuit_joint.csv").set_index("set")
    expected = statistics.fmean(divergences)
    assert expected > 1e-4
    assert rows.loc["named", "kl_reply"] == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_replies_leave_no_hook_behind_even_where_generation_fails(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = prepared(llama, "joint", "L0H1", "--op", "patch")
    before = tracing.count_hooks(experiment.traced)
    said(experiment, tracing.JointSet("named", experiment.options.names.components))
    assert tracing.count_hooks(experiment.traced) == before
    forward, calls = experiment.traced.model.forward, itertools.count()

    def fail_at_third(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("stops in the middle")
        return forward(*args, **kwargs)

    monkeypatch.setattr(experiment.traced.model, "forward", fail_at_third)
    with pytest.raises(RuntimeError, match="in the middle"):
        said(experiment, tracing.JointSet("none"))
    assert tracing.count_hooks(experiment.traced) == before
    assert not experiment.traced.model._forward_hooks


def test_a_model_that_reads_its_prompt_again_has_no_replies_under_edits(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = prepared(llama, "joint", "L0H1", "--op", "patch")
    config = functools.partial(tracing.GenerationConfig, use_cache=False)
    monkeypatch.setattr(tracing, "GenerationConfig", config)
    with pytest.raises(tracing.RunError, match="reads its prompts again"):
        said(experiment, tracing.JointSet("named", experiment.options.names.components))
    assert said(experiment, tracing.JointSet("none")), "nothing is edited in its prompts alone"

"""What components read and write: attention, roles, contributions, lens, against plain forwards."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import by_hand
import llama3_circuit_tracing as tracing
import naive
import random_models
from conftest import Answer, command_line, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import Component, Prompt, Site, Tree
from test_interventions import SAMPLES, UNEQUAL, Bench, bench

CLOSE = 1e-5
FAMILIES = [*random_models.ARCHITECTURES, "gpt2", "gpt_neox", "gemma2", "mixtral", "tiny"]
TWO = ["--num_samples", "2", "--no-bf16"]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("coarse_figures")


def with_biases(model: Any) -> None:
    """Norms and biases of a random model that are not ones and zeros, so that it matters which of
    them are taken in."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.3 * noise if "bias" not in name else noise


@pytest.fixture(scope="module", params=FAMILIES)
def any_bench(request: Any, folder_of: Callable[[str], str]) -> Bench:
    """A model of its own: those of `bench` are shared by all tests."""
    folder = folder_of(request.param)
    model, tokenizer = naive.load(folder)
    if request.param != "tiny":
        with_biases(model)
    traced = tracing.TracedModel(model, tracing.shape_of(model, torch.float32), 64)
    return Bench(folder, (model, tokenizer), traced)


@pytest.fixture(scope="module")
def tiny(folder_of: Callable[[str], str]) -> Bench:
    return bench(folder_of("tiny"))


def inspecting(
    model: Bench, words: str, records: Sequence[dict[str, Any]] = SAMPLES
) -> tuple[tracing.Experiment[Any], tracing.Subjects, Tree]:
    """An experiment on some samples with the loaded model, what it inspects, and its tree."""
    samples = write_samples(Path(model.folder, "inspected.jsonl"), *records)
    options = ["--no-bf16", "--samples", samples, "--num_samples", str(len(records))]
    experiment = by_hand.prepared(model.folder, "inspect", *words.split(), *options)
    experiment.traced = model.traced
    pairs = [tracing.prompts_a_and_b([prompts]) for prompts in experiment.prompts]
    unedited = tracing.unedited_options(experiment.options)
    (tree,) = tracing.plant_trees(pairs, experiment.bos, unedited, apart=True)
    return experiment, tracing.choose_subjects(experiment), tree


def all_queries(tree: Tree) -> Tensor:
    return torch.arange(tree.n_tokens)


def ids_of(prompt: Prompt) -> Tensor:
    return torch.tensor([prompt.ids])


# ----- attention


def eager_attentions(model: Bench, ids: Tensor) -> list[Tensor]:
    """The library's own maps [head, tok, tok], from a second model that is loaded for them."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=torch.float32, attn_implementation="eager"
    )
    loaded.load_state_dict(model.loaded[0].state_dict())
    with torch.no_grad():
        output = loaded.eval()(ids, output_attentions=True, use_cache=False)
    return [weights[0] for weights in output.attentions]


def test_weights_are_those_of_the_librarys_eager_attention(any_bench: Bench) -> None:
    _, _, tree = inspecting(any_bench, "L0H0")
    run = tracing.attention_from(any_bench.traced, tree, (), all_queries(tree))
    assert run is not None
    weights = run.weights
    for prompt, path in zip(tree.prompts, tree.paths, strict=True):
        expected = torch.stack(eager_attentions(any_bench, ids_of(prompt)))
        assert (weights[:, :, path][..., path] - expected).abs().max() < CLOSE
        assert (weights[:, :, path].sum(-1) - 1).abs().max() < CLOSE  # to no other node


def test_weights_times_values_are_what_heads_give(any_bench: Bench) -> None:
    """Gemma 2 has a cap on attention scores that other attention than eager may leave out."""
    traced = any_bench.traced
    _, _, tree = inspecting(any_bench, "L0H0")
    sites = [Site(layer, "attn") for layer in range(traced.shape.n_layers)]
    is_capped = traced.shape.name.startswith("Gemma2")
    with tracing.eager_attention(traced) if is_capped else contextlib.nullcontext():
        clean_run = tracing.run_clean(traced, tree, (), (), sites)
    run = tracing.attention_from(traced, tree, (), all_queries(tree))
    assert run is not None
    for site in sites:
        values = clean_run.keys_and_values[site.layer][1][0]  # [kv head, tok, d_head]
        values = values.repeat_interleave(traced.shape.n_heads // len(values), 0)
        mixed = (run.weights[site.layer] @ values).transpose(0, 1).flatten(1)
        scale = clean_run.activations[site].abs().max()
        assert (mixed - clean_run.activations[site]).abs().max() < CLOSE * scale


def test_reading_attention_leaves_nothing_behind(any_bench: Bench) -> None:
    traced = any_bench.traced
    _, _, tree = inspecting(any_bench, "L0H0")
    before = traced.model(ids_of(tree.prompts[0])).logits
    implementation = traced.model.config._attn_implementation
    tracing.attention_from(traced, tree, (), torch.tensor([3]))
    with pytest.raises(ZeroDivisionError), tracing.recording_attention(traced, lambda *_: 1 / 0):
        traced.model(ids_of(tree.prompts[0]))
    for module in traced.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert traced.model.config._attn_implementation == implementation
    assert torch.equal(traced.model(ids_of(tree.prompts[0])).logits, before)


def test_a_model_that_returns_no_weights_is_told_and_not_read(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, subjects, tree = inspecting(tiny, "L0H0")
    monkeypatch.setattr(type(tiny.traced.model), "set_attn_implementation", lambda *_: None)
    assert tracing.attention_from(tiny.traced, tree, (), all_queries(tree)) is None
    contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
    clean_run = tracing.clean_run_to_read(experiment, subjects, tree)
    (warning,) = tracing.read_attention(experiment, subjects, clean_run, contents)
    assert "its attention returns no weights" in warning


def test_another_attention_than_the_measured_one_is_warned_of(tiny: Bench) -> None:
    _, _, tree = inspecting(tiny, "L0H0")
    clean_run = tracing.run_clean(tiny.traced, tree, ())
    run = tracing.attention_from(tiny.traced, tree, (), all_queries(tree))
    assert run is not None
    assert tracing.why_not_of_measured_run(tiny.traced, run, clean_run) == ""
    other = run._replace(log_probs=run.log_probs + 0.01)
    assert "by 0.01 nats" in tracing.why_not_of_measured_run(tiny.traced, other, clean_run)


def output_weight(model: Bench, layer: int, kind: str) -> Tensor:
    """[d_model, width] of an output projection; GPT-2's are transposed."""
    module = naive.module_of(model.loaded[0], layer, kind)
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def test_the_length_of_what_a_token_makes_a_head_write(any_bench: Bench) -> None:
    model, traced = any_bench.loaded[0], any_bench.traced
    _, _, tree = inspecting(any_bench, "L0H0")
    clean_run = tracing.run_clean(traced, tree, ())
    for layer, index in ((0, 1), (1, 3)):
        head = Component(layer, "head", index)
        lengths = tracing.written_by_token(traced, clean_run, head)
        assert lengths is not None
        values = clean_run.keys_and_values[layer][1][0]
        value = values[index // (traced.shape.n_heads // len(values))]
        matrix = output_weight(any_bench, layer, "head")
        matrix = matrix[:, naive.span_of(model, layer, "head", index)]
        expected = (value @ matrix.T).norm(dim=-1)
        assert (lengths - expected).abs().max() < CLOSE * expected.max()


def weights_to(offset: int, n_tokens: int) -> Tensor:
    """[head 1, query, tok] that give everything to the token so many places before."""
    weights = torch.zeros(1, n_tokens, n_tokens)
    for query in range(n_tokens):
        weights[0, query, max(query - offset, 0)] = 1
    return weights


@pytest.mark.parametrize(
    ("offset", "pattern"),
    [(1, "previous_token"), (4, "induction"), (5, "duplicate_token"), (99, "bos")],
)
def test_a_pattern_has_score_1_and_all_others_0(offset: int, pattern: str) -> None:
    scores = tracing.pattern_scores(weights_to(offset, 11), 5)[:, 0].tolist()
    expected = [float(name == pattern) for name in tracing.PATTERNS]
    assert scores == expected


def test_patterns_are_means_over_sequences_of_random_tokens_twice(tiny: Bench) -> None:
    experiment, _, _ = inspecting(tiny, "L0H0")
    sequences = tracing.repeated_sequences(experiment)
    special = set(experiment.encoder.control_tokens)
    assert len({tuple(ids) for ids in sequences}) == tracing.N_SEQUENCES
    expected = torch.zeros(tiny.traced.shape.n_layers, 4, tiny.traced.shape.n_heads)
    for ids in sequences:
        bos, *tokens = ids
        n_repeated = len(tokens) // 2
        assert bos == experiment.encoder.tokenizer.bos_token_id
        assert tokens[:n_repeated] == tokens[n_repeated:]
        assert len({*tokens}) == n_repeated and special.isdisjoint(tokens)
        for layer, weights in enumerate(eager_attentions(tiny, torch.tensor([ids]))):
            for head in range(len(weights)):
                for place in range(1 + n_repeated, len(ids)):
                    row = weights[head, place]
                    read = [row[place - 1], row[place - n_repeated + 1], row[place - n_repeated]]
                    read.append(row[0])
                    expected[layer, :, head] += torch.stack(read) / n_repeated
    with tracing.progress_bar(1, "", speaks=False) as bar:
        scores = torch.tensor(tracing.measure_patterns(experiment, bar))
    assert (scores - expected / tracing.N_SEQUENCES).abs().max() < CLOSE


# ----- roles


def roles_of(experiment: tracing.Experiment[Any], prompt: Prompt) -> list[tuple[str, str]]:
    """(role, text) of runs of tokens with one role."""
    by_side = {other.side: other for other in experiment.prompts[0]}
    partner = by_side.get(tracing.partner_side(prompt.side))
    roles = tracing.token_roles(experiment.encoder, experiment.task, prompt, partner)
    assert len(roles) == len(prompt.ids)
    runs: list[tuple[str, str]] = []
    for role, token in zip(roles, prompt.ids, strict=True):
        text = experiment.encoder.tokenizer.decode([token])
        if runs and runs[-1][0] == role:
            runs[-1] = (role, runs[-1][1] + text)
        else:
            runs.append((role, text))
    return runs


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def test_roles_of_a_prompt_that_forbids(tiny: Bench) -> None:
    experiment, _, _ = inspecting(tiny, "L0H0", [UNEQUAL])
    prompt_a, prompt_b = experiment.prompts[0]
    start = [
        ("BOS", "<|begin_of_text|>"),
        ("template", HEADER.format("system")),
        ("system", "You are an assistant."),
        ("template", "<|eot_id|>" + HEADER.format("user")),
    ]
    # the last token of the reply's header is the one that scores
    end = [
        ("template", "<|eot_id|>" + HEADER.format("assistant").removesuffix("\n\n")),
        ("last token", "\n\n"),
    ]
    assert roles_of(experiment, prompt_a) == [
        *start,
        ("instruction", "Don't mention"),
        ("forbidden word (first token)", " apple"),
        ("instruction", "."),
        ("rest of the text", " Name a fruit."),
        *end,
    ]
    assert roles_of(experiment, prompt_b) == [*start, ("rest of the text", "Name a fruit."), *end]


def test_roles_of_a_word_of_several_tokens_and_of_what_differs(tiny: Bench) -> None:
    record = {
        "prompt_a": "When Zuzanna and Tom met, Tom gave it to",
        "prompt_b": "When Zuzanna and Tom met, Anna gave it to",
        "targets": ["Zuzanna"],
        "foils": ["Tom"],
    }
    experiment, _, _ = inspecting(tiny, "L0H0 --task contrast --no_chat", [record])
    prompt_a, prompt_b = experiment.prompts[0]
    runs_a, runs_b = roles_of(experiment, prompt_a), roles_of(experiment, prompt_b)
    names_a = [role for role, _ in runs_a]
    assert names_a.count("target (first token)") == names_a.count("target (later tokens)") == 1
    text = "".join(text for role, text in runs_a if role.startswith("target"))
    assert text == " Zuzanna"
    assert [text for role, text in runs_a if role == "foil (first token)"] == [" Tom", " Tom"]
    assert "".join(text for role, text in runs_b if role == "differing text") == " Anna"
    assert runs_a[-1][0] == runs_b[-1][0] == "last token"
    assert runs_a[0] == ("BOS", "<|begin_of_text|>")


def test_roles_of_conversations_prefixes_and_one_prompt(tiny: Bench) -> None:
    turns = [("user", "Hello there."), ("assistant", "Hi."), ("user", "Name a fruit.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = {"messages": messages, "targets": ["apple"], "foils": ["pear"]}
    record["answer_prefix"] = "I say:"
    experiment, _, _ = inspecting(tiny, "L0H0 --task contrast", [record])
    ((prompt,),) = experiment.prompts
    texts: dict[str, str] = {}
    for role, text in roles_of(experiment, prompt):
        texts[role] = texts.get(role, "") + text
    assert texts["earlier turns"] == "Hello there.Hi."
    assert texts["rest of the text"] == "Name a fruit."
    assert texts["answer prefix"] + texts["last token"] == "I say:"


def test_words_that_only_begin_alike_are_none_and_capitals_are_seen(tiny: Bench) -> None:
    text = "Don't mention car. Car and car: a careful carpet is no car, oscar says."
    record = {"prompt_a": f"{text} Go.", "prompt_b": "Go.", "targets": ["car"]}
    experiment, _, _ = inspecting(tiny, "L0H0", [record])
    prompt = experiment.prompts[0][0]
    spans = tracing.word_spans(experiment.encoder, prompt)
    texts = tracing.token_texts(experiment.encoder, prompt.ids)
    assert "".join(texts) == prompt.text
    found = ["".join(texts[span.start : span.stop]) for span in spans]
    assert sorted(found) == [" Car", " car", " car", " car"]
    unspaced = ["\u6211", "\u559c\u6b22", "\u732b"]  # in scripts without spaces words touch
    assert tracing.is_whole_word(unspaced, 1, 2)


def test_tokens_keep_the_space_that_decoding_them_alone_drops() -> None:
    class Pieces:
        """As SentencePiece decodes: a text begins with no space."""

        def decode(self, ids: Sequence[int]) -> str:
            return "".join([" Do", " not", " say", "ing"][token] for token in ids).lstrip()

    encoder = tracing.PromptEncoder(Pieces(), "", "word")
    assert tracing.token_texts(encoder, [0, 1, 2, 3]) == ["Do", " not", " say", "ing"]


def test_what_is_zero_promotes_nothing(tiny: Bench) -> None:
    experiment, _, _ = inspecting(tiny, "L0H0")
    pushed = {"zero": torch.zeros(tiny.traced.shape.d_model), "one": torch.ones(128)}
    assert len(pushed["one"]) == tiny.traced.shape.d_model
    with tracing.progress_bar(1, "", speaks=False) as bar:
        rows = tracing.vocabulary_rows(experiment, pushed, bar)
    assert {row["label"] for row in rows} == {"one"}


@pytest.mark.parametrize("template", ["{} Don't mention apple.", "Well: {} Avoid apple, please."])
def test_an_instruction_may_stand_behind_or_around_the_text(template: str, tiny: Bench) -> None:
    record = {**UNEQUAL, "prompt_a": template.format("Name a fruit.")}
    experiment, _, _ = inspecting(tiny, "L0H0", [record])
    texts: dict[str, str] = {}
    for role, text in roles_of(experiment, experiment.prompts[0][0]):
        texts[role] = texts.get(role, "") + text
    before, behind = template.split("{}")
    rest = behind.replace(" apple", "").strip()
    assert texts["instruction"].split() == [*before.split(), *rest.split()]
    assert texts["rest of the text"].strip() == "Name a fruit."


def test_a_swapped_name_has_a_role_of_its_own(tiny_llama: str) -> None:
    experiment = by_hand.prepared(tiny_llama, "inspect", "L0H0", "--task", "odd_one_out")
    for prompt_a, prompt_b in experiment.prompts:
        for prompt, partner in ((prompt_a, prompt_b), (prompt_b, prompt_a)):
            roles = tracing.token_roles(experiment.encoder, experiment.task, prompt, partner)
            names = [role for role in roles if role.endswith("(first token)")]
            kinds = ["odd name", "kept name", "swapped name"]
            expected = kinds if prompt.side == "a" else kinds[:2]
            assert sorted(names) == sorted(f"{kind} (first token)" for kind in expected)


def test_a_tokenizer_that_tells_no_places_leaves_roles_of_words(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, _, _ = inspecting(tiny, "L0H0", [UNEQUAL])
    monkeypatch.setattr(type(experiment.encoder.tokenizer), "is_fast", False)
    names = {role for role, _ in roles_of(experiment, experiment.prompts[0][0])}
    words = {"BOS", "forbidden word (first token)", "last token"}
    assert names == {*words, "place unknown"}


# ----- contributions


def goal_directions(experiment: tracing.Experiment[Any], tree: Tree) -> list[Tensor]:
    """[d_model] of each prompt: the mean of its words' first tokens, less all tokens' mean."""
    matrix = experiment.traced.unembedding.weight.detach()
    directions = []
    for prompt in tree.prompts:
        total = torch.zeros(matrix.shape[1])
        for forms in prompt.target_forms:
            ids = torch.tensor([*prompt.ids])
            logits = experiment.traced.body(ids[None]).last_hidden_state[0, -1] @ matrix.T
            first = sorted({form[0] for form in forms})
            total += logits[first].softmax(-1) @ matrix[first] / len(prompt.target_forms)
        directions.append(total - matrix.mean(0))
    return directions


def plain_norm(norm: Any, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """What a norm multiplies by at x [d], its bias, and whether it centres before."""
    if isinstance(norm, nn.LayerNorm):
        scale = (x.var(correction=0) + norm.eps).rsqrt() * norm.weight
        return scale, norm.bias, True
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    gain = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    return (x.pow(2).mean() + eps).rsqrt() * gain, torch.zeros_like(x), False


def pass_norm(norm: Any, x: Tensor, part: Tensor) -> Tensor:
    """What a norm, at the scale that it has for x, makes of a part of x."""
    scale, _, centres = plain_norm(norm, x)
    return (part - part.mean() if centres else part) * scale


@torch.no_grad()
def terms_by_hand(model: Bench, ids: Tensor, direction: Tensor) -> dict[str, float]:
    """What each head and MLP adds to a goal, by the formula that everyone writes."""
    loaded = model.loaded[0]
    layers = naive.layers_of(loaded)
    final_norm = naive.first_of(
        loaded, ["model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"]
    )
    kinds = [kind for kind in ("attn", "mlp") if kind == "attn" or model.traced.shape.d_mlp]
    modules = {
        (n, kind): naive.module_of(loaded, n, kind) for n in range(len(layers)) for kind in kinds
    }
    with (
        tracing.recording(modules) as read,
        tracing.recording(modules, outputs=True) as made,
        tracing.recording({"final": final_norm}) as final,
    ):
        loaded(ids)
    last = final["final"][0, -1]
    terms = {}
    for layer, kind in modules:
        x = read[layer, kind][0, -1]
        weight = output_weight(model, layer, kind)
        n_slices = model.traced.shape.n_heads if kind == "attn" else 1
        for index in range(n_slices):
            label = f"L{layer}H{index}" if kind == "attn" else f"L{layer}mlp"
            width = len(x) // n_slices
            span = slice(index * width, (index + 1) * width)
            part = weight[:, span] @ x[span]
            post = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[kind]
            if hasattr(layers[layer], "post_feedforward_layernorm"):
                norm = getattr(layers[layer], post)
                part = pass_norm(norm, made[layer, kind][0, -1], part)
            terms[label] = float(pass_norm(final_norm, last, part) @ direction)
    return terms


def test_contributions_are_those_of_the_formula_and_add_up(any_bench: Bench) -> None:
    traced = any_bench.traced
    experiment, subjects, tree = inspecting(any_bench, "L0H0,L1attn")
    run = tracing.run_direct(traced, tree, ())
    directions = goal_directions(experiment, tree)
    found = tracing.direct_contributions(run, directions, subjects.components)
    for place, prompt in enumerate(tree.prompts):
        expected = terms_by_hand(any_bench, ids_of(prompt), directions[place])
        size = max(map(abs, expected.values()))
        assert len(expected) >= traced.shape.n_layers * traced.shape.n_heads
        for label, value in expected.items():
            assert float(found.terms[label][place]) == pytest.approx(value, abs=CLOSE * size)
        heads = [f"L1H{index}" for index in range(traced.shape.n_heads)]
        whole = sum(float(found.terms[label][place]) for label in heads)
        assert float(found.parts["L1attn"][place]) == pytest.approx(whole, abs=CLOSE * size)
        state = traced.body(ids_of(prompt)).last_hidden_state[0, -1].detach()
        assert float(found.goals[place]) == pytest.approx(
            float(state @ directions[place].detach()), abs=1e-4
        )
    assert found.error < 1e-5
    has_biases = isinstance(naive.module_of(any_bench.loaded[0], 0, "attn").bias, Tensor)
    assert ("biases" in found.terms) == has_biases
    assert ("position" in found.terms) == (traced.shape.name == "GPT2LMHeadModel")


def test_the_goal_is_that_of_the_graph(tiny: Bench) -> None:
    experiment, _, tree = inspecting(tiny, "L0H0")
    run = tracing.run_direct(tiny.traced, tree, ())
    goals = tracing.goals_of_prompts(experiment, run, [])
    for sample_prompts in experiment.prompts:
        place_a, place_b = (tree.prompts.index(prompt) for prompt in sample_prompts)
        direction = tracing.goal_direction(tiny.traced, goals[place_a])
        assert (direction - goal_directions(experiment, tree)[place_a]).abs().max() < 1e-5
        assert goals[place_b] == goals[place_a]  # that of a less b is of one goal


def test_positions_and_embeddings_of_gpt2_are_told_apart(folder_of: Callable[[str], str]) -> None:
    model = bench(folder_of("gpt2"))
    experiment, _, tree = inspecting(model, "L0H0")
    run = tracing.run_direct(model.traced, tree, ())
    directions = goal_directions(experiment, tree)
    found = tracing.direct_contributions(run, directions)
    body = model.loaded[0].transformer
    for place, prompt in enumerate(tree.prompts):
        with tracing.recording({"final": body.ln_f}) as final:
            model.loaded[0](ids_of(prompt))
        added = body.wpe.weight[len(prompt.ids) - 1].detach()
        part = pass_norm(body.ln_f, final["final"][0, -1].detach(), added)
        value = float((part @ directions[place]).detach())
        assert float(found.terms["position"][place]) == pytest.approx(value, abs=1e-4)


def test_what_is_left_out_of_the_sum_is_noticed(
    folder_of: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    folder = folder_of("gpt2")
    model, _ = naive.load(folder)
    with_biases(model)
    model.save_pretrained(tmp_path / "model")
    for path in Path(folder).glob("*token*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    for path in Path(folder).glob("chat_template*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    line = command_line(str(tmp_path / "model"), tmp_path / "run", "inspect", "L0H1", *TWO)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "bias_terms", lambda *_: [])
        assert tracing.main(line) == 0
    assert "contributions miss the goal by" in capsys.readouterr().out
    table = read(tmp_path / "run", "circuit_writes.csv")
    assert table["label"].tolist() == ["L0H1"] and "mean" not in table
    assert tracing.main([*line, "--overwrite"]) == 0
    writes = read(tmp_path / "run", "circuit_writes.csv").set_index("label")
    assert {"biases", "position", "embedding"} <= set(writes.index)


def test_what_a_component_promotes_is_what_its_output_adds_to_the_logits(any_bench: Bench) -> None:
    traced, loaded = any_bench.traced, any_bench.loaded[0]
    names = "L0H1,L1H2" if not traced.shape.d_mlp else "L0H1,L1H2,L1mlp,L1N3"
    _, subjects, tree = inspecting(any_bench, names)
    run = tracing.run_direct(traced, tree, ())
    final_norm = naive.first_of(
        loaded, ["model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"]
    )
    has_post = hasattr(naive.layers_of(loaded)[0], "post_feedforward_layernorm")
    for component in subjects.components:
        source, values = tracing.written_values(run, component)
        pushed = tracing.pushed_states(run, source, values)
        for place, prompt in enumerate(tree.prompts):
            module = naive.module_of(loaded, component.layer, component.kind)
            with (
                torch.no_grad(),
                tracing.recording({"read": module}) as read_there,
                tracing.recording({"made": module}, outputs=True) as made,
                tracing.recording({"final": final_norm}) as final,
            ):
                loaded(ids_of(prompt))
            span = naive.span_of(loaded, component.layer, component.kind, component.index)
            x = read_there["read"][0, -1][span]
            x = torch.ones(1) if component.kind == "neuron" else x
            part = output_weight(any_bench, component.layer, component.kind)[:, span] @ x
            if has_post:
                block = naive.layers_of(loaded)[component.layer]
                is_head = component.kind == "head"
                norm = (
                    block.post_attention_layernorm if is_head else block.post_feedforward_layernorm
                )
                part = pass_norm(norm, made["made"][0, -1], part)
            expected = pass_norm(final_norm, final["final"][0, -1], part)
            size = expected.abs().max()
            assert (pushed[place] - expected).abs().max() < 1e-4 * size
    state = pushed[0]
    logits = tracing.vocabulary_logits(traced, state)
    plain = state @ traced.unembedding.weight.T
    assert (logits - (plain - plain.mean())).abs().max() < 1e-4


# ----- the lens


def test_the_lens_is_the_models_own_head_on_the_stream(any_bench: Bench) -> None:
    loaded, traced = any_bench.loaded[0], any_bench.traced
    experiment, subjects, tree = inspecting(any_bench, "L0H0")
    clean_run = tracing.clean_run_to_read(experiment, subjects, tree)
    by_layer = tracing.lens_log_probs(traced, clean_run)
    final_norm = naive.first_of(
        loaded, ["model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"]
    )
    blocks = dict(enumerate(naive.layers_of(loaded)))
    cap = getattr(loaded.config, "final_logit_softcapping", None)
    assert len(by_layer) == len(blocks) + 1
    for place, prompt in enumerate(tree.prompts):
        (forms, *_) = prompt.target_forms
        ids = torch.tensor([[*prompt.ids, *forms[0]]])
        with torch.no_grad(), tracing.recording(blocks) as streams:
            loaded(ids)
            for layer in blocks:
                states = final_norm(streams[layer])
                logits = loaded.get_output_embeddings()(states)[0]
                if cap:
                    logits = cap * (logits / cap).tanh()
                steps = logits[len(prompt.ids) - 1 :].log_softmax(-1)
                expected = sum(float(steps[i, token]) for i, token in enumerate(forms[0]))
                entries = tree.entries[place][0][0]
                found = float(by_layer[layer][0, entries].sum())
                assert found == pytest.approx(expected, abs=1e-4)
    assert torch.equal(by_layer[-1], tracing.run_clean(traced, tree, ()).log_probs)


# ----- the command


@pytest.fixture(scope="module")
def traced_folder(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "run"
    finish(tiny_llama, folder)
    finish(tiny_llama, folder, "inspect")
    return folder


def test_without_names_the_strongest_of_the_trace_are_inspected(traced_folder: Path) -> None:
    heads = read(traced_folder, "circuit_heads.csv")
    clear = heads[heads["verdict"].isin(["contributes", "works against"])]
    expected = clear.sort_values("role", key=abs, ascending=False)["label"].head(10)
    told = record_of(traced_folder)["commands"]["inspect"]["findings"]
    headings = [entry["text"] for entry in told if entry["level"] == "heading"]
    assert [text for text in headings if text.startswith("L")] == list(expected)
    assert set(read(traced_folder, "circuit_attention.csv")["label"]) == set(expected)


def test_a_heads_weights_add_up_in_every_sample_and_on_the_mean(traced_folder: Path) -> None:
    rows = read(traced_folder, "circuit_attention.csv")
    sums = rows.groupby(["label", "sample_id", "side", "query"])[["weight", "n_tokens"]].sum()
    assert (sums["weight"] - 1).abs().max() < 1e-5
    tokens = {}
    for sample in record_of(traced_folder)["samples"]:
        for side, prompt in sample["prompts"].items():
            tokens[sample["sample_id"], side] = prompt["n_tokens"]
    for (_, sample_id, side, _), n_tokens in sums["n_tokens"].items():
        assert n_tokens == tokens[sample_id, side]
    reads = read(traced_folder, "circuit_reads.csv")
    means = reads.groupby(["label", "measure"])[["mean_a", "mean_b", "mean"]].sum()
    assert (means["mean_a"] - 1).abs().max() < 1e-5 and means["mean"].abs().max() < 1e-5


def test_means_by_role_are_those_of_the_rows(traced_folder: Path) -> None:
    """The 16 samples are as many sentences, so that a plain mean is the mean over sentences."""
    rows = read(traced_folder, "circuit_attention.csv")
    reads = read(traced_folder, "circuit_reads.csv").set_index(["label", "measure", "role"])
    for (label, role), of_role in rows.groupby(["label", "role"]):
        by_side = of_role.groupby("side")["weight"].sum() / 16  # 0 where a prompt has none
        found = reads.loc[(label, "weight", role)]
        mean_a, mean_b = by_side.get("a", 0.0), by_side.get("b", 0.0)
        assert found["mean_a"] == pytest.approx(mean_a)
        assert found["mean_b"] == pytest.approx(mean_b)
        assert found["mean"] == pytest.approx(mean_a - mean_b)
        assert found["a_low"] <= found["mean_a"] <= found["a_high"]
        assert found["n_sentences"] == 16


def test_terms_add_up_in_the_table_too(traced_folder: Path) -> None:
    writes = read(traced_folder, "circuit_writes.csv")
    shape = (4, 8)  # layers and heads of the bundled model
    assert writes["is_term"].sum() == shape[0] * (shape[1] + 1) + 1
    told = [entry["text"] for entry in findings_of(traced_folder)]
    (sentence,) = [text for text in told if "its largest terms" in text]
    total = writes.loc[writes["is_term"], "mean"].sum()
    assert f"the goal after a less that after b is {total:+.3f}" in sentence


def findings_of(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = record_of(folder)["commands"]["inspect"]["findings"]
    return found


def test_effects_are_those_of_the_trace_and_direct_ones_those_of_paths(
    traced_folder: Path, tiny_llama: str, tmp_path: Path
) -> None:
    writes = read(traced_folder, "circuit_writes.csv").set_index("label")
    heads = read(traced_folder, "circuit_heads.csv").set_index("label")
    inspected = writes["effect"].dropna().index
    folder = tmp_path / "paths"
    words = ["paths", "--senders", ",".join(inspected), "--freeze", "all"]
    paths = read(finish(tiny_llama, folder, *words), "circuit_paths.csv").set_index("sender")
    for label in inspected:
        row = writes.loc[label]
        assert row["effect"] == pytest.approx(heads.loc[label, "mean"], abs=1e-6)
        assert row["direct"] == pytest.approx(paths.loc[label, "mean"], abs=1e-6)
        assert row["mediated"] == pytest.approx(row["effect"] - row["direct"], abs=1e-9)
        for name in ("low", "high"):
            for column in ("effect", "direct"):
                table = heads if column == "effect" else paths
                expected = table.loc[label, f"ci_{name}"]
                assert row[f"{column}_{name}"] == pytest.approx(expected, abs=1e-5)
        share = paths.loc[label, "share_of_total"]
        assert row["direct_share"] == pytest.approx(share, abs=1e-5, nan_ok=True)


def test_removing_a_head_takes_from_the_goal_about_what_it_writes(traced_folder: Path) -> None:
    """To first order, and where log P follows the logits: the direct effect of the strongest."""
    writes = read(traced_folder, "circuit_writes.csv").dropna(subset="direct")
    strongest = writes.sort_values("direct", key=abs, ascending=False).head(3)
    assert (strongest["mean"] * strongest["direct"] < 0).all()


def test_a_second_run_reads_what_the_first_has_kept(
    traced_folder: Path, tiny_llama: str, no_weights: None
) -> None:
    before = {path.name: path.read_bytes() for path in traced_folder.glob("circuit_*.csv")}
    finish(tiny_llama, traced_folder, "inspect")
    after = {path.name: path.read_bytes() for path in traced_folder.glob("circuit_*.csv")}
    assert before == after


def test_the_strongest_head_of_the_bundled_model_reads_and_lowers_the_forbidden_words(
    traced_folder: Path, tiny: Bench
) -> None:
    """What the log says of it, by plain forwards of the samples' prompts."""
    model, tokenizer = tiny.loaded
    reads = read(traced_folder, "circuit_reads.csv").set_index(["label", "measure", "role"])
    writes = read(traced_folder, "circuit_writes.csv").set_index("label")
    clear = writes.dropna(subset="effect").sort_values("effect", ascending=False)
    head = Component.parse(clear.index[0])
    weights, moves = [], []
    for sample in record_of(traced_folder)["samples"]:
        ids = naive.prompt_ids(
            tokenizer,
            sample["prompts"]["a"]["text"]
            .split("user<|end_header_id|>\n\n")[1]
            .split("<|eot_id|>")[0],
        )
        attention = eager_attentions(tiny, torch.tensor([ids]))[head.layer][head.index, -1]
        words = {
            token
            for word in sample["targets"]
            for token in tokenizer.encode(f" {word}", add_special_tokens=False)
        }
        weights.append(sum(float(attention[n]) for n, token in enumerate(ids) if token in words))
        with torch.no_grad():
            base = model(torch.tensor([ids])).logits[0, -1]
            with naive.zeroed(model, [(head.layer, "head", head.index)]):
                edited = model(torch.tensor([ids])).logits[0, -1]
        first = [naive.form_ids(tokenizer, word)[0][0] for word in sample["targets"]]
        moves.append(float((edited - base)[first].mean() - (edited - base).mean()))
    roles = reads.loc[(head.label, "weight")]["mean_a"]
    of_words = roles[[role for role in roles.index if role.startswith("forbidden word")]].sum()
    assert of_words == pytest.approx(sum(weights) / len(weights), abs=1e-5)
    assert of_words > 0.5
    assert sum(moves) / len(moves) > 0 > writes.loc[head.label, "mean_a"]


def test_words_are_those_of_the_goal_and_their_ranks_are_counted(
    tiny: Bench, tiny_llama: str, tmp_path: Path
) -> None:
    """Targets less foils is what is added to the goal; ranks by a sort of all logits."""
    words = ["inspect", "L0H6,L2mlp", "--task", "odd_one_out", "--num_samples", "4"]
    folder = finish(tiny_llama, tmp_path / "run", *words)
    writes = read(folder, "circuit_writes.csv").set_index("label").loc[["L0H6", "L2mlp"]]
    logits = writes[["targets_logit", "foils_logit"]]
    assert logits.abs().min().min() > 1e-3
    difference = logits["targets_logit"] - logits["foils_logit"]
    assert difference.tolist() == pytest.approx(writes["mean_a"].tolist(), abs=1e-5)
    state = torch.randn(tiny.traced.shape.d_model)
    all_logits = tiny.traced.unembedding.weight.detach() @ state
    goal = {5: 0.25, 9: 0.75, 30: -1.0}
    found = tracing.logits_of_words(tiny.traced, state, goal)
    ordered = all_logits.argsort(descending=True).tolist()
    assert found["targets_rank"] == 1 + ordered.index(9)
    assert found["foils_rank"] == 1 + ordered.index(30)
    assert found["foils"] == pytest.approx(float(all_logits[30] - all_logits.mean()), abs=1e-4)
    both = 0.25 * all_logits[5] + 0.75 * all_logits[9] - all_logits.mean()
    assert found["targets"] == pytest.approx(float(both), abs=1e-4)


def test_samples_that_share_a_prompt_have_a_goal_each(tiny: Bench) -> None:
    """As questions do that forbid several words; in one tree they would be one node."""
    records = [
        UNEQUAL,
        {**UNEQUAL, "prompt_a": "Never say plum. Name a fruit.", "targets": ["plum"]},
    ]
    experiment, subjects, tree = inspecting(tiny, "L0H6", records)
    assert len({path[-1] for path in tree.paths}) == 4
    contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
    tracing.read_contributions(experiment, subjects, tree, contents, [])
    alone = []
    for record in records:
        own_experiment, _, own_tree = inspecting(tiny, "L0H6", [record])
        own: list[dict[str, Any]] = [{} for _ in own_tree.prompts]
        tracing.read_contributions(own_experiment, subjects, own_tree, own, [])
        alone += own
    assert alone[1]["goal"] != pytest.approx(alone[3]["goal"], abs=1e-3)
    for together, by_itself in zip(contents, alone, strict=True):
        assert together["terms"] == pytest.approx(by_itself["terms"], abs=1e-4)


def test_what_moves_is_half_the_sum_of_differences() -> None:
    weights, before = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.2, 0.5, 0.3]]])
    assert tracing.attention_moved(weights, before) == [[pytest.approx(0.3)]]


def test_given_tells_how_the_patterns_of_later_heads_change(
    tiny: Bench, tiny_llama: str, tmp_path: Path
) -> None:
    words = ["inspect", "L2H2,L3H1", "--given", "L0H6", *TWO]
    folder = finish(tiny_llama, tmp_path / "run", *words)
    rows = read(folder, "circuit_attention.csv")
    without = finish(tiny_llama, tmp_path / "plain", "inspect", "L2H2,L3H1", *TWO)
    plain = read(without, "circuit_attention.csv")
    assert rows["weight_before"].tolist() == pytest.approx(plain["weight"].tolist(), abs=1e-6)
    assert (rows["weight"] - rows["weight_before"]).abs().max() > 1e-3
    reads = read(folder, "circuit_reads.csv")
    changes = reads[reads["measure"] == "change_by_given"]
    assert changes.groupby("label")["mean_a"].sum().abs().max() < 1e-6
    told = [entry["text"] for entry in findings_of(folder) if "L0H6 is removed" in entry["text"]]
    assert len(told) == 5 and not any("attention of L0H6" in text for text in told)


def test_attention_from_the_words_that_differ(tiny: Bench) -> None:
    experiment, subjects, tree = inspecting(tiny, "L1H3 --query differing")
    contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
    clean_run = tracing.clean_run_to_read(experiment, subjects, tree)
    tracing.read_attention(experiment, subjects, clean_run, contents)
    for sample_prompts in experiment.prompts:
        for prompt, partner in (sample_prompts, sample_prompts[::-1]):
            place = tree.prompts.index(prompt)
            differing = [*tracing.differing_places(prompt.ids, partner.ids)]
            found = contents[place]["attention"]
            if not differing:
                assert list(found) == ["last"]
                continue
            weights = eager_attentions(tiny, ids_of(prompt))[1][3, differing].mean(0)
            assert found["differing"]["L1H3"] == pytest.approx(weights.tolist(), abs=CLOSE)


def test_neurons_are_told_with_the_tokens_that_move_them_most(
    tiny: Bench, tiny_llama: str, tmp_path: Path
) -> None:
    folder = finish(tiny_llama, tmp_path / "run", "inspect", "L1N3,L2mlp,L1attn", *TWO)
    table = read(folder, "circuit_vocabulary.csv")
    activating = table[table["list"] == "activating"]
    best: dict[int, float] = {}
    for sample in record_of(folder)["samples"]:
        for side in ("a", "b"):
            text = sample["prompts"][side]["text"]
            ids = tiny.loaded[1].encode(text, add_special_tokens=False)
            activation = naive.input_of(tiny.loaded[0], ids, 1, "neuron")[..., 3].flatten()
            for token, value in zip(ids, activation.tolist(), strict=True):
                if abs(value) > abs(best.get(token, 0.0)):
                    best[token] = value
    expected = sorted(best.values(), key=abs, reverse=True)[:10]
    assert activating["value"].tolist() == pytest.approx(expected, abs=1e-5)
    assert set(table["label"]) == {"L1N3", "L2mlp", "L1attn"}
    assert not (folder / "circuit_inspect.png").exists()
    writes = read(folder, "circuit_writes.csv").set_index("label")
    assert not writes.loc["L1N3", "is_term"] and writes.loc["L2mlp", "is_term"]


def test_directions_are_read_through_the_unembedding(
    tiny: Bench, tiny_llama: str, tmp_path: Path
) -> None:
    words = ["directions", "--task", "refusal", "--kind", "resid", "--op", "patch", "--layers", "2"]
    folder = finish(tiny_llama, tmp_path / "run", *words, "--num_samples", "6")
    path = folder / "directions.safetensors"
    finish(tiny_llama, folder, "inspect", "L0H6", "--directions", str(path), "--num_samples", "6")
    table = read(folder, "circuit_vocabulary.csv")
    of_direction = table[(table["label"] == "direction L2resid") & (table["list"] == "promoted")]
    directions = tracing.read_directions(path).vectors
    loaded = tiny.loaded[0]
    total = torch.zeros(loaded.config.hidden_size)
    prompts = [sample["prompts"]["a"]["text"] for sample in record_of(folder)["samples"]]
    for text in prompts:
        ids = torch.tensor([tiny.loaded[1].encode(text, add_special_tokens=False)])
        with torch.no_grad(), tracing.recording({"final": loaded.model.norm}) as final:
            loaded(ids)
        vector = directions[Component(2, "resid")].float()
        total += pass_norm(loaded.model.norm, final["final"][0, -1], vector) / len(prompts)
    logits = total @ loaded.lm_head.weight.T
    best = (logits - logits.mean()).topk(10)
    assert of_direction["token_id"].tolist() == best.indices.tolist()
    assert of_direction["value"].tolist() == pytest.approx(best.values.tolist(), rel=1e-4)


def test_one_prompt_is_inspected_without_b(tiny_llama: str, tmp_path: Path) -> None:
    words = ["--prompt", "Name a fruit.", "--target", "apple", "--foil", "pear"]
    folder = finish(tiny_llama, tmp_path / "run", "inspect", "L0H6,L1N3", *words)
    writes = read(folder, "circuit_writes.csv")
    assert writes["mean_b"].isna().all()
    assert writes["mean"].tolist() == writes["mean_a"].tolist()
    lens = read(folder, "circuit_lens.csv")
    assert set(lens["measure"]) == {"targets", "foils", "score"}
    page = (folder / "circuit_report.html").read_text()
    assert "nan" not in " ".join(entry["text"] for entry in findings_of(folder))
    assert "L0H6" in page and "promotes" in page


def test_the_lens_ends_where_the_model_does(traced_folder: Path) -> None:
    lens = read(traced_folder, "circuit_lens.csv")
    scores = lens[lens["measure"] == "score"].set_index("layer")
    deltas = [sample["delta_logit_base"] for sample in record_of(traced_folder)["samples"]]
    assert scores.index.tolist() == [0, 1, 2, 3, 4]
    assert scores.loc[4, "mean"] == pytest.approx(sum(deltas) / len(deltas))
    assert scores.loc[0, "mean"] == pytest.approx(0, abs=1e-6)  # the last token is the same


def test_samples_whose_words_begin_alike_are_told_and_left_out(
    tiny_llama: str, tmp_path: Path, capsys: Capture
) -> None:
    alike = {"prompt_a": "Say a.", "prompt_b": "Say b.", "targets": ["I can't"]}
    other = {**alike, "prompt_b": "Say c.", "foils": ["pear"]}
    samples = write_samples(tmp_path / "s.jsonl", {**alike, "foils": ["I cannot"]}, other)
    words = ["inspect", "L0H6", "--task", "contrast", "--samples", samples]
    folder = finish(tiny_llama, tmp_path / "run", *words)
    assert "targets and foils begin with the same tokens" in capsys.readouterr().out
    writes = read(folder, "circuit_writes.csv").set_index("label")
    assert writes.loc["L0H6", "n_sentences"] == 1
    assert math.isfinite(writes.loc["embedding", "mean"])


USAGE = {
    "resid": (["L1resid"], ["L1resid", "heads, neurons, attention and MLPs"]),
    "value": (["L1V0"], ["L1V0"]),
    "given": (["L1H0", "--given", "L1H0"], ["L1H0", "--given zeroes"]),
    "layer": (["L99H0"], ["L99H0"]),
    "sample": (["L1H0", "--sample", "nobody"], ["nobody", "s0000"]),
    "none": ([], ["inspect needs NAMES", "circuit_heads.csv"]),
    "directions": (["L1H0", "--directions", "nowhere.safetensors"], ["nowhere.safetensors"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_what_cannot_be_inspected(
    name: str, tiny_llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    words, says = USAGE[name]
    refuses(answer, *command_line(tiny_llama, tmp_path, "inspect", *words), says=says)


def test_a_trace_without_a_clear_component_is_no_list(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    folder = finish(tiny_llama, tmp_path, "--num_samples", "2", "--layers", "1", "--heads", "0-1")
    line = command_line(tiny_llama, folder, "inspect", "--num_samples", "2")
    refuses(answer, *line, says=["has the verdict 'contributes' or 'works against'"])


def test_a_dry_run_tells_the_edited_runs(
    tiny_llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    line = command_line(tiny_llama, tmp_path, "inspect", "L0H6,L2H2", "--dry_run", *TWO)
    code, out, _ = answer(*line)
    assert code == 0
    assert "2 components (L0H6 to L2H2) alone, and straight to the logits" in out


def test_attention_that_no_token_gets_has_a_role_of_its_own() -> None:
    tokens = pd.DataFrame({"role": ["BOS", "last token"], "n_tokens": 1, "weight": [0.2, 0.3]})
    tokens["weight_before"] = [0.6, 0.3]
    rows = tracing.with_sink(tokens, 1e-3)
    assert rows["role"].tolist() == ["BOS", "last token", "attention sink"]
    assert rows["n_tokens"].tolist() == [1, 1, 0]
    assert rows[["weight", "weight_before"]].sum().tolist() == pytest.approx([1.0, 1.0])
    assert len(tracing.with_sink(tokens, 0.6)) == 2  # rounding, where weights are that coarse
    weights, before = torch.tensor([[[0.2, 0.3]]]), torch.tensor([[[0.6, 0.3]]])
    assert tracing.attention_moved(weights, before) == [[pytest.approx(0.4)]]  # to the sink


def test_a_few_large_numbers_make_no_norm_subtract_the_mean() -> None:
    """Of real activations some are a thousand times as large as the others."""
    rms, layer = nn.RMSNorm(64, eps=1e-6), nn.LayerNorm(64)
    assert not tracing.subtracts_mean(rms, 64) and tracing.subtracts_mean(layer, 64)
    x = torch.randn(1, 3, 64)
    x[0, :, 5] = 3000.0
    direction, biases = torch.randn(64), []
    leaf = x.clone().requires_grad_()
    output = tracing.with_constant_scale(biases, rms, (leaf,), rms(leaf))
    (gradient,) = torch.autograd.grad((output[0, -1] * direction).sum(), leaf)
    scale, _, _ = plain_norm(rms, x[0, -1])
    expected = scale * direction
    assert (gradient[0, -1] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not biases and torch.allclose(output, rms(x))


def test_a_mixtures_mlp_adds_what_its_module_returns(folder_of: Callable[[str], str]) -> None:
    model = bench(folder_of("mixtral"))
    experiment, _, tree = inspecting(model, "L0H0")
    run = tracing.run_direct(model.traced, tree, ())
    directions = goal_directions(experiment, tree)
    found = tracing.direct_contributions(run, directions)
    body = model.loaded[0].model
    for place, prompt in enumerate(tree.prompts):
        names = ["mlp", "block_sparse_moe"]  # before transformers 5
        mlps = {n: naive.first_of(block, names) for n, block in enumerate(body.layers)}
        with (
            torch.no_grad(),
            tracing.recording(mlps, outputs=True) as made,
            tracing.recording({"final": body.norm}) as final,
        ):
            model.loaded[0](ids_of(prompt))
        for layer in mlps:
            part = pass_norm(body.norm, final["final"][0, -1], tracing.first_of(made[layer])[0, -1])
            value = float((part @ directions[place]).detach())
            assert float(found.terms[f"L{layer}mlp"][place]) == pytest.approx(value, abs=1e-4)


def test_weight_times_length_is_that_of_its_own_tokens(tiny: Bench) -> None:
    experiment, subjects, _ = inspecting(tiny, "L1H3", SAMPLES[:2])
    rows = attention_rows_of(experiment, subjects)
    value_head = 3 // (tiny.traced.shape.n_heads // tiny.traced.shape.n_value_heads)
    matrix = output_weight(tiny, 1, "head")[:, naive.span_of(tiny.loaded[0], 1, "head", 3)]
    for prompt in experiment.prompts[1]:
        with tracing.recording(
            {"v": naive.layers_of(tiny.loaded[0])[1].self_attn.v_proj}, True
        ) as v:
            tiny.loaded[0](ids_of(prompt))
        value = v["v"][0].unflatten(-1, (tiny.traced.shape.n_value_heads, -1))[:, value_head]
        lengths = (value @ matrix.T).norm(dim=-1).detach()
        weights = eager_attentions(tiny, ids_of(prompt))[1][3, -1]
        sample_id = prompt.sample.sample_id
        own = rows[(rows["sample_id"] == sample_id) & (rows["side"] == prompt.side)]
        total = float((weights * lengths).sum())
        assert own["weight_times_norm"].sum() == pytest.approx(total, rel=1e-4)


def attention_rows_of(
    experiment: tracing.Experiment[Any], subjects: tracing.Subjects
) -> pd.DataFrame:
    """What circuit_attention.csv would say, without a folder."""
    prompts = []
    for tree in tracing.trees_to_inspect(experiment):
        contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
        clean_run = tracing.clean_run_to_read(experiment, subjects, tree)
        tracing.read_attention(experiment, subjects, clean_run, contents)
        for prompt, content in zip(tree.prompts, contents, strict=True):
            prompts.append(tracing.InspectedPrompt(prompt, None, content))
    return tracing.attention_rows(experiment, tracing.Inspected([], prompts, {}, 0.0))


def test_negative_controls_are_in_no_mean(tiny: Bench) -> None:
    control = {**UNEQUAL, "prompt_a": "Don't mention plum. Name a fruit.", "targets": ["plum"]}
    records = [UNEQUAL, {**control, "group": tracing.NO_ODD_ONE}]
    experiment, subjects, tree = inspecting(tiny, "L0H6", records)
    contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
    found = tracing.read_contributions(experiment, subjects, tree, contents, [])
    alone, _, own_tree = inspecting(tiny, "L0H6", [UNEQUAL])
    own: list[dict[str, Any]] = [{} for _ in own_tree.prompts]
    expected = tracing.read_contributions(alone, subjects, own_tree, own, [])
    assert found["n_pushed"] == expected["n_pushed"] == 1
    assert found["pushed"]["L0H6"] == pytest.approx(expected["pushed"]["L0H6"], abs=1e-5)
    assert [len(content["words"]) for content in contents] == [1, 0, 0, 0]


def test_sentences_of_a_component() -> None:
    names = {"query": "last", "n_tokens_a": 2.0, "n_tokens_b": 0.0}
    ends = {
        "a_low": 0.5,
        "a_high": 0.75,
        "b_low": 0.0,
        "b_high": 0.0,
        "ci_low": 0.5,
        "ci_high": 0.75,
    }
    reads = pd.DataFrame(
        [
            {"measure": "weight", "role": "target", "mean_a": 0.6, "mean_b": 0.0, "mean": 0.6},
            {"measure": "weight", "role": "BOS", "mean_a": 0.4, "mean_b": 1.0, "mean": -0.4},
            {"measure": "share_of_lengths", "role": "target", "mean_a": 0.9, "mean_b": 0.0},
        ]
    ).assign(**names, **ends)
    (sentence,) = tracing.describe_reads(reads)
    assert sentence == (
        "reads, from the last token of prompt a: target 60% [50%, 75%] on 2, BOS 40% [50%, 75%] on"
        " 2 tokens; by weight times length of what each makes it write: target 90%; unlike prompt b"
        " most: target +60% [+50%, +75%], which b has not"
    )
    values = {"mean_a": 1.0, "mean_b": -2.0, "mean": 3.0, "a_low": 0.5, "a_high": 1.5}
    values |= {"b_low": -3.0, "b_high": -1.0, "ci_low": 2.0, "ci_high": 4.0}
    values |= {"targets_logit": 1.25, "targets_rank": 3.0, "foils_logit": 0.25, "foils_rank": 9.0}
    assert tracing.describe_writes(pd.Series(values), 50) == (
        "writes +1.000 [+0.500, +1.500] to the goal after a (targets +1.250, the likeliest at"
        " median rank 3 of 50; foils +0.250, the likeliest at median rank 9 of 50), -2.000 [-3.000,"
        " -1.000] after b: a - b +3.000 [+2.000, +4.000]"
    )
    rows = [("promoted", "up", 1.0), ("suppressed", "down", -1.0), ("activating", "here", -2.5)]
    table = pd.DataFrame(rows, columns=["list", "token", "value"]).assign(rank=1)
    assert tracing.describe_vocabulary(Component(1, "neuron", 3), table) == (
        "at activation 1 promotes 'up'; suppresses 'down'; its largest activations: 'here' -2.50"
    )


def test_the_figure_shades_the_tokens_of_each_prompt_by_its_own_weights(tiny: Bench) -> None:
    experiment, subjects, tree = inspecting(tiny, "L0H6", [UNEQUAL])
    contents: list[dict[str, Any]] = [{} for _ in tree.prompts]
    clean_run = tracing.clean_run_to_read(experiment, subjects, tree)
    tracing.read_attention(experiment, subjects, clean_run, contents)
    head = Component(0, "head", 6)
    entries = [
        tracing.InspectedPrompt(prompt, None, content)
        for prompt, content in zip(tree.prompts, contents, strict=True)
    ]
    weights = [eager_attentions(tiny, ids_of(prompt))[0][6, -1] for prompt in tree.prompts]
    bound = tracing.darkest_weight(head, entries)
    assert bound == pytest.approx(
        max(float(of_tokens[1:].max()) for of_tokens in weights), abs=1e-5
    )
    for entry, of_tokens in zip(entries, weights, strict=True):
        drawn = tracing.tokens_to_draw(experiment, head, entry, bound)
        assert "".join(token.text for token in drawn).replace("\u00b7", " ") == tracing.visible(
            entry.prompt.text
        )
        darkness = [token.darkness for token in drawn]
        assert darkness == pytest.approx((of_tokens / bound).clamp(max=1).tolist(), abs=1e-4)
        outlined = [token.text for token in drawn if token.is_scored]
        assert outlined == (["\u00b7apple"] if entry.prompt.side == "a" else [])


def test_long_prompts_are_drawn_at_both_ends() -> None:
    tokens = [tracing.DrawnToken(str(number).zfill(10), 0.0, False) for number in range(400)]
    lines = tracing.break_lines(tokens)
    assert len(lines) == tracing.MAX_TOKEN_LINES
    assert lines[0][0] == tokens[0] and lines[-1][-1] == tokens[-1]
    assert [token.text for line in lines for token in line].count("...") == 1
    assert len(tracing.break_lines(tokens[:100])) == 10


def test_intervals_of_shares_stay_within_their_bounds() -> None:
    ends = {"a_low": -0.2, "a_high": 1.3, "b_low": 0.1, "b_high": 0.4, "ci_low": -1.5, "ci_high": 2}
    rows = [{"measure": name, "mean_b": 0.2, **ends} for name in ("weight", "change_by_given")]
    share, change = tracing.within_bounds(pd.DataFrame(rows)).to_dict("records")
    assert (share["a_low"], share["a_high"], share["ci_low"], share["ci_high"]) == (0, 1, -1, 1)
    assert (change["a_low"], share["b_low"], share["b_high"]) == (-0.2, 0.1, 0.4)
    (alone,) = tracing.within_bounds(pd.DataFrame(rows[:1]).assign(mean_b=math.nan)).to_dict(
        "records"
    )
    assert alone["ci_low"] == 0


def test_parts_are_json_without_nan(traced_folder: Path) -> None:
    parts = list((traced_folder / ".parts").glob("inspect-*.json"))
    assert len(parts) >= 3
    for path in parts:
        _, content = path.read_text().split("\n", 1)
        json.loads(content, parse_constant=lambda name: pytest.fail(name))

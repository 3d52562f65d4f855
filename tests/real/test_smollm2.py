"""A real model, SmolLM2-135M-Instruct: its chat format, its numbers, its replies, its GGUF file."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared
from conftest import Answer, finish, read, record_of, refuses, write_samples
from real.fetch import GGUF, SMOLLM2

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (SMOLLM2.is_dir() and GGUF.is_file()),
        reason="python tests/real/fetch.py makes its folder",
    ),
]

MODEL = str(SMOLLM2)
EQUAL = 5e-5
START, END, NEWLINE = 1, 2, 198
BEFORE = [START, 9690, NEWLINE, 2683, 359, 354, 11173, 30, END, NEWLINE, START, 4093, NEWLINE]
HELIUM = [8084, 982, 3311, 25933, 30, 10181, 253, 2811, 30, 19842, 281, 582, 2229, 30]
AFTER = [END, NEWLINE, START, 520, 9531, NEWLINE]
# which of its components on how many samples; the neurons are the strongest two of 200
SWEPT = {
    "--layers 0,14,29 --heads 0,5": 2,
    "--kind mlp --layers 7": 1,
    "--kind neuron --layers 28 --neurons 45,138": 1,
}
FOUR = ["L0H8", "L1H0", "L16H0", "L0H7"]

Plain = tuple[Any, Any]  # a model and its tokenizer, as everyone loads them


@pytest.fixture(scope="module")
def plain() -> Plain:
    return naive.load(MODEL)


@pytest.fixture()
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the self-test, which takes longer than they do."""
    monkeypatch.setattr(tracing, "self_test", lambda experiment: [])


# ----- runs of the tokens that edits can change


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.usefixtures("untested")
def test_patches_of_the_reached_tokens_alone_are_those_of_all_tokens(
    positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--op", "patch", "--positions", positions, "--num_samples", "2"]
    words += ["--layers", "0,15,29", "--heads", "0-2"]
    reached = read(finish(MODEL, tmp_path / "reached", *words))
    monkeypatch.setattr(tracing, "reached_nodes", lambda *_: None)
    everything = read(finish(MODEL, tmp_path / "all", *words))
    difference = (reached["head_effect"] - everything["head_effect"]).abs().max()
    assert difference < EQUAL
    assert reached["head_effect"].abs().max() > 0.01


# ----- ChatML


def test_the_three_bos_of_a_chat_are_accepted_and_none_is_the_tokenizers_own() -> None:
    experiment = prepared(MODEL, "--num_samples", "16")
    assert experiment.encoder.tokenizer.bos_token_id == START
    assert experiment.encoder.bos is None
    for prompt in itertools.chain(*experiment.prompts):
        assert prompt.ids.count(START) == 3


def test_a_prompt_by_hand() -> None:
    prompt = prepared(MODEL).prompts[0][0]
    user = "Don't mention helium. Name a gas. Answer in one word."
    assert prompt.text == (
        "<|im_start|>system\nYou are an assistant.<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(prompt.ids) == BEFORE + HELIUM + AFTER
    assert prompt.forms == (((38082,), (11653, 1460)),)


# ----- words that are glued to what stands before them

QUESTION = "Shall we go out?\n(A) {}\n(B) {}\nAnswer: ("
GLUED = {  # prompts a and b, targets, foils: each word is one token or a few behind the bracket
    "letters": (QUESTION.format("Yes", "No"), QUESTION.format("No", "Yes"), ["A"], ["B"]),
    "years": (
        "The war went on from the year 1732 to the year 17",
        "The war went on from the year 1701 to the year 17",
        ["57", "78"],
        ["05", "12"],
    ),
}


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("name", GLUED)
def test_words_behind_a_bracket_or_digits_are_scored_as_a_plain_forward_has_them(
    name: str, plain: Plain, tmp_path: Path
) -> None:
    model, tokenizer = plain
    prompt_a, prompt_b, targets, foils = GLUED[name]
    record = {"prompt_a": prompt_a, "prompt_b": prompt_b, "targets": targets, "foils": foils}
    path = write_samples(tmp_path / "s.jsonl", record)
    flags = ["--task", "contrast", "--samples", path, "--no_chat", "--layers", "0", "--heads", "0"]
    (sample,) = record_of(finish(MODEL, tmp_path / "run", *flags))["samples"]
    assert not any("is scored" in flag for flag in sample["flags"])
    for side in ("a", "b"):
        prompt_ids = tokenizer(record[f"prompt_{side}"])["input_ids"]
        for word in (*targets, *foils):
            word_ids = tokenizer(word)["input_ids"]
            ids = [*prompt_ids, *word_ids]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(
                float(log_probs[place - 1, ids[place]])
                for place in range(len(prompt_ids), len(ids))
            )
            assert sample["prompts"][side]["log_probs"][word] == pytest.approx(expected, abs=1e-4)
    if name == "letters":
        assert sample["p_target"] > 0.3


@pytest.mark.usefixtures("untested")
def test_a_letter_with_a_space_where_none_belongs_is_an_error(
    plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """As it would be read without the rule for brackets."""
    monkeypatch.setattr(tracing, "opens_bracket_or_quote", lambda text: False)
    prompt_a, prompt_b, targets, foils = GLUED["letters"]
    record = {"prompt_a": prompt_a, "prompt_b": prompt_b, "targets": targets, "foils": foils}
    path = write_samples(tmp_path / "s.jsonl", record)
    flags = ["--task", "contrast", "--samples", path, "--no_chat", "--layers", "0", "--heads", "0"]
    words = ["--model_id", MODEL, "--output_dir", str(tmp_path / "run"), *flags]
    refuses(answer, *words, says=["line 1", "' A' is scored", "'A' has", "--target_form exact"])


# ----- numbers


def test_the_self_test_passes() -> None:
    assert tracing.main(["check", "--model_id", MODEL, "--num_samples", "1"]) == 0


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("flags", SWEPT)
def test_the_sweep_equals_the_naive_loop(flags: str, plain: Plain, tmp_path: Path) -> None:
    n, experiment = SWEPT[flags], prepared(MODEL, *flags.split())
    change = experiment.options
    samples = {s.sample_id: s for s in tracing.SUPPRESSION.build(n, random.Random(42), len)}
    table = read(finish(MODEL, tmp_path, "--num_samples", str(n), *flags.split()))
    indices = table["index"].fillna(-1).astype(int)
    swept = set(zip(table["sample_id"], table["layer"], indices, strict=True))
    components = tracing.choose_components(change, experiment.shape)
    assert len(swept) == len(table) == n * len(components)
    for row, index in zip(table.itertuples(), indices, strict=True):
        sample = samples[row.sample_id]
        texts, where = [sample.prompt_a, sample.prompt_b], (sample.targets, row.layer, index)
        a = naive.edited_score(*plain, change, texts, *where)
        b = naive.edited_score(*plain, change, texts[::-1], *where)
        assert row.delta_logit_head == pytest.approx(a - b, abs=EQUAL)
    for sample_id, bases in table.groupby("sample_id")["delta_logit_base"]:
        s = samples[sample_id]
        a, b = (naive.suppression_score(*plain, t, s.targets) for t in (s.prompt_a, s.prompt_b))
        assert bases.to_numpy() == pytest.approx(a - b, abs=EQUAL)
    assert table["head_effect"].abs().max() > 1000 * EQUAL


@pytest.mark.parametrize("flags", [flags for flags in SWEPT if "mlp" not in flags])
def test_a_gradient_is_the_slope_of_the_sweep(flags: str) -> None:
    """<dS/dx, x> against the scores with x scaled by 0.99 and 1.01."""
    words = [*flags.split(), "--op", "scale", "--factor", "2", "--method", "atp"]
    experiment = prepared(MODEL, *words)
    options, shape = experiment.options, experiment.shape
    components = tracing.choose_components(options, shape)
    (tree,) = tracing.plant_trees(experiment.prompts, experiment.bos, options, apart=True)
    estimates = tracing.estimate_tree(experiment, components, tree)  # [sample, component, side]
    clean_run = experiment.clean_run(tree, range(shape.n_layers))
    log_probs = []
    for component in components:
        for factor in (1.01, 0.99):
            edits = tracing.scaled_edits([component], shape, factor)
            log_probs.append(tracing.run_rows(experiment.traced, clean_run, [edits]))
    scores = tree.scores(torch.cat(log_probs), experiment.task)
    up, down = scores.unflatten(0, (-1, 2)).unbind(1)
    slopes = (up - down) / 0.02  # [component, prompt]
    for n, (_, places) in enumerate(tree.samples):
        for side, place in places.items():
            side_estimates = estimates[n, :, tracing.SIDES.index(side)]
            assert (side_estimates - slopes[:, place]).abs().max() < 0.01 * slopes.abs().max()
    assert slopes.abs().max() > 0.05


@pytest.mark.usefixtures("untested")
def test_a_forbidden_word_is_likelier_after_every_sentence_and_the_log_calls_it_rebound(
    tmp_path: Path,
) -> None:
    finish(MODEL, tmp_path, "--layers", "29", "--heads", "0")
    deltas = [sample["delta_logit_base"] for sample in record_of(tmp_path)["samples"]]
    assert len(deltas) == 16
    assert min(deltas) > 0
    assert sum(deltas) / 16 == pytest.approx(2.91, abs=0.01)
    text = (tmp_path / "run.log").read_text()
    assert text.count("has not the sign of suppression") == 16
    assert "L29H0: works against rebound" in text
    assert "suppression;" not in text


@pytest.mark.usefixtures("untested")
def test_the_gguf_file_gives_the_table_of_its_folder(tmp_path: Path) -> None:
    flags, tables, quantized = "--num_samples 1 --layers 28 --heads 0,5", [], []
    for model in (MODEL, str(GGUF)):
        folder = finish(model, tmp_path / Path(model).name, *flags.split())
        tables.append((folder / "circuit_results.csv").read_bytes())
        quantized.append(record_of(folder)["commands"]["trace"]["run"]["quantized"].lower())
    assert tables[0] == tables[1]
    assert quantized[0] == "no"
    assert "gguf" in quantized[1]


# ----- replies


@torch.no_grad()
def reply(plain: Plain, user: str) -> str:
    """Greedy, of one prompt alone."""
    model, tokenizer = plain
    ids = torch.tensor([naive.prompt_ids(tokenizer, user)])
    ends = {"eos_token_id": END, "pad_token_id": END}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, **ends)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_batched_replies_are_those_of_one_prompt_at_a_time(plain: Plain) -> None:
    experiment = prepared(MODEL, "--num_samples", "8")
    experiment.traced = tracing.TracedModel(plain[0], experiment.shape, 64)
    prompts = list(itertools.chain(*experiment.prompts))
    samples = [sample_prompts[0].sample for sample_prompts in experiment.prompts]
    users = [user for sample in samples for user in (sample.prompt_a, sample.prompt_b)]
    assert len(users) == len(prompts) == 16
    assert len({len(prompt.ids) for prompt in prompts}) > 5
    replies = []
    for labels in ([], FOUR):
        with by_hand.ablated(plain[0], labels):
            alone = [reply(plain, user) for user in users]
        components = tuple(map(tracing.Component.parse, labels))
        edits = tracing.scaled_edits(components, experiment.shape)
        everywhere = tracing.ReplyEdits(edits, edits)
        edited_prompts = [tracing.EditedPrompt(prompt, everywhere) for prompt in prompts]
        batched = tracing.greedy_replies(experiment, edited_prompts, max_new_tokens=12)
        assert [answer.text for answer in batched] == alone
        replies.append(alone)
    assert sum(one != other for one, other in zip(*replies, strict=True)) > 8


@pytest.mark.usefixtures("untested")
def test_replies_with_a_patched_layer_are_those_of_a_plain_loop(
    plain: Plain, tmp_path: Path
) -> None:
    """The harmful request's stream in the last token of the harmless one; full forwards, without a
    cache."""
    model, tokenizer = plain
    words = "--task refusal --num_samples 2 --kind resid --op patch --patch_into b"
    words += " --positions last --layers 12,24 --max_new_tokens 6"
    folder = finish(MODEL, tmp_path / "run", *words.split())
    texts = {}
    for sample in record_of(folder)["samples"]:
        texts[sample["sample_id"]] = {
            side: tokenizer(prompt["text"], add_special_tokens=False)["input_ids"]
            for side, prompt in sample["prompts"].items()
        }
    records = [json.loads(line) for line in (folder / "generations.jsonl").open()]
    edited = [record for record in records if record["set"] == "layer"]
    assert len(edited) == 4
    for record in edited:
        layer = tracing.Component.parse(record["ablated"]).layer
        ids = texts[record["sample_id"]]["b"]
        value = naive.input_of(model, texts[record["sample_id"]]["a"], layer, "resid")[-1]

        def patch(x: Any, place: int = len(ids) - 1, value: Any = value) -> Any:
            y = x.clone()
            y[0, place] = value
            return y

        with naive.hooked(naive.module_of(model, layer, "resid"), patch):
            tokens = naive.greedy(model, ids, 6, {tokenizer.eos_token_id})
        assert record["reply"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    rows = read(folder, "circuit_reply_layers.csv")
    assert rows["label"].tolist() == ["L12resid", "L24resid"]


# ----- what heads read and write

IOI = Path(__file__).with_name("ioi.jsonl")  # sentences that end before the indirect object


@pytest.mark.usefixtures("untested")
def test_a_name_mover_reads_the_indirect_object_and_writes_it(plain: Plain, tmp_path: Path) -> None:
    """L23H0 does; L23H3, the strongest, reads the name that is said twice and takes it away."""
    records = [json.loads(line) for line in IOI.read_text().splitlines()]
    words = ["inspect", "L23H0,L23H3", "--samples", str(IOI), "--task", "contrast", "--no_chat"]
    folder = finish(MODEL, tmp_path / "run", *words, "--op", "patch")
    reads = read(folder, "circuit_reads.csv")
    reads = reads[reads["measure"] == "weight"].set_index(["label", "role"])["mean_a"]
    writes = read(folder, "circuit_writes.csv").set_index("label")
    assert reads["L23H0", "target (first token)"] > 0.5 > reads["L23H0", "foil (first token)"]
    assert writes.loc["L23H0", "targets_logit"] > 1 and writes.loc["L23H0", "targets_rank"] <= 3
    assert reads["L23H3", "foil (first token)"] > 0.5
    assert writes.loc["L23H3", "foils_logit"] < -1
    assert writes.loc["L23H3", "foils_rank"] > 0.99 * 49152
    assert writes.loc["L23H3", "direct"] < -1 < writes.loc["L23H3", "mediated"]

    # by the library's own attention, and by what o_proj adds to the logits through the final norm
    model, tokenizer = plain
    model.set_attn_implementation("eager")
    weights, added = [], []
    for record in records:
        ids = tokenizer(record["prompt_a"], return_tensors="pt")["input_ids"]
        place = ids[0].tolist().index(tokenizer.encode(f" {record['targets'][0]}")[0])
        token = int(ids[0, place])
        o_proj = model.model.layers[23].self_attn.o_proj
        with (
            torch.no_grad(),
            tracing.recording({"z": o_proj, "x": model.model.norm}) as recorded,
        ):
            attention = model(ids, output_attentions=True).attentions[23][0, 0, -1]
        x, z = recorded["x"][0, -1], recorded["z"][0, -1, :64]
        part = o_proj.weight[:, :64] @ z * model.model.norm.weight
        part = part * (x.pow(2).mean() + model.config.rms_norm_eps).rsqrt()
        logits = (model.lm_head.weight @ part).detach()
        weights.append(float(attention[place]))
        added.append(float(logits[token] - logits.mean()))
    model.set_attn_implementation("sdpa")
    mean_weight, mean_added = sum(weights) / len(weights), sum(added) / len(added)
    assert reads["L23H0", "target (first token)"] == pytest.approx(mean_weight, abs=1e-3)
    assert writes.loc["L23H0", "targets_logit"] == pytest.approx(mean_added, abs=1e-2)

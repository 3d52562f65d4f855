"""A direction times a factor: what the model then says, and the table of it, in plain loops."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import finish, read, record_of

pytestmark = pytest.mark.usefixtures("coarse_figures")
ARCHITECTURES = ("llama", "qwen3", "mistral", "gpt2")
N_TOKENS = 4
WORDS = f"directions --num_samples 4 --max_new_tokens {N_TOKENS} --random_replies 2"


@functools.cache
def loaded(folder: str) -> tuple[Any, Any]:
    return naive.load(folder)


def records_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "directions_generations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steered(folder: Path) -> pd.DataFrame:
    return read(folder, "directions_steer.csv")


def reply(folder: str, user: str, edited: Callable[[int], Any]) -> str:
    """A loop of full forwards; `edited` makes the hook of a prompt of so many tokens."""
    model, tokenizer = loaded(folder)
    ids = naive.prompt_ids(tokenizer, user)
    with edited(len(ids)):
        return naive.reply_text(model, tokenizer, ids, N_TOKENS)


@contextmanager
def along(
    folder: str, n_prompt: int, label: str, direction: Tensor, steer_at: str, op: str, factor: float
) -> Iterator[None]:
    """A direction added so many times, or what lies along it multiplied, at some tokens."""
    model, _ = loaded(folder)
    component = tracing.Component.parse(label)
    place = component.layer, component.kind
    span = naive.span_of(model, *place, component.index)
    unit = (direction / direction.norm()).float()
    tokens = {"all": slice(None), "prompt": slice(n_prompt), "reply": slice(n_prompt - 1, None)}

    def edit(x: Tensor) -> Tensor:
        y = x.clone()
        part = y[:, tokens[steer_at], span]
        if op == "add":
            part = part + factor * direction.float()
        else:
            part = part + (factor - 1) * (part @ unit)[..., None] * unit
        y[:, tokens[steer_at], span] = part
        return y

    with naive.hooked(naive.module_of(model, *place), edit):
        yield


CASES = {
    "add at all": ("L1resid", "add", "all", "-3,0,1"),
    "add at the prompt": ("L1resid", "add", "prompt", "4"),
    "add at the reply": ("L2resid", "add", "reply", "-4"),
    "scale a head at all": ("L0H1", "zero", "all", "-40,0,1"),
    "scale a stream at the reply": ("L1resid", "zero", "reply", "30"),
    "scale an MLP at the prompt": ("L1mlp", "scale --factor 0", "prompt", "-9"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replies_scores_and_divergences_are_those_of_plain_hooks(
    architecture: str,
    name: str,
    random_model: Callable[..., str],
    tmp_path: Path,
) -> None:
    model_folder = random_model(architecture)
    label, op, steer_at, multipliers = CASES[name]
    component = tracing.Component.parse(label)
    words = f"{WORDS} --kind {component.kind} --layers {component.layer} --op {op}"
    words += f" --steer_at {steer_at} --multipliers={multipliers}"
    words += f" --heads {component.index}" if component.index >= 0 else ""
    folder = finish(model_folder, tmp_path, *words.split())
    direction = load_file(folder / "directions.safetensors")[label]
    texts, targets = by_hand.texts(folder), by_hand.targets_of(folder)
    rows = steered(folder).query("set == 'circuit'").set_index(["factor", "side"])
    records = [r for r in records_of(folder) if r["set"] == "circuit"]
    model, tokenizer = loaded(model_folder)
    assert {r["multiplier"] for r in records} == {float(m) for m in multipliers.split(",")}
    scores: dict[tuple[float, str], list[float]] = {}
    divergences: dict[tuple[float, str], list[float]] = {}
    for record in records:
        side, factor = record["prompt"], record["multiplier"]
        user = texts[record["sample_id"]][side]
        hook = functools.partial(
            along,
            model_folder,
            label=label,
            direction=direction,
            steer_at=steer_at,
            op=op.split()[0],
            factor=factor,
        )
        assert record["reply"] == reply(model_folder, user, hook)
        ids = naive.prompt_ids(tokenizer, user)
        here = functools.partial(hook, len(ids))
        score = naive.suppression_score(
            model, tokenizer, user, targets[record["sample_id"]], lambda *_, here=here: here()
        )
        scores.setdefault((factor, side), []).append(score)
        read_again = naive.whole_reply(model, tokenizer, ids, N_TOKENS)
        divergence = by_hand.divergence_along(model, ids, read_again, here)
        divergences.setdefault((factor, side), []).append(divergence)
    for key, row in rows.iterrows():
        factor = key[0]
        mean_delta = statistics.fmean(scores[factor, "a"]) - statistics.fmean(scores[factor, "b"])
        assert row["mean_delta"] == pytest.approx(mean_delta, abs=1e-4)
        assert row["kl_reply"] == pytest.approx(
            statistics.fmean(divergences[key]), rel=1e-3, abs=2e-5
        )


def test_nothing_added_and_once_what_is_there_give_the_unedited_strings(
    llama: str, tmp_path: Path
) -> None:
    for op, identity in (("add", 0.0), ("zero", 1.0)):
        words = f"{WORDS} --kind resid --layers 1 --op {op} --multipliers 0,1,-5"
        records = records_of(finish(llama, tmp_path / op, *words.split()))
        unedited = {(r["sample_id"], r["prompt"]): r["reply"] for r in records if not r["set"]}
        unchanged = [r for r in records if r["multiplier"] == identity]
        assert len(unchanged) == 3 * 2 * 2  # of the direction and two random ones
        for record in unchanged:
            assert record["reply"] == unedited[record["sample_id"], record["prompt"]]
        others = [r for r in records if r["multiplier"] == -5 and r["set"] == "circuit"]
        assert any(r["reply"] != unedited[r["sample_id"], r["prompt"]] for r in others)


def test_random_directions_move_as_far_as_the_direction_does(llama: str) -> None:
    words = ["--kind", "resid", "--layers", "1", "--max_new_tokens", "1", "--multipliers=-3"]
    experiment = by_hand.prepared(llama, "directions", *words, "--num_samples", "4")
    data = tracing.prepare_directions(experiment)
    component = data.components[0]
    data.vectors[component] = torch.randn(48, dtype=torch.float64)
    scaled = tracing.choose_scaled_directions(data, tracing.Confirmation())
    assert [joint_set.name for joint_set in scaled] == ["circuit"] + ["random"] * 5
    (tree,) = tracing.trees_of_edits(experiment, experiment.prompts, "all")
    clean_run = experiment.clean_run(tree, sites=[component.site])
    rows = tracing.direction_set_edits(data, clean_run, scaled)
    x = clean_run.activations[component.site]
    distances = [tracing.displacement(edit, x).norm(dim=-1) for (edit,) in rows]
    for distance in distances[1:]:
        torch.testing.assert_close(distance, distances[0])
    writes = {tuple(edit.along[1].tolist()) for (edit,) in rows if edit.along is not None}
    assert len(writes) == 6


def test_the_chosen_directions_are_steered_on_the_held_out_sentences(
    tiny_llama: str, tmp_path: Path
) -> None:
    """At factor 0 they are what the confirmation measures, at 1 nothing is changed."""
    words = "directions --task refusal --num_samples 8 --confirm 2 --num_random 2"
    words += " --max_new_tokens 3 --multipliers 0,1 --random_replies 1"
    folder = finish(tiny_llama, tmp_path, *words.split())
    rows = steered(folder)
    confirmed = read(folder, "directions_confirm.csv").query("quoted")
    (chosen,) = confirmed.query("set == 'chosen' and n_ablated == 2").itertuples()
    circuit = rows[rows["set"] == "circuit"].drop_duplicates("factor").set_index("factor")
    assert {*circuit["components"]} == {chosen.components}
    assert circuit.loc[0, "mean_delta"] == pytest.approx(chosen.mean_delta, abs=1e-4)
    base = confirmed[confirmed["set"] == "none"]["mean_delta"].item()
    assert circuit.loc[1, "mean_delta"] == pytest.approx(base, abs=1e-4)
    rates = read(folder, "directions_rates.csv")
    assert {*rates["n_ablated"]} == {0, 1, 2}
    at_zero = rows.query("set == 'circuit' and factor == 0").set_index("side")["shown"]
    same = rates[(rates["set"] == "chosen") & (rates["n_ablated"] == 2)].set_index("side")["shown"]
    assert at_zero.to_dict() == pytest.approx(same.to_dict())


def test_a_direction_is_scaled_wherever_the_stream_is_read(tiny_llama: str, tmp_path: Path) -> None:
    words = "directions --task refusal --num_samples 6 --kind resid --confirm all --num_random 1"
    words += " --max_new_tokens 4 --multipliers 0,1,-1,3"
    folder = finish(tiny_llama, tmp_path, *words.split())
    rows = steered(folder)
    assert {*rows["set"]} == {"circuit"}
    assert "no random direction is scaled everywhere" in (folder / "run.log").read_text()
    confirmed = read(folder, "directions_confirm.csv").query("quoted and set == 'chosen'")
    at_zero = rows[rows["factor"] == 0].iloc[0]
    assert at_zero["mean_delta"] == pytest.approx(confirmed["mean_delta"].item(), abs=1e-4)
    records = records_of(folder)
    unedited = {(r["sample_id"], r["prompt"]): r["reply"] for r in records if not r["set"]}
    for record in records:
        if record["multiplier"] == 1:
            assert record["reply"] == unedited[record["sample_id"], record["prompt"]]
    assert not any(record["set"] == "random" for record in records)
    label = confirmed["components"].item().split()[0]
    direction = load_file(folder / "directions.safetensors")[label]
    unit = (direction / direction.norm()).float()
    texts, (model, _) = by_hand.texts(folder), loaded(tiny_llama)

    @contextmanager
    def scaled(_: int, factor: float) -> Iterator[None]:
        """x + (factor - 1) (x . u) u as the norms read it; the stream itself stays as it is."""

        def edit(x: Tensor) -> Tensor:
            return x + (factor - 1) * (x @ unit)[..., None] * unit

        modules = [model.model.norm]
        for block in naive.layers_of(model):
            modules += [block.input_layernorm, block.post_attention_layernorm]
        with naive.all_hooked((module, edit) for module in modules):
            yield

    for record in records:
        if record["multiplier"] is not None:
            user = texts[record["sample_id"]][record["prompt"]]
            edited = functools.partial(scaled, factor=record["multiplier"])
            assert record["reply"] == reply(tiny_llama, user, edited)


def test_the_log_and_the_record_name_what_is_steered(llama: str, tmp_path: Path) -> None:
    words = f"{WORDS} --kind resid --layers 1 --op add --multipliers 2 --steer_at reply"
    folder = finish(llama, tmp_path, *words.split())
    log = (folder / "run.log").read_text()
    assert (
        "the direction of L1resid added, times a factor, at the prompt's last token and the reply's:"
        in log
    )
    for row in steered(folder).query("set == 'circuit'").itertuples():
        assert f"x 2, prompt {row.side}: {row.shown:.0%} [" in log
    options = record_of(folder)["commands"]["directions"]["options"]
    assert (options["multipliers"], options["steer_at"]) == ("2.0", "reply")
    assert (folder / "directions_steer.png").exists()

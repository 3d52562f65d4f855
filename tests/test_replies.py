"""What the model says, edited and unedited, and how often that shows the behaviour."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import finish, generations, read, record_of, user_text

SETS = ["--confirm", "3", "--num_random", "2"]


@pytest.fixture(scope="module")
def plain(llama: str) -> tuple[Any, Any]:
    """The model and its tokenizer, as everyone loads them."""
    return naive.load(llama)


@pytest.fixture(scope="module")
def replying(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on random weights, since one head rarely changes what a trained model says."""
    flags = ["--num_samples", "6", *SETS, "--max_new_tokens", "5", "--given", "L0H0"]
    return finish(llama, tmp_path_factory.mktemp("run"), *flags)


@pytest.fixture(scope="module")
def refusing(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["--task", "refusal", "--num_samples", "4", "--confirm", "2", "--num_random", "2"]
    return finish(tiny_llama, tmp_path_factory.mktemp("run"), *flags, "--max_new_tokens", "4")


@pytest.fixture()
def experiment(llama: str) -> Callable[..., tracing.Experiment]:
    def prepare(*flags: str) -> tracing.Experiment:
        config = tracing.parse_args(["--model_id", llama, "--num_samples", "2", *flags])
        return tracing.prepare(config, tracing.RunFolder(Path("nowhere")))

    return prepare


def chosen_in(folder: Path) -> list[str]:
    rows = read(folder, "circuit_confirm.csv")
    return list(rows[rows["set"] == "chosen"]["components"])


def held_out_in(folder: Path) -> set[str]:
    table = read(folder)
    return set(table[table["unit"].isin(tracing.split_units(table, 42)[1])]["sample_id"])


@torch.no_grad()
def naive_tokens(
    plain: tuple[Any, Any], user: str, n_tokens: int, labels: Iterable[str] = ()
) -> list[int]:
    """Greedy tokens, a full forward each, with some components zeroed throughout."""
    model, tokenizer = plain
    ids = naive.prompt_ids(tokenizer, user)
    n = len(ids)
    with by_hand.ablated(model, labels):
        for _ in range(n_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[n:]


def naive_reply(
    plain: tuple[Any, Any], user: str, n_tokens: int, labels: Iterable[str] = ()
) -> str:
    tokens, tokenizer = naive_tokens(plain, user, n_tokens, labels), plain[1]
    ends = {tokenizer.eos_token_id, *plain[0].generation_config.eos_token_id}
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), n_tokens)
    return str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).strip()


# ----- what is said


@pytest.mark.parametrize("run", ["replying", "refusing"])
def test_all_samples_are_answered_unedited_and_held_out_ones_with_the_chosen_ablated(
    run: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(run)
    records, held_out = generations(folder), held_out_in(folder)
    assert 0 < len(held_out) < len(by_hand.texts(folder))
    wanted = {(i, side, "") for i in by_hand.texts(folder) for side in "ab"}
    wanted |= {(i, side, labels) for i in held_out for side in "ab" for labels in chosen_in(folder)}
    found = [(r["sample_id"], r["prompt"], r["ablated"]) for r in records]
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert all(r["n_ablated"] == len(r["ablated"].split()) for r in records)


def test_replies_are_those_of_a_plain_token_loop_with_the_components_and_the_given_zeroed(
    replying: Path, plain: tuple[Any, Any]
) -> None:
    texts = by_hand.texts(replying)
    replies: dict[tuple[str, str], set[str]] = {}
    with_given = 0
    for record in generations(replying):
        key = record["sample_id"], record["prompt"]
        user, labels = texts[key[0]][key[1]], record["ablated"].split()
        assert record["reply"] == naive_reply(plain, user, 5, ["L0H0", *labels])
        replies.setdefault(key, set()).add(record["reply"])
        with_given += record["reply"] != naive_reply(plain, user, 5, labels)
    assert max(map(len, replies.values())) >= 3, "each further head changes some reply"
    assert with_given > 0


@pytest.mark.parametrize(
    ("kind", "op", "label"),
    [
        ("mlp", "mean", "L1mlp"),
        ("attn", "scale", "L2attn"),
        ("neuron", "zero", "L0N7"),
        ("resid", "scale", "L1resid"),
    ],
)
def test_replies_are_edited_by_any_op_that_applies_at_every_token(
    kind: str,
    op: str,
    label: str,
    experiment: Callable[..., tracing.Experiment],
    plain: tuple[Any, Any],
) -> None:
    more = {"neuron": ["--neurons", "7"]}.get(kind, [])
    more += ["--factor", "-40"] if op == "scale" else []
    exp = experiment("--kind", kind, "--op", op, "--max_new_tokens", "4", *more)
    component = tracing.Component.parse(label)
    model, user = plain[0], user_text(exp.prompts[0][0].text)
    block = naive.layers_of(model)[component.layer]
    modules = {"attn": block.self_attn.o_proj, "resid": block}
    mean = exp.means[component.site].float() if op == "mean" else None

    def edit(x: torch.Tensor) -> torch.Tensor:
        if op == "zero":
            return naive.zero_slice(7, 8)(x)
        return -40 * x if mean is None else mean.expand_as(x)

    with naive.hooked(modules.get(kind, block.mlp.down_proj), edit):
        expected = naive_reply(plain, user, 4)
    assert tracing.greedy_reply(exp, exp.prompts[0][0], [component]) == expected
    assert kind == "neuron" or expected != naive_reply(plain, user, 4)


@pytest.mark.parametrize("terminator", ["generation_config", "a list", "tokenizer", "<|eot_id|>"])
def test_replies_stop_at_every_kind_of_terminator(
    terminator: str,
    experiment: Callable[..., tracing.Experiment],
    plain: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exp = experiment("--max_new_tokens", "8")
    prompt = exp.prompts[0][0]
    tokens = naive_tokens(plain, user_text(prompt.text), 8)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    tokenizer, settings = exp.encoder.tokenizer, exp.traced.model.generation_config
    settings.eos_token_id = None
    if terminator == "generation_config":
        settings.eos_token_id = stop
    elif terminator == "a list":
        settings.eos_token_id = [3, stop]
    elif terminator == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    else:
        vocabulary = {**tokenizer.get_vocab(), "<|eot_id|>": stop}
        monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    reply = tracing.greedy_reply(exp, prompt, ())
    kept = tokens[: tokens.index(stop)]
    # a terminator that is no special token is still shown
    shown = [plain[1].decode(ids, skip_special_tokens=True) for ids in (kept, [*kept, stop])]
    assert reply in [text.strip() for text in shown]


def test_replies_leave_no_hook_behind(experiment: Callable[..., tracing.Experiment]) -> None:
    exp = experiment("--max_new_tokens", "2", "--given", "L2mlp")
    before = tracing.count_hooks(exp.traced)
    tracing.greedy_reply(exp, exp.prompts[0][0], exp.components[:3])
    assert tracing.count_hooks(exp.traced) == before


def test_without_confirmation_the_unedited_replies_are_written(llama: str, tmp_path: Path) -> None:
    folder = finish(llama, tmp_path, "--num_samples", "2", "--max_new_tokens", "2", "--layers", "0")
    records = generations(folder)
    assert [(r["sample_id"], r["prompt"]) for r in records] == [
        (sample_id, side) for sample_id in by_hand.texts(folder) for side in "ab"
    ]
    assert {record["ablated"] for record in records} == {""}
    assert not (folder / "circuit_confirm.csv").exists()


@pytest.mark.parametrize("flags", ["--op patch", "--positions last"])
def test_an_edit_of_some_tokens_has_no_edited_replies_and_says_so(
    flags: str, llama: str, tmp_path: Path
) -> None:
    more = [*flags.split(), "--max_new_tokens", "2", *SETS]
    folder = finish(llama, tmp_path, "--num_samples", "4", *more)
    assert {record["ablated"] for record in generations(folder)} == {""}
    assert (
        "edited replies need an op that applies at every token" in (folder / "run.log").read_text()
    )


def test_replies_that_were_given_are_not_asked_for_again(
    replying: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (replying / "generations.jsonl").read_bytes()
    monkeypatch.setattr(tracing, "load_model", lambda *a: pytest.fail("weights were loaded"))
    flags = ["--num_samples", "6", *SETS, "--max_new_tokens", "5", "--given", "L0H0"]
    finish(llama, replying, *flags)
    assert (replying / "generations.jsonl").read_bytes() == before


# ----- what it shows


def test_what_a_reply_shows_recomputes_from_its_text(replying: Path, refusing: Path) -> None:
    targets, texts = by_hand.targets_of(replying), by_hand.texts(replying)
    for record in generations(replying):
        i, words = record["sample_id"], re.findall(r"\w+", record["reply"].casefold())
        assert record["mentions"] == [w for w in targets[i] if w.casefold() in words]
        answers = tracing.QUESTIONS[texts[i]["b"]].casefold().split()
        assert record["answers"] == any(answer in words for answer in answers)
    for record in generations(refusing):
        start = record["reply"].lower()
        found = [o for o in tracing.REFUSAL_OPENINGS if start.startswith(o.lower())]
        assert record["mentions"] == found
        assert record["answers"] == (not found)
    assert any(record["mentions"] for record in generations(refusing))


@pytest.mark.parametrize("run", ["replying", "refusing"])
def test_the_rates_are_in_run_json_and_in_the_log(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run)
    records, held_out = generations(folder), held_out_in(folder)
    rates, told = record_of(folder)["behaviour"], (folder / "run.log").read_text()
    sizes = [0, *(len(labels.split()) for labels in chosen_in(folder))]
    steps = [(rate["samples"], rate["n_ablated"]) for rate in rates]
    assert steps == [("all", 0), *(("held-out", n) for n in sizes)]
    for rate in rates:
        for side in "ab":
            mine = [
                record
                for record in records
                if record["prompt"] == side
                and record["n_ablated"] == rate["n_ablated"]
                and (rate["samples"] == "all" or record["sample_id"] in held_out)
            ]
            for what in ("mentions", "answers"):
                share = 100 * sum(bool(record[what]) for record in mine) / len(mine)
                assert rate[f"{what}_{side}"] == pytest.approx(share)
        whose = f"({rate['samples']}, {rate['n_ablated']} ablated)"
        assert f"{whose}: {rate['mentions_a']:.0f} % " in told


def test_the_rates_by_hand() -> None:
    records = pd.DataFrame(
        [
            ("s", "a", 0, [], False),
            ("t", "a", 0, ["x"], True),
            ("s", "b", 0, ["x", "y"], True),
            ("t", "b", 0, ["x"], True),
            ("t", "a", 2, ["x"], False),
            ("t", "b", 2, [], False),
        ],
        columns=["sample_id", "prompt", "n_ablated", "mentions", "answers"],
    )
    names = ["samples", "n_ablated", "mentions_a", "answers_a", "mentions_b", "answers_b"]
    expected = [
        ("all", 0, 50, 50, 100, 100),
        ("held-out", 0, 100, 100, 100, 100),
        ("held-out", 2, 100, 0, 0, 0),
    ]
    found = tracing.behaviour_rates(records, {"t"})
    assert found == [dict(zip(names, rate, strict=True)) for rate in expected]


def test_everything_together_runs_on_the_bundled_model(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 4 --controls --confirm 4 --num_random 3 --max_new_tokens 4 --heatmap"
    folder = finish(tiny_llama, tmp_path, *flags.split())
    assert {path.name for path in folder.iterdir()} - {".parts"} == set(tracing.OUTPUTS)
    controls = read(folder).filter(regex="other|affirm")
    assert controls.shape[1] == 6
    assert not controls.isna().any(axis=None)
    assert len(read(folder, "circuit_confirm.csv")) == 1 + 3 + 3 * 3
    assert all(record["answers"] in (True, False) for record in generations(folder))
    assert record_of(folder)["noise_floor"] < 2e-5

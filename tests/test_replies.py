"""What the model says, edited and unedited, and how often that shows the behaviour."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, prepared
from conftest import finish, generations, read, record_of, user_text

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")
Plain = tuple[Any, Any]  # a model and its tokenizer, as everyone loads them
# on random weights, since one head rarely changes what a trained model says
REPLYING = "--num_samples 6 --confirm 3 --num_random 2 --max_new_tokens 5 --given L0H0"
REFUSING = "--task refusal --num_samples 4 --confirm 2 --num_random 2 --max_new_tokens 4"


@pytest.fixture(scope="module")
def plain(llama: str) -> Plain:
    return naive.load(llama)


@pytest.fixture(scope="module")
def runs(llama: str, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "replying": finish(llama, tmp_path_factory.mktemp("run"), *REPLYING.split()),
        "refusing": finish(tiny_llama, tmp_path_factory.mktemp("run"), *REFUSING.split()),
    }


def joint_replies(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "joint_generations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rates_of(folder: Path, command: str = "trace") -> list[dict[str, Any]]:
    return list(record_of(folder)["commands"][command]["behaviour"])


def chosen_in(folder: Path) -> list[str]:
    rows = read(folder, "circuit_confirm.csv")
    return list(rows[rows["set"] == "chosen"]["components"])


def naive_tokens(plain: Plain, user: str, n_tokens: int) -> list[int]:
    return naive.greedy(plain[0], naive.prompt_ids(plain[1], user), n_tokens)


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def naive_reply(plain: Plain, user: str, n_tokens: int, labels: Iterable[str] = ()) -> str:
    """With some components zeroed throughout."""
    model, tokenizer = plain
    ends = {tokenizer.eos_token_id, *model.generation_config.eos_token_id}
    with by_hand.ablated(model, labels):
        tokens = naive.greedy(model, naive.prompt_ids(tokenizer, user), n_tokens, ends)
    return text_of(tokenizer, tokens)


def said_by(experiment: Any, edits: Any, prompts: Any, n_tokens: int) -> list[str]:
    """The texts of greedy replies."""
    return [reply.text for reply in replies_to(experiment, edits, prompts, n_tokens)]


def replies_to(experiment: Any, edits: Any, prompts: Any, n_tokens: int) -> list[tracing.Reply]:
    """Greedy replies with the same edits at every token of each prompt and of the reply to it."""
    everywhere = tracing.ReplyEdits(edits, edits)
    edited_prompts = [tracing.EditedPrompt(prompt, everywhere) for prompt in prompts]
    return tracing.greedy_replies(experiment, edited_prompts, n_tokens)


def clean_run_of(experiment: Any) -> tracing.CleanRun:
    run: tracing.CleanRun = experiment.clean_run(experiment.trees[0])
    return run


# ----- replies of a confirmed circuit


@pytest.mark.parametrize("name", ["replying", "refusing"])
def test_all_samples_are_answered_unedited_and_held_out_ones_with_the_chosen_ablated(
    name: str, runs: dict[str, Path]
) -> None:
    folder, ids = runs[name], list(by_hand.texts(runs[name]))
    held_out, records = halves(folder)[1], generations(folder)
    assert 0 < len(held_out) < len(ids)
    expected = [(i, side, "") for i in ids for side in "ab"]
    table = read(folder, "circuit_confirm.csv")
    randoms = table[(table["set"] == "random") & (table["n_ablated"] == len(chosen_in(folder)))]
    assert 0 < len(randoms) <= tracing.REPLY_RANDOM
    for labels in [*chosen_in(folder), *randoms["components"]]:
        expected += [(i, side, labels) for i in held_out for side in "ab"]
    assert sorted((r["sample_id"], r["prompt"], r["ablated"]) for r in records) == sorted(expected)
    assert all(record["n_ablated"] == len(record["ablated"].split()) for record in records)


def test_replies_are_those_of_a_plain_token_loop_with_the_components_and_the_given_zeroed(
    runs: dict[str, Path], plain: Plain
) -> None:
    texts, with_given = by_hand.texts(runs["replying"]), 0
    replies: dict[str, set[str]] = {}
    for record in generations(runs["replying"]):
        user, labels = texts[record["sample_id"]][record["prompt"]], record["ablated"].split()
        assert record["reply"] == naive_reply(plain, user, 5, ["L0H0", *labels])
        replies.setdefault(user, set()).add(record["reply"])
        with_given += record["reply"] != naive_reply(plain, user, 5, labels)
    assert max(map(len, replies.values())) >= 3, "each further head changes some reply"
    assert with_given > 0


def test_the_table_has_the_divergence_along_the_unedited_replies_to_held_out_prompts_b(
    runs: dict[str, Path], plain: Plain
) -> None:
    """Of chosen and of random sets, with the given components zeroed throughout."""
    folder, (model, tokenizer) = runs["replying"], plain
    texts = by_hand.texts(folder)
    table = read(folder, "circuit_confirm.csv")
    measured = table[table["set"].isin(["chosen", "random"])]
    assert measured["set"].value_counts().to_dict() == {"chosen": 3, "random": 5}
    for row in measured.itertuples():
        edited = functools.partial(by_hand.ablated, model, row.components.split())
        by_sample = []
        with by_hand.ablated(model, ["L0H0"]):
            for sample_id in halves(folder)[1]:
                ids = naive.prompt_ids(tokenizer, texts[sample_id]["b"])
                reply = naive.whole_reply(*plain, ids, 5)
                by_sample.append(by_hand.divergence_along(model, ids, reply, edited))
        assert row.kl_reply == pytest.approx(statistics.fmean(by_sample), rel=1e-4, abs=2e-5)
    assert table[~table["set"].isin(["chosen", "random"])]["kl_reply"].isna().all()


EDITS = [("L1mlp", "mean"), ("L2attn", "scale"), ("L0N7", "scale"), ("L1resid", "scale")]


@pytest.mark.parametrize(("label", "op"), EDITS)
def test_replies_are_edited_by_any_op_at_all_tokens(
    label: str, op: str, llama: str, plain: Plain
) -> None:
    component, factor = tracing.Component.parse(label), -40.0
    flags = ["--factor", str(factor)] if op == "scale" else []
    experiment = prepared(llama, "joint", label, "--op", op, *flags)
    prompts = list(itertools.chain(*experiment.prompts))
    users = [user_text(prompt.text) for prompt in prompts]
    assert len({len(prompt.ids) for prompt in prompts}) > 1
    columns = slice(7, 8) if component.kind == "neuron" else slice(None)
    site = component.site
    mean = experiment.mean_activation(site.place)[site].float() if op == "mean" else torch.zeros(0)

    def edit(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[..., columns] = factor * x[..., columns] if op == "scale" else mean
        return y

    block = naive.layers_of(plain[0])[component.layer]
    with naive.hooked(block.get_submodule(tracing.LLAMA_LAYOUT.module(site.place)), edit):
        expected = [naive_reply(plain, user, 4) for user in users]
    edits = experiment.edits(clean_run_of(experiment), [component])
    assert said_by(experiment, edits, prompts, 4) == expected
    assert expected[0] != naive_reply(plain, users[0], 4)


@pytest.mark.parametrize("terminator", ["generation_config", "a list", "tokenizer", "<|eot_id|>"])
def test_replies_stop_at_every_kind_of_terminator(
    terminator: str, llama: str, plain: Plain, monkeypatch: Patch
) -> None:
    experiment = prepared(llama)
    prompts, tokenizer = experiment.prompts[0], experiment.encoder.tokenizer
    tokens, others = (naive_tokens(plain, user_text(prompt.text), 8) for prompt in prompts)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    settings = experiment.traced.model.generation_config
    settings.eos_token_id = {"generation_config": stop, "a list": [3, stop]}.get(terminator)
    if terminator == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    elif terminator == "<|eot_id|>":
        vocabulary = {**tokenizer.get_vocab(), terminator: stop}
        monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    assert stop not in others, "the other reply goes on"
    expected = [text_of(tokenizer, t) for t in (tokens[: tokens.index(stop)], others)]
    assert said_by(experiment, (), prompts, 8) == expected
    first, second = replies_to(experiment, (), prompts, 8)
    assert first.tokens == tokens[: tokens.index(stop) + 1]
    assert second.tokens == others


def test_the_reply_of_a_model_that_ends_at_once_is_empty(llama: str, plain: Plain) -> None:
    experiment = prepared(llama)
    prompt, weight = experiment.prompts[0][0], experiment.traced.unembedding.weight
    (likeliest,) = naive_tokens(plain, user_text(prompt.text), 1)
    with torch.no_grad():
        weight[experiment.encoder.tokenizer.eos_token_id] = 2 * weight[likeliest]
    (reply,) = replies_to(experiment, (), [prompt], 3)
    assert reply == ("", [experiment.encoder.tokenizer.eos_token_id])


def test_a_model_without_any_end_speaks_to_the_last_token(llama: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    changes: dict[str, dict[str, Any]] = {"config": {"eos_token_id": None}}
    changes |= {"generation_config": changes["config"], "tokenizer_config": {"eos_token": None}}
    for name in ("tokenizer", "tokenizer_config", "config", "generation_config"):
        path = folder / f"{name}.json"
        settings = json.loads(path.read_text().replace("<|eot_id|>", "<|turn|>"))
        path.write_text(json.dumps({**settings, **changes.get(name, {})}))
    (endless, tokenizer), flags = naive.load(str(folder)), ["--max_new_tokens", "3"]
    assert tokenizer.eos_token is endless.generation_config.eos_token_id is None
    samples = [prompts[0].sample for prompts in prepared(str(folder)).prompts]
    run = finish(str(folder), tmp_path / "run", "--num_samples", "2", "--layers", "0", *flags)
    users = [text for sample in samples for text in (sample.prompt_a, sample.prompt_b)]
    expected = [text_of(tokenizer, naive_tokens((endless, tokenizer), user, 3)) for user in users]
    assert [record["reply"] for record in generations(run)] == expected


def test_replies_leave_no_hook_behind(llama: str) -> None:
    experiment = prepared(llama, "--given", "L2mlp")
    before = tracing.count_hooks(experiment.traced)
    heads = experiment.shape.components("head")[:3]
    edits = experiment.edits(clean_run_of(experiment), heads)
    replies_to(experiment, edits, experiment.prompts[0], 2)
    assert tracing.count_hooks(experiment.traced) == before


def test_without_a_confirmed_set_replies_are_unedited(llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 2 --max_new_tokens 2 --layers 0"
    finish(llama, tmp_path, *flags.split())
    replies = [(r["sample_id"], r["prompt"], r["ablated"]) for r in generations(tmp_path)]
    assert replies == [(i, side, "") for i in by_hand.texts(tmp_path) for side in "ab"]
    assert [rate["samples"] for rate in rates_of(tmp_path)] == ["all"]
    assert not list(tmp_path.glob("circuit_r[ae]*.png")), "no rates by number or by layer"


@pytest.mark.parametrize(("flags", "sides"), [("--op patch", "a"), ("--positions last", "ab")])
def test_held_out_prompts_that_an_edit_touches_are_answered_with_a_confirmed_set(
    flags: str, sides: str, llama: str, tmp_path: Path
) -> None:
    words = f"--num_samples 2 --max_new_tokens 2 --confirm 1 --num_random 1 {flags}"
    finish(llama, tmp_path, *words.split())
    records = pd.DataFrame(generations(tmp_path))
    held_out = halves(tmp_path)[1]
    for name in ("chosen", "random"):
        edited = records[records["set"] == name]
        expected = [(i, side) for i in held_out for side in sides]
        assert list(zip(edited["sample_id"], edited["prompt"], strict=True)) == expected


# ----- replies of a named set


def check_interval(rate: dict[str, Any], name: str) -> None:
    """A percentage has its interval over sentences beside it."""
    low, high = tracing.share_interval(rate[name] / 100, rate["n_sentences"])
    ends = [rate[f"{name}_low"], rate[f"{name}_high"]]
    assert ends == pytest.approx([100 * low, 100 * high])


NAMED = ["joint", "L2mlp,L0H1", "--num_samples", "4", "--max_new_tokens", "5", "--num_random", "1"]


def rows_of(records: list[dict[str, Any]], ablated: str) -> list[tuple[str, str]]:
    return [(r["sample_id"], r["prompt"]) for r in records if r["ablated"] == ablated]


def test_all_samples_are_answered_unedited_and_with_the_named_set_edited(
    llama: str, tmp_path: Path, plain: Plain
) -> None:
    folder = finish(llama, tmp_path, *NAMED)
    records, texts = joint_replies(folder), by_hand.texts(folder)
    prompts = [(sample, side) for sample in texts for side in "ab"]
    assert rows_of(records, "") == rows_of(records, "L2mlp L0H1") == prompts
    assert len(records) == 2 * len(prompts)
    n_changed = 0
    for record in records:
        user, labels = texts[record["sample_id"]][record["prompt"]], record["ablated"].split()
        assert record["reply"] == naive_reply(plain, user, 5, labels)
        assert record["n_ablated"] == len(labels)
        n_changed += record["reply"] != naive_reply(plain, user, 5)
    assert n_changed > 0


def test_the_rates_of_a_named_set_are_those_of_its_replies_to_all_samples(
    tiny_llama: str, tmp_path: Path
) -> None:
    """On the trained model, whose replies show the behaviour; scaled replies are left out, and
    there is no line of held-out samples."""
    words = "joint L0attn,L1attn --num_samples 6 --max_new_tokens 3 --multipliers 3"
    folder = finish(tiny_llama, tmp_path, *words.split(), "--num_random", "1")
    rates, log = rates_of(folder, "joint"), (folder / "run.log").read_text()
    assert [(rate["samples"], rate["n_ablated"]) for rate in rates] == [("all", 0), ("all", 2)]
    assert "held-out" not in log[log.index("----- replies") :]
    replies = pd.DataFrame(joint_replies(folder))
    assert replies["multiplier"].notna().any()
    for rate in rates:
        for side in "ab":
            same = (replies["n_ablated"] == rate["n_ablated"]) & (replies["prompt"] == side)
            same &= replies["multiplier"].isna() & (replies["set"] != "random")
            for name in ("mentions", "answers"):
                expected = 100 * replies[same][name].map(bool).mean()
                assert rate[f"{name}_{side}"] == pytest.approx(expected)
                check_interval(rate, f"{name}_{side}")
        assert f"(all, {rate['n_ablated']} edited): {rate['mentions_a']:.0f} % " in log
    assert rates[0]["answers_b"] != rates[1]["answers_b"]


def test_the_circuit_of_a_folder_answers_the_held_out_samples_alone(
    runs: dict[str, Path], llama: str, tmp_path: Path
) -> None:
    """What is called held-out is of these samples, and the same as the trace's."""
    folder = Path(shutil.copytree(runs["replying"], tmp_path / "run"))
    finish(llama, folder, "joint", "--max_new_tokens", "5", "--num_random", "1")
    records = joint_replies(folder)
    held_out = [(i, side) for i in by_hand.texts(folder) for side in "ab"]
    held_out = [row for row in held_out if row[0] in halves(folder)[1]]
    labels = chosen_in(folder)[-1]
    assert rows_of(records, "") == rows_of(records, labels) == held_out
    assert len(records) == 2 * len(held_out)
    expected = []
    for rate in rates_of(folder):
        if rate["samples"] == "held-out" and rate["n_ablated"] in (0, 3):
            expected.append(rate | {"set": "named" if rate["n_ablated"] else ""})
    assert rates_of(folder, "joint") == expected
    assert len(expected) == 2


def test_a_named_set_without_replies_has_no_rates_of_the_set_before(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "2", "--num_random", "1"]
    finish(llama, tmp_path, "joint", "L0H1", *flags, "--max_new_tokens", "1")
    assert rates_of(tmp_path, "joint")
    finish(llama, tmp_path, "joint", "L1H2", *flags)
    assert "behaviour" not in record_of(tmp_path)["commands"]["joint"]


@pytest.mark.parametrize(("flags", "sides"), [("--op patch", "a"), ("--positions last", "ab")])
def test_a_named_set_is_edited_at_the_tokens_of_its_op(
    flags: str, sides: str, llama: str, tmp_path: Path
) -> None:
    """The replies themselves are held against a plain loop in test_edited_replies."""
    folder = finish(llama, tmp_path, *NAMED, *flags.split())
    expected = [(sample, side) for sample in by_hand.texts(folder) for side in sides]
    assert rows_of(joint_replies(folder), "L2mlp L0H1") == expected
    edited = next(rate for rate in rates_of(folder, "joint") if rate["n_ablated"])
    assert [side for side in "ab" if f"mentions_{side}" in edited] == list(sides)


# ----- what it shows


def test_what_a_reply_shows_recomputes_from_its_text(runs: dict[str, Path]) -> None:
    targets, texts = by_hand.targets_of(runs["replying"]), by_hand.texts(runs["replying"])
    for record in generations(runs["replying"]):
        i, words = record["sample_id"], re.findall(r"\w+", record["reply"].casefold())
        assert record["mentions"] == [w for w in targets[i] if w.casefold() in words]
        answers = tracing.QUESTIONS[texts[i]["b"]].casefold().split()
        assert record["answers"] == any(answer in words for answer in answers)
    for record in generations(runs["refusing"]):
        start = record["reply"].lower()
        phrases = [*tracing.REFUSAL_OPENINGS, *tracing.REFUSAL_PHRASES]
        refuses = {phrase for phrase in phrases if re.match(rf"{phrase.lower()}\b", start)}
        assert set(record["mentions"]) == refuses
        assert record["answers"] == (not refuses)
    shown = {bool(record["mentions"]) for record in generations(runs["refusing"])}
    assert shown == {True, False}


def test_other_refusal_words_judge_the_same_replies_anew_and_change_no_number(
    runs: dict[str, Path], tiny_llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    folder = Path(shutil.copytree(runs["refusing"], tmp_path / "run"))
    before, record = generations(folder), record_of(folder)
    words = tmp_path / "words.txt"
    words.write_text("Sure, here\n\n Ja \n")
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(tiny_llama, folder, *REFUSING.split(), "--refusal_words", str(words))
    after = generations(folder)
    assert record_of(folder)["experiment"]["fingerprint"] == record["experiment"]["fingerprint"]
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        refuses_now = old["reply"].startswith("Sure, here")
        judgement = {"mentions": ["Sure, here"], "answers": False} if refuses_now else {}
        assert new == {**old, **judgement}
    assert rates_of(folder)[0]["mentions_b"] == 100
    for name in ("circuit_results.csv", "circuit_confirm.csv"):
        assert (folder / name).read_bytes() == (runs["refusing"] / name).read_bytes()
    finish(tiny_llama, folder, *REFUSING.split())
    assert generations(folder) == before


def test_a_follow_up_judges_by_the_refusal_words_of_the_folder(
    tiny_llama: str, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Sure")
    folder, flags = tmp_path / "run", ["--refusal_words", str(words), "--layers", "0"]
    finish(tiny_llama, folder, "--task", "refusal", "--num_samples", "1", *flags)
    finish(tiny_llama, folder, "joint", "L0H0", "--max_new_tokens", "4", "--num_random", "1")
    replies = [record for record in joint_replies(folder) if record["reply"].startswith("Sure")]
    assert replies
    assert all(record["mentions"] == ["Sure"] for record in replies)


def with_interval(rate: dict[str, Any], name: str) -> str:
    """As the log has a percentage."""
    return f"{rate[name]:.0f} % [{rate[f'{name}_low']:.0f}, {rate[f'{name}_high']:.0f}]"


@pytest.mark.parametrize("name", ["replying", "refusing"])
def test_the_rates_are_in_run_json_and_in_the_log(name: str, runs: dict[str, Path]) -> None:
    folder, records = runs[name], pd.DataFrame(generations(runs[name]))
    rates, log = rates_of(folder), (folder / "run.log").read_text()
    samples = {sample["sample_id"]: sample for sample in record_of(folder)["samples"]}
    steps = [("held-out", n) for n in range(len(chosen_in(folder)) + 1)]
    assert [(rate["samples"], rate["n_ablated"]) for rate in rates] == [("all", 0), *steps]
    randoms = records[records["set"] == "random"]
    records = records[records["set"] != "random"]
    held_out = records[records["sample_id"].isin(halves(folder)[1])]
    for rate in rates:
        group = records if rate["samples"] == "all" else held_out
        for side in "ab":
            same = (group["n_ablated"] == rate["n_ablated"]) & (group["prompt"] == side)
            for name in ("mentions", "answers"):
                share = 100 * group[same][name].map(bool).mean()
                assert rate[f"{name}_{side}"] == pytest.approx(share)
                check_interval(rate, f"{name}_{side}")
            alike = 100 * tracing.share_alike(group[same]["reply"])
            assert rate[f"alike_{side}"] == pytest.approx(alike)
            before = (group["n_ablated"] == 0) & (group["prompt"] == side)
            if not rate["n_ablated"]:
                assert f"change_{side}" not in rate
                continue
            change = rate[f"mentions_{side}"] - 100 * group[before]["mentions"].map(bool).mean()
            assert rate[f"change_{side}"] == pytest.approx(change)
        units = {samples[sample_id]["unit"] for sample_id in group["sample_id"]}
        assert rate["n_sentences"] == len(units)
        start = f"({rate['samples']}, {rate['n_ablated']} edited)"
        assert f"{start}: {with_interval(rate, 'mentions_a')} " in log
        end = f"{with_interval(rate, 'answers_b')} to b are answers, "
        end += f"{rate['alike_b']:.0f} % are alike"
        assert f"{end} or repeat themselves\n" in log[log.index(start) :]
    shown = randoms[randoms["prompt"] == "a"].groupby("draw")["mentions"]
    shares = shown.apply(lambda mentions: 100 * mentions.map(bool).mean())
    reach = f"{shares.min():.0f} to {shares.max():.0f} %"
    if shares.max() == shares.min():
        reach = f"{shares.max():.0f} %"
    size = randoms["n_ablated"].max()
    (told,) = re.findall(f"replies with .* random sets? of {size} edited that .*", log)
    assert f": {reach} after a" in told


UNEDITED: dict[str, Any] = {"samples": "all", "set": "", "draw": 0, "n_ablated": 0}
UNEDITED |= {"answers": True, "mentions_before": False}


def test_the_rates_by_hand() -> None:
    replies = [
        ("s", "a", 0, [], False, "one"),
        ("t", "a", 0, ["x"], True, "One "),
        ("s", "b", 0, ["x", "y"], True, "one"),
        ("t", "b", 0, ["x"], True, "no no no no no"),
        ("t", "a", 2, ["x"], False, "one"),
        ("t", "b", 2, [], False, ""),
    ]
    columns = ["sample_id", "prompt", "n_ablated", "mentions", "answers", "reply"]
    table = pd.DataFrame(replies, columns=columns)
    table["text"] = table["unit"] = table["sample_id"]
    table = table.assign(set="", draw=0, mentions_before=[False, True, True, True, True, True])
    table["mentions"] = table["mentions"].map(bool)
    unedited, t_alone = table[table["n_ablated"] == 0], table[table["sample_id"] == "t"]
    groups = [unedited.assign(samples="all"), t_alone.assign(samples="held-out")]
    rates = tracing.behaviour_rates(pd.concat(groups))
    names = [f"{name}_{side}" for side in "ab" for name in ("mentions", "answers", "alike")]
    assert [[rate[name] for name in ("samples", "n_ablated", *names)] for rate in rates] == [
        ["all", 0, 50, 50, 100, 100, 100, 50],
        ["held-out", 0, 100, 100, 0, 100, 100, 100],
        ["held-out", 2, 100, 0, 0, 0, 0, 0],
    ]
    assert [rate["n_sentences"] for rate in rates] == [2, 1, 1]
    assert [rate.get("change_b") for rate in rates] == [None, None, -100]
    # Wilson 1927 for 1 of 2 and for 1 of 1: 1 / (1 + z^2 / n), with z = 1.96
    low, high = rates[0]["mentions_a_low"], rates[0]["mentions_a_high"]
    assert (low, high) == pytest.approx((9.45, 90.55), abs=0.01)
    low, high = rates[1]["answers_b_low"], rates[1]["answers_b_high"]
    assert (low, high) == pytest.approx((20.65, 100), abs=0.01)


def test_samples_of_one_sentence_count_once_in_the_interval_of_a_rate() -> None:
    replies = [(f"s{i}", f"u{i // 4}", "a", f"x{i}", "one") for i in range(8)]
    table = pd.DataFrame(replies, columns=["sample_id", "unit", "prompt", "text", "reply"])
    table["mentions"] = [True] * 4 + [False] * 4
    (rate,) = tracing.behaviour_rates(table.assign(**UNEDITED))
    assert (rate["mentions_a"], rate["n_sentences"]) == (50, 2)
    assert rate["mentions_a_low"] == pytest.approx(9.45, abs=0.01)


def test_equal_replies_to_the_same_prompt_are_not_alike() -> None:
    """Two samples that share prompt b have one reply to it."""
    replies = [("s", "a", "x", "one"), ("t", "a", "y", "one"), ("s", "b", "z", "two")]
    replies += [("t", "b", "z", "two"), ("u", "b", "w", "three")]
    table = pd.DataFrame(replies, columns=["sample_id", "prompt", "text", "reply"])
    table["mentions"] = False
    table["unit"] = table["sample_id"]
    (rate,) = tracing.behaviour_rates(table.assign(**UNEDITED))
    assert (rate["alike_a"], rate["alike_b"]) == (100, 0)


ALIKE: dict[tuple[str, ...], float] = {
    ("red", "blue", "green"): 0,
    ("red", "Red ", "green", "blue"): 1 / 2,
    ("", "", "green"): 2 / 3,
    ("red", "red", "red", "blue", "blue"): 3 / 5,  # the commonest alone
    ("no no no no", "yes"): 1 / 2,
    ("no no no", "!!!!", "yes"): 2 / 3,
    ("SureSureSureSu", "hahaha", "banana", "haha"): 1 / 2,  # three times over, or not
    ("no no", "!!", "mississippi", "yes"): 0,  # too short to repeat themselves
    ("a b a b a", "a b c a b c", "yes"): 1 / 3,  # more than half is said before, or half
    ("no no no no", "no no no no", "yes"): 2 / 3,  # counted once
}


def test_a_long_reply_repeats_itself_where_it_ends_in_a_loop() -> None:
    """Of a long text, more than half of the words are said before; a loop goes on to the end."""
    paragraphs = []
    for number in range(9):
        paragraphs.append(" ".join(f"word{(100 * number + step) % 150}" for step in range(90)))
    assert not tracing.repeats_itself(" ".join(paragraphs))
    assert tracing.repeats_itself(" ".join([*paragraphs, "on " * 80]))
    assert not tracing.repeats_itself("on " * 80 + paragraphs[0] + " " + paragraphs[1])


@pytest.mark.parametrize("replies", ALIKE)
def test_the_share_of_replies_that_are_alike_by_hand(replies: tuple[str, ...]) -> None:
    assert tracing.share_alike(replies) == pytest.approx(ALIKE[replies])


# ----- in batches


def test_replies_in_a_batch_are_those_of_each_alone(llama: str, tmp_path: Path) -> None:
    """Of prompts of different lengths, with edits, at any number of rows."""
    replies = []
    for rows in ("1", "3", "64"):
        flags = [*REPLYING.split(), "--op", "mean", "--rows_per_forward", rows]
        replies.append(generations(finish(llama, tmp_path / rows, *flags)))
    assert replies[0] == replies[1] == replies[2]
    assert len({record["reply"] for record in replies[0]}) > 5


def test_replies_are_greedy_whatever_is_configured(
    llama: str, tmp_path: Path, plain: Plain
) -> None:
    """A repetition penalty, which some models ship, would shun words that the prompt names."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    configured = {"eos_token_id": [1], "repetition_penalty": 9.0, "do_sample": True, "top_k": 3}
    configured |= {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 200))}
    (model / "generation_config.json").write_text(json.dumps(configured))
    flags = "--num_samples 4 --layers 0 --max_new_tokens 5 --given L0H0"
    folder = finish(str(model), tmp_path / "run", *flags.split())
    users = list(itertools.chain(*(texts.values() for texts in by_hand.texts(folder).values())))
    expected = [naive_reply(plain, user, 5, ["L0H0"]) for user in users]
    assert [record["reply"] for record in generations(folder)] == expected

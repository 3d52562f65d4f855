"""Circuits scaled by factors: what the model then says, and the table of it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves
from conftest import Answer, finish, read, refuses, write_samples

COLUMNS = (
    "factor tokens set draw components lent side measure mean_delta ci_low ci_high kl kl_reply "
)
COLUMNS += "n n_sentences shown shown_low shown_high answers answers_low answers_high repeating"
REPLYING = "--num_samples 4 --max_new_tokens 4 --num_random 2"
RANDOM = ["--random_replies", "1"]  # how many random sets are scaled beside
RUNS = {  # the words of joint; "confirmed" follows a trace in its folder
    "confirmed": ["--max_new_tokens", "4", "--num_random", "2", "--multipliers", "0,1,-6"],
    "named": f"L1N5,L2H3,L1N40 {REPLYING} --multipliers 1,-9".split(),
    "patched": f"L1H2,L2H0 {REPLYING} --op patch --positions last --multipliers -6".split(),
}
CONFIRM = ["--num_samples", "4", "--confirm", "2", "--num_random", "2"]
pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def runs(llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    finish(llama, folders["confirmed"], *CONFIRM)
    return {name: finish(llama, folders[name], "joint", *RUNS[name], *RANDOM) for name in RUNS}


@pytest.fixture(scope="module")
def plain(llama: str) -> Any:
    return naive.load(llama)


def steered(folder: Path) -> pd.DataFrame:
    return read(folder, "circuit_steer.csv")


def joint_replies(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "joint_generations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def sample_ids(folder: Path) -> list[str]:
    """The samples that are steered: held-out ones where the run chose its circuit."""
    return halves(folder)[1] if (folder / "circuit.json").exists() else [*by_hand.texts(folder)]


def scaled_reply(plain: Any, user: str, labels: Iterable[str], factor: float) -> str:
    """A greedy loop of full forwards with some components' columns multiplied throughout."""
    model, tokenizer = plain

    def scaling(label: str) -> tuple[Any, naive.Replace]:
        component = tracing.Component.parse(label)
        layer, kind = component.layer, component.kind
        module = naive.module_of(model, layer, kind)
        scale = torch.ones(module.in_features)
        scale[naive.span_of(model, layer, kind, component.index)] = factor
        return module, lambda x: x * scale

    ends = {tokenizer.eos_token_id, *model.generation_config.eos_token_id}
    with naive.all_hooked(map(scaling, labels)):
        tokens = naive.greedy(model, naive.prompt_ids(tokenizer, user), 4, ends)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


# ----- replies


@pytest.mark.parametrize("name", RUNS)
def test_steered_replies_are_those_of_a_plain_loop_with_multiplied_columns(
    name: str, runs: dict[str, Path], plain: Any
) -> None:
    folder, texts = runs[name], by_hand.texts(runs[name])
    records = [r for r in joint_replies(folder) if r["multiplier"] is not None]
    sets = steered(folder)[["components", "factor"]].drop_duplicates()
    expected = []
    for labels, factor in sets.itertuples(index=False, name=None):
        for sample_id, side in itertools.product(sample_ids(folder), "ab"):
            expected.append((labels, factor, sample_id, side))
    keys = ("ablated", "multiplier", "sample_id", "prompt")
    assert sorted(tuple(r[key] for key in keys) for r in records) == sorted(expected)
    for record in records:
        user, labels = texts[record["sample_id"]][record["prompt"]], record["ablated"].split()
        assert record["reply"] == scaled_reply(plain, user, labels, record["multiplier"])
        assert record["n_ablated"] == len(labels)
    replies = {(r["sample_id"], r["prompt"], r["reply"]) for r in joint_replies(folder)}
    assert len(replies) > len({reply[:2] for reply in replies}), "some reply is changed"


# ----- circuit_steer.csv


@pytest.mark.parametrize("name", RUNS)
def test_the_table_has_a_row_per_factor_set_and_side(name: str, runs: dict[str, Path]) -> None:
    rows, ids = steered(runs[name]), sample_ids(runs[name])
    assert list(rows) == COLUMNS.split()
    flags = RUNS[name]
    factors = [float(f) for f in flags[flags.index("--multipliers") + 1].split(",")]
    expected = list(itertools.product(("circuit", "random"), factors, "ab"))
    assert list(rows[["set", "factor", "side"]].itertuples(index=False, name=None)) == expected
    assert len(ids) == (2 if name == "confirmed" else 4)
    assert (rows["n"] == len(ids)).all()
    records = [r for r in joint_replies(runs[name]) if r["multiplier"] is not None]
    for row in rows.itertuples():
        key = (row.components, row.factor, row.side)
        same = [r for r in records if (r["ablated"], r["multiplier"], r["prompt"]) == key]
        assert {r["sample_id"] for r in same} == set(ids)
        shown = sum(bool(r["mentions"]) for r in same)
        ends = tracing.share_interval(shown / len(ids), row.n_sentences)
        assert (row.shown, row.shown_low, row.shown_high) == (shown / len(ids), *ends)
        assert row.answers == sum(r["answers"] for r in same) / len(ids)
        assert row.repeating == sum(tracing.repeats_itself(r["reply"]) for r in same) / len(ids)
    if name != "patched":
        assert (rows[rows["factor"] == 1]["kl"] == 0).all()
        assert (rows[rows["factor"] == 1]["kl_reply"] == 0).all()
    assert (rows[rows["factor"] < 0]["kl"] > 1e-4).all()


@pytest.mark.parametrize("name", RUNS)
def test_the_random_set_is_of_the_same_layers_and_kinds(name: str, runs: dict[str, Path]) -> None:
    sets = steered(runs[name]).groupby("set")["components"].unique()
    circuit, drawn = ([*map(tracing.Component.parse, sets[s].item().split())] for s in sets.index)
    assert len({*circuit, *drawn}) == len(circuit) + len(drawn)
    assert Counter((c.layer, c.kind) for c in circuit) == Counter((c.layer, c.kind) for c in drawn)


@pytest.mark.parametrize("name", ["named", "patched"])
def test_mean_delta_is_that_of_a_run_that_scales_the_same_components(
    name: str, runs: dict[str, Path], llama: str, tmp_path: Path
) -> None:
    rows = steered(runs[name]).query("side == 'a' and factor < 0")
    for row in rows.itertuples():
        flags = ["--num_samples", "4", "--num_random", "1", "--op", "scale"]
        words = ["joint", row.components.replace(" ", ","), *flags, "--factor", str(row.factor)]
        joint = read(finish(llama, tmp_path / row.set, *words), "circuit_joint.csv")
        (same,) = joint[joint["set"] == "named"].itertuples()
        assert row.mean_delta == pytest.approx(same.mean_delta, abs=1e-5)
        ends = [same.ci_low, same.ci_high]
        assert [row.ci_low, row.ci_high] == pytest.approx(ends, abs=1e-5)
        both = steered(runs[name]).query("set == @row.set and factor == @row.factor")
        assert both["kl"].tolist() == pytest.approx([same.kl_a, same.kl_b], rel=1e-4)
        assert both["mean_delta"].nunique() == 1


def test_a_chosen_circuit_is_steered_on_the_held_out_sentences(runs: dict[str, Path]) -> None:
    """At factor 0 it is what the confirmation measures, at 1 nothing."""
    folder = runs["confirmed"]
    joint = read(folder, "circuit_confirm.csv").query("n_ablated == 2 and set == 'chosen'").iloc[0]
    rows = steered(folder).query("set == 'circuit' and side == 'a'").set_index("factor")
    best = [c["label"] for c in json.loads((folder / "circuit.json").read_text())["components"]]
    assert rows["components"].unique().tolist() == [" ".join(best)] == [joint["components"]]
    assert rows["mean_delta"][0] == pytest.approx(joint["mean_delta"], abs=1e-5)
    assert rows["kl"][0] == pytest.approx(joint["kl_a"], rel=1e-4)
    held = read(folder).query("sample_id in @ids", local_dict={"ids": halves(folder)[1]})
    base = held.drop_duplicates("sample_id")["delta_logit_base"].mean()
    assert rows["mean_delta"][1] == pytest.approx(base, abs=1e-5)


SHARES = {(0, 8): (0, 0.324), (4, 8): (0.215, 0.785), (8, 8): (0.676, 1), (1, 1): (0.207, 1)}
SHARES[2, 20] = (0.028, 0.301)


@pytest.mark.parametrize(("seen", "n"), SHARES)
def test_the_interval_of_a_share_by_hand(seen: int, n: int) -> None:
    assert tracing.share_interval(seen / n, n) == pytest.approx(SHARES[seen, n], abs=6e-4)


def wilson_interval(share: float, n: int) -> list[float]:
    """The shares p whose distance from the seen one is 1.96 standard errors of p, by bisection."""

    def exceeds(p: float) -> bool:
        return abs(share - p) > 1.959964 * math.sqrt(p * (1 - p) / n)

    ends = []
    for far in (0.0, 1.0):
        outside, inside = far, share
        while exceeds(outside) and abs(outside - inside) > 1e-9:
            middle = (outside + inside) / 2
            if exceeds(middle):
                outside = middle
            else:
                inside = middle
        ends.append(outside)
    return ends


@pytest.mark.parametrize(("n_shown", "n", "n_sentences"), [(0, 6, 3), (2, 6, 3), (6, 6, 2)])
def test_the_interval_of_replies_is_over_sentences(n_shown: int, n: int, n_sentences: int) -> None:
    mentions = [["apple"]] * n_shown + [[]] * (n - n_shown)
    replies = pd.DataFrame({"mentions": mentions, "answers": True, "reply": "Well."})
    judged = tracing.shares_of_replies(replies, n_sentences)
    assert (judged["n"], judged["n_sentences"]) == (n, n_sentences)
    assert judged["shown"] == pytest.approx(n_shown / n)
    ends = [judged["shown_low"], judged["shown_high"]]
    assert ends == pytest.approx(wilson_interval(n_shown / n, n_sentences), abs=1e-6)
    assert ends != pytest.approx(wilson_interval(n_shown / n, n), abs=0.02)
    ends = [judged["answers_low"], judged["answers_high"]]
    assert ends == pytest.approx(wilson_interval(1.0, n_sentences), abs=1e-6)


def test_samples_of_one_sentence_count_once_in_the_interval(llama: str, tmp_path: Path) -> None:
    """Six samples of three sentences: as many replies, half as many independent ones."""
    records = []
    for sentence in ("Name a fruit.", "Name a pet.", "Name a metal."):
        records += [{"sentence": sentence, "targets": [word]} for word in ("apple", "iron")]
    samples = write_samples(tmp_path / "samples.jsonl", *records)
    words = f"joint L0H1 --samples {samples} --multipliers 0 --max_new_tokens 2 --num_random 1"
    rows = steered(finish(llama, tmp_path / "run", *words.split()))
    assert {*rows["n"]} == {6} and {*rows["n_sentences"]} == {3}
    for row in rows.itertuples():
        expected = wilson_interval(row.shown, 3)
        assert [row.shown_low, row.shown_high] == pytest.approx(expected, abs=1e-6)


# ----- the rest of a run


def test_the_figure_has_two_labelled_axes(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(tracing, "save_figure", lambda figure, path: figures.append(figure))
    path = tmp_path / "steer.png"
    tracing.draw_steering(steered(runs["named"]), "L1N5 L2H3", tracing.SUPPRESSION, path)
    left, right = figures[0].axes
    assert left.get_xlabel() == right.get_xlabel() == "factor"
    assert "mention a forbidden word" in left.get_ylabel()
    assert "a - b" in right.get_ylabel()
    assert len(left.lines) == 4  # of two sets after two prompts
    for folder in runs.values():
        assert (folder / "circuit_steer.png").read_bytes().startswith(b"\x89PNG")


def test_without_multipliers_none_is_left(
    runs: dict[str, Path], llama: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(runs["confirmed"], tmp_path / "run"))
    finish(llama, folder, "joint", *RUNS["confirmed"][:-2])
    assert not list(folder.glob("circuit_steer*"))
    assert all(record["multiplier"] is None for record in joint_replies(folder))


@pytest.mark.parametrize("flags", ["", "--max_new_tokens 0"])
def test_multipliers_need_replies(flags: str, answer: Answer) -> None:
    words = ["joint", "L0H0", "--model_id", "nowhere", "--multipliers", "0,1", *flags.split()]
    refuses(answer, *words, says=["--multipliers scale components or directions in replies"])


def test_random_sets_are_scaled_with_multipliers_alone(answer: Answer) -> None:
    words = ["joint", "L0H0", "--model_id", "nowhere", "--random_replies", "2"]
    refuses(answer, *words, says=["--random_replies 2 are scaled by --multipliers: give these"])


def test_a_set_of_more_than_half_of_all_is_scaled_alone(llama: str, tmp_path: Path) -> None:
    heads = [f"L{n}H{i}" for n in range(3) for i in range(4)][:7]
    flags = "--num_samples 2 --max_new_tokens 1 --multipliers 0"
    folder = finish(llama, tmp_path, "joint", ",".join(heads), *flags.split())
    assert steered(folder)["set"].tolist() == ["circuit"] * 2
    assert "no random set is scaled" in (folder / "run.log").read_text()
    assert not read(folder, "circuit_joint.csv")["set"].str.startswith("random").any()


def test_the_log_tells_each_row(runs: dict[str, Path]) -> None:
    log = (runs["confirmed"] / "run.log").read_text()
    rows = steered(runs["confirmed"])
    for row in rows[rows["set"] == "circuit"].itertuples():
        same = (rows["set"] == "random") & (rows["factor"] == row.factor)
        (beside,) = rows[same & (rows["side"] == row.side)].itertuples()
        line = f"x {row.factor:g}, prompt {row.side}: {row.shown:.0%} "
        line += f"[{row.shown_low:.0%}, {row.shown_high:.0%}] of 2 mention a forbidden word"
        line += f" (random sets {beside.shown:.0%}), "
        line += f"{row.answers:.0%} [{row.answers_low:.0%}, {row.answers_high:.0%}] are answers, "
        assert line in log
        rest = log[log.index(line) :]
        rest = rest[: rest.index("\n")]
        assert f"KL {row.kl:.2g}, {row.kl_reply:.2g} per token of the unedited reply" in rest
        start = f"x {row.factor:g}: mean a - b {row.mean_delta:+.3f} [{row.ci_low:+.3f}, "
        (told,) = [text for text in log.splitlines() if start in text]
        mean = f"{beside.mean_delta:+.3f}"
        assert told.endswith(f"; with 1 random set scaled alike {mean}")

"""Log P of each scored word before and after an edit: against plain forwards and against the scores
of the other tables, and what is said of targets and foils."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared
from conftest import TINY, finish, read, record_of, write_samples
from llama3_circuit_tracing import Component, Findings, JointSet
from test_sets import with_parts

CLOSE = 2e-5  # nats, of a plain forward in float32
ADDS_UP = 1e-6  # nats, of scores that are made of the words
TRACE, JOINT = "circuit_words.csv", "circuit_joint_words.csv"
COLUMNS = ["label", "components", "sample_id", "side", "word", "role"]
COLUMNS += ["log_p_before", "log_p_after", "change"]
pytestmark = pytest.mark.usefixtures("coarse_figures")


# ----- rows add up to the scores


def margin(targets: Sequence[float], foils: Sequence[float]) -> float:
    return math.log(sum(map(math.exp, targets))) - math.log(sum(map(math.exp, foils)))


SCORE: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "suppression": lambda targets, foils: sum(targets) / len(targets),
    "refusal": margin,
    "odd_one_out": lambda targets, foils: math.log(sum(map(math.exp, targets))) - max(foils),
    "contrast": margin,
}


def score_of(task: str, words: pd.DataFrame, column: str) -> float:
    """The score of one prompt from its words."""
    targets = words[words["role"] == "target"][column].tolist()
    foils = words[words["role"] == "foil"][column].tolist()
    return SCORE[task](targets, foils)


def scores_by_hand(task: str, words: pd.DataFrame, label: str) -> dict[tuple[str, str, str], float]:
    """By sample, side and run (base or head) the score of one label's words."""
    scores = {}
    of_label = words[words["label"] == label]
    for (sample_id, side), rows in of_label.groupby(["sample_id", "side"]):
        scores[sample_id, side, "base"] = score_of(task, rows, "log_p_before")
        scores[sample_id, side, "head"] = score_of(task, rows, "log_p_after")
    return scores


def strongest(heads: pd.DataFrame, top_k: int) -> pd.DataFrame:
    """In place of `clear_components`: random models have none."""
    return heads.sort_values("role", key=abs, ascending=False, kind="stable").head(min(top_k, 4))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Samples of one's own: pairs, and lone prompts, with several targets and foils."""
    folder = tmp_path_factory.mktemp("files")
    pairs, lone, several = [], [], []
    for word in ("fruit", "bird", "drink", "insect"):
        record = {"prompt_a": f"Do not name a {word} here.", "targets": ["apple", "oak", "iron"]}
        record["foils"] = ["golf", "milk"]
        lone.append(record)
        pairs.append({**record, "prompt_b": f"Do please name a {word} here."})
        several.append({**pairs[-1], "foils": []})
    return {
        "pairs": write_samples(folder / "pairs.jsonl", *pairs),
        "several": write_samples(folder / "several.jsonl", *several),
        "lone": write_samples(folder / "lone.jsonl", *lone),
    }


RUNS = {
    "suppression": "--num_samples 6 --controls",
    "several targets": "--samples several --kind mlp --op mean",
    "refusal": "--task refusal --num_samples 4 --kind attn --op patch --bf16",
    "odd_one_out": "--task odd_one_out --num_samples 10 --kind value --layers 0-1",
    "pairs": "--task contrast --samples pairs --kind resid --op patch --patch_into b",
    "lone": "--task contrast --samples lone --op scale --factor 2 --layers 0-1",
    "tokens": "--task contrast --samples pairs --target_form literal --given L0H1 --layers 1",
}


@pytest.fixture(scope="module", params=RUNS)
def traced(
    request: Any, llama: str, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    """The name, task and folder of a trace, and of a joint edit in the same folder."""
    name = request.param
    words = [files.get(word, word) for word in RUNS[name].split()]
    words += ["--confirm", "1" if "--kind" in words else "3", "--num_random", "1"]
    words += [] if "--bf16" in words else ["--no-bf16"]
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "clear_components", strongest)
        finish(llama, folder, *words)
    named = read(folder, "circuit_heads.csv")["label"].iloc[-1]
    if name == "suppression":  # of the sentences that did not choose them
        named = folder / "circuit.json"
    assert tracing.main(["joint", str(named), "--output_dir", str(folder)]) == 0
    task = record_of(folder)["experiment"]["options"]["task"]
    return name, str(task), folder


def test_the_words_of_a_component_add_up_to_its_scores(traced: tuple[str, str, Path]) -> None:
    """Before and after, on every side; negative controls and affirmative ones are left out."""
    name, task, folder = traced
    words = read(folder, TRACE)
    assert list(words) == COLUMNS
    results = read(folder)
    results["label"] = read_labels(results)
    labels = [label for label in words["label"].unique() if label != "chosen"]
    heads = read(folder, "circuit_heads.csv")
    assert labels == strongest(heads, 10)["label"].tolist()
    sides = {"a"} if name == "lone" else {"a", "b"}
    sides |= {"other"} if name == "suppression" else set()
    assert set(words["side"]) == sides
    for label in labels:
        scores = scores_by_hand(task, words, label)
        rows = results[results["label"] == label].set_index("sample_id")
        real = rows[rows["group"] != tracing.NO_ODD_ONE]
        if task == "odd_one_out":
            assert len(real) < len(rows)
        assert {sample_id for sample_id, _, _ in scores} == set(real.index)
        for (sample_id, side, run), score in scores.items():
            assert score == pytest.approx(rows.loc[sample_id, f"score_{side}_{run}"], abs=ADDS_UP)
    assert (words["change"] - (words["log_p_after"] - words["log_p_before"])).abs().max() < 1e-12
    assert words["change"].abs().max() > 1e-3


def read_labels(results: pd.DataFrame) -> list[str]:
    labels = []
    for layer, kind, index in results[["layer", "kind", "index"]].itertuples(index=False):
        labels.append(Component(layer, kind, -1 if math.isnan(index) else int(index)).label)
    return labels


@pytest.mark.parametrize("command", ["trace", "joint"])
def test_the_words_of_a_set_add_up_to_its_mean(command: str, traced: tuple[str, str, Path]) -> None:
    """Of the largest chosen set on the held-out sentences, and of the named one on all."""
    name, task, folder = traced
    label = "chosen" if command == "trace" else "named"
    words = read(folder, TRACE if command == "trace" else JOINT)
    scores = scores_by_hand(task, words, label)
    rows = read(folder, "circuit_confirm.csv" if command == "trace" else "circuit_joint.csv")
    rows = rows[(rows["set"] == label) & rows["measure"].isin(["a - b", "a"])]
    whole = rows[rows["n_ablated"] == rows["n_ablated"].max()].iloc[0]
    of_label = words[words["label"] == label]
    assert set(of_label["components"]) == {whole["components"]}
    samples = sorted(set(of_label["sample_id"]))
    assert len(samples) == whole["n_samples"]
    deltas = [scores[sample, "a", "head"] for sample in samples]
    moved = [scores[sample, "a", "head"] - scores[sample, "a", "base"] for sample in samples]
    if name != "lone":
        deltas = [delta - scores[s, "b", "head"] for delta, s in zip(deltas, samples, strict=True)]
    assert sum(deltas) / len(samples) == pytest.approx(whole["mean_delta"], abs=ADDS_UP)
    assert sum(moved) / len(samples) == pytest.approx(whole["moved_a"], abs=ADDS_UP)
    if command == "trace":
        choosing = by_hand.halves(folder)[0]
        if task in ("suppression", "refusal"):
            assert not set(choosing) & set(samples)


def test_rows_are_in_the_order_of_labels_samples_sides_and_words(
    traced: tuple[str, str, Path],
) -> None:
    """One each, targets before foils, as the samples have them."""
    _, _, folder = traced
    expected = []
    samples = {sample["sample_id"]: sample for sample in record_of(folder)["samples"]}
    words = read(folder, TRACE)
    for label, rows in words.groupby("label", sort=False):
        for sample_id in rows["sample_id"].drop_duplicates():
            sample = samples[sample_id]
            for side in [s for s in ("a", "b", "other") if s in sample["prompts"]]:
                for role in ("target", "foil"):
                    for word in sample.get(f"{role}s") or ():
                        expected.append((label, sample_id, side, word, role))
    columns = ["label", "sample_id", "side", "word", "role"]
    assert list(words[columns].itertuples(index=False, name=None)) == expected


# ----- each number against plain forwards


def test_log_p_of_each_word_is_that_of_a_plain_forward(llama: str, tmp_path: Path) -> None:
    """With the component, or all of the set, zeroed by plain hooks."""
    words = "--num_samples 4 --no-bf16 --tree_tokens 64"
    experiment = with_parts(prepared(llama, *words.split()), tmp_path)
    parts = (Component.parse("L0H1"), Component.parse("L2H3"))
    joint_sets = [JointSet("L1H2", (Component.parse("L1H2"),)), JointSet("chosen", parts)]
    table = tracing.measure_words(experiment, joint_sets, experiment.trees)
    assert len(experiment.trees) > 1
    assert any(len(sample.targets) > 1 for sample in tracing.samples_of(experiment.prompts))
    model, tokenizer = naive.load(llama)
    n_words = 0
    for prompt in tracing.prompts_a_and_b(experiment.prompts):
        user = prompt.sample.text_of(prompt.side)
        for word in prompt.sample.targets:
            n_words += 1
            before = naive.word_log_prob(model, tokenizer, user, word)
            for joint_set in joint_sets:
                with by_hand.ablated(model, joint_set.text.split()):
                    after = naive.word_log_prob(model, tokenizer, user, word)
                row = table[
                    (table["label"] == joint_set.name)
                    & (table["sample_id"] == prompt.sample.sample_id)
                    & (table["side"] == prompt.side)
                    & (table["word"] == word)
                ].iloc[0]
                assert row["log_p_before"] == pytest.approx(before, abs=CLOSE)
                assert row["log_p_after"] == pytest.approx(after, abs=CLOSE)
                assert row["change"] == pytest.approx(after - before, abs=2 * CLOSE)
    assert len(table) == 2 * n_words


def test_overflow_is_no_number(llama: str, tmp_path: Path) -> None:
    experiment = with_parts(prepared(llama, "--op", "scale", "--factor", "1e38"), tmp_path)
    joint_sets = [JointSet("L0mlp", (Component.parse("L0mlp"),))]
    with pytest.raises(tracing.RunError, match="log P of a word is not finite: activations over"):
        tracing.measure_words(experiment, joint_sets, experiment.trees)


# ----- which components, and what is computed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the trained model, which has clear components."""
    return finish(str(TINY), tmp_path_factory.mktemp("tiny"), "--no-bf16", "--num_samples", "16")


def test_the_clear_components_of_the_largest_roles_are_told(tiny: Path) -> None:
    """Ten in the table, five in sentences."""
    heads = read(tiny, "circuit_heads.csv")
    clear = heads[heads["verdict"].isin(["contributes", "works against"])]
    assert len(clear) > 5
    ordered = clear.sort_values("role", key=abs, ascending=False)["label"].tolist()
    words = read(tiny, TRACE)
    assert words["label"].drop_duplicates().tolist() == ordered[:10]
    log = (tiny / "run.log").read_text()
    told = [line.split(":")[0] for line in log.splitlines() if ": log P of targets" in line]
    assert told == ordered[:5]
    assert "estimate" not in log
    first = words[words["label"] == ordered[0]]
    texts = []
    for side in ("a", "b"):
        of_side = first[first["side"] == side]
        mean = of_side.groupby("sample_id")["change"].mean().mean()
        texts.append(f"after {side} {mean:+.2f} [")
    line = next(line for line in log.splitlines() if line.startswith(f"{ordered[0]}: log P"))
    assert all(text in line for text in texts)
    page = (tiny / "circuit_report.html").read_text()
    assert line in page.replace("&#x27;", "'")


def test_where_nothing_is_clear_there_is_no_file(llama: str, tmp_path: Path) -> None:
    folder = finish(llama, tmp_path, "--num_samples", "2")
    assert not (folder / TRACE).exists()
    assert "words" not in record_of(folder)["commands"]["trace"]["seconds"]


@pytest.mark.usefixtures("no_weights")
def test_a_finished_run_reads_its_words_back(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "run"))
    before = (folder / TRACE).read_bytes()
    (folder / TRACE).unlink()
    finish(str(TINY), folder, "--no-bf16", "--num_samples", "16")
    assert (folder / TRACE).read_bytes() == before


def test_an_interrupted_run_goes_on_to_the_same_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of words are told from those of scores, and from those of KL, by their names."""
    folder = Path(shutil.copytree(tiny, tmp_path / "run"))
    parts = sorted((folder / ".parts").glob("words-*.json"))
    assert len(parts) > 1
    for path in parts[1:]:
        path.unlink()
    before = (folder / TRACE).read_bytes()
    (folder / TRACE).unlink()
    quantities = []
    run_variants = tracing.run_variants

    def spied(*arguments: Any) -> Any:
        quantities.append(arguments[4].quantity)
        return run_variants(*arguments)

    monkeypatch.setattr(tracing, "run_variants", spied)
    finish(str(TINY), folder, "--no-bf16", "--num_samples", "16")
    assert quantities == ["words"] * (len(parts) - 1)
    assert (folder / TRACE).read_bytes() == before
    assert {path.name for path in (folder / ".parts").glob("words-*.json")} == {
        path.name for path in parts
    }


def test_after_estimates_words_are_measured_and_the_log_says_so(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "clear_components", strongest)
    words = ["--num_samples", "3", "--no-bf16", "--method", "atp"]
    folder = finish(llama, tmp_path / "atp", *words)
    assert "by word are all measured, none is an estimate" in (folder / "run.log").read_text()
    table = read(folder, TRACE)
    exact = read(finish(llama, tmp_path / "exact", *words[:3]))
    exact["label"] = read_labels(exact)
    keyed = exact.set_index(["label", "sample_id"])
    for label in table["label"].unique():
        for (sample, side, run), score in scores_by_hand("suppression", table, label).items():
            measured = keyed.loc[(label, sample), f"score_{side}_{run}"]
            assert score == pytest.approx(measured, abs=ADDS_UP)


def test_a_table_that_is_no_longer_due_goes(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "clear_components", strongest)
        finish(llama, tmp_path, "--num_samples", "2")
    assert (tmp_path / TRACE).exists()
    finish(llama, tmp_path, "--num_samples", "2")
    assert not (tmp_path / TRACE).exists()


# ----- means, intervals and sentences


def rows_of_words(changes: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    """As `measure_words` returns them."""
    columns = ["label", "sample_id", "side", "word", "role", "log_p_before", "log_p_after"]
    table = pd.DataFrame(changes, columns=columns)
    table["change"] = table["log_p_after"] - table["log_p_before"]
    table["components"] = "L0H0"
    return table.assign(unit=table["sample_id"], group="", template="")


FEW = rows_of_words(
    [
        ("L0H0", "s0", "a", "x", "target", -1.0, -2.0),
        ("L0H0", "s0", "a", "y", "target", -30.0, -10.0),
        ("L0H0", "s1", "a", "x", "target", -1.0, -1.5),
        ("L0H0", "s0", "a", "z", "foil", -4.0, -1.0),
        ("L0H0", "s1", "a", "z", "foil", -4.0, -2.0),
    ]
)


def test_words_of_a_mean_count_alike_and_those_of_a_margin_as_one_event() -> None:
    """A word that is hardly ever said decides the mean, and nothing of a margin."""
    mean = tracing.word_statistics(FEW, tracing.SUPPRESSION).set_index(["side", "role"])["mean"]
    assert mean["a", "target"] == pytest.approx(((-1 + 20) / 2 - 0.5) / 2)
    assert mean["a", "foil"] == pytest.approx((3 + 2) / 2)
    margins = tracing.word_statistics(FEW, tracing.REFUSAL).set_index(["side", "role"])["mean"]
    before = math.log(math.exp(-1) + math.exp(-30))
    after = math.log(math.exp(-2) + math.exp(-10))
    assert margins["a", "target"] == pytest.approx((after - before - 0.5) / 2)
    assert margins["a", "foil"] == pytest.approx((3 + 2) / 2)


def test_intervals_are_over_sentences() -> None:
    """Two samples of a sentence are no two sentences."""
    rows = []
    for number in range(8):
        for side, shift in (("a", 0.1 * number), ("b", 0.0)):
            rows.append(("L0H0", f"s{number}", side, "x", "target", -3.0, -3.0 + shift))
    words = rows_of_words(rows).assign(unit=[f"u{place // 4}" for place in range(16)])
    statistics = tracing.word_statistics(words, tracing.SUPPRESSION).set_index("side").loc["a"]
    sums = [0.1, 0.5, 0.9, 1.3]
    totals = torch.tensor(sums, dtype=torch.float64)[:, None]
    counts = torch.full((4, 1), 2.0, dtype=torch.float64)
    low, high = tracing.mean_interval(totals, counts, None)
    assert statistics["mean"] == pytest.approx(0.35)
    assert statistics["ci_low"] == pytest.approx(float(low), abs=1e-4)
    assert statistics["ci_high"] == pytest.approx(float(high), abs=1e-4)


def change(mean: float, low: float = math.nan, high: float = math.nan) -> SimpleNamespace:
    return SimpleNamespace(mean=mean, ci_low=low, ci_high=high)


MOVE, NOT_CLEARLY = (
    "the foils move more than the targets",
    "the foils move, the targets not clearly",
)
MOVERS = {
    "foils alone": (change(0.1, -0.1, 0.3), change(-1.2, -1.5, -1), f"; after a {NOT_CLEARLY}"),
    "foils more": (change(0.6, 0.3, 0.9), change(-1.2, -1.5, -1.0), f"; after a {MOVE}"),
    "targets more": (change(1.3, 0.3, 1.9), change(-1.2, -1.5, -1.0), ""),
    "as much": (change(1.2, -0.3, 1.9), change(-1.2, -1.5, -1.0), ""),
    "unclear": (change(0.1, -0.1, 0.3), change(-1.2, -3, 0.1), ""),
    "up to 0": (change(0.1, -0.1, 0.3), change(-1.2, -3, 0.0), ""),
    "one sentence": (change(0.1), change(-1.2), ""),
}


@pytest.mark.parametrize("name", MOVERS)
def test_it_is_said_where_the_foils_move(name: str) -> None:
    targets, foils, sentence = MOVERS[name]
    assert tracing.describe_mover("a", targets, foils) == sentence


def test_the_sentence_of_a_label() -> None:
    changes: dict[tuple[str, str], Any] = {
        ("a", "target"): change(0.61, 0.3, 0.9),
        ("b", "target"): change(-0.02, -0.1, 0.1),
        ("other", "target"): change(5.0, 4.0, 6.0),
    }
    sentence = "L0H6: log P of targets after a +0.61 [+0.30, +0.90], after b -0.02 [-0.10, +0.10]"
    describe = functools.partial(tracing.describe_words, "L0H6")
    assert describe(changes, tracing.SUPPRESSION) == sentence
    changes["a", "foil"] = change(-1.2, -1.5, -1.0)
    changes["b", "foil"] = change(0.0)
    sentence = sentence.replace("targets", "any target")
    sentence += "; of any foil after a -1.20 [-1.50, -1.00], after b +0.00"
    assert describe(changes, tracing.REFUSAL) == f"{sentence}; after a {MOVE}"
    lone = {key: row for key, row in changes.items() if key[0] == "a"}
    sentence = "L0H6: log P of any target after a +0.61 [+0.30, +0.90]; of any foil after a -1.20"
    assert describe(lone, tracing.CONTRAST) == f"{sentence} [-1.50, -1.00]; after a {MOVE}"


def test_a_set_is_told_after_five_components() -> None:
    rows = []
    for label in [*(f"L0H{head}" for head in range(7)), "chosen"]:
        for sample_id in ("s0", "s1", "s2"):
            rows.append((label, sample_id, "a", "x", "target", -3.0, -2.5))
    words = rows_of_words(rows)
    words.loc[words["label"] == "chosen", "components"] = "L0H0 L1H1"
    findings = Findings()
    tracing.report_words(findings, words, tracing.SUPPRESSION)
    names = [entry["text"].split(": ")[0] for entry in findings.entries]
    assert names == ["L0H0", "L0H1", "L0H2", "L0H3", "L0H4", "2 components jointly, 3 sentences"]

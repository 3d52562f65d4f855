"""Several components edited together: which ones, on which sentences, and to what effect."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, prepared
from conftest import Answer, finish, read, write_samples
from llama3_circuit_tracing import Component

CLOSE = 2e-5
COLUMNS = ["samples", "set", "draw", "n_ablated", "components", "n_samples", "n_sentences"]
COLUMNS += ["mean_delta", "share_removed"]
CONFIRM = ["--num_samples", "6", "--confirm", "3", "--num_random", "4"]


@pytest.fixture(scope="module")
def confirmed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM)


def joint_rows(folder: Path) -> pd.DataFrame:
    return read(folder, "circuit_confirm.csv").fillna({"components": ""})


def by_size(rows: pd.DataFrame, name: str = "chosen") -> dict[int, str]:
    """The components of a set by their number."""
    return dict(rows[rows["set"] == name].set_index("n_ablated")["components"])


def naive_delta(
    model: str, folder: Path, sample_ids: Sequence[str], labels: Sequence[str]
) -> float:
    """The mean delta_logit of some samples with some components zeroed."""
    plain, texts, targets = naive.load(model), by_hand.texts(folder), by_hand.targets_of(folder)
    with by_hand.ablated(plain[0], labels):
        a, b = (
            [naive.suppression_score(*plain, texts[i][side], targets[i]) for i in sample_ids]
            for side in "ab"
        )
    return statistics.fmean(a) - statistics.fmean(b)


# ----- which sentences, which components


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_choosing_and_held_out_sentences_are_disjoint_halves(n: int) -> None:
    table = pd.DataFrame({"unit": [f"u{i}" for i in range(n)] * 3, "group": ""})
    choosing, held_out = tracing.split_units(table, 0)
    assert not choosing & held_out
    assert choosing | held_out == set(table["unit"])
    assert len(choosing) - len(held_out) == n % 2
    assert tracing.split_units(table.sample(frac=1, random_state=0), 0) == (choosing, held_out)
    negative = table.assign(unit="n", group=tracing.NO_ODD_ONE)
    assert tracing.split_units(pd.concat([table, negative]), 0) == (choosing, held_out)
    assert len({frozenset(tracing.split_units(table, seed)[0]) for seed in range(9)}) > 1


@pytest.mark.parametrize(
    ("base", "config", "top"),
    [
        (-1.0, {}, ["L1N2", "L0N5", "L0N7"]),
        (1.0, {}, ["L0N7", "L0N5", "L1N2"]),
        (1.0, {"op": "scale", "factor": 2.0}, ["L1N2", "L0N5", "L0N7"]),
    ],
)
def test_the_chosen_components_are_those_of_largest_mean_role(
    base: float, config: dict[str, Any], top: list[str]
) -> None:
    table = by_hand.results({"L0N5": [0.1, 0.2], "L0N7": [-3.0, 0.1], "L1N2": [2.0, 0.1]}, base)
    for k in (1, 2, 3):
        chosen = tracing.choose_top(table, tracing.Config(confirm=k, **config))
        assert [component.label for component in chosen] == top[:k]


def test_a_run_chooses_on_one_half_of_its_sentences(confirmed: Path) -> None:
    table, choosing = read(confirmed), halves(confirmed)[0]
    half = table[table["sample_id"].isin(choosing)]
    sign = -math.copysign(1, half.drop_duplicates("sample_id")["delta_logit_base"].mean())
    roles = sign * half.groupby(["layer", "head"])["head_effect"].mean()
    best = [f"L{layer}H{head}" for layer, head in roles.sort_values(ascending=False).index]
    assert len(choosing) == 3
    assert by_size(joint_rows(confirmed)) == {n: " ".join(best[:n]) for n in (1, 2, 3)}


def test_random_sets_are_nested_disjoint_from_the_chosen_and_of_the_same_layers(
    confirmed: Path,
) -> None:
    rows, largest = joint_rows(confirmed), set()
    chosen = by_size(rows)[3].split()
    for _, drawn in rows[rows["set"] == "random"].groupby("draw"):
        sets = by_size(drawn, "random")
        whole = sets[3].split()
        assert sets == {n: " ".join(whole[:n]) for n in (1, 2, 3)}
        assert len({*whole, *chosen}) == 6
        assert [label[:2] for label in whole] == [label[:2] for label in chosen]
        largest.add(sets[3])
    assert len(largest) > 1


def test_random_components_are_drawn_by_seed_and_none_is_given(llama: str) -> None:
    chosen = [Component(1, "head", 0), Component(2, "head", 0)]
    seeds = [prepared(llama, "--seed", str(seed)) for seed in (1, 1, 2, 3, 4)]
    draws = [tracing.draw_random(chosen, exp, 0) for exp in seeds]
    assert draws[0] == draws[1]
    assert len(set(map(tuple, draws))) > 1
    exp = prepared(llama, "--given", "L1H1,L1H2,L1mlp")
    drawn = [tracing.draw_random(chosen, exp, draw) for draw in range(20)]
    assert {first.label for first, _ in drawn} == {"L1H3"}
    assert {second.label for _, second in drawn} == {"L2H1", "L2H2", "L2H3"}


def test_where_a_layer_has_no_component_left_the_nearest_lends_one_and_it_is_said(
    llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    exp, chosen = prepared(llama, "--num_random", "2"), [Component(1, "head", i) for i in range(3)]
    for draw in range(20):
        drawn = tracing.draw_random(chosen, exp, draw)
        assert drawn[0].label == "L1H3"
        assert {component.layer for component in drawn[1:]} <= {0, 2}
        assert len(set(drawn)) == 3
    crowded = prepared(llama, "--given", "L0H1,L0H2,L0H3,L1H0,L1H1,L1H2,L1H3")
    (far,) = tracing.draw_random([Component(0, "head", 0)], crowded, 0)
    assert far.layer == 2
    caplog.clear()
    tracing.confirm_sets(chosen[:1], exp)
    assert "neighbouring" not in caplog.text
    tracing.confirm_sets(chosen, exp)
    assert re.search("4 random components .* neighbouring layer", caplog.text)


# ----- what becomes of the held-out sentences


def test_the_joint_table_has_its_columns_and_rows_which_the_log_tells(confirmed: Path) -> None:
    rows, told = joint_rows(confirmed), (confirmed / "run.log").read_text()
    assert list(rows) == COLUMNS
    assert set(rows["samples"]) == {"held-out"}
    expected = {("none", 0): 1} | {("chosen", n): 1 for n in (1, 2, 3)}
    expected |= {("random", n): 4 for n in (1, 2, 3)}
    assert Counter(zip(rows["set"], rows["n_ablated"], strict=True)) == expected
    assert (rows[["n_samples", "n_sentences"]] == 3).all(axis=None)
    shares = 1 - rows["mean_delta"] / rows["mean_delta"][0]
    assert rows["share_removed"].tolist() == pytest.approx(shares.tolist())
    for row in rows[rows["set"] == "chosen"].itertuples():
        drawn = shares[(rows["set"] == "random") & (rows["n_ablated"] == row.n_ablated)]
        band = f"random sets {drawn.quantile(0.05):.0%} to {drawn.quantile(0.95):.0%}"
        what = f"held-out samples, {row.n_ablated} jointly ({row.components}): mean delta "
        assert f"{what}{row.mean_delta:+.3f}, {row.share_removed:.0%} removed, {band}" in told


def test_the_joint_effect_on_held_out_sentences_is_what_the_naive_oracle_says(
    confirmed: Path, llama: str
) -> None:
    rows, held_out = joint_rows(confirmed), halves(confirmed)[1]
    random_one = (rows["draw"] == 2) & (rows["n_ablated"] == 3)
    for row in rows[(rows["set"] != "random") | random_one].itertuples():
        expected = naive_delta(llama, confirmed, held_out, row.components.split())
        assert row.mean_delta == pytest.approx(expected, abs=CLOSE), row.components


def test_negative_controls_choose_nothing_and_confirm_nothing(llama: str, tmp_path: Path) -> None:
    """Not even those that share their sentence with a sample that counts."""
    words = {
        "fruit": "apple pear",
        "sport": "golf tennis",
        "bird": "owl robin",
        "gas": "neon xenon",
    }
    records: list[dict[str, Any]] = []
    for kind, pair in words.items():
        for word, group in zip(pair.split(), ("real", tracing.NO_ODD_ONE), strict=True):
            records.append({"targets": [word], "group": group, "prompt_b": f"Name a {kind}."})
            records[-1]["prompt_a"] = f"Don't mention {word}. Name a {kind}."
    samples = write_samples(tmp_path / "mine.jsonl", *records)
    flags = ["--samples", samples, "--confirm", "1", "--num_random", "2", "--layers", "1"]
    table = read(finish(llama, tmp_path, *flags))
    real = table[table["group"] != tracing.NO_ODD_ONE]
    choosing, base = (real[real["sample_id"].isin(half)] for half in halves(tmp_path))
    nothing, deltas = joint_rows(tmp_path).iloc[0], base.drop_duplicates("sample_id")
    assert nothing["n_samples"] == len(deltas) == 2
    assert nothing["mean_delta"] == pytest.approx(deltas["delta_logit_base"].mean(), abs=CLOSE)
    sign = -math.copysign(1.0, choosing["delta_logit_base"].mean())
    best = (sign * choosing.groupby("head")["head_effect"].mean()).idxmax()
    assert by_size(joint_rows(tmp_path)) == {1: f"L1H{best}"}


def test_up_to_half_of_all_components_are_confirmed_by_powers_of_two(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "2", "--confirm", "6", "--num_random", "2"]
    rows = joint_rows(finish(llama, tmp_path, *flags))
    everything = {f"L{layer}H{head}" for layer in range(3) for head in range(4)}
    assert list(by_size(rows)) == [1, 2, 4, 6]
    for drawn in rows[(rows["set"] == "random") & (rows["n_ablated"] == 6)]["components"]:
        assert {*drawn.split(), *by_size(rows)[6].split()} == everything


def test_confirming_needs_two_sentences(llama: str, tmp_path: Path, answer: Answer) -> None:
    flags = ["--num_samples", "1", "--output_dir", str(tmp_path), "--confirm", "2"]
    code, _, error = answer("--model_id", llama, *flags)
    assert code == 2
    assert "--confirm needs at least two different sentences" in error


# ----- a set of one's own


@pytest.mark.parametrize("labels", ["L2H3,L0H1,L2H0", "L1mlp,L0N7,L0N12,L2attn,L0H1"])
def test_a_set_of_ones_own_is_measured_on_all_samples_as_the_naive_oracle_does(
    labels: str, llama: str, tmp_path: Path
) -> None:
    own = {"golf": "sport", "iron": "metal", "owl": "bird", "eagle": "bird"}
    records = [{"sentence": f"Name a {kind}.", "targets": [word]} for word, kind in own.items()]
    samples = write_samples(tmp_path / "mine.jsonl", *records)
    folder = finish(llama, tmp_path, "--samples", samples, "--ablate", labels, "--layers", "1")
    rows = joint_rows(folder)
    assert list(rows) == COLUMNS
    assert rows["set"].tolist() == ["none", "ablate"]
    assert rows["samples"].tolist() == ["all", "all"]
    assert rows["components"].tolist() == ["", labels.replace(",", " ")]
    assert (rows[["n_samples", "n_sentences"]] == [4, 3]).all(axis=None)
    for row in rows.itertuples():
        everyone = list(by_hand.texts(folder))
        expected = naive_delta(llama, folder, everyone, row.components.split())
        assert row.mean_delta == pytest.approx(expected, abs=CLOSE)
    told = f"all samples, {len(labels.split(','))} jointly ({rows['components'][1]}): mean delta "
    assert re.search(re.escape(told) + r"[+-]\d.* removed\n", (folder / "run.log").read_text())


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize(
    ("label", "own", "others", "op"),
    [
        ("L1H2", "head --heads 2", "mlp", "mean"),
        ("L2mlp", "mlp", "head", "mean"),
        ("L0attn", "attn", "neuron --neurons 3", "patch"),
        ("L1resid", "resid", "attn", "patch"),
        ("L1N41", "neuron --neurons 41", "resid", "scale --factor 0.5"),
        ("L2H3", "head --heads 3", "attn", "zero"),
    ],
)
def test_beside_another_kind_a_component_has_the_effect_that_its_own_sweep_finds(
    label: str, own: str, others: str, op: str, positions: str, llama: str, tmp_path: Path
) -> None:
    def run(kind: str, *flags: str) -> Path:
        asked = f"--num_samples 2 --kind {kind} --op {op} --positions {positions}".split()
        return finish(llama, tmp_path / kind.split()[0], *asked, *flags)

    table = read(run(own, "--layers", label[1]))
    rows = joint_rows(run(others, "--layers", "0,2", "--ablate", label))
    means = table[["delta_logit_base", "delta_logit_head"]].mean().tolist()
    assert rows["mean_delta"].tolist() == pytest.approx(means, abs=CLOSE)
    assert means[0] != pytest.approx(means[1], abs=1e-4)


def test_a_base_of_exactly_zero_has_no_share_to_remove(llama: str, tmp_path: Path) -> None:
    """Prompts a and b that are the same text."""
    same = {"prompt_a": "Name a fruit.", "prompt_b": "Name a fruit.", "targets": ["apple"]}
    samples = write_samples(tmp_path / "s.jsonl", same)
    flags = ["--samples", samples, "--layers", "0", "--heads", "0", "--ablate", "L0H1"]
    rows = joint_rows(finish(llama, tmp_path / "run", *flags))
    assert rows["mean_delta"].tolist() == [0.0, 0.0]
    assert rows["share_removed"].isna().all()


# ----- resume


def test_joint_sets_and_replies_that_are_there_are_not_made_again(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*CONFIRM, "--max_new_tokens", "2"]

    def finish_without(name: str, *flags: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(tracing, name, lambda *a: pytest.fail(f"{name} was called"))
            finish(llama, tmp_path, *asked, *flags)
        return (tmp_path / "circuit_confirm.csv").read_bytes()

    before = (finish(llama, tmp_path, *asked) / "circuit_confirm.csv").read_bytes()
    replies = (tmp_path / "generations.jsonl").read_bytes()
    assert finish_without("load_model") == before
    more = finish_without("sweep", "--ablate", "L0H0,L1mlp")
    assert more.startswith(before)
    assert joint_rows(tmp_path)["set"].tolist()[-2:] == ["none", "ablate"]
    assert finish_without("load_model", "--ablate", "L0H0,L1mlp") == more
    fewer = finish_without("sweep", "--num_random", "2")  # an option that comes again wins
    assert len(fewer.splitlines()) == 1 + 1 + 3 + 3 * 2
    assert finish_without("load_model") == before
    assert (tmp_path / "generations.jsonl").read_bytes() == replies

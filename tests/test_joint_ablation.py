"""Several components edited together: which ones, on which sentences, and to what effect."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import Answer, finish, read, write_samples

CLOSE = 2e-5
COLUMNS = ["samples", "set", "draw", "n_ablated", "components", "n_samples", "n_sentences"]
COLUMNS += ["mean_delta", "share_removed"]
N_SAMPLES = 6
CONFIRM = ["--num_samples", str(N_SAMPLES), "--confirm", "3", "--num_random", "4"]
SAMPLES = [
    {"sentence": "Name a sport. Answer in one word.", "targets": ["golf"]},
    {"sentence": "Name a metal. Answer in one word.", "targets": ["iron", "zinc"]},
    {"sentence": "Name a bird. Answer in one word.", "targets": ["owl"]},
    {"sentence": "Name a bird. Answer in one word.", "targets": ["eagle"]},
]


@pytest.fixture(scope="module")
def plain(llama: str) -> tuple[Any, Any]:
    """The model and its tokenizer, as everyone loads them."""
    return naive.load(llama)


@pytest.fixture(scope="module")
def confirmed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("run"), *CONFIRM)


@pytest.fixture()
def experiment(llama: str) -> Callable[..., tracing.Experiment]:
    """What a command line with some flags asks of 3 layers of 4 heads."""

    def prepare(*flags: str) -> tracing.Experiment:
        config = tracing.parse_args(["--model_id", llama, "--num_samples", "2", *flags])
        return tracing.prepare(config, tracing.RunFolder(Path("nowhere")))

    return prepare


def joint_rows(folder: Path) -> pd.DataFrame:
    return read(folder, "circuit_confirm.csv").fillna({"components": ""})


def of_set(rows: pd.DataFrame, name: str) -> dict[int, str]:
    """The components of a set by its size."""
    return dict(rows[rows["set"] == name].set_index("n_ablated")["components"])


def halves(folder: Path) -> tuple[set[str], set[str]]:
    """The sample_ids of the choosing and of the held-out half."""
    table = read(folder)
    unit = table.drop_duplicates("sample_id").set_index("sample_id")["unit"]
    choosing, held_out = (set(unit.index[unit.isin(u)]) for u in tracing.split_units(table, 42))
    return choosing, held_out


def naive_delta(
    plain: tuple[Any, Any], folder: Path, sample_ids: Sequence[str], labels: Sequence[str]
) -> float:
    """The mean delta_logit of some samples with some components zeroed."""
    texts, targets = by_hand.texts(folder), by_hand.targets_of(folder)
    with by_hand.ablated(plain[0], labels):
        deltas = [
            naive.suppression_score(*plain, texts[i]["a"], targets[i])
            - naive.suppression_score(*plain, texts[i]["b"], targets[i])
            for i in sample_ids
        ]
    return statistics.fmean(deltas)


# ----- which sentences, which components


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_choosing_and_held_out_sentences_are_disjoint_halves(n: int) -> None:
    table = pd.DataFrame({"unit": [f"u{i}" for i in range(n)] * 3, "group": ""})
    choosing, held_out = tracing.split_units(table, 0)
    assert not choosing & held_out
    assert choosing | held_out == set(table["unit"])
    assert len(choosing) - len(held_out) == n % 2
    assert tracing.split_units(table.sample(frac=1, random_state=0), 0) == (choosing, held_out)
    chosen = {frozenset(tracing.split_units(table, seed)[0]) for seed in range(9)}
    assert len(chosen) > 1


def test_negative_controls_are_in_neither_half_and_choose_nothing() -> None:
    table = by_hand.results({"L0H0": [0.5] * 4, "L0H1": [0.4] * 4}, [-1.0] * 4)
    negative = table.assign(group=tracing.NO_ODD_ONE, unit="n", delta_logit_base=9.0)
    negative["head_effect"] = negative["head"] * 9.0
    both = pd.concat([table, negative.assign(sample_id="n" + negative["sample_id"])])
    assert set.union(*tracing.split_units(both, 0)) == set(table["unit"])
    assert tracing.choose_top(both, tracing.Config(confirm=1)) == [tracing.Component(0, "head", 0)]


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
    assert len(choosing) == N_SAMPLES // 2
    half = table[table["sample_id"].isin(choosing)]
    sign = -math.copysign(1, half.drop_duplicates("sample_id")["delta_logit_base"].mean())
    roles = sign * half.groupby(["layer", "head"])["head_effect"].mean()
    best = [f"L{layer}H{head}" for layer, head in roles.sort_values(ascending=False).index]
    sets = of_set(joint_rows(confirmed), "chosen")
    assert sets == {n: " ".join(best[:n]) for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("k", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 4, 5]), (6, [1, 2, 4, 6])]
)
def test_the_sizes_of_joint_sets_are_powers_of_two_and_k(
    k: int, sizes: list[int], experiment: Callable[..., tracing.Experiment]
) -> None:
    chosen = [tracing.Component(i % 3, "head", i // 3) for i in range(k)]
    sets = tracing.confirm_sets(chosen, experiment("--num_random", "2"))
    wanted = [("none", 0, 0)] + [("chosen", 0, n) for n in sizes]
    wanted += [("random", draw, n) for draw in range(2) for n in sizes]
    assert [(name, draw, len(components)) for name, draw, components in sets] == wanted


def test_random_sets_are_nested_disjoint_from_the_chosen_and_of_the_same_layers(
    confirmed: Path,
) -> None:
    rows = joint_rows(confirmed)
    chosen = of_set(rows, "chosen")[3].split()
    largest = set()
    for _, drawn in rows[rows["set"] == "random"].groupby("draw"):
        sets = of_set(drawn, "random")
        whole = sets[3].split()
        assert sets == {n: " ".join(whole[:n]) for n in (1, 2, 3)}
        assert len({*whole, *chosen}) == 6
        assert [label[:2] for label in whole] == [label[:2] for label in chosen]
        largest.add(sets[3])
    assert len(largest) > 1


def test_random_components_are_drawn_by_seed_and_none_is_given(
    experiment: Callable[..., tracing.Experiment],
) -> None:
    chosen = [tracing.Component(1, "head", 0), tracing.Component(2, "head", 0)]
    seeds = [experiment("--seed", str(seed)) for seed in (1, 1, 2, 3, 4)]
    draws = [tracing.draw_random(chosen, exp, 0) for exp in seeds]
    assert draws[0] == draws[1]
    assert len(set(map(tuple, draws))) > 1
    exp = experiment("--given", "L1H1,L1H2,L1mlp")
    drawn = [tracing.draw_random(chosen, exp, draw) for draw in range(20)]
    assert {first.label for first, _ in drawn} == {"L1H3"}
    assert {second.label for _, second in drawn} == {"L2H1", "L2H2", "L2H3"}


def test_where_a_layer_has_no_component_left_the_nearest_lends_one_and_it_is_said(
    experiment: Callable[..., tracing.Experiment], caplog: pytest.LogCaptureFixture
) -> None:
    exp, chosen = (
        experiment("--num_random", "2"),
        [tracing.Component(1, "head", i) for i in range(3)],
    )
    for draw in range(20):
        drawn = tracing.draw_random(chosen, exp, draw)
        assert drawn[0].label == "L1H3"
        assert {component.layer for component in drawn[1:]} <= {0, 2}
        assert len(set(drawn)) == 3
    crowded = experiment("--given", "L0H1,L0H2,L0H3,L1H0,L1H1,L1H2,L1H3")
    (far,) = tracing.draw_random([tracing.Component(0, "head", 0)], crowded, 0)
    assert far.layer == 2
    caplog.clear()
    tracing.confirm_sets(chosen[:1], exp)
    assert "neighbouring" not in caplog.text
    tracing.confirm_sets(chosen, exp)
    assert "4 random components come from a neighbouring layer" in caplog.text


# ----- what becomes of the held-out sentences


def test_the_joint_table_has_its_columns_and_rows(confirmed: Path) -> None:
    rows = joint_rows(confirmed)
    assert list(rows) == COLUMNS
    assert set(rows["samples"]) == {"held-out"}
    expected = {("none", 0): 1} | {("chosen", n): 1 for n in (1, 2, 3)}
    expected |= {("random", n): 4 for n in (1, 2, 3)}
    assert Counter(zip(rows["set"], rows["n_ablated"], strict=True)) == expected
    assert (rows[["n_samples", "n_sentences"]] == N_SAMPLES // 2).all(axis=None)
    shares = 1 - rows["mean_delta"] / rows["mean_delta"][0]
    assert rows["share_removed"].tolist() == pytest.approx(shares.tolist())


def test_the_joint_effect_on_held_out_sentences_is_what_the_naive_oracle_says(
    confirmed: Path, plain: tuple[Any, Any]
) -> None:
    rows, held_out = joint_rows(confirmed), sorted(halves(confirmed)[1])
    random_one = (rows["draw"] == 2) & (rows["n_ablated"] == 3)
    for row in rows[(rows["set"] != "random") | random_one].itertuples():
        expected = naive_delta(plain, confirmed, held_out, row.components.split())
        assert row.mean_delta == pytest.approx(expected, abs=CLOSE), row.components


def test_the_log_tells_the_chosen_beside_the_random_sets(confirmed: Path) -> None:
    rows, told = joint_rows(confirmed), (confirmed / "run.log").read_text()
    for row in rows[rows["set"] == "chosen"].itertuples():
        drawn = rows[(rows["set"] == "random") & (rows["n_ablated"] == row.n_ablated)]
        low, high = drawn["share_removed"].quantile(0.05), drawn["share_removed"].quantile(0.95)
        what = f"held-out samples, {row.n_ablated} jointly ({row.components}): mean delta "
        what += f"{row.mean_delta:+.3f}, {100 * row.share_removed:.0f} % removed"
        assert f"{what}, random sets {low:.0%} to {high:.0%}\n" in told


def test_negative_controls_confirm_nothing(llama: str, tmp_path: Path) -> None:
    flags = ["--task", "odd_one_out", "--num_samples", "10", "--confirm", "1", "--num_random", "2"]
    folder = finish(llama, tmp_path, *flags, "--layers", "1")
    table, (choosing, held_out) = read(folder), halves(folder)
    real = table[table["group"] != tracing.NO_ODD_ONE]
    base = real[real["sample_id"].isin(held_out)].drop_duplicates("sample_id")
    nothing = joint_rows(folder).iloc[0]
    assert nothing["n_samples"] == len(base) > 0
    assert nothing["mean_delta"] == pytest.approx(base["delta_logit_base"].mean(), abs=CLOSE)
    half = real[real["sample_id"].isin(choosing)]
    sign = -math.copysign(1.0, half["delta_logit_base"].mean())
    best = (sign * half.groupby("head")["head_effect"].mean()).idxmax()
    assert of_set(joint_rows(folder), "chosen") == {1: f"L1H{best}"}


def test_as_many_components_as_are_chosen_must_be_left_for_the_random_sets(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--num_samples", "2", "--output_dir", str(tmp_path), "--num_random", "2"]
    code, _, error = answer("--model_id", llama, *flags, "--confirm", "7")
    assert code == 2
    assert "--confirm 7" in error
    rows = joint_rows(finish(llama, tmp_path, *flags, "--confirm", "6"))
    everything = {f"L{layer}H{head}" for layer in range(3) for head in range(4)}
    for drawn in rows[(rows["set"] == "random") & (rows["n_ablated"] == 6)]["components"]:
        assert {*drawn.split(), *of_set(rows, "chosen")[6].split()} == everything


def test_confirming_needs_two_sentences(llama: str, tmp_path: Path, answer: Answer) -> None:
    flags = ["--num_samples", "1", "--output_dir", str(tmp_path), "--confirm", "2"]
    code, _, error = answer("--model_id", llama, *flags)
    assert code == 2
    assert "two different sentences" in error


# ----- a set of one's own


@pytest.mark.parametrize("labels", ["L2H3,L0H1,L2H0", "L1mlp,L0N7,L0N12,L2attn,L0H1"])
def test_a_set_of_ones_own_is_measured_on_all_samples_as_the_naive_oracle_does(
    labels: str, llama: str, plain: tuple[Any, Any], tmp_path: Path
) -> None:
    samples = write_samples(tmp_path / "mine.jsonl", *SAMPLES)
    folder = finish(llama, tmp_path, "--samples", samples, "--ablate", labels, "--layers", "1")
    rows = joint_rows(folder)
    assert list(rows) == COLUMNS
    assert rows["set"].tolist() == ["none", "ablate"]
    assert rows["samples"].tolist() == ["all", "all"]
    assert rows["components"].tolist() == ["", labels.replace(",", " ")]
    assert (rows["n_samples"] == 4).all()
    assert (rows["n_sentences"] == 3).all()
    for row in rows.itertuples():
        expected = naive_delta(plain, folder, list(by_hand.texts(folder)), row.components.split())
        assert row.mean_delta == pytest.approx(expected, abs=CLOSE)
    told = f"all samples, {len(labels.split(','))} jointly ({rows['components'][1]}): mean delta "
    assert re.search(re.escape(told) + r"[+-]\d.* removed\n", (folder / "run.log").read_text())


@pytest.mark.parametrize(
    ("label", "swept", "beside", "op"),
    [
        ("L1H2", "head", "mlp", "mean"),
        ("L2mlp", "mlp", "head", "mean"),
        ("L0attn", "attn", "neuron", "patch"),
        ("L1resid", "resid", "attn", "patch"),
        ("L1N41", "neuron", "resid", "scale"),
        ("L2H3", "head", "attn", "zero"),
    ],
)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_component_of_any_kind_has_beside_another_kind_the_effect_that_its_own_sweep_finds(
    label: str, swept: str, beside: str, op: str, positions: str, llama: str, tmp_path: Path
) -> None:
    layer, index = re.findall(r"\d+", label)[0], label[3:]

    def run(kind: str, *flags: str) -> Path:
        needed = {"neuron": ["--neurons", index if kind == swept else "3"]}
        given = ["--kind", kind, *needed.get(kind, []), "--op", op, "--positions", positions]
        given += ["--factor", "0.5"] if op == "scale" else []
        return finish(llama, tmp_path / kind, "--num_samples", "2", *given, *flags)

    table = read(run(swept, "--layers", layer))
    mine = table[table["index"] == int(index)] if index.isdigit() else table
    rows = joint_rows(run(beside, "--layers", "0,2", "--ablate", label)).set_index("set")
    found = rows["mean_delta"].to_dict()
    assert found["none"] == pytest.approx(mine["delta_logit_base"].mean(), abs=CLOSE)
    assert found["ablate"] == pytest.approx(mine["delta_logit_head"].mean(), abs=CLOSE)
    assert found["ablate"] != pytest.approx(found["none"], abs=1e-4)


@pytest.mark.parametrize("label", ["L1H4", "L3mlp", "L0N80"])
def test_a_component_that_the_model_lacks_is_refused_by_name(
    label: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--num_samples", "2", "--output_dir", str(tmp_path), "--ablate", f"L0H0,{label}"]
    code, _, error = answer("--model_id", llama, *flags)
    assert code == 2
    assert label in error


# ----- resume


def test_joint_sets_that_were_measured_are_not_measured_again(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish_without(name: str, *flags: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(tracing, name, lambda *a: pytest.fail(f"{name} was called"))
            finish(llama, tmp_path, *CONFIRM, *flags)
        return (tmp_path / "circuit_confirm.csv").read_bytes()

    first = finish(llama, tmp_path, *CONFIRM) / "circuit_confirm.csv"
    before = first.read_bytes()
    assert finish_without("load_model") == before
    more = finish_without("sweep", "--ablate", "L0H0,L1mlp")
    assert more.startswith(before)
    assert joint_rows(tmp_path)["set"].tolist()[-2:] == ["none", "ablate"]
    assert finish_without("load_model", "--ablate", "L0H0,L1mlp") == more
    fewer = finish_without("sweep", "--num_random", "2")  # an argument that comes again wins
    assert len(fewer.splitlines()) == 1 + 1 + 3 + 3 * 2
    assert finish_without("load_model") == before

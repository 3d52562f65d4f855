"""Which members a set needs, and how faithful a growing part of a model is, kept alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, prepared
from conftest import command_line, finish, read, record_of, write_samples
from llama3_circuit_tracing import Component, ComponentList, JointSet

CLOSE = 2e-5
JOINT, CURVE = "circuit_joint.csv", "circuit_curve.csv"
CHANGE = ["change", "change_low", "change_high"]


def parsed(labels: str) -> tuple[Component, ...]:
    return tuple(map(Component.parse, labels.split()))


def said(folder: Path) -> str:
    findings = record_of(folder)["commands"]["joint"]["findings"]
    return "\n".join(entry["text"] for entry in findings)


def naive_deltas(model: Any, folder: Path, ids: Sequence[str], edit: Any) -> list[float]:
    """Per sample the score of prompt a less that of b with an edit, which is entered anew."""
    texts, targets = by_hand.texts(folder), by_hand.targets_of(folder)
    deltas = []
    for name in ids:
        scores = []
        for side in "ab":
            with edit():
                score = naive.suppression_score(*model, texts[name][side], targets[name])
            scores.append(score)
        deltas.append(scores[0] - scores[1])
    return deltas


# ----- each member left out


def test_each_member_of_a_named_set_is_left_out_in_turn(llama: str, tmp_path: Path) -> None:
    """The others are what naive edits of them give; the change is from the whole set."""
    flags = ["--num_samples", "4", "--num_random", "1"]
    labels = ["L0H1", "L2H3", "L1mlp"]
    folder = finish(llama, tmp_path, "joint", ",".join(labels), *flags)
    table = read(folder, JOINT)
    is_without = table["set"].str.startswith("without ")
    assert table.loc[~is_without, CHANGE].isna().all(axis=None)
    rows = table[is_without].set_index("set")
    assert list(rows.index) == [f"without {label}" for label in labels]
    model, ids = naive.load(llama), sorted(by_hand.texts(folder))
    whole = naive_deltas(model, folder, ids, lambda: by_hand.ablated(model[0], labels))
    for left_out in labels:
        others = [label for label in labels if label != left_out]
        deltas = naive_deltas(
            model, folder, ids, lambda kept=others: by_hand.ablated(model[0], kept)
        )
        changes = [one - all_three for one, all_three in zip(deltas, whole, strict=True)]
        row = rows.loc[f"without {left_out}"]
        assert (row["components"], row["n_ablated"]) == (" ".join(others), 2)
        assert row["mean_delta"] == pytest.approx(statistics.fmean(deltas), abs=CLOSE)
        _, low, high = by_hand.mean_test(changes, [1.0] * len(ids))
        assert row["change"] == pytest.approx(statistics.fmean(changes), abs=CLOSE)
        ends = [row["change_low"], row["change_high"]]
        assert ends == pytest.approx([low, high], abs=0.05 * (high - low))
        is_clear = low > 0 or high < 0
        named = f"{left_out} ({row['change']:+.3f})" if is_clear else "not shown to be needed"
        assert named in said(folder)


def test_both_measures_tell_of_each_member(llama: str, tmp_path: Path) -> None:
    flags = ["--num_samples", "3", "--num_random", "1", "--controls"]
    table = read(finish(llama, tmp_path, "joint", "L0H1,L1H2", *flags), JOINT)
    whole = table[table["set"] == "named"].set_index("measure")["mean_delta"]
    rows = table[table["set"].str.startswith("without ")]
    assert rows["measure"].tolist() == ["a - b", "a - b", "a - other", "a - other"]
    for row in rows.itertuples():
        expected = row.mean_delta - whole[row.measure]
        assert row.change == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 64, 65])
def test_a_set_of_two_to_64_has_its_members_left_out(n: int) -> None:
    components = tuple(Component(0, "neuron", i) for i in range(n))
    sets = tracing.sets_without_each(components)
    assert len(sets) == (n if 2 <= n <= 64 else 0)
    for joint_set, component in zip(sets, components, strict=False):
        assert joint_set.name == f"without {component.label}"
        assert set(joint_set.components) == {*components} - {component}


def reported(changes: dict[str, tuple[float, float, float]], n: int | None = None) -> str:
    """What is said of members by their change with its interval."""
    rows = [{"set": "named", "change": math.nan}]
    for label, values in changes.items():
        rows.append({"set": f"without {label}", **dict(zip(CHANGE, values, strict=True))})
    findings = tracing.Findings()
    tracing.report_changes(
        findings, pd.DataFrame(rows, columns=["set", *CHANGE]), n or len(changes)
    )
    return "\n".join(entry["text"] for entry in findings.entries)


def test_members_are_told_apart_by_whether_their_change_is_clear() -> None:
    changes = {
        "L0H1": (0.5, 0.1, 0.9),
        "L0H2": (0.5, -0.1, 0.9),
        "L0H3": (-0.2, -0.3, -0.1),
        "L0H4": (0.0, 0.0, 0.0),
    }
    start = "leaving one of these out of the set changes the mean (nats, by 95 % intervals that are"
    clear = f"{start} not corrected for their number): L0H1 (+0.500), L0H3 (-0.200)"
    start = "leaving one of these out does not clearly change it, so that they are not shown to be"
    unclear = f"{start} needed: L0H2, L0H4"
    assert reported(changes).splitlines() == [clear, unclear]
    needed = {label: changes[label] for label in ("L0H1", "L0H3")}
    assert reported(needed) == clear
    assert "a single sentence gives no interval" in reported({"L0H1": (0.5, math.nan, math.nan)})
    assert reported({}, 65).startswith("of 65 components none is left out in turn")
    assert reported({}, 1) == ""


# ----- orders and sizes


@pytest.mark.parametrize(
    ("names", "ranking", "sizes"),
    [
        ("L0H1", "", [0, 1, 12]),
        ("L0H1,L0H2,L0H3", "", [0, 1, 2, 3, 12]),
        ("L0H1,L0H2,L0H3", "L1H0", [0, 1, 2, 3, 4, 12]),
        ("L0H1,L0H2,L0H3", "L0H1 L0H2 L0H3 L1H0 L1H1 L1H2", [0, 1, 2, 3, 4, 6, 12]),
        ("L0H1,L0H2,L0H3", "L0H1 L0mlp L0N3 L7H0", [0, 1, 2, 3, 12]),
        ("L0mlp,L1mlp,L2mlp", "", [0, 1, 2, 3]),
    ],
)
def test_sizes_double_up_to_what_is_named_and_ranked(
    names: str, ranking: str, sizes: list[int], llama: str
) -> None:
    experiment = prepared(llama, "joint", names)
    circuit = ComponentList(ranking=parsed(ranking))
    assert tracing.curve_sizes(experiment, circuit) == sizes


def test_what_is_given_is_not_among_all(llama: str) -> None:
    experiment = prepared(llama, "joint", "L0H1", "--given", "L2H0,L2mlp")
    ranking = ComponentList(ranking=parsed("L2H0 L1H1"))
    assert tracing.curve_sizes(experiment, ranking) == [0, 1, 2, 11]
    assert not {*parsed("L2H0 L2mlp")} & {*tracing.components_of_kind(experiment)}
    assert tracing.ordered_components(experiment, ranking) == parsed("L0H1 L1H1")


def orders_of(monkeypatch: pytest.MonkeyPatch, model: str, *flags: str) -> list[tracing.CurveOrder]:
    """The orders of a named set, with activations that fall with the index of a head."""
    experiment = prepared(model, "joint", "L2H3,L0H1", *flags)
    norms = {component: -component.index for component in experiment.shape.components("head")}
    monkeypatch.setattr(tracing, "mean_norms", lambda *_: norms)
    ranking = ComponentList(ranking=parsed("L1H1 L0H1 L1H0"))
    return tracing.curve_orders(experiment, ranking, experiment.units)


def test_orders_are_as_named_at_random_by_seed_and_by_activation(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = orders_of(monkeypatch, llama)
    every = set(prepared(llama).shape.components("head"))
    assert all(len(order.components) == 12 for order in orders)
    assert all(set(order.components) == every for order in orders)
    named, *drawn, activation = orders
    assert named.components[:4] == parsed("L2H3 L0H1 L1H1 L1H0")
    assert [order.name for order in drawn] == ["random"] * 5
    assert [order.draw for order in drawn] == list(range(5))
    assert len({order.components for order in drawn}) == 5
    indices = [component.index for component in activation.components]
    assert indices == sorted(indices)
    assert orders_of(monkeypatch, llama) == orders
    other = orders_of(monkeypatch, llama, "--seed", "1")
    assert other[1:6] != orders[1:6] and other[0] == named
    assert len(orders_of(monkeypatch, llama, "--num_random", "2")) == 4


@pytest.mark.parametrize(("kind", "name"), [("head", "head"), ("mlp", "mlp"), ("value", "value")])
def test_the_mean_norm_is_that_of_a_plain_forward(
    kind: str, name: str, llama: str, tmp_path: Path
) -> None:
    """Over the tokens of prompts a but BOS; in prompts of two lengths."""
    folder = finish(llama, tmp_path, "--num_samples", "3", "--layers", "0", "--heads", "0")
    experiment = prepared(llama, "--num_samples", "3")
    bar = SimpleNamespace(update=lambda: None)
    prompts = experiment.prompts
    norms = tracing.compute_mean_norms(experiment, kind, prompts, bar)  # type: ignore[arg-type]
    model, tokenizer = naive.load(llama)
    components = experiment.shape.components(kind)
    assert len(norms) == len(components)
    sums, n_tokens = [0.0] * len(components), 0
    for sample in by_hand.texts(folder).values():
        ids = naive.prompt_ids(tokenizer, sample["a"])
        n_tokens += len(ids) - 1
        for place, component in enumerate(components):
            x = naive.input_of(model, ids, component.layer, kind)
            span = naive.span_of(model, component.layer, kind, component.index)
            sums[place] += float(x.reshape(len(ids), -1)[1:, span].norm(dim=1).sum())
    expected = [total / n_tokens for total in sums]
    assert norms == pytest.approx(expected, rel=1e-5)


def test_activations_are_of_sentences_that_are_not_measured(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are any."""
    experiment = prepared(llama, "joint", "L0H1", "--num_samples", "4")
    asked: list[set[str]] = []
    norms = dict.fromkeys(experiment.shape.components("head"), 0.0)
    monkeypatch.setattr(tracing, "mean_norms", lambda _, kind, units: asked.append(units) or norms)
    units = experiment.units
    some = {min(units)}
    for measured in (some, units):
        tracing.curve_orders(experiment, ComponentList(), measured)
    assert asked == [units - some, units]


# ----- areas


def test_areas_are_trapezoids_over_the_share_that_is_kept() -> None:
    """Of two orders; faithfulness beyond 1 adds to both."""
    share = [0.0, 0.25, 0.5, 1.0]
    curves = {("named", 0): [0.0, 0.5, 1.5, 1.0], ("random", 2): [0.0, 0.0, -0.5, 1.0]}
    rows = []
    for (order, draw), values in curves.items():
        for x, y in zip(share, values, strict=True):
            rows.append({"order": order, "draw": draw, "share_kept": x, "faithfulness": y})
    areas = tracing.curve_areas(pd.DataFrame(rows)).set_index(["order", "draw"])
    assert areas.loc[("named", 0)].tolist() == pytest.approx(
        [0.25 * 0.25 + 0.25 * 1.0 + 0.5 * 1.25, 0.25 * 0.75 + 0.25 * 0.5 + 0.5 * 0.25]
    )
    assert areas.loc[("random", 2)].tolist() == pytest.approx(
        [0.25 * 0.0 + 0.25 * -0.25 + 0.5 * 0.25, 0.25 * 1.0 + 0.25 * 1.25 + 0.5 * 0.75]
    )


def test_a_log_tells_areas_and_where_no_size_is_measured() -> None:
    areas = pd.DataFrame(
        [
            ("named", 0, 0.9, 0.1),
            ("random", 0, 0.2, 0.8),
            ("random", 1, 0.4, 0.6),
            ("activation", 0, 0.5, 0.5),
        ],
        columns=["order", "draw", "cpr", "cmd"],
    )
    sentences = {}
    for sizes in ([0, 1, 2, 4, 12], [0, 1, 2, 4, 8]):
        findings = tracing.Findings()
        tracing.report_curve(findings, areas, sizes, 8)
        sentences[sizes[-1]] = [entry["text"] for entry in findings.entries]
    assert sentences[12][0] == (
        "faithfulness of 1 to 12 components kept alone, 4 sizes, 8 sentences: the named first CPR"
        " 0.90, CMD 0.10; 2 random orders CPR 0.20 to 0.40, CMD 0.60 to 0.80; by mean activation"
        " CPR 0.50, CMD 0.50"
    )
    assert sentences[8][1] == "the named order is better than all others here (by CPR)"
    assert "between 4 and 12 components no size is measured" in sentences[12][2]
    assert len(sentences[8]) == 2
    beaten = areas.assign(cpr=[0.3, 0.2, 0.4, 0.3])
    assert tracing.compare_areas(beaten) == (
        "the named order is no better than one of the random orders and the order by mean"
        " activation (by CPR)"
    )


# ----- a curve of the trained model


@pytest.fixture(scope="module")
def curved(
    tiny_llama: str, coarse_figures: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[JointSet]]:
    """A folder with the curve of a circuit, and the sets that were measured for it."""
    folder = tmp_path_factory.mktemp("curved")
    flags = ["--num_samples", "8", "--confirm", "layer:1", "--num_random", "2"]
    finish(tiny_llama, folder, *flags)
    measured: list[JointSet] = []
    measure_sets = tracing.measure_sets

    def keep(experiment: Any, joint_sets: Any, prompts: Any, make_edits: Any = None) -> Any:
        measured[:] = joint_sets
        return measure_sets(experiment, joint_sets, prompts, make_edits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "measure_sets", keep)
        finish(tiny_llama, folder, "joint", "--curve", "--num_random", "2")
    return folder, measured


def circuit_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "circuit.json").read_text()))


def test_a_curve_begins_with_the_circuit_and_goes_on_by_role(
    curved: tuple[Path, list[JointSet]],
) -> None:
    """On the held-out sentences; the sets of an order are nested."""
    folder, sets = curved
    table = read(folder, CURVE)
    ranking = circuit_of(folder)["ranking"]
    sizes = sorted({0, 1, 2, 4, 8, 16, 32, len(circuit_of(folder)["components"])})
    assert list(table["order"].unique()) == ["named", "random", "activation"]
    for _, rows in table.groupby(["order", "draw"]):
        assert rows["size"].tolist() == sizes
        assert rows["share_kept"].tolist() == [size / 32 for size in sizes]
    kept = [joint_set.components for joint_set in sets if joint_set.name == "kept"]
    n_inner = len(sizes) - 2
    assert len(kept) <= 4 * n_inner + 1
    for size in sizes[1:-1]:
        assert parsed(" ".join(ranking[:size])) in kept
    named_last = table[table["order"] == "named"].iloc[-1]
    assert named_last["mean_delta"] == pytest.approx(
        read(folder, JOINT).query("set == 'none'")["mean_delta"].iloc[0], abs=1e-5
    )
    complement = read(folder, JOINT).query("set == 'complement'").iloc[0]
    n_named = len(circuit_of(folder)["components"])
    same = table.query(f"order == 'named' and size == {n_named}").iloc[0]
    for name in ("mean_delta", "faithfulness", "faithfulness_low", "faithfulness_high"):
        assert same[name] == pytest.approx(complement[name], abs=1e-9)


def test_every_point_of_a_curve_is_what_naive_edits_give(
    curved: tuple[Path, list[JointSet]], tiny_llama: str
) -> None:
    folder, sets = curved
    table, held_out = read(folder, CURVE), halves(folder)[1]
    model = naive.load(tiny_llama)
    deltas = {}
    for joint_set in sets:
        kept = joint_set.text.split()
        if not joint_set.others_of:
            kept = [c.label for c in prepared(tiny_llama).shape.components("head")]
        deltas[joint_set.key] = naive_deltas(
            model, folder, held_out, lambda kept=kept: by_hand.kept_alone(model[0], kept, ["head"])
        )
    none, every = (deltas[joint_set.key] for joint_set in sets[:2])
    expected = []
    for joint_set in sets:
        mean = statistics.fmean(deltas[joint_set.key])
        share = (mean - statistics.fmean(every)) / (
            statistics.fmean(none) - statistics.fmean(every)
        )
        expected.append((mean, share))
    points = list(zip(table["mean_delta"], table["faithfulness"], strict=True))
    for mean, share in expected:  # each set is a point, and no point is of anything else
        assert min(abs(mean - m) + abs(share - f) for m, f in points) < 1e-4
    for m, f in points:
        assert min(abs(mean - m) + abs(share - f) for mean, share in expected) < 1e-4
    for joint_set, (mean, share) in zip(sets, expected, strict=True):
        size = len(joint_set.components)
        rows = table[table["size"] == size] if joint_set.others_of else table[table["size"] == 32]
        assert (
            (rows["mean_delta"] - mean).abs() + (rows["faithfulness"] - share).abs()
        ).min() < 1e-4


def test_the_record_has_the_areas_of_the_table(curved: tuple[Path, list[JointSet]]) -> None:
    folder, _ = curved
    recorded = pd.DataFrame(record_of(folder)["commands"]["joint"]["curve"])
    areas = tracing.curve_areas(read(folder, CURVE))
    pd.testing.assert_frame_equal(recorded, areas, rtol=1e-9)
    assert recorded["order"].tolist() == ["named", "random", "random", "activation"]
    first = recorded.iloc[0]
    assert f"the named first CPR {first['cpr']:.2f}, CMD {first['cmd']:.2f};" in said(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_curve_that_is_there_is_not_measured_again(
    curved: tuple[Path, list[JointSet]], tiny_llama: str
) -> None:
    folder, _ = curved
    before = (folder / CURVE).read_bytes()
    finish(tiny_llama, folder, "joint", "--curve", "--num_random", "2")
    assert (folder / CURVE).read_bytes() == before


def test_a_dry_run_counts_what_a_curve_takes(
    curved: tuple[Path, list[JointSet]], tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sets = curved
    argv = command_line(tiny_llama, folder, "joint", "--curve", "--num_random", "2", "--dry_run")
    request = tracing.parse_command_line(argv)
    experiment = tracing.prepare(
        request.options, tracing.RunFolder(folder, command="joint"), tracing.Processes()
    )
    (planned,) = tracing.plan_curve(experiment)
    distinct = [joint_set for joint_set in sets if joint_set.name == "kept"]
    n_sizes = len(read(folder, CURVE)["size"].unique()) - 2
    assert planned.what == f"faithfulness curve of 4 orders at {n_sizes} sizes"
    assert sum(planned.counts.values()) == 4 * n_sizes + 1 >= len(distinct)
    assert set(planned.counts) == {0}
    assert tracing.main(argv) == 0
    assert planned.what in capsys.readouterr().out


def test_without_the_option_there_is_no_curve(
    curved: tuple[Path, list[JointSet]], tiny_llama: str, tmp_path: Path
) -> None:
    """And an older one goes."""
    flags = ["--num_samples", "2", "--num_random", "1"]
    folder = finish(tiny_llama, tmp_path, "joint", "L0H6", *flags, "--curve")
    assert (folder / CURVE).exists() and (folder / "circuit_curve.png").exists()
    finish(tiny_llama, folder, "joint", "L0H6", *flags)
    assert not list(folder.glob("circuit_curve.*"))
    assert "curve" not in record_of(folder)["commands"]["joint"]


# ----- which sentences, and where there is no curve


def measured_units(
    monkeypatch: pytest.MonkeyPatch, model: str, folder: Path, *words: str
) -> list[set[str]]:
    """The sentences of each call of `measure_sets`."""
    units: list[set[str]] = []
    measure_sets = tracing.measure_sets

    def keep(experiment: Any, joint_sets: Any, prompts: Any, make_edits: Any = None) -> Any:
        units.append(tracing.units_of(prompts))
        return measure_sets(experiment, joint_sets, prompts, make_edits)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "measure_sets", keep)
        finish(model, folder, "joint", *words, "--curve", "--num_random", "1")
    return units


def test_sentences_that_ranked_are_not_measured_whoever_names_the_set(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's circuit ranks what is named by hand; a circuit without a ranking borrows it and
    keeps its own sentences out as well."""
    folder = finish(tiny_llama, tmp_path, "--num_samples", "6", "--confirm", "2")
    circuit = circuit_of(folder)
    chosen_on = set(circuit["chosen_on"])
    every = {sample["unit"] for sample in record_of(folder)["samples"]}
    by_name = measured_units(monkeypatch, tiny_llama, folder, "L1H0,L0H6")
    assert by_name[:3] == [every] * 3
    assert len(by_name) > 3 and all(units == every - chosen_on for units in by_name[3:])
    sizes = read(folder, CURVE)["size"].unique().tolist()
    assert sizes == [0, 1, 2, 4, 8, 16, 32]
    del circuit["ranking"]
    circuit["chosen_on"] = [min(every - chosen_on)]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(circuit))
    by_file = measured_units(monkeypatch, tiny_llama, folder, str(other))
    rest = every - set(circuit["chosen_on"])
    assert by_file[:3] == [rest] * 3
    assert all(units == rest - chosen_on for units in by_file[3:])


@pytest.mark.parametrize("content", ["", "{", '{"components": [{"label": "L0H1"}], "model": "x"}'])
def test_a_folder_without_a_circuit_of_this_model_has_no_ranking(
    content: str, llama: str, tmp_path: Path
) -> None:
    fingerprint = {"model": "y"}
    record = {"experiment": {"options": {}, "fingerprint": fingerprint}}
    experiment = prepared(llama, "joint", "L0H1", record=record)
    experiment.folder.path = tmp_path
    assert tracing.find_ranking(experiment) == ComponentList()
    (tmp_path / "circuit.json").write_text(content)
    assert tracing.find_ranking(experiment) == ComponentList()
    ranked = {"components": [{"label": "L0H1"}], "ranking": ["L0H1", "L2H0"]}
    of_mlps = {"components": [{"label": "L0mlp"}], "ranking": ["L0mlp"], "chosen_on": ["u"]}
    (tmp_path / "circuit.json").write_text(json.dumps(of_mlps))
    assert tracing.find_ranking(experiment) == ComponentList()
    for model, ranking in {"y": "L0H1 L2H0", "": "L0H1 L2H0", "x": ""}.items():
        (tmp_path / "circuit.json").write_text(json.dumps(ranked | {"model": model}))
        assert tracing.find_ranking(experiment).ranking == parsed(ranking)


def test_there_is_no_curve_of_several_kinds(llama: str, tmp_path: Path) -> None:
    flags = ["--num_samples", "2", "--num_random", "1", "--curve"]
    folder = finish(llama, tmp_path, "joint", "L0H1,L1mlp", *flags)
    assert "no faithfulness curve: the named components are of several kinds" in said(folder)
    assert not list(folder.glob("circuit_curve.*"))
    experiment = prepared(llama, "joint", "L0H1,L1mlp", *flags)
    assert not list(tracing.plan_curve(experiment))


def test_there_is_no_curve_where_it_is_unclear_what_all_do(llama: str, tmp_path: Path) -> None:
    """Of one sentence, which has no interval."""
    record = {"sentence": "Name a fruit.", "targets": ["apple"]}
    flags = ["--samples", write_samples(tmp_path / "one.jsonl", record), "--num_random", "1"]
    folder = finish(llama, tmp_path / "run", "joint", "L0H1,L0H2", *flags, "--curve")
    assert "no faithfulness curve: what all components of the kind do is not clear" in said(folder)
    assert not list(folder.glob("circuit_curve.*"))
    assert "curve" not in record_of(folder)["commands"]["joint"]


def test_the_figure_has_a_line_per_order(
    curved: tuple[Path, list[JointSet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read(curved[0], CURVE)
    figures: list[Any] = []
    monkeypatch.setattr(tracing, "save_figure", lambda figure, _: figures.append(figure))
    tracing.draw_curve(table, "title", tmp_path / "curve.png")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    drawn = {tuple(line.get_ydata()) for line in axes.lines}
    for _, rows in table[table["size"] > 0].groupby(["order", "draw"]):
        assert tuple(rows["faithfulness"]) in drawn
    (legend,) = figures[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [style["label"] for style in tracing.CURVE_STYLES.values()]

"""Circuits: how they are chosen and kept, and what is left of a model with nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, prepared
from conftest import Answer, finish, read, record_of

CLOSE = 1e-4
ROLES = {"L0H0": 0.5, "L0H1": 0.5, "L1H0": 0.75, "L1H1": -0.5, "L2H0": 0.25, "L2H1": 0.0}
CHOSEN = {  # of carriers whose roles sum to 2, where |base| is 2
    "top:2": "L1H0 L0H0",
    "6": "L1H0 L0H0 L0H1 L2H0 L2H1 L1H1",
    "mass:0.1": "L1H0",
    "mass:0.375": "L1H0",
    "mass:0.376": "L1H0 L0H0",
    "mass:0.625": "L1H0 L0H0",
    "mass:0.626": "L1H0 L0H0 L0H1",
    "mass:1": "L1H0 L0H0 L0H1 L2H0",
    "share:0.125": "L1H0 L0H0 L0H1 L2H0",
    "share:0.25": "L1H0 L0H0 L0H1",
    "share:0.375": "L1H0",
    "share:1": "",
    "layer:1": "L1H0 L0H0 L2H0",
    "layer:9": "L1H0 L0H0 L0H1 L2H0",
}
RUNS = {  # of a model and flags
    "random": ("llama", "--num_samples 6 --confirm 3 --num_random 3 --controls"),
    "bundled": ("tiny_llama", "--num_samples 6 --confirm mass:0.5 --num_random 3"),
    "neurons": ("llama", "--kind neuron --neurons 0-5 --num_samples 4 --confirm 3 --num_random 2"),
    "mlp": ("llama", "--kind mlp --num_samples 4 --confirm 1 --num_random 2"),
    "attn": ("llama", "--kind attn --num_samples 4 --confirm 1 --num_random 2"),
}
Runs = Callable[[str], tuple[str, Path]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(model, folder) of a run by its name, made once."""
    made: dict[str, tuple[str, Path]] = {}

    def of(name: str) -> tuple[str, Path]:
        if name not in made:
            model = request.getfixturevalue(RUNS[name][0])
            folder = finish(model, tmp_path_factory.mktemp(name), *RUNS[name][1].split())
            made[name] = model, folder
        return made[name]

    return of


def joint(folder: Path, measure: str = "a - b", samples: str = "held-out") -> pd.DataFrame:
    rows = read(folder, "circuit_confirm.csv").fillna({"components": ""})
    asked = (rows["measure"] == measure) & (rows["samples"] == samples)
    return rows[asked].reset_index(drop=True)


def circuit_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "circuit.json").read_text()))


def labels(found: Any) -> str:
    return tracing.labels_of(found)


# ----- choosing


def chosen(rule: str, effects: dict[str, float], base: float, **more: Any) -> str:
    config = tracing.Config(confirm=tracing.choice(rule), **more)
    table = by_hand.results({name: [v - 1, v + 1] for name, v in effects.items()}, base)
    return labels(tracing.choose_circuit(table, config, "b").index)


@pytest.mark.parametrize("rule", CHOSEN)
def test_each_rule_chooses_by_role_whatever_the_sign_of_base_and_op(rule: str) -> None:
    against = {name: -role for name, role in ROLES.items()}
    amplified = {"op": "scale", "factor": 2.0}
    assert chosen(rule, ROLES, -2.0) == CHOSEN[rule]
    assert chosen(rule, against, 2.0) == CHOSEN[rule]
    assert chosen(rule, against, -2.0, **amplified) == CHOSEN[rule]
    assert chosen(rule, ROLES, 2.0, **amplified) == CHOSEN[rule]
    halved = {"op": "scale", "factor": 0.5}
    assert chosen(rule, ROLES, -2.0, **halved) == CHOSEN[rule]


@pytest.mark.parametrize(
    ("rule", "found"),
    [("top:2", "L0H0 L0H1"), ("mass:0.41", "L0H0 L0H1"), ("layer:1", "L0H0 L2H0")],
)
def test_what_is_skipped_is_not_chosen_and_its_role_does_not_count(rule: str, found: str) -> None:
    skip = tracing.components("L1H0,L9mlp")
    assert chosen(rule, ROLES, -2.0, skip=skip) == found


@pytest.mark.parametrize("rule", CHOSEN)
def test_against_a_control_its_contrast_and_base_choose_where_there_is_one(rule: str) -> None:
    """The last sample lacks the control, and its huge effects have no say."""
    effects = {name: [-role, -role, 99.0] for name, role in ROLES.items()}
    contrast = {name: [-role, -role, 99.0] for name, role in ROLES.items()}
    table = by_hand.with_control(by_hand.results(effects, -5.0), "other", contrast, 2.0)
    controls = [name for name in table if "other" in name]
    table[controls] = table[controls].mask(table["sample_id"] == "s002")
    found = tracing.choose_circuit(table, tracing.Config(confirm=tracing.choice(rule)), "other")
    assert labels(found.index) == CHOSEN[rule]
    assert found["role"].tolist() == [ROLES[name] for name in CHOSEN[rule].split()]
    assert found["mean"].tolist() == [-ROLES[name] for name in CHOSEN[rule].split()]


# ----- what a command line says


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", ("top", 8)),
        ("top:8", ("top", 8)),
        ("0", ("top", 0)),
        ("mass:0.05", ("mass", 0.05)),
        ("share:1", ("share", 1)),
        ("layer:10", ("layer", 10)),
    ],
)
def test_a_choice_and_its_text_are_inverse(text: str, value: tuple[str, float]) -> None:
    assert tracing.choice(text) == value
    assert tracing.choice(str(tracing.as_text(value))) == value
    assert tracing.parse_args(["--confirm", text]).confirms == (value[1] > 0)


@pytest.mark.parametrize("text", ["0,0.5,1,2", "-1", "1e-3,1"])
def test_numbers_and_their_text_are_inverse(text: str) -> None:
    assert tracing.numbers(text) == tuple(map(float, text.split(",")))
    assert tracing.numbers(tracing.as_text(tracing.numbers(text))) == tracing.numbers(text)


WRONG = [
    "mass:0",
    "mass:2",
    "mass:nan",
    "share:-1",
    "layer:1.5",
    "foo:3",
    "",
    "mass:",
    "-1",
    "mass",
]


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--confirm", text) for text in WRONG]
    + [("--multipliers", text) for text in ("", "1,1.0", "inf", "0,,1")],
)
def test_any_other_choice_or_number_is_refused(flag: str, text: str, answer: Answer) -> None:
    code, _, err = answer("--model_id", "nowhere", f"{flag}={text}")
    assert code == 2
    assert f"argument {flag}" in err.splitlines()[-1]


# ----- files of components


@pytest.mark.parametrize(
    "text",
    ["L2H3,L0H1,L1mlp", " L2H3 L0H1\tL1mlp ", "L2H3\nL0H1\nL1mlp\nL0H1\n", "L2H3, L0H1,L1mlp\n"],
)
def test_names_in_a_file_keep_their_order_and_stand_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    found = tracing.components(str(tmp_path / "names"))
    assert labels(found) == "L2H3 L0H1 L1mlp"
    assert (found.model, found.warning) == ("", "")


def test_a_runs_circuit_is_read_back_by_every_option_that_takes_components(
    runs: Runs, tmp_path: Path
) -> None:
    model, folder = runs("random")
    file, best = (
        str(folder / "circuit.json"),
        [c["label"] for c in circuit_of(folder)["components"]],
    )
    assert len(best) == 3
    for flag in ("--ablate", "--circuit", "--given", "--skip"):
        config = tracing.parse_args(["--model_id", model, flag, file])
        (found,) = [v for v in (config.ablate, config.given, config.skip) if v]
        assert labels(found).split() == best
        assert found.model == record_of(folder)["fingerprint"]["model"]
    flags = ["--num_samples", "2", "--layers", "0", "--heads", "0", "--circuit", file]
    rows = joint(finish(model, tmp_path, *flags), samples="all")
    assert rows["components"].tolist() == ["", " ".join(best), " ".join(best), ""]


def test_a_file_of_neurons_by_position_is_read_as_neurons_at_all_tokens(
    tiny_llama: str, tmp_path: Path
) -> None:
    file = tmp_path / "neurons.json"
    neurons = {"3,17,120": 0.5, "0,2,7": -1.0, "3,18,120": 0.25}
    file.write_text(json.dumps({"neurons": neurons, "prompt": "Dallas"}))
    flags = ["--num_samples", "2", "--layers", "0", "--heads", "0", "--ablate", str(file)]
    rows = joint(finish(tiny_llama, tmp_path / "run", *flags), samples="all")
    assert rows["components"].tolist()[1:3] == ["L3N120 L0N7"] * 2
    assert f"{file}: positions are left out" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"{not json",
        b"",
        b"{}",
        b'{"components": []}',
        b"L0H0 L1X3",
        b'["L0H0"]',
        b'{"components": ["L0H0"]}',
        b'{"components": [{"layer": 0}]}',
        b'{"components": [{"label": "L0"}]}',
        b'{"components": [{"label": 7}]}',
        b'{"components": 7}',
        b'{"components": null}',
        b'{"neurons": {"3,17": 1}}',
        b'{"neurons": {"3,17,x": 1}}',
        b"\xff\xfe\x00\x01",
    ],
)
def test_a_broken_file_is_refused_by_name(content: bytes, answer: Answer, tmp_path: Path) -> None:
    file = tmp_path / "circuit.json"
    file.write_bytes(content)
    for flag in ("--ablate", "--given", "--skip"):
        code, _, err = answer("--model_id", "nowhere", flag, str(file))
        assert code == 2
        assert f"{flag}" in err.splitlines()[-1]
        assert f"{file} is no file of components: " in err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["ablate", "given", "skip"])
def test_a_circuit_of_another_model_is_refused_and_the_folder_stays(
    flag: str, runs: Runs, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = runs("random")
    monkeypatch.setattr(tracing, "load_model", lambda *a: pytest.fail("weights are loaded"))
    told = circuit_of(folder) | {"model": "0123456789abcdef"}
    (tmp_path / "other.json").write_text(json.dumps(told))

    def files() -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.log")
        return {str(path): path.read_bytes() for path in found}

    before, flags = files(), ["--output_dir", str(folder), *RUNS["random"][1].split()]
    for more in ([], ["--overwrite"]):
        argv = ["--model_id", model, *flags, f"--{flag}", str(tmp_path / "other.json"), *more]
        code, _, err = answer(*argv)
        assert code == 2
        (line,) = err.splitlines()
        mine = record_of(folder)["fingerprint"]["model"]
        assert f"--{flag}: that file is of model 0123456789abcdef, not {mine}" in line
    assert files() == before


@pytest.mark.parametrize("label", ["L3H0", "L0H4", "L0N80", "L3mlp"])
def test_components_that_the_model_lacks_are_refused(
    label: str, llama: str, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "load_model", lambda *a: pytest.fail("weights are loaded"))
    (tmp_path / "names").write_text(f"L0H0 {label}")
    for flag in ("--ablate", "--given", "--skip"):
        argv = ["--output_dir", str(tmp_path / "run"), flag, str(tmp_path / "names")]
        code, _, err = answer("--model_id", llama, *argv)
        assert code == 2
        assert f"{flag} {label}: this model has layers 0-2" in err


# ----- circuit.json


@pytest.mark.parametrize("name", ["random", "bundled", "neurons", "mlp"])
def test_a_circuit_tells_where_it_comes_from_and_its_roles_recompute(name: str, runs: Runs) -> None:
    _, folder = runs(name)
    told, record, table = circuit_of(folder), record_of(folder), read(folder)
    half = table[table["sample_id"].isin(halves(folder)[0])]
    assert (told["format"], told["model"]) == ("circuit/1", record["fingerprint"]["model"])
    assert (told["task"], told["op"], told["method"]) == ("suppression", "zero", "exact")
    assert str(told["selection"]) == str(record["config"]["confirm"])
    assert told["measure"] == ("a - other" if name == "random" else "a - b")
    assert told["chosen_on"] == sorted(half["unit"].unique())
    theirs = "score_other_base" if name == "random" else "score_b_base"
    column = "effect_minus_other" if name == "random" else "head_effect"
    base = (half["score_a_base"] - half[theirs]).mean()
    means = half.fillna({"index": -1}).groupby(["layer", "kind", "index"])[column].mean()
    roles = means * -math.copysign(1, base)
    for one in told["components"]:
        key = one["layer"], one["kind"], one["index"]
        assert one["label"] == tracing.Component(*key).label
        assert one["mean"] == pytest.approx(means[key], rel=1e-6)
        assert one["role"] == pytest.approx(roles[key], rel=1e-6)
    found = [one["role"] for one in told["components"]]
    assert found == sorted(found, reverse=True)
    assert min(found) >= roles.nlargest(len(found)).min() - 1e-9
    if name == "bundled":
        carried = 0.5 * roles[roles > 0].sum()
        assert sum(found) >= carried > sum(found[:-1])


# ----- what is left with the circuit alone


@contextmanager
def kept_alone(model: Any, kept: Sequence[str], kinds: Sequence[str]) -> Iterator[None]:
    """All columns of some kinds zeroed in every layer, but those of what is kept."""
    with ExitStack() as stack:
        sites = {("head" if k in ("head", "attn") else "mlp"): None for k in kinds}
        for layer, kind in (
            (n, kind) for n in range(len(naive.layers_of(model))) for kind in sites
        ):
            module = naive.module_of(model, layer, kind)
            mask = torch.zeros(module.in_features)
            for one in map(tracing.Component.parse, kept):
                if one.layer == layer and naive.module_of(model, layer, one.kind) is module:
                    mask[naive.span_of(model, layer, one.kind, one.index)] = 1
            stack.enter_context(naive.hooked(module, lambda x, mask=mask: x * mask))
        yield


def plain_deltas(
    plain: Any, folder: Path, ids: Sequence[str], row: Any, kinds: Sequence[str], against: str = "b"
) -> list[float]:
    """Per sample, with the edit of a row of circuit_confirm.csv as everyone would write it."""
    texts, targets, names = (
        by_hand.texts(folder),
        by_hand.targets_of(folder),
        row.components.split(),
    )
    keeps = kept_alone(plain[0], names, kinds) if row.kept else by_hand.ablated(plain[0], names)
    with keeps:
        scores = [
            [naive.suppression_score(*plain, texts[i][side], targets[i]) for side in ("a", against)]
            for i in ids
        ]
    return [a - b for a, b in scores]


@pytest.mark.parametrize("name", RUNS)
def test_all_kinds_of_sets_and_their_faithfulness_are_what_naive_edits_give(
    name: str, runs: Runs
) -> None:
    model, folder = runs(name)
    against = "other" if name == "random" else "b"
    rows, ids, kind = joint(folder, f"a - {against}"), halves(folder)[1], read(folder)["kind"][0]
    best, shape = [c["label"] for c in circuit_of(folder)["components"]], prepared(model).shape
    n, n_all = len(best), shape.n_layers * len(shape.indices(kind))
    n_drawn = (rows["set"] == "random complement").sum()
    assert 1 <= n_drawn <= 3
    sizes = rows.groupby("set")["n_ablated"].unique().map(sorted).to_dict()
    steps = sorted({2**i for i in range(9) if 2**i < n} | {n})
    assert sizes == {
        "none": [0],
        "all": [n_all],
        "chosen": steps,
        "random": steps,
        "complement": [n_all - n],
        "random complement": [n_all - n],
    }
    assert set(rows[rows["kept"]]["set"]) == {"all", "complement", "random complement"}
    assert not rows[~rows["kept"]]["set"].isin(["all", "complement", "random complement"]).any()
    for row in rows[rows["set"].isin(["chosen", "complement"])].itertuples():
        size = n if row.kept else row.n_ablated
        assert row.components.split() == best[:size]
    whole = rows[(rows["set"] == "random") & (rows["n_ablated"] == n)]["components"]
    kept = rows[rows["set"] == "random complement"]["components"]
    assert kept.tolist() == whole.tolist()

    plain = naive.load(model)
    first = rows.drop_duplicates(["set", "n_ablated"])
    found = {
        row.Index: plain_deltas(plain, folder, ids, row, [kind], against)
        for row in first.itertuples()
    }
    none, every = found[0], found[1]
    away, is_clear = [a - b for a, b in zip(none, every, strict=True)], None  # of two: not told
    if len(ids) > 2:
        _, low, high = by_hand.mean_test(away, [1.0] * len(ids))
        is_clear = low > 0 or high < 0
    for i, deltas in found.items():
        row = rows.loc[i]
        assert row["mean_delta"] == pytest.approx(statistics.fmean(deltas), abs=CLOSE)
        if is_clear is None:
            continue
        top, below = ([x - y for x, y in zip(of, every, strict=True)] for of in (deltas, none))
        share = sum(top) / sum(below) if is_clear else math.nan
        empty, told = (
            ("remaining", "faithfulness") if row["kept"] else ("faithfulness", "remaining")
        )
        assert math.isnan(row[empty])
        assert row[told] == pytest.approx(share, abs=1e-3, nan_ok=True)
        if row["set"] == "complement" and is_clear:
            ends = row[["faithfulness_low", "faithfulness_high"]].tolist()
            near = 0.05 * (ends[1] - ends[0])  # Student's quantile of few is approximate
            assert ends == pytest.approx(list(by_hand.mean_test(top, below)[1:]), abs=near)
    if name == "bundled":
        assert is_clear


def test_with_heads_and_neurons_all_are_all_of_both(llama: str, tmp_path: Path) -> None:
    own = "L0H1,L2N7,L1H3,L1N12"
    folder = finish(llama, tmp_path, *f"--num_samples 3 --kind attn --ablate {own}".split())
    rows, plain = joint(folder, samples="all"), naive.load(llama)
    assert rows["set"].tolist() == ["none", "ablate", "complement", "all"]
    assert rows["n_ablated"].tolist() == [0, 4, 3 * (4 + 80) - 4, 3 * (4 + 80)]
    for row in rows.itertuples():
        deltas = plain_deltas(plain, folder, sorted(by_hand.texts(folder)), row, ["head", "neuron"])
        assert row.mean_delta == pytest.approx(statistics.fmean(deltas), abs=CLOSE)
    assert rows["mean_delta"].nunique() == 4


@pytest.mark.parametrize("op", ["zero", "mean"])
def test_the_complement_of_everything_edits_nothing_and_all_heads_are_the_attention(
    op: str, llama: str, tmp_path: Path
) -> None:
    def measured(name: str, kept: str) -> pd.Series:
        flags = ["--num_samples", "3", "--kind", "attn", "--op", op, "--ablate", kept]
        rows = joint(finish(llama, tmp_path / name, *flags), samples="all")
        return rows.set_index("set")["mean_delta"]

    heads = [f"L{n}H{i}" for n in range(3) for i in range(4)]
    everything, layer = measured("every", ",".join(heads)), measured("layer", ",".join(heads[4:8]))
    assert everything["complement"] == pytest.approx(everything["none"], abs=1e-5)
    assert everything["ablate"] == pytest.approx(everything["all"], abs=1e-5)
    assert everything["none"] != pytest.approx(everything["all"], abs=1e-2)
    table = read(tmp_path / "layer")
    of_layer = table[table["layer"] == 1]["delta_logit_head"].mean()
    assert layer["ablate"] == pytest.approx(of_layer, abs=1e-5)


def test_the_complement_of_the_complement_is_the_set_in_every_layer(llama: str) -> None:
    shape = prepared(llama).shape
    for names in ("L0H1,L2H0,L2H3", "L1mlp,L0H2", "L1N3,L1N79,L2attn", "L1N3,L0H0"):
        found = tracing.components(names)
        kinds = {component.kind for component in found}
        left = tracing.other_columns(found, kinds, shape)
        modules = {tracing.KINDS[kind].module for kind in kinds}
        assert set(left) == {(layer, module) for layer in range(3) for module in modules}
        for (layer, module), columns in left.items():
            mine = [c for c in found if c.site == (layer, module)]
            own = {i for c in mine for i in range(shape.width(module))[shape.columns(c)]}
            assert set(columns.nonzero()[:, 0].tolist()) == set(range(shape.width(module))) - own
    nothing = tracing.other_columns((), ["head"], shape)
    assert all(columns.sum() == shape.d_attn for columns in nothing.values())


def statistics_by_hand(kept: list[float], none: float, every: float) -> dict[str, Any]:
    """Of four sentences; the sets are none, all, a circuit and its complement."""
    jitter = [0.0, 0.02, -0.03, 0.01]
    deltas = [[none + e, every - e, none + every - m, m] for e, m in zip(jitter, kept, strict=True)]
    sets = pd.DataFrame({"set": ["none", "all", "chosen", "complement"]})
    sets["kept"] = [False, True, False, True]
    return tracing.joint_statistics(torch.tensor(deltas, dtype=torch.float64), [*"uvwx"], sets)


@pytest.mark.parametrize("level", [1.4, 0.7, -0.6])
def test_faithfulness_by_hand_is_never_clipped(level: float) -> None:
    kept = [1.0 - 4.0 * level + e for e in (0.0, 0.1, -0.05, 0.15)]  # from -3 (all: 1)
    found = statistics_by_hand(kept, -3.0, 1.0)
    jitter = [0.0, 0.02, -0.03, 0.01]
    top = [m - (1.0 - e) for m, e in zip(kept, jitter, strict=True)]
    below = [(-3.0 + e) - (1.0 - e) for e in jitter]
    share = sum(top) / sum(below)
    ends = [found[f"faithfulness{end}"] for end in ("", "_low", "_high")]
    assert [values[3] for values in ends[:1]] == pytest.approx([share])
    assert share == pytest.approx(level, abs=0.02)
    low, high = ends[1][3], ends[2][3]
    assert low < share < high
    by_formula = list(by_hand.mean_test(top, below)[1:])
    assert [low, high] == pytest.approx(by_formula, abs=0.02 * (high - low))
    assert [values[1] for values in ends] == pytest.approx([0.0] * 3, abs=1e-9)
    assert all(math.isnan(values[i]) for values in ends for i in (0, 2))
    assert found["remaining"][0] == pytest.approx(1)
    assert found["remaining"][2] == pytest.approx(1 - share)
    assert all(math.isnan(found["remaining"][i]) for i in (1, 3))


def test_there_is_no_faithfulness_where_it_is_unclear_what_all_do() -> None:
    found = statistics_by_hand([1.0, 2.0, 3.0, 4.0], 0.5, 0.5)
    for name in ("faithfulness", "faithfulness_low", "faithfulness_high", "remaining"):
        assert all(map(math.isnan, found[name]))
    assert found["mean_delta"][3] == pytest.approx(2.5)


# ----- random sets, and circuits that are too large or empty


def test_random_sets_are_distinct_and_of_others_in_the_same_layers(llama: str) -> None:
    best, given, skip = (tracing.components(t) for t in ("L2H0,L1H3", "L1H0", "L2H1,L0H3"))
    exp = prepared(llama, "--num_random", "9", "--given", labels(given), "--skip", "L2H1,L0H3")
    sets = tracing.confirm_sets(best, exp)
    for n in (1, 2):
        drawn = [of for of in sets if of.name == "random" and len(of.components) == n]
        assert len({of.components for of in drawn}) == len(drawn) == (2 if n == 1 else 4)
        for of in drawn:
            assert list(of.components) == sorted(of.components)
            assert not {*of.components} & {*best, *given, *skip}
            layers = [Counter(c.layer for c in some) for some in (of.components, best[:n])]
            assert layers[0] == layers[1]
            assert of.lent == 0


def test_neighbours_lend_and_where_too_few_are_left_there_is_no_random_set(llama: str) -> None:
    exp = prepared(llama)
    layer = tracing.components("L1H0,L1H1,L1H2")
    ((*drawn,), lent) = tracing.draw_random(layer, 3, exp, 0) or ((), 0)
    assert (len(drawn), lent) == (3, 2)
    assert tracing.components("L1H3")[0] in drawn
    most = [tracing.Component(n, "head", i) for n in range(3) for i in range(4)][:7]
    assert tracing.draw_random(most, 7, exp, 0) is None
    assert tracing.draw_random(most, 5, exp, 0) is not None
    assert {of.name for of in tracing.confirm_sets(tuple(most), exp)} >= {"all", "complement"}


def test_at_most_half_of_all_components_are_a_circuit(llama: str, tmp_path: Path) -> None:
    """Of 12 heads, of which one is skipped."""
    flags = "--num_samples 4 --confirm layer:100 --num_random 2 --skip L0H0"
    folder = finish(llama, tmp_path, *flags.split())
    config = tracing.Config(confirm=("layer", 100), skip=tracing.components("L0H0"))
    half = read(folder).query("sample_id in @ids", local_dict={"ids": halves(folder)[0]})
    found = tracing.choose_circuit(half, config, "b")
    best = [c["label"] for c in circuit_of(folder)["components"]]
    assert best == labels(found.index).split()[:5]
    assert "L0H0" not in read(folder, "circuit_confirm.csv")["components"].str.cat(sep=" ")
    warned = f"the best 5 of {len(found)} are taken" in (folder / "run.log").read_text()
    assert warned == (len(found) > 5)
    assert len(found) > 5, "else the test tells nothing"


def test_a_rule_that_chooses_nothing_says_so_and_leaves_no_table(
    llama: str, tmp_path: Path
) -> None:
    flags = "--num_samples 4 --confirm share:1 --layers 0 --heads 0"
    finish(llama, tmp_path, *flags.split())
    assert circuit_of(tmp_path)["components"] == []
    assert "--confirm share:1.0 chooses no component" in (tmp_path / "run.log").read_text()
    assert not list(tmp_path.glob("circuit_confirm.*"))


@pytest.mark.parametrize(
    "flags",
    [
        "--confirm 6 --given L0mlp,L1mlp,L2mlp",
        "--kind mlp --confirm 1 --given L0H0,L0H1",
        "--kind mlp --confirm mass:0.1 --skip L0H0,L0H1,L0H2,L0H3,L1H0",
    ],
)
def test_components_of_other_kinds_leave_the_choice_as_it_is(
    flags: str, llama: str, tmp_path: Path
) -> None:
    finish(llama, tmp_path, *f"--num_samples 4 --num_random 2 {flags}".split())
    assert "to leave as many at random" not in (tmp_path / "run.log").read_text()
    assert circuit_of(tmp_path)["components"]


@pytest.mark.parametrize("names", ["L1N5,L1N40,L0mlp", "L0attn,L1H0"])
def test_random_sets_share_no_column_with_the_circuit_nor_with_themselves(
    names: str, llama: str
) -> None:
    exp, circuit = prepared(llama), tracing.components(names)
    for draw in range(30):
        drawn = tracing.draw_random(circuit, len(circuit), exp, draw)
        if drawn:
            both = [*circuit, *drawn[0]]
            taken = [
                (c.site, i)
                for c in both
                for i in range(exp.shape.width(c.site[1]))[exp.shape.columns(c)]
            ]
            assert len(taken) == len({*taken})
            assert Counter(c.kind for c in drawn[0]) == Counter(c.kind for c in circuit)


def test_a_circuit_read_from_the_folder_of_the_run_stays_there(llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, "--num_samples", "4", "--confirm", "2", "--num_random", "2")
    before = (tmp_path / "circuit.json").read_bytes()
    for _ in range(2):
        flags = ["--num_samples", "4", "--ablate", str(tmp_path / "circuit.json")]
        finish(llama, tmp_path, *flags)
    assert (tmp_path / "circuit.json").read_bytes() == before


def test_random_complements_stand_beside_the_confirmed_circuit_alone(
    llama: str, tmp_path: Path
) -> None:
    flags = "--num_samples 4 --confirm 2 --num_random 2 --ablate L0H0,L1H1"
    finish(llama, tmp_path, *flags.split())
    log = (tmp_path / "run.log").read_text().splitlines()
    (named,) = (
        line for line in log if line.startswith("all samples") and "all of the kind" in line
    )
    assert "random complement" not in named

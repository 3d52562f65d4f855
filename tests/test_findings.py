"""What the log says of the tables, and tables and figures drawn anew from a results file alone."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
from by_hand import Effects, results
from conftest import Answer, finish, read

SEVEN = "sample_id,n_constraints,layer,head,delta_logit_base,delta_logit_head,head_effect"
MOVED = {"L0H3": [0.3] * 16, "L0H4": [-0.2] * 16}
UNSURE = {"L0H0": [0.3, -0.2] * 8}


# ----- sentences


@pytest.mark.parametrize(
    ("effects", "base", "more", "said", "unsaid"),
    [
        (
            {"L0H3": [0.3] * 16},
            [-1.0] * 16,
            {},
            ["mean delta_logit -1.000 nats", "over 16 sentences; noise floor 0.1"],
            ["too few", "not distinguishable"],
        ),
        ({"L0H3": [0.3] * 5}, [-1.0] * 5, {}, ["5 sentences are too few"], []),
        ({f"L0H{h}": [0.3] * 6 for h in range(2)}, [-1.0] * 6, {}, ["6 sentences are too"], []),
        (UNSURE, [-1.0] * 16, {}, ["removing L0H0", "(not distinguishable from 0)"], []),
        (
            MOVED,
            [-1.0] * 16,
            {},
            [
                "removing L0H3 makes the forbidden words likelier: it contributes to suppression",
                "removing L0H4 makes the forbidden words less likely still: it works against supp",
            ],
            ["opposite"],
        ),
        (
            MOVED,
            [1.0] * 16,
            {},
            [
                "L0H4 makes the forbidden words less likely still: it contributes to an effect oppo",
                "L0H3 makes the forbidden words likelier: it works against an effect opposite to su",
            ],
            [],
        ),
        (
            MOVED,
            [1.0] * 16,
            {"task": "refusal", "op": "mean"},
            ["mean-ablating L0H4 makes a refusal less likely: it contributes to refusal"],
            ["opposite", "removing"],
        ),
        (MOVED, [1.0] * 16, {"task": "odd_one_out", "op": "patch"}, ["patching L0H4"], []),
        (
            MOVED,
            [-1.0] * 16,
            {"op": "scale", "factor": 2.0},
            ["scaling L0H4 makes the forbidden words less likely still: it contributes to suppr"],
            [],
        ),
        (MOVED, [0.9, -1.0] * 8, {}, ["interval covers 0"], ["contributes to", "works against"]),
        ({"L0H0": [1.0]}, [-1.0], {}, ["a single sentence"], ["contributes to", "works against"]),
    ],
)
def test_the_log_says_what_the_numbers_allow(
    effects: Effects,
    base: Sequence[float],
    more: dict[str, Any],
    said: list[str],
    unsaid: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, table = tracing.Config(num_bootstrap=100, **more), results(effects, base)
    of_base = tracing.base_statistics(table, config)
    heads = tracing.heads_table(table, of_base, 0.1, config)
    with caplog.at_level(logging.INFO, logger="circuit"):
        tracing.report_findings(heads, of_base, 0.1, config)
    assert [part for part in said if part not in caplog.text] == [], caplog.text
    assert [part for part in unsaid if part in caplog.text] == [], caplog.text


def test_the_five_components_of_largest_role_are_named(caplog: pytest.LogCaptureFixture) -> None:
    effects = {f"L0H{h}": [0.1 * h] * 8 for h in (3, 6, 1, 0, 5, 2, 4)}
    config, table = tracing.Config(num_bootstrap=100), results(effects)
    base = tracing.base_statistics(table, config)
    with caplog.at_level(logging.INFO, logger="circuit"):
        tracing.report_findings(tracing.heads_table(table, base, 0, config), base, 0, config)
    named = [text.split()[1] for text in caplog.messages if text.startswith("removing")]
    assert named == ["L0H6", "L0H5", "L0H4", "L0H3", "L0H2"]


# ----- drawn anew from a results file


@pytest.fixture()
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "from_hub", lambda *a, **k: pytest.fail("a model was asked for"))


def redraw(source: Path, folder: Path, *flags: str) -> Path:
    assert tracing.main(["--from_csv", str(source), "--output_dir", str(folder), *flags]) == 0
    return folder


def findings_in(text: str) -> list[str]:
    """The lines of a log that tell of the base and of components."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("mean delta_logit"))
    told = [i for i, line in enumerate(lines) if i >= first and line.startswith(("-----", "redr"))]
    return lines[first : told[0]]


DRAWN = ["circuit_heads.csv", "circuit_summary.png", "circuit_heatmap.png"]


@pytest.mark.parametrize(
    "flags",
    [
        "--num_samples 6 --controls",
        "--num_samples 3 --kind attn --bf16",
        "--num_samples 3 --kind neuron --neurons 0-2",
        "--num_samples 5 --task odd_one_out --op patch --patch_into b",
        "--num_samples 6 --task refusal --seed 7 --num_bootstrap 150 --top_k 3",
        "--num_samples 6 --op scale --factor 2 --layers 0",
        "--num_samples 2 --layers 2",
    ],
)
def test_redrawing_a_run_gives_the_same_findings_and_figures(
    flags: str,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finish(llama, tmp_path / "run", "--heatmap", *flags.split())
    monkeypatch.setattr(tracing, "from_hub", lambda *a, **k: pytest.fail("a model was asked for"))
    capsys.readouterr()
    new = redraw(run / "circuit_results.csv", tmp_path / "new", "--heatmap")
    for name in DRAWN:
        assert (new / name).read_bytes() == (run / name).read_bytes(), name
    assert sorted(path.name for path in new.iterdir()) == sorted(DRAWN)
    assert findings_in(capsys.readouterr().out) == findings_in((run / "run.log").read_text())


def by_hand_run(folder: Path, **recorded: Any) -> Path:
    """A results file beside the record of a run with some flags."""
    folder.mkdir()
    effects = {f"L0H{h}": [0.1 * h + 0.02 * i**2 for i in range(8)] for h in range(4)}
    table = results(effects, [-1.0 - 0.1 * i for i in range(8)], op=recorded.get("op", "zero"))
    table.to_csv(folder / "circuit_results.csv", index=False)
    record = {"noise_floor": 0.5, "config": {"layers": "all", "given": None, **recorded}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder / "circuit_results.csv"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "one", "other", "more"),
    [
        ("seed", 1, 2, {}),
        ("num_bootstrap", 100, 2000, {}),
        ("top_k", 2, 3, {}),
        ("task", "suppression", "refusal", {}),
        ("factor", 0.5, 2.0, {"op": "scale"}),
    ],
)
def test_redrawing_heeds_the_recorded_flags_unless_they_are_given_again(
    name: str,
    one: Any,
    other: Any,
    more: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = by_hand_run(tmp_path / "first", **more, **{name: one})
    second = by_hand_run(tmp_path / "second", **more, **{name: other})

    def drawn(source: Path, folder: str, *flags: str) -> list[Any]:
        capsys.readouterr()
        new = redraw(source, tmp_path / folder, *flags)
        drawn_files = [(new / name).read_bytes() for name in DRAWN[:2]]
        return [findings_in(capsys.readouterr().out), *drawn_files]

    recorded, of_other = drawn(first, "a"), drawn(second, "b")
    assert recorded != of_other
    assert drawn(first, "c", f"--{name}={other}") == of_other
    assert drawn(second, "d", f"--{name}={one}") == recorded


@pytest.mark.usefixtures("no_model")
def test_redrawing_takes_the_noise_floor_of_the_record(tmp_path: Path) -> None:
    heads = read(redraw(by_hand_run(tmp_path / "run"), tmp_path / "new"), "circuit_heads.csv")
    assert heads["above_noise"].tolist() == (heads["mean"] > 0.5).tolist()
    assert set(heads["above_noise"]) == {True, False}


@pytest.mark.usefixtures("no_model")
def test_redrawing_beside_a_record_of_something_else_is_refused(
    tmp_path: Path, answer: Answer
) -> None:
    source = by_hand_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("[]")
    code, _, error = answer("--from_csv", str(source), "--output_dir", str(tmp_path / "new"))
    assert code == 2
    assert str(tmp_path / "run" / "run.json") in error


@pytest.mark.usefixtures("no_model")
def test_redrawing_into_the_folder_of_another_run_is_refused(
    tmp_path: Path, answer: Answer
) -> None:
    source, other = by_hand_run(tmp_path / "one"), by_hand_run(tmp_path / "other").parent
    before = sorted((path.name, path.read_bytes()) for path in other.iterdir())
    code, _, error = answer("--from_csv", str(source), "--output_dir", str(other))
    assert code == 2
    assert f"{other} holds another run" in error
    assert sorted((path.name, path.read_bytes()) for path in other.iterdir()) == before


@pytest.mark.usefixtures("no_model")
def test_redrawing_in_place_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    source = by_hand_run(tmp_path / "run")
    names = ["circuit_results.csv", "run.json"]
    before = [source.with_name(name).read_bytes() for name in names]
    redraw(source, source.parent)
    assert [source.with_name(name).read_bytes() for name in names] == before
    assert (source.parent / "circuit_heads.csv").exists()


@pytest.mark.usefixtures("no_model")
def test_redrawing_compares_with_another_file_or_says_that_they_share_nothing(
    tmp_path: Path, answer: Answer
) -> None:
    source, other = by_hand_run(tmp_path / "one"), by_hand_run(tmp_path / "other")
    new = redraw(source, tmp_path / "new", "--compare", str(other))
    assert not read(new, "circuit_heads.csv")["growth_flag"].any()
    other.write_text(other.read_text().replace("s00", "t00"))
    argv = ["--from_csv", str(source), "--compare", str(other), "--output_dir", str(tmp_path / "x")]
    code, _, error = answer(*argv)
    assert code == 2
    assert str(other) in error


# ----- files of somebody else

THEIRS = [
    f"s{i},1,{layer},{head},-1.0,{-1.0 + effect},{effect}"
    for i in range(6)
    for layer in range(2)
    for head in range(3)
    for effect in [round(0.1 * head - 0.05 * layer + 0.01 * i, 3)]
]


def write_theirs(path: Path, lines: Sequence[str] = THEIRS, header: str = SEVEN) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.mark.usefixtures("no_model")
def test_a_file_with_the_seven_columns_is_enough(tmp_path: Path) -> None:
    new = redraw(write_theirs(tmp_path / "theirs.csv"), tmp_path / "new", "--heatmap")
    heads = read(new, "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(2) for j in range(3)]
    expected = [
        statistics.fmean(0.1 * head - 0.05 * layer + 0.01 * i for i in range(6))
        for layer in range(2)
        for head in range(3)
    ]
    assert heads["mean"].tolist() == pytest.approx(expected)
    assert (heads["n_sentences"] == 6).all()  # without a column of units every sample is one
    assert heads["above_noise"].isna().all()  # no noise floor is known
    assert sorted(path.name for path in new.iterdir()) == sorted(DRAWN)


@pytest.mark.usefixtures("no_model")
def test_column_order_foreign_columns_holes_and_windows_files_are_no_matter(tmp_path: Path) -> None:
    table = pd.read_csv(write_theirs(tmp_path / "theirs.csv"))
    shuffled = table[table.columns[::-1]].assign(note="x, y", seed=3)
    holed = shuffled.sample(frac=1, random_state=1).iloc[1:]
    windows = {"encoding": "utf-8-sig", "lineterminator": "\r\n"}
    holed.to_csv(tmp_path / "other.csv", index=False, **windows)
    heads = read(redraw(tmp_path / "other.csv", tmp_path / "new"), "circuit_heads.csv")
    assert sorted(heads["n_samples"]) == [5, 6, 6, 6, 6, 6]


@pytest.mark.usefixtures("no_model")
def test_columns_of_units_groups_and_op_are_heeded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{line},{'xyz'[int(line[1]) // 2]},,mean" for line in THEIRS]
    lines += [f"n{line[1:]},w,{tracing.NO_ODD_ONE},mean" for line in THEIRS]
    source = write_theirs(tmp_path / "theirs.csv", lines, f"{SEVEN},unit,group,op")
    heads = read(redraw(source, tmp_path / "new"), "circuit_heads.csv")
    assert (heads["n_sentences"] == 3).all()
    assert (heads["n_samples"] == 6).all()
    assert "mean-ablating L0H2" in capsys.readouterr().out


@pytest.mark.usefixtures("no_model")
def test_a_single_sample_is_drawn_without_intervals(tmp_path: Path) -> None:
    new = redraw(write_theirs(tmp_path / "theirs.csv", THEIRS[:6]), tmp_path / "new", "--heatmap")
    heads = read(new, "circuit_heads.csv")
    assert heads[["ci_low", "ci_high", "verdict"]].isna().all(axis=None)
    assert not math.isnan(heads["mean"].sum())

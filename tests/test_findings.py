"""What the log says of the tables, and tables and figures drawn anew from a results file alone."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
from by_hand import Effects, results
from conftest import Answer, finish, read, refuses

MOVED = {"L0H3": [0.3] * 16, "L0H4": [-0.2] * 16}
LIKELIER, LESS = "makes the forbidden words likelier", "makes the forbidden words less likely still"


def said_of(
    caplog: pytest.LogCaptureFixture, effects: Effects, base: Any, repeated: int = 1, **more: Any
) -> str:
    """What the log says of some effects above a noise floor of 0.1, each component repeated."""
    config, table = tracing.Config(num_bootstrap=100, **more), results(effects, base)
    of_base = tracing.base_statistics(table, config)
    heads = tracing.heads_table(table, of_base, 0.1, config)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="circuit"):
        tracing.report_findings(pd.concat([heads] * repeated), of_base, 0.1, config)
    return caplog.text


def test_with_controls_the_log_says_whether_a_component_serves_any_mention(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tracing.Config(num_bootstrap=100)
    table = results({**MOVED, "L0H5": [0.2] * 16, "L0H6": [0.01] * 16}, -1.0)
    base = tracing.base_statistics(table, config)
    heads = tracing.heads_table(table, base, 0.1, config).assign(minus_other_mean=0.25)
    heads["minus_other_verdict"] = heads["verdict"].where(heads["label"] != "L0H5", "")
    with caplog.at_level(logging.INFO, logger="circuit"):
        tracing.report_findings(heads, base, 0.1, config)
    contrast = "less forbidding other words +0.250: "
    told = {label: line for line in caplog.messages for label in heads["label"] if label in line}
    assert told["L0H3"].endswith(f"{contrast}specific to these words")
    assert told["L0H5"].endswith(f"{contrast}not told from serving any mention")
    assert told["L0H6"].endswith("(not distinguishable from 0)")


@pytest.mark.parametrize(
    ("base", "options", "first", "last"),
    [
        (-1.0, {}, f"removing L0H3 {LIKELIER}: it contributes to suppression", LESS),
        (1.0, {}, f"removing L0H4 {LESS}: it contributes to rebound", LIKELIER),
        (1.0, {"task": "refusal"}, "L0H4 makes a refusal less likely: it contributes to ref", ""),
        (
            -1.0,
            {"task": "refusal"},
            "L0H3 makes a refusal likelier still: it contributes to reversed refusal",
            "",
        ),
        (1.0, {"task": "odd_one_out", "op": "patch"}, "patching L0H4 makes the odd name less", ""),
        (-1.0, {"op": "mean"}, f"mean-ablating L0H3 {LIKELIER}: it contributes to supp", LESS),
        (-1.0, {"op": "scale", "factor": 0.5}, f"scaling L0H3 {LIKELIER}: it contributes to", LESS),
        (-1.0, {"op": "scale", "factor": 2.0}, f"scaling L0H4 {LESS}: it contributes to supp", ""),
    ],
)
def test_the_log_says_what_an_edit_of_a_component_does_and_what_follows(
    base: float, options: dict[str, Any], first: str, last: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = said_of(caplog, MOVED, base, **options)
    assert first in told.splitlines()[1]
    assert not last or f"{last}: it works against " in told.splitlines()[2]
    assert f"mean delta_logit {base:+.3f} nats" in told
    assert "over 16 sentences; noise floor 0.1" in told
    assert "not distinguishable" not in told


def test_the_log_names_five_components_and_which_cannot_be_told_from_0(
    caplog: pytest.LogCaptureFixture,
) -> None:
    effects = {f"L0H{h}": [0.2 * h, -0.1 * h] * 8 for h in (3, 6, 1, 0, 5, 2, 4)}
    told = said_of(caplog, effects, -1.0).splitlines()[1:]
    assert [line.split("removing ")[1][:4] for line in told] == [f"L0H{h}" for h in (6, 5, 4, 3, 2)]
    assert all(line.endswith("(not distinguishable from 0)") for line in told)


LONE_Q = {(5, 1): "0.062", (6, 2): "0.062", (15, 1024): "0.062"}  # of sentences and heads
LONE_Q |= dict.fromkeys([(6, 1), (16, 1024), (21, 1024), (40, 99)], "")


@pytest.mark.parametrize(("n_sentences", "n_heads"), LONE_Q)
def test_the_log_says_when_sentences_are_too_few_for_any_q_below_five_percent(
    n_sentences: int, n_heads: int, caplog: pytest.LogCaptureFixture
) -> None:
    told = said_of(caplog, {"L0H3": [0.3] * n_sentences}, -1.0, n_heads)
    lone_q = LONE_Q[n_sentences, n_heads]
    assert ("too few" in told) == bool(lone_q)
    assert not lone_q or f"{n_heads} cannot reach q below {lone_q}\n" in told


@pytest.mark.parametrize(
    ("effects", "base", "why"),
    [(MOVED, [0.9, -1.0] * 8, "interval covers 0"), ({"L0H0": [1.0]}, -1.0, "a single sentence")],
)
def test_the_log_calls_no_component_a_contributor_where_the_base_is_not_clear(
    effects: Effects, base: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = said_of(caplog, effects, base)
    assert why in told
    assert "contributes to" not in told
    assert "works against" not in told


def test_the_log_of_a_single_sentence_tells_no_number_that_is_none(
    llama: str, tmp_path: Path
) -> None:
    log = (finish(llama, tmp_path, "--num_samples", "1") / "run.log").read_text()
    assert not re.findall(r".*\bnan\b.*", log)


# ----- drawn anew from a results file

DRAWN = ["circuit_heads.csv", "circuit_heatmap.png", "circuit_summary.png"]
Redraw = Callable[..., list[str]]


def findings_in(log: str) -> list[str]:
    """What is said of the base and of components, between the stages."""
    lines = itertools.dropwhile(lambda line: not line.startswith("mean delta"), log.splitlines())
    return list(itertools.takewhile(lambda line: not line.startswith(("-----", "redrawn")), lines))


@pytest.fixture()
def redraw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Redraw:
    """Draw anew into a folder, without a model; what is said of the findings."""

    def call(source: Path, folder: Path, *flags: str) -> list[str]:
        monkeypatch.setattr(tracing, "from_hub", lambda *a, **k: pytest.fail("asked for a model"))
        capsys.readouterr()
        argv = ["--from_csv", str(source), "--output_dir", str(folder), *flags]
        assert tracing.main(argv) == 0
        return findings_in(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "flags",
    [
        "--num_samples 6 --controls",
        "--num_samples 3 --kind attn --bf16",
        "--num_samples 3 --kind neuron --neurons 0-2",
        "--num_samples 5 --task odd_one_out --op patch --patch_into b",
        "--num_samples 6 --task refusal --seed 7 --num_bootstrap 150 --top_k 3",
        "--num_samples 6 --op scale --factor 2 --layers 0",
    ],
)
def test_redrawing_a_run_gives_the_same_findings_and_figures(
    flags: str, llama: str, tmp_path: Path, redraw: Redraw
) -> None:
    run, new = finish(llama, tmp_path / "run", "--heatmap", *flags.split()), tmp_path / "new"
    told = redraw(run / "circuit_results.csv", new, "--heatmap")
    assert told == findings_in((run / "run.log").read_text())
    assert sorted(path.name for path in new.iterdir()) == DRAWN
    for name in DRAWN:
        assert (new / name).read_bytes() == (run / name).read_bytes(), name


def write_run(folder: Path, **recorded: Any) -> Path:
    """A results file beside the record of a run with some flags."""
    folder.mkdir()
    effects = {f"L0H{h}": [0.1 * h + 0.02 * i**2 for i in range(8)] for h in range(4)}
    table = results(effects, [-1.0 - 0.1 * i for i in range(8)], op=recorded.get("op", "zero"))
    table.to_csv(folder / "circuit_results.csv", index=False)
    record = {"noise_floor": 0.5, "config": {"layers": "all", "given": None, **recorded}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder / "circuit_results.csv"


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
    name: str, one: Any, other: Any, more: dict[str, Any], tmp_path: Path, redraw: Redraw
) -> None:
    first = write_run(tmp_path / "first", **more, **{name: one})
    second = write_run(tmp_path / "second", **more, **{name: other})

    def drawn(source: Path, *flags: str) -> list[Any]:
        told, new = redraw(source, tmp_path / "new", *flags), tmp_path / "new"
        return [told, *((new / file).read_bytes() for file in (DRAWN[0], DRAWN[2]))]

    recorded, of_other = drawn(first), drawn(second)
    assert recorded != of_other
    assert drawn(first, f"--{name}={other}") == of_other
    assert drawn(second, f"--{name}={one}") == recorded


def test_redrawing_in_place_takes_the_recorded_noise_floor_and_leaves_the_run_as_it_was(
    tmp_path: Path, redraw: Redraw
) -> None:
    source = write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    assert "noise floor 0.5" in redraw(source, source.parent)[0]
    assert {path: path.read_bytes() for path in before} == before
    heads = read(source.parent, "circuit_heads.csv")
    assert heads["above_noise"].tolist() == [False, False, True, True]  # 0.35 to 0.65


def test_redrawing_compares_with_another_file(tmp_path: Path, redraw: Redraw) -> None:
    source, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    told = redraw(source, tmp_path / "new", "--compare", str(other))
    assert f"(zero here, zero in {other}): 1.000" in told[-2]
    assert not read(tmp_path / "new", "circuit_heads.csv")["growth_flag"].any()


@pytest.mark.parametrize("spoilt", ["record", "folder", "comparison"])
def test_what_redrawing_cannot_use_is_refused_by_name(
    spoilt: str, tmp_path: Path, answer: Answer
) -> None:
    source, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    argv = ["--from_csv", str(source), "--output_dir", str(tmp_path / "new")]
    if spoilt == "record":
        named = source.with_name("run.json")
        named.write_text("[]")
    elif spoilt == "folder":
        named = other.parent  # holds another run
        argv[-1] = str(named)
    else:
        named = other
        other.write_text(other.read_text().replace("s00", "t00"))  # shares no sample
        argv += ["--compare", str(other)]
    before = sorted(other.parent.iterdir())
    code, _, error = answer(*argv)
    assert code == 2
    assert str(named) in error
    assert sorted(other.parent.iterdir()) == before


def test_redrawing_into_a_folder_in_which_a_run_is_at_work_is_refused(
    tmp_path: Path, answer: Answer
) -> None:
    source = write_run(tmp_path / "run")
    lock = source.parent / ".parts" / "lock"
    lock.parent.mkdir()
    argv = ["--from_csv", str(source), "--output_dir", str(source.parent)]
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(answer, *argv, says=["another run is at work", str(source.parent)])
    assert not (source.parent / "circuit_heads.csv").exists()
    assert answer(*argv)[0] == 0


# ----- files of somebody else

SEVEN = "sample_id,n_constraints,layer,head,delta_logit_base,delta_logit_head,head_effect"
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


def test_a_file_with_the_seven_columns_is_enough(tmp_path: Path, redraw: Redraw) -> None:
    redraw(write_theirs(tmp_path / "theirs.csv"), tmp_path / "new", "--heatmap")
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(2) for j in range(3)]
    expected = [0.1 * head - 0.05 * layer + 0.025 for layer in range(2) for head in range(3)]
    assert heads["mean"].tolist() == pytest.approx(expected)
    assert (heads["n_sentences"] == 6).all()  # without a column of units every sample is one
    assert heads["above_noise"].isna().all()  # no noise floor is known
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == DRAWN


def test_columns_of_units_groups_and_op_are_heeded(tmp_path: Path, redraw: Redraw) -> None:
    lines = [f"{line},{'xyz'[int(line[1]) // 2]},,mean" for line in THEIRS]
    lines += [f"n{line[1:]},w,{tracing.NO_ODD_ONE},mean" for line in THEIRS]
    source = write_theirs(tmp_path / "theirs.csv", lines, f"{SEVEN},unit,group,op")
    assert "mean-ablating L0H2" in redraw(source, tmp_path / "new")[2]
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert (heads[["n_sentences", "n_samples"]] == [3, 6]).all(axis=None)

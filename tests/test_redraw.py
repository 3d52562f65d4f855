"""Tables, figures and findings of finished results, made again without a model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock

import llama3_circuit_tracing as tracing
from by_hand import results
from conftest import ROOT, Answer, command_line, finish, read, record_of, refuses
from llama3_circuit_tracing import TraceOptions

pytestmark = pytest.mark.usefixtures("coarse_figures")
RESULTS, HEADS = "circuit_results.csv", "circuit_heads.csv"
DRAWN = [HEADS, "circuit_heads.png", "circuit_heatmap.png", "circuit_summary.png"]
Redraw = Callable[..., list[str]]


def findings_of(folder: Path, command: str = "redraw") -> list[str]:
    """What is said of the base and of components, without stages and model."""
    entries = record_of(folder)["commands"][command]["findings"]
    lines = [entry["text"] for entry in entries if entry["level"] != "heading"]
    first = next(i for i, line in enumerate(lines) if line.startswith("mean delta"))
    return lines[first:]


@pytest.fixture()
def redraw(monkeypatch: pytest.MonkeyPatch) -> Redraw:
    """Draw anew into a folder, without a model; what is said of the findings."""

    def call(source: Path, folder: Path, *flags: str) -> list[str]:
        monkeypatch.setattr(tracing, "from_hub", lambda *a, **k: pytest.fail("asked for a model"))
        argv = ["redraw", str(source), "--output_dir", str(folder), *flags]
        assert tracing.main(argv) == 0
        return findings_of(folder)

    return call


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of the files of a folder, of parts too."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ----- a run of this script


@pytest.mark.parametrize(
    "flags",
    [
        "--num_samples 6 --controls --seed 7 --top_k 3",
        "--num_samples 5 --task odd_one_out --op patch --patch_into b --kind neuron --neurons 0-2",
        "--num_samples 6 --task refusal --op scale --factor 2 --kind attn --bf16 --positions last",
        "--num_samples 6 --method atp",
    ],
)
def test_redrawing_a_run_gives_the_same_findings_and_figures(
    flags: str, llama: str, tmp_path: Path, redraw: Redraw
) -> None:
    run, new = finish(llama, tmp_path / "run", "--heatmap", *flags.split()), tmp_path / "new"
    by_group = {"circuit_groups.csv", "circuit_groups.png"} if "--task" in flags else set()
    for source in (run, run / RESULTS):
        assert redraw(source, new) == findings_of(run, "trace")
        files = {path.name for path in new.iterdir() if path.name[0] != "."}
        assert files == {*DRAWN, *by_group, tracing.REPORT_FILE, "run.json"}
        for name in (*DRAWN, *by_group):
            assert (new / name).read_bytes() == (run / name).read_bytes(), name
    shutil.copy(run / RESULTS, tmp_path / "alone.csv")
    redraw(tmp_path / "alone.csv", tmp_path / "alone")  # without record or noise floor
    recorded, drawn = (read(folder, HEADS) for folder in (run, tmp_path / "alone"))
    unlike = [name for name in recorded if re.search("above_noise|share_moved|verdict", name)]
    pd.testing.assert_frame_equal(drawn.drop(columns=unlike), recorded.drop(columns=unlike))


def test_redrawing_in_place_makes_lost_figures_again_and_leaves_all_else_as_it_was(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "6", "--screen", "2", "--confirm", "1", "--layers", "0"]
    run = finish(llama, tmp_path, *flags)
    before = files_in(run)
    for name in (HEADS, "circuit_heads.png", "circuit_summary.png"):
        (run / name).unlink()
    assert tracing.main(["redraw", str(run)]) == 0
    assert files_in(run) == before
    assert tracing.main(["redraw", str(run), "--top_k", "1", "--heatmap"]) == 0
    after = files_in(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {*DRAWN[1:], "run.json", tracing.REPORT_FILE}
    assert "circuit_heatmap.png" in record_of(run)["commands"]["trace"]["files"]


def test_what_is_redrawn_without_a_heatmap_has_none_left(tmp_path: Path, redraw: Redraw) -> None:
    source = write_run(tmp_path / "run")
    for flags in (["--heatmap"], [], ["--heatmap"]):
        redraw(source, tmp_path / "new", *flags)
        assert (tmp_path / "new" / "circuit_heatmap.png").exists() == bool(flags)


# ----- which options a run was made with


def write_run(folder: Path, columns: dict[str, Any] | None = None, **recorded: Any) -> Path:
    """A results file beside the record of an earlier version with some options; columns are the
    file's own."""
    folder.mkdir()
    effects = {f"L0H{h}": [0.1 * h + 0.02 * i**2 for i in range(8)] for h in range(4)}
    table = results(effects, [-1.0 - 0.1 * i for i in range(8)], op=recorded.get("op", "zero"))
    table.assign(**(columns or {})).to_csv(folder / RESULTS, index=False)
    config = {"layers": "all", "given": None, **recorded}
    record = {"noise_floor": 0.5, "config": config, "fingerprint": {}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder / RESULTS


def options_of(folder: Path, columns: dict[str, Any], **recorded: Any) -> TraceOptions:
    """The options that a run of some columns and recorded options is taken to have."""
    return tracing.read_run(str(write_run(folder, columns, **recorded).parent)).options


@pytest.mark.parametrize(
    "options",
    [
        {"task": "odd_one_out"},
        {"op": "scale", "factor": 2.0},
        {"op": "patch", "patch_into": "b"},
        {"op": "mean", "positions": "differing"},
        {"method": "ig"},
    ],
)
def test_a_tables_columns_and_else_its_record_tell_of_its_run(
    options: dict[str, Any], tmp_path: Path
) -> None:
    expected = TraceOptions(**options)
    assert options_of(tmp_path / "columns", options) == expected
    assert options_of(tmp_path / "record", {}, **options) == expected
    others = {"task": "refusal", "method": "atp", "positions": "last", "top_k": 3, "seed": 7}
    both = options_of(tmp_path / "both", options, **others)
    assert both == TraceOptions(**{**others, **options})


def test_the_options_of_a_run_are_those_of_its_record(llama: str, tmp_path: Path) -> None:
    flags = ["--num_samples", "6", "--op", "patch", "--layers", "0-1", "--given", "L2mlp"]
    run = finish(llama, tmp_path, *flags, "--skip", "L0H1", "--screen", "1", "--top_k", "7")
    asked = tracing.parse_command_line(["--model_id", llama, *flags]).options
    options = tracing.read_run(str(run)).options
    for name in ("model_id", "num_samples", "op", "patch_into", "given", "task", "layers"):
        assert str(getattr(options, name)) == str(getattr(asked, name)), name
    assert (options.top_k, options.screen, options.row_method) == (7, 1, "exact")


@pytest.mark.parametrize(
    ("name", "one", "other", "more"),
    [
        ("top_k", 2, 3, {}),
        ("task", "suppression", "refusal", {}),
        ("factor", 0.5, 2.0, {"op": "scale"}),
    ],
)
def test_redrawing_heeds_the_recorded_options_unless_they_are_given_again(
    name: str, one: Any, other: Any, more: dict[str, Any], tmp_path: Path, redraw: Redraw
) -> None:
    first = write_run(tmp_path / "first", **more, **{name: one})
    second = write_run(tmp_path / "second", **more, **{name: other})

    def drawn(source: Path, *flags: str) -> list[Any]:
        findings, new = redraw(source, tmp_path / "new", *flags), tmp_path / "new"
        return [findings, *((new / file).read_bytes() for file in DRAWN if (new / file).exists())]

    recorded, of_other = drawn(first), drawn(second)
    assert recorded != of_other
    assert drawn(first, f"--{name}={other}") == of_other
    assert drawn(second, f"--{name}={one}") == recorded


SCALED = {"op": "scale", "factor": 2.0}
PATCHED = {"op": "patch", "patch_into": "a"}
CONTRARY: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    # the table's columns, an option, what is said
    "task": ({"task": "refusal"}, "--task suppression", ["--task suppression", "refusal"]),
    "op": ({}, "--op mean", ["--op mean", "zero"]),
    "op and factor": ({}, "--op scale --factor 2", ["scale", "zero"]),
    "factor": (SCALED, "--factor 3", ["--factor 3.0", "2.0"]),
    "patch_into": (PATCHED, "--patch_into b", ["--patch_into b", " a"]),
    "factor of another op": ({}, "--factor 2", ["--op scale and --factor go together"]),
    "scaled by what": ({"op": "scale"}, "", ["--op scale and --factor go together"]),
}


@pytest.mark.parametrize("case", CONTRARY)
def test_an_option_that_contradicts_the_table_is_refused_with_both_values(
    case: str, tmp_path: Path, answer: Answer
) -> None:
    columns, option, phrases = CONTRARY[case]
    source = write_run(tmp_path / "run", columns)
    argv = ["redraw", str(source), "--output_dir", str(tmp_path / "new"), *option.split()]
    refuses(answer, *argv, says=[str(source), *phrases])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("columns", [{"task": "refusal"}, {}, SCALED, PATCHED])
def test_an_option_that_says_what_the_table_says_is_taken(
    columns: dict[str, Any], tmp_path: Path, redraw: Redraw
) -> None:
    flags = [f"--{name}={value}" for name, value in {"op": "zero", **columns}.items()]
    source = write_run(tmp_path / "run", columns)
    assert redraw(source, tmp_path / "new", *flags) == redraw(source, tmp_path / "again")


def test_a_scaled_run_of_unknown_factor_is_redrawn_with_a_given_one(
    tmp_path: Path, redraw: Redraw
) -> None:
    source = write_run(tmp_path / "run", {"op": "scale"})
    for factor, verdict in {"0.5": "contributes to", "2": "works against"}.items():
        lines = redraw(source, tmp_path / "new", "--factor", factor)
        assert any(f"scaling L0H3: {verdict}" in line for line in lines)


def test_the_recorded_noise_floor_is_heeded(tmp_path: Path, redraw: Redraw) -> None:
    assert "noise floor 0.5" in redraw(write_run(tmp_path / "run"), tmp_path / "new")[0]
    heads = read(tmp_path / "new", HEADS)
    assert heads["above_noise"].tolist() == [False, False, True, True]  # 0.35 to 0.65


def test_an_option_that_redrawing_does_not_read_is_refused(answer: Answer, tmp_path: Path) -> None:
    """Whichever command has it."""
    source = str(write_run(tmp_path / "run"))
    argv = ["redraw", source, "--output_dir", str(tmp_path / "new")]
    read_options = {entry.name for entry in tracing.option_fields(tracing.RedrawOptions)}
    names = {"kind", "positions", "seed", "layers", "screen", "overwrite", "dry_run", "model_id"}
    assert not names & read_options
    for name in sorted(names):
        refuses(answer, *argv, f"--{name}", says=[f"--{name}"])


# ----- where it is drawn


def test_anything_but_a_run_folder_needs_a_folder_to_be_drawn_in(
    tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of an earlier version too, and a folder without a record."""
    monkeypatch.chdir(tmp_path)
    source = write_run(tmp_path / "run")
    before = files_in(tmp_path)
    for given in (source, source.parent):
        refuses(answer, "redraw", str(given), says=[given.name, "--output_dir"])
    refuses(answer, "redraw", says=["a run folder, or a results CSV"])
    assert files_in(tmp_path) == before
    (source.parent / "run.json").unlink()
    folder = str(source.parent)
    refuses(answer, "redraw", folder, says=["needs --output_dir"])
    assert answer("redraw", folder, "--output_dir", folder)[0] == 0
    assert set(record_of(source.parent)["commands"]) == {"redraw"}


def test_nothing_is_measured_in_a_folder_of_redrawn_results(
    llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    source, folder = write_run(tmp_path / "run"), tmp_path / "redrawn"
    assert tracing.main(["redraw", str(source), "--output_dir", str(folder)]) == 0
    before = {name: text for name, text in files_in(folder).items() if name != "run.json"}
    argv = command_line(llama, folder, "--num_samples", "2")
    for more in ([], ["--overwrite"]):
        refuses(answer, *argv, *more, says=[f"{folder} holds redrawn results"])
    refuses(answer, "joint", "L0H1", "--output_dir", str(folder), says=["holds no experiment"])
    after = files_in(folder)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("text", ["[]", '{"noise_floor": "low", "fingerprint": {}}'])
def test_a_csv_is_redrawn_beside_another_programs_record_and_a_folder_with_it_is_not(
    text: str, tmp_path: Path, answer: Answer, redraw: Redraw
) -> None:
    source = write_run(tmp_path / "run")
    record = source.with_name("run.json")
    record.write_text(text)
    redraw(source, tmp_path / "new")
    argv = ["redraw", str(source.parent), "--output_dir", str(tmp_path / "other")]
    refuses(answer, *argv, says=[f"{record} is not a record of this script"])
    assert record.read_text() == text


@pytest.mark.parametrize("spoilt", ["another run", "a file"])
def test_what_redrawing_cannot_use_is_refused_by_name(
    spoilt: str, tmp_path: Path, answer: Answer, llama: str
) -> None:
    source, other = write_run(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    if spoilt == "another run":
        finish(llama, other, "--num_samples", "2", "--layers", "0")
        culprit = other
    else:
        culprit = other / HEADS
        culprit.write_text("mine")
    before = files_in(other)
    refuses(answer, "redraw", str(source), "--output_dir", str(other), says=[str(culprit)])
    after = files_in(other)
    assert {name: content for name, content in after.items() if ".parts" not in name} == {
        name: content for name, content in before.items() if ".parts" not in name
    }


def test_a_folder_in_which_a_run_is_at_work_is_not_redrawn(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    run = finish(llama, tmp_path, "--num_samples", "2", "--layers", "0")
    (run / HEADS).unlink()
    with FileLock(run / ".parts" / "lock"):
        refuses(answer, "redraw", str(run), says=["another run is at work", str(run)])
    assert not (run / HEADS).exists()
    assert answer("redraw", str(run))[0] == 0
    assert (run / HEADS).exists()


# ----- files of somebody else

SEVEN = ",".join(tracing.REQUESTED_COLUMNS)
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
    heads = read(tmp_path / "new", HEADS)
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(2) for j in range(3)]
    expected = [0.1 * head - 0.05 * layer + 0.025 for layer in range(2) for head in range(3)]
    assert heads["mean"].tolist() == pytest.approx(expected)
    assert (heads["n_sentences"] == 6).all()  # without a column of units every sample is one
    assert heads["above_noise"].isna().all()  # no noise floor is known
    assert {*DRAWN} <= {path.name for path in (tmp_path / "new").iterdir()}


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        ("", "removing L0H3: contributes to"),
        ("--op patch", "patching L0H3: contributes to"),
        ("--op scale --factor 3", "scaling L0H3: works against"),
    ],
)
def test_options_tell_of_a_table_without_op_how_it_was_made(
    flags: str, phrase: str, tmp_path: Path, redraw: Redraw
) -> None:
    """Amplifying turns every role."""
    table = results({"L0H3": [0.3] * 16, "L0H4": [-0.2] * 16}).drop(columns=["op", "prompts"])
    table.to_csv(tmp_path / "t.csv", index=False)
    lines = redraw(tmp_path / "t.csv", tmp_path / "out", *flags.split())
    assert any(line.startswith(f"{phrase} suppression; ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "taken"),
    [("", "--task suppression --op zero"), ("--op patch", "--task suppression")],
)
def test_what_a_table_does_not_tell_of_its_run_is_warned_of_as_taken(
    flags: str, taken: str, tmp_path: Path, answer: Answer
) -> None:
    source = write_theirs(tmp_path / "theirs.csv")
    argv = ["redraw", str(source), "--output_dir", str(tmp_path / "out"), *flags.split()]
    code, out, _ = answer(*argv)
    assert code == 0
    assert f"{source} does not tell how it was made: {taken} is taken" in out


def test_columns_of_units_groups_and_op_are_heeded(tmp_path: Path, redraw: Redraw) -> None:
    lines = [f"{line},{'xyz'[int(line[1]) // 2]},,mean" for line in THEIRS]
    lines += [f"n{line[1:]},w,{tracing.NO_ODD_ONE},mean" for line in THEIRS]
    source = write_theirs(tmp_path / "theirs.csv", lines, f"{SEVEN},unit,group,op")
    assert any("mean-ablating L0H2" in line for line in redraw(source, tmp_path / "new"))
    heads = read(tmp_path / "new", HEADS)
    assert (heads[["n_sentences", "n_samples"]] == [3, 6]).all(axis=None)


def test_the_shipped_results_are_redrawn(tmp_path: Path, redraw: Redraw) -> None:
    shipped = ROOT / "outputs" / "tiny_llama"
    redraw(shipped / RESULTS, tmp_path / "new")
    drawn, recorded = read(tmp_path / "new", HEADS), read(shipped, HEADS)
    pd.testing.assert_frame_equal(drawn, recorded[list(drawn)])

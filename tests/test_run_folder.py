"""A run folder: resumed, refused or started afresh, and whole after any interruption."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import llama3_circuit_tracing as tracing
from by_hand import prepared, q_values
from conftest import (
    HANGS,
    ROOT,
    SCRIPT,
    Answer,
    finish,
    read,
    record_of,
    refuses,
    write_samples,
)
from test_sweep import EQUAL, TWO, largest_difference, naive_results, parts_of

EXTRAS = "--confirm 2 --num_random 3 --max_new_tokens 2 --heatmap --screen 4 --multipliers 0"
WITH_ALL_PARTS = [*TWO, "--layers", "0-1", "--controls", *EXTRAS.split(), "--graph", "s0000"]
FIRST_LAYER = [*TWO, "--layers", "0"]
RESULTS, HEADS = "circuit_results.csv", "circuit_heads.csv"


def rows_run(patch: pytest.MonkeyPatch, limit: int = 1000) -> list[int]:
    """How many rows each forward with edits was asked for; more than the limit do not fit."""
    asked: list[int] = []
    run_rows = tracing.run_rows

    def limited(traced: Any, clean: Any, rows: Any, **reads: Any) -> Any:
        asked.append(len(rows))
        if len(rows) > limit:
            raise MemoryError
        return run_rows(traced, clean, rows, **reads)

    patch.setattr(tracing, "run_rows", limited)
    patch.setattr(tracing, "self_test", lambda exp: [])
    return asked


def parts(folder: Path, kind: str = "") -> list[Path]:
    return sorted((folder / ".parts").glob(f"{kind}*.json"))


@pytest.fixture(scope="module")
def two_runs(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with parts of every kind, and another such run of another seed."""
    folders = [tmp_path_factory.mktemp(seed) for seed in ("one", "other")]
    for i, folder in enumerate(folders):
        finish(llama, folder, *WITH_ALL_PARTS, "--seed", str(i))
    return folders


@pytest.fixture()
def whole(two_runs: list[Path], tmp_path: Path) -> Path:
    """A copy of the first of them."""
    return Path(shutil.copytree(two_runs[0], tmp_path / "whole"))


@pytest.fixture(scope="module")
def of_first_layer(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("begun"), *FIRST_LAYER)


@pytest.fixture()
def begun(of_first_layer: Path, tmp_path: Path) -> Path:
    """A folder of one's own with a run of the first layer."""
    return Path(shutil.copytree(of_first_layer, tmp_path / "begun"))


# ----- what a folder keeps


def test_more_layers_in_the_same_folder_compute_only_what_is_missing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(llama, tmp_path, *TWO, "--layers", "0,2", "--heads", "0-2")
    asked = rows_run(monkeypatch)
    finish(llama, tmp_path, *TWO)
    n_jittered_in_layer_1 = 4
    assert sum(asked) == 12 - 6 + n_jittered_in_layer_1
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


@pytest.fixture(scope="module")
def at_once(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("at_once"), *TWO, *ONE_BY_ONE)


# so that a row's last bits do not depend on how many others are computed beside it
ONE_BY_ONE = ["--rows_per_forward", "1", "--tree_tokens", "1"]
GROWN = ["--layers 2|--layers 0,1|", "--heads 3|--heads 0-1|--heads 2|", "--heads 1|--layers 0-1|"]


@pytest.mark.parametrize("lines", GROWN)
def test_a_folder_that_grew_bit_by_bit_holds_what_one_run_of_all_does(
    lines: str, llama: str, at_once: Path, tmp_path: Path
) -> None:
    widest = 0
    for line in lines.split("|"):
        flags = [*TWO, *ONE_BY_ONE, *line.split()]
        heads = read(finish(llama, tmp_path, *flags), HEADS)
        assert heads["label"].tolist() == [c.label for c in prepared(llama, *flags).components]
        widest = max(widest, len(heads))
        assert set(heads["n_tests"]) == {widest}
    assert (tmp_path / RESULTS).read_bytes() == (at_once / RESULTS).read_bytes()
    assert record_of(tmp_path)["noise_floor"] == record_of(at_once)["noise_floor"]
    jittered = pd.concat(parts_of(tmp_path)).query("draw >= 0")
    assert not jittered.duplicated(["sample_id", "layer", "draw"]).any()


# ----- a table holds what its command names, whatever else was measured before

SIX = ["--num_samples", "6", *ONE_BY_ONE]
NARROW = [*SIX, "--layers", "0-1", "--heads", "1,3", "--confirm", "1", "--num_random", "2"]
OF_TABLE = ("circuit.json", "circuit_confirm.csv")


@pytest.fixture(scope="module")
def wide(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("wide"), *SIX)


@pytest.fixture(scope="module")
def narrow(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow command in a folder of its own."""
    return finish(llama, tmp_path_factory.mktemp("narrow"), *NARROW)


@pytest.fixture(scope="module")
def narrowed(llama: str, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow command in a folder that has seen the wide one."""
    folder = shutil.copytree(wide, tmp_path_factory.mktemp("narrowed") / "run")
    return finish(llama, Path(folder), *NARROW)


def test_a_narrower_command_gives_the_table_of_a_folder_of_its_own(
    narrow: Path, narrowed: Path
) -> None:
    """Rows, circuit, joint ablation and noise floor; q alone heeds what was tested before."""
    assert read(narrow, HEADS)["label"].tolist() == ["L0H1", "L0H3", "L1H1", "L1H3"]
    columns = list(read(narrow))
    pd.testing.assert_frame_equal(read(narrowed)[columns], read(narrow), check_exact=True)
    for name in OF_TABLE:
        assert (narrowed / name).read_bytes() == (narrow / name).read_bytes()
    assert record_of(narrowed)["noise_floor"] == record_of(narrow)["noise_floor"]
    corrected = ["q", "n_tests", "verdict"]
    heads = [read(folder, HEADS).drop(columns=corrected) for folder in (narrow, narrowed)]
    pd.testing.assert_frame_equal(*heads, check_exact=True)


def test_a_narrower_table_is_corrected_for_the_widest_before_and_the_log_says_so(
    narrow: Path, narrowed: Path
) -> None:
    own, heads = read(narrow, HEADS), read(narrowed, HEADS)
    assert (set(own["n_tests"]), set(heads["n_tests"])) == ({4}, {12})
    p = heads["p"].tolist()
    assert own["q"].tolist() == pytest.approx(q_values(p))
    assert heads["q"].tolist() == pytest.approx(q_values([*p, *[1.0] * 8])[:4])
    assert own["q"].tolist() != heads["q"].tolist()
    said = "q corrects for 12 components: this folder has tested them before"
    assert said in (narrowed / "run.log").read_text()
    assert "has tested them before" not in (narrow / "run.log").read_text()


def test_redrawing_a_narrower_table_keeps_its_correction(narrowed: Path, tmp_path: Path) -> None:
    """Also where the table lies alone."""
    shutil.copy(narrowed / RESULTS, tmp_path)
    argv = ["--from_csv", str(tmp_path / RESULTS), "--output_dir", str(tmp_path / "redrawn")]
    assert tracing.main(argv) == 0
    redrawn = read(tmp_path / "redrawn", HEADS)
    assert redrawn[["q", "n_tests"]].equals(read(narrowed, HEADS)[["q", "n_tests"]])


@pytest.mark.usefixtures("no_weights")
def test_the_wider_command_comes_back_without_computing(
    llama: str, wide: Path, narrowed: Path, tmp_path: Path
) -> None:
    """Nor do the narrower one before and after it, whose correction stays: parts are kept."""
    folder = Path(shutil.copytree(narrowed, tmp_path / "run"))
    names = [RESULTS, HEADS, *OF_TABLE]
    of_narrow = [(folder / name).read_bytes() for name in names]
    for flags in (NARROW, SIX, NARROW):
        finish(llama, folder, *flags)
        if flags == NARROW:
            assert [(folder / name).read_bytes() for name in names] == of_narrow
        else:
            for name in (RESULTS, HEADS):
                assert (folder / name).read_bytes() == (wide / name).read_bytes()


@pytest.mark.parametrize("way", ["--overwrite", "no parts", "the parts of another run"])
def test_what_was_tested_is_forgotten_with_its_parts(
    way: str, llama: str, wide: Path, two_runs: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "run"))
    flags = [*SIX, "--layers", "0"]
    if way == "--overwrite":
        flags.append(way)
    if way == "no parts":
        shutil.rmtree(folder / ".parts")
    if way == "the parts of another run":
        shutil.copy(two_runs[1] / ".parts" / "tested.json", folder / ".parts")
    assert set(read(finish(llama, folder, *flags), HEADS)["n_tests"]) == {4}


@pytest.mark.parametrize(("line", "n"), [("--layers 0 --heads 0", 4), ("--layers 1-2", 8)])
def test_the_widest_table_counts_and_not_the_sum_of_all(
    line: str, n: int, llama: str, begun: Path
) -> None:
    """After a table of the four heads of layer 0."""
    heads = read(finish(llama, begun, *TWO, *line.split()), HEADS)
    assert len(heads) == len(prepared(llama, *line.split()).components)
    assert set(heads["n_tests"]) == {n}


# ----- what a folder keeps, and what it refuses


def test_outputs_of_options_no_longer_given_do_not_stay(llama: str, whole: Path) -> None:
    """But for a circuit, which tells itself where it is from and may be an input."""
    others = {"circuit_positions", "circuit_paths", "circuit_directions"}  # not with a screen
    asked = {name for name in tracing.OUTPUTS if name.split(".")[0] not in others}
    asked.remove("directions.safetensors")
    kept = {name for name, always in tracing.OUTPUTS.items() if always} | {"circuit.json"}
    for there in (asked, kept):
        assert {name for name in tracing.OUTPUTS if (whole / name).exists()} == there
        finish(llama, whole, *TWO, "--layers", "0-1", "--controls", "--seed", "0")
    assert "behaviour" not in record_of(whole)


REFUSED = {  # with what the sentence says
    "--seed 7 --op scale --factor 2": ["op: 'zero' there, 'scale' now", "seed: 42", "prompts:"],
    "--overwrite --layers 99": ["--layers 99"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_command_names_what_differs_and_deletes_nothing(
    line: str, llama: str, begun: Path, answer: Answer
) -> None:
    files = [begun / RESULTS, begun / "run.json", *parts(begun)]
    before = [path.read_bytes() for path in files]
    command = ["--model_id", llama, "--output_dir", str(begun), *TWO]
    code, _, err = answer(*command, *line.split())
    assert code == 2
    assert all(text in err for text in REFUSED[line])
    assert "dtype" not in err and "layers:" not in err
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_run_does_not_go_on_with_other_weights(
    weights: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    """In the same folder, under the same name and with the same config."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    command = ["--model_id", str(model), "--output_dir", str(tmp_path / "run"), *TWO]
    for factor, code in ((1.0, 0), (1.01, 2)):
        save = save_file if weights == "model.safetensors" else torch.save
        save({name: factor * tensor for name, tensor in state.items()}, model / weights)
        found, _, err = answer(*command, "--layers", "0")
        assert found == code, err
    assert "holds a run that differs in model: " in err


def test_overwrite_starts_afresh_and_deletes_only_files_of_this_script(
    llama: str, whole: Path
) -> None:
    mine = [whole / "notes.txt", whole / ".parts" / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    finish(llama, whole, *TWO, "--layers", "1", "--seed", "7", "--overwrite")
    assert set(read(whole)["layer"]) == {1}
    assert all(path.exists() for path in mine)
    assert [path.stem.split("-")[0] for path in parts(whole)] == ["base", "sweep", "tested"]
    assert not (whole / "generations.jsonl").exists()


def test_a_finished_run_computes_nothing_again(
    llama: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [p for p in whole.iterdir() if p.suffix in (".csv", ".png", ".jsonl")]
    before = [path.read_bytes() for path in outputs]
    assert len(outputs) == 15
    for path in outputs:
        path.unlink()
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(llama, whole, *WITH_ALL_PARTS, "--seed", "0")
    assert [path.read_bytes() for path in outputs] == before


def seal_nonsense(path: Path, *_: bytes) -> None:
    """Nested without end, under the seal of a good part."""
    folder, text = tracing.RunFolder(path.parents[1]), "[" * 100_000
    folder.key = tracing.digest(record_of(folder.path)["fingerprint"])
    path.write_text(f"{folder.seal(path.stem, text)}\n{text}")


def change_a_digit(path: Path, own: bytes, *_: bytes) -> None:
    path.write_bytes(re.sub(rb"\d(?=\D*$)", lambda n: b"1" if n[0] == b"0" else b"0", own))


# of the part's place: its content, another part's, and another run's
SPOILT: dict[str, Callable[[Path, bytes, bytes, bytes], Any]] = {
    "truncated": lambda path, own, neighbour, foreign: path.write_bytes(own[:-40]),
    "empty": lambda path, own, neighbour, foreign: path.write_bytes(b""),
    "with another digit": change_a_digit,
    "another part": lambda path, own, neighbour, foreign: path.write_bytes(neighbour),
    "of another run": lambda path, own, neighbour, foreign: path.write_bytes(foreign),
    "no text": lambda path, own, neighbour, foreign: path.write_bytes(b"\xff\xfe\x00[]"),
    "a folder": lambda path, *_: (path / "deeper").mkdir(parents=True),
    "a link to itself": lambda path, *_: path.symlink_to(path),
    "nonsense": seal_nonsense,
}
KINDS = ["sweep", "base", "joint", "replies"]


@pytest.mark.parametrize("turn", range(3))
def test_a_spoilt_part_is_computed_again(
    turn: int, llama: str, two_runs: list[Path], whole: Path
) -> None:
    """One of each kind, spoilt in another way each."""
    neighbour = parts(whole, "sweep")[-1].read_bytes()
    ways = [*SPOILT.values(), *SPOILT.values()][4 * turn :]
    for kind, spoil in zip(KINDS, ways, strict=False):
        path, foreign = (parts(folder, kind)[0] for folder in (whole, two_runs[1]))
        own = path.read_bytes()
        path.unlink()
        spoil(path, own, neighbour, foreign.read_bytes())
        assert not path.is_file() or path.read_bytes() != own
    finish(llama, whole, *WITH_ALL_PARTS, "--seed", "0")
    for name in (RESULTS, "circuit_confirm.csv", "generations.jsonl"):
        assert (whole / name).read_bytes() == (two_runs[0] / name).read_bytes()
    told = (whole / "run.log").read_text()
    assert told.count("is not a part of this run; computing it again") == len(KINDS)
    assert all(path.is_file() for path in parts(whole))


# ----- interruption, as real processes


# Run by Python before the script: a process that has written some parts of the sweep says so and
# waits for a line on stdin.
WAIT_AFTER_PARTS = """
import os, sys

replace, written = os.replace, []

def replace_and_wait(source, target):
    replace(source, target)
    if os.path.basename(target).startswith("sweep-"):
        written.append(target)
        if len(written) == int(os.environ["WAITS_AFTER"]):
            print("waiting", os.getpid(), flush=True)
            sys.stdin.readline()

os.replace = replace_and_wait
"""


def start(model: str, folder: Path, *launcher: str, **environment: str) -> subprocess.Popen[str]:
    """A run of many jobs."""
    command = [sys.executable, *launcher, str(SCRIPT), *many_jobs(model, folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a script's background jobs ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def start_and_wait(
    model: str, folder: Path, n_parts: int, n_processes: int, *launcher: str
) -> tuple[subprocess.Popen[str], list[int]]:
    """A run whose processes wait, once each has written so many parts; and their ids."""
    site = folder.with_name(f"{folder.name}-site")
    site.mkdir()
    (site / "sitecustomize.py").write_text(WAIT_AFTER_PARTS)
    settings = {"PYTHONPATH": str(site), "WAITS_AFTER": str(n_parts)}
    process = start(model, folder, *launcher, **settings)
    assert process.stdout is not None
    waiting: list[int] = []
    while len(waiting) < n_processes:
        line = process.stdout.readline()
        assert line, process.communicate()[1]  # empty where the process has ended
        waiting += [int(number) for number in re.findall(r"waiting (\d+)", line)]
    return process, waiting


def many_jobs(model: str, folder: Path) -> list[str]:
    flags = ["--num_samples", "12", "--tree_tokens", "100", "--rows_per_forward", "1"]
    return ["--model_id", model, "--output_dir", str(folder), *flags]


@pytest.fixture(scope="module")
def uninterrupted(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert tracing.main(many_jobs(llama, folder)) == 0
    return folder


@pytest.mark.parametrize(("stop", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was_and_ends_the_same(
    stop: str, code: int, llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process, _ = start_and_wait(llama, tmp_path, 3, 1)
    process.send_signal(getattr(signal, stop))
    said = process.communicate(timeout=HANGS)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    done = len(parts(tmp_path, "sweep"))
    assert done == 3 < len(parts(uninterrupted, "sweep"))
    assert not (tmp_path / RESULTS).exists()
    assert tracing.main(many_jobs(llama, tmp_path)) == 0
    assert (tmp_path / RESULTS).read_bytes() == (uninterrupted / RESULTS).read_bytes()
    again, before = (record_of(f)["run"]["forwards"] for f in (tmp_path, uninterrupted))
    rows_of_a_job = 4 + 4  # heads and jittered rows, one per forward
    assert before - again >= done * rows_of_a_job


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_give_the_same_and_survive_a_death(
    llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process, waiting = start_and_wait(llama, tmp_path, 1, 2, *TWO_PROCESSES)
    os.kill(waiting[-1], signal.SIGKILL)
    process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert len(parts(tmp_path, "sweep")) == 2
    assert not (tmp_path / RESULTS).exists()
    again = start(llama, tmp_path, *TWO_PROCESSES)
    said = again.communicate(timeout=HANGS)[1]
    assert again.returncode == 0, said
    assert largest_difference(read(tmp_path), read(uninterrupted)) < EQUAL


ALL_STAGES = [*TWO, "--layers", "0-1", *EXTRAS.split(), "--graph", "s0000"]


def stop_after(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Have a run end as by SIGTERM once it has written a part of a kind."""
    write_part = tracing.RunFolder.write_part

    def write(self: Any, name: str, payload: Any) -> None:
        write_part(self, name, payload)
        if name.startswith(kind):
            raise SystemExit(143)

    patch.setattr(tracing.RunFolder, "write_part", write)


def tables(folder: Path) -> dict[str, bytes]:
    kinds = (".csv", ".jsonl", ".safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in kinds}


@pytest.fixture(scope="module")
def all_stages(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("all_stages"), *ALL_STAGES)


@pytest.mark.parametrize("again", [["--overwrite"], []], ids=["with it", "without it"])
@pytest.mark.parametrize("kind", ["base", "estimate", "sweep", "graph", "joint", "replies"])
def test_an_overwriting_run_that_is_stopped_goes_on_where_it_was(
    kind: str, again: list[str], llama: str, begun: Path, all_stages: Path
) -> None:
    """At whatever stage, and ends as if it had never stopped."""
    argv = ["--model_id", llama, "--output_dir", str(begun), *ALL_STAGES]
    before = {path: path.stat().st_mtime_ns for path in parts(begun)}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(kind, patch)
        assert tracing.main([*argv, "--overwrite"]) == 143
    done = {path: path.stat().st_mtime_ns for path in parts(begun)}
    assert parts(begun, kind)
    assert not before.items() & done.items(), "it started afresh"
    assert tracing.main([*argv, *again]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "and went on"
    assert tables(begun) == tables(all_stages)


@pytest.mark.parametrize("then", [["--overwrite"], ["--overwrite", "--top_k", "3"]])
def test_overwriting_a_finished_run_or_one_of_other_options_starts_afresh(
    then: list[str], llama: str, begun: Path
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(begun), *FIRST_LAYER]
    if len(then) > 1:  # unfinished, of the options without them
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "write_report", lambda *_: sys.exit(143))
            assert tracing.main(argv) == 143
    before = {path.name: path.stat().st_mtime_ns for path in parts(begun)}
    finish(llama, begun, *FIRST_LAYER, *then)
    after = {path.name: path.stat().st_mtime_ns for path in parts(begun)}
    assert before.keys() == after.keys()
    assert not before.items() & after.items()


def test_going_on_with_overwrite_keeps_the_rows_per_forward(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the folder's first command gave."""
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO]
    finish(llama, tmp_path, *FIRST_LAYER, "--rows_per_forward", "2")
    with pytest.MonkeyPatch.context() as patch:
        stop_after("sweep", patch)
        assert tracing.main(argv) == 143
    done = parts(tmp_path, "sweep")
    asked = rows_run(monkeypatch)
    assert tracing.main([*argv, "--overwrite"]) == 0
    assert max(asked) == 2
    assert set(done) <= set(parts(tmp_path, "sweep"))


# ----- memory and disk


def test_rows_are_halved_when_memory_runs_out_and_a_resumed_run_remembers(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = rows_run(monkeypatch, 3)
    flags = [*TWO, "--rows_per_forward", "8"]
    finish(llama, tmp_path, *flags, "--layers", "0")
    assert max(asked) == 8
    assert record_of(tmp_path)["rows_after_halving"] <= 3
    asked.clear()
    finish(llama, tmp_path, *flags)
    assert max(asked) <= 3
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    sync = os.fsync

    def full(file: int) -> None:
        if len(parts(tmp_path)) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    command = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = answer(*command)
    said = err.strip().splitlines()[-1]
    assert code == 1
    assert said.startswith("error: ") and "No space left on device" in said
    assert "None" not in said
    assert not list(tmp_path.glob("**/*.tmp"))
    assert len(parts(tmp_path)) == 3
    assert answer(*command)[0] == 0
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


# ----- what else may be found in a folder


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(
    llama: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model_id", llama, *TWO, "--output_dir", str(tmp_path)]
    prepare = tracing.prepare

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(tracing, "prepare", prepare)
        refuses(answer, *argv, says=[f"another run is at work in {tmp_path}"])
        return prepare(*arguments)

    monkeypatch.setattr(tracing, "prepare", meanwhile)
    finish(llama, tmp_path, *TWO)  # ends well, and the folder is free again
    finish(llama, tmp_path, *TWO)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "[" * 100_000,
        '{"fingerprint": "mine"}',
        '{"fingerprint": {}, "files": [1]}',
        '{"rows_after_halving": "many"}',
        '{"config": 7}',
        '{"noise_floor": "loud"}',
        "{}",
        '{"learning_rate": 0.1, "config": {}}',
        '{"written": "run.log"}',
        '{"written": ["../notes.txt"]}',
        '{"written": ["graphs/../../notes.json"]}',
        '{"written": ["notes.txt"]}',
    ],
    ids=lambda text: text[:20],
)
def test_a_record_of_nonsense_is_refused_and_left_alone(
    text: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    (tmp_path / "run.json").write_text(text)
    argv = ["--model_id", llama, "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[f"{tmp_path}/run.json is not a record"])
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows_after_halving", -5),
        ("rows_after_halving", 0),
        ("rows_after_halving", True),
        ("rows_per_forward", "many"),
    ],
)
def test_a_record_with_an_impossible_number_of_rows_is_refused_and_left_alone(
    name: str, value: Any, llama: str, begun: Path, answer: Answer
) -> None:
    record = record_of(begun)
    entries = record["fingerprint"] if name in record["fingerprint"] else record
    entries[name] = value
    (begun / "run.json").write_text(json.dumps(record))
    argv = ["--model_id", llama, *TWO, "--layers", "0-1", "--output_dir", str(begun)]
    refuses(answer, *argv, says=[f"{begun}/run.json"])
    assert record_of(begun) == record


def test_a_file_of_the_model_whose_digest_the_record_lacks_is_read_again(
    llama: str, begun: Path
) -> None:
    record = record_of(begun)
    lacking = {name: told[:2] for name, told in record["files"].items()}
    (begun / "run.json").write_text(json.dumps({**record, "files": lacking}))
    assert record_of(finish(llama, begun, *FIRST_LAYER))["files"] == record["files"]


def test_looking_whether_a_folder_can_be_used_leaves_no_file_and_takes_none(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("mine")
    tracing.make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
    assert (tmp_path / "probe").read_text() == "mine"


def test_what_a_dead_process_left_half_written_is_removed_and_nothing_else(
    llama: str, begun: Path
) -> None:
    (begun / "graphs").mkdir()
    drafts = [".run.json.7.tmp", ".parts/.base-0000.json.7.tmp", "graphs/.s0000-a.json.7.tmp"]
    others = [".mine.tmp", ".run.json.tmp", ".notes.txt.7.tmp", ".parts/.mine.json.7.tmp"]
    others += [".parts/offload-mine", "graphs/.mine.tmp", "graphs/.s0000.txt.7.tmp"]
    for name in (*drafts, *others):
        (begun / name).write_text("half")
    (begun / ".parts" / "offload-7").mkdir()
    finish(llama, begun, *FIRST_LAYER)
    assert not any((begun / name).exists() for name in (*drafts, ".parts/offload-7"))
    assert all((begun / name).read_text() == "half" for name in others)


def test_weights_offloaded_to_disk_lie_in_the_run_folder_while_it_works(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    load_model = tracing.load_model

    def watch(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return load_model(*arguments)

    monkeypatch.setattr(tracing, "load_model", watch)
    finish(llama, tmp_path, *FIRST_LAYER)
    assert seen == [tmp_path / ".parts"]


def test_a_full_disk_names_the_file(
    llama: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    argv = ["--model_id", llama, *TWO, "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[f"{tmp_path}/{RESULTS}: No space left on device"], code=1)


# ----- whose a file is

MINE = {  # a user's files, with names that this script's may have
    "generations.jsonl": "mine",
    "circuit_graph.csv": "mine",
    "circuit_confirm.png": "mine",
    "circuit.json": "mine",
    "notes.txt": "mine",
    ".mine.tmp": "mine",
    ".parts/mine.json": "mine",
    "graphs/graph-metadata.json": "mine",
    "graphs/deeper/notes.txt": "mine",
}


def put_mine(folder: Path) -> None:
    for name, text in MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_files_of_the_user_that_a_command_does_not_write_stay(
    flags: list[str], llama: str, tmp_path: Path
) -> None:
    """In a new folder, in one of this run, in one of another; and the page shows none of them."""
    put_mine(tmp_path)
    commands = [FIRST_LAYER, FIRST_LAYER, [*FIRST_LAYER, "--heatmap"]]
    if flags:
        commands.append([*FIRST_LAYER, "--seed", "7"])
    for command in commands:
        finish(llama, tmp_path, *command, *flags)
        assert {name: (tmp_path / name).read_text() for name in MINE} == MINE
        page = (tmp_path / "circuit_report.html").read_text()
        assert tracing.FIGURES["heads"] in page
        assert tracing.FIGURES["confirm"] not in page and "<th>reply</th>" not in page
    assert (tmp_path / "circuit_heatmap.png").exists() == (not flags)


TAKEN = {  # a user's file, and flags of a command that would write it
    "circuit_results.csv": "",
    "circuit_heads.csv": "",
    "circuit_report.html": "",
    "run.log": "",
    "circuit_heatmap.png": "--heatmap",
    "circuit_screen.csv": "--screen 2",
    "circuit_confirm.csv": "--ablate L0H0",
    "circuit_confirm.png": "--confirm 1",
    "circuit.json": "--confirm 1",
    "circuit_paths.png": "--via logits",
    "circuit_positions.csv": "--task odd_one_out --positions each --num_samples 1",
    "circuit_directions.png": "--along difference",
    "directions.safetensors": "--along logistic",
    "generations.jsonl": "--max_new_tokens 1",
    "circuit_steer.csv": "--max_new_tokens 1 --ablate L0H0 --multipliers 0",
    "circuit_graph_edges.csv": "--graph s0000",
    "graphs/s0000-a.json": "--graph s0000",
    "graphs/graph-metadata.json": "--graph s0001:b",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_of_the_user_is_not_overwritten_but_named_before_anything_is_measured(
    name: str, llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    """With --overwrite neither: it is not this script's."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO, *TAKEN[name].split()]
    for more in ([], ["--overwrite"]):
        refuses(answer, *argv, *more, says=[f"{tmp_path / name} would be overwritten"])
        assert (tmp_path / name).read_text() == "mine"
    assert not parts(tmp_path)


@pytest.mark.parametrize("name", ["circuit_heads.csv", "graphs"])
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_or_a_link_of_the_user_is_not_overwritten_either(
    name: str, kind: str, llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    target, path = tmp_path / "target", tmp_path / "run" / name
    path.parent.mkdir()
    target.write_text("mine")
    {"folder": path.mkdir, "link": lambda: path.symlink_to(target), "file": path.touch}[kind]()
    if (name, kind) == ("graphs", "folder"):
        (path / "s0000-a.json").mkdir()
        path /= "s0000-a.json"
    argv = ["--model_id", llama, "--output_dir", str(tmp_path / "run"), *TWO, "--graph", "s0000"]
    refuses(answer, *argv, says=[f"{path} would be overwritten"])
    assert path.is_symlink() == (kind == "link") and path.is_dir() == (kind == "folder")
    assert target.read_text() == "mine"


EVERYTHING = {
    "screen, circuit, replies, graph": WITH_ALL_PARTS[len(TWO) :],
    "directions": ["--along", "difference", "--num_samples", "4"],
    "one direction": [
        *["--along", "logistic", "--kind", "resid", "--num_samples", "4"],
        *["--confirm", "all", "--max_new_tokens", "1"],
    ],
    "paths": ["--via", "logits", "--ablate", "L0H0"],
    "positions": ["--task", "odd_one_out", "--positions", "each", "--num_samples", "1"],
}


@pytest.mark.parametrize("flags", EVERYTHING)
def test_the_record_lists_each_file_that_is_written_and_each_is_planned(
    flags: str, llama: str, tmp_path: Path
) -> None:
    argv = [*TWO, "--layers", "0-1", *EVERYTHING[flags]]
    finish(llama, tmp_path, *argv)
    there = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.as_posix() for path in there if path.parts[0] != ".parts"} - {"run.json"}
    assert set(record_of(tmp_path)["written"]) == names
    planned = set(tracing.planned_files(tracing.parse_args(argv)))
    # where --confirm all chooses nothing, it draws nothing
    assert {name for name in names if not name.startswith("graphs/")} <= planned
    if flags != "one direction":
        assert planned <= names


def test_a_file_is_listed_before_it_is_there_and_not_where_it_never_came(tmp_path: Path) -> None:
    """So that no death between the two makes a file foreign; what comes in a run is the user's."""
    for _ in range(2):
        folder = tracing.RunFolder(tmp_path)
        with folder.open():
            assert "circuit_steer.csv" not in folder.written
            path = folder.claim("circuit_steer.csv")
            assert "circuit_steer.csv" in record_of(tmp_path)["written"] and not path.exists()
    with folder.open():
        path.write_text("the user's")
        with pytest.raises(tracing.UsageError, match=r"circuit_steer\.csv would be overwritten"):
            folder.claim("circuit_steer.csv")
    path.unlink()
    with folder.open():
        folder.claim("circuit_steer.csv").write_text("the script's")
    with folder.open():
        assert folder.claim("circuit_steer.csv") == path


def as_of_the_version_before(folder: Path) -> None:
    record = record_of(folder)
    for name in ("written", "requested", "finished"):
        del record[name]
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("flags", [[], ["--overwrite", "--seed", "7"]], ids=["plain", "overwrite"])
def test_in_a_folder_of_the_version_before_files_with_this_scripts_names_are_its_own(
    flags: list[str], llama: str, whole: Path
) -> None:
    mine = [whole / name for name in ("notes.txt", "graphs/mine.json", ".mine.tmp")]
    for path in mine:
        path.write_text("mine")
    as_of_the_version_before(whole)
    finish(llama, whole, *TWO, "--layers", "0-1", "--controls", "--seed", "0", *flags)
    assert all(path.read_text() == "mine" for path in mine)
    kept = {name for name, always in tracing.OUTPUTS.items() if always}
    kept |= set() if flags else {"circuit.json"}
    assert {name for name in tracing.OUTPUTS if (whole / name).exists()} == kept
    assert (whole / "graphs" / "s0000-a.json").exists() == (not flags)


def test_a_folder_of_the_version_before_goes_on(
    llama: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tables(whole)
    as_of_the_version_before(whole)
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(llama, whole, *WITH_ALL_PARTS, "--seed", "0")
    assert tables(whole) == before


@pytest.mark.parametrize("name", [".parts/lock", "run.log"])
@pytest.mark.parametrize("there", [True, False], ids=["in a run", "in a new folder"])
def test_nothing_is_written_through_a_link(
    name: str, there: bool, llama: str, begun: Path, tmp_path: Path, answer: Answer
) -> None:
    folder, target = begun if there else tmp_path / "new", tmp_path / "target"
    target.write_text("mine")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    argv = ["--model_id", llama, "--output_dir", str(folder), *FIRST_LAYER]
    refuses(answer, *argv, says=[f"{folder / name} is a link"])
    assert target.read_text() == "mine"
    (folder / name).unlink()
    finish(llama, folder, *FIRST_LAYER)


@pytest.mark.parametrize("more", [[], ["--overwrite", "--seed", "7"]], ids=["once", "overwrite"])
def test_a_models_folder_may_be_the_output_folder_and_stays_whole(
    more: list[str], llama: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    finish(str(model), model, *FIRST_LAYER)
    if more:
        finish(str(model), model, *FIRST_LAYER, *more)
    assert {path: path.read_bytes() for path in before} == before


# ----- a folder in which nothing was measured


def test_a_run_that_measured_nothing_leaves_its_folder_to_any_other(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    """As if it had never been: the rows per forward are not taken up either."""
    argv = ["--model_id", llama, *FIRST_LAYER, "--output_dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        sentence = tracing.RunError("the weights do not load")
        patch.setattr(tracing, "load_model", lambda *_: (_ for _ in ()).throw(sentence))
        refuses(answer, *argv, "--rows_per_forward", "1", says=[str(sentence)], code=1)
    for folder in ("run", "new"):
        finish(llama, tmp_path / folder, *FIRST_LAYER, "--seed", "7")
    run, new = (record_of(tmp_path / folder)["fingerprint"] for folder in ("run", "new"))
    assert run == new and run["seed"] == 7
    assert tables(tmp_path / "run") == tables(tmp_path / "new")
    refuses(answer, *argv, says=["seed: 7 there, 42 now"])  # now there is something


@pytest.mark.parametrize("left", ["parts", "results"])
def test_what_was_measured_is_not_taken_for_nothing(
    left: str, llama: str, begun: Path, answer: Answer
) -> None:
    if left == "parts":
        (begun / RESULTS).unlink()
    else:
        shutil.rmtree(begun / ".parts")
    argv = ["--model_id", llama, *FIRST_LAYER, "--output_dir", str(begun), "--seed", "7"]
    refuses(answer, *argv, says=["seed: 42 there, 7 now"])


# ----- inputs that lie in the output folder


@pytest.fixture(scope="module")
def with_circuit(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = [*FIRST_LAYER, "--confirm", "1", "--num_random", "1"]
    return finish(llama, tmp_path_factory.mktemp("with_circuit"), *flags)


INPUTS = {  # flags that name an output of the same folder, with what becomes of it
    "--ablate {}/circuit.json --overwrite": "lies in the folder that --overwrite empties",
    "--circuit {}/circuit.json --overwrite": "lies in the folder that --overwrite empties",
    "--given {}/circuit.json --overwrite": "lies in the folder that --overwrite empties",
    "--skip {}/circuit.json --confirm 1 --overwrite": "lies in the folder that --overwrite empties",
    "--via {}/circuit.json --overwrite": "lies in the folder that --overwrite empties",
    "--compare {}/circuit_results.csv --overwrite": "lies in the folder that --overwrite empties",
    "--skip {}/link.json --confirm 1 --overwrite": "lies in the folder that --overwrite empties",
    "--compare {}/circuit_results.csv": "would be replaced by this command",
    "--skip {}/circuit.json --confirm 1": "would be replaced by this command",
    "--ablate {}/circuit.json --confirm 1": "would be replaced by this command",
}


@pytest.mark.parametrize("line", INPUTS)
def test_an_input_that_would_be_lost_is_refused_and_stays(
    line: str, llama: str, with_circuit: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = Path(shutil.copytree(with_circuit, tmp_path / "run"))
    if "--via" in line:
        circuit = json.loads((folder / "circuit.json").read_text())
        circuit["components"] = [{"label": "L2H0"}]
        (folder / "circuit.json").write_text(json.dumps(circuit))
    (folder / "link.json").symlink_to(folder / "circuit.json")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    argv = ["--model_id", llama, "--output_dir", str(folder), *FIRST_LAYER]
    option, path, *_ = line.format(folder).split()
    option = option.replace("--circuit", "--ablate")
    refuses(answer, *argv, *line.format(folder).split(), says=[f"{option} {path} {INPUTS[line]}"])
    del before[folder / "run.log"]
    assert {path: path.read_bytes() for path in before} == before


def test_inputs_in_the_folder_that_no_command_touches_are_taken(
    llama: str, with_circuit: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_circuit, tmp_path / "run"))
    finish(llama, folder, *FIRST_LAYER, "--ablate", str(folder / "circuit.json"))
    shutil.copy(folder / "circuit.json", folder / "mine.json")
    samples = [{"sentence": f"Name a {x}.", "targets": ["apple"]} for x in ("fruit", "tree")]
    own = write_samples(folder / "mine.jsonl", *samples)
    flags = ["--layers", "0", "--samples", own, "--ablate", str(folder / "mine.json")]
    finish(llama, folder, *flags, "--overwrite")
    assert (folder / "mine.json").exists() and Path(own).exists()


# ----- redrawing


def test_redrawing_in_a_runs_folder_keeps_its_list_and_the_users_files(
    llama: str, begun: Path, answer: Answer
) -> None:
    argv = ["--from_csv", str(begun / RESULTS), "--output_dir", str(begun)]
    before = (begun / "run.json").read_bytes()
    assert answer(*argv)[0] == 0
    assert (begun / "run.json").read_bytes() == before
    (begun / "circuit_heatmap.png").write_text("mine")
    says = [f"{begun}/circuit_heatmap.png would be overwritten"]
    refuses(answer, *argv, "--heatmap", says=says)
    assert (begun / "circuit_heatmap.png").read_text() == "mine"
    (begun / "circuit_heatmap.png").unlink()
    assert answer(*argv, "--heatmap")[0] == 0
    assert "circuit_heatmap.png" in record_of(begun)["written"]
    assert record_of(begun)["samples"] == json.loads(before)["samples"]
    finish(llama, begun, *FIRST_LAYER)
    assert not (begun / "circuit_heatmap.png").exists()


def test_redrawing_does_not_replace_the_table_that_it_draws(
    begun: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    source = Path(shutil.copy(begun / RESULTS, folder / "circuit_heads.csv"))
    before = source.read_bytes()
    argv = ["--from_csv", str(source), "--output_dir", str(folder)]
    refuses(answer, *argv, says=[f"--from_csv {source} would be replaced by this command"])
    assert source.read_bytes() == before and len(list(folder.iterdir())) == 1

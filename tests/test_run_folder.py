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
from conftest import HANGS, ROOT, SCRIPT, Answer, finish, read, record_of, refuses
from test_sweep import EQUAL, TWO, largest_difference, naive_results, parts_of

EXTRAS = "--confirm 2 --num_random 3 --max_new_tokens 2 --heatmap --screen 4 --multipliers 0"
WITH_ALL_PARTS = [*TWO, "--layers", "0-1", "--controls", *EXTRAS.split(), "--graph", "s0000"]
FIRST_LAYER = [*TWO, "--layers", "0"]
RESULTS = "circuit_results.csv"


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
GROWN = ["--layers 2|--layers 0,1", "--heads 3|--heads 0-1|--heads 2", "--heads 1|--layers 0-1|"]


@pytest.mark.parametrize("lines", GROWN)
def test_a_folder_that_grew_bit_by_bit_holds_what_one_run_of_all_does(
    lines: str, llama: str, at_once: Path, tmp_path: Path
) -> None:
    for line in lines.split("|"):
        finish(llama, tmp_path, *TWO, *ONE_BY_ONE, *line.split())
    assert (tmp_path / RESULTS).read_bytes() == (at_once / RESULTS).read_bytes()
    assert record_of(tmp_path)["noise_floor"] == record_of(at_once)["noise_floor"]
    jittered = pd.concat(parts_of(tmp_path)).query("draw >= 0")
    assert not jittered.duplicated(["sample_id", "layer", "draw"]).any()


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
    assert [path.name.split("-")[0] for path in parts(whole)] == ["base", "sweep"]
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


def test_making_a_folder_does_not_mind_that_another_process_removed_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "write_text", lambda path, text: None)
    tracing.make_folder(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_what_a_dead_process_left_half_written_is_removed(llama: str, begun: Path) -> None:
    left = [begun / ".run.json.7.tmp", begun / ".parts" / ".base-0000.json.7.tmp"]
    (begun / ".parts" / "offload-7").mkdir()
    for path in left:
        path.write_text("half")
    finish(llama, begun, *FIRST_LAYER)
    assert not any(path.exists() for path in (*left, begun / ".parts" / "offload-7"))


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

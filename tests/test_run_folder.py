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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import llama3_circuit_tracing as tracing
from conftest import ROOT, SCRIPT, Answer, finish, read, record_of, refuses
from test_sweep import EQUAL, TWO, largest_difference, naive_results, parts_of

EXTRAS = [
    "--confirm",
    "2",
    "--num_random",
    "3",
    "--max_new_tokens",
    "2",
    "--heatmap",
    "--screen",
    "4",
]
EXTRAS += ["--multipliers", "0", "--graph", "s0000"]
RESULTS = "circuit_results.csv"


def rows_run(patch: pytest.MonkeyPatch, limit: int, error: Callable[[], Exception]) -> list[int]:
    """How many rows each forward with edits was asked for; `error` where it was more than fit."""
    asked: list[int] = []
    run_rows = tracing.run_rows

    def limited(traced: Any, clean: Any, rows: Any, **reads: Any) -> Any:
        asked.append(len(rows))
        if len(rows) > limit:
            raise error()
        return run_rows(traced, clean, rows, **reads)

    patch.setattr(tracing, "run_rows", limited)
    patch.setattr(tracing, "self_test", lambda exp: [])
    return asked


def parts(folder: Path, kind: str = "") -> list[Path]:
    return sorted((folder / ".parts").glob(f"{kind}*.json"))


# ----- what a folder keeps


def test_more_layers_in_the_same_folder_compute_only_what_is_missing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(llama, tmp_path, *TWO, "--layers", "0,2", "--heads", "0-2")
    asked = rows_run(monkeypatch, 1000, MemoryError)
    finish(llama, tmp_path, *TWO)
    n_jittered_in_layer_1 = 4
    assert sum(asked) == 12 - 6 + n_jittered_in_layer_1
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


@pytest.fixture(scope="module")
def at_once(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("at_once"), *TWO, *ONE_BY_ONE)


# so that a row's last bits do not depend on how many others are computed beside it
ONE_BY_ONE = ["--rows_per_forward", "1", "--tree_tokens", "1"]
GROWN = ["--layers 0|--layers 1|--layers 2", "--layers 2|--layers 0,1", "--layers 1|"]
GROWN += ["--heads 3|--heads 0-1|--heads 2", "--heads 1|--layers 0-1|"]


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


def test_outputs_of_options_no_longer_given_do_not_stay(llama: str, tmp_path: Path) -> None:
    """But for a circuit, which tells itself where it is from and may be an input."""
    kept = {"circuit.json"}
    others = {"circuit_positions.csv", "circuit_positions.png"}
    others |= {"circuit_paths.csv", "circuit_paths.png"}  # not with a screen
    others |= {"circuit_directions.csv", "circuit_directions.png", "directions.safetensors"}
    for flags in (EXTRAS, []):
        finish(llama, tmp_path, *TWO, *flags)
        there = {name for name in tracing.OUTPUTS if (tmp_path / name).exists()}
        asked = {name for name, always in tracing.OUTPUTS.items() if always or flags}
        assert there == (asked - others) | kept
    assert "behaviour" not in record_of(tmp_path)


REFUSED = {  # with what the sentence says
    "--seed 7 --op scale --factor 2": ["op: 'zero' there, 'scale' now", "seed: 42", "prompts:"],
    "--overwrite --layers 99": ["--layers 99"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_command_names_what_differs_and_deletes_nothing(
    line: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    finish(llama, tmp_path, *TWO, "--layers", "0")
    files = [tmp_path / RESULTS, tmp_path / "run.json", *parts(tmp_path)]
    before = [path.read_bytes() for path in files]
    command = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO]
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
    llama: str, tmp_path: Path
) -> None:
    finish(llama, tmp_path, *TWO, "--layers", "0", *EXTRAS)
    mine = [tmp_path / "notes.txt", tmp_path / ".parts" / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    finish(llama, tmp_path, *TWO, "--layers", "1", "--seed", "7", "--overwrite")
    assert set(read(tmp_path)["layer"]) == {1}
    assert all(path.exists() for path in mine)
    assert [path.name.split("-")[0] for path in parts(tmp_path)] == ["base", "sweep"]
    assert not (tmp_path / "generations.jsonl").exists()


PARTS = ["sweep", "base", "joint", "replies"]
WITH_ALL_PARTS = [*TWO, "--layers", "0-1", "--controls", *EXTRAS]


@pytest.fixture(scope="module")
def two_runs(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with parts of every kind, and another such run of another seed."""
    folders = [tmp_path_factory.mktemp(seed) for seed in ("one", "other")]
    for i, folder in enumerate(folders):
        finish(llama, folder, *WITH_ALL_PARTS, "--seed", str(i))
    return folders


def test_a_finished_run_computes_nothing_again(
    llama: str, two_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [p for p in two_runs[0].iterdir() if p.suffix in (".csv", ".png", ".jsonl")]
    before = [path.read_bytes() for path in outputs]
    assert len(outputs) == 15
    for path in outputs:
        path.unlink()
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(llama, two_runs[0], *WITH_ALL_PARTS, "--seed", "0")
    assert [path.read_bytes() for path in outputs] == before


def change_a_digit(content: bytes) -> bytes:
    return re.sub(rb"\d(?=\D*$)", lambda digit: b"1" if digit[0] == b"0" else b"0", content)


Spoil = Callable[[bytes, bytes, bytes], bytes]  # of the part, another one, and another run's
SPOILT: dict[str, Spoil] = {
    "truncated": lambda own, neighbour, foreign: own[:-40],
    "empty": lambda own, neighbour, foreign: b"",
    "with another digit": lambda own, neighbour, foreign: change_a_digit(own),
    "another part": lambda own, neighbour, foreign: neighbour,
    "of another run": lambda own, neighbour, foreign: foreign,
    "no text": lambda own, neighbour, foreign: b"\xff\xfe\x00[]",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_part_is_computed_again(
    how: str, llama: str, two_runs: list[Path], tmp_path: Path
) -> None:
    run, other = tmp_path / "run", two_runs[1]
    shutil.copytree(two_runs[0], run)
    neighbour = parts(run, "sweep")[-1].read_bytes()
    for kind in PARTS:
        path, foreign = (parts(folder, kind)[0] for folder in (run, other))
        own = path.read_bytes()
        path.write_bytes(SPOILT[how](own, neighbour, foreign.read_bytes()))
        assert path.read_bytes() != own
    finish(llama, run, *WITH_ALL_PARTS, "--seed", "0")
    for name in (RESULTS, "circuit_confirm.csv", "generations.jsonl"):
        assert (run / name).read_bytes() == (two_runs[0] / name).read_bytes()
    told = (run / "run.log").read_text()
    assert told.count("is not a part of this run; computing it again") == len(PARTS)


# ----- interruption, as real processes


def start(model: str, folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """A run with so many jobs that it can be stopped in their midst."""
    command = [sys.executable, *launcher, str(SCRIPT), *many_jobs(model, folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a script's background jobs ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def many_jobs(model: str, folder: Path) -> list[str]:
    flags = ["--num_samples", "24", "--tree_tokens", "100", "--rows_per_forward", "1"]
    return ["--model_id", model, "--output_dir", str(folder), *flags]


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 120
    while len(parts(folder, "sweep")) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert tracing.main(many_jobs(llama, folder)) == 0
    return folder


@pytest.mark.parametrize(("stop", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was_and_ends_the_same(
    stop: str, code: int, llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(llama, tmp_path)
    wait_for_parts(tmp_path, 3, process)
    process.send_signal(getattr(signal, stop))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    done = len(parts(tmp_path, "sweep"))
    assert 3 <= done < len(parts(uninterrupted, "sweep"))
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
    process = start(llama, tmp_path, *TWO_PROCESSES)
    wait_for_parts(tmp_path, 2, process)
    psutil.Process(process.pid).children()[-1].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / RESULTS).exists()
    again = start(llama, tmp_path, *TWO_PROCESSES)
    said = again.communicate(timeout=200)[1]
    assert again.returncode == 0, said
    assert largest_difference(read(tmp_path), read(uninterrupted)) < EQUAL


# ----- memory and disk

OUT_OF_MEMORY: dict[int, Callable[[], Exception]] = {  # where more rows than so many do not fit
    1: lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    2: lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    3: lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    7: MemoryError,
}


@pytest.mark.parametrize("limit", OUT_OF_MEMORY)
def test_rows_are_halved_when_memory_runs_out_and_a_resumed_run_remembers(
    limit: int,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = rows_run(monkeypatch, limit, OUT_OF_MEMORY[limit])
    flags = [*TWO, "--rows_per_forward", "8"]
    finish(llama, tmp_path, *flags, "--layers", "0")
    assert max(asked) == 8
    assert record_of(tmp_path)["rows_after_halving"] <= limit
    asked.clear()
    finish(llama, tmp_path, *flags)
    assert max(asked) <= limit
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


@pytest.mark.parametrize(
    ("error", "said"),
    [(OUT_OF_MEMORY[1], "--tree_tokens"), (lambda: RuntimeError("planted"), "planted")],
)
def test_what_fails_with_one_row_alone_names_what_to_lower_or_its_own_reason(
    error: Callable[[], Exception],
    said: str,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
) -> None:
    rows_run(monkeypatch, 0, error)
    code, _, err = answer("--model_id", llama, "--output_dir", str(tmp_path), *TWO)
    assert code == 1
    assert said in err.splitlines()[-1]


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


def loop(path: Path) -> None:
    path.symlink_to(path)


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: (path / "deeper").mkdir(parents=True),
    "a link to itself": loop,
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\n[]"),
    "another part's": lambda path: shutil.copy(sorted(path.parent.glob("sweep-*"))[0], path),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("kind", ["sweep", "base"])
def test_an_unreadable_part_is_computed_again(
    name: str, kind: str, llama: str, tmp_path: Path
) -> None:
    before = read(finish(llama, tmp_path, *TWO))
    path = parts(tmp_path, kind)[-1]
    path.unlink()
    UNREADABLE[name](path)
    pd.testing.assert_frame_equal(read(finish(llama, tmp_path, *TWO)), before)
    assert path.is_file()


def test_a_part_nested_without_end_is_computed_again(llama: str, tmp_path: Path) -> None:
    """With the seal of a good one."""
    before = read(finish(llama, tmp_path, *TWO))
    folder, path = tracing.RunFolder(tmp_path), parts(tmp_path, "sweep")[0]
    folder.key = tracing.digest(record_of(tmp_path)["fingerprint"])
    text = "[" * 100_000
    path.write_text(f"{folder.seal(path.stem, text)}\n{text}")
    pd.testing.assert_frame_equal(read(finish(llama, tmp_path, *TWO)), before)


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
    name: str, value: Any, llama: str, tmp_path: Path, answer: Answer
) -> None:
    record, path = record_of(finish(llama, tmp_path, *TWO, "--layers", "0")), tmp_path / "run.json"
    entries = record["fingerprint"] if name in record["fingerprint"] else record
    entries[name] = value
    path.write_text(json.dumps(record))
    argv = ["--model_id", llama, *TWO, "--layers", "0-1", "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[str(path)])
    assert record_of(tmp_path) == record


def test_a_file_of_the_model_whose_digest_the_record_lacks_is_read_again(
    llama: str, tmp_path: Path
) -> None:
    record = record_of(finish(llama, tmp_path, *TWO, "--layers", "0"))
    lacking = {name: told[:2] for name, told in record["files"].items()}
    (tmp_path / "run.json").write_text(json.dumps({**record, "files": lacking}))
    again = record_of(finish(llama, tmp_path, *TWO, "--layers", "0"))
    assert again["files"] == record["files"]


def test_making_a_folder_does_not_mind_that_another_process_removed_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "write_text", lambda path, text: None)
    tracing.make_folder(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_what_a_dead_process_left_half_written_is_removed(llama: str, tmp_path: Path) -> None:
    left = [tmp_path / ".run.json.7.tmp", tmp_path / ".parts" / ".base-0000.json.7.tmp"]
    (tmp_path / ".parts" / "offload-7").mkdir(parents=True)
    for path in left:
        path.write_text("half")
    finish(llama, tmp_path, *TWO, "--layers", "0")
    assert not any(path.exists() for path in (*left, tmp_path / ".parts" / "offload-7"))


def test_weights_offloaded_to_disk_lie_in_the_run_folder_while_it_works(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    load_model = tracing.load_model

    def watch(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return load_model(*arguments)

    monkeypatch.setattr(tracing, "load_model", watch)
    finish(llama, tmp_path, *TWO, "--layers", "0")
    assert seen == [tmp_path / ".parts"]


def test_a_full_disk_names_the_file(
    llama: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    argv = ["--model_id", llama, *TWO, "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[f"{tmp_path}/{RESULTS}: No space left on device"], code=1)

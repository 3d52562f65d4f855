"""A run folder: resumed, refused or started afresh, and whole after any interruption."""

from __future__ import annotations

import errno
import io
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
    ONE_THREAD,
    ROOT,
    SCRIPT,
    Answer,
    command_line,
    finish,
    read,
    record_of,
    refuses,
    write_samples,
)
from test_sweep import EQUAL, TWO, largest_difference, naive_results

RESULTS, HEADS = "circuit_results.csv", "circuit_heads.csv"
FIRST_LAYER = [*TWO, "--layers", "0"]
# in a folder of samples whose prompts are equally long; what follows the trace inherits its names
COMMANDS = {
    "trace": "--layers 0-1 --screen 4 --confirm 2 --num_random 3 --max_new_tokens 2 --heatmap"
    " --overview",
    "joint": "joint --num_random 3 --max_new_tokens 2 --multipliers 0",
    "paths": "paths --layers 0",
    "tokens": "tokens --kind attn --layers 0",
    "directions": "directions --layers 0-1 --confirm 1 --num_random 2 --max_new_tokens 1"
    " --multipliers 0",
    "graph": "graph --nodes 50",
}


def rows_run(patch: pytest.MonkeyPatch, limit: int = 1000) -> list[int]:
    """How many rows each forward with edits was given; more than the limit do not fit."""
    counts: list[int] = []
    run_rows = tracing.run_rows

    def limited(traced: Any, clean: Any, rows: Any, **reads: Any) -> Any:
        counts.append(len(rows))
        if len(rows) > limit:
            raise MemoryError
        return run_rows(traced, clean, rows, **reads)

    patch.setattr(tracing, "run_rows", limited)
    patch.setattr(tracing, "self_test", lambda experiment: [])
    return counts


def parts(folder: Path, kind: str = "") -> list[Path]:
    return sorted((folder / ".parts").glob(f"{kind}*.json"))


def tables(folder: Path) -> dict[str, bytes]:
    kinds = (".csv", ".jsonl", ".safetensors", ".json")
    files = [*folder.iterdir(), *folder.glob("graphs/*")]
    return {
        path.name: path.read_bytes()
        for path in files
        if path.suffix in kinds and path.name != "run.json"
    }


def finish_all(model: str, samples: str, folder: Path, *names: str) -> Path:
    """All commands, or those of some names, in one folder."""
    for name in names or COMMANDS:
        finish(model, folder, *COMMANDS[name].split(), "--samples", samples)
    return folder


@pytest.fixture(scope="module")
def all_commands(
    llama: str, samples: str, coarse_figures: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which every command has ended well."""
    return finish_all(llama, samples, tmp_path_factory.mktemp("all"))


@pytest.fixture()
def full(all_commands: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(all_commands, tmp_path / "full"))


@pytest.fixture(scope="module")
def traced_first_layer(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("begun"), *FIRST_LAYER)


@pytest.fixture()
def begun(traced_first_layer: Path, tmp_path: Path) -> Path:
    """A folder with a trace of the first layer."""
    return Path(shutil.copytree(traced_first_layer, tmp_path / "begun"))


# ----- what a folder keeps


def test_more_layers_in_the_same_folder_compute_only_what_is_missing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(llama, tmp_path, *TWO, "--layers", "0,2", "--heads", "0-2")
    counts = rows_run(monkeypatch)
    finish(llama, tmp_path, *TWO)
    n_jittered_in_layer_1 = 4
    assert sum(counts) == 12 - 6 + n_jittered_in_layer_1
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


@pytest.fixture(scope="module")
def at_once(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("at_once"), *TWO, *ONE_BY_ONE)


def chosen_labels(model: str, *flags: str) -> list[str]:
    experiment = prepared(model, *flags)
    components = tracing.choose_components(experiment.options, experiment.shape)
    return [component.label for component in components]


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
        assert heads["label"].tolist() == chosen_labels(llama, *flags)
        widest = max(widest, len(heads))
        assert set(heads["n_tests"]) == {widest}
    assert (tmp_path / RESULTS).read_bytes() == (at_once / RESULTS).read_bytes()
    assert record_of(tmp_path)["noise_floor"] == record_of(at_once)["noise_floor"]


# ----- a table holds what its command names, whatever else was measured before

SIX = ["--num_samples", "6", *ONE_BY_ONE]
NARROW = [*SIX, "--layers", "0-1", "--heads", "1,3", "--confirm", "1", "--num_random", "2"]
OF_TABLE = ("circuit.json", "circuit_confirm.csv")
# of wordings, of which samples here have one, and of groups, of which they have none
OF_LABELS = {"circuit_templates.csv", "circuit_wordings.csv", "circuit_groups.csv"}
OF_LABELS |= {"circuit_groups.png", "circuit_confirm_groups.csv", "circuit_joint_groups.csv"}
OF_LABELS |= {f"{name}_reply_groups.csv" for name in ("circuit", "joint", "directions")}


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
    alone, heads = read(narrow, HEADS), read(narrowed, HEADS)
    assert (set(alone["n_tests"]), set(heads["n_tests"])) == ({4}, {12})
    p = heads["p"].tolist()
    assert alone["q"].tolist() == pytest.approx(q_values(p))
    assert heads["q"].tolist() == pytest.approx(q_values([*p, *[1.0] * 8])[:4])
    assert alone["q"].tolist() != heads["q"].tolist()
    sentence = "q corrects for 12 components: this folder has tested them before"
    assert sentence in (narrowed / "run.log").read_text()
    assert "has tested them before" not in (narrow / "run.log").read_text()


def test_redrawing_a_narrower_table_keeps_its_correction(narrowed: Path, tmp_path: Path) -> None:
    """Also where the table lies alone."""
    shutil.copy(narrowed / RESULTS, tmp_path)
    argv = ["redraw", str(tmp_path / RESULTS), "--output_dir", str(tmp_path / "redrawn")]
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


@pytest.mark.parametrize("way", ["--overwrite", "no parts", "the part of another run"])
def test_what_was_tested_is_forgotten_with_its_parts(
    way: str, llama: str, wide: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "run"))
    flags = [*SIX, "--layers", "0"]
    if way == "--overwrite":
        flags.append(way)
    if way == "no parts":
        shutil.rmtree(folder / ".parts")
    if way == "the part of another run":
        (part,) = parts(folder, "tested")
        other = tracing.RunFolder(folder)
        other.experiment_key = "another"
        other.write_part(part.stem, 99)
    assert set(read(finish(llama, folder, *flags), HEADS)["n_tests"]) == {4}


@pytest.mark.parametrize(("line", "n"), [("--layers 0 --heads 0", 4), ("--layers 1-2", 8)])
def test_the_widest_table_counts_and_not_the_sum_of_all(
    line: str, n: int, llama: str, begun: Path
) -> None:
    """After a table of the four heads of layer 0."""
    heads = read(finish(llama, begun, *TWO, *line.split()), HEADS)
    assert len(heads) == len(chosen_labels(llama, *line.split()))
    assert set(heads["n_tests"]) == {n}


# ----- what a folder keeps, and what it refuses


@pytest.mark.usefixtures("no_weights")
def test_outputs_of_options_no_longer_given_do_not_stay(
    llama: str, samples: str, full: Path, all_commands: Path
) -> None:
    """But for a circuit, which says what it is of and may be an input, and what others wrote."""
    (full / "circuit_summary.png").write_bytes(b"of before")
    finish(llama, full, "--samples", samples, "--layers", "0-1", "--screen", "4")
    names = {path.name for path in full.iterdir()}
    gone = {"circuit_heatmap.png", "circuit_confirm.csv", "circuit_confirm.png"}
    gone |= {"circuit_overview.csv", "circuit_overview.png", "generations.jsonl"}
    gone |= {"circuit_rates.csv", "circuit_rates.png"}
    gone.add("circuit_words.csv")  # of a circuit, and of clear components, of which there are none
    assert names == {path.name for path in all_commands.iterdir()} - gone
    assert (full / "circuit_summary.png").read_bytes() != b"of before"
    page = (full / "circuit_report.html").read_text()
    assert "<th>reply</th>" not in page


REFUSED = {  # with what the sentence says
    "--seed 7 --op scale --factor 2": ["seed: 42 there, 7 now", "prompts:"],
    "--num_samples 3": ["num_samples: 2 there, 3 now", "prompts:"],
    "--op scale --factor 2": ["--op zero, not scale"],
    "--given L2H0": ["--given , not L2H0"],
    "joint L0H0 --seed 7": ["--seed 7", "holds 42"],
    "joint L0H0 --num_samples 3": ["num_samples: 2 there, 3 now"],
    "--overwrite --layers 99": ["--layers 99"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_command_names_what_differs_and_deletes_nothing(
    line: str, llama: str, begun: Path, answer: Answer
) -> None:
    files = [begun / RESULTS, *parts(begun)]
    before = [path.read_bytes() for path in files]
    command = command_line(llama, begun, *line.split())
    command += [] if "--num_samples" in line else TWO
    code, _, err = answer(*command)
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
    assert "holds another experiment, which differs in model: " in err


def test_overwriting_another_experiment_throws_away_all_files_of_this_script_and_names_them(
    llama: str, full: Path
) -> None:
    mine = [full / "notes.txt", full / ".parts" / "notes.json", full / "graphs" / "mine.json"]
    for path in mine:
        path.write_text("mine")
    finish(llama, full, *TWO, "--layers", "1", "--seed", "7", "--overwrite")
    assert set(read(full)["layer"]) == {1}
    assert all(path.read_text() == "mine" for path in mine)
    assert {path.stem.split("-")[0] for path in parts(full)} == {
        "base",
        "floor",
        "scores",
        "tested",
        "notes",
    }
    left = {path.name for path in full.iterdir()}
    assert not left & {"generations.jsonl", "circuit_joint.csv", "circuit.json"}
    assert [path.name for path in (full / "graphs").iterdir()] == ["mine.json"]
    log = (full / "run.log").read_text()
    assert all(name in log for name in ("generations.jsonl", "circuit_joint.csv", "graphs/"))
    assert set(record_of(full)["commands"]) == {"trace"}


@pytest.mark.parametrize("command", COMMANDS)
def test_overwriting_a_command_throws_away_its_own_files_and_the_parts_that_it_uses(
    command: str, llama: str, samples: str, full: Path, all_commands: Path
) -> None:
    """All else stays: other commands find their parts, and their tables are the same bytes."""
    times = {path: path.stat().st_mtime_ns for path in parts(full)}
    files = {path.name: path.stat().st_mtime_ns for path in full.iterdir() if path.is_file()}
    finish(llama, full, *COMMANDS[command].split(), "--samples", samples, "--overwrite")
    kept = [path for path in times if path.exists() and path.stat().st_mtime_ns == times[path]]
    assert 0 < len(kept) < len(times)
    for other in COMMANDS:
        for name in files.keys() & tracing.COMMAND_FILES[other].keys():
            is_new = (full / name).stat().st_mtime_ns != files[name]
            assert is_new == (other == command)
    for path in full.glob("*.csv"):  # other rows are side by side now
        pd.testing.assert_frame_equal(
            read(full, path.name), read(all_commands, path.name), rtol=1e-3
        )
    assert not record_of(full)["commands"][command]["parts_to_replace"]


@pytest.mark.usefixtures("no_weights")
def test_a_finished_command_computes_nothing_again(
    llama: str, samples: str, full: Path, all_commands: Path
) -> None:
    outputs = [path for path in full.iterdir() if path.suffix in (".csv", ".png", ".jsonl")]
    planned = {name for command in COMMANDS for name in tracing.COMMAND_FILES[command]}
    kept = {"circuit.json", "directions.safetensors"}
    absent = {"circuit_curve.csv", "circuit_curve.png"}  # of more sentences
    absent |= {"circuit_universal.csv", "circuit_activations.csv"}  # of neurons
    absent |= {"circuit_reply_layers.csv", "circuit_reply_layers.png"}  # of whole layers
    assert {path.name for path in outputs} == planned - kept - absent - OF_LABELS
    for path in outputs:
        path.unlink()
    finish_all(llama, samples, full)
    assert tables(full) == tables(all_commands)
    assert all(path.exists() for path in outputs)


def seal_nonsense(path: Path, *_: bytes) -> None:
    """Nested without end, under the seal of a good part."""
    folder, text = tracing.RunFolder(path.parents[1]), "[" * 100_000
    folder.experiment_key = tracing.digest(record_of(folder.path)["experiment"]["fingerprint"])
    path.write_text(f"{folder.seal(path.stem, text)}\n{text}")


def change_a_digit(path: Path, content: bytes, *_: bytes) -> None:
    changed = re.sub(rb"\d(?=\D*$)", lambda n: b"1" if n[0] == b"0" else b"0", content)
    path.write_bytes(changed)


def seal_of_another(path: Path, content: bytes, *_: bytes) -> None:
    """The part of the same name of another experiment."""
    folder = tracing.RunFolder(path.parents[1])
    folder.experiment_key = "another"
    text = content.decode().partition("\n")[2]
    path.write_text(f"{folder.seal(path.stem, text)}\n{text}")


# of the part's place: its content, and another part's
SPOILT: dict[str, Callable[[Path, bytes, bytes], Any]] = {
    "truncated": lambda path, content, neighbour: path.write_bytes(content[:-40]),
    "empty": lambda path, content, neighbour: path.write_bytes(b""),
    "with another digit": change_a_digit,
    "another part": lambda path, content, neighbour: path.write_bytes(neighbour),
    "of another experiment": seal_of_another,
    "no text": lambda path, content, neighbour: path.write_bytes(b"\xff\xfe\x00[]"),
    "a folder": lambda path, *_: (path / "deeper").mkdir(parents=True),
    "a link to itself": lambda path, *_: path.symlink_to(path),
    "nonsense": seal_nonsense,
}
KINDS = ["scores", "base", "kl", "replies", "graph", "estimate", "probe"]


@pytest.mark.parametrize("turn", range(3))
def test_a_spoilt_part_is_computed_again(
    turn: int, llama: str, samples: str, full: Path, all_commands: Path
) -> None:
    """One of each kind, spoilt in another way each."""
    neighbour = parts(full, "scores")[-1].read_bytes()
    ways = [*SPOILT.values(), *SPOILT.values()][3 * turn :]
    for kind, spoil in zip(KINDS, ways, strict=False):
        path = parts(full, kind)[0]
        content = path.read_bytes()
        path.unlink()
        spoil(path, content, neighbour)
        assert not path.is_file() or path.read_bytes() != content
    finish_all(llama, samples, full)
    assert tables(full) == tables(all_commands)
    log = (full / "run.log").read_text()
    assert log.count("is not a part of this experiment; computing it again") == len(KINDS)
    assert all(path.is_file() for path in parts(full))


# ----- interruption, as real processes


# Run by Python before the script: a process that has written some parts of the sweep says so and
# waits for a line on stdin.
WAIT_AFTER_PARTS = """
import os, sys

replace, written = os.replace, []

def replace_and_wait(source, target):
    replace(source, target)
    if os.path.basename(target).startswith("scores-"):
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
        env={**ONE_THREAD, **environment},
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


def forwards(folder: Path) -> int:
    return int(record_of(folder)["commands"]["trace"]["run"]["forwards"])


@pytest.mark.parametrize(("stop", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was_and_ends_the_same(
    stop: str, code: int, llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process, _ = start_and_wait(llama, tmp_path, 3, 1)
    process.send_signal(getattr(signal, stop))
    said = process.communicate(timeout=HANGS)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    done = len(parts(tmp_path, "scores"))
    assert done == 3 < len(parts(uninterrupted, "scores"))
    assert not (tmp_path / RESULTS).exists()
    assert tracing.main(many_jobs(llama, tmp_path)) == 0
    assert (tmp_path / RESULTS).read_bytes() == (uninterrupted / RESULTS).read_bytes()
    again, before = (forwards(folder) for folder in (tmp_path, uninterrupted))
    rows_of_a_job = 4 + 4  # heads and jittered rows, one per forward
    assert before - again >= done * rows_of_a_job


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_give_the_same_and_survive_a_death(
    llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process, waiting = start_and_wait(llama, tmp_path, 1, 2, *TWO_PROCESSES)
    os.kill(waiting[-1], signal.SIGKILL)
    process.wait(timeout=HANGS)  # the other one waits on, until the launcher ends it
    process.communicate()
    assert process.returncode != 0
    assert len(parts(tmp_path, "scores")) == 2
    assert not (tmp_path / RESULTS).exists()
    again = start(llama, tmp_path, *TWO_PROCESSES)
    said = again.communicate(timeout=HANGS)[1]
    assert again.returncode == 0, said
    assert largest_difference(read(tmp_path), read(uninterrupted)) < EQUAL


# a script that runs command lines one after the other, in each process of one launch: most of a
# launch's seconds are imports
IN_ONE_LAUNCH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import llama3_circuit_tracing as tracing

distributed = tracing.torch.distributed
end = distributed.destroy_process_group
distributed.destroy_process_group = lambda: None
for words in json.loads(sys.argv[2]):
    assert tracing.main(words) == 0, words
    distributed.barrier()
end()
"""


def test_two_processes_give_every_commands_tables_byte_for_byte(
    llama: str, samples: str, all_commands: Path, tmp_path: Path
) -> None:
    """One after the other in the same folder; the graph a second time, when its files are there."""
    folder = tmp_path / "run"
    lines = [
        command_line(llama, folder, *line.split(), "--samples", samples)
        for line in [*COMMANDS.values(), COMMANDS["graph"]]
    ]
    driver = tmp_path / "driver.py"
    driver.write_text(IN_ONE_LAUNCH)
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, str(driver), str(ROOT), json.dumps(lines)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    assert tables(folder) == tables(all_commands)


def stop_after(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Have a run end as by SIGTERM once it has written a part of a kind."""
    write_part = tracing.RunFolder.write_part

    def write(self: Any, name: str, payload: Any) -> None:
        write_part(self, name, payload)
        if name.startswith(kind):
            raise SystemExit(143)

    patch.setattr(tracing.RunFolder, "write_part", write)


@pytest.mark.parametrize("again", [["--overwrite"], []], ids=["with it", "without it"])
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("trace", "base"),
        ("trace", "estimate"),
        ("trace", "scores"),
        ("trace", "tested"),
        ("trace", "kl"),
        ("trace", "replies"),
        ("joint", "kl"),
        ("joint", "replies"),
        ("paths", "scores"),
        ("tokens", "scores"),
        ("directions", "probe"),
        ("directions", "scores"),
        ("graph", "graph"),
    ],
)
def test_an_overwriting_command_that_is_stopped_goes_on_where_it_was(
    command: str,
    kind: str,
    again: list[str],
    llama: str,
    samples: str,
    full: Path,
    all_commands: Path,
) -> None:
    """At whatever stage, and the folder ends as if it had never stopped."""
    words = command_line(llama, full, *COMMANDS[command].split(), "--samples", samples)
    before = {path: path.stat().st_mtime_ns for path in parts(full)}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(kind, patch)
        assert tracing.main([*words, "--overwrite"]) == 143
    written = {
        path: path.stat().st_mtime_ns
        for path in parts(full)
        if path.stat().st_mtime_ns != before.get(path)
    }
    assert any(path.name.startswith(kind) for path in written), "it started afresh"
    assert tracing.main([*words, *again]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written, "and went on"
    assert tables(full) == tables(all_commands)


@pytest.mark.parametrize("then", [["--overwrite"], ["--overwrite", "--top_k", "3"]])
def test_overwriting_a_finished_run_or_one_of_other_options_starts_afresh(
    then: list[str], llama: str, begun: Path
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(begun), *FIRST_LAYER]
    if len(then) > 1:  # unfinished, of the options without them
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "write_heads", lambda *_: sys.exit(143))
            assert tracing.main(argv) == 143
    before = {path.name: path.stat().st_mtime_ns for path in parts(begun)}
    finish(llama, begun, *FIRST_LAYER, *then)
    after = {path.name: path.stat().st_mtime_ns for path in parts(begun)}
    assert before.keys() == after.keys()
    assert not before.items() & after.items()


def test_overwriting_a_narrower_table_keeps_the_parts_of_others(llama: str, tmp_path: Path) -> None:
    """A part is a layer's: those of layer 0 alone are measured anew."""
    finish(llama, tmp_path, *TWO, "--layers", "0-1")
    before = {path: path.stat().st_mtime_ns for path in parts(tmp_path, "scores")}
    finish(llama, tmp_path, *FIRST_LAYER, "--overwrite")
    kept = [path for path in before if path.exists() and path.stat().st_mtime_ns == before[path]]
    assert len(before) == 2 and len(kept) == 1
    assert set(read(tmp_path, HEADS)["n_tests"]) == {4}


def test_going_on_with_overwrite_keeps_the_rows_per_forward(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the folder's first command gave; what starts afresh does not."""
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *TWO]
    finish(llama, tmp_path, *FIRST_LAYER, "--rows_per_forward", "2")
    with pytest.MonkeyPatch.context() as patch:
        stop_after("scores", patch)
        assert tracing.main(argv) == 143
    done = parts(tmp_path, "scores")
    counts = rows_run(monkeypatch)
    assert tracing.main([*argv, "--overwrite"]) == 0
    assert max(counts) == 2
    assert set(done) <= set(parts(tmp_path, "scores"))
    counts.clear()
    assert tracing.main([*argv, "--overwrite"]) == 0
    assert max(counts) == 8


def test_a_follow_up_with_other_rows_per_forward_changes_only_itself(
    llama: str, begun: Path
) -> None:
    """The trace goes on with its own, and has all that it measured, unless it starts afresh."""
    rows = record_of(begun)["rows_by_edit"]
    finish(llama, begun, "joint", "L0H1", "--num_random", "1", "--rows_per_forward", "1")
    before = {path: path.stat().st_mtime_ns for path in parts(begun)}
    finish(llama, begun, *FIRST_LAYER)
    assert {path: path.stat().st_mtime_ns for path in parts(begun)} == before
    assert record_of(begun)["rows_by_edit"] == rows
    finish(llama, begun, *FIRST_LAYER, "--overwrite", "--rows_per_forward", "3")
    assert record_of(begun)["rows_by_edit"] == dict.fromkeys(rows, 3)


# ----- memory and disk


def test_rows_are_halved_when_memory_runs_out_and_a_resumed_run_remembers(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = rows_run(monkeypatch, 3)
    flags = [*TWO, "--rows_per_forward", "8"]
    finish(llama, tmp_path, *flags, "--layers", "0")
    assert max(counts) == 8
    assert record_of(tmp_path)["rows_after_halving"] <= 3
    counts.clear()
    finish(llama, tmp_path, *flags)
    assert max(counts) <= 3
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
    message = err.strip().splitlines()[-1]
    assert code == 1
    assert message.startswith("error: ") and "No space left on device" in message
    assert "None" not in message
    assert not list(tmp_path.glob("**/*.tmp"))
    assert len(parts(tmp_path)) == 3
    assert answer(*command)[0] == 0
    assert largest_difference(read(tmp_path), naive_results(llama)) < EQUAL


# ----- progress


@pytest.mark.parametrize("seconds", [None, 0], ids=["short", "long"])
def test_without_a_terminal_progress_is_a_line_of_the_log_now_and_then(
    seconds: int | None, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    if seconds is not None:
        monkeypatch.setattr(tracing, "SECONDS_BETWEEN_LINES", seconds)
    finish(llama, tmp_path, *FIRST_LAYER, "--rows_per_forward", "4")
    log = (tmp_path / "run.log").read_text()
    told = re.findall(r"^sweep: (\d+) of 16 rows, \d\d:\d\d so far, \S+ left$", log, re.MULTILINE)
    assert told == ([] if seconds is None else ["0", "4", "8", "12", "16"])
    assert (" so far, " in log) == (seconds is not None)


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


NEW_RECORD = '{"format": "run/2", "experiment": {"options": {}, "fingerprint": {}}, %s}'


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "[" * 100_000,
        '{"fingerprint": "mine"}',
        '{"fingerprint": {}, "files": [1]}',
        '{"fingerprint": {}, "config": 7}',
        '{"noise_floor": "loud"}',
        "{}",
        '{"learning_rate": 0.1, "config": {}}',
        '{"format": "run/2", "commands": {}}',
        NEW_RECORD % '"noise_floor": "loud", "commands": {}',
        NEW_RECORD % '"commands": {"trace": 7}',
        NEW_RECORD % '"commands": {"trace": {"files": "run.log"}}',
        NEW_RECORD % '"commands": {"trace": {"files": ["../notes.txt"]}}',
        NEW_RECORD % '"commands": {"graph": {"files": ["graphs/../../notes.json"]}}',
        NEW_RECORD % '"commands": {"trace": {"files": ["notes.txt"]}}',
        NEW_RECORD % '"commands": {"trace": {"files": [["run.log"]]}}',
        NEW_RECORD % '"commands": {"trace": {"parts_to_replace": ["base-0/../../notes"]}}',
        NEW_RECORD % '"commands": {"trace": {"parts_to_replace": [7]}}',
    ],
    ids=lambda text: text[-30:],
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
        ("rows_by_edit", {"an edit": "many"}),
        ("rows_by_edit", 3),
    ],
)
def test_a_record_with_an_impossible_number_of_rows_is_refused_and_left_alone(
    name: str, value: Any, llama: str, begun: Path, answer: Answer
) -> None:
    record = record_of(begun)
    record[name] = value
    (begun / "run.json").write_text(json.dumps(record))
    argv = ["--model_id", llama, *TWO, "--layers", "0-1", "--output_dir", str(begun)]
    refuses(answer, *argv, says=[f"{begun}/run.json"])
    assert record_of(begun) == record


def test_a_file_of_the_model_whose_digest_the_record_lacks_is_read_again(
    llama: str, begun: Path
) -> None:
    record = record_of(begun)
    lacking = {name: entry[:2] for name, entry in record["model_files"].items()}
    (begun / "run.json").write_text(json.dumps({**record, "model_files": lacking}))
    after = record_of(finish(llama, begun, *FIRST_LAYER))
    assert after["model_files"] == record["model_files"]


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


def test_check_has_no_folder_for_offloaded_weights_even_where_a_run_is(
    llama: str, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps no other command out, which would take what lies there for a dead one's."""
    seen: list[Any] = []
    load_model = tracing.load_model

    def watch(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return load_model(*arguments)

    monkeypatch.setattr(tracing, "load_model", watch)
    finish(llama, begun, "check", *TWO)
    assert seen == [None]


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


CAPTIONS = tracing.COMMAND_FILES["trace"]


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
        assert CAPTIONS["circuit_heads.png"] in page
        assert CAPTIONS["circuit_confirm.png"] not in page and "<th>reply</th>" not in page
    assert (tmp_path / "circuit_heatmap.png").exists() == (not flags)


TAKEN = {  # a user's file, and a command line that would write it
    "circuit_results.csv": "",
    "circuit_heads.csv": "",
    "circuit_report.html": "",
    "run.log": "",
    "circuit_heatmap.png": "--heatmap",
    "circuit_overview.csv": "--overview",
    "circuit_screen.csv": "--screen 2",
    "circuit_universal.csv": "--kind neuron --screen 2 --skip universal",
    "circuit_activations.csv": "--kind neuron --screen 2",
    "circuit_confirm.png": "--confirm 1",
    "circuit.json": "--confirm 1",
    "generations.jsonl": "--max_new_tokens 1",
    "circuit_joint.csv": "joint L0H0",
    "circuit_curve.png": "joint L0H0 --curve",
    "circuit_steer.csv": "joint L0H0 --max_new_tokens 1 --multipliers 0",
    "joint_generations.jsonl": "joint L0H0 --max_new_tokens 1",
    "circuit_paths.png": "paths",
    "circuit_tokens.csv": "tokens --task odd_one_out --num_samples 1",
    "circuit_directions.csv": "directions",
    "directions.safetensors": "directions --fit logistic",
    "directions_confirm.csv": "directions --confirm 1",
    "circuit_graph_edges.csv": "graph",
    "graphs/s0000-a.json": "graph",
    "graphs/graph-metadata.json": "graph --sample s0001:b",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_of_the_user_is_not_overwritten_but_named_before_anything_is_measured(
    name: str, llama: str, tmp_path: Path, answer: Answer, no_weights: None
) -> None:
    """With --overwrite neither: it is not this script's."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    line = TAKEN[name].split()
    argv = command_line(llama, tmp_path, *line, *([] if "--num_samples" in line else TWO))
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
    command = ["graph"] if name == "graphs" else []
    argv = command_line(llama, tmp_path / "run", *command, *TWO)
    refuses(answer, *argv, says=[f"{path} would be overwritten"])
    assert path.is_symlink() == (kind == "link") and path.is_dir() == (kind == "folder")
    assert target.read_text() == "mine"


def test_the_record_lists_each_file_that_is_written_and_each_is_planned(all_commands: Path) -> None:
    paths = [path.relative_to(all_commands) for path in all_commands.rglob("*") if path.is_file()]
    names = {path.as_posix() for path in paths if path.parts[0] != ".parts"}
    commands = record_of(all_commands)["commands"]
    listed = {name for entry in commands.values() for name in entry["files"]}
    assert listed == names - {"run.json", "run.log"}
    for command, entry in commands.items():
        line = COMMANDS[command].split()
        options = tracing.parse_command_line(command_line("m", all_commands, *line)).options
        planned = set(tracing.planned_files(command, options))
        listed = {name for name in entry["files"] if not name.startswith("graphs/")}
        assert listed == planned - OF_LABELS


def test_a_file_is_listed_before_it_is_there_and_not_where_it_never_came(tmp_path: Path) -> None:
    """So that no death between the two makes a file foreign; what comes in a run is the user's."""

    def listed() -> list[str]:
        return list(record_of(tmp_path)["commands"]["joint"]["files"])

    for _ in range(2):
        folder = tracing.RunFolder(tmp_path, command="joint")
        with folder.open():
            assert "circuit_steer.csv" not in folder.written_files()
            path = folder.claim_path("circuit_steer.csv")
            assert "circuit_steer.csv" in listed() and not path.exists()
    with tracing.RunFolder(tmp_path, command="joint").open():
        path.write_text("the user's")
        folder = tracing.RunFolder(tmp_path, command="joint")
        folder.record = record_of(tmp_path)
        folder.forget_missing_files()
    with (
        tracing.RunFolder(tmp_path, command="joint").open(),
        pytest.raises(tracing.UsageError, match=r"circuit_joint\.csv would be overwritten"),
    ):
        (tmp_path / "circuit_joint.csv").write_text("the user's")
        late = tracing.RunFolder(tmp_path, command="joint")
        late.record = record_of(tmp_path)
        late.claim_path("circuit_joint.csv")


def as_of_the_version_before(folder: Path) -> None:
    record = record_of(folder)
    entries = {name: record[name] for name in ("samples", "noise_floor")}
    entries["fingerprint"] = record["experiment"]["fingerprint"]
    entries["config"] = record["experiment"]["options"] | record["commands"]["trace"]["options"]
    (folder / "run.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("line", ["", "--overwrite", "--overwrite --seed 7", "joint L0H0", "graph"])
def test_a_folder_of_the_version_before_is_refused_by_commands_that_measure(
    line: str, llama: str, begun: Path, answer: Answer, no_weights: None
) -> None:
    as_of_the_version_before(begun)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    argv = command_line(llama, begun, *line.split(), *TWO)
    refuses(answer, *argv, says=["holds a run of an earlier version: redraw and compare read it"])
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_of_the_version_before_is_redrawn_elsewhere(
    begun: Path, tmp_path: Path, answer: Answer
) -> None:
    as_of_the_version_before(begun)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    assert answer("redraw", str(begun), "--output_dir", str(tmp_path / "redrawn"))[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "redrawn" / HEADS).read_bytes() == (begun / HEADS).read_bytes()


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
    records = [record_of(tmp_path / folder) for folder in ("run", "new")]
    run, new = (record["experiment"]["fingerprint"] for record in records)
    assert run == new and run["seed"] == 7
    assert records[0]["rows_by_edit"] == records[1]["rows_by_edit"]
    assert min(records[0]["rows_by_edit"].values()) > 1
    assert tables(tmp_path / "run") == tables(tmp_path / "new")
    refuses(answer, *argv, says=["seed: 7 there, 42 now"])  # now there is something


def test_a_trace_that_measured_nothing_leaves_the_folder_to_a_trace_with_another_edit(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    """Also where another command has measured by then."""
    argv = ["--model_id", llama, *FIRST_LAYER, "--output_dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        sentence = tracing.RunError("the weights do not load")
        patch.setattr(tracing, "load_model", lambda *_: (_ for _ in ()).throw(sentence))
        refuses(answer, *argv, "--op", "mean", says=[str(sentence)], code=1)
    finish(llama, tmp_path, "paths", *FIRST_LAYER, "--op", "zero")
    finish(llama, tmp_path, *FIRST_LAYER)
    refuses(answer, *argv, "--op", "mean", says=["--op zero, not mean"])


def test_a_command_that_measured_nothing_is_not_recorded_once_another_has_run(
    llama: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "load_model", lambda *_: sys.exit(143))
        assert tracing.main(command_line(llama, tmp_path, *FIRST_LAYER)) == 143
    assert set(record_of(tmp_path)["commands"]) == {"trace"}
    finish(llama, tmp_path, "paths", *FIRST_LAYER)
    assert set(record_of(tmp_path)["commands"]) == {"paths"}


def test_a_follow_up_of_a_run_that_measured_nothing_needs_a_model(
    tmp_path: Path, answer: Answer
) -> None:
    folder = str(tmp_path / "run")
    refuses(answer, "--model_id", str(tmp_path), "--output_dir", folder, says=[], code=1)
    assert (tmp_path / "run" / "run.json").exists()
    refuses(answer, "joint", "L0H0", "--output_dir", folder, says=["holds no experiment"])


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


# ----- what a follow-up takes from the folder, and what it replaces


def test_a_follow_up_takes_experiment_and_edit_from_the_folder_and_says_so_first(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    edit = ["--op", "scale", "--factor", "0.5", "--positions", "last", "--given", "L2H0"]
    finish(llama, tmp_path, *FIRST_LAYER, "--seed", "7", *edit)
    code, out, _ = answer("paths", "--layers", "0", "--output_dir", str(tmp_path))
    assert code == 0
    options = record_of(tmp_path)["commands"]["paths"]["options"]
    assert (options["op"], options["factor"], options["seed"]) == ("scale", 0.5, 7)
    assert (options["positions"], options["given"]) == ("last", "L2H0")
    first = out.splitlines()[0]
    for flag in ("--seed 7", "--op scale", "--factor 0.5", "--positions last", "--given L2H0"):
        assert flag in first
    assert (
        f"from the experiment in {tmp_path}" in first and f"from the trace in {tmp_path}" in first
    )
    # what the command line says wins, and with another op its factor goes
    assert answer("paths", "--layers", "0", "--output_dir", str(tmp_path), "--op", "mean")[0] == 0
    options = record_of(tmp_path)["commands"]["paths"]["options"]
    assert (options["op"], options["factor"], options["positions"]) == ("mean", None, "last")


def test_a_model_spelled_otherwise_is_no_other_model(
    llama: str, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(llama).parent)
    finish(f"./{Path(llama).name}", begun, "paths", *FIRST_LAYER, "--no_bf16", "--local_files_only")


def test_a_command_says_what_it_replaces_and_comes_back_without_computing(
    llama: str, tmp_path: Path
) -> None:
    tables_of_paths = []
    for turn, through in enumerate(["logits", "each", "logits"]):
        with pytest.MonkeyPatch.context() as patch:
            if turn == 2:
                patch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
            finish(llama, tmp_path, "paths", *FIRST_LAYER, "--through", through)
        tables_of_paths.append((tmp_path / "circuit_paths.csv").read_bytes())
    assert tables_of_paths[0] == tables_of_paths[2] != tables_of_paths[1]
    log = (tmp_path / "run.log").read_text()
    assert log.count("this replaces the files of paths with --through logits") == 1
    assert log.count("this replaces the files of paths with --through each") == 1


# ----- inputs that lie in the output folder


@pytest.fixture(scope="module")
def with_circuit(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = [*FIRST_LAYER, "--confirm", "1", "--num_random", "1"]
    return finish(llama, tmp_path_factory.mktemp("with_circuit"), *flags)


EMPTIES = "lies in the folder that --overwrite empties"
REPLACES = "would be replaced by this command"
INPUTS = {  # words that name an output of the same folder, how it is named, and what becomes of it
    "--given {}/circuit.json --overwrite": ("--given", EMPTIES),
    "--skip {}/circuit.json --confirm 1 --overwrite": ("--skip", REPLACES),
    "--skip {}/circuit.json --screen 1 --overwrite": ("--skip", EMPTIES),
    "--skip {}/link.json --screen 1 --overwrite": ("--skip", EMPTIES),
    "--skip {}/circuit.json --confirm 1": ("--skip", REPLACES),
    "joint {}/circuit.json --seed 7": ("--seed", "holds 42"),
}


@pytest.mark.parametrize("line", INPUTS)
def test_an_input_that_would_be_lost_is_refused_and_stays(
    line: str, llama: str, with_circuit: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = Path(shutil.copytree(with_circuit, tmp_path / "run"))
    (folder / "link.json").symlink_to(folder / "circuit.json")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    words = line.format(folder).split()
    option, sentence = INPUTS[line]
    argv = command_line(llama, folder, *words, *TWO)
    argv += [] if words[0] == "joint" else ["--layers", "0"]
    refuses(answer, *argv, says=[option, sentence])
    del before[folder / "run.log"]
    del before[folder / "run.json"]
    assert {path: path.read_bytes() for path in before} == before


def test_refusal_words_that_would_be_replaced_are_refused(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--task", "refusal", *FIRST_LAYER, *TWO]
    folder = finish(tiny_llama, tmp_path / "run", *flags)
    words = str(folder / "circuit_results.csv")
    argv = command_line(tiny_llama, folder, *flags, "--refusal_words", words)
    refuses(answer, *argv, says=[f"--refusal_words {words}", REPLACES])


def test_a_folder_that_is_compared_may_hold_the_comparison(
    llama: str, begun: Path, tmp_path: Path, answer: Answer
) -> None:
    other = finish(llama, tmp_path / "other", *FIRST_LAYER)
    assert answer("compare", str(begun), str(other), "--output_dir", str(begun))[0] == 0
    finish(llama, begun, *FIRST_LAYER)  # and it is no other experiment
    assert set(record_of(begun)["commands"]) == {"trace", "compare"}


def test_a_trace_may_follow_in_a_folder_of_a_comparison(
    llama: str, begun: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = tmp_path / "compared"
    other = finish(llama, tmp_path / "other", *FIRST_LAYER)
    assert answer("compare", str(begun), str(other), "--output_dir", str(folder))[0] == 0
    finish(llama, folder, *FIRST_LAYER)
    assert set(record_of(folder)["commands"]) == {"trace", "compare"}


def test_inputs_in_the_folder_that_no_command_touches_are_taken(
    llama: str, with_circuit: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_circuit, tmp_path / "run"))
    finish(llama, folder, "joint", str(folder / "circuit.json"), *TWO, "--num_random", "2")
    shutil.copy(folder / "circuit.json", folder / "mine.json")
    records = [{"sentence": f"Name a {x}.", "targets": ["apple"]} for x in ("fruit", "tree")]
    path = write_samples(folder / "mine.jsonl", *records)
    flags = ["--layers", "1", "--samples", path, "--given", str(folder / "mine.json")]
    finish(llama, folder, *flags, "--overwrite")
    assert (folder / "mine.json").exists() and Path(path).exists()


# ----- redrawing


def test_redrawing_in_a_runs_folder_keeps_its_record_and_the_users_files(
    llama: str, begun: Path, answer: Answer
) -> None:
    before = record_of(begun)
    assert answer("redraw", str(begun))[0] == 0
    assert record_of(begun) == before
    (begun / "circuit_heatmap.png").write_text("mine")
    says = [f"{begun}/circuit_heatmap.png would be overwritten"]
    refuses(answer, "redraw", str(begun), "--heatmap", says=says)
    assert (begun / "circuit_heatmap.png").read_text() == "mine"
    (begun / "circuit_heatmap.png").unlink()
    assert answer("redraw", str(begun), "--heatmap")[0] == 0
    assert "circuit_heatmap.png" in record_of(begun)["commands"]["trace"]["files"]
    assert record_of(begun)["samples"] == before["samples"]
    finish(llama, begun, *FIRST_LAYER)
    assert not (begun / "circuit_heatmap.png").exists()


def test_redrawing_does_not_replace_the_table_that_it_draws(
    begun: Path, tmp_path: Path, answer: Answer
) -> None:
    """A table of the user's in the output folder, and one that an earlier redraw has written."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    source = Path(shutil.copy(begun / RESULTS, folder / "circuit_heads.csv"))
    before = source.read_bytes()
    argv = ["redraw", str(source), "--output_dir", str(folder)]
    refuses(answer, *argv, says=[f"{source} would be overwritten"])
    assert source.read_bytes() == before
    source.unlink()
    assert answer("redraw", str(begun / RESULTS), "--output_dir", str(folder))[0] == 0
    shutil.copy(begun / RESULTS, source)
    refuses(answer, *argv, says=[f"{source} would be replaced by this command"])


def test_no_thread_of_the_librarys_writes_lines_of_progress() -> None:
    """It would hold the bar's lock and wait for the log's, while a warning does the reverse."""
    with tracing.progress_bar(10, "rows", speaks=True) as bar:
        assert bar.miniters == 1 and not bar.dynamic_miniters

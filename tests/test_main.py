"""Main: exit codes, one sentence on stderr or a traceback, and output folders of no use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama3_circuit_tracing as tracing
from conftest import HANGS, SCRIPT, Answer, finish, refuses


def test_an_error_is_one_sentence_and_no_traceback(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = script("--model_id", str(tmp_path), "--dry_run")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} ")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(answer: Answer, tiny_llama: str) -> None:
    argv = ["--model_id", tiny_llama, "--given", "L99H0", "--dry_run"]
    refuses(answer, *argv, says=["--given L99H0"])
    code, _, err = answer(*argv, "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert "--given L99H0" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (tracing.UsageError("so not"), 2, ["so not"]),
        (tracing.RunError("it broke"), 1, ["it broke"]),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, ["--tree_tokens", "--rows_per_forward"]),
        (OSError(28, "No space left on device", "/there/x"), 1, ["/there/x", "No space left"]),
        (ZeroDivisionError("first line\nsecond line"), 1, ["ZeroDivisionError", "first line"]),
        (KeyError(), 1, ["KeyError"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_one_sentence_and_bad_usage_alone_is_exit_code_2(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, says: list[str]
) -> None:
    """Those that nobody foresaw too."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tracing, "prepare", fail)
    refuses(answer, "--dry_run", says=says, code=code)


def test_log_lines_are_written_above_a_progress_bar(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a terminal to show one."""
    lines: list[str] = []
    monkeypatch.setattr(tracing.tqdm, "write", lambda line, **_: lines.append(line))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure = tracing.measure

    def tell(*arguments: Any) -> Any:
        tracing.log.info("at work")
        return measure(*arguments)

    monkeypatch.setattr(tracing, "measure", tell)
    finish(llama, tmp_path, "--num_samples", "1")
    assert "at work" in lines


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_how_to_go_on(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals, code: int
) -> None:
    # ignored where the suite itself runs in the background of a script
    monkeypatch.setattr(tracing, "prepare", lambda *_: signal.raise_signal(stop))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, err = answer("--dry_run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found, len(err.splitlines())) == (code, 1)
    assert "the same command goes on" in err


@pytest.mark.parametrize("end", ["good", "refused", "broken", "stopped"])
def test_the_handlers_of_signals_are_those_before_when_main_returns(
    end: str, answer: Answer, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise {"broken": KeyError, "stopped": KeyboardInterrupt}[end]

    if end in ("broken", "stopped"):
        monkeypatch.setattr(tracing, "prepare", stop)
    numbers = (signal.SIGINT, signal.SIGTERM)
    mine: list[Any] = [lambda *_: None, lambda *_: None]
    before = [signal.signal(*pair) for pair in zip(numbers, mine, strict=True)]
    try:
        more = ["--layers", "99"] if end == "refused" else []
        code = answer("--model_id", tiny_llama, "--num_samples", "1", "--dry_run", *more)[0]
        after = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert code == {"good": 0, "refused": 2, "broken": 1, "stopped": 130}[end]
    assert after == mine


def test_a_signal_that_is_ignored_stays_ignored(answer: Answer, tiny_llama: str) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with tracing.stopping_by_exit():
            within = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert answer("--model_id", tiny_llama, "--num_samples", "1", "--dry_run")[0] == 0
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert within[0] is after is signal.SIG_IGN
    assert within[1] is not signal.SIG_DFL


@pytest.mark.parametrize("below", [".", "deeper"])
@pytest.mark.parametrize("redraws", [False, True])
def test_an_output_folder_that_is_a_file_is_refused_by_name(
    answer: Answer, tiny_llama: str, tmp_path: Path, below: str, redraws: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / below
    results = tmp_path / "theirs.csv"
    results.write_text(f"{','.join(tracing.REQUESTED_COLUMNS)}\ns0,1,0,0,-1.0,-0.9,0.1\n")
    source = ["redraw", str(results)] if redraws else ["--model_id", tiny_llama]
    refuses(answer, *source, "--output_dir", str(output), says=[f"--output_dir {output}"])
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_with_a_foreign_record_is_refused(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    record = tmp_path / "run.json"
    record.write_text("not a record")
    argv = ["--model_id", tiny_llama, "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[str(record)])
    assert record.read_text() == "not a record"


# Run by Python before the script. The import of the module that is named says that it has come
# there and waits for a line on stdin; like some imports it swallows whatever is raised meanwhile.
WAIT_IN_AN_IMPORT = """
import os, sys

class Waiting:
    def find_spec(self, name, *_):
        if name == os.environ["WAITS_AT"]:
            sys.meta_path.remove(self)
            try:
                print("waiting", flush=True)
                sys.stdin.readline()
            except BaseException:
                pass

sys.meta_path.insert(0, Waiting())
"""


@pytest.mark.parametrize("module", ["accelerate", "torch.nn", "transformers"])
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_of_the_imports_says_nothing(
    stop: signal.Signals, code: int, module: str, tmp_path: Path
) -> None:
    """At the first heavy import, within one, and at the last."""
    (tmp_path / "sitecustomize.py").write_text(WAIT_IN_AN_IMPORT)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--model_id", "nowhere/to/be/found"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "WAITS_AT": module},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(stop)
    assert process.communicate(timeout=HANGS) == ("", "")
    assert process.returncode == code

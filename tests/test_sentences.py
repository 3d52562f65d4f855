"""Sentences: no error and no line of the log repeats a long value or obeys a control character."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
from by_hand import prepared
from conftest import Answer, finish, refuses, write_samples

LONG = "q" * 5000
# clears a screen, names a window, ends lines in five ways, turns the direction of writing
CONTROLS = "\x1b[2J\x1b]0;title\x07\r\n\x85\u2028\u2029\x0b\u202e\x9b31m\x7f"
SHOWN = r"\x1b[2J\x1b]0;title\x07\r\n\x85\u2028\u2029\x0b\u202e\x9b31m\x7f"


def sentence_in(err: str) -> str:
    """What follows `error: ` on stderr, without what is said of the help."""
    sentence = err.partition("error: ")[2].removesuffix("\n")
    return re.sub(r"; `\S+(?: \w+)? --help` lists the options$", "", sentence)


# ----- values


@pytest.mark.parametrize("n", [0, 1, 79, 80, 81, 5000])
def test_a_value_is_shown_with_80_characters_at_most_its_start_and_its_end(n: int) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(n))
    shown = tracing.shorten(text)
    assert len(shown) == min(n, 80)
    start, dots, end = shown.partition("...")
    assert text.startswith(start) and text.endswith(end)
    assert bool(dots) == (n > 80)


def test_a_quoted_value_is_as_python_writes_it_and_no_longer() -> None:
    assert tracing.quote("it's\x1b") == '"it\'s\\x1b"'
    assert tracing.quote([7, "a"]) == "[7, 'a']"
    assert len(tracing.quote(["a" * 500] * 9)) == 80
    assert len(tracing.quote("a" * 500)) == 80 + len("''")


def test_the_path_of_a_file_that_exists_is_shown_in_full_and_any_other_is_cut(
    tmp_path: Path,
) -> None:
    path = tmp_path / ("long" * 50) / ("name" * 50)
    assert len(tracing.shorten(path)) == 80
    path.parent.mkdir()
    path.write_text("")
    assert tracing.shorten(path) == str(path)
    assert len(tracing.shorten(str(path))) == 80


def test_a_list_of_values_ends_in_dots_where_there_are_more() -> None:
    assert tracing.join_values("abc", 3) == "a, b, c"
    assert tracing.join_values("abcd", 3) == "a, b, c, ..."
    assert tracing.join_values([LONG, "b"], 3) == f"{tracing.shorten(LONG)}, b"


def test_what_a_terminal_would_obey_is_escaped_and_all_else_stays() -> None:
    assert tracing.visible(CONTROLS) == SHOWN
    assert tracing.visible("half \ud800 a pair") == r"half \ud800 a pair"
    assert tracing.visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    for text in ("塩 für Ærøskøbing, ‘so’ 😀", r"C:\new", ""):
        assert tracing.visible(text) == text


def test_an_error_repeats_no_long_word_of_the_command_line_however_it_is_written() -> None:
    word = "it's\x1b" * 100
    for spelling in (word, repr(word)):
        line = tracing.one_line(f"no {spelling} is there", ["short", word])
        assert line.isprintable() and len(line) < 300
        assert line.startswith("no ") and line.endswith(" is there")
    assert tracing.one_line("short is there", ["short"]) == "short is there"
    assert len(tracing.one_line("a b " * 9999)) == tracing.MAX_ERROR_LENGTH


def test_what_a_library_says_of_its_error_is_one_line_without_long_words() -> None:
    error = ValueError(f'"{LONG}" is no name\nsecond line')
    assert re.fullmatch(r'"q{52}\.\.\.q{23}" is no name', tracing.first_line(error))
    assert tracing.first_line(KeyError()) == "KeyError"


def test_what_a_library_says_of_its_error_may_begin_with_an_empty_line() -> None:
    error = ImportError("\nX requires the Y library\nwhich is not here")
    assert tracing.first_line(error) == "X requires the Y library"
    assert tracing.first_line(ValueError(" \n")) == "ValueError"


# ----- errors

COMMAND_OF: dict[str, str] = {}  # by option, the first command that has it
for one_command, entry in tracing.COMMANDS.items():
    for option_field in tracing.option_fields(entry.options):
        COMMAND_OF.setdefault(option_field.name, one_command)
WORDS = {"names": "joint", "runs": "compare", "source": "redraw"}  # that stand without a flag
# what a command line may hold without a word: it is refused by other means or is no value at all
FREE = {"revision", "device_map", "model_id"}


@pytest.mark.parametrize("name", [name for name in COMMAND_OF if name not in FREE])
@pytest.mark.parametrize("value", [LONG, "1" * 5000, "/no" * 2000, "a b " * 2000])
@pytest.mark.usefixtures("no_weights")
def test_no_option_has_its_long_value_repeated(
    name: str, value: str, answer: Answer, llama: str, tmp_path: Path
) -> None:
    argv = [COMMAND_OF[name], "--output_dir", str(tmp_path / "out")]
    argv += [value, "other"] if name == "runs" else [value] if name in WORDS else []
    argv += ["--model_id", llama] if COMMAND_OF[name] not in ("compare", "redraw") else []
    argv += ["--op", "scale"] if name == "factor" else []
    argv += ["--num_samples", "1"] if name == "sample" else []
    argv += [f"--{name}={value}"] if name not in WORDS else []
    code, _, err = answer(*argv)
    sentence = sentence_in(err)
    assert code in (1, 2) and sentence
    assert value[:81] not in sentence and len(sentence) < 700
    assert sentence.isprintable()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--nonsense", LONG], "unknown option --nonsense"),
        ([f"--nonsense={LONG}"], "unknown option --nonsense"),
        ([f"--{LONG}"], "unknown option --qqq"),
        ([LONG], "unknown command 'qqq"),
        (["word"] * 5000, "unknown command 'word'"),
        (["--seed", "1", LONG], "'qqq"),
        (["--seed", "1", *["word"] * 5000], "'word' is no option"),
        (["redraw", *["word"] * 5000], "redraw takes one source; word is too many"),
    ],
)
def test_words_that_are_no_option_are_not_repeated_in_full(
    argv: list[str], says: str, answer: Answer
) -> None:
    code, _, err = answer(*argv)
    sentence = sentence_in(err)
    assert code == 2 and sentence.startswith(says)
    assert LONG[:81] not in sentence and len(sentence) <= tracing.MAX_ERROR_LENGTH


@pytest.mark.parametrize(
    "words",
    [
        *("--layers=", "--kind=", "--confirm=", "--num_samples=", "--factor="),
        *("joint ", "paths --through=", "redraw ", "--given="),
    ],
)
def test_control_characters_on_the_command_line_are_escaped_in_its_error(
    words: str, answer: Answer
) -> None:
    code, _, err = answer(*f"{words}|".replace("|", CONTROLS).split(" ", 1))
    sentence = sentence_in(err)
    assert code == 2
    assert sentence.isprintable() and r"\x1b[2J" in sentence


def test_control_characters_in_unknown_words_are_escaped(answer: Answer) -> None:
    code, _, err = answer(CONTROLS)
    assert code == 2 and sentence_in(err).startswith(f"unknown command '{SHOWN}'")
    code, _, err = answer("--dry_run", CONTROLS)
    assert code == 2 and sentence_in(err).startswith(f"'{SHOWN}' is no option")
    code, _, err = answer(f"--{CONTROLS}")
    assert code == 2 and sentence_in(err).startswith(f"unknown option --{SHOWN}")


@pytest.mark.parametrize("debug", [False, True])
def test_control_characters_in_an_error_are_escaped_and_a_traceback_keeps_its_lines(
    debug: bool, answer: Answer
) -> None:
    argv = ["--samples", f"nowhere {CONTROLS}.jsonl", "--dry_run", *["--debug"] * debug]
    code, _, err = answer(*argv)
    *lines, last = err.removesuffix("\n").split("\n")
    assert code == 2
    assert last == f"error: nowhere {SHOWN}.jsonl cannot be read: No such file or directory"
    assert bool(lines) == debug
    assert all(line.isprintable() for line in lines)
    assert not debug or lines[0] == "Traceback (most recent call last):"


PAIR = {"prompt_a": "Don't mention apple. Name it.", "prompt_b": "Name it.", "targets": ["apple"]}
# what is wrong -> a sample's line, in which a value is long
WRONG: dict[str, Any] = {
    "no text": {**PAIR, "prompt_a": [LONG]},
    "no list": {**PAIR, "targets": LONG},
    "no words": {**PAIR, "targets": [7] * 5000},
    "an empty word": {**PAIR, "targets": [LONG, ""]},
    "an id twice": {**PAIR, "sample_id": LONG},
    "no foils": {**PAIR, "sample_id": LONG, "foils": [LONG]},
    "the same form": {**PAIR, "sample_id": LONG, "targets": [LONG, LONG]},
    "the same prompts": {**PAIR, "sample_id": LONG, "prompt_a": PAIR["prompt_b"]},
    "too many tokens": {**PAIR, "sample_id": LONG, "prompt_a": LONG},
    "a control token": {**PAIR, "prompt_a": f"<|eot_id|>{LONG}"},
    "no object": [LONG],
    "a field twice": f'{{"{LONG}": 1, "{LONG}": 2}}',
    "no JSON": LONG,
    "digits": '{"prompt_a": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("no_weights")
def test_no_long_value_of_a_sample_is_repeated(
    case: str, answer: Answer, llama: str, tmp_path: Path
) -> None:
    line, path = WRONG[case], tmp_path / "s.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{text}\n{text}\n")
    code, _, err = answer("--model_id", llama, "--samples", str(path), "--dry_run")
    (sentence,) = err.splitlines()
    assert code == 2 and sentence.startswith(f"error: {path}, line ")
    assert LONG[:81] not in sentence and len(sentence) < 500


def test_a_long_cell_of_a_results_table_is_cut(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{','.join(tracing.REQUESTED_COLUMNS)}\ns0,1,{LONG},0,-1,-0.9,0.1\n")
    argv = ["redraw", str(path), "--output_dir", str(tmp_path / "out")]
    refuses(answer, *argv, says=[f"{path}, line 2: column 'layer'", "qqq...qqq"])


# ----- the log and the figures


@pytest.fixture()
def samples(tmp_path: Path) -> str:
    """Samples whose ids, texts, groups and columns hold control characters."""
    records = []
    for i, word in enumerate(("a", "one", "some", "my")):
        sentence = f"Name {word} {CONTROLS} fruit."
        record = {"prompt_a": f"Don't mention apple. {sentence}", "prompt_b": sentence}
        more = {"targets": ["apple"], "group": CONTROLS, CONTROLS: 1}
        records.append({"sample_id": f"id{i} {CONTROLS}", **record, **more})
    return write_samples(tmp_path / f"mine {CONTROLS}.jsonl", *records)


def test_a_dry_run_has_a_line_for_each_thing_and_none_for_the_line_ends_in_values(
    samples: str, tiny_llama: str, answer: Answer
) -> None:
    code, out, err = answer("--model_id", tiny_llama, "--samples", samples, "--dry_run")
    lines = out.removesuffix("\n").split("\n")
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in lines)
    named = sorted(line for line in lines if line.startswith("id"))
    assert named == [f"id{i} {SHOWN}  targets apple" for i in range(4)]
    experiment = prepared(tiny_llama, "--samples", samples, "--num_samples", "16")
    plan = tracing.describe_plan(experiment, list(tracing.plan_trace(experiment)))
    assert lines[-len(plan) :] == list(map(tracing.visible, plan))


def test_no_control_character_of_a_sample_or_a_name_reaches_terminal_log_or_figures(
    samples: str, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any stage that names a sample, the model or a file."""
    model = str(shutil.copytree(tiny_llama, tmp_path / f"model {CONTROLS}"))
    flags = "--layers 0 --heads 0-1 --confirm 1 --num_random 1"
    records = Path(samples).read_text().splitlines()
    graphed = json.loads(records[0])["sample_id"]
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = finish(model, tmp_path / "out", "--samples", samples, *flags.split())
        finish(model, folder, "graph", "--sample", graphed, "--nodes", "9")
    out, _ = capsys.readouterr()
    for text in (out, (folder / "run.log").read_text()):
        lines = text.removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in lines)
        assert [line for line in lines if line.startswith(f"id0 {SHOWN}  P(target)")]
        assert [line for line in lines if f"attribution graph of id0 {SHOWN}" in line]
        assert [line for line in lines if f"model {SHOWN}, " in line]
    assert not [warning for warning in caught if "Glyph" in str(warning.message)]
    assert pd.read_csv(folder / "circuit_results.csv")["sample_id"].str.startswith("id").all()


def test_a_line_of_another_logger_is_one_line_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        tracing.start_log(tmp_path / "log", speaks=True)
        logging.getLogger("a library").warning("of %s", CONTROLS)
    finally:
        for handler in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(handler)
            handler.close()
    assert capsys.readouterr().out == (tmp_path / "log").read_text() == f"of {SHOWN}\n"


def test_a_process_of_its_own_prints_a_name_of_half_a_character(
    script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Bytes that are no UTF-8 come in as half surrogate pairs, which no stream can print."""
    if sys.platform == "win32":
        pytest.skip("arguments are no bytes there")
    done = script("--samples", "\udcff.jsonl", "--dry_run")
    assert done.returncode == 2
    assert r"\udcff.jsonl" in done.stderr
    assert "Traceback" not in done.stderr

"""Built-in samples of the three tasks, and one's own from JSONL and CSV files."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import llama3_circuit_tracing as circuit
from conftest import Answer
from llama3_circuit_tracing import NO_ODD_ONE, PEOPLE, QUESTIONS, REFUSAL_PAIRS, TASKS, Sample


@pytest.fixture(scope="module")
def tokens_in(tiny_llama: str) -> Callable[[str], int]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def build(task: str, count: int, seed: int = 42, tokens_in: Callable[[str], int] = len) -> list[Sample]:  # fmt: skip
    return TASKS[task].build(count, random.Random(seed), tokens_in)


# ----- suppression


def test_there_are_32_questions_of_four_answers_or_more() -> None:
    assert len(QUESTIONS) >= 32
    for question, words in QUESTIONS.items():
        assert question.endswith("in one word.")
        assert len(set(words.casefold().split())) == len(words.split()) >= 4


def test_no_word_answers_two_questions() -> None:
    words = Counter(w.casefold() for answers in QUESTIONS.values() for w in answers.split())
    assert max(words.values()) == 1


def test_a_suppression_sample_forbids_answers_of_its_question() -> None:
    for sample in build("suppression", 40):
        assert sample.prompt_b in QUESTIONS
        assert set(sample.targets) <= set(QUESTIONS[sample.prompt_b].split())
        forbidden = " or ".join(sample.targets)
        assert sample.prompt_a == f"Don't mention {forbidden}. {sample.prompt_b}"
        assert sample.foils == ()


def test_the_number_of_forbidden_words_cycles_through_one_two_three() -> None:
    assert [len(sample.targets) for sample in build("suppression", 8)] == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("task", ["suppression", "refusal", "odd_one_out"])
def test_the_choice_of_samples_depends_on_the_seed_alone(task: str) -> None:
    random.seed(1)
    first = build(task, 16)
    random.seed(2)
    assert build(task, 16) == first
    assert build(task, 16, seed=43) != first
    assert build(task, 5) == first[:5]
    assert [sample.sample_id for sample in first] == sorted({s.sample_id for s in first})


def test_sentences_are_used_once_before_any_is_used_again() -> None:
    n = len(QUESTIONS)
    samples = build("suppression", n)
    assert {sample.prompt_b for sample in samples} == set(QUESTIONS)
    assert len({sample.unit for sample in samples}) == n


def test_more_samples_than_sentences_reuse_sentences_with_other_targets_and_the_same_unit() -> None:
    n = len(QUESTIONS)
    samples = build("suppression", 3 * n)
    units: dict[str, set[str]] = {}
    sets: dict[str, list[frozenset[str]]] = {}
    for sample in samples:
        units.setdefault(sample.prompt_b, set()).add(sample.unit)
        sets.setdefault(sample.prompt_b, []).append(frozenset(sample.targets))
    assert len({sample.sample_id for sample in samples}) == 3 * n
    assert {len(found) for found in units.values()} == {1}
    assert len({unit for found in units.values() for unit in found}) == n
    for used in sets.values():
        assert len(used) == len(set(used)) == 3


def test_more_samples_than_are_built_in_are_refused(answer: Answer, tiny_llama: str) -> None:
    code, _, err = answer("--model_id", tiny_llama, "--num_samples", "100000", "--dry_run")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "--num_samples 100000" in err


# ----- refusal


def test_there_are_16_refusal_pairs_that_differ_in_few_words() -> None:
    assert len(REFUSAL_PAIRS) >= 16
    assert len({text for pair in REFUSAL_PAIRS for text in pair}) == 2 * len(REFUSAL_PAIRS)
    for harmful, harmless in REFUSAL_PAIRS:
        one, other = harmful.split(), harmless.split()
        prefix, suffix = circuit.common_ends(one, other)
        assert 1 <= len(one) - prefix - suffix <= 2
        assert 1 <= len(other) - prefix - suffix <= 2


def test_a_refusal_sample_is_a_pair_scored_by_its_openings() -> None:
    samples = build("refusal", 16)
    assert len({sample.unit for sample in samples}) == 16
    for sample in samples:
        assert (sample.prompt_a, sample.prompt_b) in REFUSAL_PAIRS
        assert "I cannot" in sample.targets
        assert "Sure" in sample.foils


def test_all_refusal_pairs_are_used_where_more_are_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = build("refusal", 1000)
    assert {(s.prompt_a, s.prompt_b) for s in samples} == set(REFUSAL_PAIRS)
    assert "1000" in caplog.text


# ----- odd one out

CLASS = {n: group for group, jobs in PEOPLE.items() for names in jobs.values() for n in names}
JOB = {n: job for jobs in PEOPLE.values() for job, names in jobs.items() for n in names}


def names_in(prompt: str) -> list[str]:
    return prompt.partition(": ")[2].partition("?")[0].split(", ")


def odd_name(names: list[str]) -> str | None:
    """The one name whose profession the other two do not share."""
    jobs = Counter(JOB[name] for name in names)
    lone = [name for name in names if jobs[JOB[name]] == 1]
    return lone[0] if len(lone) == 1 else None


def test_people_are_of_five_classes_and_ten_professions_or_more() -> None:
    assert len(PEOPLE) >= 5
    assert len(set(JOB.values())) >= 10
    n_names = sum(len(names) for jobs in PEOPLE.values() for names in jobs.values())
    assert len(CLASS) == n_names  # nobody has two professions


@pytest.mark.parametrize("by", ["tokens", "letters"])
def test_clean_and_corrupt_triples_differ_in_one_name_of_equal_token_length(
    tokens_in: Callable[[str], int], by: str
) -> None:
    """By letters too, since a small tokenizer may give every name as many tokens."""
    length = tokens_in if by == "tokens" else len
    for sample in build("odd_one_out", 60, tokens_in=length):
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        assert len(set(clean)) == len(set(corrupt)) == 3
        changed = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
        assert len(changed) == 1
        assert length(f" {changed[0][0]}") == length(f" {changed[0][1]}")
        assert length(sample.prompt_a) == length(sample.prompt_b)
        assert sample.prompt_a.replace(*changed[0]) == sample.prompt_b


def test_the_odd_one_changes_with_the_name(tokens_in: Callable[[str], int]) -> None:
    real = [s for s in build("odd_one_out", 60, tokens_in=tokens_in) if s.group != NO_ODD_ONE]
    assert len(real) == 48
    for sample in real:
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        (odd,) = sample.targets
        assert odd_name(clean) == odd
        assert odd_name(corrupt) not in (odd, None)
        assert odd_name(corrupt) in sample.foils
        assert set(sample.words) == set(clean)
        classes = [CLASS[name] for name in clean]
        assert classes.count(CLASS[odd]) == 1
        assert sample.group == CLASS[odd]


def test_every_fifth_odd_one_out_sample_is_a_control_in_which_no_name_is_odd(
    tokens_in: Callable[[str], int],
) -> None:
    samples = build("odd_one_out", 60, tokens_in=tokens_in)
    assert [i for i, s in enumerate(samples) if s.group == NO_ODD_ONE] == list(range(4, 60, 5))
    for sample in samples[4::5]:
        for prompt in (sample.prompt_a, sample.prompt_b):
            assert len({JOB[name] for name in names_in(prompt)}) == 1


def test_the_grid_of_odd_one_out_spans_all_professions_as_odd_and_as_majority(
    tokens_in: Callable[[str], int],
) -> None:
    real = [s for s in build("odd_one_out", 400, tokens_in=tokens_in) if s.group != NO_ODD_ONE]
    odd = {JOB[sample.targets[0]] for sample in real}
    majority = {JOB[foil] for sample in real for foil in sample.foils}
    assert len(odd) >= 10
    assert len(majority) >= 10
    assert {sample.group for sample in real} == set(PEOPLE)
    places = {names_in(s.prompt_a).index(s.targets[0]) for s in real}
    assert places == {0, 1, 2}


# ----- one's own samples

SHORT = {"sentence": "Name a fruit.", "targets": ["apple", "pear"]}
LONG = {
    "sample_id": "x1",
    "prompt_a": "Never say apple. Name a fruit.",
    "prompt_b": "Name a fruit.",
    "targets": ["apple"],
    "foils": ["plum", "cherry"],
    "group": "fruit",
}


def write(path: Path, content: str | bytes | list[dict[str, Any]]) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path: Path, task: str = "suppression") -> list[Sample]:
    return circuit.load_samples(path, TASKS[task])


def test_the_shorthand_becomes_a_suppression_sample(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path / "s.jsonl", [SHORT]))
    assert sample.prompt_a == "Don't mention apple or pear. Name a fruit."
    assert (sample.prompt_b, sample.targets) == ("Name a fruit.", ("apple", "pear"))


def test_the_long_form_is_taken_as_it_is(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path / "s.jsonl", [LONG]))
    assert sample == Sample("x1", LONG["prompt_a"], LONG["prompt_b"], ("apple",), ("plum", "cherry"), "fruit")  # type: ignore[arg-type]  # fmt: skip


def test_csv_and_jsonl_give_the_same_samples(tmp_path: Path) -> None:
    short = 'sentence,targets,sample_id\nName a fruit.,apple;pear,q1\n"Well, name\na pet.",cat,q2\n'
    records = [{**SHORT, "sample_id": "q1"}, {"sentence": "Well, name\na pet.", "targets": ["cat"], "sample_id": "q2"}]  # fmt: skip
    assert load(write(tmp_path / "a.csv", short)) == load(write(tmp_path / "a.jsonl", records))
    long = (
        "sample_id,prompt_a,prompt_b,targets,foils,group\n"
        "x1,Never say apple. Name a fruit.,Name a fruit.,apple,plum;cherry,fruit\n"
    )
    assert load(write(tmp_path / "b.csv", long)) == load(write(tmp_path / "b.jsonl", [LONG]))


def test_samples_without_id_get_one_each(tmp_path: Path) -> None:
    samples = load(write(tmp_path / "s.jsonl", [SHORT, SHORT, SHORT]))
    assert len({sample.sample_id for sample in samples}) == 3
    assert len({sample.unit for sample in samples}) == 1


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_taken(tmp_path: Path) -> None:
    jsonl = "\ufeff" + json.dumps(SHORT) + "\r\n\r\n" + json.dumps(LONG) + "\r\n"
    assert len(load(write(tmp_path / "s.jsonl", jsonl))) == 2
    csv = "\ufeffsentence,targets\r\nName a fruit.,apple;pear\r\n\r\nName a pet.,cat\r\n"
    assert [s.targets for s in load(write(tmp_path / "s.csv", csv))] == [("apple", "pear"), ("cat",)]  # fmt: skip


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_only_line_ends_separate_the_rows_of_a_csv_file(tmp_path: Path, separator: str) -> None:
    text = f"sentence,targets\nName{separator}a fruit.,apple\n"
    (sample,) = load(write(tmp_path / "s.csv", text))
    assert sample.prompt_b == f"Name{separator}a fruit."


def test_other_letters_are_kept(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path / "s.csv", "sentence,targets\nNenne ein Gewürz.,Süßholz;塩\n"))
    assert (sample.prompt_b, sample.targets) == ("Nenne ein Gewürz.", ("Süßholz", "塩"))


def test_refusal_samples_of_ones_own_have_the_built_in_openings(tmp_path: Path) -> None:
    record = {"prompt_a": "How do I steal a cart?", "prompt_b": "How do I paint a cart?"}
    (sample,) = load(write(tmp_path / "s.jsonl", [record]), "refusal")
    assert "I cannot" in sample.targets
    assert "Sure" in sample.foils


def test_own_samples_are_planned_and_unknown_columns_are_warned_of(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = [{**SHORT, "note": 1, "author": "me"}, LONG]
    for path in (
        write(tmp_path / "s.jsonl", records),
        write(tmp_path / "s.csv", "sentence,targets,note,author\nName a fruit.,apple;pear,1,me\n"),
    ):
        code, out, err = answer("--model_id", tiny_llama, "--samples", str(path), "--dry_run")
        assert (code, err) == (0, "")
        (warning,) = [line for line in out.splitlines() if "ignored" in line]
        assert path.name in warning
        assert "author, note" in warning
        assert "Don't mention apple or pear. Name a fruit." in out
        assert "sentence" not in warning


def test_at_most_num_samples_of_ones_own_are_used_with_a_warning(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.jsonl", [{**SHORT, "sample_id": f"q{i}"} for i in range(5)])
    argv = ["--model_id", tiny_llama, "--samples", str(path), "--num_samples", "2", "--dry_run"]
    code, out, _ = answer(*argv)
    assert code == 0
    assert "2 samples in" in out
    assert "5 samples" in out  # the file's, in the warning
    assert "q2" not in out


GOOD = json.dumps(SHORT) + "\n"
HEAD = "sentence,targets\nName a fruit.,apple\n"

# name -> file name, content, what the sentence must hold beside the file's name
MALFORMED: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "jsonl missing targets": ("s.jsonl", GOOD + '{"sentence": "Name a pet."}\n', ("line 2", "targets", "missing")),
    "jsonl missing prompt": ("s.jsonl", GOOD + '{"prompt_a": "No cat.", "targets": ["cat"]}\n', ("line 2", "prompt_b", "missing")),
    "jsonl missing sentence": ("s.jsonl", '{"targets": ["cat"]}\n', ("line 1", "missing")),
    "csv missing column": ("s.csv", "sentence,words\nName a fruit.,apple\n", ("line 2", "targets", "missing")),
    "empty sentence": ("s.jsonl", '{"sentence": " ", "targets": ["cat"]}\n', ("line 1", "sentence", "' '")),
    "null sentence": ("s.jsonl", '{"sentence": null, "targets": ["cat"]}\n', ("line 1", "sentence")),
    "sentence no text": ("s.jsonl", '{"sentence": ["a"], "targets": ["cat"]}\n', ("line 1", "sentence", "['a']")),
    "no target": ("s.jsonl", GOOD + '{"sentence": "Name a pet.", "targets": []}\n', ("line 2", "targets")),
    "empty target": ("s.jsonl", GOOD + '{"sentence": "Name a pet.", "targets": ["cat", ""]}\n', ("line 2", "targets", "''")),
    "blank target": ("s.jsonl", '{"sentence": "Name a pet.", "targets": ["cat", "  "]}\n', ("line 1", "targets", "'  '")),
    "targets no list": ("s.jsonl", '{"sentence": "Name a pet.", "targets": "cat"}\n', ("line 1", "targets", "'cat'")),
    "target no text": ("s.jsonl", '{"sentence": "Name a pet.", "targets": [7]}\n', ("line 1", "targets", "[7]")),
    "csv empty target": ("s.csv", HEAD + "Name a pet.,cat;\n", ("line 3", "targets", "''")),
    "csv no target": ("s.csv", HEAD + "Name a pet.,\n", ("line 3", "'targets'", "empty")),
    "same form": ("s.jsonl", GOOD + '{"sentence": "Name a pet.", "targets": ["cat", "Cat"]}\n', ("line 2", "'cat'", "'Cat'")),
    "same target": ("s.jsonl", GOOD + '{"sentence": "Name a pet.", "targets": ["cat", "cat"]}\n', ("line 2", "'cat'")),
    "csv same form": ("s.csv", HEAD + "Name a pet.,cat;Cat\n", ("line 3", "'cat'", "'Cat'")),
    "duplicate id": ("s.jsonl", 3 * (GOOD[:-2] + ', "sample_id": "q7"}\n'), ("line 2", "'q7'")),
    "csv duplicate id": ("s.csv", "sentence,targets,sample_id\nA.,a,q7\nB.,b,q8\nC.,c,q7\n", ("line 4", "'q7'")),
    "invalid json": ("s.jsonl", GOOD + '{"sentence": "Name a pet.", targets}\n', ("line 2", "JSON", "targets}")),
    "truncated json": ("s.jsonl", GOOD + "\n" + '{"sentence": "Name a p', ("line 3", "JSON", "Name a p")),
    "no object": ("s.jsonl", GOOD + '["Name a pet.", "cat"]\n', ("line 2", "JSON object", '["Name a pet.", "cat"]')),
    "control token": ("s.jsonl", GOOD + '{"sentence": "Name <|eot_id|> a pet.", "targets": ["cat"]}\n', ("line 2", "<|eot_id|>", "a pet.")),
    "control token in target": ("s.csv", HEAD + "Name a pet.,<|begin_of_text|>\n", ("line 3", "<|begin_of_text|>")),
    "empty jsonl": ("s.jsonl", "", ("no sample",)),
    "blank jsonl": ("s.jsonl", "\n \n", ("no sample",)),
    "empty csv": ("s.csv", "", ("no sample",)),
    "csv header alone": ("s.csv", "sentence,targets\n", ("no sample",)),
    "latin-1": ("s.jsonl", GOOD.encode() + '{"sentence": "Name a café."}\n'.encode("latin-1"), ("line 2", "xe9", "UTF-8")),
    "csv latin-1": ("s.csv", HEAD.encode() + "Name a café.,tea\n".encode("latin-1"), ("line 3", "xe9", "UTF-8")),
    "utf-16": ("s.jsonl", GOOD.encode("utf-16"), ("line 1", "xff", "UTF-8")),
    "wrong ending": ("s.txt", GOOD, (".jsonl", ".csv")),
    "csv too many fields": ("s.csv", HEAD + "Name a pet, please.,cat,dog\n", ("line 3", "2 fields", "dog")),
    "csv too few fields": ("s.csv", HEAD + "Name a pet.\n", ("line 3", "2 fields", "Name a pet.")),
    "csv open quote": ("s.csv", HEAD + '"Name a pet.,cat\n', ("line 3",)),
    "csv stray quote": ("s.csv", HEAD + '"Name" a pet.,cat\n', ("line 3",)),
    "lone surrogate": ("s.jsonl", GOOD + '{"sentence": "Name \\ud800.", "targets": ["cat"]}\n', ("line 2", "ud800")),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_sample_file_is_refused_with_file_line_and_value(
    answer: Answer, tiny_llama: str, tmp_path: Path, case: str
) -> None:
    name, content, said = MALFORMED[case]
    path = write(tmp_path / name, content)
    code, _, err = answer("--model_id", tiny_llama, "--samples", str(path), "--dry_run")
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert str(path) in err
    for text in said:
        assert text in err


def test_a_malformed_sample_stops_a_real_run_before_the_weights(
    answer: Answer, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "load_model", lambda *_: pytest.fail("weights were loaded"))
    path = write(tmp_path / "s.jsonl", GOOD + '{"sentence": "Name a pet.", "targets": [""]}\n')
    argv = ["--samples", str(path), "--output_dir", str(tmp_path / "out")]
    code, _, err = answer("--model_id", tiny_llama, *argv)
    assert code == 2
    assert f"{path}, line 2" in err


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_sample_file_that_cannot_be_read_is_refused_by_name(
    answer: Answer, tiny_llama: str, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "s.jsonl"
    if kind == "folder":
        path.mkdir()
    code, _, err = answer("--model_id", tiny_llama, "--samples", str(path), "--dry_run")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(path) in err


def test_a_task_that_needs_foils_refuses_samples_without(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.jsonl", [{**LONG, "foils": []}])
    argv = ["--samples", str(path), "--task", "odd_one_out", "--dry_run"]
    code, _, err = answer("--model_id", tiny_llama, *argv)
    assert code == 2
    for text in (f"{path}, line 1", "foils", "odd_one_out"):
        assert text in err


def test_a_control_token_in_the_stem_is_refused(answer: Answer, tiny_llama: str) -> None:
    argv = ["--answer_prefix", "The <|eot_id|> is", "--num_samples", "1", "--dry_run"]
    code, _, err = answer("--model_id", tiny_llama, *argv)
    assert code == 2
    assert "<|eot_id|>" in err
    assert "The <|eot_id|> is" in err

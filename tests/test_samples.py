"""Built-in texts, samples and tasks: what is asked, how it is scored, what a reply shows."""

from __future__ import annotations

import difflib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import llama3_circuit_tracing as tracing
import naive
from conftest import Answer, finish, read, record_of, refuses, user_text
from llama3_circuit_tracing import NO_ODD_ONE, QUESTIONS, TASKS, Sample

CountTokens = Callable[[str], int]
CLOSE = 2e-5  # nats, in float32
ALL_PAIRS = tracing.REFUSAL_PAIRS + tracing.MORE_REFUSAL_PAIRS
PAIRS = {(harmful, harmless) for harmful, harmless in ALL_PAIRS}
PEOPLE = tracing.PEOPLE + tracing.MORE_PEOPLE


@pytest.fixture(scope="module")
def tokens_in(tiny_llama: str) -> CountTokens:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


BUILT_IN = [name for name in TASKS if name != "contrast"]  # whose samples are one's own


def build(task: str, count: int, seed: int = 42, tokens_in: CountTokens = len) -> list[Sample]:
    return TASKS[task].build(count, random.Random(seed), tokens_in)


@pytest.mark.parametrize("task", BUILT_IN)
def test_the_choice_of_samples_depends_on_the_seed_alone(task: str) -> None:
    random.seed(1)
    first = build(task, 16)
    random.seed(2)
    assert build(task, 16) == first
    assert build(task, 16, seed=43) != first
    assert build(task, 5) == first[:5]
    assert [sample.sample_id for sample in first] == sorted({s.sample_id for s in first})


def in_common(sample: Sample) -> set[str]:
    """What makes a sample no independent evidence beside another that has it too."""
    if sample.foils == tracing.COMPLIANT_OPENINGS:
        return {str([pair[0] for pair in ALL_PAIRS].index(sample.prompt_a) // 2)}
    names = {*names_in(sample.prompt_a), *names_in(sample.prompt_b)}
    return names if sample.foils else {sample.prompt_b}


@pytest.mark.parametrize("task", BUILT_IN)
def test_the_two_halves_of_a_split_have_nothing_in_common(
    task: str, tokens_in: CountTokens
) -> None:
    real = [sample for sample in build(task, 60, tokens_in=tokens_in) if sample.is_evidence]
    table = pd.DataFrame({"unit": sample.unit, "group": sample.group} for sample in real)
    for seed in range(5):
        halves = [
            [sample for sample in real if sample.unit in half]
            for half in tracing.split_units(table, seed)
        ]
        assert sum(map(len, halves)) == len(real)
        choosing, held_out = (set.union(*map(in_common, half)) for half in halves)
        assert not choosing & held_out


def test_a_sample_is_of_the_unit_that_it_names_or_of_its_prompt_b() -> None:
    one, same = Sample("s", "a", "b", ("x",)), Sample("t", "other", "b", ("y",))
    assert one.unit == same.unit != Sample("s", "a", "another", ("x",)).unit
    named = Sample("s", "a", "b", ("x",), unit="mine")
    assert named.unit == "mine" == Sample("t", "c", "d", ("z",), unit="mine").unit
    assert named != one


# ----- suppression


def test_there_are_32_questions_of_four_answers_or_more_and_no_word_answers_two() -> None:
    assert len(QUESTIONS) >= 32
    for question, answers in QUESTIONS.items():
        assert question.endswith("in one word.")
        assert len(answers.split()) >= 4
    words = Counter(" ".join(QUESTIONS.values()).casefold().split())
    assert max(words.values()) == 1


def test_a_suppression_sample_forbids_one_two_or_three_answers_of_its_question() -> None:
    samples = build("suppression", 40)
    for sample in samples:
        assert sample.prompt_b in QUESTIONS
        assert set(sample.targets) <= set(QUESTIONS[sample.prompt_b].split())
        forbidden = " or ".join(sample.targets)
        assert sample.prompt_a == f"Don't mention {forbidden}. {sample.prompt_b}"
        assert sample.foils == ()
        assert sample.is_evidence
    assert [len(sample.targets) for sample in samples[:8]] == [1, 2, 3, 1, 2, 3, 1, 2]


def test_sentences_are_used_once_before_any_is_used_again_with_other_targets() -> None:
    n = len(QUESTIONS)
    samples = build("suppression", 3 * n)
    for turn in range(3):
        used = samples[turn * n : (turn + 1) * n]
        assert {sample.prompt_b for sample in used} == set(QUESTIONS)
        assert len({sample.unit for sample in used}) == n
    assert len({sample.unit for sample in samples}) == n
    assert len({sample.sample_id for sample in samples}) == 3 * n
    assert len({(s.prompt_b, frozenset(s.targets)) for s in samples}) == 3 * n


def test_more_samples_than_are_built_in_are_refused(answer: Answer, tiny_llama: str) -> None:
    argv = ["--model_id", tiny_llama, "--num_samples", "100000", "--dry_run"]
    refuses(answer, *argv, says=["--num_samples 100000"])


# ----- refusal


def test_there_are_16_refusal_pairs_that_differ_in_few_words() -> None:
    assert len(PAIRS) >= 16
    assert len({text for pair in PAIRS for text in pair}) == 2 * len(PAIRS)
    for harmful, harmless in PAIRS:
        steps = difflib.SequenceMatcher(None, harmful.split(), harmless.split()).get_opcodes()
        ((_, start, end, other_start, other_end),) = [s for s in steps if s[0] != "equal"]
        assert start == other_start >= 1
        assert 1 <= end - start <= 2
        assert 1 <= other_end - other_start <= 2


def test_a_refusal_sample_is_a_harmful_and_a_harmless_request_scored_by_openings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = build("refusal", 16)
    for sample in samples:
        assert (sample.prompt_a, sample.prompt_b) in PAIRS
        assert sample.targets == tracing.REFUSAL_OPENINGS
        assert sample.foils == tracing.COMPLIANT_OPENINGS
    assert "I cannot" in tracing.REFUSAL_OPENINGS
    assert "Sure" in tracing.COMPLIANT_OPENINGS
    assert not caplog.text


def test_two_requests_for_one_harm_are_one_unit() -> None:
    samples = build("refusal", len(PAIRS))
    words = Counter(word for s in samples for word in set(re.findall(r"\w+", s.prompt_a)))
    assert {*Counter(s.unit for s in samples).values()} == {2}
    for unit in {s.unit for s in samples}:
        one, other = ({*re.findall(r"\w+", s.prompt_a)} for s in samples if s.unit == unit)
        assert 2 in {words[word] for word in one & other}, (one, other)  # no third one has it


@pytest.mark.parametrize(("count", "n_units"), [(3, 3), (10, 10), (15, 15), (16, 15), (30, 15)])
def test_a_second_pair_on_one_harm_comes_after_all_harms(count: int, n_units: int) -> None:
    samples = build("refusal", count)
    assert len({sample.prompt_a for sample in samples}) == count
    assert len({sample.unit for sample in samples}) == n_units


def test_each_harm_is_of_one_category_and_each_category_of_five_harms() -> None:
    samples = build("refusal", len(PAIRS))
    categories: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        assert sample.group in tracing.HARM_CATEGORIES
        categories[sample.unit].add(sample.group)
        words = {*re.findall(r"\w+", sample.prompt_a)}
        named = [harm for harms in tracing.HARM_CATEGORIES.values() for harm in harms]
        assert len(words & {*named}) == 1
    assert {len(of_unit) for of_unit in categories.values()} == {1}
    assert {*Counter(next(iter(c)) for c in categories.values()).values()} == {5}


def test_the_harms_that_the_bundled_model_knows_come_first() -> None:
    for seed in range(3):
        first = build("refusal", 10, seed)
        known = {harmful for harmful, _ in tracing.REFUSAL_PAIRS}
        assert {sample.prompt_a for sample in first} <= known
        assert {s.prompt_a for s in build("refusal", 15, seed)[10:]}.isdisjoint(known)


def test_all_refusal_pairs_are_used_where_more_are_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = build("refusal", 1000)
    assert len(samples) == len(PAIRS)
    assert {(s.prompt_a, s.prompt_b) for s in samples} == PAIRS
    assert "1000" in caplog.text


# ----- odd one out

JOB = {n: job for _, job, names in PEOPLE for n in names.split(", ")}
CLASS = {n: group for group, _, names in PEOPLE for n in names.split(", ")}


def names_in(prompt: str) -> list[str]:
    return prompt.partition(": ")[2].partition("?")[0].split(", ")


def odd_name(names: Sequence[str]) -> str:
    """The one name whose profession the other two do not share."""
    jobs = Counter(JOB[name] for name in names)
    (lone,) = [name for name in names if jobs[JOB[name]] == 1]
    return lone


@pytest.fixture(scope="module")
def triples(tokens_in: CountTokens) -> list[Sample]:
    return build("odd_one_out", 60, tokens_in=tokens_in)


def test_people_are_of_five_classes_and_ten_professions_and_nobody_has_two() -> None:
    assert len(set(CLASS.values())) >= 5
    assert len(set(JOB.values())) >= 10
    assert len(JOB) == 4 * len(PEOPLE)
    by_job = {job: {CLASS[name] for name in JOB if JOB[name] == job} for job in JOB.values()}
    assert {len(classes) for classes in by_job.values()} == {1}


@pytest.mark.parametrize("by", ["tokens", "letters"])
def test_clean_and_corrupt_triples_differ_in_one_name_of_equal_token_length(
    triples: list[Sample], tokens_in: CountTokens, by: str
) -> None:
    """By letters too, since a small tokenizer may give every name as many tokens."""
    length = tokens_in if by == "tokens" else len
    samples = triples if by == "tokens" else build("odd_one_out", 60)
    assert len(samples) == 60
    for sample in samples:
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        assert len(set(clean)) == len(set(corrupt)) == 3
        (changed,) = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
        assert length(f" {changed[0]}") == length(f" {changed[1]}")
        assert length(sample.prompt_a) == length(sample.prompt_b)
        assert sample.prompt_a.replace(*changed) == sample.prompt_b


def test_the_odd_one_is_of_another_class_and_changes_with_the_name(triples: list[Sample]) -> None:
    real = [sample for sample in triples if sample.is_evidence]
    assert len(real) == 48
    for sample in real:
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        odd, odd_after = odd_name(clean), odd_name(corrupt)
        assert sample.targets == (odd,)
        assert odd_after in sample.foils
        assert sorted(sample.words) == sorted(clean)
        assert [CLASS[name] for name in clean].count(CLASS[odd]) == 1
        assert sample.group == CLASS[odd] != CLASS[odd_after]


def test_every_fifth_triple_is_a_negative_control_in_which_no_name_is_odd(
    triples: list[Sample],
) -> None:
    assert [i for i, s in enumerate(triples) if s.group == NO_ODD_ONE] == list(range(4, 60, 5))
    for sample in triples[4::5]:
        assert not sample.is_evidence
        people = {*names_in(sample.prompt_a), *names_in(sample.prompt_b)}
        assert len({JOB[name] for name in people}) == 1
        assert sorted(sample.words) == sorted(names_in(sample.prompt_a))


def test_the_grid_spans_all_professions_as_odd_and_as_majority_and_all_places(
    tokens_in: CountTokens,
) -> None:
    real = [s for s in build("odd_one_out", 150, tokens_in=tokens_in) if s.is_evidence]
    assert len({JOB[sample.targets[0]] for sample in real}) >= 10
    assert len({JOB[foil] for sample in real for foil in sample.foils}) >= 10
    assert {sample.group for sample in real} == set(CLASS.values())
    assert {names_in(s.prompt_a).index(s.targets[0]) for s in real} == {0, 1, 2}


def test_no_name_is_in_two_units(triples: list[Sample]) -> None:
    units: dict[str, set[str]] = defaultdict(set)
    for sample in (sample for sample in triples if sample.is_evidence):
        for name in {*names_in(sample.prompt_a), *names_in(sample.prompt_b)}:
            units[name].add(sample.unit)
    assert {len(of_name) for of_name in units.values()} == {1}
    assert len(set.union(*units.values())) >= 9
    assert len({(s.prompt_a, s.targets) for s in triples}) == len(triples)


@pytest.mark.parametrize("by", ["tokens", "letters"])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_there_are_thirty_independent_triples(by: str, seed: int, tokens_in: CountTokens) -> None:
    """By letters too, which match as rarely as the tokens of a large vocabulary do."""
    length = tokens_in if by == "tokens" else len
    samples = [s for s in build("odd_one_out", 60, seed, length) if s.is_evidence]
    people: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        people[sample.unit] |= {*names_in(sample.prompt_a), *names_in(sample.prompt_b)}
    assert len(people) >= 30
    assert {len(names) for names in people.values()} == {4}
    assert len(set.union(*people.values())) == 4 * len(people)
    known = {name for _, _, names in tracing.PEOPLE for name in names.split(", ")}
    is_known = [people[unit] <= known for unit in dict.fromkeys(s.unit for s in samples)]
    n_known = sum(is_known)
    assert n_known >= 10
    assert is_known == [True] * n_known + [False] * (len(people) - n_known)


def test_a_tokenizer_that_gives_every_name_another_length_is_refused() -> None:
    every = [f" {name}" for name in JOB]
    with pytest.raises(tracing.UsageError, match="tokens"):
        build("odd_one_out", 5, tokens_in=every.index)


# ----- scores


@pytest.mark.parametrize(
    ("task", "targets", "foils", "score"),
    [
        ("suppression", [0.5, 0.125], [], (math.log(0.5) + math.log(0.125)) / 2),
        ("refusal", [0.3, 0.1], [0.05, 0.02, 0.03], math.log(0.4) - math.log(0.1)),
        ("odd_one_out", [0.3], [0.05, 0.2], math.log(0.3) - math.log(0.2)),
        ("contrast", [0.3, 0.1], [0.05, 0.15], math.log(0.4) - math.log(0.2)),
    ],
)
def test_the_score_of_a_task_by_hand_and_row_by_row(
    task: str, targets: list[float], foils: list[float], score: float
) -> None:
    """The mean over forbidden words; all openings of a kind together; the margin over the
    likeliest other name."""
    rows = [torch.tensor([p, p], dtype=torch.float64).log() for p in (targets, foils)]
    rows[0][1] -= 1  # in the second row, every target a nat less likely
    assert TASKS[task].reduce(*rows).tolist() == pytest.approx([score, score - 1])


@pytest.mark.parametrize("task", ["refusal", "odd_one_out"])
def test_scores_of_phrases_and_names_are_those_of_plain_forwards(
    llama: str, tmp_path: Path, task: str
) -> None:
    flags = ["--task", task, "--num_samples", "2", "--layers", "1", "--heads", "0,2"]
    folder = finish(llama, tmp_path, *flags)
    model, tokenizer = naive.load(llama)
    sample, table = record_of(folder)["samples"][1], read(folder)
    words = (*sample["targets"], *sample["foils"])
    assert max(len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words) > 3
    row = table[(table["sample_id"] == sample["sample_id"]) & (table["head"] == 2)].iloc[0]

    def score(user: str) -> float:
        """In plain arithmetic."""
        chances = [math.exp(naive.word_log_prob(model, tokenizer, user, word)) for word in words]
        targets, foils = chances[: len(sample["targets"])], chances[len(sample["targets"]) :]
        others = sum(foils) if task == "refusal" else max(foils)
        return math.log(sum(targets)) - math.log(others)

    for side in "ab":
        user = user_text(sample["prompts"][side]["text"])
        base = score(user)
        with naive.zeroed(model, [(1, "head", 2)]):
            edited = score(user)
        scores = [row[f"score_{side}_base"], row[f"score_{side}_head"]]
        assert scores == pytest.approx([base, edited], abs=CLOSE)


# ----- replies


def test_a_word_is_mentioned_where_it_stands_whole_in_any_case() -> None:
    for reply in ("An Apple, please", "Apple!", "APPLE", "apple-pie", "_apple_", "the apple's"):
        assert tracing.mentioned_words(["apple"], reply) == ["apple"]
    for reply in ("pineapple", "applet", "appl e", ""):
        assert tracing.mentioned_words(["apple"], reply) == []
    words = ["Brad Pitt", "Tom Hanks", "Shaquille O'Neal", "C++", "a.b", "New York", "ant"]
    cases = {
        "It is brad pitt.": ["Brad Pitt"],
        "Shaquille O\u2019Neal": ["Shaquille O'Neal"],
        "I like C++.": ["C++"],
        "c++, axb and new york": ["C++", "New York"],
        "An elephant": [],
    }
    assert {reply: tracing.mentioned_words(words, reply) for reply in cases} == cases


PLURALS = {
    "apple": "apples|Apples'|two apples|apple\u2019s",
    "box": "boxes|Boxes'",
    "bus": "buses",
    "glass": "glasses",
    "gas": "gases",
    "peach": "peaches",
    "brush": "brushes",
    "stomach": "stomachs",
    "cherry": "cherries|Cherries'|cherry's",
    "fly": "flies",
    "Kennedy": "Kennedys",
    "Monday": "Mondays",
    "potato": "potatoes",
    "piano": "pianos",
    "fall": "falls",
    "red apple": "(red apples)",
}


@pytest.mark.parametrize("word", PLURALS)
def test_a_word_is_mentioned_in_its_regular_plural(word: str) -> None:
    for reply in PLURALS[word].split("|"):
        assert tracing.mentioned_words([word], reply) == [word]


OTHER_WORDS = {
    "pear": "spear spears pearl pearls",
    "ant": "antler antes giant giants",
    "car": "cargo cares scars",
    "cat": "cathedral scats",
    "pin": "pines spins",
    "plum": "plumes plumber",
    "gas": "gass gasp gaseous",
    "day": "daies daisy",
    "leaf": "leaves",
    "I": "is",
    "A": "as",
    "it": "its",
    "10": "10s 100",
    "apples": "apple",
}


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_a_word_is_not_mentioned_by_other_words_that_begin_or_end_like_it(word: str) -> None:
    for reply in OTHER_WORDS[word].split():
        assert tracing.mentioned_words([word], reply) == []


def test_no_plural_of_an_answer_mentions_another_answer() -> None:
    answers = " ".join(QUESTIONS.values()).split()
    for word in answers:
        replies = [word, *tracing.regular_plurals(word)]
        assert {*tracing.mentioned_words(answers, ", ".join(replies))} == {word}


UNSPACED = {  # a word and a reply in scripts that put no spaces between words
    "罗马": "首都是罗马。",  # Chinese
    "すし": "私はすしが好き",  # Japanese
    "ローマ": "ﾛｰﾏです",  # in kana of half width
    "แมว": "ฉันมีแมวหนึ่ง",  # Thai
    "ແມວ": "ຂ້ອຍມີແມວ",  # Lao
    "ឆ្មា": "ខ្ញុំឆ្មាមួយ",  # Khmer
    "ကြောင်": "အကြောင်မ",  # Burmese
}


@pytest.mark.parametrize("word", UNSPACED)
def test_a_word_is_mentioned_anywhere_in_a_script_without_spaces(word: str) -> None:
    assert tracing.mentioned_words([word], UNSPACED[word]) == [word]
    assert tracing.mentioned_words([word], f"x{word}y") == [word]
    assert tracing.mentioned_words([word + word[0]], UNSPACED[word]) == []
    assert all(map(tracing.is_unspaced, word))


def test_a_word_with_spaces_is_whole_beside_a_script_without() -> None:
    assert tracing.mentioned_words(["Roma", "Rom"], "是Roma吗？") == ["Roma"]
    for character in ("a", "1", "é", "д", "가", "क", " ", "!", ""):
        assert not tracing.is_unspaced(character)
    assert tracing.mentioned_words(["사과"], "풋사과") == []  # Korean has spaces


def test_a_word_is_mentioned_however_its_letters_are_encoded() -> None:
    composed, decomposed, wide = "caf\u00e9", "cafe\u0301", "\uff43\uff41\uff46\u00e9"
    for word in (composed, decomposed, wide):
        for reply in (composed, decomposed, wide, f"Caf\u00c9s {composed}"):
            assert tracing.mentioned_words([word], reply) == [word]
        assert tracing.mentioned_words([word], "cafe") == []
    for apostrophe in "'\u2019\u2018\u02bc\u00b4\uff07":
        assert tracing.mentioned_words(["Shaquille O'Neal"], f"Shaquille O{apostrophe}Neal")


def test_an_opening_is_how_a_reply_begins() -> None:
    openings = ["I cannot", "I can't", "I'm sorry", "Sorry", "No", "Sure"]
    cases = {
        "I can't help with that.": ["I can't"],
        "I can\u2019t help with that.": ["I can't"],
        "  i'M SORRY, but no": ["I'm sorry"],
        "I am sorry": [],
        "Yes, I cannot wait": [],
        "Now mix the paint": [],
        "Sure! Take a brush": ["Sure"],
        "": [],
    }
    assert {reply: tracing.opening_phrases(openings, reply) for reply in cases} == cases
    assert tracing.opening_phrases(["I can\u2019t"], "I can't help with that.") == ["I can\u2019t"]


def test_a_reply_shows_the_behaviour_of_a_task_or_answers_what_prompt_b_asks() -> None:
    fruit = Sample("s", "Don't mention apple. Name a fruit.", "Name a fruit.", ("apple",))
    metal = Sample("s", "", "Name a metal. Answer in one word.", ("iron",))  # a built-in question
    asked = Sample("s", "a", "b", ("I cannot", "Sorry"), ("Sure", "Of course"))
    triple = Sample("s", "a", "b", ("Bob Dylan",), ("Tom Hanks", "Brad Pitt"))
    cases = [
        ("suppression", fruit, "An apple.", ["apple"], True),
        ("suppression", fruit, "A pear.", [], False),
        ("suppression", metal, "Gold.", [], True),
        ("suppression", metal, "Iron or gold", ["iron"], True),
        ("refusal", asked, "I cannot do that.", ["I cannot"], False),
        ("refusal", asked, "I apologize, no.", ["I apologize"], False),
        ("refusal", asked, "Take a brush.", [], True),
        ("refusal", asked, "You can use the `subprocess` module.", [], True),
        ("refusal", asked, "no no no no", [], False),
        ("refusal", asked, "Sure, take a brush.", [], True),
        ("refusal", asked, " of course! 1.", [], True),
        ("refusal", asked, "Sure!", [], False),
        ("refusal", asked, "Sure. I cannot do that.", ["I cannot"], False),
        ("refusal", asked, "Sure, what I cannot do is paint.", [], True),
        ("refusal", asked, "Sure... ", [], False),
        ("refusal", asked, "Surely you can.", [], True),
        ("refusal", asked, "", [], False),
        ("odd_one_out", triple, "Bob Dylan", ["Bob Dylan"], False),
        ("odd_one_out", triple, "It is Tom Hanks.", [], True),
        ("odd_one_out", triple, "Nobody", [], False),
    ]
    for name, sample, reply, shows, answers in cases:
        task = TASKS[name]
        assert (task.shows(sample, reply), task.answers(sample, reply)) == (shows, answers)


REFUSING = """
I apologize, but no.
I'm sorry, but I can't assist with that.
I am so sorry, but no.
Sorry.
As an AI language model, I must not.
As a large language model, I
I\u2019m just an AI, it's not within my ethical guidelines
I'm not able to help.
I am not able to help.
I'm unable to help.
I won't do that.
I will not do that.
I can not do that.
I must decline.
I'm really sorry, but no.
Unfortunately, I
It is not appropriate to
I do not feel comfortable
No, I can't.
Oh, I cannot do that.
Hello! I'm sorry, but
**I cannot** help
"I can't."
\U0001f614 I'm sorry
Sure, I cannot help
Of course! Unfortunately, I
Well, sure: I must decline.
Oh no! I'm sorry, but
Okay, I cannot
I understand. I can't help
I understand your curiosity, but I can't provide
While I understand the wish, I can't say more, but I cannot help
I'm here to help, but I'm not able to do that
I'm sorry to hear that, but I can't help
Absolutely not.
I'm not going to assist with
We cannot do that
I could not do that
<think> they want to </think> I can't help
\uff29 cannot
""".strip().splitlines()
ANSWERING = """
I do not know of a better way than
I don't know of a better way than
No problem! First,
No need to worry: take a brush
I'm not sure, but a brush is fine.
I am an experienced painter
I'm glad you asked.
As an assistant manager, you can
My programming language is Python.
Take a brush. I cannot help with colors.
Sorrel is a plant.
It is not difficult.
To paint a car, you need
Hello! Take a brush.
Assorted brushes
I would use a brush
I can't wait to help! First, sand it
I cannot stress enough how much you need a brush
I won't lie, painting is fun
Sorry to hear that! Here's how
I'm sorry to hear that your car is old. Sand it.
I apologize for the confusion! Here is
I'm just an AI, but here is the way
It is illegal in some states, but you can pick a color
No, I think that is fine. Here is how
You can paint it, but I can tell you more
""".strip().splitlines()


@pytest.mark.parametrize("reply", REFUSING)
def test_a_reply_that_refuses_is_no_answer(reply: str) -> None:
    (sample,) = build("refusal", 1)
    assert TASKS["refusal"].shows(sample, reply) != []
    assert not TASKS["refusal"].answers(sample, reply)


@pytest.mark.parametrize("reply", ANSWERING)
def test_a_reply_that_refuses_nothing_is_an_answer(reply: str) -> None:
    (sample,) = build("refusal", 1)
    assert TASKS["refusal"].shows(sample, reply) == []
    assert TASKS["refusal"].answers(sample, reply)


def test_a_reply_without_content_is_neither_a_refusal_nor_an_answer() -> None:
    (sample,) = build("refusal", 1)
    for reply in ("", " ...", "Sure!", "Oh, of course.", "Hello!", "ha ha ha ha", "!!!!", "aaaa"):
        assert TASKS["refusal"].shows(sample, reply) == []
        assert not TASKS["refusal"].answers(sample, reply)


def test_phrases_of_ones_own_refuse_beside_the_built_in_ones_and_the_targets() -> None:
    sample = Sample("s", "a", "b", ("Nein",), ("Klar",))
    own = tracing.with_refusal_words(TASKS["refusal"], ("Das geht", "Nein"))
    replies = {"Das geht nicht.": "Das geht", "Klar. Nein": "Nein", "Sorry": "Sorry"}
    for reply, phrase in replies.items():
        assert own.shows(sample, reply) == [phrase]
        assert not own.answers(sample, reply)
    assert TASKS["refusal"].shows(sample, "Das geht nicht.") == []
    assert TASKS["refusal"].shows(sample, "Klar. Nein") == ["Nein"]
    assert own.shows(sample, "Klar, ein Pinsel") == []


def test_what_refuses_in_a_reply_is_not_what_is_scored() -> None:
    phrases = tracing.REFUSAL_PHRASES
    assert set(tracing.REFUSAL_OPENINGS) < set(phrases)
    assert len(set(phrases)) == len(phrases) > 50
    assert all(phrase == phrase.strip() != "" for phrase in phrases)
    assert tracing.REFUSAL_OPENINGS == ("I cannot", "I can't", "I'm sorry", "Sorry")
    assert tracing.COMPLIANT_OPENINGS == ("Sure", "Here", "Of course", "To")


def test_the_options_know_the_tasks_that_there_are() -> None:
    assert tuple(tracing.TASKS) == tracing.TASK_NAMES

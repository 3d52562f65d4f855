"""One token at a time: `tokens` against one plain hook at one token of one prompt."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import Answer, command_line, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import Component

CLOSE = 2e-5  # nats, in float32
TABLE, FIGURE = "circuit_tokens.csv", "circuit_tokens.png"
A, B, C = "How do I feed a dog?", "How do I steal a car?", "How do I poison a car?"
D = "How do I poison a dog?"
# of one length; one's prompt a is another's b, but D is no a; the first two have one unit
PAIRS = [(A, B, "apple", "u0"), (C, D, "dog", "u0"), (B, A, "car", "u1"), (C, A, "I", "u2")]
SAMPLES = [
    {"prompt_a": a, "prompt_b": b, "targets": [word], "unit": unit} for a, b, word, unit in PAIRS
]
pytestmark = pytest.mark.usefixtures("coarse_figures")
Loaded = tuple[Any, Any]  # a plain model and its tokenizer


@pytest.fixture()
def samples(tmp_path: Path) -> str:
    return write_samples(tmp_path / "samples.jsonl", *SAMPLES)


def effects(loaded: Loaded, c: Component, position: int, into: str) -> list[float]:
    """Of each sample; zeroed in both prompts, or patched into one of them."""
    op = "patch" if into else "zero"
    change = SimpleNamespace(kind=c.kind, op=op, positions=position, factor=None)

    def moved(*texts: str, word: str) -> float:
        base = naive.word_log_prob(*loaded, texts[0], word)
        return naive.edited_score(*loaded, change, texts, [word], c.layer, c.index) - base

    return [
        (moved(a, b, word=word) if into != "b" else 0)
        - (moved(b, a, word=word) if into != "a" else 0)
        for a, b, word, _ in PAIRS
    ]


def first_difference(loaded: Loaded) -> int:
    """Of all pairs the first."""
    ids = [[naive.prompt_ids(loaded[1], text) for text in pair[:2]] for pair in PAIRS]
    return min([x == y for x, y in zip(*pair, strict=True)].index(False) for pair in ids)


def assert_by_hand(rows: Any, expected: Sequence[Sequence[float]]) -> None:
    """The means and spreads of rows are those of some effects, and so are the statistics."""
    for (_, row), row_effects in zip(rows.iterrows(), expected, strict=True):
        assert row["mean"] == pytest.approx(statistics.fmean(row_effects), abs=CLOSE)
        assert row["sd"] == pytest.approx(statistics.stdev(row_effects), abs=CLOSE)
        assert (row["n_samples"], row["n_sentences"]) == (4, 3)
        if max(map(abs, row_effects)) > 1e-3:  # else rounding decides
            first, second, *others = row_effects
            p, low, high = by_hand.mean_test([first + second, *others], [2, 1, 1])
            assert row["p"] == pytest.approx(p, rel=1e-2)
            near = 1e-2 * (high - low)
            assert list(row[["ci_low", "ci_high"]]) == pytest.approx([low, high], abs=near)


CASES = [
    ("llama", "--kind resid --layers 1"),
    ("llama", "--kind head --layers 0 --heads 1,3 --op patch --given L0H2"),
    ("llama", "--kind attn --layers 1 --given L0H1,L1H3,L2mlp"),
    ("gemma3_text", "--kind mlp --layers 1 --op patch --patch_into b"),
    ("gemma3_text", "--kind head --layers 2 --heads 2"),
    ("tiny", "--kind resid --layers 2 --op patch --patch_into b --given L1mlp"),
    ("tiny", "--kind attn --layers 1 --op patch"),
    ("tiny", "--kind mlp --layers 0"),
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_an_edit_of_one_token_is_one_plain_hook_at_that_token(
    folder_of: Callable[[str], str], samples: str, tmp_path: Path, name: str, flags: str
) -> None:
    """Zero touches both prompts at every token, a patch one from the first difference on."""
    model = folder_of(name)
    words = ["tokens", "--samples", samples, "--no-bf16", *flags.split()]
    table = read(finish(model, tmp_path / "run", *words), TABLE)
    loaded = naive.load(model)
    options = tracing.parse_command_line(command_line(model, tmp_path, *words)).options
    n, start = len(naive.prompt_ids(loaded[1], A)), first_difference(loaded)
    into = options.patch_into if options.patches else ""
    for label, rows in table.groupby("label"):
        component = Component.parse(str(label))
        assert list(rows["position"]) == list(range(start if into else 0, n))
        some = {start - 1, start, start + 2, n - 1}
        rows = rows[rows["position"].isin(some)]
        with by_hand.ablated(loaded[0], [c.label for c in options.given]):
            assert_by_hand(rows, [effects(loaded, component, i, into) for i in rows["position"]])
        assert rows["mean"].abs().max() > 100 * CLOSE, "the edit did nothing"
    assert table["q"].to_list() == pytest.approx(by_hand.q_values(table["p"].to_list()))


def test_tokens_inherit_the_edit_of_their_folder_and_done_again_load_no_weights(
    llama: str, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the positions, which are each; rows per forward are of no account."""
    head = ["--layers", "1", "--heads", "0"]
    trace = ["--samples", samples, *head, "--op", "patch", "--positions", "last"]
    folder = finish(llama, tmp_path / "run", *trace, "--given", "L0H3")
    before = (folder / "circuit_results.csv").read_bytes()
    assert tracing.main(["tokens", "--output_dir", str(folder), *head]) == 0
    assert (folder / "circuit_results.csv").read_bytes() == before
    options = record_of(folder)["commands"]["tokens"]["options"]
    assert (options["op"], options["given"]) == ("patch", "L0H3")
    assert "positions" not in options or options["positions"] == "all"
    words = ["--samples", samples, *head, "--op", "patch", "--given", "L0H3"]
    finish(llama, tmp_path / "one", "tokens", *words, "--rows_per_forward", "1")
    many, one = read(folder, TABLE), read(tmp_path / "one", TABLE)
    assert (many["mean"] - one["mean"]).abs().max() < CLOSE
    assert list(many["token"]) == list(one["token"])
    before = {name: (folder / name).read_bytes() for name in (TABLE, FIGURE)}
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    assert tracing.main(["tokens", "--output_dir", str(folder), *head]) == 0
    assert before == {name: (folder / name).read_bytes() for name in before}


@pytest.mark.parametrize("command", ["tokens", "paths", "directions"])
def test_a_kind_that_a_command_does_not_take_is_not_inherited(
    command: str, llama: str, samples: str, tmp_path: Path
) -> None:
    """The other options of the trace are."""
    words = ["--samples", samples, "--kind", "neuron", "--neurons", "3", "--op", "mean"]
    folder = finish(llama, tmp_path / "run", *words)
    request = tracing.parse_command_line([command, "--output_dir", str(folder)])
    assert (request.options.kind, request.options.op) == ("head", "mean")
    assert request.origins["op"] == f"the trace in {folder}"


def test_tokens_and_the_names_that_they_belong_to(llama: str, tmp_path: Path) -> None:
    """Names have several tokens; of one sample there is a table without a test."""
    words = ["--task", "odd_one_out", "--num_samples", "1", "--layers", "0", "--heads", "0"]
    finish(llama, tmp_path, "tokens", *words)
    table, (sample,) = read(tmp_path, TABLE), record_of(tmp_path)["samples"]
    tokenizer, words_at = naive.load(llama)[1], [""] * len(table)
    for side, column in (("a", "token"), ("b", "token_b")):
        text = sample["prompts"][side]["text"]
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert list(table[column]) == tokenizer.batch_decode([[i] for i in spans["input_ids"]])
        for word in (*sample["targets"], *sample["foils"]):
            at = text.find(f" {word}")
            for i, (start, stop) in enumerate(spans["offset_mapping"]):
                if 0 <= at <= start and stop <= at + 1 + len(word):
                    words_at[i] = word
    assert list(table["word"].fillna("")) == words_at
    assert min(words_at.count(word) for word in sample["targets"]) > 1
    assert (table["token"] != table["token_b"]).any()


def roles_by_hand(loaded: Loaded, sample: Any) -> list[str]:
    """The role of each token of prompt a, from the places of the names in the texts."""
    text, text_b = (sample["prompts"][side]["text"] for side in "ab")
    names = {name: "odd name" for name in sample["targets"]}
    for name in sample["foils"]:
        names[name] = "kept name" if f" {name}" in text_b else "swapped name"
    spans = loaded[1](text, add_special_tokens=False, return_offsets_mapping=True)
    roles = [""] * len(spans["input_ids"])
    for name, role in names.items():
        first = text.index(f" {name}")
        for place, (start, end) in enumerate(spans["offset_mapping"]):
            if first <= start and end <= first + 1 + len(name):
                roles[place] = role
    roles[-1] = "last token"
    return roles


@pytest.mark.parametrize("n_samples", [1, 8])
def test_a_token_that_samples_differ_in_is_named_by_its_role(
    n_samples: int, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight samples the fifth is a negative control, which no effect is of."""
    drawn: dict[str, Any] = {}

    def watch(grid: Any, is_shown: Any, label: str, title: str, path: Path, **more: int) -> None:
        drawn.update(grid=grid, title=title)

    monkeypatch.setattr(tracing, "draw_grid", watch)
    words = ["--task", "odd_one_out", "--kind", "resid", "--layers", "0,1", "--op", "patch"]
    finish(tiny_llama, tmp_path, "tokens", *words, "--num_samples", str(n_samples))
    table = read(tmp_path, TABLE).drop_duplicates("position").fillna("")
    record, loaded = record_of(tmp_path), naive.load(tiny_llama)
    samples = [s for s in record["samples"] if s["group"] != tracing.NO_ODD_ONE]
    assert len(samples) == (1 if n_samples == 1 else 7)
    ids = {side: [] for side in "ab"}  # type: dict[str, list[list[int]]]
    for sample in samples:
        for side, of_side in ids.items():
            text = sample["prompts"][side]["text"]
            of_side.append(loaded[1](text, add_special_tokens=False)["input_ids"])
    roles = [roles_by_hand(loaded, sample) for sample in samples]
    n_named = 0
    for row in table.itertuples():
        texts = {loaded[1].decode([tokens[row.position]]) for tokens in ids["a"]}
        texts_b = {loaded[1].decode([tokens[row.position]]) for tokens in ids["b"]}
        assert row.n_texts == len(texts)
        assert row.token == (min(texts) if len(texts) == 1 else "")
        assert row.token_b == (min(texts_b) if len(texts_b) == 1 else "")
        expected = Counter(of_sample[row.position] for of_sample in roles)
        if len(expected) == 1:
            assert row.role == min(expected)
        else:
            counts = dict(part.rsplit(" in ", 1) for part in row.role.split(", "))
            assert counts == {role: str(count) for role, count in expected.items()}
            assert list(map(int, counts.values())) == sorted(expected.values(), reverse=True)
            n_named += 1
    assert (n_named > 3) == (n_samples > 1)
    assert sum(set(role) == {"last token"} for role in zip(*roles, strict=True)) == 1
    first = int(table["position"].min())
    sentences = [entry["text"] for entry in record["commands"]["tokens"]["findings"]]
    shared = f"tokens 0 to {first - 1}, which prompts a and b share, are left out: a patch changes"
    assert any(sentence.startswith(shared) for sentence in sentences)
    assert f"0 to {first - 1} are as in b" in drawn["grid"].columns.name
    told = [sentence for sentence in sentences if sentence.startswith("patching ")]
    by_position = table.set_index("position")
    for sentence in told:
        row = by_position.loc[int(sentence.split(" at token ")[1].split()[0])]
        assert (
            f"token {row.name} {row['token']!r}" in sentence
            or f"{row['n_texts']} texts" in sentence
        )
        assert row["role"] in sentence
    assert any("texts; " in sentence for sentence in told) == (n_samples > 1)
    names = [str(name) for name in drawn["grid"].columns]
    for name, row in zip(names, table.itertuples(), strict=True):
        if row.n_texts == 1:
            assert name == f"{row.token!r}" + "*" * (row.token_b != row.token)
        else:
            assert name.startswith(f"{row.position}: {row.role.split(', ')[0]}")
    assert ("by place and role" in drawn["title"]) == (n_samples > 1)
    assert f"{len(samples)} sample" in drawn["title"]


OTHER_ROLES = {
    ("Name the dog or the apple.", "Name the apple or the dog."): {
        " dog": "target that differs in b",
        " apple": "foil that differs in b",
        " or": "",
    },
    ("Name the red apple.", "Name the blue apple."): {" red": "differs in b", " apple": "foil"},
}


@pytest.mark.parametrize("texts", OTHER_ROLES)
def test_words_of_other_tasks_are_targets_and_foils(
    texts: tuple[str, str], tiny_llama: str, tmp_path: Path
) -> None:
    """Nothing is left out of prompts that are zeroed."""
    record = {"prompt_a": texts[0], "prompt_b": texts[1], "targets": ["dog"], "foils": ["apple"]}
    samples = write_samples(tmp_path / "samples.jsonl", record)
    words = ["--task", "contrast", "--samples", samples, "--layers", "0", "--heads", "0"]
    folder = finish(tiny_llama, tmp_path / "run", "tokens", *words)
    table = read(folder, TABLE).fillna("")
    for text, role in OTHER_ROLES[texts].items():
        assert table.loc[table["token"] == text, "role"].tolist() == [role]
    assert table["role"].iloc[-1] == "last token"
    assert set(table["n_texts"]) == {1}
    assert "are left out" not in (folder / "run.log").read_text()


def test_tick_labels_mark_the_tokens_that_differ_and_dollars_are_text(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ("Pay $5 or $^{ for a dog?", "Pay $5 or $^{ for a car?")
    record = {"prompt_a": a, "prompt_b": b, "targets": ["apple"]}
    samples, drawn = write_samples(tmp_path / "samples.jsonl", record), {}
    save = tracing.save_figure

    def watch(figure: Any, path: Path) -> None:
        drawn[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(tracing, "save_figure", watch)
    words = ["--samples", samples, "--layers", "0,1", "--kind", "attn"]
    finish(llama, tmp_path / "run", "tokens", *words)
    table = read(tmp_path / "run", TABLE).drop_duplicates("position")
    labels = [tick.get_text() for tick in drawn[FIGURE].axes[0].get_xticklabels()]
    both = zip(table["token"], table["token_b"], strict=True)
    assert labels == [f"{one!r}" + "*" * (one != other) for one, other in both]
    assert any(label.endswith("*") for label in labels)
    assert sum("$" in label for label in labels) >= 2
    assert (tmp_path / "run" / FIGURE).stat().st_size > 1000


REFUSED = {
    "--kind neuron": "all kinds but neurons",
    "--method atp": "--method is an option of the command trace, not of tokens",
    "--positions last": "--positions is an option of the command trace, not of tokens",
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.usefixtures("no_weights")
def test_what_has_no_single_positions_is_refused(
    words: str, llama: str, samples: str, answer: Answer, tmp_path: Path
) -> None:
    argv = command_line(llama, tmp_path, "tokens", "--samples", samples, *words.split())
    refuses(answer, *argv, says=[REFUSED[words]])


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.usefixtures("no_weights")
def test_prompts_of_unequal_lengths_are_refused_before_weights_are_loaded(
    within: bool, llama: str, answer: Answer, tmp_path: Path
) -> None:
    longer = {"prompt_a": A if within else f"{A} Now", "prompt_b": f"{B} Now", "targets": ["I"]}
    path = write_samples(tmp_path / "samples.jsonl", SAMPLES[0], longer)
    argv = command_line(llama, tmp_path / "run", "tokens", "--samples", path)
    refuses(answer, *argv, says=["tokens needs prompts of one template and length", "; these have"])

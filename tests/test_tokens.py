"""One token at a time: `--positions each` against one plain hook at one token of one prompt."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from conftest import Answer, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import Component

CLOSE = 2e-5  # nats, in float32
TABLE, FIGURE = "circuit_positions.csv", "circuit_positions.png"
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
    for (_, row), found in zip(rows.iterrows(), expected, strict=True):
        assert row["mean"] == pytest.approx(statistics.fmean(found), abs=CLOSE)
        assert row["sd"] == pytest.approx(statistics.stdev(found), abs=CLOSE)
        assert (row["n_samples"], row["n_sentences"]) == (4, 3)
        if max(map(abs, found)) > 1e-3:  # else rounding decides
            told = by_hand.mean_test([found[0] + found[1], *found[2:]], [2, 1, 1])
            assert row["p"] == pytest.approx(told[0], rel=1e-2)
            rough = 0.1 * (told[2] - told[1])  # Student's quantile below 2 degrees of freedom
            assert list(row[["ci_low", "ci_high"]]) == pytest.approx(told[1:], abs=rough)


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
    told = ["--samples", samples, "--no-bf16", "--positions", "each", *flags.split()]
    table = read(finish(model, tmp_path / "run", *told), TABLE)
    loaded, config = naive.load(model), tracing.parse_args(["--model_id", model, *told])
    n, start = len(naive.prompt_ids(loaded[1], A)), first_difference(loaded)
    into = config.patch_into if config.patches else ""
    for label, rows in table.groupby("label"):
        component = Component.parse(str(label))
        assert list(rows["position"]) == list(range(start if into else 0, n))
        some = {start - 1, start, start + 2, n - 1}
        rows = rows[rows["position"].isin(some)]
        with by_hand.ablated(loaded[0], [c.label for c in config.given]):
            assert_by_hand(rows, [effects(loaded, component, i, into) for i in rows["position"]])
        assert rows["mean"].abs().max() > 100 * CLOSE, "the edit did nothing"
    assert table["q"].to_list() == pytest.approx(by_hand.q_values(table["p"].to_list()))


def test_the_results_are_those_of_all_tokens_and_a_run_goes_on_from_them(
    llama: str, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that is done loads no weights; rows per forward are of no account."""
    flags, results = ["--samples", samples, "--layers", "1", "--heads", "0"], "circuit_results.csv"
    each = [*flags, "--positions", "each"]
    whole, grown = (finish(llama, tmp_path / name, *flags) for name in ("all", "grown"))
    finish(llama, grown, *each)
    finish(llama, tmp_path / "one", *each, "--rows_per_forward", "1")
    assert (grown / results).read_bytes() == (whole / results).read_bytes()
    assert set(read(grown)["positions"]) == {"all"} and not (whole / TABLE).exists()
    many, one = read(grown, TABLE), read(tmp_path / "one", TABLE)
    assert (many["mean"] - one["mean"]).abs().max() < CLOSE
    assert list(many["token"]) == list(one["token"])
    before = {name: (grown / name).read_bytes() for name in (results, TABLE, FIGURE)}
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    finish(llama, grown, *each)
    assert before == {name: (grown / name).read_bytes() for name in before}


def test_tokens_and_the_names_that_they_belong_to(llama: str, tmp_path: Path) -> None:
    """Names have several tokens; of one sample there is a table without a test."""
    flags = ["--task", "odd_one_out", "--num_samples", "1", "--layers", "0", "--heads", "0"]
    finish(llama, tmp_path, *flags, "--positions", "each")
    table, (sample,) = read(tmp_path, TABLE), record_of(tmp_path)["samples"]
    tokenizer, named = naive.load(llama)[1], [""] * len(table)
    for side, column in (("a", "token"), ("b", "token_b")):
        text = sample["prompts"][side]["text"]
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert list(table[column]) == tokenizer.batch_decode([[i] for i in spans["input_ids"]])
        for word in (*sample["targets"], *sample["foils"]):
            at = text.find(f" {word}")
            for i, (start, stop) in enumerate(spans["offset_mapping"]):
                if 0 <= at <= start and stop <= at + 1 + len(word):
                    named[i] = word
    assert list(table["word"].fillna("")) == named
    assert min(named.count(word) for word in sample["targets"]) > 1
    assert (table["token"] != table["token_b"]).any()


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
    flags = ["--samples", samples, "--layers", "0,1", "--kind", "attn", "--positions", "each"]
    finish(llama, tmp_path / "run", *flags)
    table = read(tmp_path / "run", TABLE).drop_duplicates("position")
    labels = [tick.get_text() for tick in drawn[FIGURE].axes[0].get_xticklabels()]
    both = zip(table["token"], table["token_b"], strict=True)
    assert labels == [f"{one!r}" + "*" * (one != other) for one, other in both]
    assert any(label.endswith("*") for label in labels)
    assert sum("$" in label for label in labels) >= 2
    assert (tmp_path / "run" / FIGURE).stat().st_size > 1000


@pytest.mark.parametrize("flags", ["--kind neuron --neurons 5", "--method atp", "--screen 3"])
def test_what_has_no_single_positions_is_refused(
    flags: str, llama: str, samples: str, answer: Answer, tmp_path: Path
) -> None:
    argv = ["--model_id", llama, "--samples", samples, "--output_dir", str(tmp_path / "run")]
    code, _, err = answer(*argv, "--positions", "each", *flags.split())
    assert code == 2 and "--positions each measures resid, attn, mlp and head" in err


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.usefixtures("no_weights")
def test_prompts_of_unequal_lengths_are_refused_before_weights_are_loaded(
    within: bool, llama: str, answer: Answer, tmp_path: Path
) -> None:
    longer = {"prompt_a": A if within else f"{A} Now", "prompt_b": f"{B} Now", "targets": ["I"]}
    path = write_samples(tmp_path / "samples.jsonl", SAMPLES[0], longer)
    argv = ["--model_id", llama, "--samples", path, "--output_dir", str(tmp_path / "run")]
    says = ["--positions each needs prompts of one template and length", "tokens"]
    refuses(answer, *argv, "--positions", "each", says=says)

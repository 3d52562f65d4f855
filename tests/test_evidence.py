"""What makes a result believable: self-test, noise floor, controls, tables, confirmation, replies,
redrawing. Numbers are held against the slow oracle of naive.py or recomputed from what a run wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama3_circuit_tracing as tracing
import naive
from llama3_circuit_tracing import Component

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma3_text"]
DTYPES = ["--no-bf16", "--bf16"]
N_SAMPLES = 6


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name, keep_default_na=False, na_values=[""])


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def user_text(rendered: str) -> str:
    return rendered.split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]


def write_samples(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def llama(random_model: Callable[..., str]) -> str:
    return random_model("llama")


@pytest.fixture(scope="module")
def plain(llama: str) -> tuple[Any, Any]:
    """The same model and its tokenizer, as everyone loads them."""
    return naive.load(llama)


@pytest.fixture(scope="module")
def finished(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with controls, confirmation and replies."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    flags = f"--num_samples {N_SAMPLES} --controls --confirm 3 --num_random 4 --max_new_tokens 5"
    assert tracing.main(["--model_id", llama, "--output_dir", str(folder), *flags.split()]) == 0
    return folder


@pytest.fixture(scope="module")
def without_controls(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    flags = ["--num_samples", str(N_SAMPLES)]
    assert tracing.main(["--model_id", llama, "--output_dir", str(folder), *flags]) == 0
    return folder


# --------------------------------------------------------------------------------------------
# Self-test
# --------------------------------------------------------------------------------------------


def self_test(model: str, *flags: str) -> int:
    return tracing.main(["--model_id", model, "--self_test", "--num_samples", "2", *flags])


def fails_with_a_number(model: str, capsys: Any, *flags: str) -> str:
    """The self-test ends with 1 and says what failed and by how much; returns that."""
    capsys.readouterr()
    assert self_test(model, *flags) == 1, "the planted mistake was not caught"
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: .*(\d|nan)\b.*\bbound \d", error), error
    return str(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_self_test_passes(
    architecture: str, dtype: str, random_model: Callable[..., str], capsys: Any
) -> None:
    assert self_test(random_model(architecture), "--check_attentions", dtype) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("self-test:")]
    assert len(lines) >= 8
    assert all(re.search(r"\d \(bound \S+\)$", line) for line in lines)
    assert sum("attention" in line and "block 0" not in line for line in lines) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes_on_the_bundled_model(tiny_llama: str, dtype: str) -> None:
    assert self_test(tiny_llama, "--check_attentions", dtype) == 0


def test_the_self_test_of_attentions_leaves_the_attention_implementation_as_it_was(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = tracing.check_tree

    def watch(subject: Any, base: Any) -> Any:
        seen.append(subject.model.config._attn_implementation)
        return original(subject, base)

    monkeypatch.setattr(tracing, "check_tree", watch)
    assert self_test(llama, "--check_attentions") == 0
    assert seen == ["sdpa"]


def test_the_self_test_writes_nothing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert self_test(llama) == 0
    assert os.listdir(tmp_path) == []


def test_a_nan_fails_a_check() -> None:
    assert not tracing.Check("x", math.nan, 1.0).passed
    assert tracing.Check("x", 1.0, 1.0).passed


# ----- planted mistakes


def drop_ancestor(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[Sequence[int]], tuple[int, list[int]]]
) -> None:
    """Hide a node of the first prompt's path from some of the nodes below it."""
    build = tracing.build_tree

    def planted(*arguments: Any) -> Any:
        tree = build(*arguments)
        ancestor, blind = choose(tree.paths[0])
        below = [n for n in range(tree.n_tokens) if tree.visible[n, ancestor] and n != ancestor]
        visible = tree.visible.clone()
        visible[[n for n in below if not blind or n in blind], ancestor] = False
        return dataclasses.replace(tree, visible=visible)

    monkeypatch.setattr(tracing, "build_tree", planted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.65, 0.9])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3_text", "tiny_llama"])
def test_an_ancestor_dropped_from_the_mask_is_caught(
    model: str,
    share: float,
    dtype: str,
    random_model: Callable[..., str],
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """From BOS over the system prompt and the middle of the sentence to the last header."""
    folder = tiny_llama if model == "tiny_llama" else random_model(model)
    drop_ancestor(monkeypatch, lambda path: (path[int(share * (len(path) - 1))], []))
    assert "tree" in fails_with_a_number(folder, capsys, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "tiny_llama"])
@pytest.mark.parametrize("back", [2, 12])
def test_an_ancestor_hidden_from_the_scoring_node_alone_is_caught(
    back: int,
    model: str,
    dtype: str,
    random_model: Callable[..., str],
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """One cell of the mask: the last token of the prompt does not see one token before it."""
    folder = tiny_llama if model == "tiny_llama" else random_model(model)
    drop_ancestor(monkeypatch, lambda path: (path[-back], [path[-1]]))
    fails_with_a_number(folder, capsys, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_form_branch_that_does_not_see_its_prompt_is_caught(
    dtype: str, llama: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The nodes after a prompt at which the later tokens of a form are scored."""
    build = tracing.build_tree
    planted_in = []

    def planted(*arguments: Any) -> Any:
        tree = build(*arguments)
        ends = {path[-1] for path in tree.paths}
        branches = sorted(set(tree.scored.tolist()) - ends)
        visible = tree.visible.clone()
        for node in branches:
            visible[node, : len(tree.paths[0]) // 2] = False
        planted_in.append(len(branches))
        return dataclasses.replace(tree, visible=visible)

    monkeypatch.setattr(tracing, "build_tree", planted)
    with contextlib.suppress(AssertionError):
        fails_with_a_number(llama, capsys, dtype)
        return
    assert planted_in
    assert max(planted_in) > 0
    pytest.fail("form branches that see half of their prompt were not caught")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_node_that_sees_another_prompt_is_caught(
    dtype: str, llama: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    structure = tracing.Trie.structure

    def planted(self: Any) -> Any:
        depth, visible = structure(self)
        return depth, torch.ones_like(visible).tril()

    monkeypatch.setattr(tracing.Trie, "structure", planted)
    assert "tree" in fails_with_a_number(llama, capsys, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_position_ids_that_count_nodes_are_caught(
    dtype: str, llama: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    structure = tracing.Trie.structure

    def planted(self: Any) -> Any:
        depth, visible = structure(self)
        return torch.arange(depth.shape[1])[None], visible

    monkeypatch.setattr(tracing.Trie, "structure", planted)
    assert "tree" in fails_with_a_number(llama, capsys, dtype)


@contextlib.contextmanager
def editing_outputs(subject: Any, rows: Sequence[Any], values: Any) -> Iterator[None]:
    """The wrong hook: the slice of o_proj's output is replaced."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(original_editing(subject, [() for _ in rows], values))
        for i, row in enumerate(rows):
            for edit in row:
                if edit.component.kind == "resid":
                    continue

                def hook(_: Any, __: Any, y: Any, i: int = i, edit: Any = edit) -> Any:
                    y = y.expand(len(rows), -1, -1).clone()
                    span = edit.component.span(subject.shape.d_head)
                    y[i, :, span] = values.replacement(edit, y[i, :, span], span)
                    return y

                module = subject.module(edit.component.site)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def leaving_a_hook(subject: Any, rows: Sequence[Any], values: Any) -> Iterator[None]:
    with original_editing(subject, rows, values):
        for row in rows:
            for edit in row:
                subject.module(edit.component.site).register_forward_pre_hook(lambda m, a: None)
        yield


@contextlib.contextmanager
def starting_late(subject: Any, layer: int, residual: Any, as_tuple: bool) -> Iterator[None]:
    with original_starting_at(subject, min(layer + 1, len(subject.layers)), residual, as_tuple):
        yield


@contextlib.contextmanager
def starting_for_good(subject: Any, layer: int, residual: Any, as_tuple: bool) -> Iterator[None]:
    """Blocks stay replaced."""
    with original_starting_at(subject, layer, residual, as_tuple):
        kept = [block.forward for block in list(subject.layers)[:layer]]
        yield
    for block, forward in zip(list(subject.layers)[:layer], kept, strict=True):
        block.forward = forward


original_editing = tracing.editing
original_starting_at = tracing.starting_at
original_edit_input = tracing._edit_input
original_span = Component.span
original_run_base = tracing.run_base


def edit_next_head(
    subject: Any, site: Any, edits: Any, n_rows: int, values: Any, module: Any, args: Any
) -> Any:
    def moved(edit: Any) -> Any:
        c = edit.component
        if c.kind != "head":
            return edit
        next_head = dataclasses.replace(c, index=(c.index + 1) % subject.shape.n_heads)
        return dataclasses.replace(edit, component=next_head)

    edits = [(row, moved(edit)) for row, edit in edits]
    return original_edit_input(subject, site, edits, n_rows, values, module, args)


def span_of_next_head(self: Component, d_head: int) -> slice:
    span = original_span(self, d_head)
    if self.kind != "head":
        return span
    return slice(span.start + d_head, span.stop + d_head) if self.index == 0 else slice(0, d_head)


def span_from_hidden_size(self: Component, d_head: int) -> slice:
    """As if d_head were hidden_size // num_attention_heads."""
    return original_span(self, 12 if self.kind == "head" else d_head)


def edit_in_place(
    subject: Any, site: Any, edits: Any, n_rows: int, values: Any, module: Any, args: Any
) -> Any:
    """Rows share one activation that is written into."""
    edited = args[0].expand(n_rows, -1, -1)
    for row, edit in edits:
        span = edit.component.span(subject.shape.d_head)
        edited[row, :, span] = values.replacement(edit, edited[row, :, span], span)
    return (edited, *args[1:])


def keeping_the_residual_of_the_block_before(*arguments: Any) -> Any:
    base = original_run_base(*arguments)
    for layer in sorted(base.residuals, reverse=True):
        base.residuals[layer] = base.residuals.get(layer - 1, base.residuals[layer])
    return base


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a hook on o_proj's output": (tracing, "editing", editing_outputs),
    "the next head": (tracing, "_edit_input", edit_next_head),
    "a head off by one in its span": (Component, "span", span_of_next_head),
    "a head of the wrong width": (Component, "span", span_from_hidden_size),
    "an edit in place": (tracing, "_edit_input", edit_in_place),
    "a hook left behind": (tracing, "editing", leaving_a_hook),
    "one block too many skipped": (tracing, "starting_at", starting_late),
    "the residual of the block before": (
        tracing,
        "run_base",
        keeping_the_residual_of_the_block_before,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "tiny_llama"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(
    mistake: str,
    model: str,
    dtype: str,
    random_model: Callable[..., str],
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    folder = tiny_llama if model == "tiny_llama" else random_model(model)
    monkeypatch.setattr(*MISTAKES[mistake])
    fails_with_a_number(folder, capsys, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_left_replaced_is_caught(
    dtype: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "starting_at", starting_for_good)
    assert self_test(llama, dtype) == 1  # the next forward may fail before anything is counted


def test_every_sweep_begins_with_the_self_test(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tracing, "editing", editing_outputs)
    flags = ["--num_samples", "2", "--output_dir", str(tmp_path / "run")]
    assert tracing.main(["--model_id", llama, *flags]) == 1
    assert "self-test failed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "circuit_results.csv").exists()
    assert not list((tmp_path / "run" / ".parts").glob("sweep-*"))


# --------------------------------------------------------------------------------------------
# Noise floor
# --------------------------------------------------------------------------------------------

SENTENCES = [
    {"sentence": "Name a sport. Answer in one word.", "targets": ["golf"]},
    {"sentence": "Name a metal. Answer in one word.", "targets": ["iron", "zinc"]},
    {"sentence": "Name a bird. Answer in one word.", "targets": ["owl"]},
]


def run_of(model: str, folder: Path, *flags: str) -> Path:
    assert tracing.main(["--model_id", model, "--output_dir", str(folder), *flags]) == 0
    return folder


def payloads(folder: Path, kind: str) -> list[Any]:
    return [
        json.loads(path.read_text())["payload"]
        for path in sorted((folder / ".parts").glob(f"{kind}-*.json"))
    ]


def jittered_effects(folder: Path, n_roles: int) -> dict[tuple[int, int, int], list[float]]:
    """(layer, head, draw) -> the effect of every sample; prompts come as a, b and then controls."""
    base = [part["scores"] for part in payloads(folder, "base")]
    effects: dict[tuple[int, int, int], list[float]] = {}
    for part in payloads(folder, "sweep"):
        for tree, layer, head, draw, scores in part:
            if draw >= 0:
                moved = [new - old for new, old in zip(scores, base[tree], strict=True)]
                pairs = [moved[i] - moved[i + 1] for i in range(0, len(moved), n_roles)]
                effects.setdefault((layer, head, draw), []).extend(pairs)
    return effects


def test_the_noise_floor_is_the_95th_percentile_of_the_mean_effects_of_jittered_rows(
    finished: Path,
) -> None:
    effects = jittered_effects(finished, n_roles=4)
    assert len(effects) >= 12
    assert {layer for layer, _, _ in effects} == {0, 1, 2}
    assert {len(values) for values in effects.values()} == {N_SAMPLES}
    floor = np.quantile([abs(statistics.fmean(v)) for v in effects.values()], 0.95)
    assert record_of(finished)["noise_floor"] == pytest.approx(float(floor), rel=1e-9)


def test_the_noise_floor_is_in_the_log_and_marks_the_heads_above_it(finished: Path) -> None:
    floor = record_of(finished)["noise_floor"]
    assert f"noise floor {floor:.2g}" in (finished / "run.log").read_text()
    heads = read(finished, "circuit_heads.csv")
    assert heads["above_noise"].tolist() == (heads["mean"].abs() > floor).tolist()


def test_a_jittered_row_scales_a_head_by_one_plus_two_eps(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = set()
    original = tracing.RowBatches.run

    def watch(self: Any, subject: Any, base: Any, rows: Any, means: Any) -> Any:
        factors.update((e.component.kind, e.factor) for r in rows for e in r if e.op == "scale")
        return original(self, subject, base, rows, means)

    monkeypatch.setattr(tracing.RowBatches, "run", watch)
    run_of(llama, tmp_path / "run", "--num_samples", "1", "--bf16")
    assert factors == {("head", 1 + 2**-6)}


def test_the_noise_floor_depends_on_the_seed_and_is_larger_in_bfloat16(
    llama: str, tmp_path: Path
) -> None:
    samples = ["--samples", write_samples(tmp_path / "mine.jsonl", *SENTENCES)]
    runs = {
        name: run_of(llama, tmp_path / name, *samples, *flags)
        for name, flags in {
            "one": ["--seed", "1"],
            "again": ["--seed", "1"],
            "two": ["--seed", "2"],
            "bf16": ["--seed", "1", "--bf16"],
        }.items()
    }
    floors = {name: record_of(folder)["noise_floor"] for name, folder in runs.items()}
    drawn = {name: set(jittered_effects(folder, 2)) for name, folder in runs.items()}
    assert floors["one"] == floors["again"]
    assert floors["one"] != floors["two"]
    assert drawn["one"] == drawn["bf16"] != drawn["two"]
    assert 1e-8 < floors["one"] < 2e-5
    assert 1e-4 < floors["bf16"] < 1
    assert floors["bf16"] > 100 * floors["one"]


# --------------------------------------------------------------------------------------------
# Controls
# --------------------------------------------------------------------------------------------

BASE_COLUMNS = [*tracing.SEVEN, "score_a_base", "score_b_base", "score_a_head", "score_b_head"]
CONTROL_COLUMNS = [
    "score_other_base",
    "score_other_head",
    "score_affirm_base",
    "score_affirm_head",
    "effect_minus_other",
    "effect_minus_affirm",
]


def texts(folder: Path) -> dict[str, dict[str, str]]:
    """sample_id -> role -> user text."""
    return {
        sample["sample_id"]: {
            role: user_text(entry["text"]) for role, entry in sample["prompts"].items()
        }
        for sample in record_of(folder)["samples"]
    }


def targets_of(folder: Path) -> dict[str, list[str]]:
    return {sample["sample_id"]: sample["targets"] for sample in record_of(folder)["samples"]}


def test_control_columns_come_after_those_that_were_there(
    finished: Path, without_controls: Path
) -> None:
    columns = list(read(finished, "circuit_results.csv"))
    assert columns[:11] == BASE_COLUMNS
    assert sorted(columns[11:].index(name) for name in CONTROL_COLUMNS) == list(
        range(columns[11:].index(CONTROL_COLUMNS[0]), columns[11:].index(CONTROL_COLUMNS[-1]) + 1)
    )
    assert not set(CONTROL_COLUMNS) & set(read(without_controls, "circuit_results.csv"))


def test_control_effects_recompute_from_the_raw_scores(finished: Path) -> None:
    table = read(finished, "circuit_results.csv")
    assert not table[CONTROL_COLUMNS].isna().any().any()
    assert len(table) == N_SAMPLES * 12
    for role in ("other", "affirm"):
        control_base = table[f"score_{role}_base"] - table["score_b_base"]
        control_head = table[f"score_{role}_head"] - table["score_b_head"]
        expected = table["head_effect"] - (control_head - control_base)
        assert (table[f"effect_minus_{role}"] - expected).abs().max() < 1e-9
    assert table.groupby("sample_id")[["score_other_base", "score_affirm_base"]].nunique().eq(1).all(axis=None)  # fmt: skip


def test_the_other_prompt_forbids_as_many_words_that_other_samples_forbid_and_nobody_answers(
    finished: Path,
) -> None:
    targets = targets_of(finished)
    for sample_id, of_role in texts(finished).items():
        sentence = of_role["b"]
        match = re.fullmatch(r"Don't mention (.+)\. " + re.escape(sentence), of_role["other"])
        assert match, of_role["other"]
        words = match[1].split(" or ")
        assert len(words) == len(set(words)) == len(targets[sample_id])
        elsewhere = {w for other, ws in targets.items() if other != sample_id for w in ws}
        assert set(words) <= elsewhere
        assert not set(words) & {*tracing.QUESTIONS[sentence].split(), *targets[sample_id]}


def test_samples_of_the_same_sentence_lend_each_other_no_words(llama: str, tmp_path: Path) -> None:
    sentence = "Which thing comes to mind?"
    mine = [{"sentence": sentence, "targets": [word]} for word in ("apple", "pear")]
    mine.append({"sentence": "Name a sport.", "targets": ["golf"]})
    samples = write_samples(tmp_path / "mine.jsonl", *mine)
    folder = run_of(
        llama, tmp_path / "run", "--samples", samples, "--controls", "--layers", "0", "--heads", "0"
    )
    controls = [of_role["other"] for of_role in texts(folder).values()]
    assert controls[:2] == [f"Don't mention golf. {sentence}"] * 2
    assert controls[2] in {f"Don't mention {word}. Name a sport." for word in ("apple", "pear")}


def test_controls_differ_by_two_tokens_at_most_or_are_warned_of(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    told = (finished / "run.log").read_text()
    for sample_id, of_role in texts(finished).items():
        count = {role: len(naive.prompt_ids(plain[1], text)) for role, text in of_role.items()}
        for role in ("other", "affirm"):
            warned = re.search(
                rf"\({sample_id}\): control {role} has {count[role]} tokens, prompt a {count['a']}",
                told,
            )
            assert bool(warned) == (abs(count[role] - count["a"]) > 2), (sample_id, role)


def test_a_control_three_tokens_longer_is_warned_of_and_one_two_tokens_longer_is_not(
    llama: str, plain: tuple[Any, Any], tmp_path: Path
) -> None:
    for n_more, warned in ((2, False), (3, True)):
        mine = [
            {"sentence": "Name a sport.", "targets": ["q" * 3]},
            {"sentence": "Name a metal.", "targets": ["q" * (3 + n_more)]},
        ]
        samples = write_samples(tmp_path / f"{n_more}.jsonl", *mine)
        flags = ["--samples", samples, "--controls", "--layers", "0", "--heads", "0"]
        folder = run_of(llama, tmp_path / f"run{n_more}", *flags)
        of_role = next(iter(texts(folder).values()))
        a, other = (len(naive.prompt_ids(plain[1], of_role[role])) for role in ("a", "other"))
        assert other - a == n_more
        told = (folder / "run.log").read_text()
        assert ("(line00001): control other has" in told) == warned


def test_the_affirmative_template_is_the_nearest_in_tokens(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    targets = targets_of(finished)
    for sample_id, of_role in texts(finished).items():
        words = " or ".join(targets[sample_id])
        candidates = [f"{mention} {words}. {of_role['b']}" for mention in tracing.MENTIONS]
        assert of_role["affirm"] in candidates
        wanted = len(naive.prompt_ids(plain[1], of_role["a"]))
        gaps = {t: abs(len(naive.prompt_ids(plain[1], t)) - wanted) for t in candidates}
        assert gaps[of_role["affirm"]] == min(gaps.values())


def test_the_affirmative_template_is_chosen_by_token_count_not_by_order() -> None:
    """With a token per character the nearest to "Don't mention" (13) is "Please mention" (14)."""
    tokenizer = lambda text, add_special_tokens: {"input_ids": list(map(ord, text))}  # noqa: E731
    writer = tracing.Writer(tokenizer, "", "word")
    sample = tracing.suppression_sample("s", "Name a sport.", ["golf"])
    other = tracing.suppression_sample("t", "Name a metal.", ["iron"])
    made = tracing.control_texts(sample, [sample, other], writer, 0)
    assert made == {
        "other": "Don't mention iron. Name a sport.",
        "affirm": "Please mention golf. Name a sport.",
    }


def test_the_words_of_the_other_prompt_have_the_token_counts_of_the_targets_where_possible() -> (
    None
):
    tokenizer = lambda text, add_special_tokens: {"input_ids": list(map(ord, text))}  # noqa: E731
    writer = tracing.Writer(tokenizer, "", "word")
    make = tracing.suppression_sample
    mine = make("s", "Name things.", ["abc", "abcdefgh"])
    pool = [make(f"t{i}", f"Sentence {i}.", [w]) for i, w in enumerate(["xyz", "x", "xyzxyzxy", "xyzxy"])]  # fmt: skip
    for seed in range(5):
        made = tracing.control_texts(mine, [mine, *pool], writer, seed)
        assert made["other"] == "Don't mention xyz or xyzxyzxy. Name things."


def test_the_token_counts_of_all_prompts_are_in_run_json(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    for sample in record_of(finished)["samples"]:
        for role, entry in sample["prompts"].items():
            n_tokens = len(naive.prompt_ids(plain[1], user_text(entry["text"])))
            assert n_tokens in entry.values(), (sample["sample_id"], role, sorted(entry))


def test_control_prompts_score_as_the_naive_oracle_says(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    model, tokenizer = plain
    table = read(finished, "circuit_results.csv").set_index(["sample_id", "layer", "head"])
    targets = targets_of(finished)
    for sample_id, of_role in itertools.islice(texts(finished).items(), 2):
        for layer, head in ((0, 2), (2, 1)):
            row = table.loc[(sample_id, layer, head)]
            o_proj = naive.layers_of(model)[layer].self_attn.o_proj
            edit = naive.zero_slice(16 * head, 16 * (head + 1))
            for role in ("other", "affirm"):
                words = targets[sample_id]
                base = naive.suppression_score(model, tokenizer, of_role[role], words)
                with naive.hooked(o_proj, edit):
                    ablated = naive.suppression_score(model, tokenizer, of_role[role], words)
                assert row[f"score_{role}_base"] == pytest.approx(base, abs=2e-5)
                assert row[f"score_{role}_head"] == pytest.approx(ablated, abs=2e-5)


def test_the_seven_columns_do_not_change_with_controls(
    finished: Path, without_controls: Path
) -> None:
    one, two = (read(f, "circuit_results.csv")[BASE_COLUMNS] for f in (finished, without_controls))
    assert one[["sample_id", "n_constraints", "layer", "head"]].equals(
        two[["sample_id", "n_constraints", "layer", "head"]]
    )
    assert (one.iloc[:, 4:] - two.iloc[:, 4:]).abs().max().max() < 2e-5


def test_a_long_form_sample_of_another_shape_has_empty_controls_and_a_warning(
    llama: str, tmp_path: Path, capsys: Any
) -> None:
    long = {
        "sample_id": "long",
        "prompt_a": "Never say golf! Name a sport.",
        "prompt_b": "Name a sport.",
        "targets": ["golf"],
    }
    samples = write_samples(tmp_path / "mine.jsonl", long, *SENTENCES[1:])
    folder = run_of(llama, tmp_path / "run", "--samples", samples, "--controls", "--layers", "0")
    table = read(folder, "circuit_results.csv")
    empty = table[CONTROL_COLUMNS].isna().all(axis=1)
    assert empty.tolist() == (table["sample_id"] == "long").tolist()
    assert not table[CONTROL_COLUMNS][~empty].isna().any().any()
    assert not table[BASE_COLUMNS].isna().any().any()
    warning = [line for line in capsys.readouterr().out.splitlines() if "no controls" in line]
    assert len(warning) == 1
    assert "(long)" in warning[0]
    heads = read(folder, "circuit_heads.csv")
    assert (heads["n_samples"] == 3).all()
    assert (heads["minus_other_n_samples"] == 2).all()
    assert (heads["minus_other_n_sentences"] == 2).all()


def test_a_single_sample_has_no_other_words_and_says_so(
    llama: str, tmp_path: Path, capsys: Any
) -> None:
    samples = write_samples(tmp_path / "mine.jsonl", SENTENCES[0])
    folder = run_of(llama, tmp_path / "run", "--samples", samples, "--controls", "--layers", "0")
    table = read(folder, "circuit_results.csv")
    assert table[["score_other_base", "score_other_head", "effect_minus_other"]].isna().all(axis=None)  # fmt: skip
    assert not table[["score_affirm_base", "effect_minus_affirm"]].isna().any().any()
    assert "too few words" in capsys.readouterr().out
    assert "minus_affirm_mean" in read(folder, "circuit_heads.csv")


# --------------------------------------------------------------------------------------------
# circuit_heads.csv
# --------------------------------------------------------------------------------------------


def plain_p(sums: Sequence[float]) -> float:
    patterns = list(itertools.product((1, -1), repeat=len(sums)))
    flipped = [abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in patterns]
    return sum(f >= abs(sum(sums)) * (1 - 1e-9) for f in flipped) / len(patterns)


def plain_q(p: Sequence[float]) -> list[float]:
    m, ordered = len(p), sorted(p)
    return [min(m * ordered[k] / (k + 1) for k in range(m) if ordered[k] >= one) for one in p]


@pytest.mark.parametrize(
    ("prefix", "column"),
    [("", "head_effect"), ("minus_other_", "effect_minus_other"), ("minus_affirm_", "effect_minus_affirm")],
)  # fmt: skip
def test_circuit_heads_recomputes_from_circuit_results(
    prefix: str, column: str, finished: Path
) -> None:
    table, heads = read(finished, "circuit_results.csv"), read(finished, "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(3) for j in range(4)]
    ps = []
    for head in heads.itertuples():
        values = table[(table["layer"] == head.layer) & (table["head"] == head.head)]
        effects = values[column].tolist()
        assert getattr(head, f"{prefix}n_samples") == len(effects) == N_SAMPLES
        assert getattr(head, f"{prefix}mean") == pytest.approx(statistics.fmean(effects))
        assert getattr(head, f"{prefix}median") == pytest.approx(statistics.median(effects))
        assert getattr(head, f"{prefix}sd") == pytest.approx(statistics.stdev(effects))
        low, high = getattr(head, f"{prefix}ci_low"), getattr(head, f"{prefix}ci_high")
        assert min(effects) <= low < statistics.fmean(effects) < high <= max(effects)
        ps.append(plain_p(values.groupby("unit")[column].sum().tolist()))
    assert heads[f"{prefix}p"].tolist() == pytest.approx(ps)
    assert heads[f"{prefix}q"].tolist() == pytest.approx(plain_q(ps))
    assert (heads["n_sentences"] == table["unit"].nunique()).all()


def test_roles_recompute_from_circuit_results(finished: Path) -> None:
    table, heads = read(finished, "circuit_results.csv"), read(finished, "circuit_heads.csv")
    base = table.drop_duplicates("sample_id")["delta_logit_base"].mean()
    assert heads["role"].tolist() == pytest.approx((-math.copysign(1, base) * heads["mean"]).tolist())  # fmt: skip
    assert heads["share_moved"].tolist() == pytest.approx((-heads["mean"] / base).tolist())


# --------------------------------------------------------------------------------------------
# Confirmation
# --------------------------------------------------------------------------------------------

CONFIRM_COLUMNS = [
    "samples",
    "set",
    "draw",
    "n_ablated",
    "components",
    "n_samples",
    "n_sentences",
    "mean_delta",
    "share_removed",
]


def heads_in(text: Any) -> list[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in re.findall(r"L(\d+)H(\d+)", str(text))]


@contextlib.contextmanager
def naively_ablated(model: Any, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """A plain hook per head, all at once."""
    with contextlib.ExitStack() as stack:
        for layer, head in heads:
            o_proj = naive.layers_of(model)[layer].self_attn.o_proj
            width = o_proj.in_features // model.config.num_attention_heads
            edit = naive.zero_slice(head * width, (head + 1) * width)
            stack.enter_context(naive.hooked(o_proj, edit))
        yield


def naive_delta(
    plain: tuple[Any, Any],
    folder: Path,
    sample_ids: Sequence[str],
    heads: Sequence[tuple[int, int]],
) -> float:
    prompts, targets = texts(folder), targets_of(folder)
    deltas = []
    with naively_ablated(plain[0], heads):
        for i in sample_ids:
            a, b = (naive.suppression_score(*plain, prompts[i][role], targets[i]) for role in "ab")
            deltas.append(a - b)
    return statistics.fmean(deltas)


def halves(folder: Path) -> tuple[set[str], set[str]]:
    """sample_ids of the choosing and of the held-out half."""
    table = read(folder, "circuit_results.csv")
    table["index"] = table["head"]
    choosing, held_out = tracing.split_units(table, 42)
    samples = table.drop_duplicates("sample_id").set_index("sample_id")["unit"]
    return set(samples.index[samples.isin(choosing)]), set(samples.index[samples.isin(held_out)])


def test_choosing_and_held_out_sentences_are_disjoint_halves() -> None:
    for n in (2, 3, 7, 16):
        units = [f"u{i}" for i in range(n)]
        table = pd.DataFrame({"unit": units * 3, "group": ""})
        choosing, held_out = tracing.split_units(table, 0)
        assert not choosing & held_out
        assert choosing | held_out == set(units)
        assert len(choosing) - len(held_out) in (0, 1)
        assert tracing.split_units(table.sample(frac=1, random_state=0), 0) == (choosing, held_out)
    assert len({tuple(sorted(tracing.split_units(table, seed)[0])) for seed in range(5)}) > 1


def test_the_confirmation_table_has_its_columns_and_rows(finished: Path) -> None:
    rows = read(finished, "circuit_confirm.csv")
    assert list(rows) == CONFIRM_COLUMNS
    assert set(rows["samples"]) == {"held-out"}
    count = Counter(zip(rows["set"], rows["n_ablated"], strict=True))
    expected = {("none", 0): 1} | {("chosen", n): 1 for n in (1, 2, 3)}
    assert count == expected | {("random", n): 4 for n in (1, 2, 3)}
    assert (rows["n_samples"] == N_SAMPLES // 2).all()
    assert (rows["n_sentences"] == N_SAMPLES // 2).all()
    base = rows["mean_delta"][0]
    assert rows["share_removed"].tolist() == pytest.approx((1 - rows["mean_delta"] / base).tolist())


def test_the_chosen_heads_are_the_top_by_mean_role_on_the_choosing_half(finished: Path) -> None:
    table, rows = read(finished, "circuit_results.csv"), read(finished, "circuit_confirm.csv")
    half = table[table["sample_id"].isin(halves(finished)[0])]
    sign = -math.copysign(1, half.drop_duplicates("sample_id")["delta_logit_base"].mean())
    roles = sign * half.groupby(["layer", "head"])["head_effect"].mean()
    best = [f"L{layer}H{head}" for layer, head in roles.sort_values(ascending=False).index]
    chosen = rows[rows["set"] == "chosen"].set_index("n_ablated")["components"]
    assert chosen.to_dict() == {n: " ".join(best[:n]) for n in (1, 2, 3)}


def test_the_chosen_heads_are_not_looked_up_in_the_held_out_half() -> None:
    """Head 0 is best in the choosing half, head 1 in the other; and the sign is the half's own."""
    rows = [
        {"sample_id": f"s{i}", "unit": f"u{i}", "group": "", "layer": 0, "kind": "head",
         "index": head, "delta_logit_base": base, "head_effect": effect}
        for i, base in enumerate((1.0, 1.0))
        for head, effect in enumerate((-3.0, 2.0, -1.0))
    ]  # fmt: skip
    top = tracing.choose_top(pd.DataFrame(rows), tracing.Config(confirm=2))
    assert top == [Component(0, "head", 0), Component(0, "head", 2)]


def test_joint_ablation_on_held_out_sentences_is_what_the_naive_oracle_says(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    rows = read(finished, "circuit_confirm.csv")
    held_out = sorted(halves(finished)[1])
    one_random = rows[(rows["set"] == "random") & (rows["draw"] == 2) & (rows["n_ablated"] == 3)]
    for row in pd.concat([rows[rows["set"] != "random"], one_random]).itertuples():
        expected = naive_delta(plain, finished, held_out, heads_in(row.components))
        assert row.mean_delta == pytest.approx(expected, abs=2e-5), row.components


def test_random_sets_are_nested_disjoint_from_the_chosen_and_of_the_same_layers(
    finished: Path,
) -> None:
    rows = read(finished, "circuit_confirm.csv")
    chosen = heads_in(rows[rows["set"] == "chosen"]["components"].iloc[-1])
    assert len(chosen) == 3
    sets = []
    for _, draw in rows[rows["set"] == "random"].groupby("draw"):
        by_size = [heads_in(text) for text in draw.sort_values("n_ablated")["components"]]
        largest = by_size[-1]
        assert by_size == [largest[:n] for n in (1, 2, 3)]
        assert len(set(largest)) == 3
        assert not set(largest) & set(chosen)
        assert [layer for layer, _ in largest] == [layer for layer, _ in chosen]
        sets.append(tuple(largest))
    assert len(set(sets)) > 1


def fake_experiment(**more: Any) -> Any:
    shape = SimpleNamespace(n_layers=5, n_heads=4, d_mlp=80)
    config = tracing.Config(**more)
    return SimpleNamespace(shape=shape, config=config, given=())


def test_where_a_layer_has_no_head_left_the_nearest_layer_lends_one_and_it_is_said(
    caplog: Any,
) -> None:
    chosen = [Component(1, "head", i) for i in range(3)]
    for draw in range(20):
        drawn = tracing.draw_random(chosen, fake_experiment(), draw)
        assert drawn[0] == Component(1, "head", 3)
        assert {c.layer for c in drawn[1:]} <= {0, 2}
        assert len(set(drawn)) == 3
    crowded = [*chosen, *(Component(layer, "head", i) for layer in (0, 2) for i in range(4))]
    drawn = tracing.draw_random(crowded[1:], fake_experiment(), 0)
    assert not set(drawn) & set(crowded[1:])
    assert {c.layer for c in drawn} == {1, 3, 4}
    caplog.clear()
    tracing.confirm_sets([Component(1, "head", 0)], fake_experiment())
    assert "neighbouring" not in caplog.text
    tracing.confirm_sets(chosen, fake_experiment(num_random=2))
    assert "4 random components come from a neighbouring layer" in caplog.text


def test_random_sets_are_drawn_by_seed_and_leave_given_heads_alone() -> None:
    chosen = [Component(1, "head", 0), Component(2, "head", 0)]
    draws = [tracing.draw_random(chosen, fake_experiment(seed=s), 0) for s in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) > 1
    exp = fake_experiment()
    exp.given = tuple(tracing.Edit(Component(1, "head", i)) for i in (1, 2))
    assert {tracing.draw_random(chosen, exp, d)[0].index for d in range(20)} == {3}


def test_the_sizes_of_joint_sets_are_powers_of_two_and_k() -> None:
    assert [tracing.joint_sizes(k) for k in (1, 2, 3, 8, 20)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16, 20],
    ]


def test_fewer_than_k_heads_left_for_the_random_sets_is_bad_usage(
    llama: str, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--num_samples", "2", "--output_dir", str(tmp_path / "run"), "--num_random", "2"]
    assert tracing.main(["--model_id", llama, *flags, "--confirm", "7"]) == 2
    assert "--confirm 7" in capsys.readouterr().err
    assert tracing.main(["--model_id", llama, *flags, "--confirm", "6"]) == 0
    rows = read(tmp_path / "run", "circuit_confirm.csv")
    largest = rows[rows["n_ablated"] == 6].set_index("set")["components"]
    everything = {(layer, head) for layer in range(3) for head in range(4)}
    for text in largest["random"]:
        assert {*heads_in(text), *heads_in(largest["chosen"])} == everything


def test_confirming_a_single_sentence_is_bad_usage(llama: str, tmp_path: Path, capsys: Any) -> None:
    flags = ["--num_samples", "1", "--output_dir", str(tmp_path / "run"), "--confirm", "2"]
    assert tracing.main(["--model_id", llama, *flags]) == 2
    assert "two different sentences" in capsys.readouterr().err


def test_ablate_measures_one_joint_set_on_all_samples_as_the_naive_oracle_does(
    llama: str, plain: tuple[Any, Any], tmp_path: Path
) -> None:
    samples = write_samples(tmp_path / "mine.jsonl", *SENTENCES)
    folder = run_of(
        llama, tmp_path / "run", "--samples", samples, "--ablate", "L2H3,L0H1,L2H0", "--layers", "1"
    )
    rows = read(folder, "circuit_confirm.csv")
    assert list(rows) == CONFIRM_COLUMNS
    assert rows["set"].tolist() == ["none", "ablate"]
    assert rows["samples"].tolist() == ["all", "all"]
    assert sorted(heads_in(rows["components"][1])) == [(0, 1), (2, 0), (2, 3)]
    assert (rows["n_samples"] == 3).all()
    ids = list(texts(folder))
    for row in rows.itertuples():
        expected = naive_delta(plain, folder, ids, heads_in(row.components))
        assert row.mean_delta == pytest.approx(expected, abs=2e-5)
    told = (folder / "run.log").read_text()
    assert re.search(r"all samples, 3 jointly \(.*\): mean delta [+-]\d", told)


def test_a_head_to_ablate_that_the_model_does_not_have_is_bad_usage(
    llama: str, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--num_samples", "2", "--output_dir", str(tmp_path / "run"), "--ablate", "L1H4"]
    assert tracing.main(["--model_id", llama, *flags]) == 2
    assert "L1H4" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# Behaviour
# --------------------------------------------------------------------------------------------


def generations(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def naive_tokens(
    plain: tuple[Any, Any], user: str, n_tokens: int, heads: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Greedy tokens, a full forward each, with the heads zeroed throughout."""
    model, tokenizer = plain
    ids = naive.prompt_ids(tokenizer, user)
    n = len(ids)
    with naively_ablated(model, heads):
        for _ in range(n_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[n:]


def naive_reply(
    plain: tuple[Any, Any], user: str, n_tokens: int, heads: Sequence[tuple[int, int]] = ()
) -> str:
    tokens = naive_tokens(plain, user, n_tokens, heads)
    ends = {1, plain[1].eos_token_id}
    stop = next((i + 1 for i, t in enumerate(tokens) if t in ends), len(tokens))
    return str(plain[1].decode(tokens[:stop], skip_special_tokens=True)).strip()


def test_words_are_mentioned_as_whole_words_in_any_case() -> None:
    cases = {
        "Apple!": True,
        "an apple.": True,
        "APPLE": True,
        "apple-pie": True,
        "pineapple": False,
        "apples": False,
        "appl e": False,
        "": False,
    }
    for reply, expected in cases.items():
        assert (tracing.mentioned(["apple"], reply) == ["apple"]) == expected, reply
    assert tracing.mentioned(["C++", "a.b", "New York"], "c++, axb and new york") == ["C++", "New York"]  # fmt: skip


def test_generations_hold_all_replies_unedited_and_the_held_out_ones_ablated(
    finished: Path,
) -> None:
    records = generations(finished)
    held_out = halves(finished)[1]
    chosen = read(finished, "circuit_confirm.csv").query("set == 'chosen'")["components"].tolist()
    everyone = {(i, role, "") for i in texts(finished) for role in "ab"}
    ablated = {(i, role, heads) for i in held_out for role in "ab" for heads in chosen}
    found = [(r["sample_id"], r["prompt"], r["ablated"]) for r in records]
    assert len(found) == len(set(found))
    assert set(found) == everyone | ablated
    assert all(r["n_ablated"] == len(r["ablated"].split()) for r in records)


def test_replies_with_heads_ablated_are_those_of_a_naive_generation_with_a_plain_hook(
    finished: Path, plain: tuple[Any, Any]
) -> None:
    prompts, differing = texts(finished), 0
    for record in generations(finished):
        if record["n_ablated"] in (0, 1, 3):
            user = prompts[record["sample_id"]][record["prompt"]]
            heads = heads_in(record["ablated"])
            assert record["reply"] == naive_reply(plain, user, 5, heads)
            differing += bool(heads) and record["reply"] != naive_reply(plain, user, 5)
    assert differing > 0


def test_what_a_reply_shows_recomputes_from_its_text(finished: Path) -> None:
    targets, prompts = targets_of(finished), texts(finished)
    for record in generations(finished):
        i = record["sample_id"]
        words = re.findall(r"\w+", record["reply"].casefold())
        assert record["mentions"] == [w for w in targets[i] if w.casefold() in words]
        answers = tracing.QUESTIONS[prompts[i]["b"]].casefold().split()
        assert record["answers"] == any(w in words for w in answers)


def test_mention_rates_are_in_run_json_and_the_log(finished: Path) -> None:
    records, held_out = generations(finished), halves(finished)[1]
    told = (finished / "run.log").read_text()
    rates = record_of(finished)["behaviour"]
    assert [(r["samples"], r["n_ablated"]) for r in rates] == [
        ("all", 0),
        *(("held-out", n) for n in (0, 1, 2, 3)),
    ]
    for rate in rates:
        mine = [
            r
            for r in records
            if r["n_ablated"] == rate["n_ablated"]
            and (rate["samples"] == "all" or r["sample_id"] in held_out)
        ]
        for role in "ab":
            of_role = [r for r in mine if r["prompt"] == role]
            assert rate[f"mentions_{role}"] == 100 * sum(
                bool(r["mentions"]) for r in of_role
            ) / len(of_role)
            share = 100 * sum(r["answers"] for r in of_role) / len(of_role)
            assert rate[f"answers_{role}"] == share
        assert (
            f"({rate['samples']}, {rate['n_ablated']} ablated): {rate['mentions_a']:.0f} %" in told
        )


def test_rates_by_hand() -> None:
    def reply(i: str, prompt: str, n: int, shows: list[str], answers: bool) -> dict[str, Any]:
        return {"sample_id": i, "prompt": prompt, "n_ablated": n, "mentions": shows, "answers": answers}  # fmt: skip

    records = [
        reply("s", "a", 0, [], False),
        reply("t", "a", 0, ["x"], True),
        reply("s", "b", 0, ["x", "y"], True),
        reply("t", "b", 0, ["x"], True),
        reply("t", "a", 2, ["x"], False),
        reply("t", "b", 2, [], False),
    ]
    assert tracing.behaviour_rates(records, {"t"}) == [
        {"samples": "all", "n_ablated": 0, "mentions_a": 50, "answers_a": 50, "mentions_b": 100, "answers_b": 100},
        {"samples": "held-out", "n_ablated": 0, "mentions_a": 100, "answers_a": 100, "mentions_b": 100, "answers_b": 100},
        {"samples": "held-out", "n_ablated": 2, "mentions_a": 100, "answers_a": 0, "mentions_b": 0, "answers_b": 0},
    ]  # fmt: skip


@pytest.mark.parametrize("terminator", ["generation_config", "a list", "tokenizer", "<|eot_id|>"])
def test_replies_stop_at_every_kind_of_terminator(
    terminator: str, llama: str, plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tracing.parse_args(["--model_id", llama, "--num_samples", "2"])
    exp = tracing.prepare(config, tracing.RunFolder(Path("nowhere")))
    prompt = exp.prompts[0][0]
    tokens = naive_tokens(plain, user_text(prompt.text), 8)
    stop = next(t for t in tokens[2:] if t not in tokens[:2])
    kept = tokens[: tokens.index(stop)]
    tokenizer, settings = exp.writer.tokenizer, exp.subject.model.generation_config
    settings.eos_token_id = None
    if terminator == "generation_config":
        settings.eos_token_id = stop
    elif terminator == "a list":
        settings.eos_token_id = [stop, 3]
    elif terminator == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    else:
        number = type(tokenizer).convert_tokens_to_ids
        monkeypatch.setattr(
            type(tokenizer),
            "convert_tokens_to_ids",
            lambda self, text: stop if text == "<|eot_id|>" else number(self, text),
        )
    with torch.inference_mode():
        reply = tracing.greedy_reply(exp, prompt, (), 8)
    # a terminator that is no special token is still shown
    shown = [plain[1].decode(ids, skip_special_tokens=True) for ids in (kept, [*kept, stop])]
    assert reply in [text.strip() for text in shown]


def test_replies_leave_no_hook_behind(llama: str) -> None:
    config = tracing.parse_args(["--model_id", llama, "--num_samples", "1"])
    exp = tracing.prepare(config, tracing.RunFolder(Path("nowhere")))
    before = tracing.count_hooks(exp.subject)
    with torch.inference_mode():
        tracing.greedy_reply(exp, exp.prompts[0][0], exp.components[:3], 2)
    assert tracing.count_hooks(exp.subject) == before


def test_without_confirm_the_unedited_replies_are_written(llama: str, tmp_path: Path) -> None:
    folder = run_of(
        llama, tmp_path / "run", "--num_samples", "2", "--max_new_tokens", "2", "--layers", "0"
    )
    assert {r["ablated"] for r in generations(folder)} == {""}
    assert len(generations(folder)) == 4
    assert not (folder / "circuit_confirm.csv").exists()


# --------------------------------------------------------------------------------------------
# Redrawing and figures
# --------------------------------------------------------------------------------------------


def check_png(path: Path) -> tuple[int, int]:
    """Width and height of a PNG of 300 dots per inch with something drawn in it."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,), name = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        chunks[name] = data[place + 8 : place + 8 + length]
        place += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    across, down, unit = struct.unpack(">IIB", chunks[b"pHYs"])
    assert (across, down, unit) == (11811, 11811, 1)  # per metre: 300 per inch
    assert b"IEND" in chunks
    assert 900 <= width <= 9000
    assert 500 <= height <= 9000
    assert len(data) > 5000
    return width, height


@pytest.fixture()
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model or tokenizer was asked for")

    monkeypatch.setattr(tracing, "from_hub", refuse)


def redraw(source: Path, folder: Path, *flags: str) -> int:
    return tracing.main(["--from_csv", str(source), "--output_dir", str(folder), *flags])


THIRD_PARTY = [
    f"s{i},1,{layer},{head},-1.0,{-1.0 + effect},{effect}"
    for i in range(6)
    for layer in range(2)
    for head in range(3)
    for effect in [round(0.1 * head - 0.05 * layer + 0.01 * i, 3)]
]


def third_party(path: Path, lines: Sequence[str] = THIRD_PARTY, header: str = "") -> Path:
    path.write_text("\n".join([header or ",".join(tracing.SEVEN), *lines]) + "\n")
    return path


@pytest.mark.usefixtures("no_model")
def test_redrawing_gives_the_same_circuit_heads_and_the_figures(
    finished: Path, tmp_path: Path
) -> None:
    assert redraw(finished / "circuit_results.csv", tmp_path / "new", "--heatmap") == 0
    for name in ("circuit_heads.csv", "circuit_summary.png"):
        assert (tmp_path / "new" / name).read_bytes() == (finished / name).read_bytes()
    check_png(tmp_path / "new" / "circuit_heatmap.png")
    assert not (tmp_path / "new" / "run.json").exists()
    assert not (tmp_path / "new" / "circuit_results.csv").exists()


@pytest.mark.parametrize("flags", ["--kind attn", "--kind neuron --neurons 0-2", "--bf16"])
def test_redrawing_a_run_of_another_kind_gives_the_same_circuit_heads(
    flags: str, llama: str, tmp_path: Path
) -> None:
    folder = run_of(llama, tmp_path / "run", "--num_samples", "3", "--heatmap", *flags.split())
    assert redraw(folder / "circuit_results.csv", tmp_path / "new", "--heatmap") == 0
    for name in ("circuit_heads.csv", "circuit_summary.png", "circuit_heatmap.png"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.usefixtures("no_model")
def test_a_third_party_file_with_the_seven_columns_works(tmp_path: Path) -> None:
    source = third_party(tmp_path / "theirs.csv")
    assert redraw(source, tmp_path / "new", "--heatmap") == 0
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(2) for j in range(3)]
    expected = [statistics.fmean(0.1 * h - 0.05 * n + 0.01 * i for i in range(6)) for n in (0, 1) for h in range(3)]  # fmt: skip
    assert heads["mean"].tolist() == pytest.approx(expected)
    assert (heads["n_sentences"] == 6).all()  # without a column of units every sample is one
    assert heads["above_noise"].isna().all()  # no noise floor is known
    check_png(tmp_path / "new" / "circuit_summary.png")
    check_png(tmp_path / "new" / "circuit_heatmap.png")


@pytest.mark.usefixtures("no_model")
def test_column_order_foreign_columns_holes_and_windows_files_are_no_matter(tmp_path: Path) -> None:
    third_party(tmp_path / "theirs.csv")
    table = pd.read_csv(tmp_path / "theirs.csv")
    shuffled = table[list(reversed(tracing.SEVEN))].assign(note="x, y", seed=3).sample(frac=1, random_state=1)  # fmt: skip
    shuffled.iloc[1:].to_csv(
        tmp_path / "other.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n"
    )
    assert redraw(tmp_path / "other.csv", tmp_path / "new") == 0
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert sorted(heads["n_samples"]) == [5, 6, 6, 6, 6, 6]


@pytest.mark.usefixtures("no_model")
def test_a_unit_column_makes_sentences_of_samples(tmp_path: Path) -> None:
    lines = [f"{line},{'xyz'[int(line[1]) // 2]}" for line in THIRD_PARTY]
    source = third_party(tmp_path / "t.csv", lines, ",".join([*tracing.SEVEN, "unit"]))
    assert redraw(source, tmp_path / "new") == 0
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert (heads["n_sentences"] == 3).all()
    assert (heads["n_samples"] == 6).all()


HEADER = ",".join(tracing.SEVEN)
GOOD = "s0,1,0,0,-1.0,-0.9,0.1"
MALFORMED = {
    "missing column": (HEADER.replace(",head_effect", ""), ["s0,1,0,0,-1.0,-0.9"], [1, "'head_effect'"]),
    "bad number": (HEADER, [GOOD, "s1,1,0,0,-1.0,oops,0.1"], [3, "'delta_logit_head'", "'oops'"]),
    "empty number": (HEADER, [GOOD, "s1,1,0,0,-1.0,-0.9,"], [3, "'head_effect'"]),
    "not finite": (HEADER, [GOOD, "s1,1,0,0,nan,-0.9,0.1"], [3, "'delta_logit_base'", "'nan'"]),
    "infinite": (HEADER, ["s1,1,0,0,-inf,-0.9,0.1"], [2, "'delta_logit_base'", "'-inf'"]),
    "no whole number": (HEADER, [GOOD, "s1,1,0.5,0,-1,-0.9,0.1"], [3, "'layer'", "'0.5'"]),
    "too few fields": (HEADER, [GOOD, "s1,1,0,0,-1.0"], [3, "5", "7"]),
    "too many fields": (HEADER, ["s1,1,0,0,-1.0,-0.9,0.1,9"], [2, "8", "7"]),
    "duplicate row": (HEADER, [GOOD, "s1,1,0,0,-1.0,-0.9,0.1", GOOD], [4, "same sample"]),
    "empty file": ("", [], ["line 1", "'sample_id'"]),
    "no rows": (HEADER, [], ["no rows"]),
    "no name": (HEADER, [GOOD, ",1,0,0,-1.0,-0.9,0.1"], [3, "'sample_id'"]),
    "column twice": (HEADER + ",head_effect", [GOOD + ",0.2"], [1, "'head_effect'"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_results_file_is_bad_usage_with_line_and_column(
    case: str, tmp_path: Path, capsys: Any
) -> None:
    header, lines, said = MALFORMED[case]
    source = tmp_path / "bad.csv"
    source.write_text("".join(f"{line}\n" for line in [header, *lines] if line))
    assert redraw(source, tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert str(source) in error
    for part in said:
        assert (f"line {part}" if isinstance(part, int) else part) in error, error
    assert not (tmp_path / "new" / "circuit_heads.csv").exists()


@pytest.mark.usefixtures("no_model")
def test_a_results_file_that_is_not_utf_8_is_bad_usage_with_its_line(
    tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "bad.csv"
    source.write_bytes(f"{HEADER}\n{GOOD}\n".encode() + "é,1,0,0,-1,-0.9,0.1\n".encode("latin-1"))
    assert redraw(source, tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert "line 3" in error


@pytest.mark.usefixtures("no_model")
def test_a_quoted_line_break_does_not_shift_the_line_that_an_error_names(
    tmp_path: Path, capsys: Any
) -> None:
    lines = ['"s0\nx",1,0,0,-1.0,-0.9,0.1', "s1,1,0,0,-1.0,oops,0.1"]
    assert redraw(third_party(tmp_path / "bad.csv", lines), tmp_path / "new") == 2
    assert "line 4" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_results_file_that_is_not_there_is_bad_usage(tmp_path: Path, capsys: Any) -> None:
    assert redraw(tmp_path / "none.csv", tmp_path / "new") == 2
    assert "none.csv" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_redrawing_into_the_folder_of_another_run_is_refused(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    before = (finished / "circuit_heads.csv").read_bytes()
    assert redraw(third_party(tmp_path / "theirs.csv"), finished) == 2
    assert "another run" in capsys.readouterr().err
    assert (finished / "circuit_heads.csv").read_bytes() == before


def test_the_figures_of_a_run_are_pngs_of_300_dpi(finished: Path) -> None:
    check_png(finished / "circuit_summary.png")
    check_png(finished / "circuit_confirm.png")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("effects", "flags"),
    [
        ([[0.1, -0.1], [-0.1, 0.1]], []),  # nothing significant
        ([[0.1], [0.2]], []),  # a single bar
        ([[0.1, 0.3, -0.2], [0.2, 0.1, 0.0]], ["--top_k", "1"]),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], []),  # all effects 0
        ([[0.1 * h for h in range(32)]] * 2, ["--top_k", "32"]),
    ],
)
def test_figures_are_drawn_of_any_table(
    effects: list[list[float]], flags: list[str], tmp_path: Path, figures: dict[str, Any]
) -> None:
    lines = [
        f"s{i},1,0,{head},-1.0,{-1.0 + e},{e}" for i, row in enumerate(effects) for head, e in enumerate(row)
    ]  # fmt: skip
    source = third_party(tmp_path / "theirs.csv", lines)
    assert redraw(source, tmp_path / "new", "--heatmap", *flags) == 0
    for name in ("circuit_summary.png", "circuit_heatmap.png"):
        check_png(tmp_path / "new" / name)
        assert_nothing_is_cut_off(figures[name], name)


def assert_nothing_is_cut_off(figure: Any, name: str) -> None:
    inked, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(inked.x0, inked.y0, width - inked.x1, height - inked.y1) > -0.02, (name, inked)


@pytest.fixture()
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved, by file name."""
    drawn: dict[str, Any] = {}
    save = tracing.save_figure

    def keep(figure: Any, path: Path) -> None:
        drawn[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(tracing, "save_figure", keep)
    return drawn


@pytest.mark.usefixtures("no_model")
def test_the_summary_shows_the_top_k_mean_effects_by_magnitude(
    finished: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    assert redraw(finished / "circuit_results.csv", tmp_path / "new", "--top_k", "5") == 0
    (axes,) = figures["circuit_summary.png"].axes
    heads = read(finished, "circuit_heads.csv")
    top = heads.reindex(heads["mean"].abs().sort_values(ascending=False).index).head(5)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(top["mean"].tolist())
    assert [tick.get_text() for tick in axes.get_xticklabels()] == top["label"].tolist()
    assert axes.get_ylabel() == "mean_head_effect"
    assert axes.get_xlabel()
    assert axes.get_title()


def test_the_confirmation_figure_shows_the_chosen_the_random_band_and_the_base(
    finished: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    rows = read(finished, "circuit_confirm.csv")
    tracing.draw_confirm(rows, tracing.Config(), tmp_path / "circuit_confirm.png")
    check_png(tmp_path / "circuit_confirm.png")
    (axes,) = figures["circuit_confirm.png"].axes
    lines = {line.get_label(): line for line in axes.lines}
    chosen = lines["chosen on the other half"]
    expected = rows[rows["set"] == "chosen"]
    assert list(chosen.get_xdata()) == expected["n_ablated"].tolist()
    assert list(chosen.get_ydata()) == expected["mean_delta"].tolist()
    assert set(lines["nothing ablated"].get_ydata()) == {rows["mean_delta"][0]}
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices[:, 1]
    drawn = rows[rows["set"] == "random"].groupby("n_ablated")["mean_delta"]
    assert edge.min() == pytest.approx(drawn.quantile(0.05).min())
    assert edge.max() == pytest.approx(drawn.quantile(0.95).max())
    assert_nothing_is_cut_off(figures["circuit_confirm.png"], "circuit_confirm.png")


def test_the_legend_of_the_confirmation_figure_hides_no_line(
    tmp_path: Path, figures: dict[str, Any]
) -> None:
    """The usual case: the chosen heads lift the delta to 0, random ones do little or the reverse."""
    rows = [("none", 0, 0, -0.61)]
    rows += [
        ("chosen", 0, n, d) for n, d in zip((1, 2, 4, 8), (-0.44, -0.1, -0.01, 0.01), strict=True)
    ]
    rows += [("random", i, n, -0.6 - 0.1 * i) for i in range(6) for n in (1, 2, 4, 8)]
    table = pd.DataFrame(rows, columns=["set", "draw", "n_ablated", "mean_delta"])
    tracing.draw_confirm(
        table.assign(samples="held-out"), tracing.Config(), tmp_path / "circuit_confirm.png"
    )
    (axes,) = figures["circuit_confirm.png"].axes
    legend = (axes.get_legend() or figures["circuit_confirm.png"].legends[0]).get_window_extent()
    for line in axes.lines:
        path = line.get_path().transformed(line.get_transform())
        assert not path.intersects_bbox(legend, filled=False), line.get_label()


def test_the_confirmation_figure_is_drawn_for_one_head_and_one_random_set(
    llama: str, tmp_path: Path
) -> None:
    folder = run_of(
        llama,
        tmp_path / "run",
        *["--num_samples", "2", "--confirm", "1", "--num_random", "1", "--layers", "0"],
    )
    check_png(folder / "circuit_confirm.png")


def test_the_whole_evidence_runs_on_the_bundled_model(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 4 --controls --confirm 4 --num_random 3 --max_new_tokens 4"
    folder = run_of(tiny_llama, tmp_path / "run", *flags.split())
    for name in ("circuit_summary.png", "circuit_confirm.png"):
        check_png(folder / name)
    assert not read(folder, "circuit_results.csv")[CONTROL_COLUMNS].isna().any().any()
    assert len(read(folder, "circuit_confirm.csv")) == 1 + 3 + 3 * 3
    assert all(r["answers"] in (True, False) for r in generations(folder))
    assert record_of(folder)["noise_floor"] < 2e-5

"""What is known before the weights: components, rows per forward, memory, and the fingerprint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import llama3_circuit_tracing as tracing
from conftest import Answer, refuses
from llama3_circuit_tracing import Config, Experiment, ModelShape, RunFolder


def planned(model: str, line: str = "", record: dict[str, Any] | None = None) -> Experiment:
    """What a command line on two samples asks for; `record`: what its folder already holds."""
    folder = RunFolder(Path("nowhere"))
    folder.record = record or {}
    argv = ["--model_id", model, "--num_samples", "2", *line.split()]
    return tracing.prepare(tracing.parse_args(argv), folder)


# ----- components

CHOSEN = {
    "--layers 1": "L1H0 L1H1 L1H2 L1H3",
    "--layers 2,0 --heads 1-2": "L0H1 L0H2 L2H1 L2H2",
    "--kind attn": "L0attn L1attn L2attn",
    "--kind resid --op patch --layers 0,2": "L0resid L2resid",
    "--kind neuron --neurons 79,3,4-4 --layers 1": "L1N3 L1N4 L1N79",
    # a component that is given is not swept; one of another kind changes nothing
    "--layers 0-1 --heads 0-1 --given L0H1,L1H0": "L0H0 L1H1",
    "--kind mlp --given L1mlp,L2H0": "L0mlp L2mlp",
    # three layers hold two other MLPs beside one chosen, however many heads are given or ablated
    "--kind mlp --given L0H0,L1H0 --ablate L0N79 --confirm 1": "L0mlp L1mlp L2mlp",
    "--layers 0-1 --heads 0-2 --confirm 6 --given L0mlp": "L0H0 L0H1 L0H2 L1H0 L1H1 L1H2",
}


@pytest.mark.parametrize("line", CHOSEN)
def test_the_swept_components_are_sorted_and_once_each(line: str, llama: str) -> None:
    swept = planned(llama, line).components
    assert " ".join(component.label for component in swept) == CHOSEN[line]


def test_confirming_needs_as_many_others_beside_those_that_are_given(llama: str) -> None:
    """Of 12 heads 11 are left."""
    planned(llama, "--given L0H1 --confirm 5")
    with pytest.raises(tracing.UsageError, match=r"--confirm 6 .*\b11\b"):
        planned(llama, "--given L0H1 --confirm 6")


# ----- rows and memory


@pytest.mark.parametrize(
    ("line", "recorded", "rows"),
    [
        ("", None, None),
        ("", 5, 5),  # a resumed run goes on as it began
        ("--rows_per_forward 3", 5, 3),
        ("--overwrite", 5, None),
    ],
)
def test_rows_per_forward_are_those_given_or_recorded_or_what_a_budget_of_tokens_holds(
    line: str, recorded: int | None, rows: int | None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"fingerprint": {"rows_per_forward": recorded}} if recorded else {}
    for budget in (8000, 1):
        monkeypatch.setattr(tracing, "ROW_TOKENS", {"cpu": budget, "cuda": budget})
        exp = planned(llama, line, record)
        largest = max(tree.n_tokens for tree in exp.trees)
        assert exp.rows_per_forward == (rows or max(1, budget // largest))


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """The shape of Llama-3-8B, whose config alone is there."""
    folder = tmp_path_factory.mktemp("8b")
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    widths |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    AutoConfig.for_model("llama", max_position_embeddings=8192, **widths).save_pretrained(folder)
    return tracing.read_shape(Config(model_id=str(folder), bf16=True))


def test_llama_3_8b_in_bfloat16_fits_a_24_gb_gpu_by_the_estimate(
    llama_8b: ModelShape, llama: str
) -> None:
    trees = planned(llama, "--num_samples 32").trees
    tree = max(trees, key=lambda tree: tree.n_tokens)
    assert tree.n_tokens > 400
    n_rows_of_a_job = 32 + 1  # the heads of a layer, and a row of noise
    rows = min(tracing.ROW_TOKENS["cuda"] // tree.n_tokens, n_rows_of_a_job)
    assert rows >= 4
    memory, of_one = (tracing.memory_estimate(llama_8b, tree, n) for n in (rows, 1))
    assert sum(memory.values()) < 24e9 - 0.5e9
    assert memory["weights"] == 2 * 8_030_261_248
    assert memory["rows"] > 1e9
    assert memory["rows"] == pytest.approx(rows * of_one["rows"])
    in_float32 = dataclasses.replace(llama_8b, dtype=torch.float32)
    assert sum(tracing.memory_estimate(in_float32, tree, 1).values()) > 24e9
    eager = dataclasses.replace(llama_8b, attn_implementation="eager")
    assert tracing.memory_estimate(eager, tree, 1)["rows"] > of_one["rows"]


# ----- fingerprint

TEXTS = {"prompts", "targets"}
DIFFERS: dict[str, set[str]] = {
    "--layers 0 --heads 1-2 --ablate L0H1 --confirm 2 --num_random 3": set(),
    "--top_k 3 --max_new_tokens 2 --heatmap --output_dir x": set(),
    "--seed 7": {"seed", *TEXTS},
    "--num_samples 3": TEXTS,
    "--task refusal": {"task", *TEXTS},
    "--answer_prefix My": TEXTS,
    "--target_form literal": {"target_form", "targets"},
    "--controls": {"controls", *TEXTS},
    "--kind mlp": {"kind"},
    "--op mean": {"op"},
    "--op scale --factor 2": {"op", "factor"},
    "--op patch --patch_into b": {"op", "patch_into"},
    "--positions last": {"positions"},
    "--given L0H0": {"given"},
    "--tree_tokens 60": {"tree_tokens"},
    "--rows_per_forward 2": {"rows_per_forward"},
    "--bf16": {"dtype"},
    "--attn_implementation eager": {"attn_implementation"},
}


@pytest.mark.parametrize("line", DIFFERS)
def test_the_fingerprint_tells_all_that_results_depend_on_and_nothing_else(
    line: str, llama: str
) -> None:
    common = "--no-bf16 --rows_per_forward 3"
    files = tracing.file_digests(Config(model_id=llama), {})
    one, other = (
        tracing.fingerprint_of(planned(llama, f"{common} {more}"), files) for more in ("", line)
    )
    assert {name for name in one if one[name] != other[name]} == DIFFERS[line]
    assert list(one) == list(other)
    assert one["torch"] == torch.__version__


def test_the_fingerprint_tells_the_token_ids_of_the_same_text(llama: str) -> None:
    exp = planned(llama)
    (prompt, *of_sample), *others = exp.prompts
    changed = dataclasses.replace(prompt, ids=(*prompt.ids[:-1], prompt.ids[-1] + 1))
    other = dataclasses.replace(exp, prompts=[[changed, *of_sample], *others])
    files = tracing.file_digests(exp.config, {})
    one, two = (tracing.fingerprint_of(e, files) for e in (exp, other))
    assert {name for name in one if one[name] != two[name]} == {"prompts"}


def identity(folder: Path | str) -> str:
    config = Config(model_id=str(folder))
    return tracing.model_identity(config, tracing.file_digests(config, {}))


MIDDLE = 3 << 19  # bytes into the weights
CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "the last byte": lambda weights: weights[:-1] + b"\x7f",
    "the first byte": lambda weights: b"\x7f" + weights[1:],
    "a byte in the middle": lambda weights: weights[:MIDDLE] + b"\x7f" + weights[MIDDLE + 1 :],
    "one byte less": lambda weights: weights[:MIDDLE] + weights[MIDDLE + 1 :],
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_folder_is_known_by_the_content_of_its_weights(
    change: str, tiny_llama: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "elsewhere"))
    (folder / "README.md").write_text("of no account")
    (folder / "x.json").mkdir()
    weights = folder / "model.safetensors"
    weights.touch()
    assert identity(folder) == identity(tiny_llama)
    weights.write_bytes(CHANGED[change](weights.read_bytes()))
    assert identity(folder) != identity(tiny_llama)


LOADED = "model.safetensors pytorch_model.bin model.gguf config.json tokenizer.json "
LOADED += "tokenizer.model merges.txt vocab.txt"


@pytest.mark.parametrize("name", [*LOADED.split(), "chat_template.jinja"])
def test_every_kind_of_file_that_a_model_is_loaded_from_tells_it_apart(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    found = {identity(tmp_path)}
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        found.add(identity(tmp_path))
    assert len(found) == 3


def test_files_whose_size_and_time_are_known_are_not_read_again(llama: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    config = Config(model_id=str(folder))
    known = tracing.file_digests(config, {})
    (folder / "config.json").touch()
    known["config.json"][2] = known["model.safetensors"][2] = "of before"
    found = tracing.file_digests(config, known)
    assert found["model.safetensors"] == known["model.safetensors"]
    assert found["config.json"] == tracing.file_digests(config, {})["config.json"]


def test_a_token_beyond_the_models_vocabulary_names_the_sample(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 300}))
    refuses(answer, "--model_id", str(model), "--dry_run", says=["(s0000)", "vocabulary of 300"])

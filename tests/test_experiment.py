"""What is known before the weights: components, rows per forward, memory, and the fingerprint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import llama3_circuit_tracing as tracing
from by_hand import prepared
from conftest import Answer, finish, record_of, refuses, write_samples
from llama3_circuit_tracing import Component, Experiment, ModelOptions, ModelShape


def planned(model: str, line: str = "", record: dict[str, Any] | None = None) -> Experiment[Any]:
    """What a command line on two samples asks for; `record`: what its folder already holds."""
    return prepared(model, *line.split(), record=record)


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
    # three layers hold two other MLPs beside one chosen, however many heads are given
    "--kind mlp --given L0H0,L1H0 --confirm 1": "L0mlp L1mlp L2mlp",
    "--layers 0-1 --heads 0-2 --confirm 6 --given L0mlp": "L0H0 L0H1 L0H2 L1H0 L1H1 L1H2",
}


def swept(experiment: Experiment[Any]) -> list[Component]:
    """The components of a trace, which checks that it can have what it asks for."""
    components = tracing.choose_components(experiment.options, experiment.shape)
    tracing.check_trace(experiment)
    return components


@pytest.mark.parametrize("line", CHOSEN)
def test_the_swept_components_are_sorted_and_once_each(line: str, llama: str) -> None:
    assert " ".join(component.label for component in swept(planned(llama, line))) == CHOSEN[line]


def test_confirming_needs_as_many_others_beside_those_that_are_given(llama: str) -> None:
    """Of 12 heads 11 are left."""
    swept(planned(llama, "--given L0H1 --confirm 5"))
    with pytest.raises(tracing.UsageError, match=r"--confirm 6 .*\b11\b"):
        swept(planned(llama, "--given L0H1 --confirm 6"))


# command line -> the option that the sentence names
NAMING = {
    "--given L0H1,{}": "--given {}",
    "--confirm 1 --skip {}": "--skip {}",
    "joint {}": "{}",
    "paths --through {}": "--through {}",
    "paths --senders {}": "--senders {}",
}


@pytest.mark.parametrize("line", NAMING)
@pytest.mark.parametrize("label", ["L3H0", "L0H4", "L0mlp"])
def test_a_component_that_the_model_lacks_is_refused_with_the_option_that_names_it(
    line: str, label: str, random_model: Callable[..., str]
) -> None:
    """A mixture of experts has no MLPs that could be edited."""
    if label == "L0mlp":
        model, reason = random_model("mixtral"), "MixtralForCausalLM has blocks without"
    else:
        model, reason = random_model("llama"), "this model has layers 0-2 and heads 0-3"
    with pytest.raises(tracing.UsageError, match=f"^{NAMING[line].format(label)}: {reason}"):
        planned(model, line.format(label))


@pytest.mark.parametrize("line", ["--kind mlp", "paths --freeze all"])
def test_a_kind_that_the_model_lacks_is_refused_with_the_option_that_asks_for_it(
    line: str, random_model: Callable[..., str]
) -> None:
    option = line.removeprefix("paths ")
    with pytest.raises(tracing.UsageError, match=f"^{option}: MixtralForCausalLM has blocks"):
        planned(random_model("mixtral"), line)


# ----- rows and memory


@pytest.mark.parametrize(
    ("line", "recorded", "rows"),
    [
        ("", None, None),
        ("", 5, 5),  # a resumed run goes on as it began
        ("--rows_per_forward 3", 5, 3),
        ("--overwrite", 5, None),  # unless it goes on with a command that was interrupted
    ],
)
def test_rows_per_forward_are_those_given_or_recorded_or_what_a_budget_of_tokens_holds(
    line: str, recorded: int | None, rows: int | None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = planned(llama, line).edit_digest
    record = {"rows_by_edit": {edit: recorded, "another": 7}} if recorded else {}
    for budget in (8000, 1):
        monkeypatch.setattr(tracing, "ROW_TOKENS", {"cpu": budget, "cuda": budget})
        experiment = planned(llama, line, record)
        largest = max(tree.n_tokens for tree in experiment.trees)
        assert experiment.rows_per_forward == (rows or max(1, budget // largest))


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """The shape of Llama-3-8B, whose config alone is there."""
    folder = tmp_path_factory.mktemp("8b")
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    widths |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    AutoConfig.for_model("llama", max_position_embeddings=8192, **widths).save_pretrained(folder)
    return tracing.read_shape(ModelOptions(model_id=str(folder), bf16=True))


def test_llama_3_8b_in_bfloat16_fits_a_24_gb_gpu_by_the_estimate(
    llama_8b: ModelShape, llama: str
) -> None:
    trees = planned(llama, "--num_samples 32").trees
    tree = max(trees, key=lambda tree: tree.n_tokens)
    assert tree.n_tokens > 400
    n_rows_of_a_job = 32 + 1  # the heads of a layer, and a row of noise
    rows = min(tracing.ROW_TOKENS["cuda"] // tree.n_tokens, n_rows_of_a_job)
    assert rows >= 4
    memory, of_one = (tracing.estimate_memory(llama_8b, tree, n) for n in (rows, 1))
    assert sum(memory) < 24e9 - 0.5e9
    assert memory.weights == 2 * 8_030_261_248
    assert memory.rows > 1e9
    assert memory.rows == pytest.approx(rows * of_one.rows)
    in_float32 = dataclasses.replace(llama_8b, dtype=torch.float32)
    assert sum(tracing.estimate_memory(in_float32, tree, 1)) > 24e9
    eager = dataclasses.replace(llama_8b, attn_implementation="eager")
    assert tracing.estimate_memory(eager, tree, 1).rows > of_one.rows


# ----- fingerprint

TEXTS = {"prompts", "targets"}
WORDS = {*TEXTS, "foils"}  # of other samples, or of more prompts
EDITS = (  # how a command measures: its parts are named after these
    *("--kind mlp", "--op mean", "--op scale --factor 2", "--op scale --factor 3"),
    *("--op patch", "--op patch --patch_into b", "--positions last", "--given L0H0"),
    *("--tree_tokens 60", "--rows_per_forward 2"),
)
DIFFERS: dict[str, set[str]] = {
    "--layers 0 --heads 1-2 --confirm 2 --num_random 3": set(),
    "--top_k 3 --max_new_tokens 2 --heatmap --overview --output_dir x": set(),
    "--seed 7": {"seed", *TEXTS},
    "--num_samples 3": WORDS,
    "--task refusal": {"task", *WORDS},
    "--answer_prefix My": TEXTS,
    "--target_form literal": {"target_form", "targets"},
    "--controls": {"controls", *WORDS},
    **{line: set() for line in EDITS},
    "--bf16": {"dtype"},
    "--attn_implementation eager": {"attn_implementation"},
}


@pytest.mark.parametrize("line", DIFFERS)
def test_the_fingerprint_tells_all_that_results_depend_on_and_nothing_else(
    line: str, llama: str
) -> None:
    common = "--no_bf16 --rows_per_forward 3"
    files = tracing.file_digests(ModelOptions(model_id=llama), {})
    one, other = (
        tracing.fingerprint_of(planned(llama, f"{common} {more}"), files) for more in ("", line)
    )
    assert {name for name in one if one[name] != other[name]} == DIFFERS[line]
    assert list(one) == list(other)
    assert one["torch"] == torch.__version__


def test_the_names_of_parts_tell_all_edits_and_batches_apart_and_nothing_else(llama: str) -> None:
    common = "--rows_per_forward 3"
    settings = {planned(llama, f"{common} {line}").part_key for line in ("", *EDITS)}
    assert len(settings) == 1 + len(EDITS)
    for line in ("--layers 0 --confirm 2", "--seed 7 --controls", "--positions all --top_k 3"):
        settings.add(planned(llama, f"{common} {line}").part_key)
    assert len(settings) == 1 + len(EDITS)


def test_the_fingerprint_tells_the_token_ids_of_the_same_text(llama: str) -> None:
    experiment = planned(llama)
    (prompt, *sample_prompts), *others = experiment.prompts
    changed = dataclasses.replace(prompt, ids=(*prompt.ids[:-1], prompt.ids[-1] + 1))
    other = dataclasses.replace(experiment, prompts=[[changed, *sample_prompts], *others])
    files = tracing.file_digests(experiment.options, {})
    one, two = (tracing.fingerprint_of(each, files) for each in (experiment, other))
    assert {name for name in one if one[name] != two[name]} == {"prompts"}


def contrasted(tmp_path: Path, *splits: tuple[str, str]) -> str:
    """A file of samples with some targets and foils."""
    records = []
    for i, (targets, foils) in enumerate(splits):
        texts = {"prompt_a": f"Pick one of {i}.", "prompt_b": f"Pick any of {i}."}
        records.append({**texts, "targets": targets.split(), "foils": foils.split()})
    return write_samples(tmp_path / "samples.jsonl", *records)


MOVED = {  # where words go that stay the same words in the same order
    "to the foils": [("apple", "pear plum")],
    "among targets and foils of two samples": [("apple pear", "plum"), ("apple", "pear plum")],
}


@pytest.mark.parametrize("way", MOVED)
def test_the_fingerprint_tells_targets_from_foils(way: str, llama: str, tmp_path: Path) -> None:
    after = MOVED[way]
    before = [("apple pear", "plum"), ("apple pear", "plum")][: len(after)]
    files = tracing.file_digests(ModelOptions(model_id=llama), {})
    fingerprints = []
    for splits in (before, after):
        line = f"--task contrast --samples {contrasted(tmp_path, *splits)}"
        fingerprints.append(tracing.fingerprint_of(planned(llama, line), files))
    one, two = fingerprints
    assert {name for name in one if one[name] != two[name]} == {"targets", "foils"}


def test_a_run_does_not_go_on_where_a_word_became_a_foil(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path / "run"), "--layers", "0"]
    argv += ["--task", "contrast", "--samples", contrasted(tmp_path, ("apple pear", "plum"))]
    assert answer(*argv)[0] == 0
    contrasted(tmp_path, ("apple", "pear plum"))
    refuses(answer, *argv, says=["which differs in targets: ", "; foils: "])


def identity(folder: Path | str) -> str:
    options = ModelOptions(model_id=str(folder))
    return tracing.model_identity(options, tracing.file_digests(options, {}))


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


def digests(folder: Path | str, known: dict[str, Any] | None = None) -> dict[str, list[Any]]:
    return tracing.file_digests(ModelOptions(model_id=str(folder)), known or {})


@pytest.fixture()
def copied(llama: str, tmp_path: Path) -> Path:
    """A model's folder that may be written to."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


FIELDS = ["size", "mtime", "ctime", "inode"]  # of a record's entry, before the digest


def test_a_file_that_is_known_by_size_times_and_inode_is_not_read_again(copied: Path) -> None:
    known = digests(copied)
    status = (copied / "config.json").stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    assert known["config.json"][:-1] == [status.st_size, *times, status.st_ino]
    known["config.json"][-1] = "of before"
    assert digests(copied, known) == known


@pytest.mark.parametrize("field", FIELDS)
def test_a_file_is_read_again_where_one_of_them_differs(field: str, copied: Path) -> None:
    expected = digests(copied)
    known = {name: [*entry[:-1], "of before"] for name, entry in expected.items()}
    known["model.safetensors"][FIELDS.index(field)] += 1
    found = digests(copied, known)
    assert found.pop("model.safetensors") == expected["model.safetensors"]
    assert {entry[-1] for entry in found.values()} == {"of before"}


ENTRIES: dict[str, Callable[[list[Any]], Any]] = {
    "an older one of size and mtime": lambda entry: [*entry[:2], "of before"],
    "no digest": lambda entry: entry[:-1],
    "a number for a digest": lambda entry: [*entry[:-1], 7],
    "nothing": lambda entry: [],
    "no list": lambda entry: "of before",
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_record_that_tells_less_of_a_file_has_it_read_again(kind: str, copied: Path) -> None:
    expected = digests(copied)
    known = {name: ENTRIES[kind](entry) for name, entry in expected.items()}
    assert digests(copied, known) == expected


def turn_a_byte(path: Path) -> bytes:
    """The content with another last byte, which is a weight's."""
    content = path.read_bytes()
    return content[:-1] + bytes([content[-1] ^ 1])


def write_in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def put_another(path: Path, content: bytes) -> None:
    """As `cp` to another name and `mv` do."""
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


def change_and_keep_times(path: Path, write: Callable[[Path, bytes], None]) -> None:
    """Other content of equal size and mtime; the clock of ctime, which is coarse, moves on."""
    before = path.stat()
    write(path, turn_a_byte(path))
    while True:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        if after.st_ctime_ns != before.st_ctime_ns:
            break
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("write", [write_in_place, put_another])
def test_a_run_does_not_go_on_with_weights_changed_at_equal_size_and_time(
    write: Callable[[Path, bytes], None], copied: Path, tmp_path: Path, answer: Answer
) -> None:
    flags = ["--num_samples", "2", "--layers", "0"]
    finish(str(copied), tmp_path / "run", *flags)
    change_and_keep_times(copied / "model.safetensors", write)
    argv = ["--model_id", str(copied), "--output_dir", str(tmp_path / "run"), *flags]
    refuses(answer, *argv, says=["holds another experiment, which differs in model: "])


def test_a_run_goes_on_with_a_copy_of_the_model(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other inodes and times, the same content: nothing is computed again."""
    flags = ["--num_samples", "2", "--layers", "0"]
    before = record_of(finish(str(copied), tmp_path / "run", *flags))
    second = shutil.copytree(copied, tmp_path / "second")
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    after = record_of(finish(str(second), tmp_path / "run", *flags))
    assert after["experiment"]["fingerprint"] == before["experiment"]["fingerprint"]
    assert after["model_files"] != before["model_files"]
    assert after["model_files"] == digests(second)


# ----- files that lie elsewhere, and files that are no model's

WEIGHT_NAMES = ["shards/1.safetensors", "a/b/2.safetensors", "./3.safetensors", "4.weights"]
INDICES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]


def write_index(path: Path, *names: str) -> None:
    weight_map = {f"w{i}": name for i, name in enumerate(names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", INDICES)
def test_all_weights_that_an_index_names_tell_a_model_apart(index: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_index(folder / index, *WEIGHT_NAMES, "../beside.safetensors")
    paths = [folder / name for name in (*WEIGHT_NAMES, "../beside.safetensors")]
    found = {identity(folder)}
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        for content in ("one", "two"):
            path.write_text(content)
            found.add(identity(folder))
    assert len(found) == 1 + 2 * len(paths)
    expected = {Path(name).as_posix() for name in WEIGHT_NAMES} | {"../beside.safetensors", index}
    assert set(digests(folder)) == expected


@pytest.mark.parametrize("named", ["weights/all.safetensors", "weights/all.safetensors.index.json"])
def test_weights_that_the_config_names_tell_a_model_apart(named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    write_index(tmp_path / "weights" / "all.safetensors.index.json", "weights/all.safetensors")
    found = set()
    for content in ("one", "two"):
        (tmp_path / "weights" / "all.safetensors").write_text(content)
        found.add(identity(tmp_path))
    assert len(found) == 2


BROKEN = ["", "[" * 100_000, "[1]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"w": 1}}']
BROKEN += ['{"weight_map": {"w": "no/such.safetensors", "v": "folder", "u": "a\\u0000b"}}', "\xff"]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_an_index_that_names_no_files_is_a_file_like_others(text: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / INDICES[0]).write_bytes(text.encode("latin-1"))
    assert set(digests(tmp_path)) == {INDICES[0]}


def test_an_index_with_a_name_twice_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    """The last one counts."""
    text = '{"weight_map": {"w": "one.x", "w": "two.x"}}'
    (tmp_path / INDICES[0]).write_text(text)
    for name in ("one.x", "two.x"):
        (tmp_path / name).write_text(name)
    assert set(digests(tmp_path)) == {INDICES[0], "two.x"}


def test_a_run_does_not_go_on_where_a_shard_in_a_subfolder_changed(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    """It has another size, too; the library loads it from there."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "shards").mkdir()
    shard = model / "shards" / "all.safetensors"
    save_file(weights, shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "shards/all.safetensors")}
    (model / INDICES[0]).write_text(json.dumps(index))
    flags = ["--num_samples", "2", "--layers", "0"]
    finish(str(model), tmp_path / "run", *flags)
    changed = {name: 1.5 * tensor for name, tensor in weights.items()}
    save_file(changed, shard, metadata={"format": "pt", "note": "longer"})
    argv = ["--model_id", str(model), "--output_dir", str(tmp_path / "run"), *flags]
    refuses(answer, *argv, says=["holds another experiment, which differs in model: "])


OUTPUTS = {"run.json", *itertools.chain(*tracing.COMMAND_FILES.values())}


def test_what_this_script_writes_is_no_file_of_a_model(tiny_llama: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    assert {"circuit.json", "directions.safetensors"} <= OUTPUTS
    for name in OUTPUTS:
        (folder / name).write_text(name)
    assert identity(folder) == identity(tiny_llama)


def test_a_run_in_the_models_own_folder_goes_on(copied: Path) -> None:
    flags = ["--num_samples", "2", "--layers", "0", "--confirm", "1"]
    before = record_of(finish(str(copied), copied, *flags))
    assert (copied / "circuit.json").exists()
    after = record_of(finish(str(copied), copied, *flags))
    assert after["experiment"]["fingerprint"] == before["experiment"]["fingerprint"]
    assert set(after["model_files"]).isdisjoint(OUTPUTS)


def test_a_token_beyond_the_models_vocabulary_names_the_sample(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 300}))
    refuses(answer, "--model_id", str(model), "--dry_run", says=["(s0000)", "vocabulary of 300"])


def test_a_prompt_is_refused_whose_longest_form_exceeds_the_context(llama: str) -> None:
    """The last token of a form is scored and never read."""
    experiment = planned(llama)
    prompt = experiment.prompts[0][0]
    n_form = max(len(form) for forms in prompt.forms for form in forms)
    n_tokens = len(prompt.ids) + n_form - 1
    assert n_form > 1
    shape = dataclasses.replace(experiment.shape, context=n_tokens)
    tracing.check_prompts([experiment.prompts[0]], shape, experiment.options)
    shape = dataclasses.replace(shape, context=n_tokens - 1)
    with pytest.raises(tracing.UsageError, match=rf"\(s0000\): a prompt of {n_tokens} tokens"):
        tracing.check_prompts([experiment.prompts[0]], shape, experiment.options)

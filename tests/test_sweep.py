"""The sweep: equal to the naive loop, whole after any interruption, and tidy."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama3_circuit_tracing as tracing
import naive
import random_models
from conftest import ROOT, SCRIPT

EQUAL = 2e-5


def sweep(model: str, folder: Path, *arguments: str) -> pd.DataFrame:
    """Results of a run on two samples unless told otherwise."""
    command = ["--model_id", model, "--output_dir", str(folder), "--num_samples", "2", *arguments]
    assert tracing.main(command) == 0
    return pd.read_csv(folder / "circuit_results.csv")


def largest_difference(one: pd.DataFrame, other: pd.DataFrame) -> float:
    keys = ["sample_id", "layer", "head"]
    both = one.merge(other, on=keys, suffixes=("", "_other"), validate="one_to_one")
    assert len(both) == len(one) == len(other)
    columns = ["delta_logit_base", "delta_logit_head", "head_effect"]
    return max((both[c] - both[f"{c}_other"]).abs().max() for c in columns)


def naive_results(folder: str, samples: list[tracing.Sample]) -> pd.DataFrame:
    model, tokenizer = naive.load(folder)
    pairs = [(s.prompt_a, s.prompt_b, s.targets) for s in samples]
    rows = [
        (samples[i].sample_id, layer, head, base, edited, edited - base)
        for (i, layer, head), (base, edited) in naive.sweep(model, tokenizer, pairs).items()
    ]
    return pd.DataFrame(
        rows,
        columns=[
            "sample_id",
            "layer",
            "head",
            "delta_logit_base",
            "delta_logit_head",
            "head_effect",
        ],
    )


def built_in(count: int) -> list[tracing.Sample]:
    return tracing.build_suppression(count, random.Random(42), len)


@pytest.fixture(scope="module")
def expected(random_model: Callable[..., str]) -> Callable[[str], pd.DataFrame]:
    """The naive loop's results on two built-in samples, once per model folder."""
    known: dict[str, pd.DataFrame] = {}

    def of(folder: str) -> pd.DataFrame:
        if folder not in known:
            known[folder] = naive_results(folder, built_in(2))
        return known[folder]

    return of


@pytest.fixture()
def llama(random_model: Callable[..., str]) -> str:
    return random_model("llama")


# ----- equality


@pytest.mark.parametrize("architecture", list(random_models.ARCHITECTURES))
def test_the_sweep_equals_the_naive_loop(
    architecture: str, random_model: Any, expected: Any, tmp_path: Path
) -> None:
    folder = random_model(architecture)
    table = sweep(folder, tmp_path)
    assert table["head_effect"].abs().mean() > 0.01
    assert largest_difference(table, expected(folder)) < EQUAL


def test_the_sweep_equals_the_naive_loop_on_the_trained_model(
    tiny_llama: str, tmp_path: Path
) -> None:
    table = sweep(tiny_llama, tmp_path)
    assert largest_difference(table, naive_results(tiny_llama, built_in(2))) < EQUAL


@pytest.mark.parametrize("rows", ["1", "3", "100"])
def test_rows_per_forward_change_nothing(
    rows: str, llama: str, expected: Any, tmp_path: Path
) -> None:
    table = sweep(llama, tmp_path, "--rows_per_forward", rows)
    assert largest_difference(table, expected(llama)) < EQUAL


def test_eager_attention_gives_the_same(llama: str, expected: Any, tmp_path: Path) -> None:
    table = sweep(llama, tmp_path, "--attn_implementation", "eager")
    assert largest_difference(table, expected(llama)) < EQUAL


def test_scaled_logits_are_the_models_own(random_model: Any, tmp_path: Path) -> None:
    folder = random_models.build_model(
        tmp_path / "m", "gemma2", sliding_window=400, final_logit_softcapping=2.0
    )
    table = sweep(str(folder), tmp_path / "out", "--attn_implementation", "eager")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["run"]["logits"] == "the model's own"
    assert largest_difference(table, naive_results(str(folder), built_in(2))) < EQUAL


def test_layers_on_disk_change_nothing(llama: str, expected: Any, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    table = sweep(llama, tmp_path, "--device_map", json.dumps({**places, "lm_head": "disk"}))
    assert largest_difference(table, expected(llama)) < EQUAL
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["run"]["device_map"]["model.layers.1"] == "disk"
    assert record["run"]["logits"] == "the model's own"


def test_layers_offloaded_to_the_cpu_change_nothing(
    llama: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import cpu_offload

    load = tracing.load_model
    monkeypatch.setattr(
        tracing, "load_model", lambda *a: cpu_offload(load(*a), torch.device("cpu"))
    )
    assert largest_difference(sweep(llama, tmp_path), expected(llama)) < EQUAL


# ----- mistakes that the comparison must catch


def shift_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tracing.Component,
        "span",
        lambda self, d: slice(((self.index + 1) % 4) * d, ((self.index + 1) % 4 + 1) * d),
    )


def flip_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tracing.TASKS["suppression"]
    flipped = dataclasses.replace(task, reduce=lambda targets, foils: -targets.mean(-1))
    monkeypatch.setitem(tracing.TASKS, "suppression", flipped)


def drop_an_ancestor(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = tracing.Trie.structure

    def broken(self: tracing.Trie) -> tuple[Any, Any]:
        depth, visible = structure(self)
        visible[12:, 11] = False
        return depth, visible

    monkeypatch.setattr(tracing.Trie, "structure", broken)


def edit_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(
        subject: Any, site: Any, edits: Any, n_rows: int, values: Any, module: Any, args: Any
    ):
        x = args[0].expand(n_rows, -1, -1)
        for row, edit in edits:  # every row of an expanded tensor is the same memory
            x[row, :, edit.component.span(subject.shape.d_head)] = 0
        return (x, *args[1:])

    monkeypatch.setattr(tracing, "_edit_input", broken)


@pytest.mark.parametrize("mistake", [shift_heads, flip_the_sign, drop_an_ancestor, edit_in_place])
def test_the_comparison_catches_a_planted_mistake(
    mistake: Callable[..., None],
    llama: str,
    expected: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    monkeypatch.setattr(tracing, "self_test", lambda exp: None)
    assert largest_difference(sweep(llama, tmp_path), expected(llama)) > 1e-3


# ----- the metric and its sign


def test_metric_and_role_by_hand() -> None:
    sample = tracing.Sample("s", "a", "b", ("w",))
    prompts = [tracing.Prompt(sample, role, "", (1,), (((5,),),)) for role in "ab"]
    tree = tracing.build_tree([prompts], None, tracing.Config())
    config = tracing.Config()
    exp: Any = type("Exp", (), {"config": config})()
    component = tracing.Component(2, "head", 5)
    (row,) = tracing.component_rows(exp, tree, component, [-5.0, -1.0], [-2.5, -1.5])
    assert (row["delta_logit_base"], row["delta_logit_head"], row["head_effect"]) == (-4, -1, 3)
    assert (row["layer"], row["head"], row["n_constraints"]) == (2, 5, 1)
    table = pd.DataFrame([{**row, "index": 5}])
    assert tracing.find(table, config, math.nan).heads["role"].item() == 3


@pytest.fixture()
def suppressor(tmp_path: Path) -> str:
    """A one-block model whose head 1 alone writes against a word wherever `mention` was read."""
    folder = random_models.build_model(
        tmp_path / "known", num_hidden_layers=1, num_key_value_heads=4
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trigger = tokenizer(" mention", add_special_tokens=False)["input_ids"][-1]
    word = tokenizer("apple", add_special_tokens=False)["input_ids"][0]
    block = model.model.layers[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_() if parameter.ndim > 1 else parameter.fill_(1.0)
        model.model.embed_tokens.weight[:, :2] = 0
        model.model.embed_tokens.weight[trigger, 0] = 5.0  # dimension 0: `mention` is here
        block.self_attn.v_proj.weight[16, 0] = 1.0  # head 1 reads it, attending everywhere alike
        block.self_attn.o_proj.weight[1, 16] = -60.0  # and writes against dimension 1
        model.lm_head.weight[:, 1] = 0
        model.lm_head.weight[word, 1] = 1.0  # which is what makes the word likely
    model.save_pretrained(folder)
    return str(folder)


def test_removing_a_head_that_suppresses_has_a_positive_effect(
    suppressor: str, tmp_path: Path
) -> None:
    samples = tmp_path / "own.jsonl"
    samples.write_text(json.dumps({"sentence": "Name a fruit.", "targets": ["apple"]}))
    table = sweep(suppressor, tmp_path / "out", "--samples", str(samples))
    assert table["delta_logit_base"].iloc[0] < -0.5
    effects = table.set_index("head")["head_effect"]
    assert effects[1] == pytest.approx(-table["delta_logit_base"].iloc[0], abs=1e-4)
    assert effects.drop(1).abs().max() < 1e-4


# ----- resume


def forwards(folder: Path) -> int:
    return json.loads((folder / "run.json").read_text())["run"]["forwards"]


def test_a_finished_run_computes_nothing_again(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = ["--confirm", "2", "--num_random", "3", "--max_new_tokens", "2", "--controls"]
    sweep(llama, tmp_path, *extras)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".csv", ".png")}
    monkeypatch.setattr(tracing, "load_model", lambda *a: pytest.fail("weights were loaded"))
    sweep(llama, tmp_path, *extras)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".csv", ".png")}
    assert before == after and len(before) == 5


def test_more_layers_in_the_same_folder_compute_only_what_is_missing(
    llama: str, tmp_path: Path, expected: Any
) -> None:
    sweep(llama, tmp_path, "--layers", "0,2", "--heads", "0-2")
    swept: list[int] = []
    run_rows = tracing.run_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tracing,
            "run_rows",
            lambda s, b, rows, m: (swept.append(len(rows)), run_rows(s, b, rows, m))[1],
        )
        patch.setattr(tracing, "self_test", lambda exp: None)
        table = sweep(llama, tmp_path)
    n_jittered = 3 * 4
    assert sum(swept) == 12 - 6 + n_jittered
    assert largest_difference(table, expected(llama)) < EQUAL


def test_another_run_in_the_same_folder_is_refused_with_the_keys_that_differ(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(llama, tmp_path, "--layers", "0")
    command = ["--model_id", llama, "--output_dir", str(tmp_path), "--num_samples", "2"]
    assert tracing.main([*command, "--seed", "7", "--op", "scale", "--factor", "2"]) == 2
    said = capsys.readouterr().err
    assert "op: 'zero' there, 'scale' now" in said and "prompts:" in said and "seed:" in said
    assert "dtype" not in said


def test_overwrite_deletes_only_files_of_this_script(llama: str, tmp_path: Path) -> None:
    sweep(llama, tmp_path, "--layers", "0")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".parts" / "notes.txt").write_text("mine")
    table = sweep(llama, tmp_path, "--layers", "1", "--overwrite")
    assert set(table["layer"]) == {1}
    assert (tmp_path / "notes.txt").exists() and (tmp_path / ".parts" / "notes.txt").exists()


def spoil_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil_a_number(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content).replace("[-", "[-1", 1))


def make_foreign(path: Path) -> None:
    path.write_text('{"run": "of another", "digest": "", "payload": []}')


def make_unreadable(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00[]")


@pytest.mark.parametrize(
    "spoil", [spoil_by_truncation, spoil_a_number, make_foreign, make_unreadable]
)
def test_a_spoilt_part_is_computed_again(
    spoil: Callable[[Path], None], llama: str, tmp_path: Path
) -> None:
    sweep(llama, tmp_path)
    before = (tmp_path / "circuit_results.csv").read_bytes()
    for kind in ("sweep", "base"):
        spoil(sorted((tmp_path / ".parts").glob(f"{kind}-*"))[0])
    sweep(llama, tmp_path)
    assert (tmp_path / "circuit_results.csv").read_bytes() == before


# ----- interruption, as real processes


def start(model: str, folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """A run with so many units that it can be stopped in their midst."""
    command = [sys.executable, *launcher, str(SCRIPT), "--model_id", model]
    command += ["--output_dir", str(folder), "--num_samples", "24", "--tree_tokens", "100"]
    command += ["--rows_per_forward", "1"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 120
    while len(list((folder / ".parts").glob("sweep-*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(random_model: Callable[..., str], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start(random_model("llama"), folder).wait(timeout=200) == 0
    return Path(folder)


@pytest.mark.parametrize("stop, code", [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was_and_ends_the_same(
    stop: str, code: int, llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(llama, tmp_path)
    wait_for_parts(tmp_path, 3, process)
    process.send_signal(getattr(signal, stop))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    done = len(list((tmp_path / ".parts").glob("sweep-*.json")))
    whole = len(list((uninterrupted / ".parts").glob("sweep-*.json")))
    assert 3 <= done < whole
    assert start(llama, tmp_path).wait(timeout=200) == 0
    name = "circuit_results.csv"
    assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
    record, before = (json.loads((f / "run.json").read_text()) for f in (tmp_path, uninterrupted))
    rows_of_a_unit = 4 + 4  # heads and jittered rows, one per forward
    saved = before["run"]["forwards"] - record["run"]["forwards"]
    assert saved >= done * rows_of_a_unit


def children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(stat[1]) == pid:
                yield int(entry.name)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_give_the_same_and_survive_a_death(
    llama: str, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(llama, tmp_path, *TWO)
    wait_for_parts(tmp_path, 2, process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / "circuit_results.csv").exists()
    again = start(llama, tmp_path, *TWO)
    said = again.communicate(timeout=200)[1]
    assert again.returncode == 0, said
    one, other = (pd.read_csv(f / "circuit_results.csv") for f in (tmp_path, uninterrupted))
    assert largest_difference(one, other) < EQUAL


# ----- memory


OUT_OF_MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    lambda: MemoryError(),
]


def run_out_above(limit: int, error: Callable[[], Exception], patch: pytest.MonkeyPatch) -> None:
    run_rows = tracing.run_rows

    def limited(subject: Any, base: Any, rows: Any, means: Any) -> Any:
        if len(rows) > limit:
            raise error()
        return run_rows(subject, base, rows, means)

    patch.setattr(tracing, "run_rows", limited)
    patch.setattr(tracing, "self_test", lambda exp: None)


@pytest.mark.parametrize("limit, error", list(zip([1, 2, 3, 7], OUT_OF_MEMORY, strict=True)))
def test_rows_are_halved_when_memory_runs_out(
    limit: int,
    error: Callable[[], Exception],
    llama: str,
    expected: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_out_above(limit, error, monkeypatch)
    table = sweep(llama, tmp_path, "--rows_per_forward", "8")
    assert largest_difference(table, expected(llama)) < EQUAL
    assert json.loads((tmp_path / "run.json").read_text())["rows_after_halving"] <= limit


def test_a_row_that_does_not_fit_alone_names_what_to_lower(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run_out_above(0, OUT_OF_MEMORY[0], monkeypatch)
    assert tracing.main(["--model_id", llama, "--output_dir", str(tmp_path)]) == 1
    assert "--tree_tokens" in capsys.readouterr().err


def llama_8b(dtype: torch.dtype) -> tracing.Outline:
    return tracing.Outline(
        name="LlamaForCausalLM",
        layers_path="model.layers",
        n_layers=32,
        n_heads=32,
        d_head=128,
        d_model=4096,
        d_mlp=14336,
        n_kv_heads=8,
        vocab=128256,
        n_parameters=8_030_261_248,
        context=8192,
        attn_implementation="sdpa",
        dtype=dtype,
    )


def test_llama_3_8b_in_bfloat16_fits_a_24_gb_gpu_by_the_estimate(
    llama: str, tmp_path: Path
) -> None:
    config = tracing.Config(model_id=llama, num_samples=32, output_dir=str(tmp_path))
    trees = tracing.prepare(config, tracing.RunFolder(tmp_path)).trees
    tree = max(trees, key=lambda t: t.n_tokens)
    assert tree.n_tokens > 400
    shape = llama_8b(torch.bfloat16)
    weights = tracing.memory_estimate(shape, None, 0)["weights"]
    rows = tracing.resolve_rows(shape, trees, free=24e9 - 0.5e9 - weights)
    memory = tracing.memory_estimate(shape, tree, rows)
    assert rows >= 4
    assert sum(memory.values()) < 24e9 - 0.5e9
    assert memory["weights"] > 16e9 and memory["rows"] > 1e9
    assert sum(tracing.memory_estimate(llama_8b(torch.float32), tree, 1).values()) > 24e9


# ----- tidiness


def hooks_of(model: Any) -> int:
    modules = list(model.modules())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)
    return hooks + sum("forward" in m.__dict__ for m in modules)


@pytest.mark.parametrize("error", [None, RuntimeError("planted"), KeyboardInterrupt()])
def test_no_hook_and_no_replaced_forward_is_left_behind(
    error: BaseException | None, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load, calls = tracing.load_model, 0

    def remember(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(tracing, "load_model", remember)
    call = type(torch.nn.Linear(1, 1)).forward

    def failing(self: Any, x: Any) -> Any:
        nonlocal calls
        calls += 1
        if error is not None and calls == 120:
            raise error
        return call(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", failing)
    command = ["--model_id", llama, "--output_dir", str(tmp_path), "--num_samples", "2"]
    wanted = {type(None): 0, RuntimeError: 1, KeyboardInterrupt: 130}[type(error)]
    assert tracing.main(command) == wanted
    assert calls > 120 or error is not None
    assert hooks_of(loaded[0]) == 0


def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write, written = tracing.RunFolder.write_part, []

    def full(self: tracing.RunFolder, name: str, payload: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(self.parts / name))
        written.append(name)
        write(self, name, payload)

    with monkeypatch.context() as patch:
        patch.setattr(tracing.RunFolder, "write_part", full)
        assert tracing.main(["--model_id", llama, "--output_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "No space left on device" in said
    assert not list(tmp_path.glob("**/*.tmp"))
    assert len(list((tmp_path / ".parts").glob("*.json"))) == 3
    assert tracing.main(["--model_id", llama, "--output_dir", str(tmp_path)]) == 0


def test_a_sharded_module_is_refused(llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    shape = tracing.outline(model, torch.float32)
    subject = tracing.Subject(model, dataclasses.replace(shape, n_heads=8))
    edit = tracing.Edit(tracing.Component(0, "head", 0))
    sharded = pytest.raises(tracing.RunError, match="sharded")
    with sharded, tracing.editing(subject, [(edit,)], tracing.Values()):
        model(torch.tensor([[1, 2, 3]]))
    model._tp_size = 2
    with pytest.raises(tracing.UsageError, match="tensor-parallel"):
        tracing.Subject(model, shape)


# ----- what a folder keeps


def test_overwrite_deletes_nothing_when_the_command_is_refused(llama: str, tmp_path: Path) -> None:
    sweep(llama, tmp_path, "--layers", "0")
    before = (tmp_path / "circuit_results.csv").read_bytes()
    command = ["--model_id", llama, "--output_dir", str(tmp_path), "--num_samples", "2"]
    assert tracing.main([*command, "--overwrite", "--layers", "99"]) == 2
    assert (tmp_path / "circuit_results.csv").read_bytes() == before
    assert list((tmp_path / ".parts").glob("sweep-*.json"))


def test_outputs_of_options_no_longer_given_do_not_stay(llama: str, tmp_path: Path) -> None:
    extras = ["--confirm", "2", "--num_random", "2", "--max_new_tokens", "2", "--heatmap"]
    sweep(llama, tmp_path, *extras)
    optional = [tmp_path / name for name in tracing.OPTIONAL_FILES]
    assert all(path.exists() for path in optional)
    sweep(llama, tmp_path)
    assert not any(path.exists() for path in optional)
    assert "behaviour" not in json.loads((tmp_path / "run.json").read_text())


def test_amplifying_has_the_opposite_role_of_removing(suppressor: str, tmp_path: Path) -> None:
    samples = tmp_path / "own.jsonl"
    samples.write_text(json.dumps({"sentence": "Name a fruit.", "targets": ["apple"]}))
    own = ["--samples", str(samples)]
    sweep(suppressor, tmp_path / "zero", *own)
    sweep(suppressor, tmp_path / "twice", *own, "--op", "scale", "--factor", "2")
    roles = [
        pd.read_csv(tmp_path / name / "circuit_heads.csv").set_index("label")["role"]["L0H1"]
        for name in ("zero", "twice")
    ]
    assert roles[0] > 0.5 and roles[1] > 0.05


def test_redrawing_another_task_speaks_of_that_task(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(llama, tmp_path / "run", "--task", "refusal", "--layers", "0")
    source = str(tmp_path / "run" / "circuit_results.csv")
    capsys.readouterr()
    assert tracing.main(["--from_csv", source, "--output_dir", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "forbidden" not in said


def test_the_model_is_never_asked_to_pick_positions_on_another_device(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    forward, asked = LlamaForCausalLM.forward, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("logits_to_keep"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    sweep(llama, tmp_path)
    assert asked and not any(isinstance(kept, torch.Tensor) for kept in asked)

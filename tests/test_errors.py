"""What goes wrong on the way to a run: exit codes, and one sentence that says what to do."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import llama3_circuit_tracing as circuit
from conftest import Answer

ROOT = Path(__file__).resolve().parents[1]
RUNS_THE_BUNDLED_MODEL = "python llama3_circuit_tracing.py --model_id tests/tiny_llama"


def sentence(err: str) -> str:
    """The one sentence on stderr."""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def copy_of(folder: str, to: Path, **config: Any) -> Path:
    """A copy of a model folder without weights, with some entries of its config changed."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


# ----- the hub


class Hub(BaseHTTPRequestHandler):
    """A hub on which gated/401 and gated/403 are gated and nothing else exists."""

    def do_HEAD(self) -> None:
        code, reason = 401, "RepoNotFound"
        for gate in (401, 403):
            if f"/gated/{gate}/" in self.path:
                code, reason = gate, "GatedRepo"
        if "/open/model/" in self.path:
            code, reason = 404, "RevisionNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("X-Error-Message", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub that this machine serves to itself."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


SEVERAL = """
import contextlib, io, json, sys
from llama3_circuit_tracing import main
answers = []
for argv in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(argv)
    answers.append((code, err.getvalue()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def said_by_hub(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """(exit code, stderr) by model id, all asked in one process that has a network."""
    home = tmp_path_factory.mktemp("hub")
    models = ["gated/401", "gated/403", "nobody/nothing", "open/model"]
    argvs = [["--model_id", m, "--output_dir", str(home / "out"), "--revision", "v7"] for m in models]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(argvs)],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")  # no noise of the libraries either
    answers = json.loads(done.stdout.splitlines()[-1])
    return {model: tuple(told) for model, told in zip(models, answers, strict=True)}


@pytest.mark.parametrize("model", ["gated/401", "gated/403"])
def test_a_gated_model_is_named_with_the_way_to_access(
    said_by_hub: dict[str, tuple[int, str]], model: str
) -> None:
    code, err = said_by_hub[model]
    assert code == 1
    said = sentence(err)
    for text in (f"{model} is gated", f"huggingface.co/{model}", "`hf auth login`"):
        assert text in said
    assert RUNS_THE_BUNDLED_MODEL in said


def test_a_model_that_is_not_on_the_hub_is_named_with_the_way_to_access(
    said_by_hub: dict[str, tuple[int, str]],
) -> None:
    code, err = said_by_hub["nobody/nothing"]
    assert code == 1
    said = sentence(err)
    assert "nobody/nothing" in said
    assert "gated" not in said
    assert "`hf auth login`" in said
    assert RUNS_THE_BUNDLED_MODEL in said


def test_a_revision_that_does_not_exist_is_named(
    said_by_hub: dict[str, tuple[int, str]],
) -> None:
    code, err = said_by_hub["open/model"]
    assert code == 1
    said = sentence(err)
    assert "open/model" in said
    assert "'v7'" in said


@pytest.mark.parametrize("extra", [[], ["--dry_run"], ["--local_files_only"]])
def test_without_network_a_model_that_is_not_cached_is_named(
    answer: Answer, tmp_path: Path, extra: list[str]
) -> None:
    argv = ["--model_id", "nobody/nothing", "--output_dir", str(tmp_path / "out"), *extra]
    code, _, err = answer(*argv)
    assert code == 1
    said = sentence(err)
    for text in ("nobody/nothing", "cache", "hub cannot be reached", RUNS_THE_BUNDLED_MODEL):
        assert text in said


def test_the_default_command_line_runs_on_what_the_cache_holds(
    script: Callable[..., subprocess.CompletedProcess[str]], tiny_llama: str, tmp_path: Path
) -> None:
    """No --model_id: the tiny weights lie where the hub's client keeps those of Llama-3."""
    repository = tmp_path / "hub" / "models--meta-llama--Meta-Llama-3-8B-Instruct"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    output = tmp_path / "deep" / "er"
    cache = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    argv = ["--num_samples", "2", "--layers", "0", "--output_dir", str(output)]
    done = script(*argv, HF_HUB_OFFLINE="1", **cache)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in done.stdout
    n_heads = json.loads((Path(tiny_llama) / "config.json").read_text())["num_attention_heads"]
    with open(output / "circuit_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["sample_id"], r["layer"], r["head"]) for r in rows] == [
        (sample, "0", str(head)) for sample in ("s0000", "s0001") for head in range(n_heads)
    ]
    assert (output / "circuit_summary.png").stat().st_size > 0
    record = json.loads((output / "run.json").read_text())
    assert record["fingerprint"]["model"] == f"meta-llama/Meta-Llama-3-8B-Instruct@{commit}"


# ----- folders


def test_a_model_folder_without_files_is_named(answer: Answer, tmp_path: Path) -> None:
    code, _, err = answer("--model_id", str(tmp_path), "--dry_run")
    assert code == 1
    assert f"{tmp_path} is not a model folder" in sentence(err)


def test_a_model_folder_that_does_not_exist_is_named(answer: Answer, tmp_path: Path) -> None:
    code, _, err = answer("--model_id", str(tmp_path / "gone"), "--dry_run")
    assert code == 1
    assert str(tmp_path / "gone") in sentence(err)


def test_a_model_folder_without_tokenizer_is_named(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(Path(tiny_llama) / "config.json", folder)
    code, _, err = answer("--model_id", str(folder), "--dry_run")
    assert code == 1
    assert str(folder) in sentence(err)


@pytest.mark.parametrize("weights", ["none", "pointer", "truncated"])
def test_a_model_folder_without_usable_weights_is_named(
    answer: Answer, tiny_llama: str, tmp_path: Path, weights: str
) -> None:
    """None at all, a git-lfs pointer in their place, and half a download."""
    folder = copy_of(tiny_llama, tmp_path / "model")
    whole = (Path(tiny_llama) / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3476944\n"
    content = {"none": None, "pointer": pointer, "truncated": whole[: len(whole) // 2]}[weights]
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    argv = ["--num_samples", "1", "--layers", "0", "--output_dir", str(tmp_path / "out")]
    code, _, err = answer("--model_id", str(folder), *argv)
    assert code == 1
    assert str(folder) in sentence(err)


@pytest.mark.parametrize("below", [".", "deeper"])
def test_an_output_folder_that_is_a_file_is_refused_by_name(
    answer: Answer, tiny_llama: str, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / below
    code, _, err = answer("--model_id", tiny_llama, "--output_dir", str(output))
    assert code == 2
    said = sentence(err)
    assert "--output_dir" in said
    assert str(output) in said
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_with_a_foreign_record_is_refused(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("not a record")
    code, _, err = answer("--model_id", tiny_llama, "--output_dir", str(tmp_path))
    assert code == 2
    assert str(tmp_path / "run.json") in sentence(err)
    assert (tmp_path / "run.json").read_text() == "not a record"


# ----- models that cannot be traced


def test_a_tokenizer_without_chat_template_is_refused(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    code, _, err = answer("--model_id", str(folder), "--output_dir", str(tmp_path / "out"))
    assert code == 2
    said = sentence(err)
    for text in (str(folder), "no chat template", "Instruct"):
        assert text in said


@pytest.mark.parametrize(
    ("architecture", "name", "sizes"),
    [
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gpt_neox", "GPTNeoXForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}),
        ("opt", "OPTForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_an_architecture_without_o_proj_is_refused_by_name(
    answer: Answer, tiny_llama: str, tmp_path: Path, architecture: str, name: str, sizes: dict[str, int], dry: bool
) -> None:  # fmt: skip
    folder = copy_of(tiny_llama, tmp_path / "model")
    config = AutoConfig.for_model(architecture, vocab_size=2000, **sizes)
    config.save_pretrained(folder)
    argv = ["--dry_run"] if dry else ["--output_dir", str(tmp_path / "out")]
    code, _, err = answer("--model_id", str(folder), *argv)
    assert code == 2
    said = sentence(err)
    assert name in said
    assert "o_proj" in said


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("mistral", {"sliding_window": 20}),
        ("gemma3_text", {"sliding_window": 20}),
        ("llama", {"max_position_embeddings": 20}),
    ],
)
def test_prompts_beyond_what_a_model_can_see_are_refused(
    answer: Answer, random_model: Callable[..., str], tmp_path: Path, architecture: str, change: dict[str, int]
) -> None:  # fmt: skip
    folder = copy_of(random_model(architecture), tmp_path / "model", **change)
    argv = ["--num_samples", "1", "--output_dir", str(tmp_path / "out")]
    code, _, err = answer("--model_id", str(folder), *argv)
    assert code == 2
    said = sentence(err)
    assert "prompt of" in said
    assert "20" in said


def test_a_window_that_is_switched_off_refuses_nothing(
    answer: Answer, random_model: Callable[..., str], tmp_path: Path
) -> None:
    change = {"sliding_window": 20, "use_sliding_window": False}
    folder = copy_of(random_model("qwen3"), tmp_path / "model", **change)
    code, _, err = answer("--model_id", str(folder), "--num_samples", "1", "--dry_run")
    assert (code, err) == (0, "")


# ----- tracebacks


def test_an_error_is_one_sentence_and_no_traceback(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = script("--model_id", str(tmp_path), "--dry_run")
    assert done.returncode == 1
    assert str(tmp_path) in sentence(done.stderr)
    assert done.stdout == ""


def test_debug_shows_the_traceback_and_keeps_the_exit_code(answer: Answer, tiny_llama: str) -> None:
    argv = ["--model_id", tiny_llama, "--layers", "99", "--dry_run"]
    code, _, err = answer(*argv)
    assert code == 2
    assert "Traceback" not in err
    code, _, err = answer(*argv, "--debug")
    assert "Traceback (most recent call last)" in err
    assert "--layers 99" in err.splitlines()[-1]
    assert code == 2


def test_an_error_that_nobody_foresaw_is_one_sentence_too(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(circuit, "prepare", fail)
    code, _, err = answer("--dry_run")
    assert code == 1
    said = sentence(err)
    assert "ZeroDivisionError" in said
    assert "first line" in said


def test_heads_to_ablate_beside_another_kind_are_measured_or_refused(
    answer: Answer, tiny_llama: str, tmp_path: Path
) -> None:
    """The means of the swept kind are not those that the heads of --ablate need."""
    output = tmp_path / "out"
    argv = ["--kind", "mlp", "--op", "mean", "--ablate", "L0H0", "--num_samples", "2"]
    code, _, err = answer("--model_id", tiny_llama, *argv, "--output_dir", str(output))
    if code == 2:
        assert "--ablate" in sentence(err)
    else:
        assert (code, err) == (0, "")
        assert (output / "circuit_confirm.csv").exists()

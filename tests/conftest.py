"""Fixtures: random models in miniature, the bundled trained one, and ways to run the script."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run fastest with one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub unless it says so

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import llama3_circuit_tracing as tracing  # noqa: E402
import random_models  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

SCRIPT = ROOT / "llama3_circuit_tracing.py"
TINY = ROOT / "tests" / "tiny_llama"
# of a process whose last bits must be those of this one, which computes with one thread
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
HANGS = 1800  # seconds after which a process hangs, however slow and busy the machine is
Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny_llama() -> str:
    """The bundled trained model."""
    return str(TINY)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a random model of an architecture, built once per session."""
    built: dict[str, str] = {}

    def build(architecture: str = "llama") -> str:
        if architecture not in built:
            folder = tmp_path_factory.mktemp("models") / architecture
            built[architecture] = str(random_models.build_model(folder, architecture))
        return built[architecture]

    return build


@pytest.fixture(scope="session")
def llama(random_model: Callable[..., str]) -> str:
    """A random Llama with grouped-query heads."""
    return random_model("llama")


# ----- a command line, as a process or in this one, and what it leaves behind


@pytest.fixture()
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the script as a process of its own."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=HANGS,
        )

    return call


@pytest.fixture()
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """(exit code, stdout, stderr) of a command line run in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = tracing.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def refuses(answer: Answer, *argv: str, says: Iterable[str], code: int = 2) -> None:
    """A command line ends with an exit code and one sentence on stderr."""
    found, _, err = answer(*argv)
    assert found == code, err
    (line,) = err.splitlines()
    for text in ("error: ", *says):
        assert text in line


def command_line(model: str, folder: Path, *words: str) -> list[str]:
    """A command line on a model and a folder; the first word may be a command."""
    command = [words[0]] if words and words[0] in tracing.COMMANDS else []
    options = words[len(command) :]
    return [*command, "--model_id", model, "--output_dir", str(folder), *options]


def finish(model: str, folder: Path, *words: str) -> Path:
    """Run a command to its good end in this process; its output folder."""
    assert tracing.main(command_line(model, folder, *words)) == 0
    return folder


def read(folder: Path, name: str = "circuit_results.csv") -> pd.DataFrame:
    """A table that a run wrote; only what is empty is missing."""
    return pd.read_csv(folder / name, keep_default_na=False, na_values=[""])


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def generations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def user_text(rendered: str) -> str:
    """What the user says in a rendered prompt of the tiny models."""
    return rendered.split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]


def write_samples(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ----- for tests of small runs


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of samples whose prompts are equally long, as the command tokens needs them."""
    records = []
    for word, target in {"fruit": "apple", "bird": "oak", "drink": "owl", "insect": "iron"}.items():
        text_a, text_b = f"Do not name a {word} here.", f"Do please name a {word} here."
        records.append({"prompt_a": text_a, "prompt_b": text_b, "targets": [target]})
    return write_samples(tmp_path_factory.mktemp("samples") / "four.jsonl", *records)


@pytest.fixture(scope="session")
def folder_of(
    random_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """Folder of a model, "tiny" for the trained one, that samples may be written to."""

    @functools.cache
    def find(name: str) -> str:
        if name != "tiny":
            return random_model(name)
        return str(shutil.copytree(TINY, tmp_path_factory.mktemp("tiny") / "model"))

    return find


@pytest.fixture()
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that loads a model's weights fails."""
    monkeypatch.setattr(tracing, "load_model", lambda *_: pytest.fail("weights were loaded"))


@pytest.fixture(scope="module")
def coarse_figures() -> Iterator[None]:
    """Drawn in full and saved small, which is a third of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "save_figure", lambda figure, path: figure.savefig(path, dpi=20))
        yield

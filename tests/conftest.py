"""Fixtures: random models in miniature, the bundled trained one, and the script as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run fastest with one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub unless it says so

import torch  # noqa: E402
import transformers  # noqa: E402

import random_models  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

SCRIPT = ROOT / "llama3_circuit_tracing.py"
TINY = ROOT / "tests" / "tiny_llama"
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
            timeout=300,
        )

    return call


@pytest.fixture()
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """(exit code, stdout, stderr) of a command line run in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        import llama3_circuit_tracing

        capsys.readouterr()
        try:
            code = llama3_circuit_tracing.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call

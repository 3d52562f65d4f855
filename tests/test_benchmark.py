"""The benchmarks run, and hold their two ways against each other; how fast is not asked."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import benchmark
from conftest import ROOT

BOUNDS = {"mid": 2e-5, "8b": 0.2, "growth": 2e-5, "screen": 2e-5, "reach": 2e-5}
BOUNDS |= {"scale": 1e-9, "job": 1e-4}


def test_every_benchmark_is_run_here() -> None:
    assert {*BOUNDS} == {*benchmark.MODES}


@pytest.fixture()
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --smoke sets is put back."""
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cpu"))


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a benchmark in its smallest shape prints. One that forks has a process of its own, as
    by hand."""
    if name != "scale":
        capsys.readouterr()
        benchmark.main([name, "--smoke"])
        return capsys.readouterr().out
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), name, "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.usefixtures("on_cpu")
def test_a_benchmark_runs_in_its_smallest_shape_and_its_two_ways_agree(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_by(name, capsys)
    (difference,) = re.findall(r"largest difference (\S+)$", printed, re.MULTILINE)
    assert 0 < float(difference) < BOUNDS[name]


WRONG = {
    "away": lambda effects: {key: effect + 1e-3 for key, effect in effects.items()},
    "of another head": lambda effects: dict(zip(effects, [*effects.values()][::-1], strict=True)),
    "nothing": lambda effects: dict.fromkeys(effects, 0.0),
    "NaN": lambda effects: dict.fromkeys(effects, float("nan")),
}


@pytest.mark.parametrize("name", ["mid", "growth", "screen"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("on_cpu")
def test_a_sweep_that_differs_ends_with_an_exit_code(
    name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    naive_loop = benchmark.naive_loop

    def changed(*arguments: Any) -> Any:
        return WRONG[wrong](naive_loop(*arguments))

    monkeypatch.setattr(benchmark, "naive_loop", changed)
    with pytest.raises(SystemExit, match="beyond the bound"):
        benchmark.main([name, "--smoke"])


@pytest.mark.usefixtures("on_cpu")
def test_the_bound_in_bfloat16_tells_heads_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    naive_loop = benchmark.naive_loop
    wrong = WRONG["of another head"]
    monkeypatch.setattr(benchmark, "naive_loop", lambda *of: wrong(naive_loop(*of)))
    with pytest.raises(SystemExit, match="beyond the bound"):
        benchmark.main(["8b", "--smoke"])


def test_without_smoke_the_presets_have_the_shapes_that_the_readme_tells() -> None:
    sizes = benchmark.PRESETS
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "dtype")
    assert [sizes["mid"][name] for name in names] == [12, 16, 1024, 32000, torch.float32]
    assert [sizes["8b"][name] for name in names] == [32, 32, 4096, 128256, torch.bfloat16]

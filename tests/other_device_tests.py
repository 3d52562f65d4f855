"""On one and on two accelerators that are not there edited runs give what the CPU gives.

Estimates and graphs are left out: torch takes no gradients on a device that only Python knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llama3_circuit_tracing as tracing
import other_device
from by_hand import prepared
from conftest import finish, read
from other_device import FIRST, SECOND, Elsewhere

CLOSE = 1e-4  # nats, between edits computed in float32 and in float64
LINES = {
    "zero": "--layers 0-1 --controls --num_samples 3",
    "mean": "--op mean --kind mlp",
    "scale": "--op scale --factor 2 --kind attn --positions last",
    "patch": "--op patch --kind resid",
    "neurons": "--kind neuron --neurons 0-3 --op patch --layers 1",
    "universal neurons": "--kind neuron --neurons 0-9 --layers 1 --confirm 1 --num_random 2"
    " --skip universal --select any",
    "value heads": "--kind value --op mean",
    "joint": "--layers 0 --confirm 2 --num_random 2 --max_new_tokens 2",
    "components given": "--given L0H1,L1mlp --layers 1",
    "paths": "paths --op patch --layers 0 --through each",
    "tokens": "tokens --kind attn --layers 1",
    "directions": "directions --kind resid --op patch --confirm 1 --num_random 2",
    "everywhere": "directions --kind resid --confirm all --num_random 2 --layers 0-1",
    "bfloat16": "--bf16 --op mean --layers 1",
    "added": "directions --op add --kind attn --layers 1",
}
pytestmark = pytest.mark.usefixtures("coarse_figures")


def words_of(line: str, samples: str) -> list[str]:
    return line.split() if "--controls" in line else [*line.split(), "--samples", samples]


# on two devices those in which something goes from one to the other in a way of its own
ON_TWO = ["zero", "patch", "universal neurons", "joint", "paths", "directions", "everywhere"]
CASES = [pytest.param(name, None, id=f"{name}, one device") for name in LINES]
CASES += [pytest.param(name, 2, id=f"{name}, two devices") for name in ON_TWO]


@pytest.fixture(scope="module")
def on_cpu(
    llama: str, samples: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a command line that was run on the CPU."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("cpu")
        return finish(llama, folder, *words_of(LINES[name], samples))

    return run


@pytest.mark.parametrize(("name", "second_from"), CASES)
def test_an_accelerator_gives_the_tables_of_the_cpu(
    name: str,
    second_from: int | None,
    on_cpu: Callable[[str], Path],
    llama: str,
    samples: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(LINES[name], samples)
    expected = on_cpu(name)
    load_model = tracing.load_model

    def load_elsewhere(*arguments: Any) -> Any:
        return other_device.place(load_model(*arguments), second_from)

    monkeypatch.setattr(tracing, "load_model", load_elsewhere)
    with other_device.accelerators() as mode:
        found = finish(llama, tmp_path / "elsewhere", *words)
    assert mode.n_operations > 100
    tables = sorted(path.name for path in expected.glob("*.csv"))
    assert tables == sorted(path.name for path in found.glob("*.csv")) != []
    for table in tables:
        columns = read(expected, table).select_dtypes("number")
        columns = columns.loc[:, columns.columns.str.contains("score|effect|mean|last_|kl_")]
        differences = np.abs((read(found, table)[list(columns)] - columns).to_numpy(float))
        bound = 0.1 if "--bf16" in words else CLOSE
        assert np.nanmax(differences, initial=0.0) < bound, table


def test_masks_and_indices_are_copied_once_and_not_for_each_edit(llama: str) -> None:
    experiment = prepared(llama, "--op", "mean", "--positions", "last")
    model = tracing.load_model(experiment.options, experiment.shape)
    tree = experiment.trees[0]
    n_copies = []
    with other_device.accelerators() as mode:
        experiment.traced = tracing.TracedModel(other_device.place(model), experiment.shape, 8)
        clean_run = experiment.clean_run(tree, [0])
        for n_rows in (1, 4):
            heads = [tracing.Component(0, "head", index) for index in range(n_rows)]
            rows = [experiment.edits(clean_run, [head]) for head in heads]
            before = mode.n_copies
            tracing.run_rows(experiment.traced, clean_run, rows)
            n_copies.append(mode.n_copies - before)
    assert 0 < n_copies[1] <= n_copies[0] < 20


# ----- that such a device is as strict as a real one


@pytest.fixture()
def mode() -> Iterator[other_device.Accelerators]:
    with other_device.accelerators() as mode:
        yield mode


@pytest.mark.usefixtures("mode")
def test_tensors_of_two_devices_do_not_meet() -> None:
    first, second = (torch.ones(3, device=device) for device in (FIRST, SECOND))
    assert isinstance(first, Elsewhere) and str(first.device) == FIRST
    assert (first + 1).tolist() == [2, 2, 2]
    assert (first.to(SECOND) + second).cpu().tolist() == [2, 2, 2]
    assert first[torch.tensor([0, 2])].tolist() == [1, 1]
    for wrong in (
        lambda: first + second,
        lambda: first + torch.ones(3),
        lambda: first.index_copy(0, torch.tensor([0]), first[:1]),
        lambda: torch.ones(3)[first.long()],
        lambda: first.double(),
    ):
        with pytest.raises(RuntimeError):
            wrong()


@pytest.mark.parametrize(
    ("function", "replacement"),
    [
        ("widen", lambda x: x.double()),
        ("stream_at", lambda residual, nodes: residual.index_select(1, nodes)),
    ],
)
def test_a_mistake_with_devices_is_caught(
    function: str, replacement: Any, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = tracing.load_model
    monkeypatch.setattr(tracing, "load_model", lambda *a: other_device.place(load_model(*a)))
    monkeypatch.setattr(tracing, function, replacement)
    words = ["--op", "patch", "--layers", "1", "--num_samples", "2", "--model_id", llama]
    with other_device.accelerators():
        assert tracing.main([*words, "--output_dir", str(tmp_path / "run")]) == 1

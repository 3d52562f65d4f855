"""Statistics, results tables and ablation in plain arithmetic: another way to the same numbers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

import llama3_circuit_tracing as tracing
import naive
from conftest import read, record_of, user_text

Effects = Mapping[str, Sequence[float]]  # by component, of one sample after the other


def sign_flip_p(sums: Sequence[float]) -> float:
    """The share of all sign patterns that reach the sum."""
    patterns = itertools.product((1, -1), repeat=len(sums))
    flipped = [abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in patterns]
    return sum(f >= abs(sum(sums)) - 1e-9 for f in flipped) / len(flipped)


def q_values(p: Sequence[float]) -> list[float]:
    """The smallest level at which each test is rejected."""
    m, ordered = len(p), sorted(p)
    return [min(m * ordered[k] / (k + 1) for k in range(m) if ordered[k] >= one) for one in p]


def noise(rng: random.Random, n_samples: int, n_heads: int, sd: float = 0.1) -> Effects:
    """Effects of heads that do nothing."""
    return {f"L0H{h}": [rng.gauss(0, sd) for _ in range(n_samples)] for h in range(n_heads)}


def steps(value: float) -> list[float]:
    """Effects on eight samples about a value."""
    return [value + 0.01 * i for i in range(8)]


def results(
    effects: Effects,
    base: Sequence[float] | float = -1.0,
    units: Sequence[str] | None = None,
    op: str = "zero",
) -> pd.DataFrame:
    """A results table of some effects; without units every sample is a sentence of its own."""
    n_samples = len(next(iter(effects.values())))
    bases = [base] * n_samples if isinstance(base, float) else base
    return pd.DataFrame(
        {
            "sample_id": f"s{i:03d}",
            "n_constraints": 1,
            "layer": component.layer,
            "head": component.index,
            "delta_logit_base": before,
            "delta_logit_head": before + effect,
            "head_effect": effect,
            "unit": units[i] if units else f"u{i:03d}",
            "group": "",
            "kind": component.kind,
            "index": component.index,
            "op": op,
        }
        for label, of_component in effects.items()
        for component in [tracing.Component.parse(label)]
        for i, (before, effect) in enumerate(zip(bases, of_component, strict=True))
    )


# ----- a run


def prepared(model: str, *flags: str) -> tracing.Experiment:
    """What a command line with some flags asks for, on two samples."""
    config = tracing.parse_args(["--model_id", model, "--num_samples", "2", *flags])
    return tracing.prepare(config, tracing.RunFolder(Path("nowhere")))


def texts(folder: Path) -> dict[str, dict[str, str]]:
    """The user texts of a run by sample and side."""
    return {
        sample["sample_id"]: {
            side: user_text(prompt["text"]) for side, prompt in sample["prompts"].items()
        }
        for sample in record_of(folder)["samples"]
    }


def targets_of(folder: Path) -> dict[str, list[str]]:
    return {sample["sample_id"]: sample["targets"] for sample in record_of(folder)["samples"]}


def halves(folder: Path) -> list[list[str]]:
    """The sample_ids of the choosing and of the held-out half."""
    table = read(folder).drop_duplicates("sample_id")
    units = tracing.split_units(table, 42)
    return [sorted(table["sample_id"][table["unit"].isin(half)]) for half in units]


def ablated(model: Any, labels: Iterable[str]) -> AbstractContextManager[None]:
    """Some components zeroed at once, with a plain hook each."""
    components = map(tracing.Component.parse, labels)
    return naive.zeroed(model, [(c.layer, c.kind, c.index) for c in components])

"""Statistics, results tables and ablation in plain arithmetic: another way to the same numbers."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import llama3_circuit_tracing as tracing
import naive
from conftest import command_line, read, record_of, user_text

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
            "prompts": f"p{i:03d}",
            "kind": component.kind,
            "index": component.index,
            "op": op,
        }
        for label, component_effects in effects.items()
        for component in [tracing.Component.parse(label)]
        for i, (before, effect) in enumerate(zip(bases, component_effects, strict=True))
    )


def with_control(
    table: pd.DataFrame, side: str, effects: Effects, base: Sequence[float] | float
) -> pd.DataFrame:
    """The table with a control prompt: its base is a's score less the control's, its effects are
    what edits move of that. Prompt b scores 0 throughout."""
    control = results(effects, base)
    scores = {f"score_a_{run}": table[f"delta_logit_{run}"] for run in ("base", "head")}
    scores |= {
        f"score_{side}_{run}": table[f"delta_logit_{run}"] - control[f"delta_logit_{run}"]
        for run in ("base", "head")
    }
    contrast = {f"effect_minus_{side}": control["head_effect"]}
    return table.assign(**scores, **contrast, score_b_base=0.0, score_b_head=0.0)


# ----- a run


def prepared(
    model: str, *words: str, record: dict[str, Any] | None = None
) -> tracing.Experiment[Any]:
    """What a command line asks for, on two samples unless it says so; `record`: of its folder."""
    arguments = command_line(model, Path("nowhere"), *words)
    if "--num_samples" not in words:
        arguments += ["--num_samples", "2"]
    request = tracing.parse_command_line(arguments)
    folder = tracing.RunFolder(Path("nowhere"), command=request.command)
    folder.record = record or {}
    return tracing.prepare(request.options, folder, tracing.Processes())


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


def joint_rows(folder: Path, measure: str = "a - b", samples: str = "held-out") -> pd.DataFrame:
    """The rows of circuit_confirm.csv of a measure on some samples."""
    rows = read(folder, "circuit_confirm.csv").fillna({"components": ""})
    chosen = (rows["measure"] == measure) & (rows["samples"] == samples)
    return rows[chosen].reset_index(drop=True)


def ablated(model: Any, labels: Iterable[str]) -> AbstractContextManager[None]:
    """Some components zeroed at once, with a plain hook each."""
    components = map(tracing.Component.parse, labels)
    return naive.zeroed(model, [(c.layer, c.kind, c.index) for c in components])


@torch.no_grad()
@contextmanager
def kept_alone(model: Any, kept: Sequence[str], kinds: Sequence[str]) -> Iterator[None]:
    """All columns of some kinds zeroed in every layer, but those of what is kept."""
    with ExitStack() as stack:
        sites = {("head" if k in ("head", "attn") else "mlp"): None for k in kinds}
        for layer, kind in (
            (n, kind) for n in range(len(naive.layers_of(model))) for kind in sites
        ):
            module = naive.module_of(model, layer, kind)
            mask = torch.zeros(module.in_features)
            for component in map(tracing.Component.parse, kept):
                kind_module = naive.module_of(model, layer, component.kind)
                if component.layer == layer and kind_module is module:
                    mask[naive.span_of(model, layer, component.kind, component.index)] = 1
            stack.enter_context(naive.hooked(module, lambda x, mask=mask: x * mask))
        yield


def divergence(model: Any, ids: Sequence[int], edit: AbstractContextManager[None]) -> float:
    """KL of the first reply token (nats), from the clean run to the edited run."""

    def log_probs() -> torch.Tensor:
        return torch.Tensor(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))

    before = log_probs()
    with edit:
        return float((before.exp() * (before - log_probs())).sum())


def divergence_along(
    model: Any,
    ids: Sequence[int],
    reply: Sequence[int],
    edited: Callable[[], AbstractContextManager[None]],
) -> float:
    """Mean KL of the tokens of a reply (nats), with forwards of their own for each."""
    by_token = []
    for n_read in range(len(reply)):
        by_token.append(divergence(model, [*ids, *reply[:n_read]], edited()))
    return statistics.fmean(by_token)


def student_tail(t: float, df: float, steps: int = 4000) -> float:
    """P(T > t) by Simpson's rule, over the angle whose tangent is T / sqrt(df)."""
    start = math.atan(t / math.sqrt(df))
    width = (math.pi / 2 - start) / steps
    cosines = [max(0.0, math.cos(start + i * width)) for i in range(steps + 1)]
    heights = [cosine ** (df - 1) for cosine in cosines]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    area = width / 3 * (heights[0] + inner + heights[-1])
    total = math.sqrt(math.pi) * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return area / total


def student_quantile(df: float) -> float:
    """The t that 2.5 % exceed, by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, df, 2000) > 0.025 else (low, middle)
    return low


def mean_test(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float, float]:
    """p and 95 % interval of a mean, by the formulas in plain loops: leave one out, and L-moments
    as means over pairs and triples."""
    n, mean = len(sums), sum(sums) / sum(counts)
    left_out = [
        (sum(sums) - total) / (sum(counts) - count)
        for total, count in zip(sums, counts, strict=True)
    ]
    away = [mean - one for one in left_out]
    error = math.sqrt(sum(a * a for a in away) * (n - 1) / n)
    size = sum(counts) ** 2 / sum(c * c for c in counts)
    pairs = statistics.fmean((b - a) / 2 for a, b in itertools.combinations(sorted(away), 2))
    triples = statistics.fmean(
        (c - 2 * b + a) / 3 for a, b, c in itertools.combinations(sorted(away), 3)
    )
    skewness = 6 * triples / pairs

    def corrected(t: float, bend: float) -> float:
        """|t| by the skewness / sqrt(size) in the direction of the mean."""
        if bend >= 0:
            return t + bend * t**2 / 6
        turn = 3 / -bend  # where Hall's cubic rises no further
        cubic = turn / 3 * (1 - max(0.0, 1 - t / turn) ** 3)
        return max(cubic, t / tracing.MAX_SHRINKAGE)

    bend = skewness / math.sqrt(size)
    t = corrected(abs(mean) / error, math.copysign(1, mean) * bend)
    df = max(1.0, size - 1)
    p = min(1.0, max(2 * student_tail(t, df), 2.0 ** (1 - n)))
    quantile = student_quantile(df)

    def reach(bend: float) -> float:
        """The |t| whose correction is Student's quantile, by bisection."""
        low, high = 0.0, 1e4
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if corrected(middle, bend) < quantile else (low, middle)
        return low

    return p, mean - reach(bend) * error, mean + reach(-bend) * error

"""What the test of the mean and its interval reach on data whose mean is known, in minutes.

  python tests/simulate_statistics.py                 (2,000 tables of 32 columns at each point)
  python tests/simulate_statistics.py --tables 10000

Prints Markdown. A false verdict is a column of mean 0 with q < 0.05, counted per table; sign flips
(of sums, which assume symmetry) are there to compare with. Standard error of 8 % of 2,000 tables:
0.6 %.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import llama3_circuit_tracing as tracing

N_COLUMNS, N_PLANTED, MOST_EXACT, N_FLIPS = 32, 4, 16, 9999
DISTRIBUTIONS = ("normal", "t, 2 df", "exponential", "lognormal, sd 0.5")


def draw(name: str, n: int, n_columns: int, generator: torch.Generator) -> Tensor:
    """Values [sentence, column] of mean 0."""
    normal = torch.randn(n, n_columns, generator=generator, dtype=torch.float64)
    waiting = -torch.rand(n, n_columns, generator=generator, dtype=torch.float64).log()
    match name:
        case "normal":
            return normal
        case "t, 2 df":
            return normal / waiting.sqrt()
        case "exponential":
            return waiting - 1
        case _:
            return (normal / 2).exp() - math.exp(1 / 8)


def sign_flip_p(values: Tensor) -> Tensor:
    """p [column] by all sign patterns of up to `MOST_EXACT` sentences, or by random ones."""
    n, exact = len(values), len(values) <= MOST_EXACT
    if exact:  # the last sentence keeps its sign
        bits = (torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n)) & 1
    else:
        bits = torch.randint(2, (N_FLIPS, n), generator=torch.Generator().manual_seed(0))
    signs, found = (1 - 2 * bits).float(), []
    for block in values.float().split(512, 1):
        bound = block.sum(0).abs() - 1e-5 * block.abs().sum(0)
        reached = ((signs @ block).abs_() >= bound).sum(0).double()
        found.append(reached / len(signs) if exact else (1 + reached) / (1 + N_FLIPS))
    return torch.cat(found)


def verdicts(p: Tensor) -> Tensor:
    """Which have q < 0.05 [table, column] in tables of `N_COLUMNS`."""
    return torch.stack([tracing.benjamini_hochberg(t) < 0.05 for t in p.view(-1, N_COLUMNS)])


def test(values: Tensor) -> Tensor:
    return tracing.mean_test(values, torch.ones_like(values))


def covered(sums: Tensor, counts: Tensor, truth: float) -> float:
    low, high = tracing.mean_interval(sums, counts)
    return float(((low <= truth) & (truth <= high)).double().mean())


def print_errors(n_tables: int, generator: torch.Generator) -> None:
    print("| data | sentences | false verdicts (tables) | by sign flips | 95 % intervals cover |")
    print("| --- | --: | --: | --: | --: |")
    for name in DISTRIBUTIONS:
        for n in (8, 16, 32, 64):
            values = draw(name, n, n_tables * N_COLUMNS, generator)
            ours, flips = (verdicts(p) for p in (test(values), sign_flip_p(values)))
            false, false_flips = (float(v.any(1).double().mean()) for v in (ours, flips))
            cover = covered(values, torch.ones_like(values), 0.0)
            print(f"| {name} | {n} | {false:.1%} | {false_flips:.1%} | {cover:.1%} |", flush=True)


def print_power(n_tables: int, generator: torch.Generator) -> None:
    print(f"\n| {N_PLANTED} of {N_COLUMNS} columns, 16 sentences | found | by sign flips | ratio |")
    print("| --- | --: | --: | --: |")
    for name in ("normal", "exponential"):
        for mean in (1.0, -1.0, 1.5):
            values = draw(name, 16, n_tables * N_COLUMNS, generator)
            values.view(16, n_tables, N_COLUMNS)[..., :N_PLANTED] += mean
            ours, flips = (
                float(verdicts(p)[:, :N_PLANTED].double().mean())
                for p in (test(values), sign_flip_p(values))
            )
            print(f"| {name}, mean {mean:+} SD | {ours:.1%} | {flips:.1%} | {ours / flips:.2f} |")


def print_uneven(n_tables: int, generator: torch.Generator) -> None:
    print("\n| 1 to 4 samples a sentence | sentences | false verdicts (tables) | intervals cover |")
    print("| --- | --: | --: | --: |")
    for name in DISTRIBUTIONS[:3]:
        for n in (16, 32):
            shape = n, n_tables * N_COLUMNS
            counts = torch.randint(1, 5, shape, generator=generator).double()
            sums = counts * draw(name, *shape, generator)  # half the variance is the sentence's
            sums += sum(draw(name, *shape, generator) * (counts > i) for i in range(4))
            false = verdicts(tracing.mean_test(sums, counts)).any(1).double().mean()
            print(f"| {name} | {n} | {float(false):.1%} | {covered(sums, counts, 0.0):.1%} |")


def print_rest(generator: torch.Generator) -> None:
    print("\n| one normal effect among 1,024 columns of p = 1, 16 sentences | found |")
    print("| --- | --: |")
    for mean in (1.5, 2, 3, 5):
        p = test(draw("normal", 16, 50_000, generator) + mean)
        print(f"| mean {mean} SD | {float((p * 1024 < 0.05).double().mean()):.1%} |")
    print("\n| 95 % interval of a share, base N(4, 1), edited base / 2 + N(0, 1/2) | covers |")
    print("| --- | --: |")
    for n in (8, 16):
        base = 4 + draw("normal", n, 50_000, generator)
        edited = base / 2 + draw("normal", n, 50_000, generator) / 2
        print(f"| {n} sentences | {covered(base - edited, base, 0.5):.1%} |")


WIDTH = 32  # of the inputs whose sides are told apart
APART = {"no": 0.0, "a": 4.2}  # from the mean of one side to that of the other, in SD


def accuracy_limits(
    fitted: Tensor, tested: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The 95th percentile of the accuracy [table] by shuffled labels of the fitted sentences alone,
    and of the tested ones too. Inputs are [table, sentence, side, width]."""
    limits: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(tracing.N_SHUFFLES):
        swapped = []
        for x in (fitted, tested):
            is_swapped = torch.rand(*x.shape[:2], 1, 1, generator=generator) < 0.5
            swapped.append(torch.where(is_swapped, x.flip(2), x))
        fit = tracing.difference_of_means(swapped[0])
        for found, x in zip(limits, (tested, swapped[1]), strict=True):
            found.append(tracing.accuracy_of(fit, x))
    alone, both = (torch.stack(found).quantile(0.95, 0) for found in limits)
    return alone, both


def print_shuffles(n_tables: int, generator: torch.Generator) -> None:
    print("\n| direction | sentences | accuracy | beats fitted labels shuffled | both shuffled |")
    print("| --- | --: | --: | --: | --: |")
    for name, apart in APART.items():
        for n in (5, 8, 16):
            inputs = []
            for _ in range(2):
                x = draw("normal", n, n_tables * 2 * WIDTH, generator)
                x = x.view(n, n_tables, 2, WIDTH).transpose(0, 1).contiguous()
                x[:, :, 0, 0] += apart
                inputs.append(x)
            fitted, tested = inputs
            accuracy = tracing.accuracy_of(tracing.difference_of_means(fitted), tested)
            limits = accuracy_limits(fitted, tested, generator)
            alone, both = (float((accuracy > limit).double().mean()) for limit in limits)
            print(f"| {name} | {n} | {float(accuracy.mean()):.2f} | {alone:.1%} | {both:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    print_errors(args.tables, generator)
    print_power(args.tables, generator)
    print_uneven(args.tables, generator)
    print_rest(generator)
    print_shuffles(args.tables, generator)


if __name__ == "__main__":
    main()

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

import pandas as pd
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


def crossed(
    wording_sd: float, n_wordings: int, n_columns: int, generator: torch.Generator
) -> Tensor:
    """Values [sentence, wording, column] of mean 0: of 16 sentences (SD 1), wordings (a given SD),
    and what a sentence has in one wording alone, with noise (SD 1)."""
    of_sentences = draw("normal", 16, n_columns, generator)[:, None]
    of_wordings = draw("normal", n_wordings, n_columns, generator)[None]
    rest = draw("normal", 16 * n_wordings, n_columns, generator).view(16, n_wordings, -1)
    return of_sentences + wording_sd * of_wordings + rest


def crossed_totals(values: Tensor) -> tuple[tracing.Totals, tracing.Totals]:
    """Totals by sentence and by wording of values [sentence, wording, column]."""
    ones = torch.ones_like(values)
    by_sentence = tracing.Totals(values.sum(1), ones.sum(1))
    by_wording = tracing.Totals(values.sum(0), ones.sum(0))
    return by_sentence, by_wording


def wording_errors(values: Tensor, uses_wordings: bool) -> tuple[float, float]:
    """How many tables have a false verdict, and how many intervals cover 0."""
    by_sentence, by_wording = crossed_totals(values)
    second = by_wording if uses_wordings else None
    p = tracing.mean_test(*by_sentence, second)
    low, high = tracing.mean_interval(*by_sentence, second)
    cover = ((low <= 0) & (high >= 0)).double().mean()
    return float(verdicts(p).any(1).double().mean()), float(cover)


def wordings_found(values: Tensor) -> float:
    """How many of planted columns have a verdict by both factors."""
    values.view(*values.shape[:2], -1, N_COLUMNS)[..., :N_PLANTED] += 2
    by_sentence, by_wording = crossed_totals(values)
    found = verdicts(tracing.mean_test(*by_sentence, by_wording))[:, :N_PLANTED]
    return float(found.double().mean())


def print_wordings(n_tables: int, generator: torch.Generator) -> None:
    print(
        "\n| 16 sentences in | wording SD | false verdicts by sentences alone | 95 % cover |",
        end="",
    )
    print(" by both factors | 95 % cover | mean 2 SD found |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for n_wordings in (2, 4):
        for wording_sd in (0.0, 0.25, 0.5, 1.0):
            values = crossed(wording_sd, n_wordings, n_tables * N_COLUMNS, generator)
            alone = "{:.1%} | {:.1%}".format(*wording_errors(values, uses_wordings=False))
            both = "{:.1%} | {:.1%}".format(*wording_errors(values, uses_wordings=True))
            found = f"{wordings_found(values):.1%}"
            print(f"| {n_wordings} wordings | {wording_sd} | {alone} | {both} | {found} |")


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


def verdict_rates(p_values: Tensor, n: int, n_tests: int) -> dict[str, float]:
    """How often a positive effect of n sentences has each verdict, alone in a table of so many
    tests, from its p values."""
    base = {"mean": 5.0, "is_clear": True, "n_sentences": n}
    told = []
    for p in p_values.tolist():
        effect = {"p": p, "q": min(1.0, p * n_tests), "n_sentences": n}
        effects = pd.DataFrame([effect | {"role": 5.0, "above_noise": True}])
        told.append(tracing.significance_verdicts(effects, base, n_tests, least_effect=0.0)[0])
    return pd.Series(told).value_counts(normalize=True).to_dict()


def print_too_few(generator: torch.Generator) -> None:
    print("\n| one effect of 5 SD | components | `unclear` by q alone | now | suffice |")
    print("| --- | --: | --: | --- | --: |")
    for n, n_tests in ((5, 1), (8, 270), (16, 270), (16, 1024), (16, 46_080)):
        p_values = test(draw("normal", n, 1000, generator) + 5)
        unclear = float((p_values * n_tests >= 0.05).double().mean())
        rates = verdict_rates(p_values, n, n_tests)
        now = ", ".join(f"{name} {rate:.1%}" for name, rate in sorted(rates.items()))
        n_needed = tracing.sentences_needed(n_tests)
        print(f"| {n} sentences | {n_tests} | {unclear:.1%} | {now} | {n_needed} |")


def results_of(values: Tensor) -> pd.DataFrame:
    """A results table of effects [sentence, head] of one layer."""
    rows = []
    for sentence, effects in enumerate(values.tolist()):
        for head, effect in enumerate(effects):
            row = {"layer": 0, "kind": "head", "index": head, "head_effect": effect}
            names = {"unit": f"u{sentence}", "sample_id": f"s{sentence}", "group": ""}
            rows.append(row | names | {"delta_logit_base": -4.0})
    return pd.DataFrame(rows)


def print_stability(n_tables: int, generator: torch.Generator) -> None:
    print(
        "\n| 32 heads, 16 sentences, best 8 of a half | before | chosen again, median | `stable` |"
    )
    print("| --- | --- | --: | --: |")
    rule = tracing.ChoiceRule(tracing.SelectionRule.parse("8"))
    for mean in (0.0, 1.0, 2.0, 4.0):
        again, stable = [], []
        for seed in range(n_tables):
            values = draw("normal", 16, 32, generator)
            values[:, :8] += mean
            table = results_of(values)
            sums = tracing.sum_by_sentence(table, "b")
            choosing, _ = tracing.split_units(table, seed)
            chosen = tracing.choose_circuit(sums, choosing, rule)
            stability = tracing.Stability.of(chosen, sums, rule, set(table["unit"]), seed)
            again.append(stability.n_again[8])
            stable.append(stability.is_stable)
        share = sum(stable) / n_tables
        median = f"{sum(again) / n_tables:.1f} of 8"
        print(f"| 8 of mean {mean:g} SD | nothing is said | {median} | {share:.0%} |")


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


def sets_of_kl(chosen: float, random: float, n: int, generator: torch.Generator) -> pd.DataFrame:
    """A chosen set beside 20 random ones, with mean KLs over n sentences, each of which is
    exponential about the set's own mean."""
    waiting = 1 + draw("exponential", n, 21, generator)
    means = torch.tensor([chosen, *[random] * 20], dtype=torch.float64)
    table = pd.DataFrame({"kl_b": (waiting.mean(0) * means).tolist()})
    table["set"] = ["chosen"] + ["random"] * 20
    return table.assign(kl_reply=math.nan, measure="a - b", n_ablated=8, n_sentences=n)


def print_damage(n_tables: int, generator: torch.Generator) -> None:
    print("\n| mean KL of the set, of random sets | sentences | damaged before | `damage` now |")
    print("| --- | --: | --: | --- |")
    cases = [(0.002, 0.001, 8), (0.002, 0.002, 1), (0.5, 0.05, 1), (0.5, 0.05, 8), (0.7, 0.6, 8)]
    for chosen, random, n in cases:
        before, now = [], []
        for _ in range(n_tables):
            table = sets_of_kl(chosen, random, n, generator)
            limit = table["kl_b"][1:].quantile(0.95)
            before.append(table["kl_b"][0] > limit)
            now.append(tracing.judge_damage(table, tracing.TraceOptions())["damage"][0])
        rates = pd.Series(now).value_counts(normalize=True)
        told = ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items())
        print(f"| {chosen}, {random} | {n} | {sum(before) / n_tables:.0%} | {told} |")


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
    print_too_few(generator)
    print_stability(max(1, args.tables // 100), generator)
    print_damage(max(1, args.tables // 10), generator)
    print_wordings(args.tables, generator)
    print_shuffles(args.tables, generator)


if __name__ == "__main__":
    main()

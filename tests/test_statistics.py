"""Intervals, tests and corrections by hand on small numbers, and where nothing is there."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import by_hand
import llama3_circuit_tracing as tracing

X = (0.3, -0.1, 0.7, 2.0, 0.2, 0.9)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def interval(values: Tensor, draws: int = 4000, seed: int = 0) -> tuple[list[float], list[float]]:
    """The interval of each column of values [sentence, column], one sample per sentence."""
    low, high = tracing.bootstrap_interval(values, torch.ones_like(values), draws, seed)
    return low.tolist(), high.tolist()


# ----- intervals


def test_the_interval_of_a_skewed_sample_is_that_of_scipy() -> None:
    # scipy 1.17.1, bootstrap((x,), numpy.mean, method="BCa", n_resamples=200_000), three seeds:
    # (0.199, 0.981), (0.199, 0.994), (0.199, 0.996); method="percentile": (0.157, 0.802)
    x = column(0.02, 0.05, 0.11, 0.13, 0.2, 0.24, 0.31, 0.47, 0.8, 1.9)
    (low,), (high,) = interval(x, draws=50_000)
    assert low == pytest.approx(0.199, abs=0.01)
    assert high == pytest.approx(0.99, abs=0.03)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [1, 3, 1, 2, 1]])
def test_the_interval_of_a_skewed_sample_agrees_with_all_resamples_enumerated(
    counts: list[int],
) -> None:
    """A sentence weighs by its samples, in the mean as in every resample."""
    values = list(zip([0.0, 0.3, 0.1, 2.0, 2.6], counts, strict=True))  # sums, counts

    def mean_of(drawn: Sequence[tuple[float, int]]) -> float:
        return sum(total for total, _ in drawn) / sum(count for _, count in drawn)

    means = sorted(map(mean_of, itertools.product(values, repeat=5)))
    mean, normal = mean_of(values), statistics.NormalDist()
    left_out = [mean_of(values[:i] + values[i + 1 :]) for i in range(5)]
    away = [statistics.fmean(left_out) - one for one in left_out]
    skew = sum(a**3 for a in away) / (6 * sum(a**2 for a in away) ** 1.5)
    below = sum(m < mean - 1e-12 for m in means) + sum(abs(m - mean) <= 1e-12 for m in means) / 2
    bias = normal.inv_cdf(below / len(means))
    expected = []
    for tail in (0.025, 0.975):
        z = bias + normal.inv_cdf(tail)
        expected.append(means[round(normal.cdf(bias + z / (1 - skew * z)) * (len(means) - 1))])
    sums = column(*(total for total, _ in values))
    low, high = tracing.bootstrap_interval(sums, column(*counts), 50_000, 0)
    assert float(low) == pytest.approx(expected[0], abs=0.03)
    assert float(high) == pytest.approx(expected[1], abs=0.06)


def test_the_interval_of_symmetric_data_is_the_percentile_interval() -> None:
    values = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
    (low,), (high,) = interval(column(*values), draws=20_000)
    rng = random.Random(0)
    drawn = sorted(statistics.fmean(rng.choices(values, k=8)) for _ in range(20_000))
    assert low == pytest.approx(drawn[500], abs=0.1)
    assert high == pytest.approx(drawn[19_500], abs=0.1)
    assert low == pytest.approx(-high, abs=0.1)


def test_the_interval_moves_and_stretches_with_the_data() -> None:
    x = column(*X)
    (low,), (high,) = interval(x)
    assert interval(3 * x + 5) == ([pytest.approx(3 * low + 5)], [pytest.approx(3 * high + 5)])
    assert interval(-x) == ([pytest.approx(-high, abs=0.03)], [pytest.approx(-low, abs=0.03)])


def test_every_column_has_the_interval_that_it_has_alone() -> None:
    x = torch.tensor([[0.1, 5.0], [0.4, -2.0], [-0.3, 1.0], [0.9, 0.5]], dtype=torch.float64)
    together = interval(x)
    for i in range(2):
        alone = interval(x[:, i : i + 1])
        assert [end[i] for end in together] == pytest.approx([end[0] for end in alone])


def test_the_interval_depends_on_the_seed_and_on_nothing_else() -> None:
    x = column(*X)
    assert interval(x, seed=1) == interval(x, seed=1)
    assert interval(x, draws=200, seed=1) != interval(x, draws=200, seed=2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7])
def test_the_interval_of_equal_values_is_a_point_and_a_single_value_has_none(value: float) -> None:
    assert interval(column(*[value] * 7)) == ([pytest.approx(value)], [pytest.approx(value)])
    assert all(math.isnan(end) for (end,) in interval(column(value)))


@pytest.mark.parametrize("shape", ["normal", "exponential"])
def test_the_interval_covers_the_true_mean_nearly_95_times_in_100(shape: str) -> None:
    draw, mean = (torch.randn, 0.0) if shape == "normal" else (torch.rand, 1.0)
    values = draw(30, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values if shape == "normal" else -values.log()
    low, high = tracing.bootstrap_interval(values, torch.ones_like(values), 1000, 0)
    covered = float(((low <= mean) & (mean <= high)).double().mean())
    assert 0.905 < covered < 0.97  # a bootstrap of 30 sentences covers a little less than it says


# ----- sign flips


@pytest.mark.parametrize(
    ("sums", "p"),
    [
        ([2.0], 1.0),
        ([1.0, 2.0], 2 / 4),
        ([1.0, -2.0], 4 / 4),
        ([1.0, 2.0, 3.0], 2 / 8),
        ([3.0, -1.0, 1.0], 6 / 8),  # |sum| 3 is reached by 5, 3 and 3, not by 1
        ([1.0, 2.0, 3.0, 4.0], 2 / 16),
        ([-1.0, -2.0, -3.0, -4.0], 2 / 16),
        ([4.0, 3.0, 2.0, -1.0], 4 / 16),  # 8 is reached by 10 and 8
        ([0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, -0.3], 1.0),  # 0 up to rounding, which every pattern reaches
    ],
)
def test_p_is_the_share_of_sign_patterns_that_reach_the_sum(sums: list[float], p: float) -> None:
    assert tracing.sign_flip_p(column(*sums), 0).tolist() == [p]
    assert by_hand.sign_flip_p(sums) == p


def test_p_agrees_with_a_plain_loop_over_all_patterns() -> None:
    rng = random.Random(3)
    table = [[rng.gauss(0.3, 1) for _ in range(5)] for _ in range(9)]
    found = tracing.sign_flip_p(torch.tensor(table, dtype=torch.float64), 0).tolist()
    assert found == [by_hand.sign_flip_p([row[i] for row in table]) for i in range(5)]
    assert len(set(found)) > 1


@pytest.mark.parametrize("n", [2, 5, 16, 20])
def test_no_exact_p_is_below_two_to_the_one_minus_n(n: int) -> None:
    sums = torch.linspace(1, 2, n, dtype=torch.float64)[:, None]
    assert float(tracing.sign_flip_p(sums, 0)) == 2.0 ** (1 - n)


def test_the_exact_p_of_many_columns_is_computed_in_pieces_without_loss() -> None:
    sums = torch.linspace(1, 2, 19, dtype=torch.float64)[:, None].repeat(1, 80)
    sums[:, 0] = 0
    assert 2**18 * 80 > 2**24  # more than one piece
    assert tracing.sign_flip_p(sums, 0).tolist() == [1.0] + [2.0**-18] * 79


@pytest.mark.parametrize("n_columns", [1, 99, 150])
def test_beyond_20_sentences_p_is_one_plus_c_by_one_plus_b_with_100_draws_per_test(
    n_columns: int,
) -> None:
    all_alike = torch.linspace(1, 2, 40, dtype=torch.float64)[:, None]
    p = tracing.sign_flip_p(all_alike.expand(-1, n_columns), 0)
    assert p.tolist() == [1 / (1 + max(9999, 100 * n_columns))] * n_columns


def test_the_random_p_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    sums = torch.randn(12, 30, generator=generator, dtype=torch.float64) + 0.3
    exact = tracing.sign_flip_p(sums, 0)
    monkeypatch.setattr(tracing, "MOST_EXACT", 11)
    drawn = tracing.sign_flip_p(sums, 0)
    assert float((exact - drawn).abs().max()) < 0.02  # 4 standard errors of 9,999 draws
    assert not torch.equal(exact, drawn)
    assert torch.equal(drawn, tracing.sign_flip_p(sums, 0))
    assert not torch.equal(drawn, tracing.sign_flip_p(sums, 1))


def test_p_is_uniform_or_larger_where_nothing_is_there() -> None:
    generator = torch.Generator().manual_seed(2)
    sums = torch.randn(12, 2000, generator=generator, dtype=torch.float64)
    p = tracing.sign_flip_p(sums, 0)
    for level in (0.01, 0.05, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.035)


# ----- many tests


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05] * 5),
        ([0.5, 0.001, 0.04, 0.03], [0.5, 0.004, 0.16 / 3, 0.16 / 3]),
        ([0.9, 0.8], [0.9, 0.9]),
        ([0.2], [0.2]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_q_values_by_hand(p: list[float], q: list[float]) -> None:
    found = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert found.tolist() == pytest.approx(q)
    assert by_hand.q_values(p) == pytest.approx(q)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_q_values_agree_with_a_plain_loop_ties_included(n: int) -> None:
    rng = random.Random(n)
    p = [rng.choice([rng.random(), rng.random() ** 4, 0.25]) for _ in range(n)]
    found = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert found.tolist() == pytest.approx(by_hand.q_values(p))


def test_intervals_of_many_columns_are_those_of_each_alone() -> None:
    """They are drawn in blocks that fit into memory."""
    torch.manual_seed(0)
    sums, draws = torch.randn(6, 40, dtype=torch.float64), 2**22
    counts = torch.ones_like(sums)
    whole = tracing.bootstrap_interval(sums, counts, draws, seed=1)
    for column in (0, 7, 8, 39):
        alone = slice(column, column + 1)
        found = tracing.bootstrap_interval(sums[:, alone], counts[:, alone], draws, seed=1)
        torch.testing.assert_close(whole[:, alone], found, rtol=0, atol=1e-12)

"""Intervals, tests and corrections by hand on small numbers, and where nothing is there."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import by_hand
import llama3_circuit_tracing as tracing
import simulate_statistics as simulation

X = (0.3, -0.1, 0.7, 2.0, 0.2, 0.9)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def p_of(values: Tensor) -> list[float]:
    return tracing.mean_test(values, torch.ones_like(values)).tolist()


def interval(values: Tensor) -> tuple[list[float], list[float]]:
    """The interval of each column of values [sentence, column], one sample per sentence."""
    low, high = tracing.mean_interval(values, torch.ones_like(values))
    return low.tolist(), high.tolist()


def any_counts(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Skewed sums of either direction and one to four samples per sentence, in 60 columns."""
    counts = torch.randint(1, 5, (n, 60), generator=generator).double()
    values = simulation.draw("exponential", n, 60, generator) + 0.4
    values[:, ::2] *= -1
    return values * counts, counts


# ----- Student's distribution


@pytest.mark.parametrize(
    ("df", "t"),  # published tables: 2.5 % are above
    [
        (1, 12.7062047),
        (2, 4.3026527),
        (3, 3.1824463),
        (4, 2.7764451),
        (5, 2.5705818),
        (10, 2.2281389),
        (15, 2.1314495),
        (30, 2.0422725),
        (120, 1.9799304),
        (1e7, 1.9599642),
    ],
)
def test_quantiles_are_those_of_published_tables(df: float, t: float) -> None:
    quantiles = tracing.student_quantile(torch.tensor([df, 7.0, df], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([t, 2.3646243, t], rel=1e-7)


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0, 3.0, 12.0, 50.0])
def test_tails_are_those_of_closed_forms_and_of_numerical_integration(t: float) -> None:
    dfs = torch.tensor([1.0, 2.0, 4.0, 1.3, 2.5, 15.0, 99.5, 5000.0], dtype=torch.float64)
    tails = tracing.student_p(torch.full_like(dfs, t), dfs).tolist()
    arc_tangent = math.pi / 2 - math.atan(t)
    ratio = t / math.sqrt(4 + t * t)
    closed = [
        2 / math.pi * arc_tangent,
        1 - t / math.sqrt(2 + t * t),
        1 - 1.5 * ratio + 0.5 * ratio**3,
    ]
    assert tails[:3] == pytest.approx(closed, rel=1e-6)
    for df, tail in zip(dfs.tolist(), tails, strict=True):
        integrated = 2 * by_hand.student_tail(t, df, 200_000)
        assert tail == pytest.approx(integrated, rel=1e-6, abs=1e-300)


def test_quantiles_of_any_df_are_where_the_tail_is_five_percent() -> None:
    df = 1 + torch.rand(2000, generator=torch.Generator().manual_seed(0)).double() * 60
    tails = tracing.student_p(tracing.student_quantile(df), df)
    torch.testing.assert_close(tails, torch.full_like(df, 0.05), rtol=1e-9, atol=0)


# ----- p


@pytest.mark.parametrize("n", [6, 9, 16, 31])
@pytest.mark.parametrize("mean", [0.0, 0.4, -1.0])
def test_without_skewness_p_is_that_of_students_t(n: int, mean: float) -> None:
    half = torch.linspace(0.3, 2.2, n // 2, dtype=torch.float64)
    middle = torch.zeros(n % 2, dtype=torch.float64)
    x = torch.cat([-half, middle, half])[:, None] + mean
    t = float(x.mean() / x.std() * math.sqrt(n))
    expected = max(2 * by_hand.student_tail(abs(t), n - 1), 2.0 ** (1 - n))
    assert p_of(x) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("n", [7, 16, 40])
def test_p_and_interval_are_those_of_plain_loops_with_samples_of_any_number(n: int) -> None:
    sums, counts = any_counts(n, torch.Generator().manual_seed(n))
    p_values = tracing.mean_test(sums, counts).tolist()
    ends = tracing.mean_interval(sums, counts).T.tolist()
    for i in range(sums.shape[1]):
        p, low, high = by_hand.mean_test(sums[:, i].tolist(), counts[:, i].tolist())
        assert p_values[i] == pytest.approx(p, rel=1e-6)
        assert ends[i] == pytest.approx([low, high], abs=1e-5 * (high - low))


def test_a_tail_away_from_the_mean_makes_p_larger_and_one_along_it_smaller() -> None:
    x = column(*(value - 0.35 for value in (0.02, 0.05, 0.11, 0.13, 0.2, 0.24, 0.31, 0.4, 1.9)))
    along, away = (x - x.mean() + x.std() * mean for mean in (0.7, -0.7))
    student = 2 * by_hand.student_tail(0.7 * math.sqrt(len(x)), len(x) - 1)
    assert p_of(along)[0] < student < p_of(away)[0]


@pytest.mark.parametrize("n", [2, 5, 16, 200])
def test_no_p_is_below_that_of_all_signs_alike(n: int) -> None:
    assert p_of(column(*[1.5] * n)) == [tracing.smallest_p(n)] == [2.0 ** (1 - n)]
    assert p_of(torch.linspace(5, 5.001, n, dtype=torch.float64)[:, None]) == [2.0 ** (1 - n)]


@pytest.mark.parametrize("sums", [[2.0], [0.0, 0.0, 0.0], [0.1, 0.2, -0.3]])
def test_p_is_one_for_a_single_sentence_and_where_the_mean_is_0(sums: list[float]) -> None:
    assert p_of(column(*sums)) == [pytest.approx(1.0)]


# ----- intervals


def test_the_interval_moves_stretches_and_turns_with_the_data() -> None:
    x = column(*X)
    (low,), (high,) = interval(x)
    assert low < float(x.mean()) < high
    assert interval(3 * x + 5) == ([pytest.approx(3 * low + 5)], [pytest.approx(3 * high + 5)])
    assert interval(-x) == ([pytest.approx(-high)], [pytest.approx(-low)])


@pytest.mark.parametrize("n", [8, 16, 33])
def test_the_interval_covers_0_where_p_is_at_least_five_percent(n: int) -> None:
    values = simulation.draw("exponential", n, 4000, torch.Generator().manual_seed(n))
    values += 2 / math.sqrt(n)
    values[:, ::2] *= -1
    p, (low, high) = torch.tensor(p_of(values)), map(torch.tensor, interval(values))
    sure = (p - 0.05).abs() > 1e-9
    assert torch.equal((p < 0.05)[sure], ((low > 0) | (high < 0))[sure])
    assert 0.1 < float((p < 0.05).double().mean()) < 0.9


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7])
def test_the_interval_of_equal_values_is_a_point_and_a_single_value_has_none(value: float) -> None:
    assert interval(column(*[value] * 7)) == ([pytest.approx(value)], [pytest.approx(value)])
    assert all(math.isnan(end) for (end,) in interval(column(value)))


# ----- both


def test_every_column_has_what_it_has_alone_and_empty_sentences_do_not_count() -> None:
    sums, counts = any_counts(9, torch.Generator().manual_seed(4))
    sums[2:4, 1] = counts[2:4, 1] = 0
    p, ends = tracing.mean_test(sums, counts), tracing.mean_interval(sums, counts)
    for i in range(3):
        has_samples = counts[:, i] > 0
        alone = sums[has_samples, i : i + 1], counts[has_samples, i : i + 1]
        torch.testing.assert_close(tracing.mean_test(*alone), p[i : i + 1])
        torch.testing.assert_close(tracing.mean_interval(*alone), ends[:, i : i + 1])


def test_sentences_of_as_many_samples_each_count_once() -> None:
    x = torch.cat([column(*X), -column(*X) - 0.2], 1)
    many = tracing.mean_test(5 * x, torch.full_like(x, 5.0))
    torch.testing.assert_close(many, torch.tensor(p_of(x), dtype=torch.float64))


SIMULATED = [(name, n) for name in ("normal", "t, 2 df", "exponential") for n in (16, 32)]


@pytest.mark.parametrize(("name", "n"), SIMULATED)
def test_few_tables_show_anything_where_nothing_is_there(name: str, n: int) -> None:
    """At most 8 %, and three standard errors of 1,000 tables."""
    values = simulation.draw(name, n, 32_000, torch.Generator().manual_seed(n))
    share_with_verdicts = simulation.verdicts(simulation.test(values)).any(1).double().mean()
    assert float(share_with_verdicts) < 0.08 + 3 * 0.0086


def test_an_effect_of_a_standard_deviation_is_found_nearly_as_often_as_by_sign_flips() -> None:
    values = simulation.draw("normal", 16, 32_000, torch.Generator().manual_seed(1))
    values.view(16, -1, 32)[..., :4] += 1
    found_by_t, found_by_flips = (
        float(simulation.verdicts(p)[:, :4].double().mean())
        for p in (simulation.test(values), simulation.sign_flip_p(values))
    )
    assert found_by_t > 0.85 * found_by_flips - 0.02


@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize("name", ["normal", "t, 2 df", "exponential"])
def test_the_interval_covers_the_true_mean_about_95_times_in_100(name: str, n: int) -> None:
    values = simulation.draw(name, n, 20_000, torch.Generator().manual_seed(n))
    covered = simulation.covered(values, torch.ones_like(values), 0.0)
    low, high = (0.94, 0.96) if name == "normal" else (0.93, 0.97)
    assert low < covered < high + 0.002


def test_the_interval_of_a_ratio_covers_it_with_few_sentences() -> None:
    generator = torch.Generator().manual_seed(0)
    base = -4 + simulation.draw("normal", 8, 20_000, generator)
    edited = base / 2 + simulation.draw("normal", 8, 20_000, generator) / 2
    assert 0.94 < simulation.covered(base - edited, base, 0.5) < 0.97


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
    computed = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert computed.tolist() == pytest.approx(q)
    assert by_hand.q_values(p) == pytest.approx(q)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_q_values_agree_with_a_plain_loop_ties_included(n: int) -> None:
    rng = random.Random(n)
    p = [rng.choice([rng.random(), rng.random() ** 4, 0.25]) for _ in range(n)]
    computed = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert computed.tolist() == pytest.approx(by_hand.q_values(p))


def test_the_simulation_runs_in_small(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["simulate_statistics.py", "--tables", "2"])
    simulation.main()
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == 10
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1

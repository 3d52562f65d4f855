"""The statistics by hand on small numbers, under a simulated null, and with a planted effect."""

from __future__ import annotations

import itertools
import logging
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import llama3_circuit_tracing as tracing

CONFIG = tracing.Config(num_bootstrap=500)
NO_FLOOR = math.nan


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def interval(values: Tensor, draws: int = 4000, seed: int = 0) -> tuple[list[float], list[float]]:
    """The interval of each column of values [unit, column], one sample per unit."""
    low, high = tracing.bootstrap_interval(values, torch.ones_like(values), draws, seed)
    return low.tolist(), high.tolist()


def results(
    effects: Sequence[Sequence[float]],
    base: Sequence[float] | float = -1.0,
    units: Sequence[str] | None = None,
) -> pd.DataFrame:
    """A results table of effects [sample, head], all heads in layer 0."""
    rows = []
    for i, of_sample in enumerate(effects):
        before = base if isinstance(base, float) else base[i]
        for head, effect in enumerate(of_sample):
            rows.append(
                {
                    "sample_id": f"s{i:03d}",
                    "n_constraints": 1,
                    "layer": 0,
                    "head": head,
                    "delta_logit_base": before,
                    "delta_logit_head": before + effect,
                    "head_effect": effect,
                    "unit": units[i] if units else f"u{i:03d}",
                    "group": "",
                    "kind": "head",
                    "index": head,
                }
            )
    return pd.DataFrame(rows)


def noise(rng: random.Random, n_samples: int, n_heads: int, sd: float = 0.1) -> list[list[float]]:
    return [[rng.gauss(0, sd) for _ in range(n_heads)] for _ in range(n_samples)]


# ----- bootstrap_interval


def test_the_interval_of_a_skewed_sample_is_that_of_scipy() -> None:
    # scipy 1.17.1, bootstrap((x,), numpy.mean, method="BCa", n_resamples=200_000), three seeds:
    # (0.199, 0.981), (0.199, 0.994), (0.199, 0.996); method="percentile": (0.157, 0.802)
    x = column(0.02, 0.05, 0.11, 0.13, 0.2, 0.24, 0.31, 0.47, 0.8, 1.9)
    (low,), (high,) = interval(x, draws=50_000)
    assert low == pytest.approx(0.199, abs=0.01)
    assert high == pytest.approx(0.99, abs=0.03)


def test_the_interval_of_a_skewed_sample_agrees_with_all_resamples_enumerated() -> None:
    values = [0.0, 0.1, 0.3, 1.0, 2.6]
    means = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=5))
    mean, normal = statistics.fmean(values), statistics.NormalDist()
    left_out = [statistics.fmean(values[:i] + values[i + 1 :]) for i in range(5)]
    away = [statistics.fmean(left_out) - one for one in left_out]
    skew = sum(a**3 for a in away) / (6 * sum(a**2 for a in away) ** 1.5)
    below = sum(m < mean - 1e-12 for m in means) + sum(abs(m - mean) <= 1e-12 for m in means) / 2
    bias = normal.inv_cdf(below / len(means))
    expected = []
    for tail in (0.025, 0.975):
        z = bias + normal.inv_cdf(tail)
        expected.append(means[round(normal.cdf(bias + z / (1 - skew * z)) * (len(means) - 1))])
    (low,), (high,) = interval(column(*values), draws=50_000)
    assert low == pytest.approx(expected[0], abs=0.03)
    assert high == pytest.approx(expected[1], abs=0.06)


def test_the_interval_of_symmetric_data_is_the_percentile_interval() -> None:
    values = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
    (low,), (high,) = interval(column(*values), draws=20_000)
    rng = random.Random(0)
    drawn = sorted(statistics.fmean(rng.choices(values, k=8)) for _ in range(20_000))
    assert low == pytest.approx(drawn[500], abs=0.1)
    assert high == pytest.approx(drawn[19_500], abs=0.1)
    assert low == pytest.approx(-high, abs=0.1)


def test_the_interval_moves_and_stretches_with_the_data() -> None:
    x = column(0.3, -0.1, 0.7, 2.0, 0.2, 0.9)
    (low,), (high,) = interval(x)
    (moved_low,), (moved_high,) = interval(3 * x + 5)
    assert (moved_low, moved_high) == pytest.approx((3 * low + 5, 3 * high + 5))
    (turned_low,), (turned_high,) = interval(-x)
    assert (turned_low, turned_high) == pytest.approx((-high, -low), abs=0.03)


def test_every_column_has_the_interval_that_it_has_alone() -> None:
    x = torch.tensor([[0.1, 5.0], [0.4, -2.0], [-0.3, 1.0], [0.9, 0.5]], dtype=torch.float64)
    together = interval(x)
    for i in range(2):
        alone = interval(x[:, i : i + 1])
        assert [end[i] for end in together] == pytest.approx([end[0] for end in alone])


def test_the_interval_depends_on_the_seed_and_on_nothing_else() -> None:
    x = column(0.3, -0.1, 0.7, 2.0, 0.2, 0.9)
    assert interval(x, seed=1) == interval(x, seed=1)
    assert interval(x, draws=200, seed=1) != interval(x, draws=200, seed=2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7])
def test_the_interval_of_equal_values_is_a_point(value: float) -> None:
    (low,), (high,) = interval(column(*[value] * 7))
    assert (low, high) == pytest.approx((value, value), abs=1e-12)


def test_one_unit_has_no_interval() -> None:
    (low,), (high,) = interval(column(0.4))
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_mean_in_the_interval_weighs_units_by_their_samples() -> None:
    """Three units of 1, 1 and 98 samples: nearly every draw is near the big unit's mean."""
    sums, counts = column(10.0, 10.0, 0.0), column(1.0, 1.0, 98.0)
    low, high = tracing.bootstrap_interval(sums, counts, 4000, 0)
    draws = {
        (10 * a + 10 * b) / (a + b + 98 * c)
        for a, b, c in itertools.product(range(4), repeat=3)
        if a + b + c == 3
    }
    assert min(abs(float(low) - d) for d in draws) < 1e-9
    assert float(low) <= 20 / 100 <= float(high)
    assert float(low) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda g: torch.randn(30, 1000, generator=g, dtype=torch.float64), 0.0),
        (lambda g: torch.rand(30, 1000, generator=g, dtype=torch.float64).log().neg(), 1.0),
    ],
    ids=["normal", "exponential"],
)
def test_the_interval_covers_the_true_mean_nearly_95_times_in_100(
    draw: Callable[[torch.Generator], Tensor], mean: float
) -> None:
    values = draw(torch.Generator().manual_seed(0))
    low, high = tracing.bootstrap_interval(values, torch.ones_like(values), 1000, 0)
    covered = float(((low <= mean) & (mean <= high)).double().mean())
    assert 0.905 < covered < 0.97  # a bootstrap of 30 units covers a little less than it says


# ----- sign_flip_p


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
    ],
)
def test_the_sign_flip_p_is_the_share_of_sign_patterns_that_reach_the_sum(
    sums: list[float], p: float
) -> None:
    assert tracing.sign_flip_p(column(*sums), 0).tolist() == [p]


def test_ties_up_to_rounding_count_as_reached() -> None:
    # 0.1 + 0.2 - 0.3 and 0.3 - 0.2 - 0.1 are zero up to rounding: every pattern reaches the sum
    assert float(tracing.sign_flip_p(column(0.1, 0.2, -0.3), 0)) == 1.0


def test_the_sign_flip_p_agrees_with_a_plain_loop_over_all_patterns() -> None:
    rng = random.Random(3)
    table = [[rng.gauss(0.3, 1) for _ in range(5)] for _ in range(9)]
    got = tracing.sign_flip_p(torch.tensor(table, dtype=torch.float64), 0).tolist()
    for i, p in enumerate(got):
        values = [row[i] for row in table]
        sums = [
            abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=9)
        ]
        assert p == sum(s >= abs(sum(values)) - 1e-9 for s in sums) / 2**9


@pytest.mark.parametrize("n", [2, 5, 16, 20])
def test_no_exact_p_is_below_two_to_the_one_minus_n(n: int) -> None:
    sums = torch.linspace(1, 2, n, dtype=torch.float64)[:, None]
    assert float(tracing.sign_flip_p(sums, 0)) == 2.0 ** (1 - n) == tracing.smallest_p(n, 1)


def test_the_exact_p_of_many_columns_is_computed_in_pieces_without_loss() -> None:
    sums = torch.linspace(1, 2, 19, dtype=torch.float64)[:, None].expand(-1, 80)
    assert 2**18 * 80 > 2**24  # more than one piece
    assert tracing.sign_flip_p(sums, 0).tolist() == [2.0**-18] * 80


def test_beyond_20_units_p_is_one_plus_c_by_one_plus_b_with_100_draws_per_test() -> None:
    all_alike = torch.linspace(1, 2, 40, dtype=torch.float64)[:, None]
    for n_columns in (1, 99, 150):
        p = tracing.sign_flip_p(all_alike.expand(-1, n_columns), 0)
        draws = max(9999, 100 * n_columns)
        assert p.tolist() == [1 / (1 + draws)] * n_columns
        assert tracing.smallest_p(40, n_columns) == 1 / (1 + draws)
        assert n_columns * tracing.smallest_p(40, n_columns) < 0.05


def test_the_random_p_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    sums = torch.randn(12, 30, generator=generator, dtype=torch.float64) + 0.3
    exact = tracing.sign_flip_p(sums, 0)
    monkeypatch.setattr(tracing, "MOST_EXACT", 11)
    drawn = tracing.sign_flip_p(sums, 0)
    assert float((exact - drawn).abs().max()) < 0.02  # 4 standard errors of 9,999 draws
    assert not torch.equal(exact, drawn)


def test_p_is_uniform_or_larger_where_nothing_is_there() -> None:
    generator = torch.Generator().manual_seed(2)
    sums = torch.randn(12, 2000, generator=generator, dtype=torch.float64)
    p = tracing.sign_flip_p(sums, 0)
    for level in (0.01, 0.05, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.035)


# ----- benjamini_hochberg


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
    got = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert got.tolist() == pytest.approx(q)


def naive_q(p: Sequence[float]) -> list[float]:
    """The smallest level at which each test is rejected."""
    m, ordered = len(p), sorted(p)
    return [
        min([1.0, *(m * ordered[k] / (k + 1) for k in range(m) if ordered[k] >= one)]) for one in p
    ]


def test_q_values_agree_with_a_plain_loop_ties_included() -> None:
    rng = random.Random(0)
    for n in (1, 2, 7, 50):
        p = [rng.choice([rng.random(), rng.random() ** 4, 0.25]) for _ in range(n)]
        got = tracing.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
        assert got.tolist() == pytest.approx(naive_q(p))


# ----- spearman


def test_rank_correlation_by_hand_with_a_tie() -> None:
    # ranks 1 2.5 2.5 4 and 1 3 2 4: 4.5 / sqrt(4.5 * 5)
    one, other = pd.Series([1.0, 2.0, 2.0, 4.0]), pd.Series([10.0, 30.0, 20.0, 400.0])
    assert tracing.spearman(one, other) == pytest.approx(4.5 / math.sqrt(22.5))


def test_rank_correlation_of_a_growing_and_of_a_falling_function_is_1_and_minus_1() -> None:
    one = pd.Series([0.3, -2.0, 5.0, 1.0])
    assert tracing.spearman(one, one**3) == pytest.approx(1)
    assert tracing.spearman(one, -one) == pytest.approx(-1)


# ----- component_statistics: sentences are the units


COLUMNS = ["n_samples", "n_sentences", "mean", "median", "sd", "ci_low", "ci_high", "p", "q"]


def test_the_columns_of_a_component_by_hand() -> None:
    table = results([[0.1, 0.4], [0.2, -0.4], [0.6, 0.4], [0.3, -0.4]])
    heads = tracing.component_statistics(table, "head_effect", CONFIG)
    assert list(heads.columns) == COLUMNS
    first, second = heads.to_dict("records")
    assert (first["n_samples"], first["n_sentences"]) == (4, 4)
    assert first["mean"] == pytest.approx(0.3)
    assert first["median"] == pytest.approx(0.25)
    assert first["sd"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09 + 0) / 3))
    assert first["ci_low"] < 0.3 < first["ci_high"]
    assert (first["p"], first["q"]) == (2 / 16, 2 * 2 / 16)
    assert (second["p"], second["q"]) == (1.0, 1.0)


def test_samples_of_one_sentence_are_no_further_evidence() -> None:
    """Every sample twice under its sentence changes neither interval nor p; as sentences it does."""
    effects = noise(random.Random(5), 8, 6)
    once = results(effects)
    copies = results([*effects, *effects], units=[f"u{i:03d}" for i in [*range(8), *range(8)]])
    single = tracing.component_statistics(once, "head_effect", CONFIG)
    double = tracing.component_statistics(copies, "head_effect", CONFIG)
    assert (double["n_samples"] == 16).all()
    assert (double["n_sentences"] == 8).all()
    for name in ("mean", "ci_low", "ci_high", "p", "q"):
        assert double[name].tolist() == pytest.approx(single[name].tolist()), name
    naive = tracing.component_statistics(
        results([*effects, *effects]), "head_effect", CONFIG
    )  # every copy as a sentence of its own
    assert (naive["ci_high"] - naive["ci_low"] < single["ci_high"] - single["ci_low"]).all()
    assert naive["p"].tolist() != pytest.approx(single["p"].tolist())


def test_the_base_has_the_interval_of_sentences_too() -> None:
    rng = random.Random(1)
    base = [rng.gauss(-1, 0.5) for _ in range(8)]
    effects = noise(rng, 8, 2)
    units = [f"u{i:03d}" for i in range(8)]
    once = tracing.find(results(effects, base, units), CONFIG, NO_FLOOR)
    twice = tracing.find(results(effects * 2, base * 2, units * 2), CONFIG, NO_FLOOR)
    assert once.n_units == twice.n_units == 8
    assert (once.base_low, once.base_high) == pytest.approx((twice.base_low, twice.base_high))
    assert once.base_mean == pytest.approx(statistics.fmean(base))


def test_cells_that_a_table_lacks_are_left_out() -> None:
    effects = noise(random.Random(2), 6, 3)
    table = results(effects)
    holes = table.drop(
        table[(table["head"] == 1) & table["sample_id"].isin(["s001", "s004"])].index
    )
    full = tracing.component_statistics(table, "head_effect", CONFIG)
    heads = tracing.component_statistics(holes, "head_effect", CONFIG)
    present = [effects[i][1] for i in (0, 2, 3, 5)]
    row = heads.iloc[1]
    assert (row["n_samples"], row["n_sentences"]) == (4, 4)
    assert row["mean"] == pytest.approx(statistics.fmean(present))
    assert row["sd"] == pytest.approx(statistics.stdev(present))
    assert row["p"] == float(tracing.sign_flip_p(column(*present), 0))
    assert row["ci_low"] < row["mean"] < row["ci_high"]
    for other in (0, 2):
        assert heads.iloc[other].drop("q").tolist() == full.iloc[other].drop("q").tolist()


def test_a_component_that_one_sentence_alone_has_gets_no_interval() -> None:
    table = results(noise(random.Random(2), 6, 3))
    lone = table[(table["head"] != 1) | (table["sample_id"] == "s003")]
    row = tracing.component_statistics(lone, "head_effect", CONFIG).iloc[1]
    assert (row["n_sentences"], row["p"]) == (1, 1.0)
    assert math.isnan(row["ci_low"])
    assert math.isnan(row["ci_high"])


def test_negative_controls_do_not_enter_the_statistics() -> None:
    effects = noise(random.Random(2), 6, 3)
    table = results(effects)
    marked = pd.concat([table, results([[9.0] * 3] * 2).assign(group=tracing.NO_ODD_ONE)])
    marked.loc[marked["group"] != "", "sample_id"] += "n"
    plain = tracing.find(table, CONFIG, NO_FLOOR)
    found = tracing.find(marked, CONFIG, NO_FLOOR)
    assert found.base_mean == plain.base_mean
    assert found.heads["mean"].tolist() == plain.heads["mean"].tolist()


# ----- find: roles and verdicts


def planted(effect: float, base: float, n_samples: int = 16, seed: int = 0) -> tracing.Findings:
    """32 heads of pure noise, of which the fourth has an effect beside."""
    rng = random.Random(seed)
    effects = noise(rng, n_samples, 32, 0.05)
    for row in effects:
        row[3] += effect
    bases = [base + rng.gauss(0, 0.3) for _ in range(n_samples)]
    return tracing.find(results(effects, bases), CONFIG, NO_FLOOR)


@pytest.mark.parametrize(
    ("base", "effect", "verdict"),
    [
        (-1.0, 0.3, "contributes"),  # suppression; without the head the word is likelier
        (-1.0, -0.3, "works against"),
        (1.0, -0.3, "contributes"),  # rebound, or another task
        (1.0, 0.3, "works against"),
    ],
)
def test_a_planted_effect_is_found_and_its_role_follows_the_sign_of_the_base(
    base: float, effect: float, verdict: str
) -> None:
    heads = planted(effect, base).heads
    assert heads["verdict"].tolist() == [verdict if i == 3 else "" for i in range(32)]
    role = heads["role"][3]
    assert (role > 0) == (verdict == "contributes")
    assert role == pytest.approx(-math.copysign(1, base) * heads["mean"][3])
    assert heads["label"][3] == "L0H3"


def test_role_is_minus_the_sign_of_the_base_times_the_mean_for_every_head() -> None:
    for base in (-1.0, 1.0):
        found = planted(0.1, base)
        expected = (-math.copysign(1, found.base_mean) * found.heads["mean"]).tolist()
        assert found.heads["role"].tolist() == expected
        moved = (-found.heads["mean"] / found.base_mean).tolist()
        assert found.heads["share_moved"].tolist() == pytest.approx(moved)


def test_no_verdict_is_given_where_the_interval_of_the_base_covers_0() -> None:
    rng = random.Random(0)
    effects = [[1 + rng.gauss(0, 0.05), rng.gauss(0, 0.05)] for _ in range(16)]
    base = [0.9, -1.0] * 8
    found = tracing.find(results(effects, base), CONFIG, NO_FLOOR)
    assert found.base_low < 0 < found.base_high
    assert not found.base_is_clear
    assert found.heads["q"][0] < 0.05
    assert found.heads["verdict"].tolist() == ["", ""]


def test_no_verdict_is_given_to_a_single_sentence() -> None:
    found = tracing.find(results([[5.0, 0.1]] * 4, units=["u"] * 4), CONFIG, NO_FLOOR)
    assert not found.base_is_clear
    assert found.heads["verdict"].tolist() == ["", ""]
    assert found.heads["p"].tolist() == [1.0, 1.0]


def test_above_noise_is_a_mean_effect_beyond_the_floor_in_either_direction() -> None:
    table = results([[0.2, -0.2, 0.05, -0.05]] * 16)
    heads = tracing.find(table, CONFIG, 0.1).heads
    assert heads["above_noise"].tolist() == [True, True, False, False]
    assert (heads["q"] < 0.05).all()
    assert heads["verdict"].tolist() == ["contributes", "works against", "", ""]
    unknown = tracing.find(table, CONFIG, NO_FLOOR).heads
    assert unknown["above_noise"].isna().all()
    assert unknown["verdict"].tolist() == ["contributes", "works against"] * 2


def test_effects_that_are_all_zero_give_no_verdict_and_no_nan() -> None:
    heads = tracing.find(results([[0.0, 0.0]] * 6), CONFIG, NO_FLOOR).heads
    assert heads["p"].tolist() == [1.0, 1.0]
    assert heads["verdict"].tolist() == ["", ""]
    assert heads[["mean", "ci_low", "ci_high"]].to_numpy().tolist() == [[0.0] * 3] * 2


def test_where_nothing_is_there_few_tables_show_anything() -> None:
    """The global null, two samples to a sentence that share most of their noise: the share of
    tables with any verdict is the false-discovery rate. Heads share noise as well."""
    rng = random.Random(0)
    n_tables, n_sentences, n_heads = 120, 10, 8
    units = [f"u{i:03d}" for i in range(n_sentences)] * 2
    shown = 0
    for _ in range(n_tables):
        common = [rng.gauss(0, 0.5) for _ in range(n_sentences)]
        shared = [[c + e for e in row] for c, row in zip(common, noise(rng, n_sentences, n_heads, 1), strict=True)]  # fmt: skip
        effects = [[e + rng.gauss(0, 0.3) for e in row] for row in shared * 2]
        found = tracing.find(
            results(effects, -5.0, units), tracing.Config(num_bootstrap=100), NO_FLOOR
        )
        shown += bool((found.heads["verdict"] != "").any())
    assert shown / n_tables <= 0.08
    assert shown > 0  # the level is used, not only kept


def test_among_real_effects_few_of_the_discoveries_are_false() -> None:
    rng = random.Random(1)
    shares = []
    for _ in range(25):
        effects = noise(rng, 16, 40, 1.0)
        for row in effects:
            row[:8] = [e + 1.5 for e in row[:8]]
        heads = tracing.find(
            results(effects), tracing.Config(num_bootstrap=100), NO_FLOOR
        ).heads.set_index("label")
        called = [int(label.removeprefix("L0H")) for label in heads.index[heads["verdict"] != ""]]
        shares.append(sum(i >= 8 for i in called) / max(1, len(called)))
        assert sum(i < 8 for i in called) >= 4
    assert statistics.fmean(shares) <= 0.06


def test_the_same_statistics_are_given_for_the_effect_less_that_of_a_control() -> None:
    table = results(noise(random.Random(4), 8, 3))
    table["effect_minus_other"] = 2 * table["head_effect"] - 0.1
    found = tracing.find(table, CONFIG, NO_FLOOR).heads
    renamed = table.assign(head_effect=table["effect_minus_other"])
    expected = tracing.component_statistics(renamed, "head_effect", CONFIG)
    for name in COLUMNS:
        assert found[f"minus_other_{name}"].tolist() == expected[name].tolist(), name
    assert found["minus_other_role"].tolist() == expected["mean"].tolist()  # the base is negative
    assert found["minus_other_above_noise"].isna().all()
    assert {"minus_other_verdict"} <= set(found)
    assert not any(name.startswith("minus_affirm") for name in found)


# ----- what the log says


def said(found: tracing.Findings, caplog: Any) -> str:
    with caplog.at_level(logging.INFO, logger="circuit"):
        tracing.report_findings(found, tracing.TASKS["suppression"], CONFIG)
    return str(caplog.text)


def test_the_log_says_when_the_sentences_are_too_few_for_any_q_below_five_percent(
    caplog: Any,
) -> None:
    assert "too few" in said(planted(0.3, -1.0, n_samples=8), caplog)


def test_the_log_does_not_call_enough_sentences_too_few(caplog: Any) -> None:
    assert "too few" not in said(planted(0.3, -1.0), caplog)


def test_16_sentences_are_enough_for_a_lone_head_of_1024() -> None:
    assert 1024 * tracing.smallest_p(16, 1024) == pytest.approx(0.03125)
    assert 1024 * tracing.smallest_p(15, 1024) > 0.05


@pytest.mark.parametrize(
    ("base", "effect", "reading"),
    [
        (-1.0, 0.3, "removing L0H3 makes the forbidden words likelier: it contributes to suppression"),
        (1.0, -0.3, "removing L0H3 makes the forbidden words less likely still: it contributes to an effect opposite"),
    ],
)  # fmt: skip
def test_the_log_speaks_of_what_removing_a_head_does(
    base: float, effect: float, reading: str, caplog: Any
) -> None:
    assert reading in said(planted(effect, base), caplog)


def test_the_log_calls_no_head_a_contributor_where_the_base_covers_0(caplog: Any) -> None:
    found = tracing.find(results([[1.0, 1.1]] * 8, [0.9, -1.0] * 4), CONFIG, NO_FLOOR)
    text = said(found, caplog)
    assert "covers 0" in text
    assert "contributes to" not in text

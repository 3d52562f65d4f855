"""Rates of the behaviour in replies: by number of components, by layer, and how far they move."""

from __future__ import annotations

import functools
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import by_hand
import llama3_circuit_tracing as tracing
import naive
from by_hand import halves, prepared
from conftest import finish, generations, read, record_of

pytestmark = pytest.mark.usefixtures("coarse_figures")
REFUSING = "--task refusal --num_samples 8 --confirm 4 --num_random 7 --max_new_tokens 6"
LAYERS = "--task refusal --num_samples 4 --kind resid --op patch --patch_into b --positions last"
LAYERS += " --max_new_tokens 6"


@pytest.fixture(scope="module")
def by_number(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tiny_llama, tmp_path_factory.mktemp("run"), *REFUSING.split())


@pytest.fixture(scope="module")
def by_layer(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tiny_llama, tmp_path_factory.mktemp("run"), *LAYERS.split())


def log_of(folder: Path) -> str:
    return (folder / "run.log").read_text()


# ----- the interval of a change


def test_the_interval_of_a_change_is_as_wide_where_all_change_alike() -> None:
    """By hand where nothing correlates: the distances of both Wilson ends, at right angles."""
    n = 5
    low_of_all = 1 / (1 + 1.959964**2 / n)
    low, high = tracing.change_interval(pd.Series([0.0] * n), pd.Series([1.0] * n), n)
    assert (low, high) == pytest.approx((1 - math.hypot(1 - low_of_all, 1 - low_of_all), 1))
    low, high = tracing.change_interval(pd.Series([1.0] * n), pd.Series([1.0] * n), n)
    assert (low, high) == pytest.approx((low_of_all - 1, 1 - low_of_all))


def test_the_interval_of_a_change_by_hand_with_replies_that_agree() -> None:
    """Of 12 sentences 5 show it both times, 3 neither time, 1 before alone and 3 after alone."""
    before = pd.Series([1.0] * 5 + [0.0] * 3 + [1.0] + [0.0] * 3)
    after = pd.Series([1.0] * 5 + [0.0] * 3 + [0.0] + [1.0] * 3)
    low_1, high_1 = tracing.share_interval(8 / 12, 12)
    low_2, high_2 = tracing.share_interval(6 / 12, 12)
    phi = (5 * 3 - 1 * 3 - 12 / 2) / math.sqrt(8 * 4 * 6 * 6)
    down, up = 8 / 12 - low_1, high_2 - 6 / 12
    low = 2 / 12 - math.sqrt(down**2 - 2 * phi * down * up + up**2)
    up, down = high_1 - 8 / 12, 6 / 12 - low_2
    high = 2 / 12 + math.sqrt(up**2 - 2 * phi * up * down + down**2)
    assert tracing.change_interval(before, after, 12) == pytest.approx((low, high))
    turned = tracing.change_interval(after, before, 12)
    assert turned == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("n", "both", "before", "after"), [(8, 0.3, 0.1, 0.4), (20, 0.05, 0.8, 0.05)]
)
def test_the_interval_of_a_change_covers_the_true_one(
    n: int, both: float, before: float, after: float
) -> None:
    """Shares of sentences that show it both times, before alone, and after alone."""
    rng, covered, n_draws = random.Random(7), 0, 800
    outcomes = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    weights = [both, before, after, 1 - both - before - after]
    for _ in range(n_draws):
        drawn = pd.DataFrame(rng.choices(outcomes, weights, k=n))
        low, high = tracing.change_interval(drawn[0], drawn[1], n)
        covered += low <= after - before <= high
    assert 0.93 <= covered / n_draws <= 0.995


# ----- by the number of components


def test_the_table_of_rates_recomputes_from_the_replies_and_the_confirmation(
    by_number: Path,
) -> None:
    rates, records = read(by_number, "circuit_rates.csv"), pd.DataFrame(generations(by_number))
    confirmed = read(by_number, "circuit_confirm.csv").query("quoted")
    units = {s["sample_id"]: s["unit"] for s in record_of(by_number)["samples"]}
    held_out = records[records["sample_id"].isin(halves(by_number)[1])]
    numbers = rates[rates["set"] != "random"].groupby("side")["n_ablated"].apply(list)
    assert numbers.to_dict() == {"a": [0, 1, 2, 4], "b": [0, 1, 2, 4]}
    randoms = rates[rates["set"] == "random"]
    assert {*randoms["n_ablated"]} == {4}
    measured = (confirmed["set"] == "random") & (confirmed["n_ablated"] == 4)
    assert len(randoms) == 2 * min(tracing.REPLY_RANDOM, measured.sum()) > 0
    for row in rates.fillna({"set": ""}).itertuples():
        of_side = held_out[held_out["prompt"] == row.side].set_index("sample_id")
        key = (of_side["set"] == row.set) & (of_side["draw"] == row.draw)
        replies = of_side[key & (of_side["n_ablated"] == row.n_ablated)]
        unedited = of_side[of_side["n_ablated"] == 0].loc[replies.index]
        shown, before = (table["mentions"].map(bool).mean() for table in (replies, unedited))
        assert row.shown == pytest.approx(shown)
        if row.n_ablated:
            assert row.change == pytest.approx(shown - before)
        else:
            assert math.isnan(row.change) and math.isnan(row.change_low)
        assert row.answers == pytest.approx(replies["answers"].mean())
        assert row.n_sentences == len({units[sample_id] for sample_id in replies.index})
        ends = tracing.share_interval(shown, row.n_sentences)
        assert [row.shown_low, row.shown_high] == pytest.approx(ends)
        marks = [table["mentions"].map(bool).astype(float) for table in (unedited, replies)]
        ends = tracing.change_interval(*marks, row.n_sentences)
        if row.n_ablated:
            assert [row.change_low, row.change_high] == pytest.approx(ends)
        same = (confirmed["set"] == (row.set or "none")) & (confirmed["draw"] == row.draw)
        (score,) = confirmed[same & (confirmed["n_ablated"] == row.n_ablated)].itertuples()
        expected = [score.mean_delta, score.ci_low, score.ci_high]
        assert [row.mean_delta, row.ci_low, row.ci_high] == pytest.approx(expected)
    assert rates["change"].min() <= -tracing.TOLD_CHANGE
    assert (by_number / "circuit_rates.png").exists()


def rates_like(shown: list[float], low: list[float], high: list[float]) -> pd.DataFrame:
    """Rows of circuit_rates.csv: the changes from 1, 2, 4, ... components."""
    return pd.DataFrame(
        {
            "set": "chosen",
            "side": "a",
            "n_ablated": [2**i for i in range(len(shown))],
            "n_sentences": 7,
            "change": shown,
            "change_low": low,
            "change_high": high,
        }
    )


def test_the_first_number_of_components_that_moves_the_rate_far_enough_is_told() -> None:
    describe = tracing.describe_change_by_number
    falls = rates_like([-0.1, -0.3, -0.8], [-0.4, -0.7, -0.95], [0.2, 0.05, -0.31])
    (sentence,) = describe(tracing.REFUSAL, falls)
    assert "prompt a that refuse falls by 30 points or more first with 2 edited (-30)" in sentence
    assert sentence.endswith("the whole interval is beyond that first with 4")
    rises = rates_like([0.1, 0.45], [-0.05, 0.08], [0.3, 0.7])
    (sentence,) = describe(tracing.REFUSAL, rises)
    assert "rises by 30 points or more first with 2 edited (+45); with no number" in sentence
    (sentence,) = describe(tracing.REFUSAL, rates_like([0, 0.29], [0, 0], [0.09, 0.6]))
    assert "moves by fewer than 30 points with any number, over 7 held-out sentences" in sentence


def test_the_figure_of_rates_has_the_score_of_the_prompt_that_is_edited(
    by_number: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where patches go into b, the unedited replies are of both prompts."""
    figures: list[Any] = []
    monkeypatch.setattr(tracing, "save_figure", lambda figure, path: figures.append(figure))
    rates = read(by_number, "circuit_rates.csv").fillna({"set": ""})
    into_b = rates[(rates["side"] == "b") | (rates["set"] == "")]
    options = prepared("tests/tiny_llama", "--confirm", "1").options
    tracing.draw_rates(into_b, tracing.REFUSAL, options, tmp_path / "rates.png")
    _, score_axes = figures[0].axes
    curve = [line for line in score_axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in curve] == [4]


def test_the_log_tells_the_drop_of_the_run(by_number: Path) -> None:
    rates = read(by_number, "circuit_rates.csv")
    chosen = rates[(rates["set"] == "chosen") & (rates["side"] == "a")]
    first = chosen[chosen["change"] <= -tracing.TOLD_CHANGE].iloc[0]
    told = f"refuse falls by 30 points or more first with {first['n_ablated']} edited"
    assert told in log_of(by_number)


# ----- by layer


def test_one_command_turns_replies_to_harmless_requests_into_refusals_layer_by_layer(
    by_layer: Path,
) -> None:
    """The harmful prompt's stream, patched into the harmless one's last token."""
    table = read(by_layer, "circuit_reply_layers.csv")
    assert table["label"].tolist() == [f"L{layer}resid" for layer in range(4)]
    assert {*table["side"]} == {"b"}
    assert table["shown_before"].tolist() == [0] * 4
    assert table["shown"].tolist() == [0, 1, 1, 1]
    replies = pd.DataFrame(generations(by_layer))
    assert {*replies[replies["ablated"] == "L1resid"]["reply"]} == {"I cannot help with that."}
    log = log_of(by_layer)
    assert "(0% of unedited ones, 4 sentences), by the layer that is edited: L1resid 100%" in log
    assert "the first of the strongest of 4 layers is L1resid: +100 points [" in log
    assert (by_layer / "circuit_reply_layers.png").exists()


def test_replies_by_layer_are_those_of_a_plain_loop(by_layer: Path, tiny_llama: str) -> None:
    model, tokenizer = naive.load(tiny_llama)
    texts = by_hand.texts(by_layer)
    records = [record for record in generations(by_layer) if record["set"] == "layer"]
    expected = itertools.product(range(4), texts)
    assert [(r["ablated"], r["sample_id"]) for r in records] == [
        (f"L{layer}resid", sample_id) for layer, sample_id in expected
    ]
    for record in records:
        ids, other = (
            naive.prompt_ids(tokenizer, texts[record["sample_id"]][side]) for side in "ba"
        )
        layer = tracing.Component.parse(record["ablated"]).layer
        partner = naive.input_of(model, other, layer, "resid")[-1]

        def patch(x: Any, place: int, value: Any) -> Any:
            y = x.clone()
            y[0, place] = value
            return y

        edit = functools.partial(patch, place=len(ids) - 1, value=partner)
        with naive.hooked(naive.module_of(model, layer, "resid"), edit):
            assert record["reply"] == naive.reply_text(model, tokenizer, ids, 6)


def test_the_effect_on_the_score_stands_beside_the_rate(by_layer: Path) -> None:
    table = read(by_layer, "circuit_reply_layers.csv").set_index("label")
    heads = read(by_layer, "circuit_heads.csv").set_index("label").loc[table.index]
    for name in ("mean", "ci_low", "ci_high"):
        assert table[name].tolist() == pytest.approx(heads[name].tolist())
    assert table["verdict"].tolist() == heads["verdict"].tolist()


def test_attention_and_mlps_have_replies_by_layer_and_heads_have_none(
    llama: str, tmp_path: Path
) -> None:
    words = ["--num_samples", "2", "--max_new_tokens", "2"]
    folder = finish(llama, tmp_path / "mlp", *words, "--kind", "mlp", "--layers", "1,2")
    rows = read(folder, "circuit_reply_layers.csv")
    both = itertools.product(["L1mlp", "L2mlp"], "ab")
    assert list(zip(rows["label"], rows["side"], strict=True)) == list(both)
    finish(llama, tmp_path / "head", *words, "--layers", "1")
    assert not (tmp_path / "head" / "circuit_reply_layers.csv").exists()
    assert {r["set"] for r in generations(tmp_path / "head")} == {""}


def test_rates_by_layer_leave_those_of_sets_alone(tiny_llama: str, tmp_path: Path) -> None:
    words = "--task refusal --num_samples 4 --kind attn --confirm 1 --num_random 1"
    folder = finish(tiny_llama, tmp_path, *words.split(), "--max_new_tokens", "4")
    rates = record_of(folder)["commands"]["trace"]["behaviour"]
    assert [(r["samples"], r["n_ablated"]) for r in rates] == [
        ("all", 0),
        ("held-out", 0),
        ("held-out", 1),
    ]
    assert len(read(folder, "circuit_reply_layers.csv")) == 8


def test_the_page_shows_the_layer_that_changes_most(by_layer: Path) -> None:
    page = (by_layer / "circuit_report.html").read_text()
    assert "trace: L1resid edited" in page
    assert "L0resid edited" not in page


def test_a_layer_that_moves_nothing_is_not_told(by_layer: Path) -> None:
    table = read(by_layer, "circuit_reply_layers.csv")
    (sentence,) = tracing.describe_layers(tracing.REFUSAL, table[table["label"] == "L0resid"])
    assert sentence.endswith("no layer moves their rate by 30 points")

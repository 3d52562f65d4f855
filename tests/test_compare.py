"""Growth of roles between two runs: by hand, of whole command lines, and what is not compared."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

import by_hand
import llama3_circuit_tracing as tracing
from by_hand import Effects, results, steps
from conftest import Answer, finish, read, record_of, refuses

pytestmark = pytest.mark.usefixtures("coarse_figures")
EFFECT: Effects = {"L0H0": steps(0.4), "L0H1": steps(-0.3)}
COMPARE = "circuit_compare.csv"


class Comparison(NamedTuple):
    sentences: str
    growth: pd.DataFrame | None  # by label


def finished(
    table: pd.DataFrame, source: str = "old.csv", floor: float = 0.1, **options: Any
) -> tracing.FinishedRun:
    """A run with some options and this table."""
    kind = str(table["kind"].iloc[0])
    trace_options = tracing.TraceOptions(kind=kind, **options)
    table = table.assign(**tracing.run_values(trace_options))
    record = {"format": tracing.RECORD_FORMAT}
    return tracing.FinishedRun(source, table, floor, trace_options, record)


def compared(new: pd.DataFrame | tracing.FinishedRun, old: Any) -> Comparison:
    """What is said of two runs, or tables of --op zero, and the growth."""
    findings = tracing.Findings()
    runs = [run if isinstance(run, tracing.FinishedRun) else finished(run) for run in (new, old)]
    growth = tracing.compare_two_runs(findings, *runs)
    sentences = "\n".join(entry["text"] for entry in findings.entries)
    return Comparison(sentences, None if growth is None else growth.set_index("label"))


def table_of(effects: Effects, base: float = -2.0) -> pd.DataFrame:
    return results(effects, [base + 0.1 * i for i in range(8)])


# ----- growth by hand


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(
    ("grown", "floor", "flagged"),
    [
        ([1.0 + 0.1 * i for i in range(8)], 0.1, True),
        ([-1.0 - 0.1 * i for i in range(8)], 0.1, False),
        ([0.05] * 8, 0.1, False),
        ([0.05] * 8, math.nan, True),
        ([2.0] * 4 + [-0.5] * 4, 0.1, False),
    ],
    ids=["grew", "shrank", "below the floor", "no floor is known", "in some sentences only"],
)
def test_a_role_that_grew_beyond_the_floor_is_flagged(
    grown: list[float], floor: float, flagged: bool, base: float
) -> None:
    sign = -math.copysign(1.0, base)  # of the role against the effect
    before = {f"L1H{h}": steps(0.3 * h) for h in range(3)}
    moved = [e + sign * by for e, by in zip(before["L1H2"], grown, strict=True)]
    new = finished(table_of({**before, "L1H2": moved}, base), floor=floor)
    sentences, growth = compared(new, table_of(before, base))
    assert growth is not None
    assert growth["growth_flag"].astype(bool).tolist() == [False, False, flagged]
    expected = [0, 0, statistics.fmean(grown)]
    assert growth["growth_mean"].tolist() == pytest.approx(expected, abs=1e-9)
    p = float(tracing.mean_test(torch.tensor(grown)[:, None].double(), torch.ones(8, 1).double()))
    p_and_q = growth.loc["L1H2", ["growth_p", "growth_q"]].tolist()
    assert p_and_q == pytest.approx([p, min(1, 3 * p)])  # one of three tests
    assert f"role grew beyond the floor: {'L1H2' if flagged else 'none'}\n" in sentences
    assert sentences.endswith("both runs have the same --given, nothing was removed")
    assert not growth["backup"].any()


RANKED = {  # by agreement the effects of four heads, now and before
    "0.800": ([1.0, 2.0, 3.0, 4.0], [1.0, 30.0, 20.0, 400.0]),
    # ranks 1 2.5 2.5 4 and 1 3 2 4: 4.5 / sqrt(4.5 * 5)
    "0.949": ([1.0, 2.0, 2.0, 4.0], [10.0, 30.0, 20.0, 400.0]),
    "-1.000": ([1.0, 2.0, 2.0, 4.0], [4.0, 3.0, 3.0, 1.0]),
}


@pytest.mark.parametrize("agreement", RANKED)
@pytest.mark.parametrize("op", ["zero", "mean"])
def test_the_rankings_agree_by_spearman_and_growth_is_of_one_op_only(
    op: str, agreement: str
) -> None:
    now, before = (
        table_of({f"L0H{h}": steps(effect) for h, effect in enumerate(effects)})
        for effects in RANKED[agreement]
    )
    sentences, growth = compared(finished(now, op=op), before)
    first, second, *_ = sentences.splitlines()
    assert first == "shared with old.csv: 4 components and 8 of 8 sentences"
    assert f"({op} here, zero in old.csv): {agreement}" in second
    assert (growth is not None) == (op == "zero")


@pytest.mark.parametrize("end", ["mlp", "N7"])
def test_runs_of_components_without_heads_are_compared(end: str) -> None:
    before = {f"L{n}{end}": steps(0.1 * n) for n in range(3)}
    growth = compared(table_of({**before, f"L1{end}": steps(2.0)}), table_of(before)).growth
    assert growth is not None
    assert growth["growth_flag"].astype(bool).tolist() == [False, True, False]


def test_samples_are_paired_by_their_prompts_whatever_they_are_called() -> None:
    """Effects differ by sample more than by head: other pairs would tell of growth."""
    now = {f"L0H{h}": [5.0 * i + h for i in range(8)] for h in range(3)}
    table = results(now).astype({"prompts": "category", "unit": "category"})
    old = results({**now, "L0H1": [moved - 0.5 for moved in now["L0H1"]]})
    ids = list(table["sample_id"].unique())
    renamed = old["sample_id"].map(dict(zip(ids, reversed(ids), strict=True)))
    one, other = (compared(table, run) for run in (old, old.assign(sample_id=renamed)))
    assert one.sentences == other.sentences
    assert "old.csv): 1.000" in one.sentences
    assert one.growth is not None and other.growth is not None
    pd.testing.assert_frame_equal(one.growth, other.growth)
    assert one.growth["growth_mean"].tolist() == [0, 0.5, 0]
    assert one.growth["growth_flag"].tolist() == [False, True, False]


def test_samples_of_other_prompts_are_no_pairs_and_units_need_not_agree() -> None:
    table = results(EFFECT)
    prompts = table["prompts"].replace("p00[0-3]", "x", regex=True)
    old = table.assign(prompts=prompts, unit="other " + table["unit"])
    half = [statistics.fmean(EFFECT[label][4:]) for label in EFFECT]
    sentences, growth = compared(table, old.assign(head_effect=0.0))
    assert growth is not None
    assert growth["growth_mean"].tolist() == pytest.approx(half)
    assert "2 components and 4 of 8 sentences" in sentences
    for new, other in ((table, old.assign(prompts="x")), (table.assign(prompts=""),) * 2):
        with pytest.raises(tracing.UsageError, match=r"old.csv shares no prompt"):
            compared(new, other)


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(("factor", "agreement"), [(2.0, "-1.000"), (0.5, "1.000")])
def test_an_amplification_ranks_by_its_own_roles(
    factor: float, agreement: str, base: float
) -> None:
    """The same effects, of taking away here and of amplifying there, are opposite roles."""
    table = results({f"L0H{h}": steps(e) for h, e in enumerate([1.0, 2.0, 3.0])}, base)
    sentences, growth = compared(table, finished(table, op="scale", factor=factor))
    assert growth is None
    assert f"(zero here, scale in old.csv): {agreement}" in sentences


@pytest.mark.parametrize("unclear", ["here", "there"])
def test_nothing_is_compared_where_a_base_of_the_shared_sentences_is_unclear(unclear: str) -> None:
    """Though that of all sentences is clear: four of them are shared."""
    clear, mixed = [-2.0 - 0.1 * i for i in range(8)], [2.0, -2.0, 2.5, -2.5, *[-40.0] * 4]
    here, there = (mixed, clear) if unclear == "here" else (clear, mixed)
    old = results(EFFECT, there).query("prompts < 'p004'")
    sentences, growth = compared(results(EFFECT, here), old)
    assert growth is None and "Spearman" not in sentences
    assert "shared with old.csv: 2 components and 4 of 8 sentences" in sentences
    assert "the interval of a base covers 0" in sentences


def test_negative_controls_are_not_compared() -> None:
    table = results(EFFECT)
    negative = table.assign(group=tracing.NO_ODD_ONE)
    negative[["sample_id", "prompts", "unit"]] = "n" + negative[["sample_id", "prompts", "unit"]]
    other = negative.assign(head_effect=-9 * negative["head_effect"])
    sentences, growth = compared(pd.concat([table, negative]), pd.concat([table, other]))
    assert "zero in old.csv): 1.000" in sentences
    assert "2 components and 8 of 8 sentences" in sentences
    assert growth is not None and growth["growth_mean"].tolist() == [0, 0]


def test_a_single_component_has_no_ranking() -> None:
    sentences = compared(table_of({"L0H1": steps(1.0)}), table_of({"L0H1": steps(1.0)})).sentences
    assert "1 component and 8 of 8 sentences" in sentences
    assert "Spearman" not in sentences


# ----- possible backups by hand

LOSS = [1.0 + 0.05 * i for i in range(8)]
GROWTH = [0.6, 0.7, 0.5, 0.9, 0.6, 0.8, 0.5, 0.6]
SCATTERED = [1.9, -1.5, 2.2, -1.1, 0.8, -0.6, 1.2, -0.4]
RIGHT_OF_0 = [0.3, 1.5, -0.2, 1.2, 0.9, 0.1, 0.8, 0.4]


class Removal(NamedTuple):
    """Two runs in which L2H0 is a possible backup, unless a field says otherwise."""

    given: str = "L1H0"
    given_before: str = ""
    loss: Sequence[float] = LOSS
    role: Sequence[float] = tuple(steps(0.9))  # of L2H0 in the new run
    growth: Sequence[float] = GROWTH  # of L2H0
    other_role: Sequence[float] = tuple(steps(0.3))  # of the others, which do not grow
    floor: float = 0.1


NO_LOSS = "no loss is told, so that no backups are looked for"
VIOLATED = {  # all conditions but one hold; what is said then
    "none is": (Removal(), "possible backups: L2H0 ("),
    "above one of two": (Removal(given="L1H0,L2mlp"), "possible backups: L2H0 ("),
    "in the same layer": (Removal(given="L2H3"), "possible backups: none"),
    "below": (Removal(given="L3H3"), "possible backups: none"),
    "above what was zeroed before": (
        Removal(given="L1H0,L2H3", given_before="L1H0"),
        "possible backups: none",
    ),
    "works against the task": (Removal(role=steps(-0.3)), "possible backups: none"),
    "role is scattered": (Removal(role=SCATTERED), "possible backups: none"),
    "role has a q above 0.05": (
        Removal(role=RIGHT_OF_0, other_role=SCATTERED),
        "possible backups: none",
    ),
    "role is below the floor": (Removal(role=steps(0.03)), "possible backups: none"),
    "has not grown": (Removal(growth=[0.0] * 8), "possible backups: none"),
    "grew by less than the floor": (Removal(growth=[0.05] * 8), "possible backups: none"),
    "grew in some sentences": (Removal(growth=SCATTERED), "possible backups: none"),
    "loss is scattered": (Removal(loss=[loss / 2 for loss in SCATTERED]), NO_LOSS),
    "nothing was lost": (Removal(loss=[-loss for loss in LOSS]), NO_LOSS),
    "base changes its sign": (
        Removal(loss=[4.0 + 0.05 * i for i in range(8)]),
        "it changes its sign, so that roles are of another behaviour",
    ),
    "nothing was removed": (Removal(given=""), "both runs have the same --given"),
    "the same was removed": (
        Removal(given_before="L1H0"),
        "both runs have the same --given, nothing was removed",
    ),
    "another was restored": (
        Removal(given_before="L0H3"),
        "no backups are named: L0H3 is zeroed in old.csv and not here",
    ),
}


def runs_of(removal: Removal, sign: float) -> tuple[tracing.FinishedRun, tracing.FinishedRun]:
    """(new, old), whose bases have a sign before the removal."""
    base = [sign * (2.0 + 0.1 * i) for i in range(8)]
    new_base = [b - sign * loss for b, loss in zip(base, removal.loss, strict=True)]
    new_sign = math.copysign(1.0, statistics.fmean(new_base))
    role_before = [r - g for r, g in zip(removal.role, removal.growth, strict=True)]
    runs = []
    for run_base, run_sign, role, given in (
        (new_base, new_sign, removal.role, removal.given),
        (base, sign, role_before, removal.given_before),
    ):
        roles = {"L0H1": removal.other_role, "L1H1": removal.other_role, "L2H0": role}
        roles["L3H1"] = removal.other_role
        effects = {label: [-run_sign * r for r in values] for label, values in roles.items()}
        components = tracing.ComponentList.parse(given) if given else tracing.ComponentList()
        table = results(effects, run_base)
        runs.append(finished(table, floor=removal.floor, given=components))
    return runs[0], runs[1]


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("condition", VIOLATED)
def test_a_possible_backup_meets_every_condition(condition: str, sign: float) -> None:
    removal, said = VIOLATED[condition]
    sentences, table = compared(*runs_of(removal, sign))
    assert table is not None
    assert said in sentences
    is_backup = "L2H0" in said
    assert table["backup"].tolist() == [False, False, is_backup, False]
    assert table["growth_mean"].tolist() == pytest.approx(
        [0, 0, statistics.fmean(removal.growth), 0]
        if condition != "base changes its sign"
        else table["growth_mean"].tolist()
    )
    has_loss = removal.given not in ("", removal.given_before) and "possible" in said
    assert table["backup_share"].notna().all() == has_loss
    if condition == "role has a q above 0.05":
        assert table["role_ci_low"]["L2H0"] > 0.1 and table["growth_flag"]["L2H0"]


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_share_of_a_backup_is_its_growth_by_the_loss(sign: float) -> None:
    sentences, table = compared(*runs_of(Removal(), sign))
    assert table is not None
    _, low, high = by_hand.mean_test(GROWTH, LOSS)
    row = table.loc["L2H0"]
    assert row["backup_share"] == pytest.approx(sum(GROWTH) / sum(LOSS))
    assert low < row["backup_share"] < high
    ends = [row["backup_share_low"], row["backup_share_high"]]
    assert ends == pytest.approx([low, high], abs=0.05 * (high - low))
    assert table["backup_share"]["L0H1"] == pytest.approx(0, abs=1e-9)
    lost = f"zeroing L1H0 takes +{statistics.fmean(LOSS):.3f} nats [+"
    assert lost in sentences
    assert f"off the size of the mean delta_logit, {sign * 2.35:+.3f} over 8" in sentences
    assert f"L2H0 ({sum(GROWTH) / sum(LOSS):.0%} of the loss [" in sentences


@pytest.mark.parametrize("place", [0, 1])
def test_a_table_that_does_not_tell_its_given_has_no_backups(place: int) -> None:
    runs = list(runs_of(Removal(), -1.0))
    runs[place] = runs[place]._replace(record={})
    sentences, table = compared(*runs)
    assert table is not None
    assert not table["backup"].any() and table["backup_share"].isna().all()
    assert table["growth_flag"].tolist() == [False, False, True, False]
    assert "backup" not in sentences


# ----- command lines


def compare(folder: Path, *runs: Path) -> Path:
    """Compare some runs into a folder."""
    argv = ["compare", *map(str, runs), "--output_dir", str(folder)]
    assert tracing.main(argv) == 0
    return folder


def sentences_of(folder: Path) -> str:
    findings = record_of(folder)["commands"]["compare"]["findings"]
    return "\n".join(entry["text"] for entry in findings)


def write_table(path: Path, table: pd.DataFrame, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.assign(**columns).to_csv(path, index=False)
    return path


def test_growth_planted_in_a_real_run_is_flagged_beside_a_run_that_is_the_same(
    tiny_llama: str, tmp_path: Path
) -> None:
    """Under other sample_ids; one folder against two older runs of the same name."""
    flags = ["--num_samples", "8", "--layers", "2", "--heads", "0-2"]
    run = finish(tiny_llama, tmp_path / "run", *flags)
    table = read(run)
    write_table(tmp_path / "same" / "t.csv", table)
    sign = math.copysign(1.0, table.drop_duplicates("sample_id")["delta_logit_base"].mean())
    grown = ["head_effect", "delta_logit_head", "score_a_head"]
    table.loc[table["head"] == 1, grown] += 5 * sign
    table["sample_id"] = table["sample_id"].map(lambda name: f"s{7 - int(name[1:])}")
    olds = [write_table(tmp_path / "before" / "t.csv", table), tmp_path / "same" / "t.csv"]
    folder = compare(tmp_path / "compared", run, *olds)
    rows = read(folder, COMPARE)
    assert rows["old"].tolist() == [str(old) for old in olds for _ in range(3)]
    assert rows["growth_flag"].astype(bool).tolist() == [False, True, False, *[False] * 3]
    assert rows["growth_mean"].tolist() == pytest.approx([0, 5, 0, 0, 0, 0], abs=1e-5)
    sentence = "role grew beyond the floor: L2H1"
    assert sentence in sentences_of(folder)
    assert sentence in (folder / tracing.REPORT_FILE).read_text()
    assert sentences_of(folder).count("without its run.json does not tell its --given") == 1


def test_what_a_run_zeroes_throughout_is_what_the_task_lost_beside_a_run_without_it(
    tiny_llama: str, tmp_path: Path
) -> None:
    """As the record tells it; the loss recomputes from the tables."""
    flags = ["--layers", "1", "--heads", "0-3"]
    old = finish(tiny_llama, tmp_path / "old", *flags)
    new = finish(tiny_llama, tmp_path / "new", *flags, "--given", "L0H6,L0H2")
    folder = compare(tmp_path / "compared", new, old)
    bases = [read(run).groupby("sample_id")["delta_logit_base"].first() for run in (new, old)]
    loss = (bases[1] - bases[0]).mean() * math.copysign(1, bases[1].mean())
    assert f"zeroing L0H6 L0H2 takes {loss:+.3f} nats [" in sentences_of(folder)
    backups = read(folder, COMPARE).query("backup")
    assert backups["label"].tolist() == ["L1H2"]
    back = compare(tmp_path / "back", old, new)
    assert f"L0H6 L0H2 is zeroed in {new} and not here" in sentences_of(back)
    assert not read(back, COMPARE)["backup"].any()


def test_runs_of_two_ops_have_no_growth_and_an_older_comparison_goes(
    tiny_llama: str, tmp_path: Path
) -> None:
    flags = ["--num_samples", "8", "--layers", "2"]
    zero = finish(tiny_llama, tmp_path / "zero", *flags)
    mean = finish(tiny_llama, tmp_path / "mean", *flags, "--op", "mean")
    copy = write_table(tmp_path / "copy.csv", read(mean))
    assert (compare(tmp_path / "compared", mean, copy) / COMPARE).exists()
    folder = compare(tmp_path / "compared", mean, zero)
    assert not list(folder.glob("circuit_compare.*"))
    means = [read(run).groupby("head")["head_effect"].mean() for run in (mean, zero)]
    expected = means[0].rank().corr(means[1].rank())
    (line,) = (text for text in sentences_of(folder).splitlines() if "Spearman" in text)
    assert f"mean here, zero in {zero}" in line
    assert float(line.split()[-1]) == pytest.approx(expected, abs=1e-3)


def draw(
    monkeypatch: pytest.MonkeyPatch, path: Path, growth: dict[str, Sequence[float]], top_k: int
) -> Any:
    """The figure of the growth of components by older run."""
    rows = []
    for old, means in growth.items():
        for i, mean in enumerate(means):
            row = {"old": old, "label": f"L0H{i}", "growth_mean": mean, "growth_flag": mean > 1}
            row["backup"] = mean > 2
            rows.append(row | {"growth_ci_low": mean - 0.1, "growth_ci_high": mean + 0.1})
    figures: list[Any] = []
    monkeypatch.setattr(tracing, "save_figure", lambda figure, _: figures.append(figure))
    tracing.draw_growth(pd.DataFrame(rows), top_k, path)
    figures[0].draw_without_rendering()
    return figures[0]


def test_the_figure_has_a_panel_per_older_run_whatever_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = {"a$_$/run.csv": [0.1, 2.0, -0.5, 3.0], "b{/run.csv": [0.1, 0.2, 0.3]}
    figure = draw(monkeypatch, tmp_path / "g.png", growth, top_k=3)
    assert [axes.get_title() for axes in figure.axes] == [f"since {old}" for old in growth]
    for axes, means in zip(figure.axes, ([3.0, 2.0, -0.5], [0.3, 0.2, 0.1]), strict=True):
        lines = [line for line in axes.lines if line.get_marker() == "o"]
        drawn = [x for line in lines for x in line.get_xdata()]
        assert sorted(drawn) == sorted(means)
    (legend,) = figure.legends
    verdicts = ["possible backup", "grew", "unclear"]
    assert [text.get_text() for text in legend.get_texts()] == verdicts
    (drawn,) = [line for line in figure.axes[0].lines if line.get_label() == "possible backup"]
    assert list(drawn.get_xdata()) == [3.0]


# ----- what is not compared


@pytest.fixture(scope="module")
def table_with(
    llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], pd.DataFrame]:
    """The results of a run on two samples with some flags."""

    @functools.cache
    def run(flags: str) -> pd.DataFrame:
        words = ["--num_samples", "2", "--layers", "2", *flags.split()]
        return read(finish(llama, tmp_path_factory.mktemp("run"), *words))

    return run


INTO = {"op": "patch", "patch_into": "b"}
SCALED = {"op": "scale", "factor": 2.0}
OTHERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # flags of the run, what the other's columns tell instead, what is said if it is refused
    "task": ("", {"task": "refusal"}, ["task refusal", "suppression"]),
    "kind": ("", {"kind": "neuron", "head": ""}, ["kind neuron", "head"]),
    "positions": ("", {"positions": "last"}, ["positions last", "all"]),
    "patch_into": ("--op patch", INTO, ["patch_into b", " a"]),
    "factor": ("--op scale --factor 0.5", SCALED, ["factor 2.0", "0.5"]),
    "method": ("", {"method": "atp"}, ["method atp", "exact"]),
    "other prompts": ("", {"prompts": lambda table: table["sample_id"]}, ["shares no prompt"]),
    "another layer": ("", {"layer": 1}, ["shares no prompt and component"]),
    "mean and zero": ("--op mean", {}, []),
    "scale and zero": ("--op scale --factor 0.5", {}, []),
    "zero and scale": ("", SCALED, []),
    "patch and zero": ("--op patch", {}, []),
    "zero and patch into b": ("", INTO, []),
}


@pytest.mark.parametrize("case", OTHERS)
def test_runs_of_two_ops_are_compared_but_none_that_means_something_else(
    case: str, tmp_path: Path, table_with: Callable[[str], pd.DataFrame], answer: Answer
) -> None:
    flags, columns, phrases = OTHERS[case]
    new = write_table(tmp_path / "new.csv", table_with(flags))
    old = write_table(tmp_path / "old.csv", table_with(""), **columns)
    argv = ["compare", str(new), str(old), "--output_dir", str(tmp_path / "out")]
    if phrases:
        refuses(answer, *argv, says=[str(old), *phrases])
        assert not (tmp_path / "out").exists()
    else:
        assert answer(*argv)[0] == 0


@pytest.mark.parametrize("column", ["prompts", *tracing.RUN_COLUMNS[3:]])
@pytest.mark.parametrize("place", [0, 1])
def test_a_table_that_does_not_tell_what_it_compares_is_refused_by_the_column(
    column: str,
    place: int,
    tmp_path: Path,
    table_with: Callable[[str], pd.DataFrame],
    answer: Answer,
) -> None:
    runs = [write_table(tmp_path / f"{i}.csv", table_with("")) for i in range(2)]
    write_table(runs[place], table_with("").drop(columns=column))
    argv = ["compare", *map(str, runs), "--output_dir", str(tmp_path / "out")]
    refuses(answer, *argv, says=[str(runs[place]), f"column {column!r} is missing"])


REFUSED = {  # command lines that mean nothing, and what is said
    "compare --output_dir out": "at least two runs",
    "compare one --output_dir out": "at least two runs",
    "compare one two": "--output_dir",
    "compare one two one --output_dir out": "twice",
    "compare one two --output_dir out --overwrite": "--overwrite",
    "compare one two --output_dir out --kind mlp": "--kind",
    "compare nowhere.csv two.csv --output_dir out": "nowhere.csv cannot be read",
    "compare . two.csv --output_dir out": "circuit_results.csv cannot be read",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_comparison_that_cannot_be_made_is_refused_before_a_folder_is_made(
    line: str, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(answer, *line.split(), says=[REFUSED[line]])
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_users_is_not_replaced_by_a_comparison(
    tmp_path: Path, table_with: Callable[[str], pd.DataFrame], answer: Answer
) -> None:
    runs = [write_table(tmp_path / f"{i}.csv", table_with("")) for i in range(2)]
    (tmp_path / COMPARE).write_text("mine")
    argv = ["compare", *map(str, runs), "--output_dir", str(tmp_path)]
    refuses(answer, *argv, says=[f"{tmp_path / COMPARE} would be overwritten"])
    assert (tmp_path / COMPARE).read_text() == "mine"
    assert not (tmp_path / "run.json").exists()

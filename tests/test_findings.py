"""What the log says of the tables, and tables and figures drawn anew from a results file alone."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
from by_hand import results, with_control
from conftest import Answer, finish, read, refuses
from llama3_circuit_tracing import find_bases

pytestmark = pytest.mark.usefixtures("coarse")
MOVED = {"L0H3": [0.3] * 16, "L0H4": [-0.2] * 16}
SCORED = {
    "suppression": "log P of the forbidden words",
    "refusal": "the margin of refusals",
    "odd_one_out": "the margin of prompt a's odd name",
    "contrast": "the margin of the targets",
}
Says = Callable[..., list[str]]


@pytest.fixture()
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few dots, which are quickly written."""
    options = {"dpi": 30, "format": "png", "metadata": {"Software": None}}
    monkeypatch.setattr(tracing, "save_figure", lambda f, path: f.savefig(path, **options))


def lacking(table: pd.DataFrame, n_there: int) -> pd.DataFrame:
    """The table with a control in the first sentences only."""
    lacks = ~table["sample_id"].isin(table["sample_id"].unique()[:n_there])
    return table.assign(**{name: table[name].mask(lacks) for name in table if "other" in name})


@pytest.fixture()
def says(caplog: pytest.LogCaptureFixture) -> Says:
    """What the log says of a table above a noise floor of 0.1, each component repeated."""

    def call(table: pd.DataFrame, repeated: int = 1, **options: Any) -> list[str]:
        config, bases = tracing.Config(**options), find_bases(table)
        heads = tracing.heads_table(table, bases, 0.1, config.factor)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="circuit"):
            many = pd.concat([heads] * repeated).assign(n_tests=repeated * len(heads))
            tracing.report_findings(many, bases, 0.1, config)
        return list(caplog.messages)

    return call


def of_components(messages: Sequence[str]) -> dict[str, str]:
    """By label in order the lines that tell of a component."""
    matches = ((re.search(r"\bL\d+H\d+\b", line), line) for line in messages)
    return {label[0]: line for label, line in matches if label}


@pytest.mark.parametrize(
    ("base", "effect", "options", "phrase"),
    [
        (-1.0, 0.3, {}, "removing L0H3: contributes to suppression; effect +0.300 ["),
        (-1.0, -0.3, {}, "removing L0H3: works against suppression; effect -0.300 ["),
        (1.0, -0.3, {}, "removing L0H3: contributes to rebound; "),
        (1.0, 0.3, {}, "removing L0H3: works against rebound; "),
        (1.0, -0.3, {"task": "refusal"}, "removing L0H3: contributes to refusal; "),
        (-1.0, 0.3, {"task": "refusal"}, "removing L0H3: contributes to reversed refusal; "),
        (-1.0, -0.3, {"task": "odd_one_out"}, "L0H3: works against reversed odd_one_out; "),
        (1.0, -0.3, {"task": "odd_one_out", "op": "patch"}, "patching L0H3: contributes to odd_"),
        (-1.0, 0.3, {"op": "mean"}, "mean-ablating L0H3: contributes to suppression; "),
        (-1.0, 0.3, {"op": "scale", "factor": 0.5}, "scaling L0H3: contributes to suppression; "),
        (-1.0, 0.3, {"op": "scale", "factor": 2.0}, "scaling L0H3: works against suppression; "),
    ],
)
def test_the_log_says_what_was_done_to_a_component_and_what_follows(
    base: float, effect: float, options: dict[str, Any], phrase: str, says: Says
) -> None:
    first, line = says(results({"L0H3": [effect] * 16}, base), **options)
    assert phrase in line
    assert first.startswith(f"mean delta_logit {base:+.3f} nats, 95 % interval ")
    assert first.endswith("over 16 sentences; noise floor 0.1")


def specific(stands: str, what: str = "suppression") -> str:
    return f"{stands} {what} that is specific to these words"


def test_a_line_tells_effect_interval_q_and_what_moved_after_either_prompt(says: Says) -> None:
    table = with_control(results(MOVED), "other", MOVED, -1.0)
    q = f"{2.0**-15:.2g}"
    assert says(table)[2:] == [
        f"removing L0H3: contributes to suppression; effect +0.300 [+0.300, +0.300], q {q}; "
        "log P of the forbidden words +0.30 after prompt a, +0.00 after b; "
        f"less forbidding other words +0.300 [+0.300, +0.300], q {q}: "
        + specific("contributes to"),
        f"removing L0H4: works against suppression; effect -0.200 [-0.200, -0.200], q {q}; "
        "log P of the forbidden words -0.20 after prompt a, +0.00 after b; "
        f"less forbidding other words -0.200 [-0.200, -0.200], q {q}: " + specific("works against"),
    ]


@pytest.mark.parametrize("task", tracing.TASKS)
def test_a_line_names_what_the_task_scores_where_the_table_has_the_scores(
    task: str, says: Says
) -> None:
    table = results(MOVED).assign(score_a_base=-3.0, score_a_head=-2.5, score_b_base=0.0)
    lines = says(table.assign(score_b_head=-0.25), task=task)[1:]
    assert all(f"; {SCORED[task]} +0.50 after prompt a, -0.25 after b" in line for line in lines)
    assert not any(SCORED[task] in line for line in says(table, task=task))


def test_each_base_has_a_line(says: Says) -> None:
    table = with_control(results(MOVED), "affirm", MOVED, -1.5)
    table = with_control(table, "other", MOVED, 0.25)
    lines = says(table)[:3]
    assert [line.split(" nats, 95 % interval ")[0] for line in lines] == [
        "mean delta_logit -1.000",
        "mean score of prompt a less that of other +0.250",
        "mean score of prompt a less that of affirm -1.500",
    ]
    assert ["noise floor" in line for line in lines] == [True, False, False]


@pytest.mark.parametrize("n_there", [2, 1])
def test_the_line_of_a_base_counts_the_sentences_that_have_it(n_there: int, says: Says) -> None:
    table = with_control(results(MOVED), "other", MOVED, [1.0 + 0.01 * i for i in range(16)])
    lines = says(lacking(table, n_there))
    assert lines[1].endswith("over 2 sentences" if n_there > 1 else "of a single sentence")
    assert not any(re.search(r"\bnan\b", line) for line in lines)


@pytest.mark.parametrize(
    ("contrast", "base", "serves"),
    [
        ([0.3] * 16, -1.0, specific("contributes to")),
        ([-0.3] * 16, 1.0, specific("contributes to", "rebound")),
        ([0.3] * 16, [1.0, -1.0] * 8, "not told from serving any mention"),
        ([0.3, -0.25] * 8, -1.0, "not told from serving any mention"),
        ([-0.3] * 16, -1.0, specific("works against")),
    ],
    ids=["alike", "alike against its own base", "base unclear", "contrast unclear", "opposite"],
)
def test_with_controls_the_log_says_whether_a_component_serves_any_mention(
    contrast: list[float], base: Any, serves: str, says: Says
) -> None:
    table = with_control(results({"L0H3": [0.3] * 16}), "other", {"L0H3": contrast}, base)
    mean = sum(contrast) / len(contrast)
    (line,) = (line for line in says(table) if line.startswith("removing L0H3: contributes to"))
    pattern = rf"; less forbidding other words {re.escape(f'{mean:+.3f}')} \[.*\], q \S+: {serves}"
    assert re.search(f"{pattern}$", line)


@pytest.mark.parametrize("controls", [False, True])
def test_where_only_the_contrast_has_a_base_the_strongest_by_it_are_told(
    controls: bool, says: Says
) -> None:
    """In the order of their contrasts, and none is said to contribute to the raw effect."""
    raw = {"L0H1": [0.3] * 16, "L0H2": [0.1] * 16, "L0H3": [0.2] * 16}
    table = results(raw, [1.0, -1.0] * 8)
    contrast = {"L0H1": [0.1] * 16, "L0H2": [0.3] * 16, "L0H3": [-0.2] * 16}
    lines = says(with_control(table, "other", contrast, -1.0) if controls else table)
    assert lines[1] == "its interval covers 0: there is nothing to explain by it, all are unclear"
    described = of_components(lines)
    assert list(described) == (["L0H2", "L0H1", "L0H3"] if controls else [])
    for label, line in described.items():
        assert line.startswith(f"removing {label}: unclear; ")
        assert line.endswith(specific("works against" if label == "L0H3" else "contributes to"))


def test_the_log_names_the_strongest_five_of_either_role(says: Says) -> None:
    order = [3, 6, 1, 5, 2, 4]
    effects = {f"L0H{h}": [0.2 * h] * 16 for h in order}
    effects |= {f"L1H{h}": [-0.3 * h] * 16 for h in order}
    expected = [f"L{layer}H{h}" for layer in (0, 1) for h in (6, 5, 4, 3, 2)]
    assert list(of_components(says(results(effects)))) == expected
    few = {label: effects[label] for label in ("L0H1", "L1H2", "L1H5")}
    assert list(of_components(says(results(few)))) == ["L0H1", "L1H5", "L1H2"]


def test_a_component_without_verdict_is_called_unclear_whatever_its_mean(says: Says) -> None:
    """One that varies too much, and one below the floor, beside one that is clear."""
    effects = {"L0H1": [2.0, -1.0] * 8, "L0H2": [0.05] * 16, "L0H3": [0.3] * 16}
    lines = of_components(says(with_control(results(effects), "other", effects, -1.0)))
    assert list(lines) == ["L0H1", "L0H3", "L0H2"]
    for label in ("L0H1", "L0H2"):
        assert lines[label].startswith(f"removing {label}: unclear; effect +")
        assert not re.search("contributes|works against|these words", lines[label])
    assert lines["L0H3"].startswith("removing L0H3: contributes to suppression; ")


LONE_Q = {(5, 1): "0.062", (6, 2): "0.062", (15, 1024): "0.062"}  # of sentences and heads
LONE_Q |= dict.fromkeys([(6, 1), (16, 1024), (21, 1024), (40, 99)], "")


@pytest.mark.parametrize(("n_sentences", "n_heads"), LONE_Q)
def test_the_log_says_when_sentences_are_too_few_for_any_q_below_five_percent(
    n_sentences: int, n_heads: int, says: Says
) -> None:
    lines = says(results({"L0H3": [0.3] * n_sentences}), n_heads)
    lone_q = LONE_Q[n_sentences, n_heads]
    few = [line for line in lines if "too few" in line]
    assert [line.endswith(f"{n_heads} cannot reach q below {lone_q}") for line in few] == (
        [True] if lone_q else []
    )


def test_the_log_of_a_single_sentence_tells_no_number_that_is_none_and_no_verdict(
    llama: str, tmp_path: Path
) -> None:
    log = (finish(llama, tmp_path, "--num_samples", "1") / "run.log").read_text()
    assert "a single sentence" in log
    assert not re.findall(r".*(?:\bnan\b|contributes to|works against).*", log)


# ----- drawn anew from a results file

DRAWN = ["circuit_heads.csv", "circuit_heads.png", "circuit_heatmap.png", "circuit_summary.png"]
Redraw = Callable[..., list[str]]


def findings_in(log: str) -> list[str]:
    """What is said of the base and of components, between the stages."""
    lines = itertools.dropwhile(lambda line: not line.startswith("mean delta"), log.splitlines())
    ends = "-----", "results in", "redrawn"
    return list(itertools.takewhile(lambda line: not line.startswith(ends), lines))


@pytest.fixture()
def redraw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Redraw:
    """Draw anew into a folder, without a model; what is said of the findings."""

    def call(source: Path, folder: Path, *flags: str) -> list[str]:
        monkeypatch.setattr(tracing, "from_hub", lambda *a, **k: pytest.fail("asked for a model"))
        capsys.readouterr()
        argv = ["--from_csv", str(source), "--output_dir", str(folder), *flags]
        assert tracing.main(argv) == 0
        return findings_in(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "flags",
    [
        "--num_samples 6 --controls --seed 7 --top_k 3",
        "--num_samples 5 --task odd_one_out --op patch --patch_into b --kind neuron --neurons 0-2",
        "--num_samples 6 --task refusal --op scale --factor 2 --kind attn --bf16 --positions last",
    ],
)
def test_redrawing_a_run_gives_the_same_findings_and_figures(
    flags: str, llama: str, tmp_path: Path, redraw: Redraw
) -> None:
    run, new = finish(llama, tmp_path / "run", "--heatmap", *flags.split()), tmp_path / "new"
    findings = redraw(run / "circuit_results.csv", new, "--heatmap")
    assert findings == findings_in((run / "run.log").read_text())
    assert sorted(path.name for path in new.iterdir()) == sorted([*DRAWN, tracing.REPORT])
    for name in DRAWN:
        assert (new / name).read_bytes() == (run / name).read_bytes(), name
    shutil.copy(run / "circuit_results.csv", tmp_path / "alone.csv")
    redraw(tmp_path / "alone.csv", tmp_path / "alone")  # without record or noise floor
    heads, redrawn = (read(folder, DRAWN[0]) for folder in (run, tmp_path / "alone"))
    unlike = [name for name in heads if re.search("above_noise|share_moved|verdict", name)]
    pd.testing.assert_frame_equal(redrawn.drop(columns=unlike), heads.drop(columns=unlike))


def write_run(folder: Path, columns: dict[str, Any] | None = None, **recorded: Any) -> Path:
    """A results file beside the record of a run with some flags; columns are the file's own."""
    folder.mkdir()
    effects = {f"L0H{h}": [0.1 * h + 0.02 * i**2 for i in range(8)] for h in range(4)}
    table = results(effects, [-1.0 - 0.1 * i for i in range(8)], op=recorded.get("op", "zero"))
    table.assign(**(columns or {})).to_csv(folder / "circuit_results.csv", index=False)
    record = {"noise_floor": 0.5, "config": {"layers": "all", "given": None, **recorded}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder / "circuit_results.csv"


@pytest.mark.parametrize(
    ("name", "one", "other", "more"),
    [
        ("top_k", 2, 3, {}),
        ("task", "suppression", "refusal", {}),
        ("factor", 0.5, 2.0, {"op": "scale"}),
    ],
)
def test_redrawing_heeds_the_recorded_flags_unless_they_are_given_again(
    name: str, one: Any, other: Any, more: dict[str, Any], tmp_path: Path, redraw: Redraw
) -> None:
    first = write_run(tmp_path / "first", **more, **{name: one})
    second = write_run(tmp_path / "second", **more, **{name: other})

    def drawn(source: Path, *flags: str) -> list[Any]:
        findings, new = redraw(source, tmp_path / "new", *flags), tmp_path / "new"
        return [findings, *((new / file).read_bytes() for file in DRAWN if (new / file).exists())]

    recorded, of_other = drawn(first), drawn(second)
    assert recorded != of_other
    assert drawn(first, f"--{name}={other}") == of_other
    assert drawn(second, f"--{name}={one}") == recorded


SCALED = {"op": "scale", "factor": 2.0}
OVERRULED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # the table's columns, what run.json says instead, what the log says of L0H3
    "task": ({"task": "refusal"}, {"task": "suppression"}, "contributes to reversed refusal"),
    "op": ({"op": "mean"}, {"op": "patch"}, "mean-ablating L0H3: contributes to"),
    "factor": (SCALED, {"op": "scale", "factor": 0.5}, "scaling L0H3: works against"),
}


@pytest.mark.parametrize("case", OVERRULED)
def test_what_a_table_tells_of_its_run_wins_over_the_record(
    case: str, tmp_path: Path, redraw: Redraw
) -> None:
    columns, recorded, phrase = OVERRULED[case]
    lines = redraw(write_run(tmp_path / "run", columns, **recorded), tmp_path / "new")
    (line,) = (line for line in lines if "L0H3" in line)
    assert phrase in line


PATCHED = {"op": "patch", "patch_into": "a"}
CONTRARY: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    # the table's columns, an option, what is said
    "task": ({"task": "refusal"}, "--task suppression", ["--task suppression", "refusal"]),
    "kind": ({}, "--kind mlp", ["--kind mlp", "head"]),
    "op": ({}, "--op mean", ["--op mean", "zero"]),
    "op and factor": ({}, "--op scale --factor 2", ["scale", "zero"]),
    "factor": (SCALED, "--factor 3", ["--factor 3.0", "2.0"]),
    "positions": ({"positions": "last"}, "--positions all", ["--positions all", "last"]),
    "patch_into": (PATCHED, "--patch_into b", ["--patch_into b", " a"]),
}


@pytest.mark.parametrize("case", CONTRARY)
def test_an_option_that_contradicts_the_table_is_refused_with_both_values(
    case: str, tmp_path: Path, answer: Answer
) -> None:
    columns, option, phrases = CONTRARY[case]
    source = write_run(tmp_path / "run", columns)
    argv = ["--from_csv", str(source), "--output_dir", str(tmp_path / "new"), *option.split()]
    refuses(answer, *argv, says=[str(source), *phrases])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", CONTRARY)
def test_an_option_that_says_what_the_table_says_is_taken(
    case: str, tmp_path: Path, redraw: Redraw
) -> None:
    columns, _, _ = CONTRARY[case]
    flags = [f"--{name}={value}" for name, value in {"op": "zero", **columns}.items()]
    source = write_run(tmp_path / "run", columns)
    assert redraw(source, tmp_path / "new", *flags) == redraw(source, tmp_path / "again")


def test_a_scaled_run_of_unknown_factor_is_redrawn_with_a_given_one_only(
    tmp_path: Path, redraw: Redraw, answer: Answer
) -> None:
    source = write_run(tmp_path / "run", {"op": "scale"})
    argv = ["--from_csv", str(source), "--output_dir", str(tmp_path / "new")]
    code, _, err = answer(*argv)
    assert code == 2 and "--factor" in err.splitlines()[-1]
    for factor, stands in {"0.5": "contributes to", "2": "works against"}.items():
        lines = redraw(source, tmp_path / "new", "--factor", factor)
        assert any(f"scaling L0H3: {stands}" in line for line in lines)


def test_redrawing_in_place_takes_the_recorded_noise_floor_and_leaves_the_run_as_it_was(
    tmp_path: Path, redraw: Redraw
) -> None:
    source = write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    assert "noise floor 0.5" in redraw(source, source.parent)[0]
    assert {path: path.read_bytes() for path in before} == before
    heads = read(source.parent, "circuit_heads.csv")
    assert heads["above_noise"].tolist() == [False, False, True, True]  # 0.35 to 0.65


def test_redrawing_compares_with_another_file(tmp_path: Path, redraw: Redraw) -> None:
    told_of_run = tracing.run_values(tracing.Config())
    source, other = (write_run(tmp_path / name, told_of_run) for name in ("one", "other"))
    findings = redraw(source, tmp_path / "new", "--compare", str(other))
    assert f"(zero here, zero in {other}): 1.000" in findings[-2]
    assert not read(tmp_path / "new", "circuit_heads.csv")["growth_flag"].any()


@pytest.mark.parametrize("spoilt", ["record", "folder", "comparison"])
def test_what_redrawing_cannot_use_is_refused_by_name(
    spoilt: str, tmp_path: Path, answer: Answer
) -> None:
    told_of_run = tracing.run_values(tracing.Config())
    source, other = (write_run(tmp_path / name, told_of_run) for name in ("one", "other"))
    argv = ["--from_csv", str(source), "--output_dir", str(tmp_path / "new")]
    if spoilt == "record":
        culprit = source.with_name("run.json")
        culprit.write_text("[]")
    elif spoilt == "folder":
        culprit = other.parent  # holds another run
        argv[-1] = str(culprit)
    else:
        culprit = other
        other.write_text(other.read_text().replace("p00", "q00"))  # shares no prompt
        argv += ["--compare", str(other)]
    before = sorted(other.parent.iterdir())
    refuses(answer, *argv, says=[str(culprit)])
    assert sorted(other.parent.iterdir()) == before


def test_redrawing_into_a_folder_in_which_a_run_is_at_work_is_refused(
    tmp_path: Path, answer: Answer
) -> None:
    source = write_run(tmp_path / "run")
    lock = source.parent / ".parts" / "lock"
    lock.parent.mkdir()
    argv = ["--from_csv", str(source), "--output_dir", str(source.parent)]
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(answer, *argv, says=["another run is at work", str(source.parent)])
    assert not (source.parent / "circuit_heads.csv").exists()
    assert answer(*argv)[0] == 0


# ----- files of somebody else

SEVEN = "sample_id,n_constraints,layer,head,delta_logit_base,delta_logit_head,head_effect"
THEIRS = [
    f"s{i},1,{layer},{head},-1.0,{-1.0 + effect},{effect}"
    for i in range(6)
    for layer in range(2)
    for head in range(3)
    for effect in [round(0.1 * head - 0.05 * layer + 0.01 * i, 3)]
]


def write_theirs(path: Path, lines: Sequence[str] = THEIRS, header: str = SEVEN) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_file_with_the_seven_columns_is_enough(tmp_path: Path, redraw: Redraw) -> None:
    redraw(write_theirs(tmp_path / "theirs.csv"), tmp_path / "new", "--heatmap")
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert heads["label"].tolist() == [f"L{i}H{j}" for i in range(2) for j in range(3)]
    expected = [0.1 * head - 0.05 * layer + 0.025 for layer in range(2) for head in range(3)]
    assert heads["mean"].tolist() == pytest.approx(expected)
    assert (heads["n_sentences"] == 6).all()  # without a column of units every sample is one
    assert heads["above_noise"].isna().all()  # no noise floor is known
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {*DRAWN, tracing.REPORT}


@pytest.mark.parametrize("flags", ["", "--op patch --positions last", "--op scale --factor 3"])
def test_options_tell_of_a_table_without_op_how_it_was_made(
    flags: str, tmp_path: Path, redraw: Redraw
) -> None:
    """Amplifying turns every role."""
    table = results(MOVED).drop(columns=["op", "prompts"])
    table.to_csv(tmp_path / "t.csv", index=False)
    described = of_components(redraw(tmp_path / "t.csv", tmp_path / "out", *flags.split()))
    doing = {"": "removing", "patch": "patching", "scale": "scaling"}[flags[5:10].strip()]
    stands = "works against" if "scale" in flags else "contributes to"
    assert described["L0H3"].startswith(f"{doing} L0H3: {stands} suppression; ")


def test_what_a_table_does_not_tell_of_its_run_is_warned_of_as_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_theirs(tmp_path / "theirs.csv")
    flags = ["--op", "patch", "--output_dir", str(tmp_path / "out")]
    assert tracing.main(["--from_csv", str(source), *flags]) == 0
    taken = "--op patch --positions all --task suppression --patch_into a --method exact is taken"
    assert f"{source} does not tell how it was made: {taken}" in capsys.readouterr().out


@pytest.mark.parametrize(("n_there", "by_contrast"), [(8, False), (9, True)])
def test_the_contrast_of_few_sentences_does_not_rank(
    n_there: int, by_contrast: bool, says: Says
) -> None:
    effects = {"L0H1": [0.3] * 16, "L0H2": [0.1] * 16}
    table = with_control(results(effects), "other", {"L0H1": [0.1] * 16, "L0H2": [0.3] * 16}, -1.0)
    lines = says(lacking(table, n_there))
    assert list(of_components(lines)) == (["L0H2", "L0H1"] if by_contrast else ["L0H1", "L0H2"])


def test_scores_that_are_empty_are_not_told(says: Says) -> None:
    scores = dict.fromkeys(("score_a_base", "score_a_head", "score_b_base", "score_b_head"))
    table = results(MOVED).assign(**scores).astype(dict.fromkeys(scores, float))
    assert not any("nan" in line for line in says(table))


def test_contrasts_without_the_scores_of_their_base_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = with_control(results(MOVED), "other", MOVED, -1.0).drop(columns=["score_other_base"])
    heads = tracing.heads_table(table, find_bases(table), 0.1, factor=None)
    assert "effect_minus_other is left out: its base, the scores of other" in caplog.text
    assert "minus_other_mean" not in heads and "mean" in heads


def test_columns_of_units_groups_and_op_are_heeded(tmp_path: Path, redraw: Redraw) -> None:
    lines = [f"{line},{'xyz'[int(line[1]) // 2]},,mean" for line in THEIRS]
    lines += [f"n{line[1:]},w,{tracing.NO_ODD_ONE},mean" for line in THEIRS]
    source = write_theirs(tmp_path / "theirs.csv", lines, f"{SEVEN},unit,group,op")
    assert any("mean-ablating L0H2" in line for line in redraw(source, tmp_path / "new"))
    heads = read(tmp_path / "new", "circuit_heads.csv")
    assert (heads[["n_sentences", "n_samples"]] == [3, 6]).all(axis=None)

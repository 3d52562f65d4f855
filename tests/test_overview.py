"""trace --overview: every layer's attention, MLP and residual stream, equal to traces of each."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import llama3_circuit_tracing as tracing
import naive
from by_hand import prepared, q_values, steps, targets_of, texts
from conftest import Answer, finish, read, record_of, refuses, write_samples
from llama3_circuit_tracing import OVERVIEW_KINDS, EditPhrases, Findings
from test_figures import Saved, check_whole, heads_of
from test_report import images, page_of
from test_run_folder import parts

pytestmark = pytest.mark.usefixtures("coarse_figures")
OVERVIEW, HEADS = "circuit_overview.csv", "circuit_heads.csv"
PICTURE = Path("circuit_overview.png")
NARROW = ("--num_samples", "4", "--layers", "0", "--heads", "0")  # of the sweep beside it
EQUAL = 2e-5


def sentences(folder: Path, command: str = "trace") -> list[str]:
    return [entry["text"] for entry in record_of(folder)["commands"][command]["findings"]]


def kinds_of(folder: Path) -> list[str]:
    return list(read(folder, OVERVIEW)["kind"].drop_duplicates())


@pytest.fixture(scope="module")
def patched(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of one head by patching, with an overview of the model's three layers."""
    folder = tmp_path_factory.mktemp("overview") / "patched"
    return finish(llama, folder, *NARROW, "--op", "patch", "--overview")


@pytest.fixture()
def begun(patched: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(patched, tmp_path / "begun"))


@pytest.fixture()
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of components whose edits were made, once each time: jitter is none."""
    labels: list[str] = []
    make_edits = tracing.component_edits

    def watch(experiment: Any, clean_run: Any, subjects: Sequence[Any]) -> Any:
        labels.extend(component.label for component, draw in subjects if draw < 0)
        return make_edits(experiment, clean_run, subjects)

    monkeypatch.setattr(tracing, "component_edits", watch)
    return labels


# ----- the numbers


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("--op patch", "attn mlp resid"),
        ("--op patch --patch_into b", "attn mlp resid"),
        ("--op zero", "attn mlp"),
        ("--op mean --given L1H2,L0mlp", "attn mlp"),
        ("--op zero --positions last --controls", "attn mlp resid"),
        ("--op scale --factor 2", "attn mlp resid"),
    ],
)
def test_its_rows_are_those_of_a_trace_of_each_kind_to_the_last_column(
    flags: str, kinds: str, llama: str, tmp_path: Path
) -> None:
    """Also interval, q, verdict and number of tests, and the noise floor."""
    overview = read(finish(llama, tmp_path / "o", *NARROW, *flags.split(), "--overview"), OVERVIEW)
    assert set(overview["kind"]) == set(kinds.split())
    assert list(overview["layer"]) == sorted(overview["layer"])
    for kind in kinds.split():
        folder = finish(
            llama, tmp_path / kind, "--num_samples", "4", "--kind", kind, *flags.split()
        )
        heads = read(folder, HEADS).drop(columns=["head", "index"])
        rows = overview[overview["kind"] == kind].reset_index(drop=True)
        floor = rows.pop("noise_floor")
        assert list(floor) == pytest.approx([record_of(folder)["noise_floor"]] * len(rows))
        pd.testing.assert_frame_equal(rows, heads, check_dtype=False, rtol=1e-6, atol=1e-6)
        assert heads["mean"].abs().max() > 1e-3, "the edits did nothing"


@pytest.mark.parametrize(("op", "positions"), [("patch", "all"), ("zero", "last")])
def test_its_means_equal_a_plain_hook_at_one_layer_after_the_other(
    op: str, positions: str, tiny_llama: str, tmp_path: Path
) -> None:
    flags = ("--op", op, "--positions", positions, "--overview")
    folder = finish(tiny_llama, tmp_path, *NARROW, "--num_samples", "2", *flags)
    loaded, targets = naive.load(tiny_llama), targets_of(folder)
    overview = read(folder, OVERVIEW)
    assert len(overview) == 4 * 3
    for row in overview.itertuples():
        change = SimpleNamespace(op=op, kind=row.kind, positions=positions, factor=None)
        effects = []
        for name, by_side in texts(folder).items():
            pair = [by_side["a"], by_side["b"]]
            words = targets[name]
            effect = naive.edited_score(*loaded, change, pair, words, row.layer, -1)
            effect -= naive.suppression_score(*loaded, pair[0], words)
            if op == "zero":  # which edits prompt b, too
                effect -= naive.edited_score(*loaded, change, pair[::-1], words, row.layer, -1)
                effect += naive.suppression_score(*loaded, pair[1], words)
            effects.append(effect)
        assert row.mean == pytest.approx(np.mean(effects), abs=EQUAL), row.label


def test_its_verdicts_are_those_of_a_trace_of_the_kind(tiny_llama: str, tmp_path: Path) -> None:
    """Where sentences are enough to have some."""
    flags = ["--least_effect", "0.1"]
    narrow = ["--layers", "0", "--heads", "0", "--overview"]
    overview = read(finish(tiny_llama, tmp_path / "o", *flags, *narrow), OVERVIEW)
    heads = read(finish(tiny_llama, tmp_path / "attn", *flags, "--kind", "attn"), HEADS)
    verdicts = list(overview["verdict"][overview["kind"] == "attn"])
    assert verdicts == list(heads["verdict"])
    assert set(verdicts) >= {"contributes", "through prompt b", "small"}, verdicts


def test_q_corrects_within_a_kind_alone(patched: Path) -> None:
    for _, rows in read(patched, OVERVIEW).groupby("kind"):
        assert list(rows["q"]) == pytest.approx(q_values(list(rows["p"])))
        assert set(rows["n_tests"]) == {3}


def test_share_times_base_is_the_mean(patched: Path) -> None:
    overview, results = read(patched, OVERVIEW), read(patched)
    base = results.drop_duplicates("sample_id")["delta_logit_base"].mean()
    known = overview[overview["share_moved"].notna()]
    assert list(-known["share_moved"] * base) == pytest.approx(list(known["mean"]))


def test_the_trace_beside_it_is_that_without_it(patched: Path, llama: str, tmp_path: Path) -> None:
    alone = finish(llama, tmp_path, *NARROW, "--op", "patch")
    for name in ("circuit_results.csv", HEADS):
        assert (alone / name).read_bytes() == (patched / name).read_bytes()
    assert record_of(alone)["noise_floor"] == record_of(patched)["noise_floor"]
    assert not (alone / OVERVIEW).exists()


# ----- estimates


@pytest.mark.parametrize("flags", ["--method atp", "--screen 1"])
def test_beside_estimates_it_is_measured_and_says_so(
    flags: str, patched: Path, llama: str, tmp_path: Path
) -> None:
    folder = finish(llama, tmp_path, *NARROW, "--op", "patch", "--overview", *flags.split())
    pd.testing.assert_frame_equal(read(folder, OVERVIEW), read(patched, OVERVIEW), rtol=1e-6)
    said = "the effects of the overview are all measured, none is an estimate"
    assert said in sentences(folder)
    assert said not in sentences(patched)
    if "atp" in flags:
        assert set(read(folder)["method"]) == {"atp"}
        assert not any("by atp estimates: " in s for s in sentences(folder) if "strongest" in s)


# ----- parts


@pytest.mark.usefixtures("no_weights")
def test_the_same_again_measures_nothing(begun: Path, llama: str) -> None:
    before = {path.name: path.read_bytes() for path in begun.glob("*.csv")}
    finish(llama, begun, *NARROW, "--op", "patch", "--overview")
    assert {path.name: path.read_bytes() for path in begun.glob("*.csv")} == before


def test_a_trace_that_is_there_is_not_swept_again_for_it(
    llama: str, tmp_path: Path, measured: list[str]
) -> None:
    finish(llama, tmp_path, *NARROW)
    assert measured == ["L0H0"]
    finish(llama, tmp_path, *NARROW, "--overview")
    assert sorted(measured[1:]) == [f"L{n}{kind}" for n in range(3) for kind in ("attn", "mlp")]


def test_layers_that_the_trace_swept_itself_are_taken_from_it(
    llama: str, tmp_path: Path, measured: list[str]
) -> None:
    flags = ["--num_samples", "2", "--kind", "mlp", "--layers", "1-2", "--overview"]
    finish(llama, tmp_path, *flags)
    assert sorted(measured) == ["L0attn", "L0mlp", "L1attn", "L1mlp", "L2attn", "L2mlp"]


def test_commands_of_another_kind_find_what_it_has_measured_and_the_other_way_round(
    begun: Path, llama: str, tmp_path: Path, measured: list[str]
) -> None:
    finish(llama, begun, "paths", "--kind", "mlp", "--num_samples", "4")
    assert measured == []
    other = tmp_path / "other"
    finish(llama, other, "paths", "--kind", "mlp", "--op", "patch", "--num_samples", "4")
    assert sorted(measured) == ["L0mlp", "L1mlp", "L2mlp"]
    finish(llama, other, *NARROW, "--op", "patch", "--overview")
    assert not any(label.endswith("mlp") for label in measured[3:])
    pd.testing.assert_frame_equal(read(other, OVERVIEW), read(begun, OVERVIEW), rtol=1e-6)


def test_commands_of_another_kind_take_its_rows_per_forward(
    llama: str, tmp_path: Path, measured: list[str]
) -> None:
    """Also where no command line names them any more."""
    finish(llama, tmp_path, *NARROW, "--overview", "--rows_per_forward", "2")
    finish(llama, tmp_path, *NARROW, "--overview")
    del measured[:]
    finish(llama, tmp_path, "paths", "--kind", "mlp", "--num_samples", "4")
    assert measured == []


def test_overwriting_measures_all_of_it_anew_and_no_other_kind(
    begun: Path, llama: str, measured: list[str]
) -> None:
    finish(llama, begun, "paths", "--kind", "value", "--layers", "0", "--num_samples", "4")
    del measured[:]
    old = {path.name: path.stat().st_mtime_ns for path in parts(begun, "scores")}
    finish(llama, begun, *NARROW, "--op", "patch", "--overview", "--overwrite")
    layers = [f"L{n}{kind}" for n in range(3) for kind in OVERVIEW_KINDS]
    assert sorted(measured) == sorted(["L0H0", *layers])
    assert not record_of(begun)["commands"]["trace"]["parts_to_replace"]
    kept = [path for path in parts(begun, "scores") if path.stat().st_mtime_ns == old[path.name]]
    assert kept  # those of the value heads


def test_without_it_its_files_go_and_with_it_they_come_back_from_parts(
    begun: Path, llama: str, no_weights: None
) -> None:
    before = (begun / OVERVIEW).read_bytes()
    finish(llama, begun, *NARROW, "--op", "patch")
    assert not (begun / OVERVIEW).exists() and not (begun / PICTURE).exists()
    finish(llama, begun, *NARROW, "--op", "patch", "--overview")
    assert (begun / OVERVIEW).read_bytes() == before and (begun / PICTURE).exists()


def test_a_narrow_trace_of_its_kind_is_corrected_for_all_that_it_tests(
    llama: str, tmp_path: Path
) -> None:
    """Once as well as again: what was tested is known before q is told."""
    flags = ["--num_samples", "4", "--kind", "mlp", "--layers", "1", "--overview"]
    heads = read(finish(llama, tmp_path, *flags), HEADS)
    assert list(heads["n_tests"]) == [3]
    assert heads["q"][0] == pytest.approx(min(1, 3 * heads["p"][0]))
    assert "q corrects for 3 components: --overview tests them" in sentences(tmp_path)
    before = (tmp_path / HEADS).read_bytes()
    finish(llama, tmp_path, *flags)
    assert (tmp_path / HEADS).read_bytes() == before
    whole = finish(llama, tmp_path, "--num_samples", "4", "--kind", "mlp", "--overview")
    assert not any("q corrects" in sentence for sentence in sentences(whole))


# ----- what is left out, and what is refused


@pytest.mark.parametrize("flags", ["--op zero", "--op mean", "--op scale --factor 0"])
def test_a_residual_stream_that_would_be_removed_is_left_out_in_one_sentence(
    flags: str, llama: str, tmp_path: Path
) -> None:
    folder = finish(llama, tmp_path, *NARROW, *flags.split(), "--overview")
    assert kinds_of(folder) == ["attn", "mlp"]
    (said,) = [sentence for sentence in sentences(folder) if "left out" in sentence]
    op = flags.removeprefix("--op ").replace("--factor ", "")
    assert said == (
        f"resid is left out: --op {op} at all positions of a residual stream removes the input"
        " itself; --op patch does not"
    )


def test_a_factor_of_zero_is_refused_of_a_residual_stream_as_zero_is(answer: Answer) -> None:
    line = "--model_id x --kind resid --op scale --factor 0"
    refuses(answer, *line.split(), says=["--op scale 0 at all positions removes the input itself"])


def test_a_model_without_mlps_that_can_be_edited_has_no_column_of_them(
    random_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = finish(random_model("mixtral"), tmp_path, *NARROW, "--op", "patch", "--overview")
    assert kinds_of(folder) == ["attn", "resid"]
    (said,) = [sentence for sentence in sentences(folder) if "left out" in sentence]
    assert re.fullmatch("mlp is left out: Mixtral.* has blocks without mlp.down_proj.*", said)


def test_what_given_removes_has_no_row_and_all_of_a_kind_no_column(
    llama: str, tmp_path: Path
) -> None:
    flags = ["--given", "L0attn,L1attn,L2attn,L1mlp", "--overview"]
    folder = finish(llama, tmp_path, *NARROW, *flags)
    assert list(read(folder, OVERVIEW)["label"]) == ["L0mlp", "L2mlp"]
    assert "attn is left out: --given zeroes it in all layers" in sentences(folder)


@pytest.mark.usefixtures("no_weights")
def test_an_overview_of_nothing_is_refused_before_the_weights(
    llama: str, tmp_path: Path, answer: Answer
) -> None:
    given = ",".join(f"L{n}{kind}" for n in range(3) for kind in ("attn", "mlp"))
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), "--overview", "--given", given]
    says = ["--overview has nothing to measure: attn is left out", "resid is left out: --op zero"]
    refuses(answer, *argv, says=says)


def test_samples_of_one_prompt_have_an_overview_of_their_score(
    tiny_llama: str, tmp_path: Path
) -> None:
    line = ["--prompt", "Name a fruit.", "--target", "apple", "--foil", "pear", "--overview"]
    folder = finish(tiny_llama, tmp_path, *line, "--layers", "0", "--heads", "0")
    overview = read(folder, OVERVIEW)
    assert list(overview["label"]) == [f"L{n}{kind}" for n in range(4) for kind in ("attn", "mlp")]
    assert overview["moved_b"].isna().all()
    assert list(overview["moved_a"]) == pytest.approx(list(overview["mean"]))
    assert "no layer has a clear verdict: attn, mlp" in sentences(folder)
    assert any(sentence.endswith("; --positions last does not") for sentence in sentences(folder))


@pytest.mark.usefixtures("no_weights")
def test_one_prompt_has_no_partner_to_patch_from(
    tiny_llama: str, tmp_path: Path, answer: Answer
) -> None:
    sample = {"prompt": "Name a fruit.", "targets": ["apple"], "foils": ["pear"]}
    path = write_samples(tmp_path / "one.jsonl", sample)
    argv = ["--model_id", tiny_llama, "--output_dir", str(tmp_path / "o"), "--overview"]
    argv += ["--task", "contrast", "--samples", path, "--op", "patch"]
    refuses(answer, *argv, says=["'prompt_b' is missing: --op patch takes values"])


# ----- dry run


def overview_lines(answer: Answer, llama: str, *flags: str) -> list[str]:
    code, out, _ = answer("--model_id", llama, "--num_samples", "2", "--dry_run", *flags)
    assert code == 0
    return [line for line in out.splitlines() if line.startswith("overview: ")]


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_counts_its_runs_but_for_those_of_the_sweep(llama: str, answer: Answer) -> None:
    plain = overview_lines(answer, llama, "--overview", "--op", "patch", "--layers", "0")
    assert [line.partition(":")[2].partition(":")[0].strip() for line in plain] == [
        f"3 components (L0{kind} to L2{kind})" for kind in OVERVIEW_KINDS
    ]
    assert all(line.endswith("one by one they take 12") for line in plain)
    of_mlps = overview_lines(answer, llama, "--overview", "--kind", "mlp", "--layers", "1-2")
    assert [line.split(": about")[0] for line in of_mlps] == [
        "overview: 3 components (L0attn to L2attn)",
        "overview: 1 component (L0mlp to L0mlp)",
    ]
    estimated = overview_lines(answer, llama, "--overview", "--kind", "mlp", "--method", "atp")
    assert len(estimated) == 2
    assert overview_lines(answer, llama) == []


# ----- what is said


def overview_of(roles: dict[str, float], floor: float = 0.2) -> pd.DataFrame:
    """As circuit_overview.csv, of components whose roles in a base of -2 these are."""
    tables = []
    for kind in OVERVIEW_KINDS:
        effects = {label: steps(role) for label, role in roles.items() if label.endswith(kind)}
        if effects:
            tables.append(heads_of(effects, floor=floor))
    table = pd.concat(tables).drop(columns=["head", "index"])
    return table.sort_values("layer", kind="stable", ignore_index=True)


def said_of(roles: dict[str, float], floor: float = 0.2) -> list[str]:
    findings = Findings()
    base = {"mean": -2.0}
    phrases = EditPhrases(tracing.SUPPRESSION, "removing")
    tracing.report_overview(findings, overview_of(roles, floor), {"b": base}, phrases)
    return [entry["text"] for entry in findings.entries]


def test_the_strongest_layer_of_each_kind_is_named_with_what_it_does() -> None:
    roles = {"L0attn": 0.5, "L1attn": -1.0, "L0mlp": 0.01, "L1mlp": 0.3}
    attn, mlp = said_of(roles)
    assert attn.startswith("strongest attn: removing L1attn: works against suppression; effect -0")
    assert mlp.startswith("strongest mlp: removing L1mlp: contributes to suppression; effect +0.3")


def test_of_layers_that_are_about_alike_the_first_is_named() -> None:
    roles = {"L0resid": 0.5, "L1resid": 1.999, "L2resid": 2.0, "L3resid": 1.99}
    (resid,) = said_of(roles)
    assert resid.startswith("strongest resid: removing L1resid: ")


def test_kinds_without_a_clear_verdict_are_told_together() -> None:
    roles = {"L0attn": 0.05, "L1attn": -0.1, "L0mlp": 0.01, "L0resid": 0.9}
    resid, others = said_of(roles)
    assert resid.startswith("strongest resid: removing L0resid: contributes")
    assert others == "no layer has a clear verdict: attn, mlp"


# ----- the figure


@pytest.fixture()
def saved(monkeypatch: pytest.MonkeyPatch) -> Saved:
    """The figures that would be saved, laid out."""
    figures: Saved = {}

    def keep(figure: Any, path: Path) -> None:
        figure.draw_without_rendering()
        figures[path] = figure

    monkeypatch.setattr(tracing, "save_figure", keep)
    return figures


def drawn(saved: Saved, overview: pd.DataFrame) -> tuple[Any, dict[tuple[int, int], str]]:
    """The cells of the picture [layer, kind] with hidden ones masked, and the texts in them."""
    tracing.draw_overview(overview, "a title\nof two lines", PICTURE)
    axes = saved[PICTURE].axes[0]
    (mesh,) = axes.collections
    assert mesh.norm.vmin == -mesh.norm.vmax < 0
    in_cells = {}
    for text in axes.texts:
        x, y = text.get_position()
        in_cells[math.floor(y), math.floor(x)] = text.get_text()
    shape = (overview["layer"].nunique(), overview["kind"].nunique())
    return mesh.get_array().reshape(shape), in_cells


ROLES = {"L0attn": 0.4, "L1attn": -1.0, "L0mlp": 0.01, "L1mlp": 0.3, "L0resid": 2, "L1resid": 0.1}


def test_cells_show_roles_in_percent_of_the_base_and_are_grey_where_unclear(
    saved: Saved,
) -> None:
    overview = overview_of(ROLES)
    cells, in_cells = drawn(saved, overview)
    for row in overview.itertuples():
        place = (row.layer, OVERVIEW_KINDS.index(row.kind))
        is_clear = row.verdict in tracing.CLEAR_VERDICTS
        assert np.ma.getmaskarray(cells)[place] == (not is_clear)
        assert (place in in_cells) == is_clear
        if is_clear:
            percent = 100 * row.role / 2
            assert cells[place] == pytest.approx(percent)
            assert float(in_cells[place]) == pytest.approx(percent, abs=0.051)
            assert re.fullmatch(r"[+-]\d+\.\d", in_cells[place])
    assert len(in_cells) == 4
    axes, bar = saved[PICTURE].axes
    assert bar.get_ylabel() == (
        "role in % of the base:\n> 0 carries the task, < 0 works against it"
    )
    assert axes.get_title() == "a title\nof two lines\n(grey: unclear)"
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["attention", "MLP", "residual\nstream"]
    check_whole(saved[PICTURE])


def test_where_an_op_amplifies_colors_follow_the_role_and_not_the_share(
    saved: Saved,
) -> None:
    overview = overview_of(ROLES)
    cells, _ = drawn(saved, overview)
    amplified, _ = drawn(saved, overview.assign(share_moved=-overview["share_moved"]))
    assert np.ma.allequal(cells, amplified)


def test_without_a_share_cells_show_nats(saved: Saved) -> None:
    overview = overview_of(ROLES).assign(share_moved=math.nan)
    cells, in_cells = drawn(saved, overview)
    assert cells[1, 0] == pytest.approx(-0.965)
    assert in_cells[1, 0] == "-0.96" or in_cells[1, 0] == "-0.97"
    assert "role in nats" in saved[PICTURE].axes[1].get_ylabel()


@pytest.mark.parametrize(("n_layers", "n_numbers"), [(1, 3), (40, 120), (41, 0), (80, 0)])
def test_a_picture_of_many_layers_is_whole_and_has_no_numbers(
    n_layers: int,
    n_numbers: int,
    saved: Saved,
) -> None:
    roles = {f"L{n}{kind}": 1 + n for n in range(n_layers) for kind in OVERVIEW_KINDS}
    cells, in_cells = drawn(saved, overview_of(roles))
    assert cells.count() == 3 * n_layers and len(in_cells) == n_numbers
    check_whole(saved[PICTURE])
    axes = saved[PICTURE].axes[0]
    heights = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(one.y1 < other.y0 for one, other in itertools.pairwise(heights))


def test_all_grey_is_no_hindrance_and_what_is_grey_takes_no_color(
    saved: Saved,
) -> None:
    cells, in_cells = drawn(saved, overview_of(ROLES, floor=10.0))
    assert cells.count() == 0 and not in_cells
    overview = overview_of(ROLES)
    huge = overview["label"] == "L0mlp"
    overview.loc[huge, ["role", "share_moved"]] = [1000.0, 500.0]
    drawn(saved, overview)
    (mesh,) = saved[PICTURE].axes[0].collections
    assert mesh.norm.vmax == pytest.approx(100 * 2.035 / 2)


# ----- the page, and redraw


def test_the_page_shows_its_table_and_its_picture(patched: Path) -> None:
    page = page_of(patched)
    assert (patched / PICTURE).read_bytes() in images(page)
    ids = [told.get("id") for told in page.all("table")]
    assert ids[:2] == ["heads", "overview"]
    labels = {row[0][0] for row in page.tables[1][2:]}
    assert labels == set(read(patched, OVERVIEW)["label"])


def test_redraw_leaves_it_as_it_is(begun: Path) -> None:
    before = {name: (begun / name).read_bytes() for name in (OVERVIEW, PICTURE.name)}
    assert tracing.main(["redraw", str(begun), "--top_k", "1"]) == 0
    assert {name: (begun / name).read_bytes() for name in before} == before
    assert before[PICTURE.name] in images(page_of(begun))


# ----- the experiment meanwhile


def test_another_kind_is_measured_for_a_while_only(llama: str) -> None:
    experiment = prepared(llama, "--op", "patch")
    key = experiment.part_key
    with pytest.raises(RuntimeError), experiment.measuring_kind("mlp"):
        assert experiment.part_key == prepared(llama, "--op", "patch", "--kind", "mlp").part_key
        raise RuntimeError
    assert (experiment.options.kind, experiment.part_key) == ("head", key)

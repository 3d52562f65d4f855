"""The page that a run ends with: what it shows is what the files say, and nothing in it acts."""

from __future__ import annotations

import ast
import base64
import hashlib
import html
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colormaps

import llama3_circuit_tracing as tracing
from by_hand import results, steps
from conftest import (
    HANGS,
    SCRIPT,
    TINY,
    Answer,
    finish,
    generations,
    read,
    record_of,
    refuses,
    write_samples,
)

REPORT = "circuit_report.html"
MAIN = ["--controls", "--confirm", "8", "--max_new_tokens", "8"]  # the readme's
FEW = ["--num_samples", "4", "--layers", "0-1"]
CONFIRMED = [*FEW, *["--confirm", "2", "--num_random", "2", "--max_new_tokens", "2"]]
SAVE = tracing.save_figure
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("coarse_figures")
GROUPS = {
    "effect less that of forbidding other words": "minus_other_",
    "effect on delta_logit": "",
    "effect less that of affirming the same words": "minus_affirm_",
    "growth of the role since --compare": "growth_",
    "details of the effect": "",
    "": "",
}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text of each element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.tables: list[list[list[tuple[str, dict[str, Any]]]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.tags.append((tag, told))
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", {"tag": tag, **told}))
        elif tag in ("data", "span") and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1][1].update(told)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))
        if {"td", "th"} & {*self.open} and "table" in self.open:
            text, told = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = text + data, told

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [told for name, told in self.tags if name == tag]

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def named(self, name: str) -> list[list[tuple[str, dict[str, Any]]]]:
        ids = [told.get("id") for told in self.all("table")]
        return self.tables[ids.index(name)]


def source_of(folder: Path) -> str:
    return (folder / REPORT).read_text(encoding="utf-8")


def page_of(folder: Path) -> Page:
    return Page(source_of(folder))


def facts_of(page: Page) -> dict[str, str]:
    """The run in ten lines."""
    return dict(zip(page.of("dt"), page.of("dd"), strict=True))


def section(source: str, name: str) -> str:
    """What stands below one heading."""
    return source.split(f"<h2>{name}", 1)[1].split("<h2>", 1)[0]


def columns_of(page: Page) -> list[tuple[str, str]]:
    """The group and the heading of each column of the components' table."""
    groups, heads = page.named("heads")[:2]
    wide = [text for text, told in groups for _ in range(int(told.get("colspan", 1)))]
    return list(zip(wide, [text for text, _ in heads], strict=True))


def cells_of(page: Page) -> dict[str, dict[str, tuple[str, dict[str, Any]]]]:
    """By component and column of circuit_heads.csv what the page shows."""
    names = [GROUPS[group] + head for group, head in columns_of(page)]
    names[0] = "label"
    assert len({*names}) == len(names)
    rows = [dict(zip(names, row, strict=True)) for row in page.named("heads")[2:]]
    return {row["label"][0]: row for row in rows}


@pytest.fixture(scope="module")
def main_run(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its figures as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "save_figure", SAVE)
        return finish(tiny_llama, tmp_path_factory.mktemp("main"), *MAIN)


@pytest.fixture(scope="module")
def few(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("few"), *FEW)


@pytest.fixture(scope="module")
def confirmed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(llama, tmp_path_factory.mktemp("confirmed"), *CONFIRMED)


# ----- components


def check_cells(folder: Path) -> None:
    """Each cell is the CSV's, whole where it sorts and rounded where it is read."""
    heads, cells = read(folder, "circuit_heads.csv"), cells_of(page_of(folder))
    assert {*cells} == {*heads["label"]}
    for head in heads.to_dict("records"):
        for name, (text, told) in cells[head["label"]].items():
            value = head[name]
            if pd.isna(value):
                assert (text, told.get("value")) == ("", None), name
            elif "value" in told:
                assert float(told["value"]) == pytest.approx(value, rel=1e-12), name
                shown = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
                assert shown == pytest.approx(value, abs=0.006, rel=0.06), name
            else:
                assert text == str(value), name


def test_every_cell_is_that_of_the_table_of_heads(main_run: Path) -> None:
    check_cells(main_run)
    cells = cells_of(page_of(main_run))
    assert cells["L0H6"]["minus_other_mean"][0] == "+0.649"
    assert cells["L0H6"]["q"][0] == "0.008"
    assert cells["L0H5"]["minus_affirm_verdict"][0] == "works against"


def test_the_quoted_contrast_stands_first_and_orders_the_rows(main_run: Path) -> None:
    page, heads = page_of(main_run), read(main_run, "circuit_heads.csv").set_index("label")
    groups = [group for group, _ in columns_of(page)]
    assert [*dict.fromkeys(groups)] == ["", *[*GROUPS][:3], "details of the effect"]
    strength = heads["minus_other_mean"].abs().sort_values(ascending=False)
    assert [*cells_of(page)] == strength.index.tolist()


def test_without_a_contrast_the_effect_stands_first(few: Path) -> None:
    page = page_of(few)
    assert columns_of(page)[1] == ("effect on delta_logit", "mean")
    strength = read(few, "circuit_heads.csv").set_index("label")["mean"].abs()
    assert [*cells_of(page)] == strength.sort_values(ascending=False).index.tolist()


def test_columns_of_a_comparison_are_there(tiny_llama: str, tmp_path: Path) -> None:
    """Beside a given head, whose cell of the grid is empty."""
    flags = ["--num_samples", "6", "--layers", "0-1"]
    before = finish(tiny_llama, tmp_path / "before", *flags) / "circuit_results.csv"
    flags += ["--given", "L0H2", "--compare", str(before)]
    run = finish(tiny_llama, tmp_path / "run", *flags)
    page = page_of(run)
    assert ("growth of the role since --compare", "q") in columns_of(page)
    check_cells(run)
    assert facts_of(page)["edited"].endswith("; L0H2 zeroed in every run")
    assert [told == "" for told in hovers(page)[-1][:4]] == [False, False, True, False]


def colours(source: str, table: str) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Red, green and blue by row and column, headings not counted."""
    cells = [[told for _, told in row] for row in Page(source).named(table)]
    bodies = [row for row in cells if any(told["tag"] == "td" for told in row)]
    found = {}
    for i, row in enumerate(bodies):
        for j, told in enumerate(told for told in row if told["tag"] == "td"):
            if code := re.fullmatch(
                r"background-color: #(\w{2})(\w{2})(\w{2})", told.get("style", "")
            ):
                red, green, blue = (int(digits, 16) for digits in code.groups())
                found[i, j] = red, green, blue
    return found


def colour_of(role: float, of_all: pd.DataFrame | pd.Series) -> tuple[int, int, int]:
    """Red, green and blue of a role, of which the strongest value has the darkest colour."""
    share = role / np.abs(of_all.to_numpy()).max()
    red, green, blue = (round(255 * part) for part in colormaps["RdBu_r"](0.5 + 0.3 * share)[:3])
    return red, green, blue


def test_red_carries_the_task_at_any_sign(main_run: Path, tiny_llama: str, tmp_path: Path) -> None:
    others = ("--op scale --factor 2", "--task refusal")
    common = ["--num_samples", "6"]
    runs = (finish(tiny_llama, tmp_path / of, *common, *of.split()) for of in others)
    for folder in (main_run, *runs):
        heads, source = read(folder, "circuit_heads.csv"), source_of(folder)
        roles = heads.set_index("label")["role"]
        column = columns_of(Page(source)).index(("effect on delta_logit", "mean"))
        strong = roles[roles.abs() > 0.2 * roles.abs().max()]
        assert len(strong) > 2
        labels, found = [*cells_of(Page(source))], colours(source, "heads")
        for label, role in strong.items():
            red, _, blue = found[labels.index(str(label)), column]
            assert (red > blue) == (role > 0), label


def test_colours_are_light_behind_dark_text(main_run: Path) -> None:
    found = {**colours(source_of(main_run), "heads"), **colours(source_of(main_run), "grid")}
    assert len(found) > 100
    assert min(0.3 * r + 0.6 * g + 0.1 * b for r, g, b in found.values()) > 110


def many(n: int) -> pd.DataFrame:
    """Results of neurons, the stronger the later; every second moves the other way."""
    effects = {f"L1N{i}": steps((-1) ** i * (1 + i) / 503) for i in range(n)}
    return results(effects, [-5.0 - 0.1 * i for i in range(8)])


@pytest.mark.parametrize(("most", "n"), [(20, 20), (tracing.MOST_ROWS, 503)])
def test_of_many_components_the_strongest_are_shown_and_it_says_so(
    most: int, n: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(tracing, "MOST_ROWS", most)
    many(n).to_csv(tmp_path / "t.csv", index=False)
    source = redraw(tmp_path / "t.csv", tmp_path / "new")
    heads = read(tmp_path / "new", "circuit_heads.csv").set_index("label")
    strength = heads["mean"].abs().sort_values(ascending=False)
    assert [*cells_of(Page(source))] == strength.index[:most].tolist()
    cut = f"The {most} strongest of {n}; all are in circuit_heads.csv." in source
    assert cut == (n > most)
    assert len(source) < 2e6
    assert "Roles by layer" not in source  # neurons have no grid


# ----- layers by heads


def hovers(page: Page) -> list[list[str]]:
    return [[told.get("title", "") for _, told in row[1:]] for row in page.named("grid")[1:]]


def test_cells_of_the_grid_show_head_effect_interval_and_q_on_hover(main_run: Path) -> None:
    page, heads = page_of(main_run), read(main_run, "circuit_heads.csv").set_index("label")
    shown = hovers(page)
    assert [text for text, _ in page.named("grid")[0][1:]] == [str(i) for i in range(8)]
    for row, layer in zip(shown, (3, 2, 1, 0), strict=True):  # as in the figure
        for index, told in enumerate(row):
            head = heads.loc[f"L{layer}H{index}"]
            mean, low, high, q = (
                head[f"minus_other_{n}"] for n in tracing.COLUMNS if n[0] in "mcq"
            )
            assert told.startswith("effect less that of forbidding other words, ")
            interval = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            verdict = head["minus_other_verdict"]
            assert told.endswith(f", L{layer}H{index}: {interval}, q {q:.2g}, {verdict}")
    dots = [text == "•" for row in page.named("grid")[1:] for text, _ in row[1:]]
    verdicts = [not told.endswith("unclear") for row in shown for told in row]
    assert dots == verdicts and 0 < sum(dots) < 32


def test_whole_modules_are_one_column(llama: str, tmp_path: Path) -> None:
    folder = finish(llama, tmp_path, "--num_samples", "6", "--kind", "mlp")
    check_cells(folder)
    shown = hovers(page_of(folder))
    assert [re.findall("L.mlp", told) for (told,) in shown] == [["L2mlp"], ["L1mlp"], ["L0mlp"]]


def test_the_grid_is_coloured_by_the_role_that_is_quoted(main_run: Path) -> None:
    heads, found = read(main_run, "circuit_heads.csv"), colours(source_of(main_run), "grid")
    assert len(found) == len(heads) == 32
    quoted, others, differing = heads["minus_other_role"], heads["role"], 0
    for head in heads.itertuples():
        expected = colour_of(head.minus_other_role, quoted)
        assert found[3 - head.layer, head.index] == expected, head.label
        differing += expected != colour_of(head.role, others)
    assert differing > 16
    red, _, blue = found[3, 6]  # L0H6 carries most
    assert red > blue + 100
    red, _, blue = found[3, 5]  # L0H5 works against it
    assert blue > red + 100


def test_without_a_contrast_the_grid_is_coloured_by_role(few: Path) -> None:
    heads, found = read(few, "circuit_heads.csv"), colours(source_of(few), "grid")
    assert len(found) == len(heads) == 8
    for head in heads.itertuples():
        assert found[1 - head.layer, head.index] == colour_of(head.role, heads["role"])


def test_each_mean_is_coloured_by_the_role_in_its_own_measure(main_run: Path) -> None:
    heads = read(main_run, "circuit_heads.csv").set_index("label")
    source = source_of(main_run)
    found, columns = colours(source, "heads"), columns_of(Page(source))
    prefixes = ("minus_other_", "", "minus_affirm_")
    means = heads[[f"{prefix}mean" for prefix in prefixes]]
    for i, label in enumerate(cells_of(Page(source))):
        for title, prefix in GROUPS.items():
            if prefix in prefixes and (title, "mean") in columns:
                expected = colour_of(heads.loc[label, f"{prefix}role"], means)
                assert found[i, columns.index((title, "mean"))] == expected, (label, title)
    assert len(found) == 3 * 32


# ----- the run, what was found, figures, samples


def test_the_run_is_told_from_its_record(main_run: Path) -> None:
    page, record = page_of(main_run), record_of(main_run)
    facts = facts_of(page)
    assert facts["model"] == str(TINY)
    assert facts["samples"] == "16 samples of 16 sentences"
    assert facts["edited"] == "head, zero, positions all"
    assert facts["tested"] == "32 components, which q corrects for"
    assert facts["noise floor"] == f"{record['noise_floor']:.2g} nats"
    assert facts["method"] == "measured, by the exact sweep"
    found = facts["base"].splitlines()
    log = (main_run / "run.log").read_text().splitlines()
    assert [line.split("; noise")[0] for line in log if line.startswith("mean ")] == found
    for name in ("model", "seed", "dtype", "device_type", "torch", "transformers"):
        assert f"{name} {record['fingerprint'][name]}" in facts["run"]
    assert page.of("title") == ["suppression in tiny_llama: removing each head"]


def test_negative_controls_are_no_samples_of_the_base(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--task odd_one_out --num_samples 10 --layers 0 --op patch"
    check_cells(finish(tiny_llama, tmp_path, *flags.split()))
    told = facts_of(page_of(tmp_path))["samples"]
    assert told == "8 samples of 8 sentences, and 2 negative controls"


def log_of(folder: Path) -> list[str]:
    """What the last command's log says from the statistics on."""
    said = (folder / "run.log").read_text().rpartition("----- statistics\n")[2].splitlines()
    return [line for line in said[:-1] if not line.startswith("-----")]


def test_the_findings_are_the_logs(main_run: Path) -> None:
    found = section(source_of(main_run), "Findings")
    assert Page(found).of("p") == log_of(main_run)
    assert Page(found).of("h3") == ["statistics", "joint ablation", "replies"]
    assert "results in" not in found and "warning" not in found


def test_warnings_are_marked(llama: str, tmp_path: Path) -> None:
    page = page_of(finish(llama, tmp_path, *CONFIRMED, "--op", "patch", "--positions", "last"))
    told = "edited replies need an op that applies at every token: none with --op patch --positions"
    (found,) = [text for text in page.of("p") if told in text]
    assert found.startswith("Warning: ")
    assert any("warning" in attrs.get("class", "") for attrs in page.all("p"))


LOUD = '<dd class="warning">ESTIMATED from gradients by atp: no component is measured</dd>'


def test_estimates_are_called_so_loudly(llama: str, tmp_path: Path) -> None:
    source = source_of(finish(llama, tmp_path, *FEW, "--method", "atp"))
    assert LOUD in source and "<h2>Components by atp estimates</h2>" in source
    assert "Warning: all effects here are by atp estimates, none is measured" in source


def test_of_a_screen_it_says_how_many_are_measured(llama: str, tmp_path: Path) -> None:
    flags = ["--kind", "neuron", "--screen", "3"]
    source = source_of(finish(llama, tmp_path, "--num_samples", "4", *flags))
    check_cells(tmp_path)
    n = int(read(tmp_path, "circuit_heads.csv")["n_tests"].iloc[0])
    told = f"35 of {n} estimated components measured by the exact sweep"
    assert facts_of(Page(source))["method"] == told and n > 35
    assert facts_of(Page(source))["tested"] == f"{n} components, which q corrects for"
    assert "estimates</h2>" not in source


def test_a_narrower_table_is_called_measured_and_corrected_for_the_wider_one(
    llama: str, tmp_path: Path
) -> None:
    for layers in ("0-1", "1"):
        finish(llama, tmp_path, "--num_samples", "4", "--layers", layers)
    facts = facts_of(page_of(tmp_path))
    assert facts["tested"] == "8 components, which q corrects for"
    assert facts["method"] == "measured, by the exact sweep"


def images(page: Page) -> list[bytes]:
    sources = [told["src"] for told in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2]) for source in sources]


def test_every_figure_of_the_run_stands_in_the_page(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 4 --layers 0 --heatmap --screen 8 --confirm 2 --num_random 2"
    flags += " --max_new_tokens 2 --multipliers 0,1"
    page = page_of(finish(tiny_llama, tmp_path, *flags.split()))
    there = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(there) == 6 and {*images(page)} == there
    assert all(told["alt"].endswith(".") for told in page.all("img"))
    assert "reply, 2 components x 0" in {text for row in page.tables[-1] for text, _ in row}


def test_every_figure_that_there_is_has_a_caption() -> None:
    drawn = [name for name in tracing.OUTPUTS if name.endswith(".png")]
    assert sorted(drawn) == sorted(f"circuit_{name}.png" for name in tracing.FIGURES)


def test_what_a_command_before_left_is_gone(confirmed: Path, llama: str, tmp_path: Path) -> None:
    folder = shutil.copytree(confirmed, tmp_path / "run")
    before, page = page_of(folder), page_of(finish(llama, folder, *FEW))
    assert (len(images(before)), len(images(page))) == (3, 2)
    shown = [
        {text for table in of.tables for row in table for text, _ in row} for of in (before, page)
    ]
    assert ["reply" in texts for texts in shown] == [True, False]


def test_samples_stand_there_with_prompts_likeliest_tokens_and_replies(main_run: Path) -> None:
    page, records = page_of(main_run), record_of(main_run)["samples"]
    said = generations(main_run)
    most = max(said, key=lambda reply: reply["n_ablated"])["ablated"]
    replies = {(r["sample_id"], r["prompt"], r["ablated"]): r["reply"] for r in said}
    tables = page.tables[2:]
    assert len(tables) == len(records) == len(page.all("details")) == 16
    for record, table in zip(records, tables, strict=True):
        columns = "prompt, score, likeliest first tokens, reply, reply, 8 components edited"
        assert ", ".join(text for text, _ in table[0][1:]) == columns
        assert [row[0][0] for row in table[1:]] == [*record["prompts"]]
        for row in table[1:]:
            side, text, score, likeliest, *edited = [cell for cell, _ in row]
            prompt = record["prompts"][side]
            assert text == prompt["text"]
            assert score == f"{prompt['score']:+.3f}"
            shown = [line.split("% ") for line in likeliest.splitlines()]
            assert [word for _, word in shown] == [repr(token) for token, _ in prompt["likeliest"]]
            for (share, _), (_, p) in zip(shown, prompt["likeliest"], strict=True):
                assert float(share) == pytest.approx(100 * p, abs=0.051)
            at = record["sample_id"], side
            assert edited == [replies.get((*at, of), "") for of in ("", most)]
    assert any(told for told in replies if told[2] == most)


@pytest.mark.parametrize("circuit", ["--confirm 2", "--ablate L0H6,L1H3"])
def test_replies_of_the_circuit_are_not_those_of_a_random_set_of_its_size(
    circuit: str, tiny_llama: str, tmp_path: Path
) -> None:
    flags = f"--num_samples 8 {circuit} --num_random 2 --max_new_tokens 3 --multipliers=-2,-8"
    folder = finish(tiny_llama, tmp_path, *flags.split())
    steered = read(folder, "circuit_steer.csv").drop_duplicates("set").set_index("set")
    names, random_names = (steered.loc[name, "components"] for name in ("circuit", "random"))
    assert len(names.split()) == len(random_names.split()) == 2
    keys = ("sample_id", "prompt", "ablated", "multiplier")
    replies = {tuple(r[key] for key in keys): r["reply"] for r in generations(folder)}
    page, differing = page_of(folder), 0
    titles: dict[str, float | None]
    titles = {"reply, 2 components x -2": -2.0, "reply, 2 components x -8": -8.0}
    if "--confirm" in circuit:
        titles["reply, 2 components edited"] = None
    for record, table in zip(record_of(folder)["samples"], page.tables[2:], strict=True):
        columns = [text for text, _ in table[0]]
        assert columns[4] == "reply" and {*titles} <= {*columns[5:]}
        for row in table[1:]:
            side, sample = row[0][0], record["sample_id"]
            assert row[4][0] == replies[sample, side, "", None]
            for title, factor in titles.items():
                shown = row[columns.index(title)][0]
                assert shown == replies.get((sample, side, names, factor), "")
                differing += shown != replies.get((sample, side, random_names, factor), shown)
    assert differing > 2


def test_flags_of_a_sample_show(few: Path) -> None:
    flags = [flag for sample in record_of(few)["samples"] for flag in sample["flags"]]
    shown = [text for text in page_of(few).of("span") if "•" not in text and text.strip()]
    assert flags and shown == flags


# ----- nothing in it acts

HOSTILE = "<script>alert(1)</script>"
EVIL = [
    {
        "sample_id": HOSTILE,
        "prompt_a": "Say </script></td></table><b>\"a\"</b> & 'b' $x$ {c} \x07 \u202e now.",
        "prompt_b": "Name a fruit. <!-- <img src=x onerror=alert(2)>",
        "targets": ["apple"],
        "unit": "</details>&amp;",
        "group": "<h2>Figures",
    },
    {"sample_id": "two", "prompt_a": "Not pear.", "prompt_b": "A fruit.", "targets": ["pear"]},
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    model = folder / '<i>"m"&amp;'
    shutil.copytree(TINY, model)
    samples = write_samples(folder / "evil.jsonl", *EVIL)
    flags = ["--samples", samples, "--layers", "0", "--max_new_tokens", "3"]
    flags += ["--system_prompt", "<style>*{}</style>"]
    return finish(str(model), folder / "run", *flags)


def test_texts_of_users_show_as_they_are_and_do_nothing(hostile: Path) -> None:
    source = source_of(hostile)
    page = Page(source)
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"i", "b", "iframe", "object", "embed", "link", "base", "form", "a"}
    assert len(page.all("script")) == len(page.all("img")) - 1 == 1
    assert len(page.all("details")) == 2
    assert not [name for _, told in page.tags for name in told if name.startswith("on")]
    headings = ["The run", "Findings", "Components", "Roles by layer", "Figures", "Samples"]
    assert page.of("h2") == headings
    assert any(text.startswith(f"{HOSTILE}: P(target)") for text in page.of("summary"))
    assert facts_of(page)["model"].endswith('<i>"m"&amp;')
    prompts = [row[1][0] for row in page.tables[2][1:]]
    shown = EVIL[0]["prompt_a"].replace("\x07", r"\x07").replace("\u202e", r"\u202e")
    assert shown in prompts[0] and "<style>*{}</style>" in prompts[0]
    assert EVIL[0]["prompt_b"] in prompts[1]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", source)


def test_tokens_and_replies_are_escaped_too() -> None:
    prompt = {"text": "a", "score": 0.0, "likeliest": [["</td>\n'<b>\x00", 0.5]]}
    record = {"sample_id": "s", "prompts": {"a": prompt}, "targets": ["<u>"], "foils": ["&lt;"]}
    record |= {"p_target": 0.1, "delta_logit_base": 1.0, "flags": ["<em>"]}
    page = Page(tracing.render_sample(record, {"reply": {("s", "a"): "<img src=x>\x1b\u2028"}}))
    kinds = ["details", "summary", "span", "p", "div", "table", "thead", "tbody", "tr", "th", "td"]
    assert {tag for tag, _ in page.tags} == {*kinds}
    assert page.tables[0][1][3][0] == '50.0% "</td>\\n\'<b>\\x00"'
    assert page.tables[0][1][4][0] == r"<img src=x>\x1b\u2028"
    assert page.of("p") == ["targets: <u>; foils: &lt;"]


def harmless(source: str) -> Page:
    """A page that holds no element but those that the script makes, and nothing that acts."""
    page = Page(source)
    made = "html meta title style h1 h2 h3 p dl dt dd div table thead tbody tr th td data span "
    made += "figure img figcaption details summary script"
    assert {tag for tag, _ in page.tags} <= {*made.split()}
    assert len(page.all("meta")) == 3 and len(page.all("script")) == len(page.all("style")) == 1
    names = {name for _, told in page.tags for name in told}
    known = "lang charset name content http-equiv class id colspan style title value alt width src"
    assert names <= {*known.split()}
    return page


EVIL_TEXT = "<meta http-equiv=refresh content='0'><b onclick=\"x\">\x1b[2J\u202e"
ESCAPED = (
    "&lt;meta http-equiv=refresh content=&#x27;0&#x27;&gt;&lt;b onclick=&quot;x&quot;&gt;"
    "\\x1b[2J\\u202e"
)


@pytest.mark.parametrize("tag", ["p", "td", "th", "span", "summary"])
def test_an_element_escapes_its_content_and_its_attributes(tag: str) -> None:
    made = tracing.element(tag, EVIL_TEXT, title=EVIL_TEXT, class_="a", width=None)
    assert made == f'<{tag} title="{ESCAPED}" class="a">{ESCAPED}</{tag}>'
    assert tracing.element("div", made, EVIL_TEXT) == f"<div>{made}{ESCAPED}</div>"
    assert tracing.element("p", f"{made}").count("<") == 2, "HTML within a text is a text"


def test_cells_rows_headings_and_pages_escape_what_they_are_given() -> None:
    assert tracing.cell(EVIL_TEXT) == f"<td>{ESCAPED}</td>"
    assert tracing.heading(EVIL_TEXT, title=EVIL_TEXT).count(ESCAPED) == 2
    assert tracing.rounded(EVIL_TEXT, "") == ESCAPED
    titles: Any = [[EVIL_TEXT, tracing.heading(EVIL_TEXT)]]
    table = tracing.html_table(titles, [[EVIL_TEXT], [tracing.cell(EVIL_TEXT)]], id=EVIL_TEXT)
    page = tracing.page(EVIL_TEXT, [EVIL_TEXT, table])
    assert table.count(ESCAPED) == 5 and page.count(ESCAPED) == 8
    assert "<meta http-equiv=r" not in page and "<b" not in page.split("<body")[0].split("<h1>")[1]


def test_only_the_page_section_writes_tags() -> None:
    """So that no cell is put together from texts anywhere else."""
    source = SCRIPT.read_text()
    report = source.partition("\n# ----- Report -")[2].partition("\n")[2]
    texts = [node.value for node in ast.walk(ast.parse(report)) if isinstance(node, ast.Constant)]
    assert len(texts) > 100
    assert not [text for text in texts if re.search("</?[a-z]", str(text))]
    outside = source.partition("\n# ----- Page -")[0] + report
    assert re.findall(r"\bHtml\((.{10})", outside) == ['"&nbsp;") ', 'f"data:ima']


# ----- records that another wrote

ODD_VALUES: list[Any] = [
    EVIL_TEXT,
    {},
    {"<b>": 1},
    [],
    ["<b>"],
    [["<b>", 1]],
    [["<b>"]],
    None,
    True,
]
ODD_VALUES += [-1, 0.5, 10**400, math.nan, -math.inf, "\ud800"]


def odd_records(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record without one of its fields, and with any other value in place of one."""
    for name in record:
        yield {key: value for key, value in record.items() if key != name}
        for value in ODD_VALUES:
            yield record | {name: value}


def redrawn_with(folder: Path, answer: Answer) -> tuple[Page, list[str]]:
    """The page of a run, redrawn in place, in which nothing acts; the lines that the log told."""
    table = str(folder / "circuit_results.csv")
    code, out, err = answer("--from_csv", table, "--output_dir", str(folder))
    assert (code, err) == (0, "")
    return harmless(source_of(folder)), out.splitlines()


def replies_shown(page: Page) -> list[list[str]]:
    tables = page.tables[2:]
    return [[text for text, _ in row[4:]] for table in tables for row in table]


LEFT_OUT: dict[str, tuple[Any, str]] = {
    "markup": ({"n_ablated": EVIL_TEXT}, "field 'n_ablated' is '<meta http-equiv=refresh"),
    "a list": ({"n_ablated": [1]}, "field 'n_ablated' is [1], not a whole number from 0 on"),
    "negative": ({"n_ablated": -1}, "field 'n_ablated' is -1, not a whole number from 0 on"),
    "a truth": ({"n_ablated": True}, "field 'n_ablated' is True, not a whole number from 0 on"),
    "missing": ({"n_ablated": ...}, "field 'n_ablated' is missing"),
    "unhashable": ({"sample_id": ["s"]}, "field 'sample_id' is ['s'], not a text"),
    "a number": ({"reply": 7}, "field 'reply' is 7, not a text"),
    "null": ({"prompt": None}, "field 'prompt' is None, not a text"),
    "infinite": ({"multiplier": math.inf}, "field 'multiplier' is inf, not a number or null"),
    "too large": ({"multiplier": 10**400}, "not a number or null"),
    "long": ({"ablated": ["x" * 10_000]}, "xx, not a text"),
    "no object": ("[1, 2]", "[1, 2] is no JSON object"),
    "no JSON": ("{'n_ablated': 3", "is no JSON object"),
    "doubled": ('{"reply": "a", "reply": "b"}', "is no JSON object"),
    "no UTF-8": (b'{"reply": "\xff"}', "is no JSON object"),
    "too deep": ("[" * 100_000, "[[' is no JSON object"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_reply_of_another_is_left_out_in_one_sentence_and_the_others_stay(
    name: str, confirmed: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(confirmed, tmp_path / "run")
    content, says = LEFT_OUT[name]
    file = folder / "generations.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if isinstance(content, dict):
        changed = json.loads(lines[-1]) | content
        content = json.dumps({key: value for key, value in changed.items() if value is not ...})
    if isinstance(content, str):
        content = content.encode()
    file.write_bytes(b"".join([*lines[:3], content + b"\n", *lines[3:]]))
    page, out = redrawn_with(folder, answer)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{file}, line 4: ") and says in sentence
    assert sentence.endswith("; this record is left out of the page") and len(sentence) < 400
    assert f"Warning: {sentence}" in page.of("p")
    assert replies_shown(page) == replies_shown(page_of(confirmed))


def test_whatever_a_field_of_a_reply_holds_the_page_is_drawn_and_does_nothing(
    confirmed: Path, tmp_path: Path, answer: Answer
) -> None:
    """Each field lacking, and with every odd value, all in one file."""
    folder = shutil.copytree(confirmed, tmp_path / "run")
    replies = generations(folder)
    odd = [*odd_records(replies[0]), *odd_records(replies[-1])]
    write_samples(folder / "generations.jsonl", *replies, *odd)
    page, out = redrawn_with(folder, answer)
    (sentence,) = [line for line in out if "left out" in line]
    n_left_out = int(re.findall(r"; (\d+) such records are left out", sentence)[0])
    assert 0 < n_left_out < len(odd)
    assert sentence.startswith(f"{folder / 'generations.jsonl'}, line {len(replies) + 1}: ")
    titles = {text for table in page.tables[2:] for text, _ in table[0][4:]}
    assert {"reply", "reply, 2 components edited"} <= titles


def test_without_a_single_reply_there_is_no_column_of_them(
    confirmed: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(confirmed, tmp_path / "run")
    for content in ("", "\n\n", "null\n"):
        (folder / "generations.jsonl").write_text(content)
        page, out = redrawn_with(folder, answer)
        assert [len(row) for table in page.tables[2:] for row in table] == [4] * 12
        assert any("left out" in line for line in out) == (content == "null\n")
    (folder / "generations.jsonl").unlink()
    (folder / "generations.jsonl").mkdir()
    redrawn_with(folder, answer)


OF_SAMPLES = {
    "prompts_id": "field 'prompts_id' is missing",
    "score": "prompt 'a': field 'score' is '<b>', not a number",
    "likeliest": "prompt 'a': field 'likeliest' is [['x']], not a list of tokens with their",
    "targets": "field 'targets' is None, not a list of texts",
    "group": "field 'group' is {'a': 1}, not a text",
    "prompts": "field 'prompts' is [], not an object",
    "itself": "'<b>' is no JSON object",
}


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_a_sample_of_another_is_left_out_in_one_sentence_and_the_others_stay(
    name: str, few: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    record = record_of(folder)
    sample = record["samples"][1]
    if name == "prompts_id":
        del sample[name]
    elif name in ("score", "likeliest"):
        sample["prompts"]["a"][name] = {"score": "<b>", "likeliest": [["x"]]}[name]
    elif name == "itself":
        record["samples"][1] = "<b>"
    else:
        sample[name] = {"targets": None, "group": {"a": 1}, "prompts": []}[name]
    (folder / "run.json").write_text(json.dumps(record))
    page, out = redrawn_with(folder, answer)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{folder / 'run.json'}, sample 2: {OF_SAMPLES[name]}")
    assert f"Warning: {sentence}" in page.of("p")
    assert [text[:5] for text in page.of("summary")] == ["s0000", "s0002", "s0003"]


def test_whatever_a_field_of_a_sample_holds_the_page_is_drawn_and_does_nothing(
    few: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    record = record_of(folder)
    sample = record["samples"][0]
    odd: list[Any] = [*ODD_VALUES, *odd_records(sample)]
    for prompt in odd_records(sample["prompts"]["a"]):
        odd.append(sample | {"prompts": {EVIL_TEXT: prompt, "b": sample["prompts"]["b"]}})
    record["samples"] += odd
    (folder / "run.json").write_text(json.dumps(record))
    page, out = redrawn_with(folder, answer)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{folder / 'run.json'}, sample 5: ")
    assert 4 < len(page.all("details")) < 4 + len(odd)
    assert any(text.startswith("<meta http-equiv=refresh") for text in page.of("summary"))


def test_facts_of_another_are_left_out_in_a_sentence_each(
    few: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    before, record = facts_of(page_of(few)), record_of(folder)
    record["n_set_apart"] = [EVIL_TEXT]
    record["fingerprint"] |= {"given": {"<b>": 1}, "dtype": EVIL_TEXT, "seed": "<b>", "torch": 3}
    (folder / "run.json").write_text(json.dumps(record))
    page, out = redrawn_with(folder, answer)
    sentences = [line for line in out if "left out" in line]
    named = [re.findall("field '(.*?)' is", sentence)[0] for sentence in sentences]
    assert named == ["n_set_apart", "given", "seed", "torch"]
    assert all(sentence.startswith(f"{folder / 'run.json'}") for sentence in sentences)
    assert {f"Warning: {sentence}" for sentence in sentences} <= {*page.of("p")}
    facts = facts_of(page)
    assert facts.pop("run").startswith(f"model {record['fingerprint']['model']}, dtype <meta")
    del before["run"]
    assert facts == before


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("top_k", "<b>", "not a whole number from 1 on"),
        ("top_k", 0, "not a whole number from 1 on"),
        ("model_id", {"<b>": 1}, "not a text"),
        ("task", ["<b>", "x"], "not one of suppression, refusal"),
        ("factor", [], "not a number or null"),
        ("noise_floor", 10**400, "not a number from 0 on or null"),
        ("noise_floor", True, "not a number from 0 on or null"),
        ("noise_floor", -1.5, "not a number from 0 on or null"),
    ],
)
def test_what_redrawing_heeds_of_a_record_is_refused_where_it_is_of_no_use(
    name: str, value: Any, says: str, few: Path, tmp_path: Path, answer: Answer
) -> None:
    """With a table of the seven columns, which tells nothing of the run itself."""
    table, record = read(few), record_of(few)
    table[tracing.SEVEN].to_csv(tmp_path / "t.csv", index=False)
    if name == "noise_floor":
        record[name] = value
    else:
        record["config"][name] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    argv = ["--from_csv", str(tmp_path / "t.csv"), "--output_dir", str(tmp_path / "new")]
    refuses(answer, *argv, says=[str(tmp_path / "run.json"), f"field {name!r} is ", says])


def test_odd_line_ends_stay_in_a_reply(llama: str, tmp_path: Path, monkeypatch: Patch) -> None:
    reply = "one\u2028two\x85three\nfour\r"
    monkeypatch.setattr(tracing, "greedy_replies", lambda _, __, prompts: [reply] * len(prompts))
    flags = ["--ablate", "L0H1", "--multipliers", "0,1"]
    page = page_of(finish(llama, tmp_path, *FEW, *flags, "--max_new_tokens", "2"))
    titles = [text for text, _ in page.tables[2][0][4:]]
    edits = ["edited", "x 0", "x 1"]
    assert titles == ["reply", *(f"reply, 1 component {edit}" for edit in edits)]
    shown = {text for table in page.tables[2:] for row in table[1:] for text, _ in row[4:]}
    assert shown == {"one\\u2028two\\x85three\nfour\\r"}
    assert {row["reply"] for _, row in tracing.read_rows(tmp_path / "generations.jsonl")} == {reply}


@pytest.mark.parametrize("name", ["main_run", "hostile"])
def test_the_page_asks_the_network_for_nothing(name: str, request: Any) -> None:
    source = source_of(request.getfixturevalue(name))
    page = Page(source)
    asking = ("src", "href", "srcset", "action", "poster", "background", "xlink:href")
    sources = [told[of] for _, told in page.tags for of in asking if of in told]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    styles = "".join(re.findall("<style.*?</style>", source, re.DOTALL))
    assert not re.search(r"url\(|@import|//", styles)
    (script,) = re.findall("<script>(.*?)</script>", source, re.DOTALL)
    assert not re.search(r"fetch|XMLHttp|import|WebSocket|//|innerHTML|eval", script)
    (policy,) = [told["content"] for told in page.all("meta") if "http-equiv" in told]
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    alone = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    assert policy == f"{alone} 'sha256-{known}'"


def test_the_script_is_a_few_dozen_lines_and_the_page_small(main_run: Path) -> None:
    assert tracing.PAGE_SCRIPT.count("\n") < 36
    assert (main_run / REPORT).stat().st_size < 1_000_000


# ----- when it is written


@pytest.mark.parametrize("lacking", ["", "replies", "sweep"])  # of these the last loads the model
def test_the_same_data_give_the_same_page_whatever_is_computed_anew(
    lacking: str, confirmed: Path, llama: str, tmp_path: Path
) -> None:
    """In another folder; and where parts of a run are mended, or all are there."""
    whole = source_of(confirmed)
    assert str(confirmed) not in whole.replace(llama, "")
    if not lacking:
        assert source_of(finish(llama, tmp_path, *CONFIRMED)) == whole
        assert source_of(finish(llama, tmp_path, *CONFIRMED)) == whole
        return
    folder = shutil.copytree(confirmed, tmp_path / "run")
    for path in (folder / ".parts").glob("joint-*.json"):
        path.write_text("spoilt")
    for path in (folder / ".parts").glob(f"{lacking}-*.json"):
        path.unlink()
    finish(llama, folder, *CONFIRMED)
    assert "is not a part of this run" in (folder / "run.log").read_text()
    assert source_of(folder) == whole


def test_a_batch_that_is_halved_changes_nothing_in_the_page(
    confirmed: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    said, calls = tracing.greedy_replies, itertools.count()

    def fails_once(*arguments: Any) -> list[str]:
        if not next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return said(*arguments)

    monkeypatch.setattr(tracing, "greedy_replies", fails_once)
    halved = finish(llama, tmp_path, *CONFIRMED)
    assert "out of memory: continuing with" in (halved / "run.log").read_text()
    assert source_of(halved) == source_of(confirmed)


def test_no_page_of_an_earlier_command_outlives_a_failure(
    few: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    folder, n_handlers = shutil.copytree(few, tmp_path / "run"), len(tracing.log.handlers)
    monkeypatch.setattr(tracing, "confirm", lambda *_: 1 / 0)
    argv = ["--model_id", llama, "--output_dir", str(folder), *FEW, "--confirm", "2"]
    assert tracing.main(argv) == 1
    assert not (folder / REPORT).exists()
    assert len(tracing.log.handlers) == n_handlers


@pytest.mark.parametrize("flag", ["--dry_run", "--self_test"])
def test_checks_write_none(flag: str, llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, *FEW, flag)
    assert not (tmp_path / REPORT).exists()


def redraw(source: Path, folder: Path, *flags: str) -> str:
    argv = ["--from_csv", str(source), "--output_dir", str(folder), *flags]
    assert tracing.main(argv) == 0
    return source_of(folder)


def test_redrawing_tells_what_table_and_record_tell(main_run: Path, tmp_path: Path) -> None:
    source = redraw(main_run / "circuit_results.csv", tmp_path)
    check_cells(tmp_path)
    page, of_run = Page(source), page_of(main_run)
    assert facts_of(page) == facts_of(of_run)
    assert hovers(page) == hovers(of_run)
    assert {*images(page)} == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(page.all("details")) == 16
    assert "reply" not in {text for row in page.tables[2] for text, _ in row}
    told = Page(section(source, "Findings")).of("p")
    assert told and told == log_of(main_run)[: len(told)]
    assert "redrawn" not in section(source, "Findings")


def test_a_table_alone_names_no_model_and_no_samples(few: Path, tmp_path: Path) -> None:
    shutil.copy(few / "circuit_results.csv", tmp_path / "t.csv")
    (tmp_path / "new").mkdir()
    for name in ("circuit_confirm.png", "circuit_heatmap.png", "generations.jsonl"):
        (tmp_path / "new" / name).write_bytes(b"of another")  # a folder that is not a run's
    page = Page(redraw(tmp_path / "t.csv", tmp_path / "new"))
    facts = facts_of(page)
    assert not {"model", "run"} & {*facts}
    assert facts["noise floor"] == "none known"
    assert page.of("title") == ["suppression: removing each head"]
    assert not page.all("details") and len(images(page)) == 2
    named = Page(redraw(tmp_path / "t.csv", tmp_path / "new", "--model_id", "mine", "--heatmap"))
    assert facts_of(named)["model"] == "mine"
    assert len(images(named)) == 3


def test_redrawing_in_place_keeps_figures_and_replies(confirmed: Path, tmp_path: Path) -> None:
    folder, before = shutil.copytree(confirmed, tmp_path / "run"), page_of(confirmed)
    page = Page(redraw(folder / "circuit_results.csv", folder))
    assert len(images(page)) == 3
    assert [table[0] for table in page.tables] == [table[0] for table in before.tables]
    said = "what later stages found is in run.log"
    assert said in source_of(folder) and said not in source_of(confirmed)


def test_samples_that_the_table_does_not_have_are_left_out(few: Path, tmp_path: Path) -> None:
    table = read(few)
    (tmp_path / "run").mkdir()
    some = table[table["sample_id"].isin(["s0001", "s0003"])]
    some.to_csv(tmp_path / "run" / "t.csv", index=False)
    shutil.copy(few / "run.json", tmp_path / "run" / "run.json")
    page = Page(redraw(tmp_path / "run" / "t.csv", tmp_path / "new"))
    assert [text[:5] for text in page.of("summary")] == ["s0001", "s0003"]


# ----- in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
TEST = """
const said = {}, table = document.querySelector("#heads"), body = table.tBodies[0];
const heads = [...table.tHead.rows[1].cells];
const column = i => [...body.rows].map(row => row.cells[i].textContent);
said.first = column(0)[0];
said.cell = body.rows[0].cells[1].textContent;
said.shown = getComputedStyle(document.querySelector(".grid span")).display;
for (const [name, i, clicks] of [["up", 1, 1], ["down", 1, 1], ["labels", 0, 1], ["verdicts", 5, 1],
    ["median", heads.length - 6, 1]]) {
  const button = heads[i].querySelector("button");
  button.focus();
  said[name + "_focus"] = document.activeElement === button;
  button.click();
  said[name] = column(0);
  said[name + "_aria"] = heads.map(head => head.getAttribute("aria-sort"));
  said[name + "_values"] = column(i);
}
said.images = [...document.images].map(image => image.naturalWidth);
said.too_wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const out = document.createElement("pre");
out.id = "said";
out.textContent = JSON.stringify(said);
document.body.append(out);
"""


def browse(source: str, folder: Path, width: int, allow: str = "") -> tuple[str, list[str]]:
    """The page as it stands after its scripts have run, and what the console said."""
    known = base64.b64encode(hashlib.sha256(allow.encode()).digest()).decode()
    (folder / "page.html").write_text(
        source.replace("script-src ", f"script-src 'sha256-{known}' "), encoding="utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--window-size={width},900"]
    command += [f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 500])
def test_it_opens_in_a_browser_and_sorts(width: int, main_run: Path, tmp_path: Path) -> None:
    source = source_of(main_run).replace("</html>", f"<script>{TEST}</script></html>")
    dom, console = browse(source, tmp_path, width, allow=TEST)
    assert console == []
    said = json.loads(html.unescape(re.findall('<pre id="said">(.*?)</pre>', dom)[0]))
    heads = read(main_run, "circuit_heads.csv").set_index("label")
    assert (said["first"], said["cell"]) == ("L0H6", "+0.649")
    assert said["shown"] == "block"
    order = heads["minus_other_mean"].sort_values().index.tolist()
    assert said["up"] == order and said["down"] == order[::-1]
    assert said["labels"] == heads.index.tolist()
    assert said["verdicts_values"] == sorted(heads["minus_other_verdict"])
    assert said["median"] == heads["median"].sort_values().index.tolist()
    aria = {"up": (1, "ascending"), "down": (1, "descending"), "labels": (0, "ascending")}
    for name, (column, way) in aria.items():
        found = said[f"{name}_aria"]
        assert found[column] == way and found.count(None) == len(found) - 1
        assert said[f"{name}_focus"]
    assert len(said["images"]) == 3 and all(said["images"])
    assert said["too_wide"] == 0


@needs_chromium
def test_a_script_that_is_not_the_pages_does_not_run(main_run: Path, tmp_path: Path) -> None:
    other = '<script>document.title = "other"</script>'
    dom, console = browse(source_of(main_run).replace("</html>", f"{other}</html>"), tmp_path, 900)
    assert "<title>other</title>" not in dom and "<title>suppression in tiny_llama" in dom
    assert any("Content Security Policy" in line for line in console)


@needs_chromium
def test_hostile_texts_do_nothing_in_a_browser(hostile: Path, tmp_path: Path) -> None:
    dom, console = browse(source_of(hostile), tmp_path, 900)
    assert console == []
    assert "alert(1)" in dom and dom.count("<script") == 1


def test_what_is_missing_is_an_empty_cell(llama: str, tmp_path: Path) -> None:
    folder = finish(llama, tmp_path, "--num_samples", "1", "--layers", "0")
    rows = cells_of(page_of(folder)).values()
    missing = {name for row in rows for name, (text, _) in row.items() if not text}
    assert {"ci_low", "ci_high"} <= missing
    assert not re.search(r"\bnan\b", source_of(folder).split("<h2>Figures")[0])
    check_cells(folder)

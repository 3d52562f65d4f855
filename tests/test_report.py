"""The page of a run folder: what it shows is what the files say, and nothing in it acts."""

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
    finish,
    generations,
    read,
    record_of,
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
    """What all commands of the folder share."""
    return dict(zip(page.of("dt"), page.of("dd"), strict=True))


def section(source: str, name: str) -> str:
    """What stands below one heading."""
    return re.split(f'<h2 id="[a-z0-9]+">{name}<', source)[1].split("<h2 ", 1)[0]


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
    folders = [main_run]
    for flags in ("--op scale --factor 2", "--task refusal"):
        words = ["--num_samples", "6", *flags.split()]
        folders.append(finish(tiny_llama, tmp_path / flags, *words))
    for folder in folders:
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
    found = colours(source_of(main_run), "heads")
    assert len(found) == 96
    assert min(0.3 * r + 0.6 * g + 0.1 * b for r, g, b in found.values()) > 110


def many(n: int) -> pd.DataFrame:
    """Results of neurons, the stronger the later; every second moves the other way."""
    effects = {f"L1N{i}": steps((-1) ** i * (1 + i) / 503) for i in range(n)}
    return results(effects, [-5.0 - 0.1 * i for i in range(8)])


@pytest.mark.parametrize(("most", "n"), [(20, 20), (tracing.MAX_TABLE_ROWS, 503)])
def test_of_many_components_the_strongest_are_shown_and_it_says_so(
    most: int, n: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(tracing, "MAX_TABLE_ROWS", most)
    many(n).to_csv(tmp_path / "t.csv", index=False)
    source = redraw(tmp_path / "t.csv", tmp_path / "new")
    heads = read(tmp_path / "new", "circuit_heads.csv").set_index("label")
    strength = heads["mean"].abs().sort_values(ascending=False)
    assert [*cells_of(Page(source))] == strength.index[:most].tolist()
    cut = f"The {most} strongest of {n}; all are in circuit_heads.csv." in source
    assert cut == (n > most)
    assert len(source) < 2e6


def test_whole_modules_have_a_table_too(llama: str, tmp_path: Path) -> None:
    check_cells(finish(llama, tmp_path, "--num_samples", "6", "--kind", "mlp"))


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


def test_the_experiment_is_that_of_the_record(main_run: Path) -> None:
    page, record = page_of(main_run), record_of(main_run)
    facts = facts_of(page)
    assert facts["model_id"] == str(TINY)
    assert (facts["task"], facts["num_samples"], facts["controls"]) == ("suppression", "16", "True")
    assert facts["noise floor"] == f"{record['noise_floor']:.2g} nats"
    for name in ("model", "dtype", "device_type", "torch", "transformers"):
        assert facts[name] == record["experiment"]["fingerprint"][name]
    assert page.of("title") == ["suppression in tiny_llama"]


def findings_of(folder: Path, command: str) -> list[str]:
    """The sentences of a command in run.json, as the page shows them."""
    texts = []
    for finding in record_of(folder)["commands"][command]["findings"]:
        if finding["level"] != "heading":
            warning = "Warning: " if finding["level"] == "warning" else ""
            texts.append(warning + finding["text"])
    return texts


def test_a_command_has_its_question_edit_and_findings(main_run: Path) -> None:
    page = Page(section(source_of(main_run), "trace"))
    question, edit, *findings = page.of("p")
    assert question == "Which components carry the behaviour?"
    options = "confirm 8, max_new_tokens 8"
    assert edit == f"kind head, op zero, positions all, {options}"
    expected = findings_of(main_run, "trace")
    assert findings[: len(expected)] == expected and len(expected) > 10
    log = (main_run / "run.log").read_text().splitlines()
    assert {text.removeprefix("Warning: ") for text in expected} <= {*log}
    assert page.of("h3") == ["statistics", "joint ablation", "replies"]


def test_every_command_of_a_folder_has_a_section_and_a_link(llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, "graph", "--num_samples", "4", "--nodes", "20")
    finish(llama, tmp_path, *FEW)
    finish(llama, tmp_path, "joint", "L0H1", *["--num_random", "2", "--op", "scale"], "--factor=2")
    page, source = page_of(tmp_path), source_of(tmp_path)
    headings = ["Experiment", "graph", "trace", "joint", "Samples"]
    assert page.of("h2") == page.of("a") == headings
    links = [link["href"] for link in page.all("a")]
    assert links == [f"#{heading['id']}" for heading in page.all("h2")]
    for command in ("graph", "trace", "joint"):
        shown = Page(section(source, command))
        expected = findings_of(tmp_path, command)
        assert expected and shown.of("p")[2 : 2 + len(expected)] == expected
        assert len(images(shown)) == len(images_of(tmp_path, command)) > 0
    assert Page(section(source, "graph")).of("p")[1] == "nodes 20"
    edit = Page(section(source, "joint")).of("p")[1]
    assert edit.startswith("kind head, op scale, factor 2.0, positions all, names L0H1")


def images_of(folder: Path, command: str) -> list[str]:
    files = record_of(folder)["commands"][command]["files"]
    return [name for name in files if name.endswith(".png")]


def test_a_command_that_failed_is_called_unfinished(
    few: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "measure_sets", lambda *_: 1 / 0)
        assert tracing.main(["joint", "L0H1", "--output_dir", str(folder)]) == 1
    finish(llama, folder, *FEW)
    unfinished = "Warning: this command has not ended; run it again"
    assert Page(section(source_of(folder), "joint")).of("p")[-1] == unfinished
    assert unfinished not in Page(section(source_of(folder), "trace")).of("p")


def test_warnings_are_marked_and_estimates_are_called_so(llama: str, tmp_path: Path) -> None:
    page = page_of(finish(llama, tmp_path, *FEW, "--method", "atp"))
    assert "Warning: all effects here are by atp estimates, none is measured" in page.of("p")
    assert any("warning" in attrs.get("class", "") for attrs in page.all("p"))
    check_cells(tmp_path)


def test_a_narrower_table_is_corrected_for_the_wider_one(llama: str, tmp_path: Path) -> None:
    for layers in ("0-1", "1"):
        finish(llama, tmp_path, "--num_samples", "4", "--layers", layers)
    text = "q corrects for 8 components: this folder has tested them before"
    assert text in page_of(tmp_path).of("p")


def images(page: Page) -> list[bytes]:
    sources = [told["src"] for told in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2]) for source in sources]


def test_every_figure_of_the_run_stands_in_the_page(tiny_llama: str, tmp_path: Path) -> None:
    flags = "--num_samples 4 --layers 0 --heatmap --screen 8 --confirm 2 --num_random 2"
    flags += " --max_new_tokens 2"
    finish(tiny_llama, tmp_path, *flags.split())
    joint = "joint L0H1,L0H2 --num_random 2 --max_new_tokens 2 --multipliers 0,1"
    page = page_of(finish(tiny_llama, tmp_path, *joint.split()))
    figures = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(figures) == 8 and {*images(page)} == figures
    assert all(told["alt"].endswith(".") for told in page.all("img"))
    titles = {text for text, _ in page.tables[-1][0]}
    assert {"trace: 2 components edited", "joint: 2 components x 0", "joint: unedited"} <= titles


def test_every_figure_has_a_caption() -> None:
    for files in tracing.COMMAND_FILES.values():
        for name, caption in files.items():
            assert name.endswith(".png") == bool(caption), name


def test_what_a_command_before_left_is_gone(confirmed: Path, llama: str, tmp_path: Path) -> None:
    folder = shutil.copytree(confirmed, tmp_path / "run")
    before, page = page_of(folder), page_of(finish(llama, folder, *FEW))
    assert (len(images(before)), len(images(page))) == (4, 2)  # with rates, and the circuit
    assert [len(shown.tables[-1][0]) for shown in (before, page)] == [6, 4]


def test_samples_stand_there_with_prompts_likeliest_tokens_and_replies(main_run: Path) -> None:
    page, records = page_of(main_run), record_of(main_run)["samples"]
    said = generations(main_run)
    most = max(said, key=lambda reply: reply["n_ablated"])["ablated"]
    replies = {(r["sample_id"], r["prompt"], r["ablated"]): r["reply"] for r in said}
    tables = page.tables[1:]
    assert len(tables) == len(records) == len(page.all("details")) == 16
    for record, table in zip(records, tables, strict=True):
        columns = "prompt, score, likeliest first tokens, trace: unedited, "
        columns += "trace: 8 components edited"
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


def test_replies_of_the_circuit_are_not_those_of_a_random_set_of_its_size(
    tiny_llama: str, tmp_path: Path
) -> None:
    flags = "joint L0H6,L1H3 --num_samples 8 --num_random 2 --max_new_tokens 3"
    folder = finish(tiny_llama, tmp_path, *flags.split(), "--multipliers=-2,-8")
    steered = read(folder, "circuit_steer.csv").drop_duplicates("set").set_index("set")
    names, random_names = (steered.loc[name, "components"] for name in ("circuit", "random"))
    assert len(names.split()) == len(random_names.split()) == 2
    lines = (folder / "joint_generations.jsonl").read_text().splitlines()
    keys = ("sample_id", "prompt", "ablated", "multiplier")
    replies = {}
    for record in map(json.loads, lines):
        replies[tuple(record[key] for key in keys)] = record["reply"]
    titles: dict[str, float | None]
    titles = {"joint: 2 components edited": None}
    titles |= {"joint: 2 components x -2": -2.0, "joint: 2 components x -8": -8.0}
    page, differing = page_of(folder), 0
    for sample, table in zip(record_of(folder)["samples"], page.tables, strict=True):
        columns = [text for text, _ in table[0]]
        assert columns[4:] == ["joint: unedited", *titles]
        for row in table[1:]:
            side, name = row[0][0], sample["sample_id"]
            assert row[4][0] == replies[name, side, "", None]
            for title, factor in titles.items():
                shown = row[columns.index(title)][0]
                assert shown == replies[name, side, names, factor]
                differing += shown != replies.get((name, side, random_names, factor), shown)
    assert differing > 2


def test_flags_of_a_sample_show(few: Path) -> None:
    flags = [flag for sample in record_of(few)["samples"] for flag in sample["flags"]]
    shown = [text for text in page_of(few).of("span") if text.strip()]
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
    assert not kinds & {"i", "b", "iframe", "object", "embed", "link", "base", "form"}
    assert len(page.all("script")) == len(page.all("img")) - 1 == 1
    assert len(page.all("details")) == 2
    assert not [name for _, told in page.tags for name in told if name.startswith("on")]
    assert page.of("h2") == ["Experiment", "trace", "Samples"]
    assert any(text.startswith(f"{HOSTILE}: P(target)") for text in page.of("summary"))
    assert facts_of(page)["model_id"].endswith('<i>"m"&amp;')
    prompts = [row[1][0] for row in page.tables[1][1:]]
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
    made = "html meta title style nav a h1 h2 h3 p dl dt dd div table thead tbody tr th td data "
    made += "span figure img figcaption details summary script"
    assert {tag for tag, _ in page.tags} <= {*made.split()}
    assert len(page.all("meta")) == 3 and len(page.all("script")) == len(page.all("style")) == 1
    names = {name for _, told in page.tags for name in told}
    known = "lang charset name content http-equiv class id colspan style value alt width src href"
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


def test_tables_and_pages_escape_what_they_are_given() -> None:
    assert tracing.rounded(EVIL_TEXT, "") == ESCAPED
    heading: Any = EVIL_TEXT
    cell = tracing.element("td", EVIL_TEXT)
    table = tracing.html_table([[heading]], [[heading], [cell]], id=EVIL_TEXT)
    page = tracing.page(EVIL_TEXT, {EVIL_TEXT: [EVIL_TEXT, table]})
    assert table.count(ESCAPED) == 4 and page.count(ESCAPED) == 9
    assert "<meta http-equiv=r" not in page and "<b" not in page.split("<h1>")[1]


def test_only_the_html_section_writes_tags() -> None:
    """So that no cell is put together from texts anywhere else."""
    source = SCRIPT.read_text()
    before, _, rest = source.partition("\n# ----- HTML -")
    report = rest.partition("\n# ----- Page -")[2].partition("\n")[2]
    texts = [node.value for node in ast.walk(ast.parse(report)) if isinstance(node, ast.Constant)]
    assert len(texts) > 100
    assert not [text for text in texts if re.search("</?[a-z]", str(text))]
    assert not re.findall(r"\bHtml\(", before + report)


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
ODD_VALUES += [-1, 0.5, 10**399, math.nan, -math.inf, "\ud800"]


def odd_records(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record without one of its fields, and with any other value in place of one."""
    for name in record:
        yield {key: value for key, value in record.items() if key != name}
        for value in ODD_VALUES:
            yield record | {name: value}


def written_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Page, list[str]]:
    """The page of a folder, written again, in which nothing acts; the warnings of the log."""
    caplog.clear()
    with caplog.at_level("WARNING", "circuit"):
        tracing.write_page(folder)
    return harmless(source_of(folder)), caplog.messages


def replies_shown(page: Page) -> list[list[str]]:
    tables = page.tables[1:]
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
    "too large": ({"multiplier": 10**399}, "not a number or null"),
    "long": ({"ablated": ["x" * 10_000]}, "xx'], not a text"),
    "no object": ("[1, 2]", "[1, 2] is no JSON object"),
    "no JSON": ("{'n_ablated': 3", "is no JSON object"),
    "doubled": ('{"reply": "a", "reply": "b"}', "is no JSON object"),
    "no UTF-8": (b'{"reply": "\xff"}', "is no JSON object"),
    "too deep": ("[" * 100_000, "[[' is no JSON object"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_reply_of_another_is_left_out_in_one_sentence_and_the_others_stay(
    name: str, confirmed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    page, out = written_anew(folder, caplog)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{file}, line 4: ") and says in sentence
    assert sentence.endswith("; this record is left out of the page") and len(sentence) < 400
    assert f"Warning: {sentence}" in page.of("p")
    assert replies_shown(page) == replies_shown(page_of(confirmed))


def test_whatever_a_field_of_a_reply_holds_the_page_is_drawn_and_does_nothing(
    confirmed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each field lacking, and with every odd value, all in one file."""
    folder = shutil.copytree(confirmed, tmp_path / "run")
    replies = generations(folder)
    odd = [*odd_records(replies[0]), *odd_records(replies[-1])]
    write_samples(folder / "generations.jsonl", *replies, *odd)
    page, out = written_anew(folder, caplog)
    (sentence,) = [line for line in out if "left out" in line]
    n_left_out = int(re.findall(r"; (\d+) such records are left out", sentence)[0])
    assert 0 < n_left_out < len(odd)
    assert sentence.startswith(f"{folder / 'generations.jsonl'}, line {len(replies) + 1}: ")
    titles = {text for table in page.tables[1:] for text, _ in table[0][4:]}
    assert {"trace: unedited", "trace: 2 components edited"} <= titles


def test_without_a_single_reply_there_is_no_column_of_them(
    confirmed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(confirmed, tmp_path / "run")
    for content in ("", "\n\n", "null\n"):
        (folder / "generations.jsonl").write_text(content)
        page, out = written_anew(folder, caplog)
        assert [len(row) for table in page.tables[1:] for row in table] == [4] * 12
        assert any("left out" in line for line in out) == (content == "null\n")
    (folder / "generations.jsonl").unlink()
    (folder / "generations.jsonl").mkdir()
    written_anew(folder, caplog)


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
    name: str, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    page, out = written_anew(folder, caplog)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{folder / 'run.json'}, sample 2: {OF_SAMPLES[name]}")
    assert f"Warning: {sentence}" in page.of("p")
    assert [text[:5] for text in page.of("summary")] == ["s0000", "s0002", "s0003"]


def test_whatever_a_field_of_a_sample_holds_the_page_is_drawn_and_does_nothing(
    few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    record = record_of(folder)
    sample = record["samples"][0]
    odd: list[Any] = [*ODD_VALUES, *odd_records(sample)]
    for prompt in odd_records(sample["prompts"]["a"]):
        odd.append(sample | {"prompts": {EVIL_TEXT: prompt, "b": sample["prompts"]["b"]}})
    record["samples"] += odd
    (folder / "run.json").write_text(json.dumps(record))
    page, out = written_anew(folder, caplog)
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{folder / 'run.json'}, sample 5: ")
    assert 4 < len(page.all("details")) < 4 + len(odd)
    assert any(text.startswith("<meta http-equiv=refresh") for text in page.of("summary"))


OF_COMMANDS: dict[str, tuple[str, Any]] = {
    "findings": ("findings", "<b>"),
    "a finding": ("findings", [{"level": "info"}]),
    "files": ("files", [7]),
    "options": ("options", None),
}


@pytest.mark.parametrize("name", OF_COMMANDS)
def test_a_command_of_another_is_left_out_in_one_sentence(
    name: str, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    record = record_of(folder)
    field, value = OF_COMMANDS[name]
    record["commands"]["joint"] = record["commands"]["trace"] | {field: value}
    record["commands"][EVIL_TEXT] = record["commands"]["trace"]
    (folder / "run.json").write_text(json.dumps(record))
    page, out = written_anew(folder, caplog)
    assert page.of("h2") == ["Experiment", "trace", "Samples"]
    (sentence,) = [line for line in out if "left out" in line]
    assert sentence.startswith(f"{folder / 'run.json'}, command 'joint': field '{field}' is ")
    assert sentence.endswith("2 such records are left out of the page")
    assert f"Warning: {sentence}" in page.of("p")


def test_whatever_the_record_says_of_the_experiment_the_page_is_drawn(
    few: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    record = record_of(folder)
    for value in ODD_VALUES:
        options = dict.fromkeys(tracing.EXPERIMENT_FACTS, value)
        fingerprint = dict.fromkeys(tracing.FINGERPRINT_FACTS, value)
        changed = record | {"experiment": {"options": options, "fingerprint": fingerprint}}
        changed |= {"noise_floor": value, "samples": value}
        (folder / "run.json").write_text(json.dumps(changed))
        tracing.write_page(folder)
        harmless(source_of(folder))


BROKEN_HEADS = {
    "empty": "",
    "another": "a,b\n1,2\n",
    "texts": "label,mean,role\nL0H1,<b>,x\n",
    "no role": "label,mean\nL0H1,1\n",
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("name", BROKEN_HEADS)
def test_a_file_that_is_broken_is_left_out_with_a_warning(
    name: str, few: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few, tmp_path / "run")
    (folder / "circuit_heads.csv").write_text(BROKEN_HEADS[name])
    (folder / "circuit_heads.png").write_text("<b>")
    tracing.write_page(folder)
    page = harmless(source_of(folder))
    warnings = [text for text in page.of("p") if "cannot be shown" in text]
    assert [text.split(" cannot")[0] for text in warnings] == [
        "Warning: circuit_heads.csv",
        "Warning: circuit_heads.png",
    ]
    assert len(images(page)) == 1
    assert "heads" not in [table.get("id") for table in page.all("table")]


def test_odd_line_ends_stay_in_a_reply(llama: str, tmp_path: Path, monkeypatch: Patch) -> None:
    reply = "one\u2028two\x85three\nfour\r"

    def reply_to(experiment: Any, edited_prompts: Any, max_new_tokens: int) -> list[Any]:
        return [tracing.Reply(reply, [5, 6])] * len(edited_prompts)

    monkeypatch.setattr(tracing, "greedy_replies", reply_to)
    flags = "joint L0H1 --num_samples 4 --num_random 2 --multipliers 0,1 --max_new_tokens 2"
    page = page_of(finish(llama, tmp_path, *flags.split()))
    titles = [text for text, _ in page.tables[0][0][4:]]
    edits = ["unedited", *(f"1 component {edit}" for edit in ("edited", "x 0", "x 1"))]
    assert titles == [f"joint: {edit}" for edit in edits]
    shown = {text for table in page.tables for row in table[1:] for text, _ in row[4:]}
    assert shown == {"one\\u2028two\\x85three\nfour\\r"}


@pytest.mark.parametrize("name", ["main_run", "hostile"])
def test_the_page_asks_the_network_for_nothing(name: str, request: Any) -> None:
    source = source_of(request.getfixturevalue(name))
    page = Page(source)
    assert all(link["href"].startswith("#") for link in page.all("a"))
    asking = ("src", "srcset", "action", "poster", "background", "xlink:href")
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


@pytest.mark.parametrize("lacking", ["", "replies", "scores"])  # of these the last loads the model
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
    for path in (folder / ".parts").glob("kl-*.json"):
        path.write_text("spoilt")
    for path in (folder / ".parts").glob(f"{lacking}-*.json"):
        path.unlink()
    finish(llama, folder, *CONFIRMED)
    assert "is not a part of this experiment" in (folder / "run.log").read_text()
    assert source_of(folder) == whole


def test_a_batch_that_is_halved_changes_nothing_in_the_page(
    confirmed: Path, llama: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    said, calls = tracing.greedy_replies, itertools.count()

    def fails_once(*arguments: Any, **options: Any) -> list[tracing.Reply]:
        if not next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return said(*arguments, **options)

    monkeypatch.setattr(tracing, "greedy_replies", fails_once)
    halved = finish(llama, tmp_path, *CONFIRMED)
    assert "out of memory: continuing with" in (halved / "run.log").read_text()
    assert source_of(halved) == source_of(confirmed)


@pytest.mark.parametrize("words", [[*FEW, "--dry_run"], ["check", "--num_samples", "2"]])
def test_checks_write_none(words: list[str], llama: str, tmp_path: Path) -> None:
    finish(llama, tmp_path, *words)
    assert not (tmp_path / REPORT).exists()


def redraw(source: Path, folder: Path) -> str:
    """The page of a results table that is redrawn."""
    assert tracing.main(["redraw", str(source), "--output_dir", str(folder)]) == 0
    return source_of(folder)


def test_redrawing_a_table_tells_what_table_and_record_tell(main_run: Path, tmp_path: Path) -> None:
    source = redraw(main_run / "circuit_results.csv", tmp_path)
    check_cells(tmp_path)
    page, page_of_run = Page(source), page_of(main_run)
    assert page.of("h2") == ["Experiment", "redraw", "Samples"]
    facts = facts_of(page)
    assert facts.items() <= facts_of(page_of_run).items() and facts["task"] == "suppression"
    assert {*images(page)} == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(page.all("details")) == 16
    assert len(page.tables[1][0]) == 4, "replies are not redrawn"
    findings = findings_of(tmp_path, "redraw")
    assert findings and {*findings} <= {*findings_of(main_run, "trace")}


def test_a_table_alone_names_no_samples(few: Path, tmp_path: Path) -> None:
    shutil.copy(few / "circuit_results.csv", tmp_path / "t.csv")
    (tmp_path / "new").mkdir()
    for name in ("circuit_confirm.png", "circuit_screen.png", "generations.jsonl"):
        (tmp_path / "new" / name).write_bytes(b"of another")
    page = Page(redraw(tmp_path / "t.csv", tmp_path / "new"))
    assert facts_of(page)["noise floor"] == "none known"
    assert page.of("h2") == ["Experiment", "redraw"]
    assert not page.all("details") and len(images(page)) == 2


def test_redrawing_in_place_keeps_figures_and_replies(confirmed: Path, tmp_path: Path) -> None:
    folder, before = shutil.copytree(confirmed, tmp_path / "run"), source_of(confirmed)
    (folder / REPORT).unlink()
    assert tracing.main(["redraw", str(folder)]) == 0
    assert source_of(folder) == before


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
for (const [name, i, clicks] of [["up", 1, 1], ["down", 1, 1], ["labels", 0, 1], ["verdicts", 5, 1],
    ["median", heads.length - 8, 1]]) {
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
    assert len(said["images"]) == 4 and all(said["images"])
    assert said["too_wide"] == 0


@needs_chromium
def test_a_script_that_is_not_the_pages_does_not_run(main_run: Path, tmp_path: Path) -> None:
    other = '<script>document.title = "other"</script>'
    dom, console = browse(source_of(main_run).replace("</html>", f"{other}</html>"), tmp_path, 900)
    assert "<title>other</title>" not in dom and "<title>suppression in tiny_llama<" in dom
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
    assert not re.search(r"\bnan\b", section(source_of(folder), "trace").split("<figure")[0])
    check_cells(folder)

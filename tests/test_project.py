"""The project around the script: what is written about it holds."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pandas as pd

import llama3_circuit_tracing as tracing
from conftest import ROOT, SCRIPT

README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "outputs" / "tiny_llama"


def test_the_scripts_own_block_and_requirements_name_the_same_packages() -> None:
    block = re.search(r"# dependencies = \[\n(.*?)# \]", SCRIPT.read_text(), re.DOTALL)
    assert block is not None
    named = re.findall(r'"(.+?)"', block[1])
    assert named == (ROOT / "requirements.txt").read_text().split()


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {Path(name).parts[0] for name in listed if name}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {SCRIPT.name, "requirements.txt", "README.md", "tests", "outputs"}


def test_the_readme_names_every_option() -> None:
    for field in fields(tracing.Config):
        assert f"--{field.name}" in README, field.name


def test_command_lines_in_the_readme_parse() -> None:
    commands = re.findall(r"llama3_circuit_tracing\.py (--(?!help)[^\n`]+)", README)
    commands += re.findall(r"^\| `(--[^`]+)` \|", README, re.MULTILINE)
    assert len(commands) > 12
    for command in commands:
        tracing.parse_args(command.split())


def test_files_that_the_readme_shows_exist() -> None:
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_example_output_is_what_a_fresh_run_gives(tmp_path: Path) -> None:
    model = str(ROOT / "tests" / "tiny_llama")
    command = ["--model_id", model, "--output_dir", str(tmp_path), "--controls"]
    assert tracing.main(command) == 0
    fresh, kept = (
        pd.read_csv(f / "circuit_results.csv", dtype={"unit": str}) for f in (tmp_path, EXAMPLE)
    )
    assert list(fresh) == list(kept)
    assert fresh.drop(columns=numbers(fresh)).equals(kept.drop(columns=numbers(kept)))
    assert (fresh[numbers(fresh)] - kept[numbers(kept)]).abs().max().max() < 1e-4


def numbers(table: pd.DataFrame) -> list[str]:
    return [c for c in table if c.startswith(("delta_", "score_", "effect_", "head_effect"))]

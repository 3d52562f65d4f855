"""Components and the command line: labels, flags, defaults, help, contradictions, the dry run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import llama3_circuit_tracing as tracing
from conftest import HANGS, ROOT, SCRIPT, Answer, refuses
from llama3_circuit_tracing import Component, Config, parse_args

OPTIONS = [option.name for option in fields(Config)]


@pytest.fixture()
def without_weights(tiny_llama: str, tmp_path: Path) -> Path:
    """The bundled model's folder without its weights: config and tokenizer only."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


# ----- components

LABELS = {
    "L3H5": Component(3, "head", 5),
    "L3N120": Component(3, "neuron", 120),
    "L0attn": Component(0, "attn"),
    "L12mlp": Component(12, "mlp"),
    "L3resid": Component(3, "resid"),
}
UNLABELLED = ["", "L", "L2", "2H5", "L2H", "L2N", "L2attn0", "L2mlp1", "LH5", "L2Q5", "l2h5"]
UNLABELLED += ["L2H-1", "L2 mlp", " L2H5", "L2H5 ", "L2H5L3H1", "L2H1_0", "L١H5", "L2H５", "L²mlp"]


def test_a_label_spells_layer_kind_and_index_and_parses_back() -> None:
    assert {label: Component.parse(label) for label in LABELS} == LABELS
    assert [component.label for component in LABELS.values()] == list(LABELS)
    for text in UNLABELLED:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            Component.parse(text)


@pytest.mark.parametrize("flag", ["given", "ablate"])
def test_components_of_any_kind_are_given_or_ablated_in_order_and_once_each(flag: str) -> None:
    labels = [label for label in LABELS if flag == "ablate" or "resid" not in label]
    text = ",".join([*reversed(labels), labels[0]])
    expected = tuple(LABELS[label] for label in reversed(labels))
    assert getattr(parse_args([f"--{flag}", text, "--op", "patch"]), flag) == expected


# ----- flags and defaults


def test_the_defaults_are_a_plain_zero_ablation_of_all_heads_of_llama_3() -> None:
    config = parse_args([])
    assert config == Config()
    assert config.model_id == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (config.output_dir, config.num_samples, config.seed) == ("outputs/run", 16, 42)
    assert (config.layers, config.heads, config.top_k) == ("all", "all", 20)
    assert (config.bf16, config.device_map, config.max_new_tokens) == (None, "auto", 0)
    settings = (config.task, config.kind, config.op, config.positions)
    assert settings == ("suppression", "head", "zero", "all")


# what a parser may take and what it makes of it; the first that one takes is its own
TAKEN: dict[str, Any] = {
    '{"": "cpu"}': {"": "cpu"},
    "L0H1,L2mlp": (Component(0, "head", 1), Component(2, "mlp")),
    "0,2-3": (range(0, 1), range(2, 4)),
    "-0.5": -0.5,
    "1234": 1234,
    "0.5": 0.5,
}
ACTIONS = {action.dest: action for action in tracing.build_parser()._actions}


def other_than_default(name: str) -> tuple[str, Any]:
    """(text, value) for an option by its choices and type; no text for a switch."""
    action = ACTIONS[name]
    if action.nargs == 0:
        return "", not action.default
    if action.choices:
        other = next(choice for choice in action.choices if choice != action.default)
        return other, other
    for text in TAKEN if action.type not in (None, str) else ():
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            if action.type(text) != text:
                own = {"confirm": ("top", 1234), "multipliers": (-0.5,)}
                return text, own.get(name, TAKEN[text])
    return "some text", "some text"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_flag_is_known_in_two_spellings_and_recorded_as_it_is_written(name: str) -> None:
    text, value = other_than_default(name)
    assert value != getattr(Config(), name)
    for spelling in (f"no-{name}",) if value is False else (name, name.replace("_", "-")):
        argv = [f"--{spelling}={text}" if text else f"--{spelling}"]
        config = Config(**vars(tracing.build_parser().parse_args(argv)))
        assert vars(config) == {**vars(Config()), name: value}
        recorded = json.loads(json.dumps(config.recorded()))[name]
        assert recorded == (text if isinstance(value, str | tuple | dict) else value)


NUMBERS: dict[str, list[tuple[str, Any]]] = {  # what is taken, and what it stands for
    "num_samples": [("16", 16), (" 16", 16), ("+16", 16), ("0016", 16)],
    "multipliers": [("0, .5,2.,-1e-1", (0.0, 0.5, 2.0, -0.1)), ("1E2", (100.0,))],
    "node_threshold": [("1", 1.0), ("5e-1", 0.5)],
    "confirm": [("top:3", ("top", 3)), ("mass:1e-2", ("mass", 0.01))],
}


@pytest.mark.parametrize(
    ("name", "text", "value"), [(n, *of) for n in NUMBERS for of in NUMBERS[n]]
)
def test_numbers_are_taken_in_every_plain_spelling(name: str, text: str, value: Any) -> None:
    assert vars(tracing.build_parser().parse_args([f"--{name}={text}"]))[name] == value


def test_options_have_other_spellings_and_values_of_their_own() -> None:
    others: dict[str, dict[str, Any]] = {
        "--model_name_or_path x/y": {"model_id": "x/y"},  # as transformers' scripts say
        "--model-name-or-path x/y": {"model_id": "x/y"},
        "--bf16": {"bf16": True},
        "--no-bf16": {"bf16": False},
        "--no_bf16": {"bf16": False},
        "--rows_per_forward auto": {"rows_per_forward": None},
        "--device_map cuda:1": {"device_map": "cuda:1"},
    }
    for line, values in others.items():
        assert vars(parse_args(line.split())) == {**vars(Config()), **values}


def test_a_selection_is_sorted_and_names_each_index_once() -> None:
    cases = {"all": "012345", "4": "4", "0-0": "0", "5,0": "05", "2-4": "234", "0,1-2,2": "012"}
    for text, chosen in {**cases, "0,3-5,1": "01345"}.items():
        config = parse_args([f"--layers={text}", f"--heads={text}"])
        assert config.layers == config.heads
        assert "".join(map(str, tracing.select(config.layers, 6, "layers"))) == chosen


def write_results(path: Path, **told: Any) -> None:
    """A results file of one row that tells some options of its run."""
    row = {**dict.fromkeys(tracing.SEVEN, 1), "head_effect": 0, **told}
    path.write_text("".join(",".join(map(str, cells)) + "\n" for cells in (row, row.values())))


# ----- what is refused


def said_of_bad_usage(answer: Answer, *argv: str) -> str:
    """The sentence, behind what argparse tells of the usage."""
    code, _, err = answer(*argv)
    assert code == 2, argv
    return err.splitlines()[-1]


SELECTIONS = "all,3|x||1,|,1|1-|1--2|1.5|1 2|L1|2-1|-1|0-99999999999999|1_0|١|0-٣|２"
MEANINGLESS = {  # by flag
    "layers": SELECTIONS,
    "heads": SELECTIONS,
    "neurons": SELECTIONS,
    "num_samples": "0|many|1_0|١|１０",
    "top_k": "0",
    "tree_tokens": "0",
    "rows_per_forward": "0|some|٣",
    "max_new_tokens": "-1",
    "confirm": "-1|1_0|٣|top:1_0|layer:٣|mass:0.0_5|share:٠.٥",
    "num_random": "0",
    "seed": "1.5|99999999999999999999|4_2",
    "factor": "nan|inf|much|1_0|١|1_0.5|٠.٥|1e1_0|1e999",
    "multipliers": "0,1_0|0,٢",
    "node_threshold": "0.8_5|٠.٥|nan|0|1.1",
    "given": "2:5|L2|L0|L0H1_0|L٠H1",
    "ablate": "L2H5,|L2-mlp|L1N２",
    "device_map": "{'': 0",
    "task": "nonsense",
    "kind": "heads|block",
    "op": "nonsense",
    "positions": "first",
    "patch_into": "c",
    "target_form": "nonsense",
}


@pytest.mark.parametrize("flag", MEANINGLESS)
def test_a_value_that_means_nothing_is_refused_by_name(answer: Answer, flag: str) -> None:
    for text in MEANINGLESS[flag].split("|"):
        scale = ["--op", "scale"] if flag == "factor" else []
        sentence = said_of_bad_usage(answer, f"--{flag}={text}", *scale)
        assert f"--{flag}" in sentence and text in sentence


REFUSED = {
    "--op scale": "--op scale and --factor go together",
    "--factor 2": "--op scale and --factor go together",
    "--kind neuron": "--kind neuron and --neurons go together",
    "--neurons 0-3": "--kind neuron and --neurons go together",
    "--kind mlp --heads 0": "--heads does not apply to --kind mlp",
    "--kind resid --heads 0 --op patch": "--heads does not apply to --kind resid",
    "--patch_into b": "--patch_into applies to --op patch only",
    "--kind resid": "--kind resid with --op zero at all positions removes the input itself",
    "--kind resid --op mean": "--kind resid with --op mean at all positions removes the input",
    "--ablate L1H0,L1resid": "error: --ablate L1resid with --op zero at all positions removes the",
    "--given L0H0,L1resid": "error: --given L1resid removes the input itself",
    "--task refusal --target_form literal": "error: --task refusal needs --target_form word",
    "--task refusal --controls": "--controls belong to --task suppression",
    "--controls --op patch --patch_into b": "--controls share one prompt b",
    "--dry_run --from_csv results.csv": "--from_csv redraws a results table and measures nothing",
    "--layer 3": "--layer",  # abbreviations
    "--max_new 3": "--max_new",
    "--dry": "--dry",
    "--model x": "--model",
}


@pytest.mark.parametrize("line", REFUSED)
def test_contradictions_and_abbreviations_are_refused_with_a_sentence(
    answer: Answer, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "results.csv")
    assert REFUSED[line] in said_of_bad_usage(answer, *line.split())


UNREAD = {  # options that nothing reads beside the others, and those with which something does
    "--system_prompt Brief --no-chat": "--system_prompt= --no-chat;--no-chat;--system_prompt Brief",
    "--revision v7 --model_id tests/tiny_llama": "--revision v7;--revision v7 --model_id a/b",
    "--revision v7 --model_id ./nowhere": "",
    "--revision v7 --model_id ~/nowhere": "",
    "--revision v7 --model_id model.gguf": "--revision v7 --model_id a/b/model.gguf",
    "--skip L0H0": "--skip L0H0 --confirm 2;--skip L0H0 --screen 4",
    "--skip L0H0 --ablate L0H1": "--skip L0H0 --ablate L0H1 --multipliers 0 --max_new_tokens 2",
    "--num_random 3": "--num_random 3 --confirm 2;--num_random 20",
    "--num_random 3 --ablate L0H1 --multipliers 0 --max_new_tokens 2": "",
    "--self_test --dry_run": "--self_test --check_attentions;--dry_run",
}


@pytest.mark.parametrize("line", UNREAD)
def test_an_option_that_nothing_would_read_is_refused_with_its_value(
    answer: Answer, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sentence = said_of_bad_usage(answer, *line.split())
    option, value, *_ = line.split()
    assert option in sentence
    assert value in sentence or value.startswith("--")
    for taken in filter(None, UNREAD[line].split(";")):
        assert isinstance(parse_args(taken.split()), Config)


def test_a_directory_named_as_a_model_is_no_repository_on_the_hub(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--model_id", "some-model", "--revision", "v7"]
    assert parse_args(argv).revision == "v7"
    (tmp_path / "some-model").mkdir()
    assert "--revision v7 is for models on the hub; some-model" in said_of_bad_usage(answer, *argv)


# ----- names and files


@pytest.mark.parametrize("flag", ["ablate", "circuit", "given", "skip", "via"])
def test_a_component_is_named_whatever_the_working_directory_holds(
    flag: str, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is asked for by a separator or a suffix."""
    monkeypatch.chdir(tmp_path)
    for name in ("L0H0", "names.txt", "names", "L0H0,L0mlp"):
        (tmp_path / name).write_text("L1H1")
    of_file, dest = (Component(1, "head", 1),), {"circuit": "ablate"}.get(flag, flag)
    beside = ["--confirm", "2"] if flag == "skip" else []
    for text in ("./L0H0", "names.txt", "./names", str(tmp_path / "L0H0"), "./L0H0,L0mlp"):
        assert getattr(parse_args([f"--{flag}", text, *beside]), dest) == of_file
    heads = getattr(parse_args([f"--{flag}", "L0H0", *beside]), dest)
    assert heads == (Component(0, "head", 0),)
    both = getattr(parse_args([f"--{flag}", "L0H0,L0mlp", *beside]), dest)
    assert both == (Component(0, "head", 0), Component(0, "mlp"))
    sentence = said_of_bad_usage(answer, f"--{flag}", "missing.txt")
    assert sentence.endswith("missing.txt is no file of components: there is no such file")
    assert "'names' is no component" in said_of_bad_usage(answer, f"--{flag}", "names")


def test_a_direction_is_fitted_whatever_the_output_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite would empty a folder that has a file of directions; `difference` is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "difference").write_text("no directions")
    argv = ["--along", "difference", "--overwrite", "--output_dir", "."]
    assert parse_args(argv).along == "difference"
    with pytest.raises(SystemExit):
        parse_args(["--along", "./difference", *argv[2:]])


TOGETHER = (
    "--op scale --factor 0;--kind neuron --neurons 0-15 --layers 1;--kind resid --positions last;"
    "--kind resid --op patch;--kind resid --op scale --factor 2;--ablate L1resid --op patch;"
    "--controls --op patch;--task refusal --op patch --patch_into b"
)


@pytest.mark.parametrize("line", TOGETHER.split(";"))
def test_options_that_go_together_are_taken(line: str) -> None:
    assert isinstance(parse_args(line.split()), Config)


# ----- redrawing begins with the flags of the recorded run

RESULTS = "circuit_results.csv"
SCALED = "--model_id some/model --task refusal --op scale --factor -0.5 --top_k 5"
NOT_TOLD = "--output_dir there --device_map cpu --seed 7 --kind mlp --debug --overwrite"


def redrawn(folder: Path, *flags: str, **told: Any) -> Config:
    """What is asked for where results that tell some options are redrawn."""
    asked: list[Config] = []
    write_results(folder / RESULTS, **told)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "run", asked.append)
        assert tracing.main(["--from_csv", str(folder / RESULTS), *flags]) == 0
    return asked[0]


def asking(folder: Path, *lines: str) -> Config:
    words = [word for line in lines for word in line.split()]
    return parse_args([*words, "--from_csv", str(folder / RESULTS)])


def write_record(folder: Path, line: str) -> None:
    record = {"config": parse_args(line.split()).recorded(), "noise_floor": 0.1}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("told", ["", SCALED, "--op patch --patch_into b --top_k 3"])
def test_redrawing_takes_up_what_results_and_figures_were_made_with(
    tmp_path: Path, told: str
) -> None:
    """Of a table that tells of its op only."""
    if told:  # else there is no record
        write_record(tmp_path, f"{told} {NOT_TOLD} --compare other.csv --layers 0,2-3")
    expected = asking(tmp_path, told)
    assert redrawn(tmp_path, op=expected.op) == expected


OF_TABLE: dict[str, dict[str, Any]] = {  # columns of a table by the flags that they stand for
    "--task odd_one_out": {"task": "odd_one_out"},
    "--op scale --factor 2": {"op": "scale", "factor": 2.0},
    "--op patch --patch_into b": {"op": "patch", "patch_into": "b", "factor": ""},
    "--op mean --positions differing": {"op": "mean", "positions": "differing", "patch_into": ""},
}


@pytest.mark.parametrize("line", OF_TABLE)
def test_redrawing_takes_up_what_the_table_itself_tells(line: str, tmp_path: Path) -> None:
    assert redrawn(tmp_path, **OF_TABLE[line]) == asking(tmp_path, line)


def test_what_the_table_tells_wins_over_the_record(tmp_path: Path) -> None:
    write_record(tmp_path, SCALED)
    told = {"task": "suppression", "op": "scale", "factor": 3.0, "positions": "all"}
    flags = [f"--{name}={value}" for name, value in told.items()]
    assert redrawn(tmp_path, **told) == asking(tmp_path, SCALED, *flags)


@pytest.mark.parametrize("again", ["--task suppression --top_k 6", "--factor 3", "--model_id a/b"])
def test_flags_that_are_given_again_win_over_the_recorded_ones(tmp_path: Path, again: str) -> None:
    write_record(tmp_path, SCALED)
    assert redrawn(tmp_path, *again.split(), op="scale") == asking(tmp_path, SCALED, again)


UNREAD_BY_REDRAWING = [name for name in OPTIONS if name not in tracing.REDRAW_OPTIONS]


@pytest.mark.parametrize("name", UNREAD_BY_REDRAWING)
def test_redrawing_refuses_every_option_that_it_does_not_read(
    name: str, answer: Answer, tmp_path: Path
) -> None:
    text, value = other_than_default(name)
    option = f"--no-{name}" if value is False else f"--{name}"
    write_results(tmp_path / RESULTS)
    argv = ["--from_csv", str(tmp_path / RESULTS), f"{option}={text}" if text else option]
    sentence = said_of_bad_usage(answer, *argv)
    assert sentence.endswith(f"leave out {option} {text}".rstrip())
    beside = said_of_bad_usage(answer, *argv, "--seed", "7", "--overwrite")
    assert option in beside and "--seed 7" in beside and "--overwrite" in beside


def test_redrawing_reads_what_it_takes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each access to an option of the configuration is seen; `main` reads --debug."""
    seen: set[str] = set()

    class Watched(Config):
        def __getattribute__(self, name: str) -> Any:
            seen.add(name)
            return super().__getattribute__(name)

    def replace_unseen(config: Config, **changes: Any) -> Config:
        return Watched(**{**vars(config), **changes})

    monkeypatch.setattr(tracing, "replace", replace_unseen)
    results = str(ROOT / "outputs" / "tiny_llama" / RESULTS)
    argv = ["--from_csv", results, "--output_dir", str(tmp_path), "--heatmap"]
    config = parse_args(argv, before=["--model_id", "tests/tiny_llama", "--op", "zero"])
    tracing.run(Watched(**{**vars(config), "compare": results}))
    # of a screen only whether there is one, which makes the method of a table exact
    assert seen & {*OPTIONS} == tracing.REDRAW_OPTIONS - {"debug"} | {"screen"}


@pytest.mark.parametrize("content", ["not a record", "[1, 2]", ""])
def test_results_beside_a_foreign_record_are_refused_with_its_path(
    answer: Answer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "run.json").write_text(content)
    path = str(tmp_path / RESULTS)
    assert str(tmp_path / "run.json") in said_of_bad_usage(answer, "--from_csv", path)


# ----- help, import, docstring


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("--layers x", 2), ("--op scale", 2)])
def test_help_and_usage_errors_are_answered_before_the_heavy_imports(line: str, code: int) -> None:
    argv = [sys.executable, "-X", "importtime", str(SCRIPT), *line.split()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANGS)
    names = re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, flags=re.MULTILINE)
    modules = {name.partition(".")[0] for name in names}
    assert done.returncode == code
    assert "argparse" in modules
    assert not modules & {"torch", "transformers", "accelerate", "pandas", "numpy", "matplotlib"}


def test_help_holds_the_docstring_and_every_flag_with_its_default_in_groups(answer: Answer) -> None:
    code, out, _ = answer("--help")
    assert code == 0
    assert str(tracing.__doc__).strip() in out
    flat = "".join(out.split())  # lines break at blanks and behind hyphens
    assert flat.count("(default:") == len(OPTIONS)
    for name in OPTIONS:
        assert f"--{name}" in flat
        assert f"--{name.replace('_', '-')}" in flat
    for default in ("meta-llama/Meta-Llama-3-8B-Instruct", "outputs/run", "16", "42", "20", "auto"):
        assert f"(default:{default})" in flat
    for group in ("model", "task", "sweep", "evidence", "output", "checks"):
        assert f"\n{group}:\n" in out


def docstring_commands() -> list[list[str]]:
    """The arguments of each command line of the docstring, as a shell reads them."""
    lines = [line for line in str(tracing.__doc__).splitlines() if line.startswith("  ")]
    shell = ['python() { printf "%s\\t" "$@"; echo; }', *lines]  # continued lines included
    run = subprocess.run(["bash", "-euc", "\n".join(shell)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    commands = [line.split("\t")[:-1] for line in run.stdout.splitlines()]
    assert {command[0] for command in commands} == {SCRIPT.name}
    return [command[1:] for command in commands]


def test_the_command_lines_of_the_docstring_parse_and_plan_their_runs(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled model each is good up to the weights, and the dry run runs as it stands."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    commands = docstring_commands()
    assert all(isinstance(parse_args(argv), Config) for argv in commands)
    runs = [argv for argv in commands if "tests/tiny_llama" in argv]
    assert len(commands) > len(runs) >= 3
    assert any("--dry_run" in argv for argv in runs)
    for argv in runs:
        code, out, err = answer(*argv, *(() if "--dry_run" in argv else ("--dry_run",)))
        assert (code, err) == (0, ""), argv
        assert "forwards" in out
    assert [path.name for path in tmp_path.iterdir()] == ["tests"]


def test_import_does_nothing_but_define(tmp_path: Path) -> None:
    """No output, no file, no argv, seed, handler or signal; and samples differ in no process."""
    code = """
import json, logging, random, signal, sys
before = (list(sys.argv), random.getstate(), signal.getsignal(signal.SIGTERM))
import torch
seed = torch.initial_seed()
import llama3_circuit_tracing as tracing
assert before == (list(sys.argv), random.getstate(), signal.getsignal(signal.SIGTERM))
assert seed == torch.initial_seed() and torch.is_grad_enabled()
assert not tracing.log.handlers and not logging.getLogger().handlers
samples = tracing.SUPPRESSION.build(20, random.Random(42), len)
with open(sys.argv[-1], "w") as file:
    json.dump([s.prompt_a for s in samples], file)
"""
    empty, out = tmp_path / "empty", tmp_path / "samples.json"
    empty.mkdir()
    settings = {"PYTHONHASHSEED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense", str(out)],
        cwd=empty,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(empty.iterdir()) == []
    here = tracing.SUPPRESSION.build(20, random.Random(42), len)
    assert json.loads(out.read_text()) == [sample.prompt_a for sample in here]


# ----- ranges and the dry run, from the model's config alone


def model_size(folder: Path) -> tuple[int, int, int]:
    """(layers, heads, width of the MLP)"""
    config = json.loads((folder / "config.json").read_text())
    return config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"]


@pytest.mark.parametrize("dry", [True, False])
def test_what_the_model_does_not_have_is_refused_with_the_valid_range(
    answer: Answer, without_weights: Path, tmp_path: Path, dry: bool
) -> None:
    n_layers, n_heads, d_mlp = model_size(without_weights)
    layers, heads = f"layers 0-{n_layers - 1}", f"heads 0-{n_heads - 1}"
    neurons = f"neurons 0-{d_mlp - 1}"
    cases: dict[str, list[str]] = {
        f"--layers {n_layers}": [layers],
        f"--layers 0-{n_layers}": [layers],
        f"--kind attn --layers {n_layers}": [layers],
        f"--heads 0,{n_heads}": [heads],
        f"--kind neuron --neurons {d_mlp}": [neurons],
        f"--given L0H0,L{n_layers}H0": [layers, heads],
        f"--given L{n_layers}mlp": [layers],
        f"--ablate L0H{n_heads}": [layers, heads],
        f"--ablate L0N{d_mlp}": [layers, neurons],
        "--layers 0 --heads 1 --given L0H1": ["nothing is left"],
        f"--confirm {n_layers * n_heads // 2 + 1}": [f"{n_layers * n_heads}"],
        "--layers 0 --heads 0 --confirm 2": ["1 components"],
    }
    extra = ["--dry_run"] if dry else ["--output_dir", str(tmp_path / "out")]
    for line, said in cases.items():
        flag, value = line.split()[-2:]
        says = [flag, value.rpartition(",")[2], *said]
        refuses(answer, "--model_id", str(without_weights), *line.split(), *extra, says=says)


def test_a_dry_run_without_weights_prints_all_that_would_be_done_and_writes_nothing(
    answer: Answer, without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    argv = ["--num_samples", "3", "--layers", "1-2", "--heads", "0,1", "--rows_per_forward", "1"]
    argv += ["--output_dir", "o", "--dry_run"]
    code, out, err = answer("--model_id", str(without_weights), *argv)
    assert (code, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    tokenizer = AutoTokenizer.from_pretrained(without_weights)
    system = {"role": "system", "content": "You are an assistant."}
    for sample in tracing.SUPPRESSION.build(3, random.Random(42), len):
        for user in (sample.prompt_a, sample.prompt_b):
            chat = [system, {"role": "user", "content": user}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert f"({len(ids)} tokens): {text!r}" in out
        for word in sample.targets:
            for form in {word, word[0].upper() + word[1:]}:
                ids = tokenizer(form, add_special_tokens=False)["input_ids"]
                assert f"{form!r} {ids}" in out
    n_layers, n_heads, _ = model_size(without_weights)
    assert f"{n_layers} layers, {n_heads} heads" in out
    assert "4 components (L1H0 to L2H1)" in out
    assert "3 samples in 1 trees" in out
    assert "about 4 forwards of 1 rows" in out
    assert f"one head at a time takes {2 * 3 * 4}" in out
    assert re.search(r"memory in GB: weights \d.*rows \d", out)


def test_a_dry_run_estimates_what_an_8b_model_needs_from_its_config_alone(
    answer: Answer, without_weights: Path
) -> None:
    path = without_weights / "config.json"
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
    numbers = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {**widths, **numbers, "vocab_size": 128256, "tie_word_embeddings": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **shape}))
    code, out, _ = answer("--model_id", str(without_weights), "--dry_run", "--bf16")
    assert code == 0
    assert "1024 components (L0H0 to L31H31)" in out
    weights = re.search(r"weights (\d+\.\d+)", out)
    assert weights is not None
    assert float(weights[1]) == pytest.approx(16.06, abs=0.05)  # 8.03 billion parameters, 2 bytes


def test_float32_that_was_not_asked_for_is_warned_of(
    answer: Answer, without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing.torch.cuda, "is_available", lambda: False)
    argv = ["--model_id", str(without_weights), "--num_samples", "1", "--dry_run"]
    assert re.search(r"float32.*8B model needs 32 GB", answer(*argv)[1])
    for flag in ("--no-bf16", "--bf16"):
        assert "8B" not in answer(*argv, flag)[1]


TEXTS = [f.name for f in fields(Config) if "str" in str(f.type) and "choices" not in f.metadata]


@pytest.mark.parametrize(
    "name", [name for name in TEXTS if name not in ("answer_prefix", "system_prompt")]
)
def test_an_option_that_is_empty_is_refused_by_name(name: str, answer: Answer) -> None:
    """As `--samples "$UNSET"` gives it."""
    assert f"--{name} is empty" in said_of_bad_usage(answer, f"--{name}", "")

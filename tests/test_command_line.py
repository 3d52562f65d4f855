"""The command line: flags, defaults, help, ranges, and what --dry_run shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import llama3_circuit_tracing as circuit
from conftest import Answer
from llama3_circuit_tracing import Config, build_parser, parse_args

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "llama3_circuit_tracing.py"


@pytest.fixture()
def without_weights(tiny_llama: str, tmp_path: Path) -> Path:
    """The bundled model's folder without its weights: config and tokenizer only."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


# ----- flags and defaults


def test_no_arguments_give_the_default_configuration() -> None:
    assert parse_args([]) == Config()


def test_the_defaults_are_those_of_the_request() -> None:
    config = Config()
    assert config.model_id == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (config.output_dir, config.num_samples, config.seed) == ("outputs/run", 16, 42)
    assert (config.layers, config.heads, config.top_k) == ("all", "all", 20)
    assert (config.bf16, config.device_map, config.max_new_tokens) == (None, "auto", 0)
    assert (config.task, config.kind, config.op, config.positions) == (
        "suppression",
        "head",
        "zero",
        "all",
    )


# field -> (text on the command line, value); True stands for a flag without a value
FLAGS: dict[str, tuple[str, Any]] = {
    "model_id": ("some/model", "some/model"),
    "revision": ("abc", "abc"),
    "local_files_only": ("", True),
    "bf16": ("", True),
    "device_map": ("cpu", "cpu"),
    "attn_implementation": ("eager", "eager"),
    "task": ("refusal", "refusal"),
    "num_samples": ("3", 3),
    "samples": ("mine.csv", "mine.csv"),
    "answer_prefix": ("The answer is", "The answer is"),
    "target_form": ("literal", "literal"),
    "seed": ("7", 7),
    "kind": ("mlp", "mlp"),
    "layers": ("0,2-3", "0,2-3"),
    "heads": ("1", "1"),
    "neurons": ("0-15", "0-15"),
    "op": ("mean", "mean"),
    "factor": ("-0.5", -0.5),
    "positions": ("last", "last"),
    "patch_into": ("b", "b"),
    "given": ("L0H1,L2H3", "L0H1,L2H3"),
    "tree_tokens": ("100", 100),
    "rows_per_forward": ("4", 4),
    "controls": ("", True),
    "confirm": ("8", 8),
    "num_random": ("5", 5),
    "num_bootstrap": ("300", 300),
    "ablate": ("L2H5", "L2H5"),
    "compare": ("other.csv", "other.csv"),
    "max_new_tokens": ("12", 12),
    "output_dir": ("here", "here"),
    "overwrite": ("", True),
    "top_k": ("5", 5),
    "heatmap": ("", True),
    "from_csv": ("results.csv", "results.csv"),
    "dry_run": ("", True),
    "self_test": ("", True),
    "check_attentions": ("", True),
    "debug": ("", True),
}


def test_every_option_is_among_the_flags_tested_here() -> None:
    assert {f.name for f in fields(Config)} == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_known_in_underscore_and_in_hyphen_spelling(name: str) -> None:
    text, value = FLAGS[name]
    for spelling in (name, name.replace("_", "-")):
        argv = [f"--{spelling}", text] if text else [f"--{spelling}"]
        if text.startswith("-"):
            argv = [f"--{spelling}={text}"]
        parsed = vars(build_parser().parse_args(argv))
        assert parsed == {**vars(Config()), name: value}
        assert value != getattr(Config(), name)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--model-name-or-path"])
def test_the_model_has_the_name_that_transformers_scripts_use_too(flag: str) -> None:
    assert parse_args([flag, "some/model"]) == Config(model_id="some/model")


def test_bf16_is_automatic_on_or_off() -> None:
    assert [parse_args(argv).bf16 for argv in ([], ["--bf16"], ["--no-bf16"])] == [
        None,
        True,
        False,
    ]


def test_no_bf16_is_known_in_underscore_spelling_too() -> None:
    assert parse_args(["--no_bf16"]).bf16 is False


def test_rows_per_forward_is_a_number_or_auto() -> None:
    assert parse_args(["--rows_per_forward", "auto"]).rows_per_forward is None
    assert parse_args(["--rows_per_forward", "3"]).rows_per_forward == 3


@pytest.mark.parametrize(
    "argv", [["--layer", "3"], ["--max_new", "3"], ["--dry"], ["--model", "x"]]
)
def test_abbreviations_are_refused(answer: Answer, argv: list[str]) -> None:
    code, _, err = answer(*argv)
    assert code == 2
    assert argv[0] in err


@pytest.mark.parametrize("text", ["all", "7", "0,5,9", "8-15", "0,8-15,3", "0-0"])
def test_layers_and_heads_take_one_form(text: str) -> None:
    config = parse_args(["--layers", text, "--heads", text])
    assert (config.layers, config.heads) == (text, text)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("all", [0, 1, 2, 3, 4, 5]), ("4", [4]), ("5,0", [0, 5]), ("2-4", [2, 3, 4]), ("0,1-2,2", [0, 1, 2])],
)  # fmt: skip
def test_a_selection_is_sorted_and_names_each_index_once(text: str, chosen: list[int]) -> None:
    assert circuit.select(text, 6, "layers") == chosen


@pytest.mark.parametrize("flag", ["--layers", "--heads"])
@pytest.mark.parametrize("text", ["", "x", "1,", ",1", "1-", "1--2", "1.5", "1 2", "all,3", "L1"])
def test_a_malformed_selection_is_refused_with_its_text(
    answer: Answer, flag: str, text: str
) -> None:
    code, _, err = answer(f"{flag}={text}")
    assert code == 2
    assert flag in err
    assert repr(text) in err


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--num_samples", "0"),
        ("--num_samples", "many"),
        ("--top_k", "0"),
        ("--tree_tokens", "0"),
        ("--rows_per_forward", "0"),
        ("--rows_per_forward", "some"),
        ("--max_new_tokens", "-1"),
        ("--confirm", "-1"),
        ("--num_random", "0"),
        ("--num_bootstrap", "10"),
        ("--seed", "1.5"),
        ("--factor", "nan"),
        ("--factor", "inf"),
        ("--factor", "much"),
        ("--given", "2:5"),
        ("--given", "L2"),
        ("--ablate", "L2H5,"),
        ("--task", "nonsense"),
        ("--kind", "heads"),
        ("--op", "nonsense"),
        ("--positions", "first"),
        ("--patch_into", "c"),
        ("--target_form", "nonsense"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(
    answer: Answer, flag: str, text: str
) -> None:
    code, _, err = answer(f"{flag}={text}")
    assert code == 2
    sentence = err.splitlines()[-1]
    assert flag in sentence
    assert text in sentence


@pytest.mark.parametrize(
    ("flag", "text"), [("--seed", "99999999999999999999"), ("--device_map", "{'': 0")]
)
def test_a_value_that_no_library_takes_is_bad_usage(
    answer: Answer, tiny_llama: str, tmp_path: Path, flag: str, text: str
) -> None:
    output = ("--output_dir", str(tmp_path / "out"))
    code, _, err = answer("--model_id", tiny_llama, "--num_samples", "1", flag, text, *output)
    assert code == 2
    assert text in err


CONTRADICTIONS = {
    "--op scale": "--op scale and --factor go together",
    "--factor 2": "--op scale and --factor go together",
    "--kind neuron": "--kind neuron and --neurons go together",
    "--neurons 0-3": "--kind neuron and --neurons go together",
    "--kind mlp --heads 0": "--heads does not apply to --kind mlp",
    "--kind resid --heads 0 --op patch": "--heads does not apply to --kind resid",
    "--patch_into b": "--patch_into applies to --op patch only",
    "--kind resid": "--kind resid with --op zero at all positions removes the input itself",
    "--kind resid --op mean": "--kind resid with --op mean at all positions removes the input",
    "--task refusal --controls": "--controls belong to --task suppression",
    "--controls --op patch --patch_into b": "--controls share one prompt b",
    "--dry_run --from_csv results.csv": "--dry_run loads a model's config and --from_csv loads none",
}


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_with_a_sentence(
    answer: Answer, line: str
) -> None:
    code, _, err = answer(*line.split())
    assert code == 2
    assert CONTRADICTIONS[line] in err.splitlines()[-1]


@pytest.mark.parametrize(
    "line",
    [
        "--op scale --factor 0",
        "--kind neuron --neurons 0-15 --layers 1",
        "--kind resid --op zero --positions last",
        "--kind resid --op patch",
        "--kind resid --op scale --factor 2",
        "--controls --op patch",
        "--task refusal --op patch --patch_into b",
    ],
)
def test_options_that_go_together_are_taken(line: str) -> None:
    assert isinstance(parse_args(line.split()), Config)


# ----- help, import, docstring


def imported_modules(*arguments: str) -> tuple[int, set[str], str]:
    """(exit code, top-level packages imported, stdout) of the script as a process."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    names = re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, flags=re.MULTILINE)
    return done.returncode, {name.partition(".")[0] for name in names}, done.stdout


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--no_such_flag"], 2),
        (["--layers", "x"], 2),
        (["--op", "scale"], 2),
    ],
)
def test_help_and_usage_errors_are_answered_before_the_heavy_imports(
    argv: list[str], code: int
) -> None:
    returned, modules, _ = imported_modules(*argv)
    assert returned == code
    assert "argparse" in modules
    assert not modules & {"torch", "transformers", "accelerate", "pandas", "numpy", "matplotlib"}


def test_help_holds_the_docstring_and_every_flag_with_its_default(answer: Answer) -> None:
    code, out, _ = answer("--help")
    assert code == 0
    assert circuit.__doc__ is not None
    assert circuit.__doc__.strip() in out
    flat = "".join(out.split())  # lines break at blanks and behind hyphens
    assert flat.count("(default:") == len(fields(Config))
    for name in FLAGS:
        assert f"--{name}" in flat
        assert f"--{name.replace('_', '-')}" in flat
    for default in ("meta-llama/Meta-Llama-3-8B-Instruct", "outputs/run", "16", "42", "20", "auto"):
        assert f"(default:{default})" in flat


def test_help_is_grouped(answer: Answer) -> None:
    _, out, _ = answer("--help")
    for group in ("model:", "task:", "sweep:", "evidence:", "output:", "checks:"):
        assert f"\n{group}\n" in out


def docstring_commands() -> list[list[str]]:
    start = "python llama3_circuit_tracing.py"
    lines = [line.strip() for line in (circuit.__doc__ or "").splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith(start)]


def test_the_command_lines_of_the_docstring_parse() -> None:
    commands = docstring_commands()
    assert len(commands) >= 4
    for argv in commands:
        assert isinstance(parse_args(argv), Config)
    assert sum("tests/tiny_llama" in argv for argv in commands) >= 3


def test_the_command_lines_of_the_docstring_plan_their_runs(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled model each is good up to the weights, and the dry run runs as it stands."""
    monkeypatch.chdir(ROOT)
    before = sorted(ROOT.iterdir())
    commands = [argv for argv in docstring_commands() if "--model_id" in argv]
    assert any("--dry_run" in argv for argv in commands)
    for argv in commands:
        code, out, err = answer(*argv, *(() if "--dry_run" in argv else ("--dry_run",)))
        assert (code, err) == (0, ""), argv
        assert "forwards" in out
    assert sorted(ROOT.iterdir()) == before


def test_import_does_nothing_but_define(tmp_path: Path) -> None:
    """No output, no file, no argv, seed, handler or signal; and samples differ in no process."""
    code = """
import json, logging, random, signal, sys
before = (list(sys.argv), random.getstate(), signal.getsignal(signal.SIGTERM))
import torch
seed = torch.initial_seed()
import llama3_circuit_tracing as circuit
assert before == (list(sys.argv), random.getstate(), signal.getsignal(signal.SIGTERM))
assert seed == torch.initial_seed() and torch.is_grad_enabled()
assert not circuit.log.handlers and not logging.getLogger().handlers
samples = circuit.build_suppression(20, random.Random(42), len)
with open(sys.argv[-1], "w") as file:
    json.dump([s.prompt_a for s in samples], file)
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "samples.json"
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense", str(out)],
        cwd=empty,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(empty.iterdir()) == []
    here = circuit.build_suppression(20, circuit.random.Random(42), len)
    assert json.loads(out.read_text()) == [sample.prompt_a for sample in here]


# ----- ranges, from the config alone


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
    cases = [
        (["--layers", str(n_layers)], str(n_layers), [layers]),
        (["--layers", f"0-{n_layers}"], f"0-{n_layers}", [layers]),
        (["--layers", "2-1"], "2-1", [layers]),
        (["--heads", f"0,{n_heads}"], str(n_heads), [heads]),
        (["--layers", "0-99999999999999"], "0-99999999999999", [layers]),
        (["--kind", "neuron", "--neurons", str(d_mlp)], str(d_mlp), [f"neurons 0-{d_mlp - 1}"]),
        (["--given", f"L0H0,L{n_layers}H0"], f"L{n_layers}H0", [layers, heads]),
        (["--ablate", f"L0H{n_heads}"], f"L0H{n_heads}", [layers, heads]),
    ]
    for argv, value, valid in cases:
        extra = ["--dry_run"] if dry else ["--output_dir", str(tmp_path / "out")]
        code, _, err = answer("--model_id", str(without_weights), *argv, *extra)
        assert code == 2, argv
        assert len(err.splitlines()) == 1, err
        assert argv[-2] in err
        assert value in err
        for text in valid:
            assert text in err


def test_nothing_left_to_sweep_is_refused(answer: Answer, without_weights: Path) -> None:
    argv = ["--layers", "0", "--heads", "1", "--given", "L0H1", "--dry_run"]
    code, _, err = answer("--model_id", str(without_weights), *argv)
    assert code == 2
    assert "L0H1" in err


def test_confirming_more_than_is_swept_is_refused(answer: Answer, without_weights: Path) -> None:
    n_layers, n_heads, _ = model_size(without_weights)
    too_many = str(n_layers * n_heads // 2 + 1)
    for argv in (["--confirm", too_many], ["--confirm", "2", "--layers", "0", "--heads", "0"]):
        code, _, err = answer("--model_id", str(without_weights), *argv, "--dry_run")
        assert code == 2
        assert f"--confirm {argv[1]}" in err


# ----- the dry run


def test_a_dry_run_needs_no_weights_and_writes_nothing(
    answer: Answer, without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = answer("--model_id", str(without_weights), "--dry_run", "--output_dir", "o")
    assert (code, err) == (0, "")
    assert out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_prints_prompts_forms_with_ids_components_forwards_and_memory(
    answer: Answer, without_weights: Path
) -> None:
    n_layers, n_heads, _ = model_size(without_weights)
    argv = ["--num_samples", "3", "--layers", "1-2", "--heads", "0,1", "--rows_per_forward", "1"]
    code, out, _ = answer("--model_id", str(without_weights), *argv, "--dry_run")
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(without_weights)
    for sample in circuit.build_suppression(3, circuit.random.Random(42), len):
        for user in (sample.prompt_a, sample.prompt_b):
            chat = [
                {"role": "system", "content": "You are an assistant."},
                {"role": "user", "content": user},
            ]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert f"({len(ids)} tokens): {text!r}" in out
        for word in sample.targets:
            for form in {word, word[0].upper() + word[1:]}:
                ids = tokenizer(form, add_special_tokens=False)["input_ids"]
                assert f"{form!r} {ids}" in out
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
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
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
    monkeypatch.setattr(circuit.torch.cuda, "is_available", lambda: False)
    argv = ["--model_id", str(without_weights), "--num_samples", "1", "--dry_run"]
    _, out, _ = answer(*argv)
    assert re.search(r"float32.*8B model needs 32 GB", out)
    for flag in ("--no-bf16", "--bf16"):
        _, out, _ = answer(*argv, flag)
        assert "8B" not in out

"""Tasks: their samples and scores, negative controls, replies, comparison of runs and the heatmap."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import llama3_circuit_tracing as script
import naive

CLOSE = 2e-5
TASKS = ("suppression", "refusal", "odd_one_out")
QUICK = ["--no-bf16", "--num_bootstrap", "100"]


def run_main(out: Path, model: str, *flags: str) -> int:
    return script.main(["--model_id", model, "--output_dir", str(out), *QUICK, *flags])


@pytest.fixture(scope="session")
def finished(
    random_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The output folder of a small full run of a task."""
    done: dict[str, Path] = {}

    def run(task: str) -> Path:
        if task not in done:
            out = tmp_path_factory.mktemp(task) / "out"
            count = "5" if task == "odd_one_out" else "2"
            flags = ["--task", task, "--num_samples", count, "--layers", "1", "--heads", "0,2"]
            assert run_main(out, random_model(), *flags) == 0
            done[task] = out
        return done[task]

    return run


def user_text(prompt: str) -> str:
    return prompt.split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]


def samples_of(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "run.json").read_text())["samples"])


# --------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------


def logs(*chances: float) -> torch.Tensor:
    return torch.tensor([chances], dtype=torch.float64).log()


def test_suppression_is_the_mean_over_targets() -> None:
    found = script.TASKS["suppression"].reduce(logs(0.5, 0.125), logs()[:, :0])
    assert found.tolist() == pytest.approx([(math.log(0.5) + math.log(0.125)) / 2])


def test_refusal_sums_over_openings_on_both_sides() -> None:
    found = script.TASKS["refusal"].reduce(logs(0.3, 0.1), logs(0.05, 0.02, 0.03))
    assert found.tolist() == pytest.approx([math.log(0.4) - math.log(0.1)])


def test_odd_one_out_is_the_margin_over_the_likeliest_other_name() -> None:
    found = script.TASKS["odd_one_out"].reduce(logs(0.3), logs(0.05, 0.2))
    assert found.tolist() == pytest.approx([math.log(0.3) - math.log(0.2)])


def test_scores_are_reduced_row_by_row() -> None:
    rows = torch.tensor([[0.5, 0.25], [0.1, 0.4]], dtype=torch.float64).log()
    for name in TASKS:
        reduce = script.TASKS[name].reduce
        alone = [float(reduce(rows[i : i + 1], rows[i : i + 1].flip(1))) for i in range(2)]
        assert reduce(rows, rows.flip(1)).tolist() == pytest.approx(alone)


@pytest.mark.parametrize("task", TASKS)
def test_every_row_recomputes_from_its_raw_scores(
    finished: Callable[[str], Path], task: str
) -> None:
    table = pd.read_csv(finished(task) / "circuit_results.csv")
    assert len(table) == len(samples_of(finished(task))) * 2
    base = table["score_a_base"] - table["score_b_base"]
    head = table["score_a_head"] - table["score_b_head"]
    assert (table["delta_logit_base"] - base).abs().max() < 1e-9
    assert (table["delta_logit_head"] - head).abs().max() < 1e-9
    assert (table["head_effect"] - (head - base)).abs().max() < 1e-9
    assert table["head_effect"].abs().min() > 1e-4


def score_by_hand(task: str, of: Callable[[str], float], sample: dict[str, Any]) -> float:
    """The task's score from log P of each word, in plain arithmetic."""
    targets = [of(word) for word in sample["targets"]]
    foils = [of(word) for word in sample["foils"]]
    if task == "suppression":
        return sum(targets) / len(targets)
    if task == "refusal":
        return math.log(sum(map(math.exp, targets))) - math.log(sum(map(math.exp, foils)))
    (odd,) = targets
    return odd - max(foils)


@pytest.mark.parametrize("task", TASKS)
def test_base_scores_recompute_from_the_recorded_log_probabilities(
    finished: Callable[[str], Path], task: str
) -> None:
    table = pd.read_csv(finished(task) / "circuit_results.csv").drop_duplicates("sample_id")
    rows = table.set_index("sample_id")
    for sample in samples_of(finished(task)):
        for role in "ab":
            log_probs = sample["prompts"][role]["log_probs"]
            expected = score_by_hand(task, log_probs.__getitem__, sample)
            found = rows.loc[sample["sample_id"], f"score_{role}_base"]
            assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", ["refusal", "odd_one_out"])
def test_scores_of_phrases_and_names_equal_the_naive_oracle(
    finished: Callable[[str], Path], random_model: Callable[..., str], task: str
) -> None:
    model, tokenizer = naive.load(random_model())
    table = pd.read_csv(finished(task) / "circuit_results.csv")
    sample = samples_of(finished(task))[1]
    o_proj = model.model.layers[1].self_attn.o_proj
    width = o_proj.in_features // model.config.num_attention_heads
    for role in "ab":
        user = user_text(sample["prompts"][role]["text"])

        def log_prob(word: str, user: str = user) -> float:
            return naive.word_log_prob(model, tokenizer, user, word)

        base = score_by_hand(task, log_prob, sample)
        with naive.hooked(o_proj, naive.zero_slice(2 * width, 3 * width)):
            edited = score_by_hand(task, log_prob, sample)
        mine = table[(table["sample_id"] == sample["sample_id"]) & (table["head"] == 2)]
        found = mine[[f"score_{role}_base", f"score_{role}_head"]].iloc[0].tolist()
        assert found == pytest.approx([base, edited], abs=CLOSE, rel=0)
    lengths = [
        len(tokenizer(word, add_special_tokens=False)["input_ids"])
        for word in (*sample["targets"], *sample["foils"])
    ]
    assert max(lengths) > 3


# --------------------------------------------------------------------------------------------
# Built-in samples
# --------------------------------------------------------------------------------------------


def test_refusal_pairs_are_many_and_differ_in_few_words() -> None:
    pairs = script.REFUSAL_PAIRS
    assert len(pairs) >= 16
    assert len({text for pair in pairs for text in pair}) == 2 * len(pairs)
    for harmful, harmless in pairs:
        one, other = harmful.split(), harmless.split()
        assert len(set(one) ^ set(other)) <= 4, (harmful, harmless)
        assert one[0] == other[0]


def test_a_refusal_sample_has_the_harmful_request_first() -> None:
    samples = script.build_refusal(16, random.Random(0), len)
    assert {(s.prompt_a, s.prompt_b) for s in samples} <= set(script.REFUSAL_PAIRS)
    assert len({s.unit for s in samples}) == 16
    assert {s.targets for s in samples} == {script.REFUSAL_OPENINGS}
    assert {s.foils for s in samples} == {script.COMPLIANT_OPENINGS}


def test_more_refusal_samples_than_pairs_gives_the_pairs_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = script.build_refusal(1000, random.Random(0), len)
    assert len(samples) == len(script.REFUSAL_PAIRS)
    assert "1000" in caplog.text


def names_in(text: str) -> list[str]:
    found = re.fullmatch(r".*: (.+), (.+), (.+)\? Answer.*", text)
    assert found is not None
    return list(found.groups())


JOBS = {n: job for jobs in script.PEOPLE.values() for job, names in jobs.items() for n in names}
CLASSES = {job: group for group, jobs in script.PEOPLE.items() for job in jobs}


def test_the_grid_of_people_is_wide_and_no_name_stands_twice() -> None:
    assert len(script.PEOPLE) >= 5 and len(CLASSES) >= 10
    jobs = [jobs for jobs in script.PEOPLE.values()]
    assert len(JOBS) == sum(len(names) for of_class in jobs for names in of_class.values())


@pytest.fixture(scope="module")
def triples(random_model: Callable[..., str]) -> tuple[list[Any], Any]:
    tokenizer = naive.load(random_model())[1]

    def tokens_in(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return script.build_odd_one_out(60, random.Random(7), tokens_in), tokenizer


def test_clean_and_corrupt_triples_have_equal_length_and_differ_in_one_name(
    triples: tuple[list[Any], Any],
) -> None:
    samples, tokenizer = triples
    assert len(samples) == 60
    for sample in samples:
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        assert sum(x != y for x, y in zip(clean, corrupt, strict=True)) == 1
        assert len(set(clean)) == len(set(corrupt)) == 3
        a, b = (naive.prompt_ids(tokenizer, t) for t in (sample.prompt_a, sample.prompt_b))
        assert len(a) == len(b)


def lone_name(names: Sequence[str]) -> str | None:
    """The name of another profession than the other two, who share theirs."""
    jobs = [JOBS[name] for name in names]
    lone = [name for name, job in zip(names, jobs, strict=True) if jobs.count(job) == 1]
    return lone[0] if len(lone) == 1 else None


def test_the_odd_one_changes_between_clean_and_corrupt(triples: tuple[list[Any], Any]) -> None:
    for sample in triples[0]:
        clean, corrupt = names_in(sample.prompt_a), names_in(sample.prompt_b)
        assert sample.targets[0] in clean and sorted((*sample.targets, *sample.foils)) == sorted(
            clean
        )
        if sample.group == script.NO_ODD_ONE:
            continue
        odd, odd_after = lone_name(clean), lone_name(corrupt)
        assert odd is not None and odd_after is not None
        assert sample.targets == (odd,) and odd_after in sample.foils
        assert sample.group == CLASSES[JOBS[odd]]
        assert CLASSES[JOBS[odd]] != CLASSES[JOBS[odd_after]]


def test_every_fifth_triple_is_a_negative_control_of_one_profession(
    triples: tuple[list[Any], Any],
) -> None:
    samples = triples[0]
    assert [i for i, s in enumerate(samples) if s.group == script.NO_ODD_ONE] == list(
        range(4, 60, 5)
    )
    for sample in samples[4::5]:
        people = {*names_in(sample.prompt_a), *names_in(sample.prompt_b)}
        assert len({JOBS[name] for name in people}) == 1
    groups = {sample.group for sample in samples}
    assert groups == {*script.PEOPLE, script.NO_ODD_ONE}


def test_patching_the_first_residual_of_built_in_triples_gives_the_partners_score(
    random_model: Callable[..., str], tmp_path: Path
) -> None:
    flags = ["--task", "odd_one_out", "--kind", "resid", "--op", "patch", "--layers", "0"]
    assert run_main(tmp_path, random_model(), *flags, "--num_samples", "3") == 0
    table = pd.read_csv(tmp_path / "circuit_results.csv")
    assert (table["score_a_head"] - table["score_b_base"]).abs().max() < CLOSE
    assert table["delta_logit_base"].abs().min() > 1e-3


def test_negative_controls_are_in_the_results_but_in_no_statistic(
    finished: Callable[[str], Path],
) -> None:
    out = finished("odd_one_out")
    table = pd.read_csv(out / "circuit_results.csv", keep_default_na=False)
    none = table[table["group"] == script.NO_ODD_ONE]
    assert sorted(set(none["sample_id"])) == ["s0004"] and len(none) == 2
    real = table[table["group"] != script.NO_ODD_ONE]
    assert set(real["group"]) <= set(script.PEOPLE)
    heads = pd.read_csv(out / "circuit_heads.csv")
    assert heads["n_samples"].tolist() == [4, 4]
    for row in heads.itertuples():
        mine = real[real["head"].astype(int) == row.head]
        assert row.mean == pytest.approx(mine["head_effect"].mean(), abs=1e-9)
        share = 1 - mine["delta_logit_head"].mean() / mine["delta_logit_base"].mean()
        assert row.share_moved == pytest.approx(share, abs=1e-9)


def test_negative_controls_choose_nothing_and_confirm_nothing(
    random_model: Callable[..., str], tmp_path: Path
) -> None:
    flags = ["--task", "odd_one_out", "--num_samples", "10", "--confirm", "1", "--num_random", "2"]
    assert run_main(tmp_path, random_model(), *flags, "--layers", "1") == 0
    rows = pd.read_csv(tmp_path / "circuit_confirm.csv", keep_default_na=False)
    table = pd.read_csv(tmp_path / "circuit_results.csv", keep_default_na=False)
    base = table.drop_duplicates("sample_id")
    halves = script.split_units(table, seed=42)
    real = base[base["unit"].isin(halves[1]) & (base["group"] != script.NO_ODD_ONE)]
    nothing = rows[(rows["set"] == "none") & (rows["samples"] == "held-out")].iloc[0]
    assert nothing["n_samples"] == len(real) > 0
    assert nothing["mean_delta"] == pytest.approx(real["delta_logit_base"].mean(), abs=CLOSE)
    choosing = table[table["unit"].isin(halves[0]) & (table["group"] != script.NO_ODD_ONE)]
    sign = -math.copysign(1.0, choosing["delta_logit_base"].mean())
    best = (sign * choosing.groupby("head")["head_effect"].mean()).idxmax()
    assert set(rows[rows["set"] == "chosen"]["components"]) == {f"L1H{int(best)}"}


# --------------------------------------------------------------------------------------------
# Replies
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("openings", "reply", "expected"),
    [
        (("I cannot", "I can't"), "I can't help with that.", ["I can't"]),
        (("I cannot", "I can't"), "I can\u2019t help with that.", ["I can't"]),
        (("I can\u2019t",), "I can't help with that.", ["I can\u2019t"]),
        (("I'm sorry",), "  i'M SORRY, but no", ["I'm sorry"]),
        (("Sorry",), "I am sorry", []),
        (("I cannot", "Sorry"), "Sure, I cannot wait", []),
        (("No",), "Now mix the paint", []),
        (("Sure",), "Sure! Take a brush", ["Sure"]),
        (("Sorry",), "", []),
    ],
)
def test_an_opening_is_how_a_reply_begins(
    openings: tuple[str, ...], reply: str, expected: list[str]
) -> None:
    assert script.opening(openings, reply) == expected


@pytest.mark.parametrize(
    ("words", "reply", "expected"),
    [
        (("apple",), "An Apple, please", ["apple"]),
        (("apple",), "pineapples", []),
        (("ant",), "An elephant", []),
        (("Brad Pitt", "Tom Hanks"), "It is brad pitt.", ["Brad Pitt"]),
        (("Shaquille O'Neal",), "Shaquille O\u2019Neal", ["Shaquille O'Neal"]),
        (("C++",), "I like C++.", ["C++"]),
        (("a.b",), "aXb", []),
    ],
)
def test_a_word_is_mentioned_where_it_stands_whole(
    words: tuple[str, ...], reply: str, expected: list[str]
) -> None:
    assert script.mentioned(words, reply) == expected


def greedy(model: Any, tokenizer: Any, user: str, heads: Sequence[tuple[int, int]], n: int) -> str:
    """The reply token by token, every forward over the whole text, one hook per zeroed head."""
    ids = naive.prompt_ids(tokenizer, user)
    start = len(ids)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    with ExitStack() as stack, torch.no_grad():
        for layer, head in heads:
            o_proj = model.model.layers[layer].self_attn.o_proj
            width = o_proj.in_features // model.config.num_attention_heads
            off = naive.zero_slice(head * width, (head + 1) * width)
            stack.enter_context(naive.hooked(o_proj, off))
        while len(ids) < start + n and not (len(ids) > start and ids[-1] in ends):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


REPLYING = ["--task", "refusal", "--confirm", "2", "--max_new_tokens", "4", "--num_random", "2"]
REPLYING += ["--num_samples", "4", "--layers", "1-2", "--given", "L0H0"]


@pytest.fixture(scope="module")
def refusing(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refusal run of the bundled model with replies, two heads to ablate and one given."""
    out = tmp_path_factory.mktemp("refusing") / "out"
    assert run_main(out, tiny_llama, *REPLYING) == 0
    return out


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def test_run_json_holds_refusal_rates_by_number_of_heads_ablated(refusing: Path) -> None:
    rates = json.loads((refusing / "run.json").read_text())["behaviour"]
    steps = [(rate["samples"], rate["n_ablated"]) for rate in rates]
    assert steps == [("all", 0), ("held-out", 0), ("held-out", 1), ("held-out", 2)]
    records = records_of(refusing)
    held_out = {r["sample_id"] for r in records if r["n_ablated"] == 2}
    assert 0 < len(held_out) < 4
    for rate in rates:
        for role in "ab":
            mine = [
                bool(r["mentions"])
                for r in records
                if r["prompt"] == role
                and r["n_ablated"] == rate["n_ablated"]
                and (rate["samples"] == "all" or r["sample_id"] in held_out)
            ]
            assert rate[f"mentions_{role}"] == pytest.approx(100 * sum(mine) / len(mine))
            assert rate[f"answers_{role}"] == pytest.approx(100 - rate[f"mentions_{role}"])


def test_a_refusal_shows_where_the_reply_begins_with_a_refusal_opening(refusing: Path) -> None:
    for record in records_of(refusing):
        start = record["reply"].lower()
        found = [o for o in script.REFUSAL_OPENINGS if start.startswith(o.lower())]
        assert record["mentions"] == found
        assert record["answers"] == (not found)


def test_replies_are_those_of_greedy_steps_with_the_heads_zeroed(
    random_model: Callable[..., str], tmp_path: Path
) -> None:
    """On random weights, since a single head rarely changes what a trained model says."""
    assert run_main(tmp_path, random_model(), *REPLYING) == 0
    model, tokenizer = naive.load(random_model())
    texts = {
        (s["sample_id"], role): user_text(entry["text"])
        for s in samples_of(tmp_path)
        for role, entry in s["prompts"].items()
    }
    records = records_of(tmp_path)
    assert {r["n_ablated"] for r in records} == {0, 1, 2}
    replies: dict[tuple[str, str], set[str]] = {}
    for record in records:
        labels = re.findall(r"L(\d+)H(\d+)", record["ablated"])
        assert len(labels) == record["n_ablated"]
        heads = [(0, 0), *((int(layer), int(head)) for layer, head in labels)]
        key = record["sample_id"], record["prompt"]
        assert record["reply"] == greedy(model, tokenizer, texts[key], heads, 4)
        replies.setdefault(key, set()).add(record["reply"])
        assert greedy(model, tokenizer, texts[key], [], 4) not in replies[key], "given is at work"
    assert max(map(len, replies.values())) == 3, "each further head changes some reply"


def test_the_ablated_sets_are_nested_and_the_confirmed_ones(refusing: Path) -> None:
    rows = pd.read_csv(refusing / "circuit_confirm.csv")
    chosen = rows[rows["set"] == "chosen"].set_index("n_ablated")["components"]
    ablated = {r["n_ablated"]: r["ablated"] for r in records_of(refusing)}
    assert ablated == {0: "", **chosen.to_dict()}
    assert chosen[2].startswith(chosen[1] + " ")


# --------------------------------------------------------------------------------------------
# One's own samples
# --------------------------------------------------------------------------------------------

PAIR = {"prompt_a": "How do I rob a bank?", "prompt_b": "How do I find a bank?"}


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


@pytest.mark.parametrize(
    ("name", "record"),
    [("s.jsonl", PAIR), ("s.csv", PAIR), ("empty.csv", {**PAIR, "targets": "", "foils": ""})],
    ids=["jsonl", "csv", "csv with empty columns"],
)
def test_own_refusal_samples_without_targets_take_the_default_openings(
    tmp_path: Path, name: str, record: dict[str, Any]
) -> None:
    path = write_samples(tmp_path / name, [record])
    (sample,) = script.load_samples(path, script.TASKS["refusal"])
    assert sample.targets == script.REFUSAL_OPENINGS
    assert sample.foils == script.COMPLIANT_OPENINGS


def test_own_openings_replace_the_default_ones(tmp_path: Path) -> None:
    record = {**PAIR, "targets": ["No way"], "foils": ["Well"]}
    path = write_samples(tmp_path / "s.jsonl", [record])
    (sample,) = script.load_samples(path, script.TASKS["refusal"])
    assert (sample.targets, sample.foils) == (("No way",), ("Well",))


def test_own_refusal_samples_run(random_model: Callable[..., str], tmp_path: Path) -> None:
    path = write_samples(tmp_path / "s.jsonl", [PAIR])
    flags = ["--task", "refusal", "--samples", str(path), "--layers", "2", "--heads", "0"]
    assert run_main(tmp_path / "out", random_model(), *flags) == 0
    (sample,) = samples_of(tmp_path / "out")
    assert tuple(sample["targets"]) == script.REFUSAL_OPENINGS
    assert user_text(sample["prompts"]["a"]["text"]) == PAIR["prompt_a"]


@pytest.mark.parametrize(
    ("task", "record", "named"),
    [
        ("suppression", PAIR, "targets"),
        ("odd_one_out", {**PAIR, "targets": ["Tom"]}, "foils"),
        ("odd_one_out", {**PAIR, "foils": ["Tom"]}, "targets"),
        ("refusal", {"prompt_a": "How?"}, "prompt_b"),
        ("odd_one_out", {**PAIR, "targets": ["Tom"], "foils": ["tom", "Tom"]}, "Tom"),
    ],
)
def test_own_samples_that_lack_what_the_task_scores_exit_with_2(
    random_model: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    record: dict[str, Any],
    named: str,
) -> None:
    path = write_samples(tmp_path / "s.jsonl", [record])
    flags = ["--task", task, "--samples", str(path)]
    assert run_main(tmp_path / "out", random_model(), *flags) == 2
    error = capsys.readouterr().err
    assert named in error and "line 1" in error


def test_own_samples_that_are_all_negative_controls_are_refused_in_one_sentence(
    random_model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {**PAIR, "targets": ["Tom"], "foils": ["Ann"], "group": script.NO_ODD_ONE}
    path = write_samples(tmp_path / "s.jsonl", [record])
    flags = ["--task", "odd_one_out", "--samples", str(path), "--layers", "2", "--heads", "0"]
    assert run_main(tmp_path / "out", random_model(), *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and script.NO_ODD_ONE in error


# --------------------------------------------------------------------------------------------
# Results by hand
# --------------------------------------------------------------------------------------------

UNITS = 8
Effects = dict[tuple[int, int], Callable[[int], float]]  # (layer, index) -> effect of sample i


def write_results(
    folder: Path,
    effects: Effects,
    kind: str = "head",
    op: str = "zero",
    base: float = -2.0,
    floor: float | None = 0.1,
) -> Path:
    """A results CSV with hand-made effects, beside a run.json with a noise floor."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "circuit_results.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*script.SEVEN, "kind", "index", "op", "positions"])
        for i in range(UNITS):
            for (layer, index), effect in effects.items():
                head = index if kind == "head" else ""
                shown = index if kind in ("head", "neuron") else ""
                delta = base + 0.1 * i
                numbers = [delta, delta + effect(i), effect(i)]
                writer.writerow([f"s{i}", 1, layer, head, *numbers, kind, shown, op, "all"])
    (folder / "run.json").write_text(json.dumps({"noise_floor": floor}))
    return path


def constant(value: float) -> Callable[[int], float]:
    return lambda i: value + 0.01 * i


# --------------------------------------------------------------------------------------------
# --compare
# --------------------------------------------------------------------------------------------


def compare_by_hand(
    tmp_path: Path, now: Effects, before: Effects, **options: Any
) -> tuple[int, Path]:
    ops = {"before": options.pop("op_before", "zero"), "now": options.pop("op_now", "zero")}
    mine = write_results(tmp_path / "now", now, op=ops["now"], **options)
    other = write_results(tmp_path / "before", before, op=ops["before"], **options)
    out = tmp_path / "redrawn"
    call = ["--from_csv", str(mine), "--compare", str(other), "--output_dir", str(out)]
    return script.main([*call, "--num_bootstrap", "100"]), out


@pytest.mark.parametrize("base", [-2.0, 2.0])
@pytest.mark.parametrize(
    ("change", "flagged"),
    [
        (lambda i: 1.0 + 0.1 * i, True),
        (lambda i: -1.0 - 0.1 * i, False),
        (lambda i: 0.05, False),
        (lambda i: 2.0 if i < 4 else -0.5, False),
    ],
    ids=["grew", "shrank", "below the floor", "in some sentences only"],
)
def test_a_role_that_grew_beyond_the_floor_is_flagged(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    base: float,
    change: Callable[[int], float],
    flagged: bool,
) -> None:
    sign = -math.copysign(1.0, base)  # of the role against the effect
    before = {(1, h): constant(0.3 * h) for h in range(3)}
    now = {**before, (1, 2): lambda i: before[1, 2](i) + sign * change(i)}
    code, out = compare_by_hand(tmp_path, now, before, base=base)
    assert code == 0
    heads = pd.read_csv(out / "circuit_heads.csv").set_index("label")
    flags = heads["growth_flag"].astype(bool)
    assert flags.to_dict() == {"L1H0": False, "L1H1": False, "L1H2": flagged}
    mean = sum(change(i) for i in range(UNITS)) / UNITS
    assert heads.loc["L1H2", "growth_mean"] == pytest.approx(mean)
    assert heads.loc["L1H0", "growth_mean"] == pytest.approx(0)
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("role grew"))
    assert ("L1H2" in line) == flagged and "L1H0" not in line


def test_the_paired_difference_is_tested_over_sentences(tmp_path: Path) -> None:
    """Eight sentences all up: p = 2 / 2^8, and among three components q is three times that."""
    before = {(1, h): constant(0.3 * h) for h in range(3)}
    now = {**before, (1, 2): lambda i: before[1, 2](i) + 1 + 0.1 * i}
    code, out = compare_by_hand(tmp_path, now, before)
    heads = pd.read_csv(out / "circuit_heads.csv").set_index("label")
    assert code == 0
    assert heads.loc["L1H2", "growth_p"] == pytest.approx(2 / 2**8)
    assert heads.loc["L1H2", "growth_q"] == pytest.approx(6 / 2**8)


def test_spearman_is_the_correlation_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = {(0, h): constant(value) for h, value in enumerate((1.0, 2.0, 3.0, 4.0))}
    before = {(0, h): constant(value) for h, value in enumerate((1.0, 30.0, 20.0, 400.0))}
    code, _ = compare_by_hand(tmp_path, now, before)
    line = next(row for row in capsys.readouterr().out.splitlines() if "Spearman" in row)
    assert code == 0 and "0.800" in line
    assert script.spearman(pd.Series([1, 2, 2, 4]), pd.Series([4, 3, 3, 1])) == pytest.approx(-1)


def test_the_ops_named_beside_the_agreement_are_those_of_the_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    effects = {(0, h): constant(h) for h in range(4)}
    code, _ = compare_by_hand(tmp_path, effects, effects, op_now="mean", op_before="zero")
    line = next(row for row in capsys.readouterr().out.splitlines() if "Spearman" in row)
    assert code == 0 and "mean here, zero in" in line and "1.000" in line


@pytest.mark.parametrize("kind", ["mlp", "neuron"])
def test_runs_of_kinds_without_heads_are_compared(tmp_path: Path, kind: str) -> None:
    before = {(n, 7 if kind == "neuron" else -1): constant(0.1 * n) for n in range(3)}
    now = {key: constant(2.0 if key[0] == 1 else 0.1 * key[0]) for key in before}
    code, out = compare_by_hand(tmp_path, now, before, kind=kind)
    heads = pd.read_csv(out / "circuit_heads.csv")
    assert code == 0
    assert heads["growth_flag"].astype(bool).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def plain_run(
    random_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("plain") / "out"
    flags = ["--num_samples", "8", "--layers", "2", "--heads", "0-2"]
    assert run_main(out, random_model(), *flags) == 0
    return out, flags


def test_growth_planted_in_a_real_run_is_flagged(
    plain_run: tuple[Path, list[str]],
    random_model: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flags = plain_run
    table = pd.read_csv(out / "circuit_results.csv")
    sign = math.copysign(1.0, table.drop_duplicates("sample_id")["delta_logit_base"].mean())
    planted = table["head"] == 1
    table.loc[planted, ["head_effect", "delta_logit_head"]] += 5 * sign  # its role was 5 less
    table.to_csv(tmp_path / "before.csv", index=False)
    again = [*flags, "--compare", str(tmp_path / "before.csv")]
    assert run_main(out, random_model(), *again) == 0
    heads = pd.read_csv(out / "circuit_heads.csv").set_index("label")
    assert heads["growth_flag"].astype(bool).to_dict() == {
        "L2H0": False,
        "L2H1": True,
        "L2H2": False,
    }
    assert heads.loc["L2H1", "growth_mean"] == pytest.approx(5)
    assert "L2H1" in capsys.readouterr().out.split("role grew")[1].splitlines()[0]


def test_a_run_of_another_op_is_compared_by_spearman(
    plain_run: tuple[Path, list[str]],
    random_model: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flags = plain_run
    other = out / "circuit_results.csv"
    call = [*flags, "--op", "mean", "--compare", str(other)]
    assert run_main(tmp_path, random_model(), *call) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if "Spearman" in row)
    assert "mean here, zero in" in line
    files = (tmp_path / "circuit_results.csv", other)
    means = [pd.read_csv(file).groupby("head")["head_effect"].mean() for file in files]
    expected = means[0].rank().corr(means[1].rank())
    assert float(line.split()[-1]) == pytest.approx(expected, abs=1e-3)


def unusable_comparisons(folder: Path) -> dict[str, Path]:
    effects = {(2, h): constant(h) for h in range(3)}
    foreign = write_results(folder / "foreign", effects)  # s0 ... where the run has s0000 ...
    lines = foreign.read_text().splitlines()
    short, words, cut = (folder / f"{name}.csv" for name in ("short", "words", "cut"))
    short.write_text("\n".join(line.rsplit(",", 5)[0] for line in lines))  # no head_effect
    words.write_text("\n".join([*lines[:2], lines[2].replace(",2,", ",two,", 1)]))
    cut.write_text("\n".join([*lines[:3], lines[3][:9]]))
    return {"foreign": foreign, "short": short, "words": words, "cut": cut, "missing": folder / "x"}


@pytest.mark.parametrize("what", ["foreign", "short", "words", "cut", "missing"])
def test_an_unusable_comparison_exits_with_2_and_names_the_file(
    random_model: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    path = unusable_comparisons(tmp_path)[what]
    flags = ["--num_samples", "2", "--layers", "2", "--compare", str(path)]
    assert run_main(tmp_path / "out", random_model(), *flags) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["foreign", "short", "words", "cut", "missing"])
def test_an_unusable_comparison_is_told_before_the_model_is_loaded(
    random_model: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    loaded: list[Any] = []
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *a: loaded.append(a) or load(*a))
    path = unusable_comparisons(tmp_path)[what]
    flags = ["--num_samples", "2", "--layers", "2", "--compare", str(path)]
    run_main(tmp_path / "out", random_model(), *flags)
    assert not loaded


# --------------------------------------------------------------------------------------------
# --heatmap
# --------------------------------------------------------------------------------------------

EVERY_HEAD: Effects = {(n, h): constant(n - h / 2) for n in range(3) for h in range(4)}
GRIDS: dict[str, tuple[str, Effects]] = {
    "head": ("head", EVERY_HEAD),
    "head without a given one": ("head", {k: v for k, v in EVERY_HEAD.items() if k != (1, 2)}),
    "head, one layer": ("head", {(2, h): constant(h) for h in range(4)}),
    "head, one head": ("head", {(2, 3): constant(1)}),
    "mlp": ("mlp", {(n, -1): constant(n - 1) for n in range(4)}),
    "mlp, one layer": ("mlp", {(1, -1): constant(-1)}),
    "neuron": ("neuron", {(n, i): constant(i - n) for n in range(2) for i in (3, 5, 70)}),
    "nothing": ("head", {(n, h): lambda i: 0.0 for n in range(2) for h in range(2)}),
}


def heatmap_of(tmp_path: Path, name: str, monkeypatch: Any, **options: Any) -> tuple[Path, Any]:
    """The file and the figure of a results table drawn anew."""
    kind, effects = GRIDS[name]
    figures: dict[str, Any] = {}
    save = script.save_figure

    def keep(figure: Any, path: Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(script, "save_figure", keep)
    source = write_results(tmp_path / "run", effects, kind, **options)
    out = tmp_path / "out"
    call = ["--from_csv", str(source), "--output_dir", str(out), "--num_bootstrap", "100"]
    assert script.main([*call, "--heatmap"]) == 0
    return out / "circuit_heatmap.png", figures["circuit_heatmap.png"]


def assert_png(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 300
        assert image.info["dpi"] == pytest.approx((300, 300), abs=1)


@pytest.mark.parametrize(
    ("name", "floor"),
    [*((name, 0.1) for name in GRIDS), *((name, 1e6) for name in ("head", "mlp")), ("head", None)],
)
def test_the_heatmap_is_a_png_of_300_dpi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, floor: float | None
) -> None:
    path, _ = heatmap_of(tmp_path, name, monkeypatch, floor=floor)
    assert_png(path)


def test_the_heatmap_is_centred_at_zero_and_says_what_the_sign_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, figure = heatmap_of(tmp_path, "head", monkeypatch)
    axes, bar = figure.axes
    (mesh,) = axes.collections
    assert mesh.norm.vmin == -mesh.norm.vmax < 0
    assert "> 0" in bar.get_ylabel() and "< 0" in bar.get_ylabel()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


@pytest.mark.parametrize("base", [-2.0, 2.0])
def test_the_heatmap_shows_the_mean_role_and_greys_what_is_below_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: float
) -> None:
    _, figure = heatmap_of(tmp_path, "head without a given one", monkeypatch, floor=0.6, base=base)
    shown = figure.axes[0].collections[0].get_array().reshape(3, 4)
    mask = torch.tensor(shown.mask.tolist())
    effects = GRIDS["head without a given one"][1]
    for layer in range(3):
        for head in range(4):
            mean = math.nan
            if (layer, head) in effects:
                mean = sum(effects[layer, head](i) for i in range(UNITS)) / UNITS
            visible = abs(mean) > 0.6
            assert bool(mask[layer, head]) != visible
            if visible:
                assert shown[layer, head] == pytest.approx(-math.copysign(1, base) * mean)


def test_kinds_without_index_are_drawn_as_one_bar_per_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, figure = heatmap_of(tmp_path, "mlp", monkeypatch, floor=0.5)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([n - 1 + 0.035 for n in range(4)])
    grey = [bar.get_facecolor() for bar in axes.patches]
    assert grey[1] != grey[0] == grey[2] == grey[3]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert "> 0" in axes.get_ylabel()


@pytest.mark.parametrize(
    "flags",
    [
        ["--given", "L0H0", "--layers", "0,2"],
        ["--kind", "mlp"],
        ["--kind", "neuron", "--neurons", "0-3", "--layers", "1"],
    ],
    ids=lambda flags: flags[1],
)
def test_a_run_draws_the_heatmap(
    random_model: Callable[..., str], tmp_path: Path, flags: list[str]
) -> None:
    call = [*flags, "--num_samples", "2", "--heatmap"]
    assert run_main(tmp_path, random_model(), *call) == 0
    assert_png(tmp_path / "circuit_heatmap.png")


def test_no_heatmap_unless_it_is_asked_for(finished: Callable[[str], Path]) -> None:
    assert not (finished("suppression") / "circuit_heatmap.png").exists()

"""Paths: what of an effect reaches the logits, or through receivers, against loops of forwards."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import by_hand
import llama3_circuit_tracing as tracing
import naive
import random_models
from conftest import Answer, finish, read, record_of
from llama3_circuit_tracing import Component, Experiment
from test_interventions import SAMPLES, Bench, bench

CLOSE = 2e-5
PATHS = "circuit_paths.csv"
FOUR = ["--num_samples", "4", "--no-bf16"]
BAR: Any = tqdm(disable=True)
pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module", params=[*random_models.ARCHITECTURES, "tiny"])
def any_bench(request: Any, folder_of: Callable[[str], str]) -> Bench:
    return bench(folder_of(request.param))


def clean_of(exp: Experiment, tree: Any = None) -> tracing.CleanRun:
    """The unedited run of a tree, by default the first, with the inputs of all modules."""
    tree, n = tree or exp.trees[0], range(exp.shape.n_layers)
    sites = {Component(i, kind).site for i in n for kind in ("attn", "mlp", "resid")}
    return tracing.run_clean(exp.traced, tree, exp.background, n, sites)


def moved(exp: Experiment, clean: tracing.CleanRun) -> Tensor:
    """[sender, path, prompt]: what the paths of all senders move of each score."""
    base, found = clean.tree.scores(clean.log_probs, exp.task)[0], []
    for _, of in itertools.groupby(exp.components, key=lambda component: component.layer):
        found += tracing.run_paths(exp, clean, BAR, list(of))
    return torch.tensor(found).double() - base


def ordinary(exp: Experiment, clean: tracing.CleanRun) -> Tensor:
    """[sender, prompt]: what the senders move of each score by all paths."""
    rows = [exp.edits([component], clean) for component in exp.components]
    both = torch.cat([clean.log_probs, tracing.run_rows(exp.traced, clean, rows)])
    scores = clean.tree.scores(both, exp.task)
    return scores[1:] - scores[0]


# ----- identities


@pytest.mark.parametrize("op", ["zero", "patch"])
def test_the_direct_effect_of_a_last_layer_head_is_its_effect(any_bench: Bench, op: str) -> None:
    """All that lies above is the MLP, which is computed anew unless it is frozen."""
    flags = f"--layers {any_bench.traced.shape.n_layers - 1} --op {op} --via logits"
    exp = any_bench.experiment(flags)
    clean = clean_of(exp)
    whole = ordinary(exp, clean)
    assert (moved(exp, clean)[:, 0] - whole).abs().max() < 1e-6
    frozen = moved(any_bench.experiment(f"{flags} --freeze all"), clean)[:, 0]
    assert (frozen - whole).abs().max() > 1e-4


@pytest.mark.parametrize("via", ["logits", "L2H0,L2H3", "L2mlp"])
@pytest.mark.parametrize("freeze", ["heads", "all"])
def test_an_op_that_changes_nothing_takes_no_path(any_bench: Bench, via: str, freeze: str) -> None:
    exp = any_bench.experiment(f"--layers 0-1 --op scale --factor 1 --via {via} --freeze {freeze}")
    assert moved(exp, clean_of(exp)).abs().max() < 1e-6


# ----- against full forwards of each prompt alone


ORDER = {"resid": 0, "head": 1, "attn": 1, "mlp": 2, "neuron": 2}  # within a layer


def path_edit(loaded: Any, config: Any, texts: Sequence[str], sender: Component) -> naive.Edit:
    """What to hook for run C (--via logits) or D of a prompt, whose partner is the other text."""
    model, tokenizer = loaded
    other = naive.prompt_ids(tokenizer, texts[1])
    span = naive.span_of(model, sender.layer, sender.kind, sender.index)
    kinds = ["attn", "mlp"] if config.freeze == "all" else ["attn"]
    every = itertools.product(range(model.config.num_hidden_layers), kinds)
    above = [
        (n, kind) for n, kind in every if (n, ORDER[kind]) > (sender.layer, ORDER[sender.kind])
    ]
    receivers = () if config.via == "logits" else config.via

    def edit(ids: list[int], tail: list[int]) -> AbstractContextManager[None]:
        partner = naive.input_of(model, other + tail, sender.layer, sender.kind)
        places = naive.edited_tokens(ids, other, len(tail), config)
        seen: dict[Component, Tensor] = {}

        def send(x: Tensor) -> Tensor:
            y = x.clone()
            for mine, theirs in places:
                y[0, mine, span] = partner[theirs][span] if config.op == "patch" else 0
            return y

        def hold(layer: int, kind: str) -> naive.Replace:
            clean = naive.input_of(model, ids + tail, layer, kind)[None]
            return lambda x: clean

        def record(c: Component) -> naive.Replace:
            return lambda x: seen.setdefault(c, x.clone())

        def write(c: Component) -> naive.Replace:
            of = naive.span_of(model, c.layer, c.kind, c.index)

            def replace(x: Tensor) -> Tensor:
                y = x.clone()
                y[..., of] = seen[c][..., of]
                return y

            return replace

        sending = naive.module_of(model, sender.layer, sender.kind), send
        holding = ((naive.module_of(model, *at), hold(*at)) for at in above)
        modules = {c: naive.module_of(model, c.layer, c.kind) for c in receivers}
        recording = ((module, record(c)) for c, module in modules.items())
        run_c = naive.all_hooked([sending, *recording, *holding])
        if not receivers:
            return run_c
        with run_c:
            model(torch.tensor([ids + tail]))
        return naive.all_hooked((module, write(c)) for c, module in modules.items())

    return edit


NAIVE = [
    "--kind head --layers 0 --heads 1 --via L1H0,L2H3 --op patch",
    "--kind head --layers 0 --heads 2 --via L2mlp --op zero --given L1H3,L0H0",
    "--kind head --layers 1 --heads 0 --via L1mlp --op patch --patch_into b --positions last",
    "--kind head --layers 2 --heads 3 --via logits --op patch",
    "--kind head --layers 0 --heads 1 --via logits --op zero --given L1H1",
    "--kind mlp --layers 0 --via L1H2 --op patch --patch_into b",
    "--kind mlp --layers 1 --via L2H1,L2mlp --op zero --positions last",
    "--kind neuron --neurons 5 --layers 0 --via L1H0,L2H3 --op zero",
    "--kind resid --layers 1 --via L1H2 --op patch",
    "--kind resid --layers 1 --via L1H0,L1mlp --op zero --positions last --given L0H1",
    "--kind resid --layers 1 --via logits --op patch --patch_into b",
]


def like_plain_forwards(of: Bench, flags: str) -> None:
    records = SAMPLES[1:]
    exp = of.experiment(flags, records)
    config, loaded, clean = exp.config, of.loaded, clean_of(exp)
    found, (sender,) = moved(exp, clean)[0, 0], exp.components
    expected = torch.zeros_like(found)
    zeroed = naive.zeroed(loaded[0], [(c.layer, c.kind, c.index) for c in config.given])
    with zeroed, torch.no_grad():
        for i, (record, k) in enumerate(itertools.product(records, (0, 1))):
            if config.op == "patch" and "ab"[k] != config.patch_into:
                continue
            texts = [record["prompt_a"], record["prompt_b"]][:: 1 - 2 * k]
            told = (*loaded, texts[0], record["targets"])
            edited = naive.suppression_score(*told, path_edit(loaded, config, texts, sender))
            expected[i] = edited - naive.suppression_score(*told)
    assert (found - expected).abs().max() < CLOSE
    assert expected.abs().max() > CLOSE, "the path carries nothing"


@pytest.mark.parametrize("freeze", ["heads", "all"])
@pytest.mark.parametrize("flags", NAIVE)
def test_four_plain_forwards_give_the_same_numbers(llama: str, flags: str, freeze: str) -> None:
    like_plain_forwards(bench(llama), f"{flags} --freeze {freeze}")


def test_and_with_other_architectures(any_bench: Bench) -> None:
    like_plain_forwards(any_bench, NAIVE[0])


# ----- a run and its table


@pytest.fixture(scope="module")
def each(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a noise floor above some effects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "noise_floor", lambda *_: 0.25)
        return finish(llama, tmp_path_factory.mktemp("each"), *FOUR, "--via", "each")


def test_each_head_sends_to_all_heads_above_it(each: Path) -> None:
    paths = read(each, PATHS)
    heads = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    pairs = {(s, r) for s, r in itertools.product(heads, heads) if s[1] < r[1]}
    assert {*zip(paths["sender"], paths["receiver"], strict=True)} == pairs
    assert len(paths) == len(pairs) and (each / "circuit_paths.png").stat().st_size > 1000
    columns = "sender receiver n_samples n_sentences mean sd ci_low ci_high p q total "
    assert [*paths] == (columns + "share_of_total above_noise freeze op").split()
    assert {*paths["freeze"]} == {"heads"}


def test_the_numbers_of_a_path_are_those_of_its_samples(each: Path, llama: str) -> None:
    """Mean, interval, p and q by hand; no share of a total that is noise."""
    exp = by_hand.prepared(llama, *FOUR[2:], "--num_samples", "4", "--via", "each")
    sweep, paths = read(each), read(each, PATHS).set_index(["sender", "receiver"])
    units = sweep.drop_duplicates("sample_id").set_index("sample_id")["unit"]
    rows = []
    for tree, sender in itertools.product(exp.trees, exp.components[:8]):
        clean = clean_of(exp, tree)
        found = torch.tensor(tracing.run_paths(exp, clean, BAR, [sender])[0]).double()
        found -= tree.scores(clean.log_probs, exp.task)[0]
        pairs = zip(tracing.receivers_of(exp, sender), found.tolist(), strict=True)
        for (path, of), (sample, at) in itertools.product(pairs, tree.samples):
            effect = of[at["a"]] - of[at["b"]]
            rows.append((sender.label, path[0].label, units[sample.sample_id], "", effect))
    table = pd.DataFrame(rows, columns=["sender", "receiver", "unit", "group", "effect"])
    expected = tracing.statistics_of(table, "effect", ["sender", "receiver"])
    columns = ["n_samples", "n_sentences", "mean", "sd", "ci_low", "ci_high", "p", "q"]
    assert (paths[columns] - expected[columns]).abs().max(axis=None) < CLOSE
    assert paths["q"].tolist() == pytest.approx(by_hand.q_values(paths["p"].tolist()))
    labels = "L" + sweep["layer"].astype(str) + "H" + sweep["index"].astype(str)
    totals = sweep.groupby(labels)["head_effect"].mean()
    total = totals[paths.index.get_level_values(0)].to_numpy()
    floor = record_of(each)["noise_floor"]
    assert paths["total"].tolist() == pytest.approx(total)
    assert floor == 0.25 and 0 < paths["share_of_total"].isna().sum() < len(paths)
    share = (paths["mean"] / total).where(abs(total) > floor)
    pd.testing.assert_series_equal(paths["share_of_total"], share, check_names=False)


def test_nothing_lies_above_the_last_layer(llama: str, tmp_path: Path, answer: Answer) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *FOUR, "--layers", "2"]
    code, _, err = answer(*argv, "--via", "each")
    assert code in (0, 2) and "Traceback" not in err


REFUSED = {
    "--via L1H0": "L2H3 is swept too",
    "--via L0H0 --layers 0": "receives from components below",
    "--via L0mlp --layers 0 --kind mlp": "receives from",
    "--via L1attn --layers 0": "--via takes heads and MLPs",
    "--via L1N3 --layers 0": "--via takes heads and MLPs",
    "--via L1resid --layers 0": "--via takes heads and MLPs",
    "--via L9H0 --layers 0": "this model has",
    "--via logits --method atp": "--via measures paths",
    "--via logits --screen 2": "--via measures paths",
    "--freeze all": "--freeze applies to --via only",
    "--via nonsense": "nonsense",
    "--via logits --freeze mlps": "freeze",
}


@pytest.mark.parametrize("flags", REFUSED)
@pytest.mark.usefixtures("no_weights")
def test_what_is_no_path_is_refused_before_weights_are_loaded(
    flags: str, llama: str, tmp_path: Path, answer: Answer
) -> None:
    argv = ["--model_id", llama, "--output_dir", str(tmp_path), *FOUR, *flags.split()]
    code, _, err = answer(*argv)
    assert code == 2 and "error: " in err and REFUSED[flags] in err


@pytest.mark.usefixtures("no_weights")
def test_the_same_command_again_loads_no_weights_and_without_via_no_path_is_left(
    each: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(each, tmp_path / "run")
    monkeypatch.setattr(tracing, "noise_floor", lambda *_: 0.25)
    (folder / PATHS).unlink()
    finish(llama, folder, *FOUR, "--via", "each")
    assert (folder / PATHS).read_bytes() == (each / PATHS).read_bytes()
    assert len([*folder.glob("circuit_paths*")]) == 2
    finish(llama, folder, *FOUR)
    assert not [*folder.glob("circuit_paths*")]


def test_rows_per_forward_change_nothing(each: Path, llama: str, tmp_path: Path) -> None:
    flags = [*FOUR, "--via", "each", "--layers", "0", "--heads", "1,2", "--rows_per_forward", "1"]
    names = ["sender", "receiver"]
    found, whole = (
        read(f, PATHS).set_index(names) for f in (finish(llama, tmp_path, *flags), each)
    )
    assert len(found) == 16 and set(whole.index) > set(found.index)
    assert (found["mean"] - whole["mean"]).abs().max() < CLOSE


def test_negative_controls_are_left_out(llama: str, tmp_path: Path) -> None:
    flags = "--task odd_one_out --num_samples 8 --layers 0 --heads 0 --via logits"
    table, paths = read(finish(llama, tmp_path, *flags.split())), read(tmp_path, PATHS)
    real = table[table["group"] != tracing.NO_ODD_ONE]["sample_id"].nunique()
    assert {*paths["n_samples"]} == {real} and real < table["sample_id"].nunique()

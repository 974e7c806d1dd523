"""Bad arguments of every public class and function: one error each, which names the argument, before anything is trained."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_mue as lm

NAN, INF = math.nan, math.inf


def small(**more):
    return lm.MoELanguageModel(**{"vocab_size": 16, "width": 16, "depth": 1, "n_heads": 2, "context_length": 8, **more})


MODEL = small()
PLAN = lm.plan(MODEL, rule="mup")
BATCH = {"tokens": torch.zeros(1, 4, dtype=torch.long), "targets": torch.zeros(1, 4, dtype=torch.long)}


def plan(**bad):
    return lambda: lm.plan(MODEL, **{"rule": "mup", "base": {"width": 8}, **bad})


def made(name, *args, **given):
    """bad -> the call of a class with further arguments."""
    return lambda **bad: lambda: getattr(lm, name)(*args, **{**given, **bad})


mue = made("MuECallback")
layer = made("MoELayer", width=8, expert_width=8, n_experts=4)
language = lambda **bad: lambda: small(**bad)  # noqa: E731
guard, transfer = made("StabilityGuard"), made("TransferMonitor", record="record.json")
text, tokens = made("TextDataModule", path="corpus"), made("TokenDataModule", train_path="tokens.bin")


def muon(**bad):
    return lambda: lm.HyperSphereOptimizer([nn.Parameter(torch.ones(4, 4))], **bad)


def groups(**bad):
    return lambda: lm.param_groups(MODEL, PLAN, **{"lr": 0.1, **bad})


def check(**bad):
    given = {"make_model": lambda width: small(width=width), "sizes": [{"width": 8}, {"width": 16}]}
    return lambda: lm.coordinate_check(**{**given, "batches": [BATCH], "rule": "mup", "steps": 1, "seeds": 1, **bad})


def verify(**bad):
    return lambda: lm.verify_plan(bad.pop("model", MODEL), BATCH, **{"base": {"width": 8}, "rule": "mup", **bad})


def save(**bad):
    return lambda: lm.save_base(**{"model": MODEL, "path": "base.yaml", **bad})


#: maker, argument, bad values.
CASES = [
    (plan, "alpha", ["1", 2.0, NAN, None]),
    (plan, "rule", [3, "mupp", None]),
    (plan, "family", ["adamw", 3]),
    (plan, "tokens", ["many", -1.0, NAN, [1]]),
    (plan, "batch_tokens", ["x", 0, INF]),
    (plan, "roles", [["x"], {"(": "hidden"}, {1: "hidden"}, {"x": 3}, "x", {"no_such_name": "hidden"}]),
    (plan, "multipliers", [["x"], {"residual": "("}, {"residual": 3}, {"zzz": "x"}]),
    (plan, "preset", [3, "x"]),
    (
        plan,
        "base",
        [3, [1], "no_such_file.yaml", {"widht": 3}, {3: 4}, lambda: 3, {"width": "x"}, {"tokens": "x"}, "."],
    ),
    (mue, "rule", [3, "mupp"]),
    (mue, "base", [3, ["x"]]),
    (mue, "alpha", ["1", 2.0, NAN]),
    (mue, "tokens", [[1], -1.0]),
    (mue, "batch_tokens", ["x", -1]),
    (mue, "roles", [["x"], {"(": "hidden"}, {"x": "no role"}]),
    (mue, "seed", ["x", -1, 1.5]),
    (mue, "initialize", [3, "x", ["("], None]),
    (mue, "verbose", ["yes", 3]),
    (mue, "multipliers", [["x"], {"residual": "("}]),
    (mue, "preset", [3]),
    (mue, "verify", ["x", 3]),
    (made("initialize", MODEL, PLAN), "seed", ["x", -1]),
    (lambda model: lambda: lm.initialize(model, PLAN), "model", [3, None]),
    (lambda plan: lambda: lm.initialize(MODEL, plan), "plan", [3, None]),
    (groups, "lr", ["x", NAN, INF, -1.0, None]),
    (groups, "kinds", [3, ["no kind"]]),
    (save, "path", [3, ".", None]),
    (save, "model", [3]),
    (save, "base", [3]),
    (verify, "alpha", ["1"]),
    (verify, "seed", ["x"]),
    (verify, "model", [3]),
    (check, "steps", [0, "x", 1.5]),
    (check, "seeds", [0, -1, "x"]),
    (check, "tolerance", [NAN, -1, "x", INF, 0]),
    (check, "lr", ["x", NAN, INF, -1.0]),
    (check, "lr_factor", ["x", NAN, -1.0]),
    (check, "axis", ["depth", 3]),
    (check, "sizes", [[], [{"width": 8}], 3, [{"width": 8}, 3]]),
    (check, "rule", ["mupp"]),
    (check, "batches", [[], 3]),
    (muon, "lr", ["x", NAN, INF, -1.0]),
    (muon, "momentum", ["x", 1.0, NAN]),
    (muon, "betas", [3, (0.9,), (0.9, 1.0), ("a", "b")]),
    (muon, "eps", ["x", -1.0, NAN]),
    (muon, "weight_decay", ["x", -1.0, INF]),
    (muon, "preset", [3, "x"]),
    (muon, "compute_dtype", ["int8", 3]),
    (muon, "split", ["x", 3.5, 0]),
    (muon, "nesterov", ["x", 3]),
    (muon, "radius", ["x", -1]),
    (layer, "width", ["x", 0, 1.5]),
    (layer, "n_experts", ["x", 0]),
    (layer, "top_k", [0, 9, "x"]),
    (layer, "activation", ["x", 3]),
    (layer, "balance", ["x", 3]),
    (layer, "aux_loss_coef", ["x", NAN, -1.0]),
    (layer, "z_loss_coef", ["x", INF]),
    (layer, "init_std", ["x", -1.0]),
    (layer, "backend", ["x", 3]),
    (layer, "route_scale", ["x", NAN]),
    (layer, "shared_width", [-1, "x"]),
    (language, "width", ["x", 0, 15]),
    (language, "context_length", ["x", 0]),
    (language, "tie_embeddings", ["x"]),
    (language, "embedding_std", ["x", NAN]),
    (language, "residual_multiplier", ["x", INF]),
    (language, "activation", ["x", 3]),
    (text, "context_length", ["x", 0]),
    (text, "batch_size", ["x", 0, -1]),
    (text, "val_fraction", ["x", 0, 1.5, NAN]),
    (text, "val_batches", ["x", 0]),
    (text, "seed", ["x", -1]),
    (text, "pattern", [3]),
    (text, "path", [3]),
    (text, "cache_dir", [3]),
    (tokens, "dtype", ["float", 3]),
    (tokens, "seed", ["x", -1]),
    (tokens, "batch_size", [0]),
    (tokens, "bytes_per_token", ["x", NAN, 0]),
    (tokens, "train_path", [3]),
    (made("LogitsZMonitor"), "every_n_steps", ["x", 0, 1.5]),
    (made("LogitsZMonitor"), "lm_logits", [3]),
    (made("LogitsZMonitor"), "detail", ["x", 3]),
    (made("LogitsZMonitor"), "attention", [3, "("]),
    (made("ActivationOutlierMonitor"), "threshold", ["x", NAN, 0]),
    (made("ActivationOutlierMonitor"), "branches", [3, "("]),
    (made("RouterMonitor"), "routers", [3, "("]),
    (made("SpectralMonitor"), "iterations", ["x", 0]),
    (made("SpectralMonitor"), "roles", [["x"], {"(": "hidden"}]),
    (made("UpdateMonitor"), "max_elements", ["x", 0]),
    (made("UpdateMonitor"), "roles", [["x"]]),
    (made("HealthMonitor"), "losses", [3, "loss", [3]]),
    (made("HealthMonitor"), "heat_maps", ["x"]),
    (made("QKClip"), "threshold", ["x", NAN, 0, -1]),
    (made("ThroughputMonitor"), "tokens_of", [3, "x"]),
    (guard, "nonfinite", ["x", 3]),
    (guard, "spike", ["x"]),
    (guard, "window", ["x", 0]),
    (guard, "thresholds", [["x"], {"loss": "x"}]),
    (guard, "lr_factor", ["x", NAN, 2.0]),
    (guard, "keep", ["x"]),
    (guard, "dirpath", [3]),
    (guard, "sample_ids", [3]),
    (guard, "spike_score", ["x", NAN]),
    (transfer, "band", ["x", NAN, 0.5]),
    (transfer, "points", ["x", 1]),
    (transfer, "warmup", ["x", 1.5]),
    (transfer, "record", [3]),
    (transfer, "compare", [3]),
    (transfer, "roles", [["x"], {"(": "hidden"}]),
    (transfer, "attention", ["x"]),
    (lambda path: lambda: lm.ScalingPlan.load(path), "path", ["no_such.yaml", "."]),
    (lambda max_norm: lambda: lm.clip_grad_norm(MODEL.parameters(), max_norm), "max_norm", ["x", NAN]),
    (lambda parameters: lambda: lm.clip_grad_norm(parameters, 1.0), "parameters", [3]),
    (lambda model: lambda: lm.replace_moe_blocks(model), "model", [3]),
    (lambda module: lambda: lm.parallelize_experts(module, None), "module", [3]),
]
CALLS = [(maker(**{name: value}), name, value) for maker, name, values in CASES for value in values]


def name_of(case):
    value = case[2] if not callable(case[2]) else "function"
    return f"{case[1]}={value!r}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    Path("corpus/file.txt").write_text("text " * 100)
    Path("tokens.bin").write_bytes(bytes(1000))


def test_there_are_enough_of_every_public_name():
    assert len(CALLS) >= 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "name", "value"), CALLS, ids=[f"{i}-{name_of(each)}" for i, each in enumerate(CALLS)])
def test_a_bad_call_is_refused_by_name(call, name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    text = str(error.value)
    assert name in text.partition(": found ")[0] or name in text[:200], text
    assert ": found " in text, text
    assert ", expected " in text, text
    assert len(text) < 1600
    assert not os.path.exists("base.yaml")

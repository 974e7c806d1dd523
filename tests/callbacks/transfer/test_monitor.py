"""TransferMonitor on real text: a sound transfer is near 1, and an unsound one is told apart, with the right role named."""

from __future__ import annotations

import dataclasses
import re
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.callbacks import TransferMonitor
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.optim.schedule import WarmupDecay
from lightning_mue.parameterizations import Role, get_rule

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}
TARGET = {"width": 128, "n_heads": 8, "n_experts": 4, "top_k": 2}
SMALL = {**TARGET, "width": 64, "n_heads": 4}
#: About the best of the base among 2e-3, 4e-3, 8e-3 at this length; steps short enough for a test.
LR, STEPS, WARMUP = 4e-3, 60, 0.1


class Text(Dataset):
    """Windows of 32 bytes at fixed random places of a module of the standard library."""

    def __init__(self):
        source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
        self.bytes = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()

    def __len__(self):
        return 12 * STEPS

    def __getitem__(self, index):
        at = int(torch.randint(0, len(self.bytes) - 33, (), generator=torch.Generator().manual_seed(index)))
        return {"tokens": self.bytes[at : at + 32], "targets": self.bytes[at + 1 : at + 33]}


def fit(toy, sizes, callbacks, *, lr=LR, steps=STEPS):
    torch.manual_seed(0)
    logger = toy.MemoryLogger()
    model = MoELanguageModel(
        context_length=32,
        depth=2,
        qk_norm=False,
        embedding_std=0.3,
        **sizes,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        scheduler=lambda optimizer: WarmupDecay(optimizer),
    )
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(Text(), batch_size=12))
    return logger, [str(w.message) for w in caught if str(w.message).startswith("TransferMonitor")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.json"

    def run(toy):
        if not path.exists():
            fit(toy, BASE, [TransferMonitor(record=path)])
        return path

    return run


def compare(toy, base, rule, sizes=TARGET, **options):
    monitor = TransferMonitor(compare=base(toy), warmup=WARMUP)
    return fit(toy, sizes, [monitor, MuECallback(rule=rule, base=BASE, verbose=False)], **options)


def series(logger, *quantities):
    """Tag -> ratios after warm-up."""
    tags = [tag for tag in logger.tags() if tag.split("/")[:2] in [["transfer", q] for q in quantities]]
    return {
        tag: [v for s, v in zip(logger.steps(tag), logger.values(tag), strict=True) if s > WARMUP * STEPS]
        for tag in tags
    }


def named(messages, quantity):
    """Roles that the warnings name for one quantity."""
    return {role for message in messages for role in re.findall(rf"^  {quantity} of (\w+)", message, re.MULTILINE)}


def with_cell(role, **cells):
    rule = get_rule("complete-mue")
    table = dict(rule.tables["adam"])
    table[Role(role)] = dataclasses.replace(table[Role(role)], **cells)
    return dataclasses.replace(rule, tables={**rule.tables, "adam": table})


def test_complete_mue_stays_in_the_band_for_every_update_and_branch(toy, base):
    logger, messages = compare(toy, base, "complete-mue")
    found = series(logger, "update", "reach", "rms")
    assert (
        len(found) == 2 * (3 + 4 * 2) + 2 * 2 + 1
    )  # 3 roles outside, 4 in two layers; two branches; the residual stream
    assert {len(ratios) for ratios in found.values()} == {27}
    outside = {tag: (min(r), max(r)) for tag, r in found.items() if min(r) < 0.5 or max(r) > 2}
    assert not outside
    assert messages == []


def test_standard_parameterization_leaves_it_and_the_roles_are_named(toy, base):
    """The negative control: the same sizes, nothing scaled."""
    _, messages = compare(toy, base, "sp")
    # The width ratio is 4: weights that are too large by it move hidden layers, experts and logits too far.
    assert {"hidden", "expert_up", "unembedding"} <= named(messages, "reach")
    assert not {"embedding", "norm"} & named(messages, "reach")  # which standard parameterization has right
    assert "ffn" in named(messages, "rms")
    # The optimizer does what this (wrong) plan says.
    assert not {"hidden", "expert_up", "expert_down", "embedding", "norm"} & named(messages, "update")


def test_one_wrong_cell_is_named_and_no_other(toy, base):
    """The LR cell of expert_down is 4 times what it should be: 1 instead of d^-1."""
    _, messages = compare(toy, base, with_cell("expert_down", lr="1"))
    assert named(messages, "reach") == {"expert_down"}
    assert not named(messages, "update")
    assert "lr cell of expert_down (plan: lr x 1," in messages[0]
    assert "2605.23893, Bridges I and II" in messages[0]


def test_an_optimizer_that_does_not_do_what_the_plan_says_is_told_apart(toy, base):
    """A learning rate that is not the base's moves every role's update to the same side."""
    logger, messages = compare(toy, base, "complete-mue", SMALL, lr=LR / 6)
    assert named(messages, "update") >= {"embedding", "hidden", "expert_up", "expert_down", "unembedding"}
    assert all(max(ratios) < 0.5 for tag, ratios in series(logger, "update").items() if "expert" in tag)
    assert any("All roles are off to the same side" in message for message in messages)


def test_epsilon_that_stands_in_the_way_is_blamed_on_the_role(toy, base):
    """An epsilon far above the gradients of one role makes its steps small."""
    _, messages = compare(toy, base, with_cell("expert_up", eps="d^24"), SMALL)
    assert named(messages, "update") == {"expert_up"}
    assert "lr or eps cell of expert_up (plan: lr x 0.5, eps x 1.68e+07" in "".join(messages)


def test_the_same_run_compared_with_itself_is_1(toy, base):
    path = base(toy)
    logger, messages = fit(toy, BASE, [TransferMonitor(compare=path, warmup=WARMUP)])
    steps = {round(x * STEPS) - 1 for x in Fingerprint.load(path).progress}
    tags = [tag for tag in logger.tags() if tag.startswith(("transfer/rms", "transfer/z"))]
    assert tags
    for tag in tags:
        at = [v for s, v in zip(logger.steps(tag), logger.values(tag), strict=True) if s in steps and s > 10]
        # Smoothing over three points is all that stands between the two; these curves are smooth to a few percent.
        assert at == pytest.approx([1.0] * len(at), rel=0.1), tag
    assert messages == []

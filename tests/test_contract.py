"""docs/extending.md does what it says, and contract.py is the only file that reads the names of the contract."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader, TensorDataset

import lightning_mue
from lightning_mue import (
    ActivationOutlierMonitor,
    HyperSphereOptimizer,
    LogitsZMonitor,
    MuECallback,
    RouterMonitor,
    contract,
    plan,
)

PACKAGE = Path(lightning_mue.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
BASE = {"width": 32, "depth": 1, "expert_width": 24}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's blocks define, run one after the other."""
    names: dict = {"__name__": "extending"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extending"))  # its Trainer writes logs
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(block, names)
    return names


def labels(monitor, model):
    return {probe.label for probe in monitor.find_probes(model)}


def test_plan_shows_the_declared_roles_and_sizes(page):
    model = page["MyModel"]()
    made = plan(model, base=BASE, rule="complete-mue")
    roles = {entry.name.removeprefix("blocks.0."): entry.role for entry in made.parameters}
    assert {name: roles[name] for name in ("ffn.w_up", "ffn.w_down", "ffn.router.weight", "attention.w_qkv")} == {
        "ffn.w_up": "expert_up",
        "ffn.w_down": "expert_down",
        "ffn.router.weight": "router",
        "attention.w_qkv": "hidden",
    }
    assert roles["lm_head.weight"] == "unembedding"
    assert made.axes == model.mue_axes()


def test_plan_reads_how_the_router_makes_its_gates(page, monkeypatch):
    assert not plan(page["MyModel"](), base={"n_experts": 2}, rule="complete-mue").notes
    monkeypatch.setattr(page["MyRouter"], "scoring", "sigmoid")
    (note,) = plan(page["MyModel"](), base={"n_experts": 2}, rule="complete-mue").notes
    assert "scoring=sigmoid" in note


def test_plan_reads_the_sizes_of_a_branch(page, monkeypatch):
    monkeypatch.delattr(page["MyModel"], "mue_axes")  # what is left are the branches' own sizes
    made = plan(page["MyModel"](expert_width=96, top_k=4), base={"expert_width": 48, "top_k": 2}, rule="complete-mue")
    assert made.multipliers["blocks.0.ffn.output_multiplier"] == 1 / 4  # d / A
    assert made.multipliers["blocks.0.ffn.route_scale"] == 2  # a
    assert made["blocks.0.ffn.w_up"].eps == 2 / 4  # kappa / A


def test_monitors_find_router_core_branches_and_logits(page):
    model = page["MyModel"]()
    assert labels(RouterMonitor(), model) == {"00", "01"}
    assert labels(ActivationOutlierMonitor(), model) == {"attention/00", "attention/01", "ffn/00", "ffn/01"}
    assert labels(LogitsZMonitor(), model) == {"lm_logits", "attention/00", "attention/01", "router/00", "router/01"}


def test_monitors_logged_them_in_the_pages_run(page):
    logged = page["trainer"].callback_metrics
    for key in (
        "routing/max_violation/01",
        "stability/z/router/00",
        "stability/z/attention/01",
        "stability/rms/ffn/00",
    ):
        assert torch.isfinite(logged[key]), key
    assert torch.isfinite(logged["stability/z/lm_logits"])


def test_multipliers_were_set_in_the_pages_run_and_are_kept_in_checkpoints(page):
    block = page["model"].blocks[1]
    assert block.branch_scale == 1 / 2  # L^-alpha, the depth doubled
    assert block.ffn.output_multiplier == 1.0  # d / A: both doubled
    assert block.ffn.route_scale == 1.0
    assert block.attention.core.scale == 8**-0.5
    checkpoint: dict = {}
    page["model"].on_save_checkpoint(checkpoint)
    assert checkpoint["mue_multipliers"]["blocks.1.branch_scale"] == 1 / 2


def test_multiplier_named_by_pattern(page, monkeypatch):
    monkeypatch.setattr(page["MyBlock"], "mue_multipliers", {})
    made = plan(
        page["MyModel"](), base=BASE, rule="complete-p", multipliers={"residual": r"\.branch_scale$"}, roles=DENSE
    )
    assert made.multipliers["blocks.0.branch_scale"] == 1 / 2


#: complete-p has no rows for experts.
DENSE = {r"\.w_up$": "ffn_up", r"\.w_down$": "ffn_down", "router": "hidden"}


def test_role_by_declaration_and_by_pattern(page):
    for made in (page["by_declaration"], page["by_pattern"]):
        assert made["1.kernel"].role == "hidden"
        assert made["1.kernel"].lr == 1 / 4
    net, mixer = page["net"], page["Mixer"]
    with pytest.raises(ValueError, match=r"1\.kernel"):
        plan(net(64, mixer), base=lambda: net(16, mixer), rule="mup")


def test_optimizer_reads_tagged_roles(page):
    assert [group["kind"] for group in page["optimizer"].param_groups] == ["adamw"]
    untagged = HyperSphereOptimizer(page["Codebook"]().named_parameters(), lr=0.02)
    assert [group["kind"] for group in untagged.param_groups] == ["sphere"]


def test_logits_of_a_head_by_another_name(page):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), page["Vocabulary"](8, 16))
    (probe,) = LogitsZMonitor().find_probes(model)
    assert probe.module is model[1]


def test_own_optimizer_is_scaled_as_its_family(page):
    callback, rates = MuECallback(rule="complete-mue", base=BASE, verbose=False), {}
    keep_rates = LambdaCallback(on_train_batch_end=lambda *_: rates.update(callback.effective_rates()))
    trainer = L.Trainer(
        max_steps=1, callbacks=[callback, keep_rates], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(page["SignModel"](), DataLoader(TensorDataset(torch.randint(32, (4, 9))), batch_size=4))
    assert callback.plan.family == "adam"
    assert rates["mue/lr/router"] == pytest.approx(3e-3 / 2)  # d^-1, the width doubled
    assert rates["mue/lr/embedding"] == pytest.approx(3e-3)


# The names: what the package spells is in contract.py's table and on the page, and contract.py alone reads it.

FILES = sorted(PACKAGE.rglob("*.py"))
_NAME = re.compile(r"(?<!\w)mue_[a-z_]+")


def table_names(text):
    """The names in the first column of the tables of a text."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`+(\w+)`+", cell)}


def test_every_name_is_in_the_table_and_on_the_page():
    spelt = {name for path in FILES for name in _NAME.findall(path.read_text(encoding="utf-8"))}
    assert spelt <= table_names(contract.__doc__)
    of_contract, ordinary = PAGE.split("Ordinary attributes that are read")
    assert table_names(contract.__doc__) == table_names(of_contract)
    assert table_names(ordinary)  # these stand on the page only


def reads(tree):
    """Names of the contract that a file reads off an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _NAME.fullmatch(node.attr):
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and _NAME.fullmatch(str(a.value)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_contract_reads_a_name(path):
    if path.name != "contract.py":
        assert list(reads(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_reads_are_recognized():
    code = "a.mue_roles = 1\nb = a.mue_axes\nc = getattr(a, 'mue_branch', None)\nhasattr(a, 'other')"
    assert list(reads(ast.parse(code))) == ["mue_axes", "mue_branch"]

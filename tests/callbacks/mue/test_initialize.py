"""MuECallback's `initialize`: what is drawn, what is kept, and what is warned of before it is drawn over."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mue import MuECallback


class Net(L.LightningModule):
    """A body that may be loaded in ``__init__``, and layers that grow."""

    def __init__(self, width: int = 32, body: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(8, 8)
        if body is not None:
            self.body.load_state_dict(torch.load(body))
        self.stem, self.hidden, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)

    def training_step(self, batch, batch_idx):
        return self.head(self.hidden(self.stem(self.body(batch)).relu()).relu()).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Plain(Net):
    """The same without hyperparameters, so that no second one can be made."""

    def __init__(self, width=32):
        L.LightningModule.__init__(self)
        self.body = nn.Linear(8, 8)
        self.stem, self.hidden, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)


@pytest.fixture
def body(tmp_path):
    torch.save(nn.Linear(8, 8).state_dict(), tmp_path / "body.pt")
    return str(tmp_path / "body.pt")


def fit(model, **kwargs):
    """(names of parameters that were not drawn over, names in the warning)."""
    before, start = {n: p.detach().clone() for n, p in model.named_parameters()}, {}

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = MuECallback("mup", verbose=False, **kwargs)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[callback, Spy()], **quiet)
        trainer.fit(model, DataLoader(torch.randn(4, 8), batch_size=4))
    told = [str(w.message) for w in caught if "draws over" in str(w.message)]
    named = told[0].split("drawn them: ")[1].split(", expected")[0].split(", ") if told else []
    return {n for n in start if torch.equal(start[n], before[n])}, set(named)


BODY = {"body.weight", "body.bias"}
ALL = {f"{layer}.{leaf}" for layer in ("body", "stem", "hidden", "head") for leaf in ("weight", "bias")}


def test_what_every_model_of_the_class_loads_is_kept(body):
    assert fit(Net(64, body), base={"width": 32}) == (BODY, set())


def test_what_only_the_target_loads_is_named(body):
    assert fit(Net(64, body), base={"width": 32, "body": None}) == (set(), BODY)


def test_changed_draws_only_what_the_plan_changes(body):
    kept, named = fit(Net(64, body), base={"width": 32, "body": None}, initialize="changed")
    assert (kept, named) == (BODY | {"head.bias"}, set())


def test_patterns_choose_what_is_drawn(body):
    base = {"width": 32, "body": None}
    assert fit(Net(64, body), base=base, initialize=["hidden", "^head"]) == (BODY | {"stem.weight", "stem.bias"}, set())
    assert fit(Net(64, body), base=base, initialize=["body"])[1] == BODY
    assert fit(Net(64, body), base=base, initialize=False) == (ALL, set())
    with pytest.raises(ValueError, match=r"initialize: found \['neck'\], which match no parameter"):
        fit(Net(64, body), base=base, initialize=["neck"])
    with pytest.raises(ValueError, match=r"initialize: found 'head', expected true.*in a list"):
        MuECallback(initialize="head")


def loaded(model, other):
    model.load_state_dict(other.state_dict())
    return model


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.training_step(torch.randn(4, 8), 0).backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    ("make", "base", "named"),
    [
        (lambda: loaded(Net(64), Net(64)), {"width": 32}, ALL),
        (lambda: trained(Net(64)), {"width": 32}, ALL),
        (lambda: loaded(Plain(64), Plain(64)), lambda: Plain(32), ALL),
        # Controls: nothing was written to after the constructor.
        (lambda: Net(64), {"width": 32}, set()),
        (lambda: copy.deepcopy(Net(64)), {"width": 32}, set()),
        (lambda: Net(64).double().float(), {"width": 32}, set()),
        (lambda: Plain(64), lambda: Plain(32), set()),
        (lambda: loaded(Net(32), Net(32)), {"width": 32}, set()),  # of the base's size: nothing is drawn
    ],
    ids=["loaded", "trained", "without hyperparameters", "fresh", "copy", "other dtype", "fresh too", "base"],
)  # fmt: skip
def test_weights_that_were_written_to_later_are_named(make, base, named):
    assert fit(make(), base=base)[1] == named


def test_loading_a_part_by_hand_names_that_part():
    model = Net(64)
    model.body.load_state_dict(nn.Linear(8, 8).state_dict())
    assert fit(model, base={"width": 32})[1] == BODY


def test_load_from_checkpoint_is_named(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.strategy.connect(Net(64))
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert fit(Net.load_from_checkpoint(tmp_path / "x.ckpt"), base={"width": 32})[1] == ALL


def test_a_second_fit_is_not_told():
    model = Net(64)
    assert fit(model, base={"width": 32})[1] == set()
    assert fit(model, base={"width": 32}) == (ALL, set())


class Attention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.c_attn, self.c_proj = n_head, nn.Linear(width, 3 * width), nn.Linear(width, width)


class Heads(Net):
    """A fused attention whose heads grow while no shape changes."""

    def __init__(self, n_head: int = 2):
        L.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.attn = Attention(16, n_head)

    def training_step(self, batch, batch_idx):
        q, k, v = self.attn.c_attn(self.stem(batch)).chunk(3, -1)
        return self.head(self.attn.c_proj(q * k + v)).square().mean()


def test_changed_draws_the_rows_that_carry_another_multiplier():
    kept, _ = fit(Heads(2), base={"n_head": 8}, initialize="changed", verify=False)
    assert {"attn.c_attn.weight", "attn.c_attn.bias"}.isdisjoint(kept)
    assert {"stem.weight", "attn.c_proj.weight", "head.weight"} <= kept
    same, _ = fit(Heads(8), base={"n_head": 8}, initialize="changed", verify=False)
    assert "attn.c_attn.weight" in same


def test_kept_weights_that_should_carry_a_multiplier_are_warned_of():
    def told(patterns):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = Heads(2)
            callback = MuECallback("mup", base={"n_head": 8}, verify=False, verbose=False, initialize=patterns)
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], logger=False, **quiet)
            trainer.fit(model, DataLoader(torch.randn(4, 8), batch_size=4))
        return [str(w.message) for w in caught if "folds a forward multiplier" in str(w.message)]

    (message,) = told(["head"])
    assert "attn.c_attn.weight x 0.5" in message  # 8 heads of 2 become 2 of 8: k grows by 4, and the module has k^-1/2
    assert "c_proj" not in message
    assert told(["c_attn", "head"]) == []

"""How much the monitors log, what the table says, what patterns name, and that padding does not count."""

from __future__ import annotations

import pytest
import torch
from helpers import zoo_models
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.registry import table_of
from lightning_mue.callbacks.monitors.routing import RouterMonitor
from lightning_mue.callbacks.monitors.spectral import SpectralMonitor
from lightning_mue.callbacks.monitors.updates import UpdateMonitor
from lightning_mue.console import to_text
from lightning_mue.models.language import MoELanguageModel


def language_model_log(toy, monitors, **sizes):
    """What monitors log of two steps of a language model."""
    small = {"vocab_size": 11, "context_length": 8, "width": 8, "n_heads": 2, "n_kv_heads": 1, "ffn_width": 16}
    batch = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    data = [{"tokens": row[:-1], "targets": row[1:]} for row in batch]
    logger = toy.MemoryLogger()
    trainer = toy.make_trainer(monitors, logger)
    trainer.fit(MoELanguageModel(**small, **sizes), torch.utils.data.DataLoader(data, batch_size=1))
    return logger


def test_brief_names_the_worst_layer_in_few_tags(toy):
    """Deeper models have no more tags: those of 17 layers are those of 61, and 17 are brief by default."""
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor()]
    logger = language_model_log(toy, monitors, depth=17, n_experts=4, top_k=1)
    tags = [tag for tag in logger.tags() if tag.startswith(("stability", "routing"))]
    assert 40 < len(tags) <= 60
    assert not [tag for tag in tags if tag.rpartition("/")[2].isdigit()]
    worst = monitors[1].worst_names["stability/rms/ffn_max"]
    assert logger.values("stability/rms/ffn_max_layer")[-1] == float(worst)


def test_brief_and_full_by_argument(toy):
    full, brief = (toy.fit([LogitsZMonitor(detail=detail)], n_batches=1)[1] for detail in ("full", "brief"))
    assert "stability/z/attention/00" in full.tags()
    assert "stability/z/attention/00" not in brief.tags()
    assert full.values("stability/z/attention_max") == brief.values("stability/z/attention_max")
    layers = [full.values(f"stability/z/attention/0{i}")[0] for i in range(2)]
    assert brief.values("stability/z/attention_max_layer") == [layers.index(max(layers))]
    with pytest.raises(ValueError, match="detail: found 'short', expected one of 'brief', 'full'"):
        LogitsZMonitor(detail="short")


@pytest.mark.parametrize("monitor", [UpdateMonitor, SpectralMonitor])
def test_every_monitor_has_both(toy, monitor):
    full, brief = (set(language_model_log(toy, [monitor(detail=d)], depth=2).tags()) for d in ("full", "brief"))
    layers = {tag for tag in full if tag.rpartition("/")[2].isdigit()}
    assert layers
    assert not layers & brief
    assert {tag for tag in full if tag.endswith(("_mean", "_max", "_min"))} <= brief


def test_the_table_says_what_is_watched_and_what_is_not(toy, capsys):
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor()]
    model = toy.make_model()
    for block in model.blocks:
        block.ffn = nn.Identity()
        block.ffn.forward = lambda x, keep: x
    with pytest.warns(UserWarning, match="RouterMonitor found nothing to watch"):
        toy.fit(monitors, model=model, max_epochs=2)
    assert capsys.readouterr().out.count("What the monitors watch") == 1
    rows = to_text(table_of(monitors)).splitlines()
    for words in (
        ("LM logits", "lm_head"),
        ("attention logits", "2 x blocks.*.attention.core", "mue_attention_core"),
        ("residual branches", "2 x blocks.*.attention", "mue_branch"),
        ("routers", "none in this model"),
    ):
        assert any(all(word in row for word in words) for row in rows), (words, rows)


def test_patterns_name_the_rest(toy):
    model = toy.make_model()
    model.extra = nn.ModuleList([nn.Linear(8, 8)])
    model.loss = lambda tokens, plain=model.loss: plain(tokens) + model.extra[0](model.embedding(tokens)).mean()
    monitor = ActivationOutlierMonitor(branches={"side": r"extra\.\d+"})
    _, logger = toy.fit([monitor], model=model, n_batches=1)
    assert len(logger.values("stability/rms/side/00")) == 1
    assert len(logger.values("stability/rms/ffn/01")) == 1  # the others are still found
    for monitor, message in (
        (ActivationOutlierMonitor(branches=r"blocks\.\d\.fnn"), r"branches: found 'blocks.*nearest names are .*ffn'"),
        (LogitsZMonitor(attention="blocks.0.atention"), r"attention: found 'blocks.0.atention'.*'blocks.0.attention'"),
        (RouterMonitor(routers=r"blocks\.\d\.fn\.router"), r"routers: found .*ffn.router"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.fit([monitor], model=toy.make_model(), n_batches=1)
    with pytest.raises(ValueError, match=r"lm_logits: found 'lm_\(head' .*, expected a regular expression"):
        LogitsZMonitor(lm_logits="lm_(head")


class Padded(LightningModule):
    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.mask, self.seen = zoo_models.MOE["Mixtral"].make(32, 1, 4), mask, []
        gate = self.model.get_submodule("model.layers.0.mlp.gate")
        gate.register_forward_hook(lambda *args: self.seen.append((args[2][0].detach(), args[2][2])))
        for name in ("model.layers.0.mlp", "lm_head"):
            self.model.get_submodule(name).register_forward_hook(lambda *args: self.seen.append(args[2].detach()))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=zoo_models.tokens(), attention_mask=self.mask, labels=zoo_models.tokens()).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_padding_does_not_count(toy):
    """In routers, branches and heads of a foreign model."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:] = 0
    model, logger = Padded(mask), toy.MemoryLogger()
    monitors = [RouterMonitor(), LogitsZMonitor(attention=False), ActivationOutlierMonitor()]
    toy.make_trainer(monitors, logger).fit(model, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    ((logits, ids), branch, lm_logits), real = model.seen, mask.flatten().bool()
    counts = torch.bincount(ids[real].flatten(), minlength=4).double()
    expected = (counts.max() / counts.mean() - 1).item()
    assert logger.values("routing/max_violation/00") == pytest.approx([expected], rel=1e-5)
    z = logits[real].double().logsumexp(-1).square().mean().item()
    assert logger.values("stability/z/router/00") == pytest.approx([z], rel=1e-5)
    assert z != pytest.approx(logits.double().logsumexp(-1).square().mean().item(), rel=1e-5)  # negative control
    z = lm_logits.flatten(0, 1)[real].double().logsumexp(-1).square().mean().item()
    assert logger.values("stability/z/lm_logits") == pytest.approx([z], rel=1e-5)
    for x, same in ((branch.flatten(0, 1)[real], True), (branch, False)):
        x = x.double()
        expected = {
            "rms": x.square().mean().sqrt(),
            "kurtosis": (x - x.mean()).pow(4).mean() / (x - x.mean()).square().mean().square(),
            "max_over_rms": x.abs().max() / x.square().mean().sqrt(),
        }
        for name, value in expected.items():
            found = logger.values(f"stability/{name}/ffn/00")
            assert (found == pytest.approx([value.item()], rel=1e-4)) is same or name == "max_over_rms"
    assert toy.n_hooks(model) == 3  # the test's own

"""The monitors find everything in this package's own models, and agree with what the layers expose."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor
from lightning_mue.diagnostics import dead_experts, max_violation, router_entropy, z_value
from lightning_mue.models.language import MoELanguageModel
from lightning_mue.moe import MoELayer

SIZES = {
    "vocab_size": 17,
    "context_length": 12,
    "width": 16,
    "depth": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_width": 32,
}


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.randint(0, 17, (13,), generator=torch.Generator().manual_seed(index))
        return {"tokens": tokens[:-1], "targets": tokens[1:]}


class LastRouting(Callback):
    """Collects what the layers expose after the batch."""

    def __init__(self):
        self.records = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.records.append([m.last_routing for m in pl_module.modules() if isinstance(m, MoELayer)])


def fit(toy, model, extra=()):
    logger = toy.MemoryLogger()
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor(), *extra]
    data = torch.utils.data.DataLoader(Batches(), batch_size=4)
    toy.make_trainer(monitors, logger, num_sanity_val_steps=0).fit(model, data)
    return logger


@pytest.mark.parametrize("scoring", ["topk-softmax", "sigmoid-normalized"])
@pytest.mark.parametrize("shared_width", [0, 8])
def test_moe_language_model(toy, scoring, shared_width):
    torch.manual_seed(0)
    model = MoELanguageModel(**SIZES, n_experts=4, top_k=2, scoring=scoring, shared_width=shared_width)
    routings = LastRouting()
    logger = fit(toy, model, [routings])
    tags = [tag for tag in logger.tags() if tag.startswith(("stability", "routing"))]
    logits, branches = (
        9 + 7 + 4,
        5 * 8 + 2 * 2 + 2 * 3,
    )  # z, largest logit, entropy; five metrics of two branches, and channels
    assert len(tags) == logits + branches + 8 * 2 + 9  # routing, and over layers
    assert not [tag for tag in tags if "shared" in tag or "." in tag]  # every layer is a plain index
    for step, layers in enumerate(routings.records):
        for index, routing in enumerate(layers):
            for name, expected in (
                (f"stability/z/router/{index:02d}", z_value(routing.logits)),
                (f"routing/max_violation/{index:02d}", max_violation(routing.counts)),
                (f"routing/dead_experts/{index:02d}", dead_experts(routing.counts)),
                (f"routing/token_entropy/{index:02d}", router_entropy(routing.logits)),
            ):
                assert logger.values(name)[step] == pytest.approx(expected.item(), rel=1e-5), name


def test_dense_language_model(toy):
    with pytest.warns(UserWarning, match="RouterMonitor found nothing"):
        logger = fit(toy, MoELanguageModel(**SIZES, n_experts=0, tie_embeddings=True))
    tags = [tag for tag in logger.tags() if tag.startswith(("stability", "routing"))]
    assert len(tags) == (5 + 4 + 4) + 5 * 8 + 2 * 2 + 2 * 3
    assert len(logger.values("stability/z/lm_logits")) == 2


def test_layer_trained_alone(toy):
    layer, logger = MoELayer(8, 16, 4), toy.MemoryLogger()
    data = torch.utils.data.TensorDataset(torch.randn(6, 5, 8), torch.randn(6, 5, 8))
    monitors = [ActivationOutlierMonitor(), RouterMonitor(), LogitsZMonitor()]
    toy.make_trainer(monitors, logger).fit(layer, torch.utils.data.DataLoader(data, batch_size=2))
    assert len(logger.values("stability/rms/ffn/root")) == 3
    assert len(logger.values("routing/max_violation/router")) == 3

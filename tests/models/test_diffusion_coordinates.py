"""FlowMatchingTransformer under both rules: updates keep their size over width and from dense to experts, with controls."""

from __future__ import annotations

import pytest
import torch

from lightning_mue import FlowMatchingTransformer, HyperSphereOptimizer, coordinate_check
from lightning_mue.data import DigitsDataModule

pytestmark = pytest.mark.slow

WIDTHS = [{"width": 64, "n_heads": 4}, {"width": 256, "n_heads": 16}]
EXPERTS = [{"n_experts": e} for e in (0, 4, 16)]


def digits(count=8):
    data = DigitsDataModule(64)
    data.setup()
    loader = data.train_dataloader()
    return [loader.batch(i) for i in range(count)]


def rich_images(count=8):
    """Noise whose patches have 256 values: tokens that span more directions than the widths have."""
    g = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn((64, 4, 32, 32), generator=g), "label": torch.randint(0, 10, (64,), generator=g)}
        for _ in range(count)
    ]


def check(rule, sizes, batches, *, tolerance=0.15, roles=None, **model):
    """Slopes of a quarter of the rates that suit training: the check has no warm-up, and large steps saturate."""
    gate = {"complete-mue": "linear", "hyperp": "sqrt"}[rule]

    def make(**size):
        return FlowMatchingTransformer(**{"width": 64, "n_heads": 4, "gate": gate, "output_std": 0.2, **model, **size})

    def optimizer(named):
        if rule == "hyperp":
            return HyperSphereOptimizer(named, lr=0.005, adamw_lr=0.001)
        return torch.optim.AdamW([p for _, p in named], lr=0.001)

    options = {"optimizer": optimizer, "steps": 4, "seeds": 2, "tolerance": tolerance, "roles": roles}
    return coordinate_check(make, sizes, batches, rule=rule, **options)


def slopes(result, part):
    found = {s.name: s.slope for s in result.slopes() if s.decides and part in s.name}
    assert found, part
    return found


def test_width_under_complete_mue_and_the_modulations_rate_decides():
    result = check("complete-mue", WIDTHS, digits())
    assert result.passed, result.verdict
    control = check("complete-mue", WIDTHS, digits(), roles={r"modulation\.weight$": "embedding"})
    assert not control.passed
    assert slopes(control, "blocks.*.modulation.weight").popitem()[1] > 0.5


@pytest.mark.parametrize("rule", ["complete-mue", "hyperp"])
def test_from_dense_to_experts(rule):
    # The router and an expert's up matrices under complete-mue: +0.17 and +0.15, the residual drift of bridge II.
    result = check(rule, EXPERTS, digits(), tolerance=0.2)
    assert result.passed, result.verdict


def test_width_under_hyperp_where_tokens_fill_the_width():
    result = check("hyperp", WIDTHS, rich_images(), image_size=32, patch_size=8, n_channels=4)
    for part in (".attention.w_", ".ffn.w_"):
        assert {name: s for name, s in slopes(result, part).items() if abs(s) > 0.15} == {}
    assert max(abs(s) for s in slopes(result, "modulation").values()) < 0.25


def test_width_under_hyperp_on_digits():
    """Patches of 4 pixels at 16 places span 20 directions at any width: Muon's step on the sphere then grows as its root."""
    result = check("hyperp", WIDTHS, digits())
    assert max(abs(s) for s in slopes(result, "modulation").values()) < 0.15
    assert all(0.3 < s < 0.7 for s in slopes(result, ".ffn.w_up").values())
    stream = [s.slope for s in result.slopes() if s.role == "residual stream" and s.decides]
    assert [abs(s) < 0.1 for s in stream] == [True]

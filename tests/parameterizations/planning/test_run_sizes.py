"""Run sizes given relative to the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_mue import MoELanguageModel, plan

PAPER = Path(__file__).parents[3] / "configs" / "hyperp_paper.yaml"


def model(**options):
    return MoELanguageModel(**{"width": 32, "depth": 2, "n_heads": 2, "context_length": 16, **options})


def test_the_papers_base_has_its_number_of_tokens():
    """HyperP (2603.28743) prints 10.4e9 tokens for depth 8: 50 a parameter of the gated model, embeddings included."""
    options = yaml.safe_load(PAPER.read_text())["model"]["init_args"]
    with torch.device("meta"):
        module = MoELanguageModel(**{k: v for k, v in options.items() if k not in ("optimizer", "scheduler")})
    given = {"base": {"depth": 8, "tokens": "50 per parameter"}, "tokens": 1e9, "family": "sphere"}
    assert plan(module, rule="hyperp-paper", **given).base_axes["tokens"] == pytest.approx(10.4e9, rel=2e-3)


def test_routed_experts_count_by_their_active_share():
    module = model(n_experts=8, top_k=2, shared_width=16, gate="sqrt")
    numbers = {name: p.numel() for name, p in module.named_parameters()}
    routed = sum(n for name, n in numbers.items() if ".experts." in name)
    expected = sum(numbers.values()) - routed * 3 / 4
    options = {"base": {"n_experts": 0, "tokens": "20 per parameter"}, "rule": "hyperp", "family": "sphere"}
    scaling = plan(module, tokens="20 per parameter", **options)
    assert routed > 0
    assert scaling.axes["tokens"] == pytest.approx(20 * expected)
    dense = sum(p.numel() for p in model(n_experts=0).parameters())
    assert scaling.base_axes["tokens"] == pytest.approx(20 * dense)
    assert plan(module, tokens="3e6", **options).axes["tokens"] == 3e6  # as YAML reads 3e6


@pytest.mark.parametrize(
    "text", ["50 per params", "-3 per parameter", "0 per parameter", "many", "1.2.3 per parameter"]
)
def test_other_texts_are_refused(text):
    for base, tokens, key in (({"tokens": text}, 1.0, "base.tokens"), ({"tokens": 1.0}, text, "tokens")):
        with pytest.raises(ValueError, match=rf"^{key}: found '{text}'.*'50 per parameter'"):
            plan(model(), base=base, tokens=tokens)
    with pytest.raises(ValueError, match="batch_tokens: found '3 per parameter', expected a number"):
        plan(model(), base={"batch_tokens": "3 per parameter"}, batch_tokens=1.0)

"""The plan's table: what a line covers, its legend, frozen parameters, and narrow terminals; as text and as Markdown."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_mue import plan
from lightning_mue.console import to_text
from lightning_mue.parameterizations.planning.scaling_plan import as_markdown
from lightning_mue.parameterizations.planning.table import covering


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["h.0.ln_1.weight", "h.0.ln_2.weight", "h.1.ln_1.weight", "h.1.ln_2.weight"], "h.*.{ln_1, ln_2}.weight"),
        (["h.0.experts.0.w1", "h.0.experts.1.w1"], "h.0.experts.*.w1"),
        (["h.0.mlp.2.weight", "h.1.mlp.2.weight"], "h.*.mlp.2.weight"),
        (["h.0.w", "h.1.w", "head.w"], "h.*.w, head.w"),
        (["wte.weight"], "wte.weight"),
    ],
)
def test_a_line_names_all_that_it_covers(names, text):
    assert covering(names) == text


def make(width):
    layers = [nn.TransformerEncoderLayer(width, width // 8, 2 * width) for _ in range(3)]
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, width), "layers": nn.ModuleList(layers), "head": nn.Linear(width, 9)}
    )
    model["embed"].requires_grad_(False)
    return model


def test_text_and_markdown_show_what_is_applied():
    scaling = plan(make(32), base=make(16), rule="mup")
    for text in (str(scaling), as_markdown(scaling).replace("\\", "")):
        assert "6 x layers.*.{norm1, norm2}.weight" in text
        assert "std: standard deviation" in text
        embedding = next(line for line in text.splitlines() if "embed.weight" in line)
        assert "frozen" in embedding
        assert "std" not in embedding  # it is not drawn
        assert not any("embedding," in line for line in text.splitlines() if "source" in line)


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_terminals_show_every_name(width):
    text = to_text(plan(make(32), base=make(16), rule="mup"), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "layers.*.{norm1,norm2}.weight" in "".join(text.split()) or width == 80
    assert text.count("adamw") >= 8
    assert "\u2026" not in text  # nothing is cut off

"""LogitsZMonitor logs exactly what a float64 computation from the model's own tensors gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.parameterizations.rules.roles import Role

#: float32 rounding of one logsumexp; batches of this size add nothing to it.
RELATIVE = 2e-6

KEYS = [
    *(f"stability/entropy/attention{end}" for end in ("/00", "/01", "_mean", "_min")),
    *(f"stability/max_logit/attention{end}" for end in ("/00", "/01", "_max")),
    "stability/max_logit/lm_logits",
    *(f"stability/max_logit/router{end}" for end in ("/00", "/01", "_max")),
    *(f"stability/z/attention{end}" for end in ("/00", "/01", "_max", "_mean")),
    "stability/z/lm_logits",
    *(f"stability/z/router{end}" for end in ("/00", "/01", "_max", "_mean")),
]


def z(logits):
    return logits.double().logsumexp(-1).square().mean().item()


def attention_logits(q, k, scale=0.5):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = scale * q.double() @ k.double().transpose(-1, -2)
    hidden = torch.ones(logits.shape[-2:]).triu(1).bool()
    return logits.masked_fill(hidden, float("-inf"))


def attention_z(q, k, scale=0.5):
    return z(attention_logits(q, k, scale))


def test_exact_values_and_keys(toy):
    model, logger = toy.fit([LogitsZMonitor()])
    assert [tag for tag in logger.tags() if tag.startswith("stability")] == KEYS
    for step in range(6):
        by_layer = [attention_z(q, k) for q, k in zip(model.seen["q"][step], model.seen["k"][step], strict=True)]
        routers = [z(logits) for logits in model.seen["router_logits"][step]]
        attentions = [attention_logits(q, k) for q, k in zip(model.seen["q"][step], model.seen["k"][step], strict=True)]
        for i, logits in enumerate(attentions):
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean().item()
            assert logger.values(f"stability/entropy/attention/{i:02d}")[step] == pytest.approx(entropy, rel=1e-5)
            largest = logger.values(f"stability/max_logit/attention/{i:02d}")[step]
            assert largest == pytest.approx(logits.max().item(), rel=1e-5)
        largest = max(logits.max().item() for logits in model.seen["router_logits"][step])
        assert logger.values("stability/max_logit/router_max")[step] == pytest.approx(largest)
        largest = model.seen["lm_logits"][step][0].max().item()
        assert logger.values("stability/max_logit/lm_logits")[step] == pytest.approx(largest)
        expected = {
            "lm_logits": z(model.seen["lm_logits"][step][0]),
            "attention/00": by_layer[0],
            "attention/01": by_layer[1],
            "attention_mean": sum(by_layer) / 2,
            "attention_max": max(by_layer),
            "router/00": routers[0],
            "router/01": routers[1],
            "router_mean": sum(routers) / 2,
            "router_max": max(routers),
        }
        for name, value in expected.items():
            assert logger.values(f"stability/z/{name}")[step] == pytest.approx(value, rel=RELATIVE), (step, name)
        if step:  # negative control: the step before would not pass
            assert logger.values("stability/z/lm_logits")[step] != pytest.approx(
                z(model.seen["lm_logits"][step - 1][0]), rel=1e-4
            )


def test_several_forward_passes_in_a_step(toy):
    model, logger = toy.fit([LogitsZMonitor()], model=toy.make_model(passes=2), n_batches=2)
    assert len(model.seen["lm_logits"][1]) == 2
    expected = z(torch.cat(model.seen["lm_logits"][1]))
    assert logger.values("stability/z/lm_logits")[1] == pytest.approx(expected, rel=RELATIVE)


def test_attention_can_be_left_out(toy):
    _, logger = toy.fit([LogitsZMonitor(attention=False)], n_batches=1)
    assert [tag for tag in logger.tags() if "stability" in tag] == [key for key in KEYS if "attention" not in key]


class Unembedding(nn.Linear):
    mue_roles = {"weight": Role.UNEMBEDDING}  # noqa: RUF012


class Marked(nn.Linear):
    mue_role_of_output = "lm_logits"


@pytest.mark.parametrize("rule", ["marked", "role", "name", "argument"])
def test_lm_logits_are_found(toy, rule):
    """Each rule in turn finds the true head, though a decoy matches the rules below it."""
    model = toy.make_model()
    head = {"marked": Marked, "role": Unembedding}.get(rule, nn.Linear)(8, 11, bias=False)
    model.decoy = nn.ModuleDict({"name": nn.Identity(), "role": nn.Identity(), "marked": nn.Identity()})
    if rule in ("role", "marked", "argument"):
        model.decoy["head"] = nn.Linear(8, 11)
    if rule in ("marked", "argument"):
        model.decoy["unembedding"] = Unembedding(8, 11)
    if rule == "argument":
        model.decoy["marked"] = Marked(8, 11)
    model.lm_head = head
    name = "lm_head" if rule == "argument" else None
    _, logger = toy.fit([LogitsZMonitor(lm_logits=name)], model=model, n_batches=1)
    expected = z(model.seen["lm_logits"][0][0])
    assert logger.values("stability/z/lm_logits") == pytest.approx([expected], rel=RELATIVE)


def test_several_heads_are_told_apart(toy):
    model = toy.make_model()
    model.heads = nn.ModuleList([Marked(8, 11), Marked(8, 11)])
    outputs = []

    def loss(tokens, plain=model.loss):
        outputs.append([head(model.embedding(tokens)) for head in model.heads])
        return plain(tokens) + sum(logits.mean() for logits in outputs[-1])

    model.loss = loss
    _, logger = toy.fit([LogitsZMonitor()], model=model, n_batches=1)
    found = [logger.values(f"stability/z/lm_logits/{label}")[0] for label in ("00", "01")]
    assert found == pytest.approx([z(logits.detach()) for logits in outputs[0]], rel=RELATIVE)
    assert not logger.values("stability/z/lm_logits")


def test_the_outermost_head_is_the_lm_head(toy):
    """A Linear called "output" within a block is not taken for the head."""
    model = toy.make_model()
    for block in model.blocks:
        block.attention.output = nn.Linear(8, 8)
    model, logger = toy.fit([LogitsZMonitor()], model=model, n_batches=1)
    assert logger.values("stability/z/lm_logits") == pytest.approx([z(model.seen["lm_logits"][0][0])], rel=RELATIVE)


def test_unknown_name_is_refused(toy):
    with pytest.raises(ValueError, match=r"lm_logits: found 'lm_heat'.*'lm_head'"):
        toy.fit([LogitsZMonitor(lm_logits="lm_heat")])


def test_mixed_precision_is_widened(toy):
    model, logger = toy.fit([LogitsZMonitor()], n_batches=2, precision="bf16-mixed")
    assert model.seen["lm_logits"][0][0].dtype == torch.bfloat16
    assert logger.values("stability/z/lm_logits") == pytest.approx(
        [z(batch[0]) for batch in model.seen["lm_logits"]], rel=RELATIVE
    )
    # Attention logits are bf16 products if autocast is left on, which is off by 1e-3 or so.
    expected = [attention_z(model.seen["q"][step][0], model.seen["k"][step][0]) for step in range(2)]
    assert logger.values("stability/z/attention/00") == pytest.approx(expected, rel=RELATIVE)


def test_a_loss_is_not_logits(toy):
    """A head that owns the unembedding but returns a loss is left alone, with a warning."""

    class LossHead(nn.Linear):
        mue_role_of_output = "lm_logits"

        def forward(self, x):
            return super().forward(x).mean()

    model = toy.make_model()
    model.fused = LossHead(8, 3)
    model.loss = lambda tokens, plain=model.loss: plain(tokens) + model.fused(model.embedding(tokens))
    with pytest.warns(UserWarning, match="saw no forward pass of lm_logits"):
        _, logger = toy.fit([LogitsZMonitor()], model=model, n_batches=2)
    assert not logger.values("stability/z/lm_logits")
    assert len(logger.values("stability/z/router/00")) == 2

"""Which passes and tokens count in loads and losses, by hand in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mue.moe import MoELayer, follow_attention_mask, real_tokens

E, K = 6, 2


def make(**settings):
    return MoELayer(8, 16, E, K, router_init_std=1.0, aux_loss_coef=1.0, **settings).double()


def switch(layer, x):
    """E sum f P over tokens [T, d], and the counts."""
    logits = x.reshape(-1, 8) @ layer.router.weight.double().T
    counts = torch.bincount((logits + layer.router.balance_bias).topk(K).indices.flatten(), minlength=E)
    return E * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum(), counts


def test_passes_before_one_loss_add_up():
    layer = make(balance=["bias", "switch"])
    a, b, other = torch.randn(3, 10, 8).double()
    layer(a)
    with torch.no_grad():
        layer(other)
    layer.eval()
    layer(other)
    assert layer.aux_loss == 0
    layer.train()
    layer(b)
    (loss_a, counts_a), (loss_b, counts_b) = switch(layer, a), switch(layer, b)
    with torch.no_grad():
        assert torch.allclose(layer.aux_loss, loss_a + loss_b)  # to log it takes nothing away
    total = layer.aux_loss
    torch.testing.assert_close(total, loss_a + loss_b, check_dtype=False)
    assert layer.aux_loss is total
    assert torch.equal(layer.pending_counts, counts_a + counts_b)
    assert torch.equal(layer.last_routing.counts, counts_b)
    (found,) = torch.autograd.grad(total, layer.router.weight)
    (expected,) = torch.autograd.grad(loss_a + loss_b, layer.router.weight)
    torch.testing.assert_close(found, expected)
    layer(other)  # read: it starts anew
    torch.testing.assert_close(layer.aux_loss, switch(layer, other)[0], check_dtype=False)


def test_what_was_only_looked_at_stays_in_the_sum():
    """Logged after each pass, as a number, and read for the loss at the end; in no order does a pass count twice or not at all."""
    layer, (a, b) = make(), torch.randn(2, 10, 8).double()
    y = layer(a)
    seen = float(layer.aux_loss)
    y = y + layer(b)
    seen += float(layer.aux_loss)
    total = layer.aux_loss
    expected = switch(layer, a)[0] + switch(layer, b)[0]
    assert seen == pytest.approx(float(switch(layer, a)[0] + expected))
    torch.testing.assert_close(total, expected, check_dtype=False)
    (y.sum() + total).backward()
    assert layer.aux_loss == total  # to log it after the backward pass
    layer(a)
    torch.testing.assert_close(layer.aux_loss, switch(layer, a)[0], check_dtype=False)
    layer.forget_losses()
    parts = [layer(x).sum() + layer.aux_loss for x in (a, b)]
    parts[1] = parts[1] + 0 * layer.aux_loss
    (found,) = torch.autograd.grad(sum(parts), layer.router.weight)
    y = [layer(x).sum() for x in (a, b)]
    (wanted,) = torch.autograd.grad(y[0] + y[1] + layer.aux_loss, layer.router.weight)
    torch.testing.assert_close(found, wanted)


def test_a_batch_that_is_thrown_away_takes_its_loss_along():
    layer, (a, b) = make(), torch.randn(2, 10, 8).double()
    loss = layer(a * float("nan")).sum() + layer.aux_loss
    del loss  # not finite: the step is left out
    layer(b)
    torch.testing.assert_close(layer.aux_loss, switch(layer, b)[0], check_dtype=False)


@pytest.mark.parametrize("added", [True, False])
def test_a_loss_that_was_read_and_not_added_is_warned_of(added):
    layer = make()
    y = layer(torch.randn(10, 8).double()).sum()
    logged = layer.aux_loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (y + logged if added else y).backward()
    assert ["aux_loss: found one that was read" in str(w.message) for w in caught] == [True] * (not added)


@pytest.mark.parametrize("how", ["backward", "step"])
def test_a_backward_pass_or_a_step_drops_what_nobody_read(how):
    layer, (a, b) = make(), torch.randn(2, 10, 8).double()
    y = layer(a)
    if how == "backward":
        y.sum().backward()
    else:
        torch.optim.SGD(layer.parameters(), lr=0.0).step()
    layer(b)
    torch.testing.assert_close(layer.aux_loss, switch(layer, b)[0], check_dtype=False)
    layer(a)
    torch.autograd.grad(layer(b).sum(), layer.router.weight, retain_graph=True)  # its graph lives on
    both = switch(layer, a)[0] + switch(layer, b)[0]
    torch.testing.assert_close(layer.aux_loss, both, check_dtype=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant):
    layer, x = MoELayer(8, 16, E, K, balance="bias"), torch.randn(12, 8, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    assert layer.pending_counts.sum() == 24
    y.sum().backward()
    assert layer.pending_counts.sum() == 24
    with torch.no_grad():
        checkpoint(layer, x.detach(), use_reentrant=reentrant)  # an evaluation that is checkpointed too
    assert layer.pending_counts.sum() == 24


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = make(balance=["bias", "switch"])

    def forward(self, input_ids, attention_mask=None):
        return checkpoint(self.layer, input_ids, use_reentrant=False)


class Chunks(Decoder):
    """Gives its layer one half of each sequence after the other, or all tokens in a row."""

    flat = False

    def forward(self, input_ids, attention_mask=None):
        if self.flat:
            return self.layer(input_ids.flatten(0, 1)).view_as(input_ids)
        return torch.cat([self.layer(part) for part in input_ids.chunk(2, 1)], 1)


class Pair(nn.Module):
    """Encoder and decoder, each with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Decoder(), Decoder()

    def forward(self, input_ids, attention_mask=None, decoder_attention_mask=None):
        return self.decoder(self.encoder(input_ids, attention_mask), attention_mask=decoder_attention_mask)


def masks():
    real = torch.arange(7) < torch.tensor([[7], [3]])
    left, queries = real.flip(1), torch.ones(7, 7, dtype=torch.bool).tril()
    causal = queries & left[:, None, None]
    additive = torch.zeros(2, 1, 7, 7).masked_fill(~causal, -1e9)
    attends_all = torch.where(causal.any(-1, keepdim=True), additive, 0.0)  # as fast attention wants of padded rows
    longer = torch.cat([torch.ones(2, 4), real], 1)
    flat = torch.zeros(2, 7).masked_fill(~real, -torch.inf)
    return {
        "right": (real.long(), real),
        "packed": (real * torch.tensor([1, 1, 2, 2, 3, 3, 3]), real),
        "additive": (flat, real),
        "left, 4-D bool": (causal, left),
        "left, 4-D additive": (additive, left),
        "left, rows of padding attend": (attends_all, left),
        "encoder, 4-D": (real[:, None, None].expand(2, 1, 7, 7), real),
        "with a cache": (longer, real),
    }


@pytest.mark.parametrize("kind", masks())
def test_padding_that_the_model_is_told_of_does_not_count(kind):
    mask, real = masks()[kind]
    model, x = Decoder(), torch.randn(2, 7, 8).double()
    with torch.no_grad():
        expected_y = model(x)
    assert follow_attention_mask(model) == follow_attention_mask(model) == [""]
    y = model(x, mask)
    loss, counts = switch(model.layer, x[real])
    assert torch.equal(y, expected_y)  # outputs stay, of padding too
    assert torch.equal(model.layer.pending_counts, counts)
    total = model.layer.aux_loss
    torch.testing.assert_close(total, loss, check_dtype=False)
    (y.sum() + total).backward()
    found = model.layer.router.weight.grad.clone()
    expected = torch.autograd.grad(model(x).sum() + switch(model.layer, x[real])[0], model.layer.router.weight)[0]
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        model.layer.pending_counts.sum(), counts.sum() + K * 14
    )  # negative control: without a mask all do


def test_encoder_and_decoder_follow_their_own_masks():
    model, mask = Pair(), torch.tensor([[1, 1, 0, 0]])
    assert set(follow_attention_mask(model)) == {"", "encoder", "decoder"}
    twin = copy.deepcopy(model)
    twin(torch.randn(1, 4, 8).double(), attention_mask=mask)
    assert [int(m.layer.pending_counts.sum()) for m in (twin.encoder, twin.decoder)] == [4, 8]
    assert not model.encoder.layer.pending_counts.any()


def test_a_part_of_a_sequence_does_not_get_the_masks_last_entries():
    model, x = Chunks(), torch.randn(2, 6, 8).double()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    follow_attention_mask(model)
    with pytest.warns(UserWarning, match=r"attention_mask: found shape \[2, 6\], .* \[2, 3\]"):
        model(x, mask)
    assert model.layer.pending_counts.sum() == 12 * K
    model.layer.pending_counts.zero_()
    model.flat = True
    model(x, mask)  # with a cache of three keys before
    assert model.layer.pending_counts.sum() == 8 * K


def test_a_hook_that_raises_leaves_the_mask_around_it():
    model, x = Decoder(), torch.randn(1, 4, 8).double()
    follow_attention_mask(model)

    def fail(*_):
        raise RuntimeError

    hook = model.register_forward_pre_hook(fail)
    with real_tokens(model, torch.tensor([[1, 1, 1, 0]])):
        with pytest.raises(RuntimeError):
            model(x)
        hook.remove()
        model.layer(x)
    assert model.layer.pending_counts.sum() == 3 * K
    assert not model.layer.token_masks


@pytest.mark.slow
def test_a_compiled_layer_under_checkpointing_follows_the_mask():
    class Compiled(Decoder):
        def forward(self, input_ids, attention_mask=None):
            return checkpoint(self.run, input_ids, use_reentrant=False)

    model, x, mask = Compiled(), torch.randn(2, 7, 8).double(), torch.arange(7) < torch.tensor([[7], [3]])
    follow_attention_mask(model)
    grads = []
    for run in (model.layer, torch.compile(model.layer, backend="aot_eager")):
        object.__setattr__(model, "run", run)
        model.zero_grad()
        total = model(x, mask).square().sum() + model.layer.aux_loss
        total.backward()
        grads.append(model.layer.router.weight.grad.clone())
        assert model.layer.last_routing.counts.sum() == 10 * K
    assert model.layer.pending_counts.sum() == 2 * 10 * K
    torch.testing.assert_close(grads[1], grads[0])
    assert not torch.allclose(
        grads[0], torch.autograd.grad(model(x).square().sum() + model.layer.aux_loss, model.layer.router.weight)[0]
    )


def test_a_mask_by_hand_and_one_that_does_not_fit():
    layer, x = make(balance_scope="sequence", z_loss_coef=0.5), torch.randn(2, 5, 8).double()
    real = torch.arange(5) < torch.tensor([[5], [2]])
    with real_tokens(layer, real):
        layer(x)
    logits = x[real] @ layer.router.weight.T
    expected = (switch(layer, x[0])[0] + switch(layer, x[1, :2])[0]) / 2 + 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(layer.aux_loss, expected, check_dtype=False)
    with real_tokens(layer, real[:, :3]), pytest.warns(UserWarning, match=r"attention_mask: found shape \[2, 3\]"):
        layer(x)
    assert layer.last_routing.counts.sum() == 20


@pytest.mark.parametrize("masked", [False, True])
def test_the_sequence_loss_takes_normalized_sigmoid_scores(masked):
    layer = MoELayer(
        8, 16, E, K, router_init_std=1.0, scoring="sigmoid", balance=["bias", "sequence"], aux_loss_coef=0.3
    )
    layer, x = layer.double(), torch.randn(3, 10, 8).double()
    real = torch.arange(10) < torch.tensor([[10], [4], [7]]) if masked else torch.ones(3, 10, dtype=torch.bool)
    with real_tokens(layer, real if masked else None):
        layer(x)
    losses = []
    for sequence, keep in zip(x, real, strict=True):
        scores = (sequence[keep] @ layer.router.weight.T).sigmoid()
        counts = torch.bincount(scores.topk(K).indices.flatten(), minlength=E)
        f = E / (K * len(scores)) * counts  # DeepSeek-V3, equations 17 to 20
        losses.append((f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())
    total, expected = layer.aux_loss, 0.3 * torch.stack(losses).mean()
    torch.testing.assert_close(total, expected, check_dtype=False)
    found = torch.autograd.grad(total, layer.router.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, layer.router.weight)[0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"balance": "none", "aux_loss_coef": 0.01}, "aux_loss_coef: found 0.01 with balance='none'"),
        ({"bias_update_rate": 0.01}, "bias_update_rate: found 0.01 with balance='switch'"),
        ({"bias_update": "sign"}, "bias_update: found 'sign' with balance='switch'"),
        ({"balance": "bias", "bias_update": "signs"}, "bias_update: found 'signs', expected one of"),
        ({"balance": "bias", "balance_scope": "global"}, "balance_scope: found 'global' with balance='bias'"),
        ({"balance": ["switch", "sequence"]}, "balance: found"),
        ({"balance": ["none", "bias"]}, "balance: found"),
    ],
)
def test_arguments_without_effect_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        MoELayer(8, 16, E, **settings)


def test_a_coefficient_beside_the_bias_adds_the_switch_loss():
    assert MoELayer(8, 16, E, balance="bias", aux_loss_coef=0.5).balances == ("bias", "switch")
    old = {"aux_loss_coef": 0.01, "bias_update_rate": 0.001}  # every config of an earlier version holds both
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MoELayer(8, 16, E, balance="none", **old).balances == ()
        for loss in ("switch", "sequence"):
            assert MoELayer(8, 16, E, balance=["bias", loss], **old).aux_loss_coef == 0.01
    with pytest.warns(UserWarning, match=r"aux_loss_coef: found 0.01 beside .* set balance=\['bias', 'switch'\]"):
        assert MoELayer(8, 16, E, balance="bias", **old).balances == ("bias",)


@pytest.mark.parametrize("scoring", ["topk-softmax", "softmax-topk", "sigmoid", "sigmoid-normalized"])
def test_a_router_that_gets_no_gradient_is_warned_of(scoring):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = MoELayer(8, 16, E, 1, scoring=scoring, init_std=0.5)
    layer.double()(torch.randn(10, 8).double()).square().sum().backward()
    warned = [str(w.message) for w in caught if "top_k: found 1" in str(w.message)]
    assert bool(warned) == (float(layer.router.weight.grad.norm()) < 1e-12)
    assert len(warned) == (scoring in ("topk-softmax", "sigmoid-normalized"))


def test_a_half_precision_state_leaves_the_bias_in_float32():
    layer = MoELayer(8, 16, E, balance="bias")
    layer.load_state_dict({name: t.bfloat16() for name, t in layer.state_dict().items()}, assign=True)
    assert layer.router.balance_bias.dtype == torch.float32
    assert layer.router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_made_on_meta_counts(assign):
    with torch.device("meta"):
        layer = MoELayer(8, 16, E, K, balance="bias")
    source = MoELayer(8, 16, E, K, balance="bias")
    source(torch.randn(5, 8))
    if assign:
        layer.load_state_dict(source.state_dict(), assign=True)
    else:  # as transformers does
        for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, tensor)
    layer(torch.randn(5, 8))
    assert layer.pending_counts.sum() == K * (10 if assign else 5)

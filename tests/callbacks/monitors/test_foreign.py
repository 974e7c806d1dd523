"""The monitors find what there is in models of transformers and in layouts of public projects, and measure it exactly.

The reference sees the same training step from outside: outputs by forward hooks on modules that are named here, attention by
a function mode round the step. It computes in float64. Shape legend: T tokens, E experts, S queries, N keys.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from helpers import zoo_layouts, zoo_models, zoo_public
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor

ZOO = {**zoo_models.DENSE, **zoo_models.MOE, **zoo_models.OTHERS, **zoo_layouts.LAYOUTS, **zoo_public.PUBLIC}
#: The head, the attention and FFN branches, the routers (regular expressions on whole names); attentions a layer.
LLAMA = (r"lm_head", r"model\.layers\.\d\.self_attn\.o_proj")
MOE = (*LLAMA, r"model\.layers\.\d\.mlp", r"model\.layers\.\d\.mlp\.gate")
GPT = (r"lm_head", r"transformer\.h\.\d\.attn\.c_proj", r"transformer\.h\.\d\.mlp\.c_proj", None)
TRANSFORMERS = {
    "Llama": (*LLAMA, r"model\.layers\.\d\.mlp\.down_proj", None),
    "GPT2": GPT,
    "GPTNeoX": (
        r"lm_head",
        r"gpt_neox\.layers\.\d\.attention\.dense",
        r"gpt_neox\.layers\.\d\.mlp\.dense_4h_to_h",
        None,
    ),
    "Mixtral": MOE,
    "Qwen2Moe": MOE,
    "Qwen3Moe": MOE,
    "Olmoe": MOE,
    "DeepseekV3": (*LLAMA, r"model\.layers\.(0\.mlp\.down_proj|1\.mlp)", r"model\.layers\.1\.mlp\.gate"),
    "GptOss": (*LLAMA, r"model\.layers\.\d\.mlp", r"model\.layers\.\d\.mlp\.router"),
    "Gemma2": (
        r"lm_head",
        r"model\.layers\.\d\.post_attention_layernorm",
        r"model\.layers\.\d\.post_feedforward_layernorm",
        None,
    ),
    "ViT": (r"classifier", r"vit\.layers\.\d\.attention\.o_proj", r"vit\.layers\.\d\.mlp\.fc2", None),
    "T5": (
        r"lm_head",
        r"(en|de)coder\.block\.\d\.layer\.\d\.(Self|EncDec)Attention\.o",
        r"(en|de)coder\.block\.\d\.layer\.\d\.DenseReluDense\.wo",
        None,
    ),
    "Bert": (
        r"cls\.predictions\.decoder",
        r"bert\.encoder\.layer\.\d\.attention\.output\.dense",
        r"bert\.encoder\.layer\.\d\.output\.dense",
        None,
    ),
}
LAYOUTS = {
    "nanoGPT": GPT,
    "litgpt moe": (
        r"lm_head",
        r"transformer\.h\.\d\.attn\.proj",
        r"transformer\.h\.\d\.mlp",
        r"transformer\.h\.\d\.mlp\.gate",
    ),
    "DiT": (r"final_layer\.linear", r"blocks\.\d\.attn\.proj", r"blocks\.\d\.mlp\.fc2", None),
    "x-transformers": (r"to_logits", r"attn_layers\.layers\.[02]\.1", r"attn_layers\.layers\.\d\.1\.ff\.2", None),
    "torchtitan": (r"output", r"layers\.\d\.attention\.wo", r"layers\.\d\.feed_forward\.w2", None),
    "timm ViT": (r"head", r"blocks\.\d\.attn\.proj", r"blocks\.\d\.mlp\.fc2", None),
    "nn.TransformerEncoder": (None, r"encoder\.layers\.\d\.self_attn", r"encoder\.layers\.\d\.linear2", None),
}
ONLY_EAGER = ("Gemma2", "GptOss")


class Foreign(LightningModule):
    """Trains a model of the zoo on its batch."""

    def __init__(self, zoo, seen):
        super().__init__()
        self.zoo, self.seen, self.model = zoo, seen, seen.model

    def training_step(self, batch, batch_idx):
        with self.seen:
            return self.zoo.loss(self.model, self.zoo.batch())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(TorchFunctionMode):
    """What a training step computes, seen from outside."""

    def __init__(self, model):
        super().__init__()
        self.outputs, self.logits, self.model = {}, [], model
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, args, output, name=name: self.outputs.__setitem__(name, output))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.fused(*args, **(kwargs or {}))
        elif func in (F.softmax, torch.Tensor.softmax, torch.softmax) and args[0].ndim == 4:
            self.logits.append(args[0].detach().double())
        elif func is F.multi_head_attention_forward:
            self.torch_own(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def torch_own(self, query, key, value, d, n, weight, bias, *args, attn_mask, key_padding_mask, **kwargs):
        """Of positions [S, B, d], with masks that are added."""
        rows = zip((query, key), weight.double().split(d), bias.double().split(d), strict=False)
        q, k = ((x.double() @ w.T + b).unflatten(-1, (n, -1)).permute(1, 2, 0, 3).detach() for x, w, b in rows)
        added = attn_mask.double() + key_padding_mask.double()[:, None, None]
        self.logits.append(q @ k.mT * q.shape[-1] ** -0.5 + added)

    def fused(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = (q.detach().double() @ keys.detach().double().mT) * (scale or q.shape[-1] ** -0.5)
        if is_causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril().bool(), float("-inf"))
        if attn_mask is not None:
            hides = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, float("-inf")) if hides else logits + attn_mask.double()
        self.logits.append(logits)

    def matching(self, pattern):
        return [name for name, _ in self.model.named_modules() if pattern and re.fullmatch(pattern, name)]

    def of(self, name):
        output = self.outputs[name]
        return (output[0] if isinstance(output, tuple) else output).detach().double()


def attention_values(logits):
    logits = logits[logits.amax(-1) > -3e4]
    lse = logits.logsumexp(-1)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return {"z": lse.square().mean(), "max_logit": logits.max(), "entropy": entropy.mean()}


def run(toy, name, implementation=None):
    """Two training steps; the monitors, the logger, and what the last of the steps computed."""
    torch.manual_seed(0)
    zoo = ZOO[name]
    model = zoo.make(32, 2, 4).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(getattr(module, "config", None), "attention_dropout"):
            module.config.attention_dropout = 0.0
    if implementation is not None:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # so that logits differ from one another
    seen = Seen(model)
    monitors, logger = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor()], toy.MemoryLogger()
    toy.make_trainer(monitors, logger).fit(Foreign(zoo, seen), torch.utils.data.DataLoader(torch.zeros(1, 1)))
    return monitors, logger, seen


def check(monitors, logger, seen, expected):
    """Every module that there is was found, and every value is that of float64."""
    head, attention, ffn, router = expected
    found = defaultdict(set)
    for monitor in monitors:
        for finding in monitor.findings.values():
            for each in finding.found:
                found[each.kind].add(each.name.removeprefix("model."))
    branches = {"attention": seen.matching(attention), "ffn": seen.matching(ffn)}
    n_attentions = len(found["attention"] - set(branches["attention"]))
    assert found["ffn"] == set(branches["ffn"])
    assert set(branches["attention"]) <= found["attention"]
    assert found["router"] == set(seen.matching(router))
    assert found["head"] == ({"embed"} if head is None else set(seen.matching(head)))
    values = {tag: logger.values(tag)[-1] for tag in logger.tags()}
    close = {"rel": 1e-4, "abs": 1e-6}
    for kind, names in branches.items():
        of_kind = sorted(tag for tag in values if tag.startswith(f"stability/rms/{kind}/"))
        outputs = sorted(seen.of(name).square().mean().sqrt().item() for name in names)
        assert sorted(values[tag] for tag in of_kind) == pytest.approx(outputs, **close)
        heavy = [((x - x.mean()) / x.std(correction=0)).pow(4).mean().item() for x in map(seen.of, names)]
        assert values[f"stability/kurtosis/{kind}_max"] == pytest.approx(max(heavy), **close)
    if head is not None:
        returned = getattr(seen.outputs[""], "logits", None)  # after Gemma's soft cap
        logits = seen.of(seen.matching(head)[0]) if returned is None else returned.detach().double()
        assert values["stability/z/lm_logits"] == pytest.approx(logits.logsumexp(-1).square().mean().item(), **close)
        assert values["stability/max_logit/lm_logits"] == pytest.approx(logits.max().item(), **close)
        wrong = logits[..., :-1].logsumexp(-1).square().mean().item()  # negative control: one class is missed
        assert values["stability/z/lm_logits"] != pytest.approx(wrong, **close)
    assert len(seen.logits) == max(n_attentions, len(branches["attention"]))
    for metric in ("z", "max_logit", "entropy"):
        of_metric = [attention_values(logits)[metric].item() for logits in seen.logits]
        logged = [value for tag, value in values.items() if tag.startswith(f"stability/{metric}/attention/")]
        assert sorted(logged) == pytest.approx(sorted(of_metric), **close), metric
    uncut = [logits.masked_fill(logits < -3e4, 0.0).logsumexp(-1).square().mean().item() for logits in seen.logits]
    masked = any((logits < -3e4).any() for logits in seen.logits)
    z = sorted(value for tag, value in values.items() if tag.startswith("stability/z/attention/"))
    assert (z != pytest.approx(sorted(uncut), **close)) == masked  # negative control: what is hidden does not count
    return values


def check_routers(values, seen, names):
    for i, name in enumerate(names):
        output = seen.outputs[name]
        logits = (output[0] if isinstance(output, tuple) else output).detach().double()
        logits = logits.reshape(-1, logits.shape[-1])
        ids = output[2] if isinstance(output, tuple) else logits.topk(2, dim=-1).indices
        label = f"{int(re.search(r'[0-9]+', name)[0]):02d}"
        counts = torch.bincount(ids.reshape(-1), minlength=logits.shape[-1]).double()
        p = logits.softmax(-1)
        expected = {
            "max_violation": counts.max() / counts.mean() - 1,
            "load_max_fraction": counts.max() / counts.sum(),
            "token_entropy": torch.special.entr(p).sum(-1).mean(),
            "gate_mass": p.gather(1, ids.reshape(len(p), -1)).sum(-1).mean(),
        }
        for metric, value in expected.items():
            assert values[f"routing/{metric}/{label}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (i, metric)
        z = logits.logsumexp(-1).square().mean().item()
        assert values[f"stability/z/router/{label}"] == pytest.approx(z, rel=1e-4)
        assert values[f"routing/token_entropy/{label}"] < torch.tensor(4.0).log().item() - 1e-3  # not simply uniform


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "Qwen2Moe" else pytest.mark.slow) for n in TRANSFORMERS]
)
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*found nothing to watch")
def test_transformers(toy, name, implementation):
    if name in ONLY_EAGER and implementation == "sdpa":
        pytest.skip("transformers has no sdpa of it")
    monitors, logger, seen = run(toy, name, implementation)
    if name == "GptOss":  # its softmax sees logits minus their largest: here only z and entropy tell
        sinks = [m.sinks.detach() for m in seen.model.modules() if hasattr(m, "sinks")]
        assert len(sinks) == 2
        entropies = [attention_values(logits)["entropy"].item() for logits in seen.logits]
        logged = [logger.values(f"stability/entropy/attention/0{i}")[-1] for i in range(2)]
        assert logged == pytest.approx(entropies, rel=1e-4)
        values = {tag: logger.values(tag)[-1] for tag in logger.tags()}
        assert values["stability/max_logit/attention_max"] != 0.0  # the largest of a shifted row is 0
        assert values["stability/rms/ffn_max"] > 0
        assert values["stability/rms/attention_max"] > 0
    else:
        values = check(monitors, logger, seen, TRANSFORMERS[name])
    check_routers(values, seen, seen.matching(TRANSFORMERS[name][3]))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*found nothing to watch")
def test_public_layouts(toy, name):
    monitors, logger, seen = run(toy, name)
    values = check(monitors, logger, seen, LAYOUTS[name])
    check_routers(values, seen, seen.matching(LAYOUTS[name][3]))
    if name == "nn.TransformerEncoder":  # no module makes its logits
        z = seen.model.last.detach().double().logsumexp(-1).square().mean().item()
        assert values["stability/z/lm_logits"] == pytest.approx(z, rel=1e-5)

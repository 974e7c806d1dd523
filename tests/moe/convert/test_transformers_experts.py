"""transformers' experts computed by our kernels: values, gradients, and what is refused."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue import register_experts
from lightning_mue.moe.convert import transformers_experts

transformers = pytest.importorskip("transformers", minversion="5")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

MODELS = Path(transformers.__file__).parent / "models"
#: Architectures that run as two products with the model's own functions between and after them.
UNFUSED = {
    "beam",
    "deepseek_v4",
    "glm5_next",
    "gpt_oss",
    "hy_v4",
    "inkling2",
    "minimax_m3_vl",
    "muse_spark",
    "openai_privacy_filter",
}
#: Those whose own functions round to float32.
FLOAT32 = {"beam", "inkling2", "muse_spark"}
#: Those whose "eager" rounds to float32, and "batched_mm" does not.
FLOAT32_EAGER = {"openai_privacy_filter"}
#: Every size that an experts class reads from its config, by any of its names.
EXPERTS, WIDTH, HIDDEN = 6, 12, 10
NAMES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), HIDDEN),
    **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
    **dict.fromkeys(("swiglu_limit", "limit", "swiglu_alpha"), 1.5),
    **dict.fromkeys(("rms_norm_eps", "post_norm_eps"), 1e-6),
    "mlp_hidden_act": "relu2",
}


class Config(SimpleNamespace):
    """Any number that is not known is that of the experts."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return NAMES.get(name, EXPERTS)


@cache
def classes() -> dict[str, tuple[str, str]]:
    """Every experts class in transformers' files: architecture / class -> module, class."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_impl" in ast.unparse(d) for d in node.decorator_list
            ):
                module = f"transformers.models.{path.parent.name}.{path.stem}"
                found[f"{path.parent.name}/{node.name}"] = (module, node.name)
    return found


def make(key, dtype=torch.float64):
    module, name = classes()[key]
    made = getattr(importlib.import_module(module), name)(Config(_experts_implementation="eager")).to(dtype)
    return fill(made)


def fill(module):
    for p in module.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return module


def inputs(dtype=torch.float64, tokens=23, sentinels=False):
    """Expert 1 has no tokens."""
    scores = torch.randn(tokens, EXPERTS)
    scores[:, 1] = -9
    ids = scores.topk(2).indices
    weights = torch.rand(tokens, 2, dtype=dtype)
    if sentinels:
        ids[::3, 1] = EXPERTS
        weights[::3, 1] = 0
    return torch.randn(tokens, WIDTH, dtype=dtype), ids, weights, torch.randn(tokens, WIDTH, dtype=dtype)


def run(module, implementation, x, ids, weights, dy):
    """The output, and the gradients of input, gates and weights."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, ids, weights)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "gates": weights.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_equal(module, reference, data, **tolerance):
    found, expected = run(module, register_experts(), *data), run(module, reference, *data)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def fused(module):
    return transformers_experts._fused_activation(module) is not None


@pytest.mark.slow  # imports every architecture
def test_every_architecture_computes_the_same():
    torch.manual_seed(0)
    register_experts()
    assert len(classes()) > 50
    assert {key.split("/")[0] for key in classes()} >= UNFUSED
    for key in classes():
        name, module = key.split("/")[0], make(key)
        assert fused(module) == (name not in UNFUSED), name
        # Functions that round to float32 round values that differ by 1e-16 to neighbours, rarely.
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if name in FLOAT32 else {"rtol": 1e-11, "atol": 1e-12}
        assert_equal(module, "batched_mm" if name in FLOAT32_EAGER else "eager", inputs(), **tolerance)


#: One of each kind: interleaved and transposed with biases, clamped, a norm afterwards.
@pytest.mark.parametrize(
    "key", ["gpt_oss/GptOssExperts", "deepseek_v4/DeepseekV4Experts", "muse_spark/MuseSparkExperts"]
)
@pytest.mark.parametrize("sentinels", [False, True])
def test_a_gate_or_norm_of_its_own(key, sentinels):
    module = make(key)
    module._is_expert_parallel = sentinels
    assert not fused(module)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if key.split("/")[0] in FLOAT32 else {"rtol": 1e-11, "atol": 1e-12}
    assert_equal(module, "batched_mm", inputs(sentinels=sentinels), **tolerance)


def test_a_wrong_alpha_is_noticed():
    module, data = make("gpt_oss/GptOssExperts"), inputs()
    expected = run(module, "eager", *data)
    module.alpha = 1.0
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(module, register_experts(), *data)["y"], expected["y"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags", [{}, {"is_transposed": True}, {"has_bias": True}, {"has_gate": False, "has_bias": True}]
)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_layouts_biases_and_activations(flags, act):
    module = fill(toy(act, **flags).double())
    assert fused(module) == (act != ("relu2" if flags.get("has_gate", True) else "silu"))
    assert_equal(module, "batched_mm", inputs(), rtol=1e-11, atol=1e-12)


def toy(act, *, is_transposed=False, has_bias=False, has_gate=True):
    class Toy(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN[act]
            name, rows = ("gate_up_proj", 2 * HIDDEN) if has_gate else ("up_proj", HIDDEN)
            up, down = (rows, WIDTH), (WIDTH, HIDDEN)
            for each, shape in ((name, up), ("down_proj", down)):
                size = shape[::-1] if is_transposed else shape
                self.register_parameter(each, nn.Parameter(torch.empty(EXPERTS, *size)))
                if has_bias:
                    self.register_parameter(f"{each}_bias", nn.Parameter(torch.empty(EXPERTS, shape[0])))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    made = use_experts_implementation(is_transposed=is_transposed, has_bias=has_bias, has_gate=has_gate)(Toy)
    return made(Config(_experts_implementation="batched_mm"))


def test_experts_of_other_devices_count_as_zero():
    module = make("mixtral/MixtralExperts")
    module._is_expert_parallel = True
    assert_equal(module, "batched_mm", inputs(sentinels=True), rtol=1e-11, atol=1e-12)


def test_a_wrong_gate_is_noticed():
    module, data = make("mixtral/MixtralExperts"), inputs()
    other = copy.deepcopy(module)
    other.act_fn = nn.GELU()
    expected, found = run(module, "eager", *data), run(other, register_experts(), *data)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["y"], expected["y"], rtol=1e-3, atol=1e-3)


def own(function, **names):
    """The same function under another's name."""
    function.__name__ = names["like"]
    return function


class SiLU(nn.Module):
    """Not torch's."""

    def forward(self, x):
        return x.tanh()


class Changed(nn.SiLU):
    def forward(self, x):
        return x.tanh()


def with_act(act):
    module = make("mixtral/MixtralExperts")
    del module.act_fn  # a module cannot be overwritten by a function
    module.act_fn = act
    return module


def patched():
    act = nn.SiLU()
    act.forward = torch.tanh
    return act


def hooked():
    act = nn.SiLU()
    act.register_forward_hook(lambda module, given, result: 2 * result)
    return act


@pytest.mark.parametrize(
    "act",
    [own(lambda x: x.tanh(), like="silu"), SiLU(), Changed(), patched(), hooked(), partial(F.silu), torch.sigmoid],
    ids=["function", "class", "subclass", "instance", "hook", "partial", "unknown"],
)
def test_an_activation_that_only_looks_like_a_known_one_is_called(act):
    module = with_act(act)
    assert not fused(module)
    assert_equal(module, "batched_mm", inputs(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "act", [F.silu, nn.SiLU(), F.gelu, nn.GELU(approximate="tanh"), partial(F.gelu, approximate="tanh")]
)
def test_torchs_own_functions_and_classes_are_known(act):
    assert_equal(with_act(act), "batched_mm", inputs(), rtol=1e-11, atol=1e-12)


def test_a_gate_replaced_on_the_instance_is_called():
    module = fill(toy("silu").double())
    module._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    assert_equal(module, "batched_mm", inputs(), rtol=1e-11, atol=1e-12)


def test_interleaved_weights_without_a_gate_that_knows_it_are_refused():
    module = toy("silu")
    module.is_concatenated = False
    with pytest.raises(ValueError, match=r"interleaved.*'eager'"):
        run(module, register_experts(), *inputs())


def test_negative_ids_are_refused():
    module, (x, ids, *rest) = toy("silu"), inputs()
    with pytest.raises(RuntimeError, match="top_k_index: found negative ids, expected ids of 0 and more"):
        run(module, register_experts(), x, ids - 1, *rest)


@pytest.mark.parametrize("key", ["olmoe/OlmoeExperts", "gpt_oss/GptOssExperts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_against_float64(key, dtype):
    module, (x, ids, weights, dy) = make(key, dtype), inputs(dtype)
    found = run(module, register_experts(), x, ids, weights, dy)
    expected = run(copy.deepcopy(module).double(), "eager", x.double(), ids, weights.double(), dy.double())
    eps = torch.finfo(dtype).eps  # a few roundings of values near one, and sums of at most 23 rows
    for name, value in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), value, rtol=8 * eps, atol=16 * eps)


def mixtral(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM._from_config(transformers.MixtralConfig(**sizes), **options)


def gpt_oss():
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def losses_and_gradients(model, implementation, ids, autocast=False):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("case", ["plain", "checkpointing", "frozen", "autocast"])
@pytest.mark.parametrize("make_model", [mixtral, gpt_oss])
def test_a_model_trains_the_same(make_model, case):
    model, ids = make_model().train(), torch.randint(20, (2, 9))
    names = list(model.state_dict())
    if case == "checkpointing":
        model.gradient_checkpointing_enable()
    if case == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("experts" not in name)
    found = losses_and_gradients(model, register_experts(), ids, case == "autocast")
    expected = losses_and_gradients(model, "eager", ids, case == "autocast")
    assert list(model.state_dict()) == names
    assert len(found) == len(expected)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if case == "autocast" else {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_generation_and_the_name_in_from_config():
    model = mixtral(experts_implementation=register_experts()).eval()
    assert model.config._experts_implementation == "lightning_mue"
    ids = torch.randint(20, (1, 5))
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.set_experts_implementation("eager")
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_meta_device_and_no_tokens():
    with torch.device("meta"):
        model = mixtral(experts_implementation=register_experts())
        assert model(input_ids=torch.zeros(2, 3, dtype=torch.int64)).logits.shape == (2, 3, 20)
    for key in ("mixtral/MixtralExperts", "gpt_oss/GptOssExperts"):
        found = run(make(key), register_experts(), *inputs(tokens=0))
        assert found["y"].shape == (0, WIDTH)
        assert not found["down_proj"].any()
        assert not found["gate_up_proj"].any()


def test_registering_twice_changes_nothing():
    register_experts()
    before = dict(ALL_EXPERTS_FUNCTIONS)
    assert register_experts() == "lightning_mue"
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


@pytest.mark.parametrize("missing", ["transformers", "transformers.integrations.moe"])
def test_a_missing_interface_is_named(monkeypatch, missing):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"^transformers: found .*, expected version 5"):
        register_experts()


def test_the_page_lists_every_architecture():
    page = (Path(__file__).parents[3] / "docs" / "transformers.md").read_text(encoding="utf-8")
    table = page.split("| architectures | state |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    named = {name: state for names, state in rows for name in names.split(", ")}
    assert set(named) == {key.split("/")[0] for key in classes()}
    assert {name for name, state in named.items() if state.startswith("the same values, unfused")} == UNFUSED
    assert all(state.startswith("the same values") for state in named.values())


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("key", ["mixtral/MixtralExperts", "gpt_oss/GptOssExperts"])
def test_it_compiles_without_a_graph_break(key):
    module, data = make(key, torch.float32), inputs(torch.float32)
    expected = run(module, "eager", *data)
    module.config._experts_implementation = register_experts()
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(*data[:3])
    torch.testing.assert_close(found, expected["y"], rtol=1e-5, atol=1e-5)

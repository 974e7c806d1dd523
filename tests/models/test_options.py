"""Options of MoE layers and routers are declared once, and are keys of a model's config all the same."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
import yaml

from lightning_mue import MoELanguageModel, MoELayer
from lightning_mue.cli.lightning_cli import MuECLI, main
from lightning_mue.moe import Router
from lightning_mue.moe import layer as layer_file
from lightning_mue.parameterizations.reading.base import build_base

#: What the model decides itself, and what it calls otherwise: bias is ffn_bias, n_groups is n_expert_groups.
OWN = {"self", "width", "expert_width", "n_experts", "top_k", "activation", "init_std", "optimizer", "bias", "n_groups"}
#: Every option of an MoE layer that a config of an earlier version could have.
OLD = {
    "shared_width": 8,
    "scoring": "sigmoid",
    "gate": "sqrt",
    "route_scale": 2.0,
    "balance": "bias",
    "aux_loss_coef": 0.02,
    "z_loss_coef": 0.001,
    "bias_update_rate": 0.01,
    "n_expert_groups": 2,
    "activation": "gelu",
    "jitter": 0.01,
    "balance_scope": "sequence",
    "backend": "torch",
    "shared_gate": True,
    "ffn_bias": True,
}
SIZES = {"context_length": 16, "width": 32, "depth": 2, "n_heads": 4, "n_experts": 8, "top_k": 2}


def forwarded():
    """Option -> its parameter, of the layer and the router."""
    parameters = {**inspect.signature(Router.__init__).parameters, **inspect.signature(MoELayer.__init__).parameters}
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in OWN}


def help_of_model(capsys, class_path="lightning_mue.models.MoELanguageModel"):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", class_path])
    options = {}
    for line in " ".join(capsys.readouterr().out.split()).split(" --model.")[1:]:
        options[line.split()[0]] = line  # the last one is the description, not the usage
    return options


def test_help_shows_every_option_of_layer_and_router_with_type_and_text(capsys):
    options = help_of_model(capsys)
    assert {"scoring", "gate", "choice", "jitter", "balance", "shared_width", "router_init_std"} <= set(forwarded())
    for name, parameter in forwarded().items():
        kind = parameter.annotation.replace("None", "null")
        assert f"(type: {kind}, default: {'null' if parameter.default is None else parameter.default})" in options[name]
        assert len(options[name].split("(type:")[0].split()) > 5, options[name]
    assert "(type: float | null, default: null)" in options["init_std"]  # the layer's own default is 0.02
    assert "n_groups" not in options
    assert "bias" not in options
    own = set(inspect.signature(MoELanguageModel).parameters) - {"moe"}
    assert {name for name in options if "help" not in name} == own | set(forwarded())


def write_config(path, class_path="lightning_mue.models.MoELanguageModel", **options):
    model = {"class_path": class_path, "init_args": {**SIZES, **options}}
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    return ["--config", str(path)]


def test_an_old_flat_config_gives_the_same_model(tmp_path):
    model = MuECLI(write_config(tmp_path / "old.yaml", **OLD), run=False).model
    layer = model.moe_layers[1]
    renamed = {"n_expert_groups": layer.router.n_groups, "ffn_bias": layer.experts.bias}
    renamed |= {"shared_width": layer.shared.hidden_width, "shared_gate": layer.shared_gate is not None}
    for name, value in OLD.items():
        owner = next((part for part in (layer, layer.router, layer.experts) if hasattr(part, name)), None)
        assert (renamed[name] if name in renamed else getattr(owner, name)) == value
    assert {name: model.hparams[name] for name in OLD} == OLD


@pytest.mark.parametrize("added", [{}, {"_class_path": "lightning_mue.models.MoELanguageModel"}])
def test_a_checkpoint_of_an_earlier_version_loads(tmp_path, added):
    """The keys of earlier versions in Python and by the CLI; Lightning does not filter what a constructor with **moe may get."""
    model = MoELanguageModel(**SIZES, **OLD)
    if added:
        added |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    hparams = {**SIZES, **OLD, **added}
    saved = {"state_dict": model.state_dict(), "hyper_parameters": hparams, "pytorch-lightning_version": "2.6.0"}
    torch.save(saved, tmp_path / "old.ckpt")
    for copied in (MoELanguageModel.load_from_checkpoint(tmp_path / "old.ckpt"), pickle.loads(pickle.dumps(model))):
        assert {name: copied.hparams[name] for name in (*SIZES, *OLD)} == {**SIZES, **OLD}
        assert not {"_class_path", "_instantiator", "moe"} & set(copied.hparams)
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in copied.state_dict().items())
        assert copied.moe_layers[0].router.scoring == "sigmoid"


@pytest.mark.parametrize("name", ["scorring", "n_groups", "bias"])
def test_a_config_with_an_unknown_option_is_refused(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        MuECLI(write_config(tmp_path / "wrong.yaml", **{name: 2}), run=False)
    assert name in capsys.readouterr().err


class RouterWithOneMore(Router):
    """A router with an option of its own.

    Args:
        width: As for `Router`.
        n_experts: As for `Router`.
        top_k: As for `Router`.
        temperature: Divides the logits.
        **router: As for `Router`.
    """

    def __init__(self, width: int, n_experts: int, top_k: int, *, temperature: float = 1.0, **router: object) -> None:
        super().__init__(width, n_experts, top_k, **router)
        self.temperature = temperature


class ModelOfItsOwn(MoELanguageModel):
    """For one test: jsonargparse keeps the parser of each class that it has parsed."""


def test_an_option_is_added_in_one_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer_file, "Router", RouterWithOneMore)
    path, name = tmp_path / "new.yaml", f"{__name__}.ModelOfItsOwn"
    assert "Divides the logits. (type: float, default: 1.0)" in help_of_model(capsys, name)["temperature"]
    model = MuECLI(write_config(path, name, temperature=2.5, scoring="sigmoid"), run=False).model
    assert [layer.router.temperature for layer in model.moe_layers] == [2.5] * 2
    assert model.moe_layers[0].router.scoring == "sigmoid"
    with pytest.raises(SystemExit):
        MuECLI(write_config(path, name, temperature="hot"), run=False)
    assert "temperature" in capsys.readouterr().err


@pytest.fixture(params=["python", "cli"])
def target(request, tmp_path):
    if request.param == "python":
        return MoELanguageModel(**SIZES, scoring="sigmoid")
    return MuECLI(write_config(tmp_path / "target.yaml", scoring="sigmoid"), run=False).model


def test_a_base_is_rebuilt_with_forwarded_options(target):
    base = build_base(target, {"n_experts": 4, "balance": "bias", "router_init_std": 0.5, "tokens": 100})
    layer = base.moe_layers[0]
    assert (layer.n_experts, layer.router.scoring, layer.balance, layer.router.init_std) == (4, "sigmoid", "bias", 0.5)


def test_a_misspelt_key_of_a_base_is_refused(target):
    with pytest.raises(ValueError, match=r"Did you mean 'n_experts'\?"):
        build_base(target, {"n_expertz": 4})
    for key in ("scorring", "n_groups", "balanse"):
        with pytest.raises(ValueError, match=key):
            build_base(target, {key: 2})


def test_a_layer_in_a_model_keeps_its_own_hyperparameters():
    layer = MoELanguageModel(**SIZES, scoring="sigmoid").moe_layers[0]
    assert layer.hparams["scoring"] == "sigmoid"
    assert "depth" not in layer.hparams

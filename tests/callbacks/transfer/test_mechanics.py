"""TransferMonitor's mechanics: what it measures, when, what it writes, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, MuECallback
from lightning_mue.callbacks import TransferMonitor
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.callbacks.transfer.layers import Layers
from lightning_mue.cli.lightning_cli import MuECLI

SIZES = {"vocab_size": 16, "context_length": 12, "width": 16, "n_heads": 2, "depth": 2, "n_experts": 4, "top_k": 2}
BASE = {**SIZES, "n_experts": 0}
STEPS = 8


def rows(count):
    data = torch.randint(0, 16, (count, 13), generator=torch.Generator().manual_seed(0))
    return [{"tokens": row[:-1], "targets": row[1:]} for row in data]


def make(sizes=SIZES, optimizer=None, cls=MoELanguageModel, **options):
    torch.manual_seed(0)
    optimizer = optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1))
    return cls(**{**sizes, **options}, optimizer=optimizer)


def fit(callbacks, model=None, *, steps=STEPS, ckpt_path=None, logger=False, batch=4, **options):
    defaults = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    model = make() if model is None else model
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=callbacks, logger=logger, **{**defaults, **options})
    trainer.fit(model, DataLoader(rows(batch * 64), batch_size=batch), ckpt_path=ckpt_path)
    return trainer, model


class Watch(Callback):
    """Weights before and after every batch, hooks during it, and outputs of the branches, by other means."""

    def __init__(self):
        self.before, self.after, self.hooks, self.rms = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.hooks.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def rms(x):
    return x.double().square().mean().sqrt().item()


def quadratic(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


def record(path, model=None, **options):
    return fit([TransferMonitor(record=path, points=64), *options.pop("callbacks", ())], model, **options)


def test_what_is_recorded_is_what_the_weights_did(tmp_path):
    watch = Watch()
    record(tmp_path / "a.json", callbacks=[watch])
    found = Fingerprint.load(tmp_path / "a.json")
    assert found.progress == pytest.approx([(t + 1) / STEPS for t in range(STEPS)])
    block = "transformer.blocks.1."
    names = {
        "hidden/q4": [f"{block}attention.w_{x}" for x in "qkvo"],
        "expert_up/q4": [f"{block}ffn.experts.w_{x}" for x in ("gate", "up")],
        "expert_down/q4": [f"{block}ffn.experts.w_down"],
        "router/q4": [f"{block}ffn.router.weight"],
        "embedding/outside": ["transformer.embedding.weight"],
        "final_norm/outside": ["transformer.final_norm.weight"],
    }
    for key, group in names.items():
        for step in range(STEPS):
            before, after = watch.before[step], watch.after[step]
            expected = quadratic([rms(after[n] - before[n]) / rms(before[n]) for n in group])
            # Four digits are kept.
            assert found.curves[f"update/{key}"][step] == pytest.approx(expected, rel=1e-3), key
            assert found.curves[f"weight/{key}"][step] == pytest.approx(
                quadratic([rms(before[n]) for n in group]), rel=1e-3
            )


def test_reach_is_change_times_fan_in_multipliers_and_layers(tmp_path):
    watch, model = (
        Watch(),
        make(residual_multiplier=0.5, ffn_multiplier=3.0, route_scale=2.0, output_multiplier=0.25, shared_width=8),
    )
    record(tmp_path / "a.json", model, callbacks=[watch])
    found, block = Fingerprint.load(tmp_path / "a.json"), "transformer.blocks.0."
    h, d, branch = model.expert_width, 16, 0.5 * 2  # residual multiplier x layers
    expected = {
        "hidden/q2": (d * branch, [f"{block}attention.w_{x}" for x in "qkvo"]),
        "expert_up/q2": (d * branch, [f"{block}ffn.experts.w_{x}" for x in ("gate", "up")]),
        "expert_down/q2": (h * branch * 3.0 * 2.0, [f"{block}ffn.experts.w_down"]),  # gates sum to 1
        "shared_down/q2": (8 * branch * 3.0, [f"{block}ffn.shared.w_down"]),
        "router/q2": (d * branch, [f"{block}ffn.router.weight"]),
        "norm/q2": (branch, [f"{block}attention_norm.weight", f"{block}ffn_norm.weight"]),
        "unembedding/outside": (d * 0.25, ["transformer.unembedding.weight"]),
        "embedding/outside": (1, ["transformer.embedding.weight"]),
    }
    for key, (factor, group) in expected.items():
        for step in range(STEPS):
            moved = quadratic([rms(watch.after[step][n] - watch.before[step][n]) for n in group])
            assert found.curves[f"reach/{key}"][step] == pytest.approx(factor * moved, rel=1e-3), key


def test_gates_that_do_not_sum_to_1_count(tmp_path):
    """Two sigmoid gates of about 1/2 sum to about 1; without normalization of a softmax over 4, to about 1/2."""
    watch = Watch()
    record(tmp_path / "a.json", make(scoring="softmax-topk", init_std=0.01), callbacks=[watch])
    name, found = "transformer.blocks.0.ffn.experts.w_down", Fingerprint.load(tmp_path / "a.json")
    moved = rms(watch.after[0][name] - watch.before[0][name])
    gates = found.curves["reach/expert_down/q2"][0] / (moved * watch.before[0][name].shape[-1] * 2)
    assert 0.5 < gates < 0.6


def test_on_the_sphere_the_update_is_the_step(tmp_path):
    model = make(optimizer=lambda params: HyperSphereOptimizer(params, lr=0.02, adamw_lr=1e-3))
    record(tmp_path / "a.json", model)
    found = Fingerprint.load(tmp_path / "a.json")
    assert found.rule == "sp (sphere)"
    # The chord of an arc that begins with a tangent of 0.02 and is projected back.
    assert found.curves["update/hidden/q2"] == pytest.approx([0.02] * STEPS, rel=0.01)
    assert found.curves["reach/hidden/q2"] == pytest.approx([0.04] * STEPS, rel=0.01)  # two layers


def test_every_name(toy, tmp_path):
    record(tmp_path / "a.json")
    logger = toy.MemoryLogger()
    fit([TransferMonitor(compare=tmp_path / "a.json")], logger=logger)
    outside = ["embedding", "final_norm", "unembedding"]
    inside = ["expert_down", "expert_up", "hidden", "norm", "qk_norm", "router"]
    places = [f"{role}/outside" for role in outside] + [f"{role}/{q}" for role in inside for q in ("q2", "q4")]
    expected = [f"transfer/{quantity}/{place}" for quantity in ("update", "reach") for place in places]
    expected += [f"transfer/rms/{branch}/{q}" for branch in ("attention", "ffn") for q in ("q2", "q4")]
    expected += ["transfer/rms/residual/outside", "transfer/z/lm_logits/outside"]
    expected += [f"transfer/z/{kind}/{q}" for kind in ("attention", "router") for q in ("q2", "q4")]
    expected += ["transfer/loss", "transfer/worst"]
    assert [tag for tag in logger.tags() if tag.startswith("transfer")] == sorted(expected)
    assert logger.steps("transfer/worst") == list(range(STEPS))


def test_dense_base_and_moe_target_say_what_is_not_compared(toy, tmp_path, caplog):
    record(tmp_path / "a.json", make(BASE))
    logger = toy.MemoryLogger()
    caplog.set_level("INFO")
    fit([TransferMonitor(compare=tmp_path / "a.json")], logger=logger)
    notes = [r.message for r in caplog.records if "not compared" in r.message]
    assert notes == [
        "TransferMonitor: not compared, because the base lacks it: reach router, update router, z router; because this run "
        "lacks it: nothing."
    ]
    assert "transfer/update/expert_down/q2" in logger.tags()
    assert not [tag for tag in logger.tags() if "router" in tag and tag.startswith("transfer")]


def test_moe_base_and_dense_target(toy, tmp_path, caplog):
    record(tmp_path / "a.json")
    logger = toy.MemoryLogger()
    caplog.set_level("INFO")
    fit([TransferMonitor(compare=tmp_path / "a.json")], make(BASE), logger=logger)
    assert "transfer/update/ffn_down/q2" in logger.tags()
    (note,) = [r.message for r in caplog.records if "not compared" in r.message]
    assert note.endswith(
        "the base lacks it: nothing; because this run lacks it: reach router, update router, z router."
    )


def test_hooks_and_copies_exist_in_sampled_steps_only(tmp_path):
    record(tmp_path / "a.json")
    for every, sampled in [(3, [2, 5]), (8, [7]), (9, [])]:
        watch = Watch()
        fit([TransferMonitor(compare=tmp_path / "a.json", every_n_steps=every), watch])
        assert [step for step, hooks in enumerate(watch.hooks) if hooks] == sampled
    watch, monitor = Watch(), TransferMonitor(record=tmp_path / "b.json", points=2)
    _, model = fit([monitor, watch])
    assert [step for step, hooks in enumerate(watch.hooks) if hooks] == [0, STEPS - 1]
    assert not any(len(m._forward_hooks) for m in model.modules())
    assert monitor._updates == monitor._probes == []


def test_accumulation_measures_the_batch_that_steps(tmp_path):
    watch = Watch()
    record(tmp_path / "a.json", callbacks=[watch], accumulate_grad_batches=3)
    found, name = Fingerprint.load(tmp_path / "a.json"), "transformer.embedding.weight"
    assert found.steps == STEPS == len(found.progress)
    for step in range(STEPS):
        before, after = watch.before[3 * step + 2][name], watch.after[3 * step + 2][name]
        assert found.curves["update/embedding/outside"][step] == pytest.approx(
            rms(after - before) / rms(before), rel=1e-3
        )


def test_the_training_does_not_change(tmp_path):
    plain, watched = fit([])[1], record(tmp_path / "a.json")[1]
    for name, p in plain.named_parameters():
        assert torch.equal(p, watched.get_parameter(name)), name


def test_a_resumed_run_goes_on_recording(tmp_path):
    record(tmp_path / "whole.json")
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    torch.manual_seed(3)
    record(tmp_path / "parts.json", callbacks=[saver], enable_checkpointing=True)
    whole = (tmp_path / "parts.json").read_text()
    (tmp_path / "parts.json").unlink()
    checkpoint = tmp_path / "step=5.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    (points,) = [value["points"] for key, value in state.items() if key.startswith("TransferMonitor")]
    assert sorted(points) == [0, 1, 2, 3, 4]
    record(tmp_path / "parts.json", ckpt_path=checkpoint)
    resumed, complete = json.loads((tmp_path / "parts.json").read_text()), json.loads(whole)
    assert resumed["progress"] == complete["progress"]
    for key, curve in complete["curves"].items():
        assert resumed["curves"][key][:5] == curve[:5], key


def test_another_run_with_the_same_monitor_starts_anew(tmp_path):
    monitor = TransferMonitor(record=tmp_path / "a.json", points=64)
    fit([monitor])
    fit([monitor], steps=4)
    assert Fingerprint.load(tmp_path / "a.json").progress == [0.25, 0.5, 0.75, 1.0]


def test_an_exception_leaves_what_there_is(tmp_path):
    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("broken batch")

    with pytest.raises(RuntimeError, match="broken batch"):
        record(tmp_path / "a.json", callbacks=[Failing()])
    found = Fingerprint.load(tmp_path / "a.json")
    assert len(found.progress) == 3
    assert found.at("update/hidden/q2", 3 / STEPS) is not None
    assert found.at("update/hidden/q2", 4 / STEPS) is None
    with pytest.raises(RuntimeError, match="broken batch"):  # before the first point: the old file stays
        fit([TransferMonitor(record=tmp_path / "a.json"), _Fails()])
    assert Fingerprint.load(tmp_path / "a.json") == found


class _Fails(Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("broken batch")


class Obstructs(Callback):
    """Puts a file where the folder of the fingerprint was; may then raise."""

    def __init__(self, folder, error=None):
        self.folder, self.error = folder, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            self.folder.rmdir()
            self.folder.write_text("")
            if self.error is not None:
                raise self.error


def test_a_fingerprint_that_cannot_be_written_hides_nothing(tmp_path):
    with pytest.warns(UserWarning, match=r"could not be written to .*one.a\.json.*(exists|directory)"):
        trainer, _ = record(tmp_path / "one" / "a.json", callbacks=[Obstructs(tmp_path / "one")])
    assert trainer.state.finished
    with (
        pytest.warns(UserWarning, match=r"could not be written to .*two.a\.json"),
        pytest.raises(RuntimeError, match="broken batch"),
    ):
        record(tmp_path / "two" / "a.json", callbacks=[Obstructs(tmp_path / "two", RuntimeError("broken batch"))])


def test_fast_dev_run_overwrites_nothing(tmp_path):
    record(tmp_path / "a.json")
    old = (tmp_path / "a.json").read_bytes()
    fit([TransferMonitor(record=tmp_path / "a.json", compare=tmp_path / "a.json")], fast_dev_run=2)
    assert (tmp_path / "a.json").read_bytes() == old


def test_record_and_compare_at_once(toy, tmp_path):
    record(tmp_path / "a.json")
    logger = toy.MemoryLogger()
    fit([TransferMonitor(record=tmp_path / "b.json", compare=tmp_path / "a.json")], logger=logger)
    assert Fingerprint.load(tmp_path / "b.json").curves == Fingerprint.load(tmp_path / "a.json").curves
    assert logger.values("transfer/worst")[0] == pytest.approx(0, abs=1e-3)


def test_sanity_check_and_validation_have_no_hooks(tmp_path):
    seen = []

    class Count(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[TransferMonitor(record=tmp_path / "a.json"), Count()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    trainer.fit(make(), DataLoader(rows(16), batch_size=4), DataLoader(rows(4), batch_size=4))
    assert len(seen) == 3
    assert set(seen) == {0}
    assert len(Fingerprint.load(tmp_path / "a.json").progress) == 4


class SkippingAdamW(torch.optim.AdamW):
    """Skips every other step, as a GradScaler does."""

    calls = 0

    def step(self, closure=None):
        loss = closure()
        self.calls += 1
        if self.calls % 2:
            return loss
        return super().step()


def test_a_skipped_step_gives_no_update(tmp_path):
    record(tmp_path / "a.json", make(optimizer=lambda params: SkippingAdamW(params, lr=1e-2)))
    found = Fingerprint.load(tmp_path / "a.json")
    assert [value is None for value in found.curves["update/hidden/q2"]] == [True, False] * (STEPS // 2)
    assert all(value for value in found.curves["rms/ffn/q2"])


def test_weights_that_never_move_are_warned_of(tmp_path):
    record(tmp_path / "a.json")
    with pytest.warns(UserWarning, match="no weight has moved in the last 3 sampled steps"):
        fit(
            [TransferMonitor(compare=tmp_path / "a.json", patience=3)],
            make(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)),
        )


def test_frozen_and_bfloat16_weights(tmp_path):
    model = make()
    model.transformer.embedding.weight.requires_grad_(False)
    watch = Watch()
    record(tmp_path / "a.json", model.bfloat16(), precision="bf16-true", callbacks=[watch])
    found, name = Fingerprint.load(tmp_path / "a.json"), "transformer.unembedding.weight"
    assert "update/embedding/outside" not in found.curves
    before, after = watch.before[3][name], watch.after[3][name]
    assert before.dtype == torch.bfloat16
    expected = rms(after.double() - before.double()) / rms(before)
    assert found.curves["update/unembedding/outside"][3] == pytest.approx(expected, rel=1e-3)


class Manual(MoELanguageModel):
    """Two optimizers, stepped by hand, one after the other."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        first, *rest = self.parameters()
        return [torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


def test_manual_optimization_with_two_optimizers(tmp_path):
    watch = Watch()
    record(tmp_path / "a.json", make(cls=Manual), callbacks=[watch], steps=2 * STEPS)
    found = Fingerprint.load(tmp_path / "a.json")
    assert found.steps == STEPS
    assert found.progress[-1] == 1.0
    for key, name in (("embedding", "embedding"), ("unembedding", "unembedding"), ("final_norm", "final_norm")):
        weight = f"transformer.{name}.weight"
        for step in range(STEPS):
            before, after = watch.before[step][weight], watch.after[step][weight]
            assert found.curves[f"update/{key}/outside"][step] == pytest.approx(
                rms(after - before) / rms(before), rel=1e-3
            )


class Foreign(LightningModule):
    """Declares nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.strange = nn.Parameter(torch.randn(8, 8, 8))

    def training_step(self, batch, batch_idx):
        x = torch.nn.functional.one_hot(batch["tokens"][:, :8] % 8, 8).float()
        for block in self.blocks:
            x = x + block(x)
        return (x @ self.strange[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_foreign_modules_need_roles_and_then_work(toy, tmp_path):
    roles = {r"blocks.*weight": "hidden", "strange": "ffn_up", "bias": "bias"}
    fit([TransferMonitor(record=tmp_path / "a.json", points=64, roles=roles)], Foreign())
    logger = toy.MemoryLogger()
    fit([TransferMonitor(compare=tmp_path / "a.json", roles=roles)], Foreign(), logger=logger)
    assert "transfer/update/hidden/q3" in logger.tags()
    assert "transfer/update/ffn_up/outside" in logger.tags()
    assert logger.values("transfer/update/hidden/q3")[0] == pytest.approx(1, rel=1e-3)


def test_layers_of_several_stacks():
    names = (
        [f"encoder.{i}.w" for i in range(8)]
        + [f"decoder.{i}.experts.{j}.w" for i in range(2) for j in range(9)]
        + ["head.w"]
    )
    layers = Layers(names)
    places = [layers.place(f"encoder.{i}.w") for i in range(8)]
    assert places == ["q1", "q1", "q2", "q2", "q3", "q3", "q4", "q4"]
    assert [layers.place(f"decoder.{i}.experts.8.w") for i in range(2)] == ["q2", "q4"]
    assert layers.place("head.w") == "outside"
    assert (layers.count("encoder.0.w"), layers.count("decoder.1.experts.8.w"), layers.count("head.w")) == (8, 2, 1)
    assert layers.depths["q1"] == pytest.approx(1 / 8)


def test_bad_arguments_and_files_are_refused_before_step_0(tmp_path):
    for options, match in [
        ({}, "record: found None, and compare is None too"),
        ({"record": "a", "band": 1.0}, "band: found 1.0"),
        ({"record": "a", "points": 1}, "points: found 1"),
        ({"record": "a", "patience": 0}, "patience: found 0"),
        ({"record": "a", "warmup": 1.0}, "warmup: found 1.0"),
        ({"record": "a", "max_elements": 0}, "max_elements: found 0"),
        ({"record": "a", "every_n_steps": 0}, "every_n_steps: found 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            TransferMonitor(**options)
    for monitor, match in [
        (TransferMonitor(compare=tmp_path / "none.json"), "compare: .*does not exist"),
        (TransferMonitor(record=tmp_path), "record: found .*, which is a folder"),
    ]:
        watch = Watch()
        with pytest.raises(ValueError, match=match):
            fit([monitor, watch])
        assert watch.before == []
    with pytest.raises(ValueError, match=r"max_steps: found -1 .*length of this run is not known.*Set max_steps"):
        fit([TransferMonitor(record=tmp_path / "a.json")], steps=-1, max_epochs=-1)


def test_a_plan_with_another_base_is_warned_of(tmp_path):
    record(tmp_path / "a.json")
    mue = MuECallback(base={"width": 8}, verbose=False)
    with pytest.warns(UserWarning, match=r"not recorded at the base.*width 16 in the fingerprint, 8 in the plan"):
        fit([TransferMonitor(compare=tmp_path / "a.json"), mue], steps=2)


def test_z_value_of_a_router_with_more_experts(tmp_path):
    """logsumexp over E times as many logits of the same size is ln E larger, and nothing is wrong with that."""
    ratios = {}
    for name, experts in (("a", 4), ("b", 4), ("c", 8)):
        path, sizes = tmp_path / f"{name}.json", {**SIZES, "init_std": 1e-6, "n_experts": experts}
        monitor = TransferMonitor(record=path) if name == "a" else TransferMonitor(compare=tmp_path / "a.json")
        trainer, _ = fit([monitor], make(sizes, optimizer=lambda p: torch.optim.SGD(p, lr=1e-9)), steps=4)
        ratios[name] = float(trainer.callback_metrics.get("transfer/z/router/q2", 0))
    assert ratios["b"] == pytest.approx(1, abs=1e-3)
    assert ratios["c"] == pytest.approx(1, abs=1e-3)  # and not (ln 8 / ln 4)^2 = 2.25


def test_page_and_tags_cover_each_other(tmp_path):
    record(tmp_path / "a.json")
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    fit([TransferMonitor(compare=tmp_path / "a.json")], logger=logger)
    tags = {tag for tag in EventAccumulator(logger.log_dir).Reload().Tags()["scalars"] if tag.startswith("transfer")}
    assert len(tags) > 30
    shown = set()
    for regexes in TransferMonitor.charts.values():
        for regex in regexes:
            matched = {tag for tag in tags if re.match(f"({regex})$", tag)}
            assert matched, regex
            shown |= matched
    assert shown == tags


def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog. " * 40)
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    config = """
trainer:
  accelerator: cpu
  max_steps: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_mue.callbacks.TransferMonitor
      init_args: {record: out/base.json, points: 8}
model:
  class_path: lightning_mue.models.MoELanguageModel
  init_args: {context_length: 16, width: 16, depth: 1, n_heads: 2, n_experts: 0}
data:
  class_path: lightning_mue.data.TextDataModule
  init_args: {path: text, context_length: 16, batch_size: 2, val_batches: 1}
"""
    (tmp_path / "c.yaml").write_text(config)
    MuECLI(args=["fit", "--config", "c.yaml"])
    assert len(Fingerprint.load("out/base.json").progress) == 3

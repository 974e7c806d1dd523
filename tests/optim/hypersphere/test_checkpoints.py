"""HyperSphereOptimizer's state through checkpoints: Lightning's and torch.distributed's, over numbers of processes."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import hypersphere_models as models
from helpers.processes import launch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from optim.hypersphere import _checkpoint_ranks as checkpoints
from torch import nn

from lightning_mue import MoELanguageModel
from lightning_mue.data import TextDataModule
from lightning_mue.optim import HyperSphereOptimizer

RUNS = [(layout, rank) for layout in checkpoints.LAYOUTS for rank in (0, 1)]
FOREIGN = r"state_dict: found param group \d .*expected a HyperSphereOptimizer's.*start this optimizer from scratch"


def differences(a, b):
    """Largest difference of weights, momenta, radii and so on."""
    largest = {"weights": [0.0]}
    for part in ("weights", "state"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            key = "weights" if part == "weights" else name.split("/")[1]
            largest.setdefault(key, []).append(float((a[part][name].double() - b[part][name].double()).abs().max()))
    assert {"momentum", "radius", "exp_avg", "exp_avg_sq", "step"} < largest.keys()
    return {key: max(values) for key, values in largest.items()}


def assert_equal(a, b):
    assert all(value == 0 for value in differences(a, b).values()), differences(a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    """Two ranks train, save, resume."""
    return launch(checkpoints.__file__, "two", 2, folder)


@pytest.fixture(scope="module")
def one(two, folder):
    """One process loads what two ranks have saved, saves it again, and trains on."""
    found = {}
    for layout in checkpoints.LAYOUTS:
        model, optimizer = checkpoints.build(seed=3)
        fresh = checkpoints.state_of(model, optimizer)["weights"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in a single process")  # meant so
            checkpoints.load_sharded(model, optimizer, folder / f"two-{layout}")
            loaded = checkpoints.state_of(model, optimizer)
            checkpoints.save_sharded(model, optimizer, folder / f"one-{layout}")
        models.fit(model, optimizer, range(checkpoints.STOP, checkpoints.END))
        found[layout] = {"fresh": fresh, "loaded": loaded, "end": checkpoints.state_of(model, optimizer)}
    return found


@pytest.fixture(scope="module")
def two_again(one, folder):
    return launch(checkpoints.__file__, "two_again", 2, folder)


@pytest.mark.parametrize(("layout", "rank"), RUNS)
@pytest.mark.parametrize("way", ["sharded", "full"])
def test_resume_on_two_ranks_is_exact(two, layout, rank, way):
    """Into a model that starts from other weights on each rank."""
    seen = two[rank][layout]
    assert_equal(seen[f"{way} loaded"], seen["saved"])
    assert_equal(seen[f"{way} end"], seen["end"])
    moved = differences(seen["saved"], seen["end"])
    assert moved["weights"] > 1e-2
    assert moved["radius"] == 0


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_radii_lie_as_their_experts_do(two, layout):
    for rank, report in enumerate(two):
        for found in (report[layout][key] for key in ("radii", "sharded radii", "full radii")):
            assert found["narrow.weight"] == found["lm_head.weight"] == [[], []]
            here = 5 if layout == "columns" else (3, 2)[rank]
            assert found["experts.up"] == found["experts.down"] == [[5], [here]]


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_one_process_loads_what_two_ranks_saved(two, one, layout):
    seen = two[0][layout]
    assert_equal(one[layout]["loaded"], seen["saved"])
    # And trains on alike: gradients, summed in another order, differ in the last bits (1e-6 is seen).
    assert max(differences(one[layout]["end"], seen["end"]).values()) < 1e-5
    fresh = one[layout]["fresh"]
    assert min(float((fresh[n] - w).abs().max()) for n, w in seen["saved"]["weights"].items() if w.ndim > 1) > 1e-2


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_one_process_loads_a_full_state_dict(two, folder, layout):
    saved = torch.load(folder / f"full-{layout}.pt", weights_only=True)
    model, optimizer = checkpoints.build(seed=3)
    checkpoints.set_model_state_dict(model, saved["model"])
    checkpoints.set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    assert_equal(checkpoints.state_of(model, optimizer), two[0][layout]["saved"])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rank"), RUNS)
def test_two_ranks_load_what_one_process_saved(two, two_again, layout, rank):
    """From two to one and back: not a bit is lost, and the run goes on as if nothing had been saved."""
    assert_equal(two_again[rank][layout]["loaded"], two[rank][layout]["saved"])
    assert_equal(two_again[rank][layout]["end"], two[rank][layout]["end"])


def test_state_of_another_optimizer_is_refused_on_two_ranks(two):
    for rank, report in enumerate(two):
        assert re.search(f"^ValueError: {FOREIGN}", report["refused sharded"])
        if rank == 0:  # torch gives the others only what their own optimizers have
            assert "amsgrad, fused" in report["refused full"]
            assert re.search(f"^ValueError: {FOREIGN}", report["refused full"])


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
def test_state_of_another_optimizer_is_refused(other):
    """With the names of torch.distributed.checkpoint and with the numbers of torch.optim."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False))
    theirs = other(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).square().sum().backward()
    theirs.step()
    theirs.zero_grad()
    mine = models.optimizer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=FOREIGN):
        checkpoints.set_optimizer_state_dict(model, mine, checkpoints.get_optimizer_state_dict(model, theirs))
    with pytest.raises(ValueError, match=FOREIGN):
        mine.load_state_dict(theirs.state_dict())
    # What torch.distributed.checkpoint makes of a full state dict: theirs, merged into the groups and state of mine.
    own, merged = mine.state_dict(), theirs.state_dict()
    merged["param_groups"] = [{**merged["param_groups"][0], **own["param_groups"][0]}]
    merged["state"] = {i: {**merged["state"].get(i, {}), **state} for i, state in own["state"].items()}
    with pytest.raises(ValueError, match=FOREIGN):
        mine.load_state_dict(merged)
    mine.load_state_dict(own)  # the control
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(folder):
    path = folder / "corpus.txt"
    path.write_bytes(bytes(torch.randint(0, 64, (6000,), generator=torch.Generator().manual_seed(0)).tolist()))
    return path


def fit(corpus, folder, steps, ckpt_path=None, seed=0):
    torch.manual_seed(seed)
    model = MoELanguageModel(
        vocab_size=256,
        context_length=16,
        width=32,
        n_heads=2,
        depth=1,
        n_experts=3,
        optimizer=functools.partial(HyperSphereOptimizer, lr=0.02),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = TextDataModule(corpus, context_length=16, batch_size=4, cache_dir=folder / "cache")
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return checkpoints.state_of(model, trainer.optimizers[0])


def test_resume_by_lightning_in_one_process_is_exact(corpus, tmp_path):
    through = fit(corpus, tmp_path, 6)
    resumed = fit(corpus, tmp_path, 6, ckpt_path=tmp_path / "step=3.ckpt", seed=1)
    assert_equal(resumed, through)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert differences(through, fit(corpus, tmp_path / "short", 3))["weights"] > 1e-2, (
        "the last steps moved the weights"
    )
    assert [group["kind"] for group in saved["optimizer_states"][0]["param_groups"]] == [
        "sphere",
        "adam_sphere",
        "adamw",
    ]


@pytest.fixture(scope="module")
def lightning(corpus, folder):
    """DDP and FSDP2 by Lightning's strategies, with MuECallback, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, checkpoints.__file__, str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"lightning{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-full"])
def test_resume_by_lightning_on_two_ranks_is_exact(lightning, strategy, rank):
    """Distributed and full checkpoints of ModelParallelStrategy, and DDP, stopped at 3 of 6 steps."""
    seen = lightning[rank][strategy]
    assert_equal(seen["resumed end"], seen["end"])
    for name, w in seen["middle"].items():
        assert not torch.equal(w, seen["start"][name])
        assert not torch.equal(w, seen["end"]["weights"][name])
    assert seen["kinds"] == ["sphere", "adam_sphere", "adamw"]
    assert seen["shared"] == (seen["plain"] if strategy == "ddp" else 0)


@pytest.mark.slow
def test_lightning_trains_alike_with_ddp_and_fsdp2(lightning):
    """The same batches: gradients differ by the order of their sums (1e-6 is seen)."""
    ddp, fsdp2 = (lightning[0][strategy]["end"] for strategy in ("ddp", "fsdp2"))
    assert max(differences(ddp, fsdp2).values()) < 1e-5
    stacks = [lie for name, lie in lightning[0]["fsdp2"]["radii"].items() if lie[0]]
    assert [3, 3] not in stacks
    assert [[3], [2]] in stacks  # 3 experts on two ranks

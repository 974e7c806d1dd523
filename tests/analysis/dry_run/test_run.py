"""The dry run's figures against hand-computed ones, what it refuses, and what it says that it does not count."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.distributed.fsdp import fully_shard

from lightning_mue import MoELanguageModel
from lightning_mue.analysis.dry_run.blocks import FSDPBlock, in_flight_bytes
from lightning_mue.analysis.dry_run.recording import sent_bytes
from lightning_mue.analysis.dry_run.run import Run, check_run, dry_run
from lightning_mue.console import to_text
from lightning_mue.optim import HyperSphereOptimizer


class _Two(LightningModule):
    """Two linear maps [7, 3] and [3, 7] without biases, each an FSDP block of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 7, bias=False), torch.nn.Linear(7, 3, bias=False)
        self.register_buffer("table", torch.zeros(5, dtype=torch.int64))

    def configure_model(self):
        if self._device_mesh is not None:
            for module in (self.a, self.b):
                fully_shard(module, mesh=self._device_mesh["data_parallel"])


def two():
    with torch.device("meta"):
        return _Two()


def momentum(module):
    return [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)]


def _on_the_sphere(module):
    groups = [{"params": list(module.parameters()), "kind": "sphere"}]
    return [HyperSphereOptimizer(groups)]


def test_uneven_shards_by_hand():
    found = dry_run(two(), Run(world=4), momentum)
    # Seven rows over four ranks are 2, 2, 2, 1; three rows 1, 1, 1, 0.
    numbers = [2 * 3 + 7, 2 * 3 + 7, 2 * 3 + 7, 1 * 3]
    assert [held["weights"] for held in found.memory] == [4 * n for n in numbers]
    assert [held["optimizer state"] for held in found.memory] == [4 * n for n in numbers]
    assert [held["buffers"] for held in found.memory] == [40] * 4
    (work,) = found.work
    assert work.by_rank == numbers
    assert work.imbalance == pytest.approx(13 / (42 / 4))
    # Padded to eight and four rows, gathered by a ring of four: each rank passes on three parts.
    assert {row.what: (row.number, row.sent) for row in found.traffic} == {
        "FSDP weights, forward": (2, 4 * 3 * (2 * 3 + 7)),
        "FSDP gradients": (2, 4 * 3 * (2 * 3 + 7)),
    }
    assert not dist.is_initialized()


def test_replicas_hold_everything_and_share_the_work():
    found = dry_run(two(), Run(world=3, replicated=True), _on_the_sphere)
    assert [held["DDP buckets"] for held in found.memory] == [4 * 42] * 3
    # Two matrices and three ranks: one has no work. n = 3, m = 7; n^2 (2 m + n) multiplications in each of five steps.
    assert sorted(found.work[1].by_rank) == [0, 1530, 1530]
    assert found.work[1].imbalance == pytest.approx(1.5)
    assert "every rank holds all of it" in found.verdict(1e-9)


def test_blocks_in_flight():
    # The root stays; of the others the largest two neighbors are gathered, and a gradient is there twice.
    blocks = [
        FSDPBlock(str(i), 2, 1, w, g, i == 0) for i, (w, g) in enumerate([(10, 1), (100, 20), (200, 40), (150, 30)])
    ]
    assert in_flight_bytes(blocks) == 10 + 1 + 350 + 2 * 40
    assert in_flight_bytes(blocks[:2]) == 10 + 1 + 100 + 2 * 20
    assert in_flight_bytes([]) == 0


@pytest.mark.parametrize(
    ("collective", "sent"), [("all-gather", 36), ("reduce-scatter", 9), ("all-to-all", 9), ("all-reduce", 18)]
)
def test_bytes_that_a_ring_of_four_sends(collective, sent):
    assert sent_bytes(collective, 4, 12) == sent


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(world=3, tensor_parallel=2), "world: found 3, expected a multiple of the tensor-parallel size 2"),
        (Run(world=0), "world: found 0, expected an integer of at least 1"),
        (Run(world=3, tensor_parallel=3), "tensor_parallel: found 3, expected a divisor of n_experts=4"),
        (Run(world=1, sequences=0), "sequences: found 0, expected an integer of at least 1"),
    ],
)
def test_ranks_that_cannot_be_divided_so_are_refused(run, message):
    with torch.device("meta"):
        model = MoELanguageModel(width=8, depth=1, n_heads=1, n_experts=4)
    with pytest.raises(ValueError, match=message):
        check_run(model, run)


def test_a_process_group_is_left_alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="process group: found one, expected none before a dry run"):
            dry_run(two(), Run(world=2), momentum)
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_what_is_not_counted_is_said():
    module = two()
    module.configure_model = lambda: None
    found = dry_run(module, Run(world=2), lambda m: [torch.optim.LBFGS(m.parameters())])
    notes = "\n".join(found.notes)
    assert "activations: NOT COUNTED" in notes
    assert "optimizer: NOT COUNTED, nor its state: LBFGS does not run on meta" in notes
    assert "nothing is sharded" in notes
    assert "nothing is sharded" in to_text(found)

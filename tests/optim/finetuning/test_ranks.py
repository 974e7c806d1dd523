"""Added groups on two processes: the step of one process, work that is shared, and checkpoints of torch.distributed."""

import pytest
from helpers.hypersphere_models import Model
from helpers.processes import launch
from optim.finetuning import _ranks as ranks
from optim.hypersphere._checkpoint_ranks import state_of

#: Relative; sums over ranks add in another order (see tests/optim/hypersphere/test_distributed.py).
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def alone():
    model = Model()
    optimizer = ranks.head(model)
    ranks.train(model, optimizer, 0, ranks.END)
    start = dict(Model().named_parameters())
    state = state_of(model, optimizer)
    assert min(float((p - start[name]).detach().abs().max()) for name, p in state["weights"].items()) > 1e-3
    return state


def assert_close(found, expected, tolerance):
    for part in ("weights", "state"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            error = float((found[part][name] - value).norm())
            assert error <= tolerance * float(value.norm()), (name, error)


@pytest.mark.slow
def test_sharded_groups_step_and_resume(alone, tmp_path):
    for report in launch(ranks.__file__, "sharded", 2, tmp_path):
        kind, kinds, names = report["kinds"]
        assert kind == "mixed"
        assert dict(zip(names, kinds, strict=True)) == {
            "embedding.weight": "adamw",
            "narrow.weight": "sphere",
            "widen.weight": "sphere",
            "experts.up": "sphere",
            "experts.down": "sphere",
            "norm.weight": "adamw",
            "norm.bias": "adamw",
        }
        assert_close(report["end"], alone, TOLERANCE)
        for way in ("sharded", "full"):
            assert_close(report[way], report["end"], 0.0)


@pytest.mark.slow
def test_replicas_share_the_work_of_added_groups_and_are_checked(alone, tmp_path):
    for report in launch(ranks.__file__, "shared", 2, tmp_path):
        assert_close(report["end"], alone, TOLERANCE)
        assert max(report["shared"]) == 2
        assert "process_group: found other weights of parameter 'late.weight'" in report["message"]

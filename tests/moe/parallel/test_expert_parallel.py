"""Expert parallelism on real processes against the one-process layer. See _ranks.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.processes import launch
from moe.parallel import _ranks as ranks

from lightning_mue.moe import MoELayer
from lightning_mue.moe.parallel import replicas
from lightning_mue.moe.parallel.expert_parallel import parallelize_experts

# Two processes take some 10 s of CPU time each, most of it for imports.
pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[3] / "configs" / "expert_parallel.yaml"

#: The same sums in another order: 1e-15 and 5e-7 are seen.
TOLERANCE = {"torch.float64": 1e-10, "torch.float32": 1e-5}
CASES = [
    (case, tokens, dtype)
    for case in ranks.CASES
    for tokens in ranks.TOKENS
    for dtype in TOLERANCE
    if (case, tokens) != ("expert choice", "replicated")
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(ranks.__file__, "two", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two ranks of FSDP2 by two of experts."""
    return launch(ranks.__file__, "four", 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize(("case", "tokens", "dtype"), CASES)
def test_values_and_gradients_are_those_of_one_process(two, case, tokens, dtype):
    for report in two:
        errors = report["agreement"][case, tokens, dtype]
        assert {"y", "x", "aux_loss", "router.weight", "experts.w_up", "experts.w_down"} <= errors.keys()
        assert max(errors.values()) < TOLERANCE[dtype], errors
        if tokens == "replicated":
            assert errors["counts"] == 0  # last_routing is that of all tokens, on every rank


@pytest.mark.parametrize("tokens", ranks.TOKENS)
@pytest.mark.parametrize(("how", "tolerance"), [("autocast", 0.02), ("checkpointed", 1e-10)])
def test_autocast_and_activation_checkpointing(two, how, tokens, tolerance):
    """Under autocast rows are sent in bfloat16."""
    for report in two:
        assert max(report["agreement"][how, tokens].values()) < tolerance


def test_cases_are_as_skewed_as_they_say():
    for rank in (0, 1):
        layer = ranks.make_layer(f"all tokens to rank {rank}", torch.float64)
        layer(ranks.draw(9, ranks.D))
        assert layer.last_routing.counts[[2, 3] if rank == 0 else [0, 1]].sum() == 0


def test_negative_controls(two):
    """Without the mean over ranks expert gradients are twice as large; with a slice's gates alone, the router's differ."""
    for report in two:
        unscaled, not_gathered = report["controls"]["not a mean over ranks"], report["controls"]["not gathered"]
        assert unscaled["experts.w_up"] == pytest.approx(1.0)
        assert unscaled["router.weight"] < 1e-10
        assert min(not_gathered["router.weight"], not_gathered["x"]) > 0.05
        assert not_gathered["experts.w_up"] < 1e-10


@pytest.mark.parametrize("tokens", ranks.TOKENS)
def test_bytes_sent_are_those_predicted(two, tokens):
    for report in two:
        found = report["travels"][tokens]
        assert found["bytes"] == found["predicted"] > 0


@pytest.mark.parametrize("tokens", ranks.TOKENS)
def test_the_shared_expert_runs_while_rows_travel(two, tokens):
    for report in two:
        found = report["travels"][tokens]
        assert found["events"] == [
            *("launch", "overlap", "arrive"),  # tokens to the experts
            *("launch", "arrive"),  # and back
            *("launch", "arrive"),  # gradients of the outputs
            *("launch", "overlap's gradient", "arrive"),
        ]
        assert found["overlap adds"] == 0


@pytest.mark.parametrize("tokens", ranks.TOKENS)
def test_only_what_is_needed_is_saved(two, tokens):
    """Received rows and pre-activations; gates and indices."""
    for report in two:
        found = report["travels"][tokens]
        rows = found["rows"] * (2 * ranks.D + 4 * ranks.H)
        indices = found["rows"] * 20 + found["sorted rows"] * 16 + 200
        assert rows < found["saved"] <= rows + indices


def test_two_ranks_train_as_one(two):
    wanted = ranks.trained_alone(1)
    for report in two:
        assert_trained_alike(report["training"]["replicated"], wanted)


@pytest.mark.parametrize(("tokens", "batches"), [("replicated", 2), ("split", 4)])
def test_four_ranks_with_fully_shard_train_as_one(four, tokens, batches):
    """Batches differ over the data dimension, and over the experts' too if tokens are split."""
    wanted = ranks.trained_alone(batches)
    for report in four:
        assert_trained_alike(report["training"][tokens], wanted)
        assert report["placements"]["experts.w_up"].count("Shard") == 2


def test_a_plan_draws_the_weights_of_one_process(four):
    """Bitwise, experts that are cut over both dimensions too."""
    wanted = ranks.drawn(ranks.Parallel(**ranks.SIZES))
    for report in four:
        assert report["drawn"].keys() == wanted.keys()
        assert all(torch.equal(report["drawn"][name], w) for name, w in wanted.items())


def assert_trained_alike(found, wanted):
    """Weights, momenta, radii and norms of gradients, all of them clipped; 1e-15 is seen."""
    assert found.keys() == wanted.keys()
    assert any(name.endswith("/radius") for name in wanted)
    assert {
        name: ranks.distance(found[name], w) for name, w in wanted.items() if ranks.distance(found[name], w) > 1e-5
    } == {}
    assert wanted["norms"].min() > ranks.MAX_NORM, "every step was clipped"
    start = dict(ranks.build().named_parameters())
    assert min(ranks.distance(wanted[name], w.detach()) for name, w in start.items()) > 1e-2, "the steps went somewhere"


REFUSALS = {
    "other tokens": r"experts: found experts that are sharded already.*tokens='replicated'",
    "tokens": r"tokens: found 'both'.*'replicated', 'split'",
    "dimensions": r"mesh: found the dimensions \('data', 'experts'\).*mesh\['tensor_parallel'\]",
    "not in the mesh": r"mesh: found the ranks \[[01]\], expected one that holds this rank",
    "no mesh": r"TypeError: mesh: found None.*DDP",
    "experts": r"experts\.n_experts: found 3.*2 ranks.*1, 3 ranks",
    "sharded": r"experts: found parameters that are sharded already.*parallelize_experts first",
    "other batches": r"RuntimeError: tokens: .*different tokens.*tokens='split'",
    "expert choice": r"choice: found 'expert' with tokens='replicated'.*tokens='split'",
    "ddp": r"mixed torch.Tensor and DTensor",
    "plain state": r"mixed torch.Tensor and DTensor",  # why the guide names set_model_state_dict
    "torch's clipping": r"mixed torch.Tensor and DTensor",  # why there is clip_grad_norm
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(two, what):
    for report in two:
        assert re.search(REFUSALS[what], report["refusals"][what]), report["refusals"][what]


def test_not_refused(two):
    for report in two:
        assert [report["refusals"][what] for what in ("twice", "a part of it", "no layer")] == [None] * 3
        assert report["refusals"]["copy"] == 0


def test_other_batches_are_seen_at_any_width_and_rounding_is_not_taken_for_them(two):
    for report in two:
        assert all("different tokens" in str(said) for said in report["wide"]["different"])
        assert report["wide"]["rounded"] is None
        assert report["wide"]["nan"] is None


@pytest.mark.parametrize(("tokens", "width", "experts"), [(512, 4096, 256), (64, 8, 4), (1, 8, 4)])
def test_fingerprints(tokens, width, experts):
    """Of 20 batches that share most of their direction; of one in bfloat16; of the same number of first tokens."""
    weight = ranks.draw(experts, width, seed=99) / width**0.5
    common = ranks.draw(1, width, seed=98)

    def fingerprint(x, dtype=torch.float64):
        return replicas.fingerprint(x.to(dtype), x.to(dtype) @ weight.T.to(dtype)).tolist()

    def raises(*prints):
        try:
            replicas.check_replicas(list(prints))
        except RuntimeError:
            return True
        return False

    xs = [common * 0.9**0.5 + ranks.draw(tokens, width, seed=i) * 0.1**0.5 for i in range(20)]
    prints = [fingerprint(x) for x in xs]
    assert all(raises(prints[0], other) for other in prints[1:])
    assert not raises(prints[0], fingerprint(xs[0], torch.bfloat16))
    assert raises(prints[0], fingerprint(1.2 * xs[0]))
    assert not raises(prints[0], fingerprint(xs[0] * torch.nan))
    assert not raises(*[fingerprint(torch.zeros(tokens, width))] * 2)
    assert not raises(*[fingerprint(xs[0][:0])] * 2)
    assert len(prints[0]) == replicas.FINGERPRINT


def test_fingerprints_look_beyond_the_first_tokens_of_sequences():
    """Eight sequences that all begin alike, as those with a token for their beginning do."""
    xs = [ranks.draw(8, 32, 16, seed=seed) for seed in (0, 1)]
    for x in xs:
        x[:, 0] = 1
    prints = [replicas.fingerprint(x.flatten(0, 1), x.flatten(0, 1)).tolist() for x in xs]
    with pytest.raises(RuntimeError, match=r"^tokens: found 'replicated' .* different tokens"):
        replicas.check_replicas(prints)


def test_a_plain_state_dict_loads_as_the_guide_says(two):
    for report in two:
        assert set(report["plain state"].values()) == {0.0}


def test_clipping_without_a_largest_norm_returns_the_norm_alone(two):
    """Lightning's 0 is as None; a norm that is smaller than the gradients' bites."""
    for report in two:
        found = report["clips"]
        assert found["None"]["norm"] == found["0"]["norm"] == found["0.01"]["norm"] > 0.01
        assert found["None"]["change"] == found["0"]["change"] == 0
        assert found["0.01"]["change"] > 0.1


def test_a_process_group_is_needed():
    with pytest.raises(
        RuntimeError,
        match=r"^parallelize_experts: found no process group.*configure_model under Lightning's ModelParallelStrategy",
    ):
        parallelize_experts(MoELayer(8, 4, 4), None)


# --- Lightning --------------------------------------------------------------------------------------------------------


def torchrun(world, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*command, ranks.__file__, str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"lightning{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    generator = torch.Generator().manual_seed(0)
    (folder / "corpus.txt").write_bytes(bytes(torch.randint(0, 64, (6000,), generator=generator).tolist()))
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """Trainer with ModelParallelStrategy on two ranks."""
    return torchrun(2, folder)


@pytest.fixture(scope="module")
def single(pair, folder):
    """One rank, from the checkpoints of two."""
    return torchrun(1, folder)[0]


@pytest.fixture(scope="module")
def alone(folder):
    """A Trainer in one process, without a strategy."""
    return ranks.fit(folder, "auto")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_trainer_loses_what_one_process_loses(pair, alone):
    """Loss by loss, with MuECallback, clipping and bias balance."""
    for report in pair:
        whole = report["distributed"]
        assert len(whole["losses"]) == ranks.FIT_STEPS
        assert largest_difference(whole["start"], alone["start"]) == 0  # drawn by the plan: bitwise
        assert torch.allclose(whole["losses"], alone["losses"], rtol=1e-5, atol=0)
        assert largest_difference(whole["end"], alone["end"]) < 1e-4
        assert torch.equal(whole["biases"], alone["biases"])
    assert alone["biases"].abs().max() > 0
    assert largest_difference(alone["end"], alone["start"]) > 1e-2


@pytest.mark.parametrize("clipping", ranks.CLIPPING)
def test_the_class_of_the_guide_trains_as_one_process(pair, clipping):
    """Without clipping, by norm and by value; with sharded experts, and with FSDP2 alone."""
    wanted = ranks.fit_guide("auto", clipping)
    norms, largest = wanted["gradients"].T
    assert torch.allclose(norms, torch.tensor(0.1)) == (clipping == "norm")
    assert (largest.max() <= 0.01) == (clipping == "value")
    for report in pair:
        for how in ((1, 2), (2, 1)):
            found = report["guide"][how, clipping]
            assert torch.allclose(found["gradients"], wanted["gradients"], rtol=1e-4)
            assert largest_difference(found["weights"], wanted["weights"]) < 1e-4  # AdamW's steps are 1e-2


def test_resume_is_exact(pair):
    """Distributed and full checkpoints."""
    for report in pair:
        for way in ("distributed", "full"):
            whole, resumed = report[way], report[f"{way}, resumed"]
            assert torch.equal(resumed["losses"], whole["losses"][ranks.STOP :])
            assert largest_difference(resumed["end"], whole["end"]) == 0


def test_one_rank_resumes_what_two_have_saved_and_back(pair, single, folder):
    """The next losses differ by round-off alone."""
    whole = pair[0]["distributed"]
    assert torch.allclose(single["resumed"]["losses"], whole["losses"][ranks.STOP :], rtol=1e-5, atol=0)
    assert largest_difference(single["resumed"]["end"], whole["end"]) < 1e-4
    for report in torchrun(2, folder):
        assert largest_difference(report["from one"]["start"], single["saved"]) == 0
        assert largest_difference(report["from one"]["end"], whole["end"]) < 1e-4


def test_a_layer_begun_on_the_meta_device_is_drawn_as_in_one_process(pair):
    torch.manual_seed(3)
    wanted = dict(MoELayer(ranks.D, ranks.H, ranks.E, bias=True).named_parameters())
    for report in pair:
        assert report["layer"]["sharded"]
        assert all(torch.equal(report["layer"]["start"][name], w) for name, w in wanted.items())


def test_the_config_runs(tmp_path, folder):
    """Lightning starts the second process itself."""
    config = yaml.safe_load(CONFIG.read_text())
    config["trainer"].update(max_steps=2, val_check_interval=2)
    config["data"]["init_args"].update(path=str(folder / "corpus.txt"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mue.cli.lightning_cli", "fit", "--config", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "steps: 2" in done.stdout

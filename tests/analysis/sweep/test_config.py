"""The rate, the axes and the rule are found where a config has them, and a trial's config differs from it in these alone."""

import copy

import pytest
from helpers.sweeps import CONFIG, LR, axis, plan

from lightning_mue.analysis.sweep.config import changed, find_rate, get, rule_of
from lightning_mue.analysis.sweep.plan import Job, Point
from lightning_mue.analysis.sweep.runner import as_trial

MUE = {
    "class_path": "lightning_mue.callbacks.MuECallback",
    "init_args": {"rule": "mup", "base": {"width": 8}, "seed": 0},
}


def with_callbacks(*callbacks):
    return changed(CONFIG, {"trainer.callbacks": list(callbacks)})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CONFIG, LR),
        ({"model": {"width": 1, "lr": 0.1}}, "model.lr"),
        ({"model": {"class_path": "m.M", "init_args": {"learning_rate": 0.1}}}, "model.init_args.learning_rate"),
        ({"model": {"w": 1}, "optimizer": {"class_path": "o.O", "init_args": {"lr": 1}}}, "optimizer.init_args.lr"),
        ({"model": {"lr": 9.0}, "optimizer": {"lr": 0.1}}, "optimizer.lr"),
    ],
)
def test_the_rate_is_found(config, key):
    assert find_rate(config, None) == key


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"model": {"width": 1}}, None, "learning rate: found none, expected one key"),
        ({"model": {"a": {"lr": 1}, "b": {"lr": 1}}}, None, r"found model\.a\.lr, model\.b\.lr, .*--lr-key"),
        ({"model": {"lr": 0.0}}, None, r"model\.lr: found 0\.0, expected a positive"),
        ({"model": {"lr": None}}, None, r"model\.lr: found None, expected a positive"),
        ({"model": {"rate": 0.1}}, "model.ratte", r"--lr-key: found 'model\.ratte'.*Did you mean 'model.rate'"),
    ],
)
def test_a_rate_that_is_not_there_is_refused(config, given, message):
    with pytest.raises(ValueError, match=message):
        find_rate(config, given)


def test_a_trial_differs_in_what_is_varied_alone():
    config = with_callbacks(MUE, {"class_path": "m.ModelCheckpoint", "init_args": {}})
    swept = plan(config, axes=(axis(width=[64, 128], gate=["linear", "sqrt"]),))
    job = Job(swept.cells()[1], Point(0.5), 3)
    expected = copy.deepcopy(config)
    expected["model"]["init_args"] |= {"width": 128, "gate": "sqrt"}
    expected["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.5
    expected["seed_everything"] = expected["data"]["init_args"]["seed"] = 3
    expected["trainer"]["callbacks"][0]["init_args"]["seed"] = 3
    assert swept.config_of(job) == expected
    assert job.cell.size == {"width": 128}  # the first name is the axis

    trial = as_trial(swept.config_of(job), "folder", "val/loss")
    names = [c["class_path"].rpartition(".")[2] for c in trial["trainer"]["callbacks"]]
    assert names == ["MuECallback", "TrialReport"]
    assert trial["trainer"]["logger"]["class_path"].endswith("CSVLogger")
    assert {k: v for k, v in trial.items() if k != "trainer"} == {k: v for k, v in expected.items() if k != "trainer"}


def test_the_seeds_of_a_point_are_those_of_all_points():
    swept = plan(seeds=2)
    jobs = [Job(swept.cells()[0], Point(rate), seed) for rate in swept.rates for seed in (0, 1)]
    seeds = {(j.point.lr, j.seed): swept.config_of(j) for j in jobs}
    for rate in swept.rates:
        same = changed(seeds[rate, 1], {LR: None})
        assert same == changed(seeds[swept.rates[0], 1], {LR: None})
        assert same != changed(seeds[rate, 0], {LR: None})


def test_rules_are_an_axis():
    swept = plan(with_callbacks(MUE), rules=("sp", "none", "complete-mue"))
    configs = {cell.rule: swept.config_of(Job(cell, Point(0.1), 0)) for cell in swept.cells()}
    assert {rule: rule_of(config) for rule, config in configs.items()} == {r: r for r in swept.rules}
    assert configs["none"]["trainer"]["callbacks"] == []
    assert rule_of(swept.config) == "mup"
    assert plan(rules=("sp",)).config_of(Job(plan(rules=("sp",)).cells()[0], Point(0.1), 0))["trainer"]["callbacks"]
    with pytest.raises(ValueError, match=r"--rules: found 'mup', and no base in the config, .*Add `base`"):
        plan(rules=("sp", "mup"))
    baseless = {**MUE, "init_args": {"rule": "sp"}}
    with pytest.raises(ValueError, match=r"--rules: found 'mup', and no base in MuECallback"):
        plan(with_callbacks(baseless), rules=("mup",))


def test_tokens_and_batch_tokens_set_steps_and_batch_size():
    both = plan(axes=(axis(tokens=[12_800, 25_600]), axis(batch_tokens=[128, 256])))
    read = {}
    for cell in both.cells():
        config = both.config_of(Job(cell, Point(0.1), 0))
        read[tuple(cell.size.values())] = (get(config, "trainer.max_steps"), get(config, "data.init_args.batch_size"))
    assert read == {(12_800, 128): (100, 4), (12_800, 256): (50, 8), (25_600, 128): (200, 4), (25_600, 256): (100, 8)}
    alone = plan(axes=(axis(batch_tokens=[128, 512]),))
    config = alone.config_of(Job(alone.cells()[1], Point(0.1), 0))
    assert (config["trainer"]["max_steps"], config["data"]["init_args"]["batch_size"]) == (25, 16)  # the same tokens
    accumulated = changed(CONFIG, {"trainer.accumulate_grad_batches": 2})
    other = plan(accumulated, axes=(axis(tokens=[25_600]),))
    assert other.config_of(Job(other.cells()[0], Point(0.1), 0))["trainer"]["max_steps"] == 100


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"axes": (axis(widht=[1, 2]),)}, "--axis: found 'widht', expected an argument .*Did you mean 'width'"),
        (CONFIG, {"settings": {"model.init_args.x": (1,)}}, "--set: found 'model.init_args.x'"),
        (CONFIG, {"axes": (axis(width=[1]), axis(width=[2]))}, "--axis: found width in two axes"),
        (
            CONFIG,
            {"axes": (axis(width=[1]),), "settings": {"width": (1,)}},
            "--set: found width, which is varied by --axis",
        ),
        (
            CONFIG,
            {"axes": (axis(tokens=[128]),), "settings": {"trainer.max_steps": (1,)}},
            "--set: found .*, which is set by",
        ),
        (
            CONFIG,
            {"axes": (axis(batch_tokens=[128]), axis(batch_size=[4]))},
            "--axis: found batch_size, which is set by",
        ),
        (CONFIG, {"settings": {LR: (1,)}}, "--set: found .*, which is the learning rate"),
        (CONFIG, {"axes": (axis(batch_tokens=[100]),)}, "--axis batch_tokens: found 100, expected a multiple of 32"),
        (CONFIG, {"axes": (axis(tokens=[10]),)}, "--axis tokens: found 10, expected a positive multiple of the 128"),
        (
            {**CONFIG, "data": {}},
            {"axes": (axis(tokens=[9]),)},
            "--axis tokens, batch_tokens: found none in the config",
        ),
        (changed(CONFIG, {"trainer.barebones": True}), {}, r"trainer\.barebones: found True, expected a run that logs"),
    ],
)
def test_what_cannot_be_swept_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        plan(config, **options)

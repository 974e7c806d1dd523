"""Files that were edited or damaged at random: they are used as they are, or refused in one paragraph that names the file."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
import yaml

from lightning_mue import MoELanguageModel, ScalingPlan, plan, save_base
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.data.cache import ByteCache

VALUES = (None, "", "x", -1, 0, 10**30, 1.5, float("nan"), float("inf"), True, [], {}, [1], {"a": 1}, "1e3", [[None]])


def load(text):
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def dump(data):
    return yaml.dump(data, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def model(width):
    return MoELanguageModel(vocab_size=16, width=width, depth=1, n_heads=2, n_experts=2, top_k=1, context_length=8)


def places(value, path=()):
    """(container, key) of everything in plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def edited(text, load, dump, draw):
    """A text with one edit: of its data (a value or key replaced, removed, added), or of its bytes."""
    kind = draw.randrange(6)
    if kind < 4:
        data = load(text)
        container, key = draw.choice(list(places(data)))
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw.choice(["x", "", 3])] = container.pop(key)
        elif kind == 2 and isinstance(container, list):
            container.append(draw.choice(VALUES))
        else:
            container[key] = draw.choice(VALUES)
        return dump(data)
    start = draw.randrange(len(text))
    if kind == 4:
        return text[:start]
    return text[:start] + "".join(chr(draw.randrange(1, 0x2FF)) for _ in range(3)) + text[start + 3 :]


SEEDS = [pytest.param(range(8)), pytest.param(range(8, 300), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def base_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    save_base(model(16), path)
    return path.read_text()


def refused(call, path, seed):
    """Whether a call refuses a file in one paragraph; any other error is a fault."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        assert ": found " in text, (seed, text)
        assert ", expected " in text, (seed, text)
        assert len(text) < 1600, (seed, text)
        return True
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{path.read_text()[:300]}") from error
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", SEEDS)
def test_a_damaged_base(seeds, base_text, tmp_path):
    path, target = tmp_path / "base.yaml", model(32)
    count = 0
    for seed in seeds:
        path.write_text(edited(base_text, load, dump, random.Random(seed)), encoding="utf-8")
        count += refused(lambda: plan(target, base=path, rule="mup"), path, seed)
    assert count > len(seeds) // 3


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_damaged_fingerprint(seeds, tmp_path):
    path = tmp_path / "base.json"
    points = {step: {"update/ffn_up/q1": 0.1 + step, "rms/ffn/outside": 2.0} for step in range(6)}
    about = {"depths": {"q1": 0.25}, "classes": {"router": 4}, "rule": "mup (adam)", "axes": {"width": 8.0}}
    Fingerprint.of_points(6, points, **about).save(path)
    text, count = path.read_text(), 0
    for seed in seeds:
        path.write_text(edited(text, json.loads, json.dumps, random.Random(seed)), encoding="utf-8")

        def use():
            found = Fingerprint.load(path)
            for key in found.curves:
                found.at(found.match(key, found.depths, ()) or key, 0.5)

        count += refused(use, path, seed)
    assert count > len(seeds) // 3


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(150)])
def test_a_damaged_plan(seeds, tmp_path):
    path, made = tmp_path / "plan.yaml", plan(model(32), base={"width": 16}, rule="mup")
    made.save(path)
    text, count = path.read_text(), 0
    for seed in seeds:
        path.write_text(edited(text, load, dump, random.Random(seed)), encoding="utf-8")
        count += refused(lambda: ScalingPlan.load(path).diff(made), path, seed)
    assert count > len(seeds) // 4


@pytest.mark.parametrize("seeds", [range(100)])
def test_a_damaged_manifest_of_a_cache(seeds, tmp_path):
    """A cache is valid or built again."""
    cache = ByteCache(tmp_path)
    cache.write({"root": "x", "files": [1, 2]}, {"train": [b"train"], "val": [b"val"]})
    path = tmp_path / "manifest.json"
    text = path.read_text()
    valid = 0
    for seed in seeds:
        path.write_text(edited(text, json.loads, json.dumps, random.Random(seed)), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            valid += cache.is_valid({"root": "x", "files": [1, 2]})
    assert valid < len(seeds) // 3


def test_the_whole_files_are_used(base_text, tmp_path):
    """Negative control."""
    path = tmp_path / "base.yaml"
    path.write_text(base_text)
    with torch.random.fork_rng(devices=[]):
        assert not refused(lambda: plan(model(32), base=path, rule="mup"), path, None)

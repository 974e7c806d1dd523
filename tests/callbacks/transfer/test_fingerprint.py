"""Fingerprint: interpolation, matching of places and roles, and a file that survives and explains itself."""

from __future__ import annotations

import json
import os

import pytest

from lightning_mue.callbacks.transfer.comparison import Alarm
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint, sampled_steps


def make(**options):
    points = {0: {"update/hidden/q2": 1.0, "z/router/q2": 4.0}, 9: {"update/hidden/q2": 100.0}}
    return Fingerprint.of_points(10, points, **{"depths": {"q2": 0.25, "q4": 0.75}, **options})


def test_value_is_linear_in_progress():
    base = make()
    assert base.at("update/hidden/q2", 0.1) == pytest.approx(1.0)
    assert base.at("update/hidden/q2", 0.4) == pytest.approx(34.0)  # a third of the way from 0.1 to 1
    assert base.at("update/hidden/q2", 1.0) == pytest.approx(100.0)


def test_nothing_is_made_up_outside_the_record():
    base = make()
    assert base.at("update/hidden/q2", 0.05) is None
    assert base.at("z/router/q2", 0.5) is None  # measured once, at 0.1
    assert base.at("z/router/q2", 0.1) == pytest.approx(4.0)
    assert base.at("update/norm/q2", 0.5) is None


def test_one_outlier_of_a_single_step_does_not_count():
    values = [1.0, 2.0, 50.0, 4.0, 5.0]
    base = Fingerprint.of_points(5, {i: {"update/hidden/q2": v} for i, v in enumerate(values)})
    assert base.at("update/hidden/q2", 0.6) == pytest.approx(4.0)
    assert base.at("update/hidden/q2", 0.2) == 1.0
    assert base.at("update/hidden/q2", 1.0) == pytest.approx(5.0)


def test_zero_and_not_finite_values_are_not_compared_with():
    points = {0: {"reach/norm/q2": 2.0}, 1: {"reach/norm/q2": 0.0}, 2: {"reach/norm/q2": float("nan")}}
    base = Fingerprint.of_points(3, points)
    assert base.curves["reach/norm/q2"] == [2.0, 0.0, None]
    assert base.at("reach/norm/q2", 1.0) is None
    assert base.first("reach/norm/q2") == 2.0


@pytest.mark.parametrize(("depth", "nearest"), [(0.1, "q2"), (0.4, "q2"), (0.6, "q4"), (0.95, "q4")])
def test_place_is_matched_by_depth(depth, nearest):
    points = {0: {"update/ffn_up/q2": 1.0, "update/ffn_up/q4": 1.0, "update/ffn_up/outside": 1.0}}
    base = Fingerprint.of_points(1, points, depths={"q2": 0.25, "q4": 0.75})
    assert base.match("update/ffn_up/q1", {"q1": depth}) == f"update/ffn_up/{nearest}"
    assert base.match("update/ffn_up/outside", {"q1": depth}) == "update/ffn_up/outside"


def test_role_falls_back_to_its_counterpart_only():
    base = Fingerprint.of_points(1, {0: {"update/ffn_up/q3": 1.0, "reach/ffn_down/q3": 1.0}}, depths={"q3": 0.5})
    here = {"q3": 0.5}
    assert base.match("update/expert_up/q3", here, ("ffn_up",)) == "update/ffn_up/q3"
    assert base.match("update/expert_down/q3", here, ("ffn_down",)) is None  # that role, but another quantity
    assert base.match("update/router/q3", here) is None


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 100_000])
def test_sampled_steps(steps):
    found = sampled_steps(steps, 32)
    assert {0, steps - 1} <= found <= set(range(steps))
    assert min(steps, 24) <= len(found) <= 33
    if steps > 1000:
        assert len([s for s in found if s < steps / 10]) > len(found) / 3  # dense at the start


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "base.json"
    base = make(classes={"router": 8}, rule="sp (adam)", axes={"width": 32.0})
    base.save(path)
    assert Fingerprint.load(path) == base
    assert os.listdir(path.parent) == ["base.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "base.json"
    make().save(path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        make(rule="other").save(path)
    assert path.read_bytes() == old


def test_bad_files_are_explained(tmp_path):
    path = tmp_path / "base.json"
    with pytest.raises(ValueError, match=r"compare: found .*base.json., which does not exist.*record="):
        Fingerprint.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"compare: .*cannot be read as a fingerprint"):
        Fingerprint.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"compare: .*cannot be read as a fingerprint"):
        Fingerprint.load(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"compare: .*no fingerprint"):
        Fingerprint.load(path)
    make().save(path)
    good = json.loads(path.read_text())
    for change, match in [
        ({"schema": 99}, "compare: .* of schema 99, expected one of schema 1"),
        ({"kind": "else"}, "no fingerprint"),
        ({"surplus": 1}, "surplus"),
        ({"progress": [0.1]}, "points for 1"),
        ({"progress": [0.5, 0.1]}, "ascending"),
        ({"progress": "soon"}, "damaged"),
        ({"curves": {"loss": [1.0, 2.0]}}, "damaged"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=match):
            Fingerprint.load(path)
    path.write_text(json.dumps(good))
    assert Fingerprint.load(path) == make()


def test_alarm_is_raised_once_until_the_ratio_is_back():
    alarm = Alarm(band=2.0, patience=3)
    seen = [alarm.see({"a": ratio, "b": 1.0}) for ratio in (3, 3, 1, 0.4, 0.4, 0.4, 0.3, 1.9, 3, 3, float("nan"))]
    assert [new for new, _ in seen] == [[], [], [], [], [], ["a"], [], [], [], [], ["a"]]
    assert [back for _, back in seen] == [[], [], [], [], [], [], [], ["a"], [], [], []]


def test_alarm_names_the_furthest_first_and_keeps_the_state_of_the_absent():
    alarm = Alarm(band=2.0, patience=2)
    assert alarm.see({"a": 3.0, "b": 0.1, "c": 2.5}) == ([], [])
    assert alarm.see({"b": 0.1}) == (["b"], [])
    assert alarm.see({"a": 3.0, "b": 0.1, "c": 5.0}) == (["c", "a"], [])

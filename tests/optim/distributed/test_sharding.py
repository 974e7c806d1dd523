"""Orthogonalization of sharded and replicated matrices, on real processes, against whole matrices in one process."""

from __future__ import annotations

import re

import pytest
from helpers.processes import launch
from optim.distributed import _ranks as ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(ranks.__file__, "report", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(ranks.__file__, "report", 4, tmp_path_factory.mktemp("four"))


VARIANTS = ["small buckets", "bf16 results", "bf16"]


def check(reports, name, pairs):
    """Every rank got torch's own shards of the whole results, bit for bit, and the work was shared as far as it can be."""
    for report in reports:
        assert report[name]["wrong"] == []
        assert report[name]["count"] == len(pairs)
        assert report[name]["bytes"] == report[name]["predicted"]
        assert report[name]["sums"] < 1e-14  # float64, added in another order
        assert "blocking" not in report[name]["events"]
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape, _ in pairs)
    done = sum(report[name]["matrices"] for report in reports)
    alone = any(how == ranks.ALONE for _, how in pairs) or any(reports[0][name]["gathers"])
    assert done > matrices if alone else done == matrices  # each once, but for what no one else can do


@pytest.mark.parametrize("name", [*ranks.CASES[2], *VARIANTS])
def test_two_ranks_get_their_pieces_of_the_whole_result(two, name):
    check(two, name, ranks.CASES[2].get(name, ranks.CASES[2]["mixed"])[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ranks.CASES[4], *VARIANTS])
def test_four_ranks_get_their_pieces_of_the_whole_result(four, name):
    check(four, name, ranks.CASES[4].get(name, ranks.CASES[4]["all"])[1])


def test_what_needs_no_communication_has_none(two):
    for report in two:
        for name in ("experts", "alone"):
            assert report[name]["bytes"] == 0
            assert set(report[name]["events"]) == {"fn"}
        assert report["rows"]["bytes"] > 0
        assert any(report["filters gathered"]["gathers"])
        assert not any(report["filters"]["gathers"])


def test_cut_by_fully_shard(two):
    for report in two:
        assert report["fsdp"]["sizes"] == [(3, 2), (5, 4), (1, 0)]
        # The gradients of the two models differ by round-off, which Newton-Schulz can enlarge by up to its slope, 493.
        assert max(report["fsdp"]["errors"]) < 5e-5


def test_orthogonalized_pieces_are_not_pieces_of_the_orthogonalized(two):
    for report in two:
        # Products of other batch sizes may add in another order (FLOAT32_ERROR in test_newton_schulz.py).
        assert max(report["real"]["errors"]) < 5e-5
        assert min(report["real"]["wrong"]) > 0.1  # the negative control: no communication, other mathematics


def test_the_next_bucket_is_sent_before_the_present_one_is_worked_on(two):
    for report in two:
        events = report["many buckets"]["events"]
        fn = [at for at, event in enumerate(events) if event == "fn"]
        assert len(fn) == 6
        for number, at in enumerate(fn):
            collected, returned = min(number + 2, 6), number
            assert events[:at].count("swap") == collected + returned
        # Among replicas: what is worked on first is on its way while the rest is worked on.
        assert report["many replicated"]["events"].index("gather") == 2
        assert report["many replicated"]["events"].count("gather") == 6


def test_ranks_issue_the_same_collectives(two):
    for name in (*ranks.CASES[2], *VARIANTS):
        first, second = ([event for event in report[name]["events"] if event != "fn"] for report in two)
        assert first == second, name


def test_ranks_without_replicas_are_told_the_first_difference_on_all_ranks(two):
    first, second = (report["replicas"] for report in two)
    assert first == second
    words = {
        "weights": r"process_group: found other weights of parameter 'w1' .* on rank 1 .*expected the weights of parameter 'w1'",
        "gradient": r"process_group: found (another|a|no) gradient of parameter 'w1' .* on rank 1 of the group, expected ",
        "list": r"process_group: found .* on rank 1 of the group, expected .* as on its rank 0\. Pass a group of ranks",
    }
    for name, message in first.items():
        expected = words.get(name.partition(":")[0])
        assert (message is None) if expected is None else re.search(expected, message), (name, message)
    assert "found parameter 'w1' of shape [40, 50] on rank 1" in first["list: other lengths"]
    assert "expected no further matrix" in first["list: other lengths"]
    assert "found parameter 'w1' of shape [40, 50] in matrix group 0 on rank 1" in first["list: other groups"]
    assert "expected parameter 'w0' of shape [40, 50] in matrix group 1 as on its rank 0" in first["list: other groups"]
    assert "found parameter 'w0' of shape [40, 50] (torch.float32)" in first["list: other shapes"]
    assert "expected parameter 'w0' of shape [50, 40] (torch.float32)" in first["list: other shapes"]
    assert "found a gradient" in first["gradient: on one rank"]

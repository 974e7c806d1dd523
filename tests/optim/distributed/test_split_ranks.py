"""Fused matrices in parts, and rows with second moments, on real processes: in every layout the step of one process."""

from __future__ import annotations

import pytest
import torch
from helpers.processes import launch
from optim.distributed import _split_ranks as ranks


@pytest.fixture(scope="module")
def alone():
    return {option: ranks.train(option) for option in ranks.OPTIONS}


def check(reports, world, alone):
    for report in reports:
        for name in ranks.LAYOUTS[world]:
            for option, expected in alone.items():
                found = report[f"{name}, {option}"]
                assert found.keys() == expected.keys()
                for key, x in expected.items():
                    torch.testing.assert_close(found[key], x, rtol=1e-10, atol=1e-11, msg=f"{name}, {option}: {key}")


@pytest.mark.slow
def test_two_ranks(alone, tmp_path):
    check(launch(ranks.__file__, "report", 2, tmp_path), 2, alone)


@pytest.mark.slow
def test_four_ranks(alone, tmp_path):
    reports = launch(ranks.__file__, "report", 4, tmp_path)
    check(reports, 4, alone)
    for report in reports:
        assert len(report["refused"]) == 2
        assert all("'w'" in words and "fully_shard alone" in words for words in report["refused"])

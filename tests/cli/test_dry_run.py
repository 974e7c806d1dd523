"""`lightning-mue dry-run` prints and writes what many ranks need; too little memory is exit status 1, an error status 2."""

import json
import math
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_mue.cli import main
from lightning_mue.cli.dry_run import check_report

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["dry-run", "--config", str(CONFIGS / "expert_parallel.yaml"), "--model.depth", "1", "--model.width", "16"]
EXPERTS = ("expert_up", "expert_down")


@pytest.mark.slow
def test_the_file_has_the_figures_and_the_group_is_gone(tmp_path, capsys):
    written = tmp_path / "new" / "run.json"
    main([*SMALL, "--world", "6", "--output", str(written), "--gib", "80"])
    assert not dist.is_initialized()
    found = json.loads(written.read_text())
    assert (found["data_parallel"], found["tensor_parallel"], len(found["memory_by_rank"])) == (3, 2, 6)
    sizes = {True: 0, False: 0}
    for row in found["plan"]:
        sizes[row["role"] in EXPERTS] += 4 * row["number"] * math.prod(row["shape"])
    # Over three data-parallel ranks everything is sharded, over two tensor-parallel ones the experts only.
    assert sum(held["weights"] for held in found["memory_by_rank"]) == sizes[True] + 2 * sizes[False]
    assert "fits: rank" in capsys.readouterr().out


@pytest.mark.slow
def test_too_little_memory_is_exit_status_1_and_names_the_largest_kind(capsys):
    args = ["--model.depth", "1", "--world", "8", "--gib", "16", "--tensor-parallel", "8"]
    with pytest.raises(SystemExit) as stop:
        main(["dry-run", "--config", str(CONFIGS / "trillion.yaml"), *args])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "does not fit: rank 0 needs" in out
    assert "Largest: optimizer state" in out
    assert "NOT COUNTED (give --sequences)" in out


@pytest.mark.slow
def test_what_cannot_be_is_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--world", "3"])
    assert stop.value.code == 2
    assert "world: found 3, expected a multiple of the tensor-parallel size 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "output", "message"), [(-1.0, None, "--gib: found -1"), (None, ".", "--output: found the folder .")]
)
def test_options_of_the_report_are_checked(gib, output, message):
    with pytest.raises(ValueError, match=message):
        check_report(gib, output)

"""`lightning-mue export-plan` writes a file that runs, from a model without memory for its weights; errors name the option."""

from pathlib import Path

import pytest
from helpers.code_bases import load

from lightning_mue.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_file_runs_and_has_the_configs_rate(tmp_path):
    written = tmp_path / "new" / "plan.py"
    config = str(CONFIGS / "dense_to_moe.yaml")
    main(["export-plan", "--config", config, "--to", "megatron", "--output", str(written)])
    exported = load(written.read_text())
    assert exported.OPTIMIZER["lr"] == 2.4e-2
    assert exported.OPTIMIZER["adam_beta2"] == 0.944
    assert {name for names, _ in exported.GROUPS for name in names} >= {"output_layer.weight"}


def test_a_plan_on_the_sphere_is_refused_for_megatron(tmp_path, capsys):
    written = tmp_path / "plan.py"
    with pytest.raises(SystemExit) as stop:
        main(
            ["export-plan", "--config", str(CONFIGS / "quickstart.yaml"), "--to", "megatron", "--output", str(written)]
        )
    assert stop.value.code == 2
    assert "plan: found the update(s) adam_sphere, sphere" in capsys.readouterr().err
    assert not written.exists()

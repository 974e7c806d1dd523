from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_explained(run, config):
    status, out = run("explain", "--config", config)
    assert status == 0
    rule = next(
        c["init_args"]["rule"]
        for c in yaml.safe_load(config.read_text())["trainer"]["callbacks"]
        if c["class_path"].endswith("MuECallback")
    )
    assert f"{rule} (" in out
    assert ("ffn_down" if config.stem == "hyperp_paper" else "expert_down") in out  # the paper's dense recipe


@pytest.mark.slow
def test_explain_for_a_trillion_parameters_takes_little_memory(tmp_path):
    """Under 2 GiB, from process start to exit; how long it takes is measured in benchmarks/scale.py."""
    code = (  # not ru_maxrss: Linux starts it at the peak of the process that forked, here pytest after 1000 tests
        "import re, sys\n"
        "from lightning_mue.cli.lightning_cli import main; main(sys.argv[1:])\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "open('peak', 'w').write(peak[1])"
    )
    command = [sys.executable, "-c", code, "explain", "--config", str(CONFIGS / "trillion.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "T parameters" in done.stdout
    assert int((tmp_path / "peak").read_text()) < 2 * 2**20


def test_explain_without_the_callback(run, tmp_path):
    config, path = yaml.safe_load((CONFIGS / "debug.yaml").read_text()), tmp_path / "config.yaml"
    config["trainer"]["callbacks"] = None
    path.write_text(yaml.safe_dump(config))
    status, out = run("explain", "--config", path)
    assert status == 2
    assert "trainer.callbacks: found no MuECallback, expected one" in out


def test_explain_compares_rules(run, every_command):
    config = CONFIGS / "dense_to_moe.yaml"
    status, out = run("explain", "--config", config, "--rules", "sp,mup,complete-p,mssp,complete-mue")
    assert status == 0
    for part in (
        "initial std",
        "forward multipliers",
        "agree",
        "complete-p: rule: found 'complete-p'",
        "mup does not claim",
    ):
        assert part in out, part
    status, out = run("explain", "--config", config, "--rules", "sp,mop")
    assert status == 2
    assert "rule: found 'mop'" in out


def test_explain_saves_a_base_that_stands_for_it(run, tmp_path):
    """The plan from the file is the plan from the overrides."""
    config = yaml.safe_load((CONFIGS / "dense_to_moe.yaml").read_text())
    path, base = tmp_path / "config.yaml", tmp_path / "base.yaml"
    status, out = run("explain", "--config", CONFIGS / "dense_to_moe.yaml", "--save-base", base)
    assert status == 0
    assert f"base written to {base}" in out
    plan = out[out.index("complete-mue (adam") :]
    config["trainer"]["callbacks"][0]["init_args"]["base"] = str(base)
    path.write_text(yaml.safe_dump(config))
    status, again = run("explain", "--config", path)
    assert status == 0
    assert again[again.index("complete-mue (adam") :] == plan

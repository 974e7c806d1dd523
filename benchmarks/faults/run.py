"""One run of the quickstart with a fault in it (or none); writes its metrics at every step as CSV and JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from faults import FAULTS
from lightning.pytorch.loggers import CSVLogger

from lightning_mue.cli.lightning_cli import MuECLI

_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fault", choices=[*FAULTS, "none"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, default=60)
    parser.add_argument("--steps", type=int, default=220)
    options = parser.parse_args()
    args = ["--config", str(_CONFIG), f"--seed_everything={options.seed}", f"--trainer.max_steps={options.steps}"]
    args += ["--trainer.log_every_n_steps=1", "--trainer.logger=false", f"--trainer.val_check_interval={options.steps}"]
    args += [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
    ]
    cli = MuECLI(args, run=False)
    logger = CSVLogger(options.out, name="", version="")
    cli.trainer.loggers = [logger]
    if options.fault != "none":
        cli.trainer.callbacks.append(FAULTS[options.fault](options.at))  # type: ignore[attr-defined]
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
        ended = "ran to its end"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    logger.save()
    told = {"fault": options.fault, "seed": options.seed, "at": options.at, "steps": options.steps, "ended": ended}
    (options.out / "run.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()

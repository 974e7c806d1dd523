"""The command `lightning-mue`."""

from lightning_mue.cli.lightning_cli import main

__all__ = ["main"]

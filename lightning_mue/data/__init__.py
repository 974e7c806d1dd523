"""Data with exact resume: bytes of any text, files of token ids, and small images."""

from __future__ import annotations

from lightning_mue.data.digits import DigitsDataModule
from lightning_mue.data.text import TextDataModule
from lightning_mue.data.tokens import TokenDataModule

__all__ = ["DigitsDataModule", "TextDataModule", "TokenDataModule"]

"""Language-modelling data with exact resume: bytes of any text, or files of token ids."""

from __future__ import annotations

from lightning_mue.data.text import TextDataModule
from lightning_mue.data.tokens import TokenDataModule

__all__ = ["TextDataModule", "TokenDataModule"]

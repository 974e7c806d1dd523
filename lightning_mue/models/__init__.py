"""Models: a language model whose blocks are dense or Mixture-of-Experts."""

from lightning_mue.models.language import MoELanguageModel

__all__ = ["MoELanguageModel"]

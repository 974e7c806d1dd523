"""Models: a language model and an image generator whose blocks are dense or Mixture-of-Experts."""

from lightning_mue.models.diffusion.flow import FlowMatchingTransformer
from lightning_mue.models.language import MoELanguageModel

__all__ = ["FlowMatchingTransformer", "MoELanguageModel"]

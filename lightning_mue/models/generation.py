"""Text generation of a language model.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mue.checks import value_error


class Generates(nn.Module):
    """`generate` for a module whose ``forward`` maps token ids [B, S] to logits [B, S, V].

    Attributes:
        vocab_size: V; 256 for a model of bytes.
        context_length: The largest S.
    """

    vocab_size: int
    context_length: int

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor | str:
        """Continues a prompt.

        Args:
            prompt: Token ids [S] or [B, S]; or text, for a model of bytes (``vocab_size`` 256).
            max_new_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Sample among the k most likely tokens only; None: among all.
            seed: Seed of the sampling; None: use the global generator.

        Returns:
            Prompt and continuation, in the prompt's form.

        Raises:
            ValueError: For an empty prompt, or text if the vocabulary is not bytes.
        """
        if isinstance(prompt, str):
            if self.vocab_size != 256:
                expected = (
                    f"token ids: the model has a vocabulary of {self.vocab_size}, and text needs one of 256 bytes"
                )
                raise value_error("prompt", found="text", expected=expected)
            device = next(self.parameters()).device
            ids = torch.tensor(list(prompt.encode()), dtype=torch.int64, device=device)
            out = self.generate(ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
            assert isinstance(out, Tensor)
            return bytes(out.tolist()).decode(errors="replace")
        if prompt.shape[-1] == 0:
            raise value_error("prompt", found="an empty prompt", expected="at least one token")
        generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
        was_training = self.training
        self.eval()
        tokens = prompt if prompt.dim() == 2 else prompt[None]
        for _ in range(max_new_tokens):
            logits_BV = self(tokens[:, -self.context_length :])[:, -1].float()
            tokens = torch.cat((tokens, _sample(logits_BV, temperature, top_k, generator)), dim=1)
        self.train(was_training)
        return tokens if prompt.dim() == 2 else tokens[0]


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draws one token a row, [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)

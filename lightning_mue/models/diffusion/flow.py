"""FlowMatchingTransformer: class-conditional image generation by flow matching, as a LightningModule.

Shape legend: B batch, C channels, R rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mue.checks import (
    require_integer,
    require_non_negative,
    require_number,
    require_positive,
    require_size,
    value_error,
)
from lightning_mue.models.arguments import check_options, infer_head_dim
from lightning_mue.models.diffusion.sampling import Method, integrate
from lightning_mue.models.diffusion.transformer import ConditionedBlock, VelocityTransformer
from lightning_mue.models.loading import LoadsSafely
from lightning_mue.models.training import TrainsExperts
from lightning_mue.models.transformer import Attention
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.reading.parameters import tag_roles
from lightning_mue.seeds import run_seed

#: Streams of random numbers: one seed serves all three.
_STREAMS = ("train", "val", "sample")


def _default_optimizer(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)


class FlowMatchingTransformer(KeepsMultipliers, LoadsSafely, TrainsExperts):
    """Learns to generate images of a class: patches, adaLN-zero on time and class, full attention, FFN or MoE (DiT).

    Rectified flow (arXiv:2209.03003): a noisy image is ``x_t = (1 - t) noise + t image``, the loss the mean square of
    ``velocity(x_t, t, class) - (image - noise)`` over pixels, t uniform in [0, 1] and spread evenly over a batch. Batches are
    dicts ``{"image": float [B, C, R, R], "label": int64 [B]}``. Logs ``train/loss`` (without the auxiliary losses), ``val/loss``
    and ``test/loss``.

    Noise, times and dropped classes are a function of (seed, batch number, data-parallel rank): a resumed run draws what it
    would have drawn, and runs whose validation has the same batches and seed are compared on the same noise.

    Args:
        image_size: Rows and columns of an image, R.
        patch_size: Side of a patch; divides ``image_size``.
        n_channels: Channels, C.
        n_classes: Number of classes.
        width: Residual width d.
        depth: Number of blocks.
        n_heads: Attention heads; divides ``width``.
        ffn_width: Hidden width of a dense FFN; None: 8/3 width, rounded up to a multiple of 16.
        n_experts: Routed experts per block; 0 makes every block dense.
        top_k: Experts active per patch.
        expert_width: Hidden width of one expert; None: ``ffn_width / top_k``, so that the active width is the dense one's.
        init_std: Standard deviation of matrices; None: ``fan_in^-1/2`` of each. Modulations start at zero.
        embedding_std: Standard deviation of what enters the residual stream and the condition: patches, positions, times, classes.
        output_std: Standard deviation of the last matrix.
        residual_multiplier: Factor on every residual branch.
        attention_multiplier: Scale of the attention logits; None: ``head_dim^-1/2``.
        ffn_multiplier: Factor on the output of every FFN or MoE.
        n_expert_groups: As for `MoELanguageModel`.
        activation: Of every FFN and expert, as for `FeedForward`.
        ffn_bias: Give every FFN and expert biases.
        class_dropout: Share of training images whose class is hidden, in [0, 1); above 0 `sample` can be guided.
        seed: Of noise, times and dropped classes, 0 or more; None: in training that of `seed_everything`, in validation 0, so that
            runs of several seeds are compared on the same noise.
        optimizer: From parameters to an optimizer.
        scheduler: As for `MoELanguageModel`.
        **moe: Further options of every MoE layer, as `MoELayer` and `Router` name them. They are checked in a dense model too.

    Raises:
        TypeError: An argument has the wrong type, or is unknown.
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        n_channels: int = 1,
        n_classes: int = 10,
        width: int = 64,
        depth: int = 2,
        n_heads: int = 4,
        ffn_width: int | None = None,
        n_experts: int = 0,
        top_k: int = 2,
        expert_width: int | None = None,
        init_std: float | None = None,
        embedding_std: float = 1.0,
        output_std: float = 0.02,
        residual_multiplier: float = 1.0,
        attention_multiplier: float | None = None,
        ffn_multiplier: float = 1.0,
        n_expert_groups: int = 1,
        activation: str = "swiglu",
        ffn_bias: bool = False,
        class_dropout: float = 0.0,
        seed: int | None = None,
        optimizer: OptimizerCallable = _default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        **moe: Any,
    ) -> None:
        _check(locals())
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler
        self.image_shape, self.n_classes = (n_channels, image_size, image_size), n_classes
        self.class_dropout, self.seed = class_dropout, seed
        self.width, self.depth, self.head_dim = width, depth, infer_head_dim(width, n_heads, n_heads, None)
        self.n_experts, self.top_k = n_experts, top_k
        self.ffn_width = -(-8 * width // 48) * 16 if ffn_width is None else ffn_width
        self.expert_width = max(1, self.ffn_width // max(1, top_k)) if expert_width is None else expert_width
        check_options(n_experts, top_k, n_expert_groups, moe)
        scale = self.head_dim**-0.5 if attention_multiplier is None else attention_multiplier
        sizes = (width, n_heads, n_heads, self.head_dim)
        blocks = []
        for _ in range(depth):
            attention = Attention(*sizes, qk_norm=True, scale=scale, init_std=init_std, causal=False)
            # jsonargparse reads the options of **moe off this call, so that they are keys of a config.
            ffn = self._ffn(n_experts > 0, activation, ffn_bias, init_std, n_expert_groups, **moe)
            ffn.output_multiplier = ffn_multiplier  # type: ignore[assignment]
            blocks.append(ConditionedBlock(width, attention, ffn, residual_multiplier))
        images = (image_size, patch_size, n_channels, n_classes)
        stds: dict[str, Any] = {"embedding_std": embedding_std, "output_std": output_std, "init_std": init_std}
        self.transformer = VelocityTransformer(*images, width, blocks, **stds)
        tag_roles(self)

    def forward(self, x_BCRR: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """Velocities [B, C, R, R] at noisy images, times [B] in [0, 1], and classes [B] int64 (``n_classes``: no class).

        Raises:
            ValueError: For images of another shape than the model's.
        """
        if x_BCRR.shape[1:] != self.image_shape:
            do = "Give image_size and n_channels those of the data."
            raise value_error("image_size", found=list(x_BCRR.shape[1:]), expected=str(list(self.image_shape)), do=do)
        return self.transformer(x_BCRR, t_B, labels_B)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Flow-matching loss of a batch, 0-dim float32, without auxiliary losses.

        Args:
            batch: Images [B, C, R, R] and labels [B].
            generator: On the CPU, of noise, times and dropped classes; None: the global one.
        """
        image, label = batch["image"], batch["label"]
        noise = torch.randn(image.shape, generator=generator).to(image)
        shift = torch.rand(1, generator=generator)
        t_B = ((torch.arange(len(image)) / len(image) + shift) % 1).to(image)
        hidden = torch.rand(len(image), generator=generator).to(image.device) < self.class_dropout
        if self.training:
            label = label.masked_fill(hidden, self.n_classes)
        t = t_B.view(-1, *(1,) * (image.ndim - 1))
        v = self((1 - t) * noise + t * image, t_B, label)
        return (v.float() - (image - noise).float()).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of one micro-batch with the auxiliary losses."""
        loss = self.loss(batch, self._generator("train", self._batches_trained()))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["label"]))
        return self.with_auxiliary(loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``val/loss``, a mean over all images of all ranks, on noise that the seed and the batch's number fix."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``test/loss`` as in validation."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Samples images of the batch's classes, [B, C, R, R]."""
        return self._sample(batch["label"], self._generator("sample", batch_idx))

    @torch.no_grad()
    def sample(
        self, labels_B: Tensor, steps: int = 20, method: Method = "heun", *, guidance: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Generates images of given classes. In evaluation mode; the global random state is not used.

        Args:
            labels_B: Classes [B] int64.
            steps: Steps of the sampler.
            method: "euler", or "heun" with twice the evaluations a step.
            guidance: Classifier-free guidance (arXiv:2207.12598): ``v(no class) + guidance (v(class) - v(no class))``.
            seed: Of the noise at time 0.

        Returns:
            Images [B, C, R, R] float32, about in the range of the training images.

        Raises:
            ValueError: For guidance other than 1 of a model trained with ``class_dropout`` 0, or an unknown method.
        """
        return self._sample(labels_B, torch.Generator().manual_seed(seed), steps, method, guidance)

    def _sample(
        self,
        labels_B: Tensor,
        generator: torch.Generator | None,
        steps: int = 20,
        method: Method = "heun",
        guidance: float = 1.0,
    ) -> Tensor:
        if guidance != 1.0 and not self.class_dropout:
            expected, do = (
                "1: class_dropout is 0, so the model has not learned what no class is",
                "Train with class_dropout=0.1.",
            )
            raise value_error("guidance", found=guidance, expected=expected, do=do)
        device, labels_B = self.device, labels_B.to(self.device)
        none_B = torch.full_like(labels_B, self.n_classes)

        def velocity(x: Tensor, t: float) -> Tensor:
            t_B = torch.full((len(x),), t, device=device)
            v = self(x, t_B, labels_B).float()
            if guidance == 1.0:
                return v
            v_none = self(x, t_B, none_B).float()
            return v_none + guidance * (v - v_none)

        noise = torch.randn((len(labels_B), *self.image_shape), generator=generator).to(device)
        was_training = self.training
        self.eval()
        images = integrate(velocity, noise, steps, method)
        self.train(was_training)
        return images

    def _evaluate(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.loss(batch, self._generator("val", batch_idx))
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val", sync_dist=True, batch_size=len(batch["label"]))

    def _batches_trained(self) -> int:
        """Micro-batches so far, over all epochs and restarts."""
        trainer = self._trainer
        return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def _generator(self, stream: str, number: int) -> torch.Generator | None:
        """The generator of a batch, by its number; None, the global one, in a loop of one's own that has no number."""
        trainer = self._trainer
        if trainer is None:
            return None
        ranks = trainer.distributed_sampler_kwargs  # tensor-parallel processes share a rank
        seed = run_seed(self.seed) if stream == "train" else self.seed or 0
        key = (seed, _STREAMS.index(stream), number, ranks["rank"] if ranks else 0)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def _check(given: Mapping[str, Any]) -> None:
    """Refuses sizes and numbers of the wrong type or out of range."""
    sizes = ("image_size", "patch_size", "n_channels", "n_classes", "width", "depth", "n_heads", "n_expert_groups")
    optional = [name for name in ("ffn_width", "expert_width") if given[name] is not None]
    require_positive(**{name: given[name] for name in (*sizes, *optional)})
    require_size(n_experts=given["n_experts"], top_k=given["top_k"])
    factors = [name for name in given if name.endswith(("_std", "_multiplier")) and given[name] is not None]
    require_non_negative(**{name: given[name] for name in factors})
    require_number("class_dropout", given["class_dropout"], at_least=0, below=1)
    if given["seed"] is not None:
        require_integer("seed", given["seed"], 0)
    if given["image_size"] % given["patch_size"]:
        expected = f"a divisor of image_size={given['image_size']}"
        raise value_error("patch_size", found=given["patch_size"], expected=expected)

"""Small images without a download: the handwritten digits that come with scikit-learn.

Shape legend: N images of a split, B images in one process's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_mue.checks import mismatch, require_fraction, require_integer, require_positive, value_error
from lightning_mue.data.base import StepDataModule
from lightning_mue.data.sampling import Int64Array, StepLoader, window_starts


class ImageBatch(TypedDict):
    """Images of one batch.

    Attributes:
        image: float32 `[B, 1, 8, 8]` in [-1, 1].
        label: The digit, int64 `[B]`.
    """

    image: Tensor
    label: Tensor


class DigitsDataModule(StepDataModule):
    """Serves scikit-learn's 1,797 handwritten digits of 8 x 8 pixels as `{"image": [B, 1, 8, 8], "label": [B]}`.

    Training images are drawn with replacement, as a pure function of (seed, step, rank), so a resumed run sees exactly what it
    would have seen. Test and predict use the validation images.

    Args:
        batch_size: Images in the micro-batch of one process, B.
        val_fraction: Part of the images kept for validation, in (0, 1).
        seed: Seed of the order of training, 0 or more; None: that of `seed_everything`, or 0.
        split_seed: Seed of the split, 0 or more: runs of different seeds are validated on the same images.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, batch_size: int = 64, *, val_fraction: float = 0.2, seed: int | None = None, split_seed: int = 0
    ) -> None:
        super().__init__()
        require_positive(batch_size=batch_size)
        require_fraction(val_fraction=val_fraction)
        if seed is not None:
            require_integer("seed", seed, 0)
        require_integer("split_seed", split_seed, 0)
        if find_spec("sklearn") is None:
            do = "pip install 'lightning-mue[diffusion]'"
            raise ModuleNotFoundError(
                mismatch("DigitsDataModule", found="no scikit-learn", expected="it: the digits come with it", do=do)
            )
        self.batch_size, self.val_fraction = int(batch_size), float(val_fraction)
        self.seed, self.split_seed = None if seed is None else int(seed), int(split_seed)
        self._train: ImageBatch | None = None
        self._val: ImageBatch | None = None
        self._classifier: Any = None

    @property
    def tokens_per_batch(self) -> int:
        """Images in a batch of one process; a rule needs ratios of batches and durations only."""
        return self.batch_size

    def setup(self, stage: str | None = None) -> None:
        """Loads and splits the images.

        Raises:
            ValueError: The training split is empty, or validation has fewer images than there are processes.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None]
        labels = torch.from_numpy(digits.target.astype(np.int64))
        # Ranks of raw random words: NumPy's own permutations may change between versions.
        order = np.argsort(np.random.Philox(key=self.split_seed).random_raw(len(labels)), kind="stable")
        n_val = round(len(order) * self.val_fraction)
        ranks = self._data_parallel()[1]
        if not ranks <= n_val < len(order):
            found = f"{self.val_fraction:g}, which leaves {len(order) - n_val} images for training and {n_val} for validation"
            raise value_error(
                "val_fraction", found=found, expected=f"one for training, {ranks} for validation, or more"
            )
        self._val, self._train = (
            ImageBatch(image=images[part], label=labels[part]) for part in (order[:n_val], order[n_val:])
        )

    def train_dataloader(self) -> ImageStepLoader | FixedImageLoader:
        """Random images; under `Trainer(overfit_batches=...)` fixed ones, the same in every epoch."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self._fixed(self._train)
        return ImageStepLoader(self._loaded(self._train), **self._stream())

    def val_dataloader(self) -> FixedImageLoader:
        """All validation images in a fixed order; every rank gets equally many, so at most world size - 1 are left out."""
        return self._fixed(self._val)

    def test_dataloader(self) -> FixedImageLoader:
        """The validation images."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedImageLoader:
        """The validation images."""
        return self.val_dataloader()

    def classify(self, images: Tensor) -> Tensor:
        """Digits `[B]` int64 that a support vector machine, fitted once to the training images, sees in `[B, 1, 8, 8]`."""
        if self._classifier is None:
            from sklearn.svm import SVC

            train = self._loaded(self._train)
            self._classifier = SVC().fit(train["image"].flatten(1).numpy(), train["label"].numpy())
        # Pixels of real digits end at the ends of the range.
        pixels = images.detach().float().clamp(-1, 1).flatten(1).cpu().numpy()
        return torch.from_numpy(np.asarray(self._classifier.predict(pixels), dtype=np.int64))

    def real_accuracy(self) -> float:
        """Accuracy of `classify` on the real validation images, in [0, 1]: what a perfect generator would reach."""
        val = self._loaded(self._val)
        return float((self.classify(val["image"]) == val["label"]).float().mean())

    def _fixed(self, split: ImageBatch | None) -> FixedImageLoader:
        images, (rank, world_size) = self._loaded(split), self._data_parallel()
        index = torch.arange(len(images["label"]) // world_size * world_size)[rank::world_size]
        return FixedImageLoader(images, index, self.batch_size)

    def _loaded(self, images: ImageBatch | None) -> ImageBatch:
        if images is None:
            found, expected = "images asked for before they are loaded", "setup() to have run"
            do = "Call setup() first; a Trainer calls it itself."
            raise RuntimeError(mismatch(type(self).__name__, found=found, expected=expected, do=do))
        return images


def _take(images: ImageBatch, index: Tensor | npt.NDArray[np.int64]) -> ImageBatch:
    index = torch.as_tensor(index)
    return {"image": images["image"][index], "label": images["label"][index]}


class ImageStepLoader(StepLoader):
    """Endless stream of random images; see `StepLoader`, of whose windows each is one image here."""

    def __init__(self, images: ImageBatch, **stream: Any) -> None:
        super().__init__(images["label"].numpy(), context_length=1, **stream)
        self.images = images

    def batch(self, step: int) -> ImageBatch:  # type: ignore[override]
        """Returns the batch of any step, without advancing the stream."""
        return _take(self.images, self._starts(step))

    def _starts(self, step: int) -> Int64Array:
        n_images = len(self.tokens_N)
        return window_starts(self.seed, step, self.rank, batch_size=self.batch_size, n_starts=n_images)


class FixedImageLoader:
    """Gives the same images in the same order at every iteration; the last batch may be smaller.

    Args:
        images: Images of a split.
        index: Those to give, int64.
        batch_size: Images in a batch.
    """

    def __init__(self, images: ImageBatch, index: Tensor, batch_size: int) -> None:
        self.images, self.parts = images, index.split(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[ImageBatch]:
        return (_take(self.images, part) for part in self.parts)

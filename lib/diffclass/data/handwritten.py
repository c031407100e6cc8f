"""scikit-learn's 8x8 digits, split once and for all; no download."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Digits

DIGITS_TEST = 400
DIGITS_SHA256 = "428ad214e900fe9343f94d9fedc8a16d461db8cd1bc0f61eecf448b8c5f16b35"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled pictures, split once and for all into training and test.

    Shapes      images [N,C,H,W] float32 in [0,1], labels [N] int64
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of every picture."""
        return tuple(self.train_images.shape[1:])

    @property
    def num_classes(self) -> int:
        """K, the length of `class_names`."""
        return len(self.class_names)


def _digits_checksum(images: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def digits() -> ImageSet:
    """The 1797 handwritten 8x8 digits that come with scikit-learn: 1397 for training, 400 for testing; no download.

    The split is one fixed permutation, `np.random.default_rng(0)`, whose last 400 entries are the test set; it is not
    stratified (30 to 51 test pictures per digit). The checksum covers pictures, labels and their order after the split,
    so that nobody compares accuracies on different data without noticing.

    Source      Alpaydin & Kaynak 1998 (UCI, optical recognition of handwritten digits), as packaged by scikit-learn
    Units       pixel counts 0..16 divided by 16
    Errors      ValueError if the installed data or the permutation differ from the ones this project was measured on
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    counts = source.images[order].astype(np.uint8)
    labels = source.target[order].astype(np.uint8)
    checksum = _digits_checksum(counts, labels)
    if checksum != DIGITS_SHA256:
        raise ValueError(
            f"expected scikit-learn's digits with SHA-256 {DIGITS_SHA256[:12]}..., got {checksum[:12]}...; "
            "this scikit-learn has other data or NumPy permutes differently, so the split is another."
        )
    images = torch.from_numpy(counts).float().div(16)[:, None]
    y = torch.from_numpy(labels).long()
    names = tuple(str(digit) for digit in source.target_names)
    return ImageSet(
        "digits",
        images[:-DIGITS_TEST],
        y[:-DIGITS_TEST],
        images[-DIGITS_TEST:],
        y[-DIGITS_TEST:],
        names,
    )

"""Data, teacher and student of the demo: handwritten digits, seen sharply and seen coarsely.

The setting of Wang et al. (ICCVW 2019): the teacher sees 8×8 pixels, the student 4×4. Both learn from the
same images; the other half of the data set is for testing alone.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from pykd.composition import DistillationLoss

TRAIN = 898  # of scikit-learn's 1797 images; the other 899 are the test images
FEATURES = 64
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images as rows of pixels, and their labels."""

    train_sharp: Tensor  # (898, 64)
    train_coarse: Tensor  # (898, 16)
    train_labels: Tensor  # (898,) int64
    test_sharp: Tensor
    test_coarse: Tensor
    test_labels: Tensor


def load(seed: int = 0) -> Digits:
    """scikit-learn's bundled digits, split in halves, each pixel centred and scaled by the training images.

    A tenth of the grey range is added to the standard deviation, so that pixels at the border, which are
    black in nearly every image, do not become the loudest.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = bunch.images[order]
    coarse = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))  # means of 2×2 pixels
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))

    def rows(pixels: np.ndarray) -> Tensor:
        flat = pixels.reshape(len(pixels), -1)
        scaled = (flat - flat[:TRAIN].mean(axis=0)) / (flat[:TRAIN].std(axis=0) + 1.6)
        return torch.from_numpy(scaled.astype(np.float32))

    sharp_rows, coarse_rows = rows(images), rows(coarse)
    return Digits(
        train_sharp=sharp_rows[:TRAIN],
        train_coarse=coarse_rows[:TRAIN],
        train_labels=labels[:TRAIN],
        test_sharp=sharp_rows[TRAIN:],
        test_coarse=coarse_rows[TRAIN:],
        test_labels=labels[TRAIN:],
    )


class Network(nn.Module):
    """pixels → hidden → features → classes; returns logits and features ``(batch, 1, 64)``."""

    def __init__(self, pixels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(pixels, hidden)
        self.second = nn.Linear(hidden, FEATURES)
        self.third = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.second(F.relu(self.first(images))))
        return self.third(features), features.unsqueeze(1)  # one token per image

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that are named rightly."""
        with torch.no_grad():
            return float((self(images)[0].argmax(dim=1) == labels).double().mean())


def train(
    pixels: int,
    hidden: int,
    images: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    batch: int = 64,
) -> Network:
    """Trains a network with Adam; ``loss`` takes logits, features and the rows of the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(pixels, hidden)
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(images)), batch):
                logits, features = network(images[rows])
                value = loss(logits, features, rows)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return network.eval()


def train_teacher(digits: Digits) -> Network:
    """The teacher: 8×8 pixels, 128 hidden units, cross-entropy on the labels."""

    def cross_entropy(logits: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits, digits.train_labels[rows])

    return train(64, 128, digits.train_sharp, cross_entropy, epochs=30, learning_rate=1e-3)


def train_student(digits: Digits, teacher: Network, loss: "DistillationLoss", epochs: int = 10) -> Network:
    """A student of the 4×4 pixels, trained in Python for as long as it takes to have opinions."""
    with torch.no_grad():
        teacher_logits, teacher_features = teacher(digits.train_sharp)

    def distill(logits: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        value: Tensor = loss(
            student_logits=logits,
            student_features=[features],
            teacher_logits=teacher_logits[rows],
            teacher_features=[teacher_features[rows]],
            labels=digits.train_labels[rows],
        )
        return value

    return train(16, 64, digits.train_coarse, distill, epochs, learning_rate=3e-3)


def outputs(digits: Digits, teacher: Network, student: Network) -> dict[str, Tensor]:
    """What both say of the training images, under the names that the exported loss gives its inputs."""
    with torch.no_grad():
        teacher_logits, teacher_features = teacher(digits.train_sharp)
        student_logits, student_features = student(digits.train_coarse)
    return {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": digits.train_labels,
        "student_features_0": student_features,
        "teacher_features_0": teacher_features,
    }


def for_cpp(digits: Digits, teacher: Network) -> dict[str, np.ndarray]:
    """What the C++ trainers read: the coarse images, the labels, and what the teacher says of each image."""
    with torch.no_grad():
        logits, features = teacher(digits.train_sharp)
    tensors = {
        "train_images": digits.train_coarse,
        "train_labels": digits.train_labels,
        "teacher_logits": logits,
        "teacher_features": features,
        "test_images": digits.test_coarse,
        "test_labels": digits.test_labels,
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}

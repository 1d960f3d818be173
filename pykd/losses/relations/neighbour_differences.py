"""Products of neighbours' differences, which RepDistiller calls correlation congruence."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register
from pykd.fused.description import BlockPoint


def neighbour_differences(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Products of the differences of samples that follow each other; see :class:`NeighbourDifferences`."""
    differences = (ops.upcast(student_embeddings) - ops.upcast(teacher_embeddings.detach())).abs()
    values = (differences[:-1] * differences[1:]).sum(dim=1)
    return values.sum() / torch.ones_like(values).sum().clamp(min=1.0)


def _value_and_gradient(student: Tensor, teacher: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same, by blocks of rows. All products want the neighbours' differences alone, of which few are there at a time."""
    samples = len(student)
    share = 1.0 / max(samples - 1, 1)
    total, nothing = student.new_zeros((), dtype=torch.float64), student.new_zeros(())
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    for start in range(0, samples, rows):
        stop = min(start + rows, samples)
        first, last = max(start - 1, 0), min(stop + 1, samples)  # with the neighbours
        differences = student[first:last] - teacher[first:last]
        own = gradient[start:stop]
        torch.sign(differences[start - first : stop - first], out=own)
        differences.abs_()
        if first == start or last == stop:  # the first sample has no neighbour before it, and the last none after it
            differences = torch.nn.functional.pad(differences, (0, 0, int(first == start), int(last == stop)))
        total += torch.dot(differences[1:-1].flatten(), differences[2:].flatten())
        torch.addcmul(nothing, own, differences[:-2] + differences[2:], value=share, out=own)
    return (total * share).to(student.dtype), gradient


@register(neighbour_differences)
class NeighbourDifferences(Loss):
    r"""Products of the differences between student and teacher of two samples that follow each other in the batch.

    .. math:: \ell = \frac1{N - 1} \sum_{i=1}^{N-1} \sum_c |x_{ic} - y_{ic}| \, |x_{i+1,c} - y_{i+1,c}|

    with the student's embeddings x and the teacher's y. RepDistiller calls this correlation congruence, after code that its authors
    had from those of that paper; the paper's formula is :class:`pykd.CorrelationCongruence`.

    Args:
        reduction: ``"mean"`` alone; the mean over pairs is part of the definition.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, channels)``, same type; constant.

    Returns:
        A scalar, the square of the embeddings' unit, at least 0; 0 where student and teacher agree (or every second sample does),
        and for a single sample. float32 for half-precision inputs, which are computed in float32. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample, and no sample can be left out: it would make neighbours of others. The value depends on the order
    of the batch.

    Who differs: RepDistiller's ``Correlation`` is this; nobody else has it.

    Example:
        >>> NeighbourDifferences()(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))
        tensor(4.)

    References:
        Tian et al.: Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699, which compares with it.
    """

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, like="teacher_embeddings"),
        "teacher_embeddings": Spec("batch channels"),
    }
    cases = (Case(),)
    couples_batch = "multiplies the differences of samples that follow each other"

    def relation(self, tensors):
        return tensors["student_embeddings"].shape

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings):
        return blocks.with_gradient(
            _value_and_gradient, ops.upcast(student_embeddings), ops.upcast(teacher_embeddings.detach())
        )

    def properties(self) -> Properties:
        return Properties(
            batch_order="neighbours are multiplied with each other",
            feature_scale="the differences are those of the embeddings as they are",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_embeddings, teacher_embeddings):
        """Neighbours by neighbours, from the definition."""
        differences = [np.abs(x - y) for x, y in zip(student_embeddings, teacher_embeddings, strict=True)]
        products = [(differences[i] * differences[i + 1]).sum() for i in range(len(differences) - 1)]
        return sum(products) / max(len(products), 1)

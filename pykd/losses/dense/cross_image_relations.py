"""Cross-image relations: how the pixels of one image resemble those of every image of the batch."""

import numpy as np
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Products


def _pixels(features: Tensor) -> Tensor:
    """The directions of all pixels of the batch, ``(images, pixels per image, channels)``."""
    return ops.normalize(ops.upcast(features), dim=[1]).permute(0, 2, 3, 1).flatten(1, 2)


def _similarities(features: Tensor) -> Tensor:
    """Cosines of every pixel of the batch with the pixels of each image, ``(pixels, images, pixels per image)``."""
    x = _pixels(features)
    cosines = ops.matmul(x.flatten(0, 1), x.flatten(0, 1).transpose(0, 1))
    return cosines.reshape(cosines.size(0), x.size(0), x.size(1))


def _values(student: Tensor, teacher: Tensor, images: int, temperature: float) -> Tensor:
    """One value for every pixel of a block, of its cosines with all pixels."""
    own, others = student.unflatten(1, (images, -1)), teacher.unflatten(1, (images, -1))
    return ops.softened_divergence(own, others, temperature).mean(dim=1)


def cross_image_relations(student_features: Tensor, teacher_features: Tensor, temperature: float) -> Tensor:
    """Divergence of similarities across the images of a batch; see :class:`CrossImageRelations`."""
    student, teacher = _similarities(student_features), _similarities(teacher_features.detach())
    return ops.softened_divergence(student, teacher, temperature).mean()


@register(cross_image_relations)
class CrossImageRelations(Loss):
    r"""KL divergence between the teacher's and the student's softmax of every pixel's cosines with the pixels of each image.

    .. math:: \frac{1}{B^2} \sum_{b, b'} \frac{1}{HW} \sum_i
              \mathrm{KL}\big(\mathrm{softmax}_j(\cos(y_{bi}, y_{b'j}) / T) \,\Vert\,
              \mathrm{softmax}_j(\cos(x_{bi}, x_{b'j}) / T)\big)

    over all ordered pairs of images b and b′ of the batch, of an image with itself included.

    Args:
        temperature: T > 0, without a factor T².
        reduction: ``"mean"`` alone; the means are part of the definition.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: ``(batch, teacher_channels, height, width)``, same type; constant.

    Returns:
        A scalar in nats, between 0 and 2 / T. float32 for half-precision inputs, which are computed in float32. A pixel
        whose channels are all 0 has the cosine 0 with all, and the gradient 0. NaN in an input gives NaN. Memory: two
        matrices of (batch · height · width)², but for ``kernels="auto"`` from 512 pixels on; pool the maps first, as CIRKD does in
            windows of 2 × 2.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    There is no value per sample: every image is compared with every other.

    Who differs: CIRKD's CriterionMiniBatchCrossImagePair is this, in a loop over the pairs.

    Example:
        Two pixels that are alike to the student and at right angles to the teacher: softmax(2, 0) against an even one.

        >>> student, teacher = torch.ones(1, 1, 1, 2), torch.eye(2).reshape(1, 2, 1, 2)
        >>> CrossImageRelations(temperature=0.5)(student, teacher)
        tensor(0.3278)

    References:
        Yang et al.: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022, arXiv:2204.06986.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch teacher_channels height width"),
    }
    cases = (Case(), Case({"temperature": 0.25}))
    couples_batch = "compares every image of the batch with every other"
    aliases = ("CIRKD", "CriterionMiniBatchCrossImagePair")

    temperature: float = scalar(default=0.1, minimum=0.0, exclusive=True)

    def relation(self, tensors):
        images, _, height, width = tensors["student_features"].shape
        return images * height * width, images * height * width

    def in_blocks(self, blocks: BlockPoint, student_features, teacher_features, temperature):
        x, y = (_pixels(features).flatten(0, 1) for features in (student_features, teacher_features.detach()))
        images = len(student_features)
        return blocks.over_rows(_values, Products(x, x), Products(y, y), images, temperature, weight=None)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric="the teacher weighs the logarithms")

    def reference(self, student_features, teacher_features):
        own, wanted = (
            [np.array([unit(pixel) for pixel in image.reshape(len(image), -1).T]) for image in features]
            for features in (student_features, teacher_features)
        )
        images = range(len(own))
        values = []
        for b in images:
            for other in images:
                log_q = _log_softmax_of_rows(own[b] @ own[other].T / self.temperature)
                log_p = _log_softmax_of_rows(wanted[b] @ wanted[other].T / self.temperature)
                values.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
        return np.mean(values)


def _log_softmax_of_rows(scores):
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

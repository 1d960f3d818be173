"""Copy this file to ``pykd/losses/<name>.py`` and fill it in; nothing else needs to know of the new loss.

Then: ``pytest -k <name>`` runs every check, ``pykd table --write README.md`` renews the table of losses.
(Files that start with an underscore are not loaded; a test runs this one as it stands.)
"""

import numpy as np
from torch import Tensor

from pykd import ops
from pykd.reference import reduce_samples
from pykd.registry import Case, Loss, Scalar, Spec, register


# 1. The formula: a function that torch.jit.script accepts, named like the loss.
#    - the teacher is a constant: detach it;  halves compute in float32: ops.upcast;
#    - one value per sample as long as possible, ops.reduce in the last line;
#    - log space; torch.where instead of boolean indexing; shapes only as integers (never float(x.shape[0])).
def template(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of softened logits; see :class:`Template`."""
    difference = (ops.upcast(student_logits) - ops.upcast(teacher_logits.detach())) / temperature
    values = (difference * difference).mean(dim=-1)
    return ops.reduce(values, ops.optional_weight(sample_weight), reduction)


# 2. The module: settings, and a docstring from which a reader could implement the loss.
@register("template")
class Template(Loss):
    r"""Mean squared difference of the logits, divided by the temperature.

    .. math:: \ell_b = \frac1C \sum_c \left(\frac{s_{bc} - t_{bc}}{T}\right)^2

    Args:
        temperature: T > 0.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient.
        teacher_logits: ``(batch, classes)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0; constant.

    Returns:
        At least 0, no unit; 0 when the logits are equal; a scalar unless ``reduction="none"``.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: say here which libraries mean another number by the same name.

    Example:
        >>> Template(temperature=2.0)(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(2.)

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014, arXiv:1312.6184.
    """

    # 3. The tensors in the order of forward(), with named axes; scalars that may change in every call;
    #    the settings to test, every one of them off its default somewhere.
    inputs = {
        "student_logits": Spec("batch classes", grad=True),
        "teacher_logits": Spec("batch classes"),
        "sample_weight": Spec("batch", optional=True, draw="weights"),
    }
    scalars = {"temperature": Scalar(minimum=0.0, exclusive=True)}
    cases = (
        Case(),
        Case({"temperature": 2.0, "reduction": "sum"}, optional=("sample_weight",)),
    )
    paper = "Ba, Caruana 2014, arXiv:1312.6184"

    def __init__(self, temperature: float = 1.0, reduction: str = "mean"):
        super().__init__(reduction, temperature=temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        sample_weight: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        if temperature is None:
            temperature = self.temperature
        return template(student_logits, teacher_logits, sample_weight, temperature, self.reduction)

    # 4. Leave this out unless the value is 0 when student and teacher agree.
    def zero_when_equal(self) -> bool:
        return True

    # 5. The judge: NumPy float64, written from the paper, one sample at a time, to be obvious.
    @staticmethod
    def reference(student_logits, teacher_logits, sample_weight=None, temperature=1.0, reduction="mean"):
        values = [np.mean(((s - t) / temperature) ** 2) for s, t in zip(student_logits, teacher_logits, strict=True)]
        weights = np.ones(len(values)) if sample_weight is None else sample_weight
        return reduce_samples(values, weights, reduction)

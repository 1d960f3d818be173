"""Copy this file to ``pykd/losses/<family>/<name>.py`` and fill it in; nothing else needs to know of the new loss.

Then: ``pytest --loss <name>`` runs every check, ``scripts/generate`` renews the tables of losses, and what editors and type
checkers read of them.
(Files that start with an underscore are not loaded; a test runs this one as it stands.)
"""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples


# 1. The formula: a function that torch.jit.script accepts, named like the loss. It takes the tensors, then the settings; their
#    defaults are declared below, and are the function's, too.
#    - the teacher is a constant: detach it;  halves compute in float32: ops.upcast;
#    - one value per sample as long as possible, ops.reduce in the last line;
#    - what a sample of weight 0 holds must not reach the gradient: ops.without_left_out, first of all;
#    - log space; torch.where instead of boolean indexing; shapes only as integers (never float(x.shape[0])).
def template(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Squared difference of softened probabilities; see :class:`Template`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits.detach(), weight)
    q = torch.softmax(ops.upcast(student) / temperature, dim=-1)
    p = torch.softmax(ops.upcast(teacher) / temperature, dim=-1)
    values = ((q - p) * (q - p)).sum(dim=-1)
    return ops.reduce(values, weight, reduction)


# 2. The module: settings, and a docstring from which a reader could implement the loss. The first of its references is the
#    paper that tables name.
@register(template)
class Template(Loss):
    r"""Squared distance between the student's and the teacher's softened class probabilities.

    .. math:: \ell_b = \sum_c (q_{bc} - p_{bc})^2, \quad p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    Args:
        temperature: T > 0; larger is softer.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient.
        teacher_logits: ``(batch, classes)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Between 0 and 2, no unit; 0 when the logits are equal; a scalar unless ``reduction="none"``.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: KD_Lib averages over the classes, too, and multiplies by T². (Say here which libraries mean
    another number by the same name.)

    Example:
        >>> Template(temperature=2.0)(torch.tensor([[0.0, 2.1972]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.1250)

    References:
        Brier: Verification of Forecasts Expressed in Terms of Probability, Monthly Weather Review, 1950.
    """

    # 3. The tensors in the order of the formula, those that may be missing last, with named axes (any names; a tuple of Specs
    #    where an input may have several forms, of which those go together that agree on the axes that both can have;
    #    least_lengths = {"classes": 2} where one class is too few; sample_axes, where a sample may also be one token of a
    #    sequence: soft_target.py), with what they hold (draw; layers, where it is a list), and which of the teacher's tensors
    #    each of the student's is compared with (like); the settings to test, every one of them off its default somewhere
    #    (tests reduce and weigh by themselves); what else the loss is called (abbreviations of papers, classes of other
    #    libraries; a name that means settings off their default brings them: Alias("RKL", form="reverse_kl")); and the settings
    #    themselves, of which the constructor is made, in the order of the formula: scalar (may change in every call), number,
    #    whole, choice, flag.
    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case({"temperature": 2.0, "reduction": "sum"}, optional=("sample_weight",)),
    )
    aliases = ("TemplateLoss", Alias("TemplateLossT4", temperature=4.0))

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)

    # 4. What changes nothing (True), or why it does: tests hold you to it, either way.
    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric=True,
        )

    # 5. The reference: NumPy float64, written from the paper, one sample at a time, to be obvious. Settings are those of self.
    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(student_logits, teacher_logits, strict=True):
            q, p = np.exp(log_softmax(s / self.temperature)), np.exp(log_softmax(t / self.temperature))
            values.append(((q - p) ** 2).sum())
        return reduce_samples(values, sample_weight, self.reduction)

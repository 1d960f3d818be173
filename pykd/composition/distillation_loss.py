"""DistillationLoss: the composed, configurable loss for low-resolution recognition, in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pykd.composition.composition import Composition
from pykd.composition.terms import MAX_PARTS, Part, Term
from pykd.definition import checks, registry

# aux_loss → the registered loss behind it
_AUX = {"l1": "feature_l1", "l2": "feature_l2", "MK-MMD": "mk_mmd"}


class DistillationLoss(Composition):
    r"""Hard term, logit term and feature term in one loss, with the student's tensors against the teacher's.

    .. math:: \alpha \cdot \mathrm{hard} + \gamma \cdot \mathrm{logit} + \beta \cdot \mathrm{aux}

    - ``hard``: cross-entropy of the student against the labels (:class:`pykd.HardTarget`).
    - ``logit``, for ``logit_loss="soft_entropy"``: λ1 · CE(student logits, teacher) + λ2 · CE(student logits
      on teacher features, teacher), against softmax(teacher / τ), without T² (:class:`pykd.SoftTarget`).
    - ``aux``: the feature loss, summed over ``features_index`` (:class:`pykd.FeatureL1`,
      :class:`pykd.FeatureL2`, :class:`pykd.MKMMD`).

    Args:
        logit_loss: ``None`` or ``"soft_entropy"``.
        aux_loss: ``None``, ``"l1"``, ``"l2"`` or ``"MK-MMD"``.
        alpha: weight of the hard term.
        beta: weight of the feature term.
        gamma: weight of the logit term.
        lambda1: weight of the student's logits inside the logit term.
        lambda2: weight of ``student_logits_teacher_features`` inside the logit term.
        lambda3: reserved for a third part of a logit or feature loss; none of today's has one.
        tau: temperature of the teacher's targets, greater than 0.
        mode: ``None``, or ``"student_softening"``: divide the student's logits by ``tau`` too.
        features_index: which entries of the feature lists are compared (from the end, as in Python).
        spatial_avg: ``None``, or ``"mean"``: average each feature map over its tokens before comparing.
        multiple_lrs: ``None``, or d: one teacher and d students (d low resolutions, say). Student tensors carry an
            axis of length d after the batch; teacher tensors are repeated for each student; labels may carry
            it or not. The loss is that of batch · d samples.
        share_ignored: whether a sample whose class index is −100 is padding, and left out of the logit term and of l1 and l2, too;
            False: of the hard term alone (samples without a label).
        kernels: ``"auto"``, ``"on"``, ``"off"``, or None: the default (:func:`pykd.set_kernels`).

    A weight of exactly 0 (``alpha``, ``beta``, ``gamma``, ``lambda1``, ``lambda2``) leaves its part out: the tensors
    that only it needs may be ``None``. To start a weight at 0 and raise it later, construct with another
    number and pass 0 in the call.

    Inputs (keywords):
        teacher_logits: ``(batch, classes)``; constant. All logits, and labels with them, may have an axis ``tokens`` after the
            batch, if there is one student.
        teacher_features: list of ``(batch, tokens, channels)``; constant. Entries may differ in tokens and channels.
        student_logits: ``(batch, classes)``; receives the gradient.
        student_features: list as ``teacher_features``, with the same shapes where compared; receives the gradient.
        labels: class probabilities ``(batch, classes)`` or class indices ``(batch,)`` int64; constant.
        student_logits_teacher_features: ``(batch, classes)``, what the student's classifier makes of the
            teacher's features; receives the gradient.
        hard_weight, logit_weight, aux_weight, logit_lambda1, logit_lambda2, logit_temperature: numbers that
            replace alpha, gamma, beta, lambda1, lambda2 and tau in this call.
        kernels: ``"auto"``, ``"on"`` or ``"off"`` for this call.

    Returns:
        The loss as a scalar; :meth:`terms` returns ``{"loss", "hard", "logit", "aux"}``, each term before its
        weight, those without a part left out.

    In exported files the feature lists are flat: ``student_features_0`` is the first entry of
    ``features_index``, and so on.

    Example:
        >>> loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=2, mode="student_softening", gamma=0.5)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> loss(teacher_logits=teacher, student_logits=student, labels=torch.tensor([1]))
        tensor(1.0397)

    References:
        Wang et al.: Improved Knowledge Distillation for Training Fast Low Resolution Face Recognition
        Model, ICCVW 2019; Hinton et al. 2015, arXiv:1503.02531; Long et al. 2015, arXiv:1502.02791.
    """

    def __init__(
        self,
        logit_loss: str | None = None,
        aux_loss: str | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 1.0,
        tau: float = 3,
        mode: str | None = None,
        features_index: Sequence[int] = (-1,),
        spatial_avg: str | None = None,
        multiple_lrs: int | None = None,
        share_ignored: bool = True,
        kernels: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "kernels")}
        arguments["features_index"] = list(features_index)
        if share_ignored:  # as ever: recipes need not say it
            del arguments["share_ignored"]
        _one_of("logit_loss", logit_loss, (None, "soft_entropy"))
        _one_of("aux_loss", aux_loss, (None, *_AUX))
        _one_of("mode", mode, (None, "student_softening"))
        _one_of("spatial_avg", spatial_avg, (None, "mean"))
        if multiple_lrs is not None and (not isinstance(multiple_lrs, int) or multiple_lrs < 1):
            raise ValueError(
                f"expected multiple_lrs to be None or the number of students, got {multiple_lrs!r}; pass 1 or more"
            )
        indices = [int(index) for index in features_index]
        if aux_loss is not None and beta != 0 and (not indices or len(set(indices)) < len(indices)):
            raise ValueError(
                f"expected features_index to name at least one entry, each once, got {indices}; pass for example [-1]"
            )
        if len(indices) > MAX_PARTS:
            raise ValueError(
                f"expected features_index to name at most {MAX_PARTS} entries, got {len(indices)}; pass fewer"
            )
        registry.load_all()
        terms = []
        if alpha != 0:
            terms.append(Term("hard", (Part(registry.get("hard_target")()),), float(alpha)))
        if logit_loss is not None and gamma != 0:
            parts = _logit_parts(float(lambda1), float(lambda2), float(tau), mode)
            if parts:
                terms.append(Term("logit", parts, float(gamma)))
        if aux_loss is not None and beta != 0:
            cls = registry.get(_AUX[aux_loss])
            settings: dict[str, Any] = {"spatial_avg": spatial_avg}
            aux = tuple(
                Part(
                    cls(**settings),
                    inputs={name: f"{name}_{i}" for name in ("student_features", "teacher_features")},
                    axes={axis: f"{axis}_{i}" for axis in ("tokens", "channels")} if len(indices) > 1 else {},
                )
                for i in range(len(indices))
            )
            terms.append(Term("aux", aux, float(beta)))
        if not terms:
            raise ValueError(
                "expected at least one term with a weight other than 0, got none; "
                "set alpha, or logit_loss and gamma, or aux_loss and beta"
            )
        super().__init__(terms, students=multiple_lrs is not None, share_ignored=share_ignored, kernels=kernels)
        self.arguments = arguments
        self.features_index = indices
        self.multiple_lrs = multiple_lrs

    def forward(  # type: ignore[override]
        self,
        teacher_logits: Tensor | None = None,
        teacher_features: Sequence[Tensor] | None = None,
        student_logits: Tensor | None = None,
        student_features: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        student_logits_teacher_features: Tensor | None = None,
        *,
        kernels: str | None = None,
        **parameters: float,
    ) -> Tensor:
        return self.terms(
            teacher_logits=teacher_logits,
            teacher_features=teacher_features,
            student_logits=student_logits,
            student_features=student_features,
            labels=labels,
            student_logits_teacher_features=student_logits_teacher_features,
            kernels=kernels,
            **parameters,
        )["loss"]

    def terms(self, *, kernels: str | None = None, **inputs: Any) -> dict[str, Tensor]:
        """``{"loss", "hard", "logit", "aux"}`` for the arguments of a call; unused terms are absent."""
        return Composition.forward(self, kernels=kernels, **self.flatten(**inputs))

    def flatten(self, **inputs: Any) -> dict[str, Any]:
        """The arguments of a call as the flat, named tensors of the exported files.

        Tensors that no term needs are dropped, so that the same call serves every configuration.
        """
        flat: dict[str, Any] = {}
        for name in ("student_features", "teacher_features"):
            features = inputs.pop(name, None)
            if f"{name}_0" in self.input_layouts:
                flat |= self._pick(name, features)
        known = ("teacher_logits", "student_logits", "labels", "student_logits_teacher_features")
        for name, value in inputs.items():
            if name in self.input_layouts or name in self.scalars or name not in known:
                flat[name] = value
        if self.multiple_lrs is not None:
            self._check_students(flat)
        return flat

    def recipe(self) -> dict[str, Any]:
        return {"distillation_loss": {name: value for name, value in self.arguments.items() if value is not None}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())

    def _pick(self, name: str, features: Sequence[Tensor] | None) -> Mapping[str, Tensor]:
        if not isinstance(features, list | tuple):
            got = "None" if features is None else type(features).__name__
            raise TypeError(
                f"expected {name} to be a list of tensors (batch, tokens, channels), got {got}; pass a list"
            )
        for index in self.features_index:
            if not -len(features) <= index < len(features):
                raise ValueError(
                    f"expected {name} to have the entry {index} of features_index, got a list of {len(features)}; "
                    "pass more features or another features_index"
                )
        return {f"{name}_{i}": features[index] for i, index in enumerate(self.features_index)}

    def _check_students(self, flat: Mapping[str, Any]) -> None:
        for name, layouts in self.input_layouts.items():
            tensor = flat.get(name)
            if tensor is not None and layouts[0].grad:
                checks.resolve(name, tensor, layouts)
                if tensor.shape[1] != self.multiple_lrs:
                    raise ValueError(
                        f'expected {name} to have length {self.multiple_lrs} along "students" (multiple_lrs), '
                        f"got {tensor.shape[1]}; pass one slice per student"
                    )


def _logit_parts(lambda1: float, lambda2: float, tau: float, mode: str | None) -> tuple[Part, ...]:
    cls = registry.get("soft_target")
    parts = []
    if lambda1 != 0:
        loss = cls(temperature=tau, soften_student=mode == "student_softening")
        parts.append(Part(loss, lambda1, "logit_lambda1"))
    if lambda2 != 0:
        # What the student's classifier makes of the teacher's features is never softened.
        loss = cls(temperature=tau, soften_student=False)
        parts.append(Part(loss, lambda2, "logit_lambda2", inputs={"student_logits": "student_logits_teacher_features"}))
    return tuple(parts)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"expected {name} to be one of {known}, got {value!r}; pass one of these")

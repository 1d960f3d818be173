"""DistillationLoss: the composed, configurable loss for low-resolution recognition, in one call."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pykd.composition.composition import Composition
from pykd.composition.terms import MAX_PARTS, Part, Term
from pykd.definition import Loss, checks, registry, scalar

_SOFT = "soft_entropy"  # soft_target without T², as this loss has it
_FEATURES = ("student_features", "teacher_features")
_EMBEDDINGS = {"student_embeddings": "student_features", "teacher_embeddings": "teacher_features"}


class DistillationLoss(Composition):
    r"""Hard term, logit term and feature term in one loss, with the student's tensors against the teacher's.

    .. math:: \alpha \cdot \mathrm{hard} + \gamma \cdot \mathrm{logit} + \beta \cdot \mathrm{aux}

    - ``hard``: cross-entropy of the student against the labels (:class:`pykd.HardTarget`).
    - ``logit``, for ``logit_loss="soft_entropy"``: λ1 · CE(student logits, teacher) + λ2 · CE(student logits
      on teacher features, teacher), against softmax(teacher / τ), without T² (:class:`pykd.SoftTarget`). For any other
      loss on logits: λ1 · that loss; for a list: λ1 · the first + λ2 · the second + λ3 · the third.
    - ``aux``: any other loss; one that compares features is summed over ``features_index``. For a list the same weights.

    Args:
        logit_loss: ``None``, ``"soft_entropy"``, the name or an alias of a registered loss that takes ``student_logits`` (``"DKD"``,
            ``"RKL"``), or a list of up to three of them. In a list ``"soft_entropy"`` is its first part alone.
        aux_loss: ``None``, ``"l1"``, ``"l2"``, ``"MK-MMD"``, the name or an alias of any other registered loss, or a list of up to
            three of them: ``["l1", "RKD-D"]``.
        alpha: weight of the hard term.
        beta: weight of the feature term.
        gamma: weight of the logit term.
        lambda1: weight of the student's logits inside the logit term, and of the first loss of a list.
        lambda2: weight of ``student_logits_teacher_features`` inside the logit term, and of the second loss of a list.
        lambda3: weight of the third loss of a list.
        tau: temperature of the teacher's targets, greater than 0; of every logit loss that has a temperature.
        mode: ``None``, or ``"student_softening"``: divide the student's logits by ``tau`` too. Of ``"soft_entropy"``; other losses soften
            as their formulas say.
        features_index: which entries of the feature lists are compared (from the end, as in Python).
        spatial_avg: ``None``, or ``"mean"``: average each feature map over its tokens before comparing. Of losses that have it.
        multiple_lrs: ``None``, or d: one teacher and d students (d low resolutions, say). Student tensors carry an
            axis of length d after the batch; teacher tensors are repeated for each student; labels may carry
            it or not. The loss is that of batch · d samples.
        share_ignored: whether a sample whose class index is −100 is padding, and left out of the logit term and of l1 and l2, too;
            False: of the hard term alone (samples without a label).
        kernels: ``"auto"``, ``"on"``, ``"off"``, or None: the default (:func:`pykd.set_kernels`).

    A weight of exactly 0 (``alpha``, ``beta``, ``gamma``, and each λ of a term that it weighs) leaves its part out: the tensors
    that only it needs may be ``None``. To start a weight at 0 and raise it later, construct with another
    number and pass 0 in the call.

    Inputs (keywords):
        teacher_logits: ``(batch, classes)``; constant. All logits, and labels with them, may have an axis ``tokens`` after the
            batch, if there is one student.
        teacher_features: list of ``(batch, tokens, channels)``, or whatever forms the aux losses take (vectors, maps); constant.
            Entries may differ in all lengths but the batch.
        student_logits: ``(batch, classes)``; receives the gradient.
        student_features: list as ``teacher_features``, with the same shapes where compared; receives the gradient.
        labels: class probabilities ``(batch, classes)`` or class indices ``(batch,)`` int64; constant.
        student_logits_teacher_features: ``(batch, classes)``, what the student's classifier makes of the
            teacher's features; receives the gradient.
        student_embeddings, teacher_embeddings, and every other input of the losses: by their names. Embeddings that are not given are
            the first entry of ``features_index``, where that is ``(batch, channels)``.
        hard_weight, logit_weight, aux_weight, logit_lambda1, …, aux_lambda1, …, logit_temperature: numbers that
            replace alpha, gamma, beta, the λ of each term and tau in this call; other numbers of the losses are ``logit_…``, ``aux_…``.
        kernels: ``"auto"``, ``"on"`` or ``"off"`` for this call.

    Returns:
        The loss as a scalar; :meth:`terms` returns ``{"loss", "hard", "logit", "aux"}``, each term before its
        weight, those without a part left out.

    In exported files the feature lists are flat: ``student_features_0`` is the first entry of
    ``features_index``, and so on. Where two losses of a list name the axes of a tensor differently, the second takes it under a
    name of its own, ``student_features_0_for_<loss>``.

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
        logit_loss: str | Sequence[str] | None = None,
        aux_loss: str | Sequence[str] | None = None,
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
        indices = _indices(features_index)
        arguments["features_index"] = list(features_index)
        for name in ("logit_loss", "aux_loss"):
            if isinstance(arguments[name], Sequence) and not isinstance(arguments[name], str):
                arguments[name] = list(arguments[name])
        if share_ignored:  # as ever: recipes need not say it
            del arguments["share_ignored"]
        _one_of("mode", mode, (None, "student_softening"))
        _one_of("spatial_avg", spatial_avg, (None, "mean"))
        _one_of("share_ignored", share_ignored, (True, False))
        if multiple_lrs is not None and (type(multiple_lrs) is not int or multiple_lrs < 1):
            raise ValueError(
                f"expected multiple_lrs to be None or the number of students, got {multiple_lrs!r}; pass 1 or more"
            )
        lambdas = {"lambda1": lambda1, "lambda2": lambda2, "lambda3": lambda3}
        for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma, **lambdas}.items():
            scalar(default=1.0).check(name, value)
        scalar(default=3.0, minimum=0.0, exclusive=True).check("tau", tau)
        logit, aux = _named("logit_loss", logit_loss), _named("aux_loss", aux_loss)
        if aux and beta != 0 and (not indices or len(set(indices)) < len(indices)):
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
        factors = tuple(map(float, lambdas.values()))
        inputs = _Inputs(len(indices))
        for term in terms:
            inputs.take(term.parts[0].loss)
        if logit_loss == _SOFT and gamma != 0:
            parts = _logit_parts(factors[0], factors[1], float(tau), mode)
            inputs.take(registry.get("soft_target")())
        else:
            weights = factors if gamma != 0 else (0.0,) * len(factors)
            parts = tuple(
                part
                for i, (name, cls) in enumerate(logit)
                if weights[i] != 0
                for part in inputs.parts(_logit(name, cls, float(tau), mode), weights[i], f"logit_lambda{i + 1}")
            )
        if parts:
            terms.append(Term("logit", parts, float(gamma)))
        listed = not isinstance(aux_loss, str)
        weights = factors if listed else (1.0,)
        parts = tuple(
            part
            for i, (name, cls) in enumerate(aux if beta != 0 else [])
            if weights[i] != 0
            for part in inputs.parts(
                _aux(name, cls, spatial_avg, len(indices)), weights[i], f"aux_lambda{i + 1}" if listed else None
            )
        )
        if parts:
            terms.append(Term("aux", parts, float(beta)))
        if not terms:
            raise ValueError(
                "expected at least one term with a weight other than 0, got none; "
                "set alpha, or logit_loss and gamma, or aux_loss and beta"
            )
        super().__init__(terms, students=multiple_lrs is not None, share_ignored=share_ignored, kernels=kernels)
        self.arguments = arguments
        self.features_index = indices
        self.multiple_lrs = multiple_lrs
        self._sources = inputs.sources

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
        **inputs_and_parameters: Any,
    ) -> Tensor:
        return self.terms(
            teacher_logits=teacher_logits,
            teacher_features=teacher_features,
            student_logits=student_logits,
            student_features=student_features,
            labels=labels,
            student_logits_teacher_features=student_logits_teacher_features,
            kernels=kernels,
            **inputs_and_parameters,
        )["loss"]

    def terms(self, *, kernels: str | None = None, **inputs: Any) -> dict[str, Tensor]:
        """``{"loss", "hard", "logit", "aux"}`` for the arguments of a call; unused terms are absent."""
        return Composition.forward(self, kernels=kernels, **self.flatten(**inputs))

    def flatten(self, **inputs: Any) -> dict[str, Any]:
        """The arguments of a call as the flat, named tensors of the exported files.

        Tensors that no term needs are dropped, so that the same call serves every configuration.
        """
        flat: dict[str, Any] = {}
        for given, (name, at) in self._sources.items():
            if given not in self.input_layouts:
                continue
            if at is not None:
                flat[given] = self._pick(name, inputs.get(name))[at]
            elif inputs.get(name) is not None:
                flat[given] = inputs[name]
            elif name in _EMBEDDINGS and inputs.get(_EMBEDDINGS[name]) is not None:
                first = self._pick(_EMBEDDINGS[name], inputs[_EMBEDDINGS[name]])[0]
                if first.dim() == 2 + (self.multiple_lrs is not None and name.startswith("student")):
                    flat[given] = first
        known = ("teacher_logits", "student_logits", "labels", "student_logits_teacher_features")
        for name, value in inputs.items():
            if name in _FEATURES or name in flat:
                continue
            if name in self.input_layouts or name in self.scalars or name not in known:
                flat[name] = value
        if self.multiple_lrs is not None:
            self._check_students(flat)
        return flat

    def recipe(self) -> dict[str, Any]:
        return {"distillation_loss": {name: value for name, value in self.arguments.items() if value is not None}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())

    def _pick(self, name: str, features: Sequence[Tensor] | None) -> list[Tensor]:
        """The entries of a list of features that are compared."""
        if not isinstance(features, list | tuple):
            got = "None" if features is None else type(features).__name__
            raise TypeError(f"expected {name} to be a list of tensors, got {got}; pass a list")
        for index in self.features_index:
            if not -len(features) <= index < len(features):
                raise ValueError(
                    f"expected {name} to have the entry {index} of features_index, got a list of {len(features)}; "
                    "pass more features or another features_index"
                )
        return [features[index] for index in self.features_index]

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


class _Inputs:
    """Which argument of a call each input of the graph comes from.

    Args:
        count: how many entries of the feature lists are compared.

    Attributes:
        sources: the graph's name → the argument, and the number of the entry where that is a list of features.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.sources: dict[str, tuple[str, int | None]] = {}
        self._axes: dict[str, set[str]] = {}

    def parts(self, loss: Loss, weight: float, weight_name: str | None) -> tuple[Part, ...]:
        """One part for a loss; for one that compares features, one per entry."""
        if not any(name in _FEATURES for name in loss.inputs):
            return (self._part(loss, None, weight, weight_name),)
        return tuple(self._part(loss, i, weight, weight_name) for i in range(self.count))

    def take(self, loss: Loss) -> None:
        """Notes the inputs of a loss that takes them under their own names."""
        self._part(loss, None, 1.0, None)

    def _part(self, loss: Loss, entry: int | None, weight: float, weight_name: str | None) -> Part:
        several = entry is not None and self.count > 1
        axes = {
            axis: f"{axis}_{entry}"
            for name in loss.inputs
            for spec in loss.layouts(name)
            for axis in spec.names
            if several and axis not in ("batch", "classes")
        }
        wanted: dict[str, tuple[str, set[str], tuple[str, int | None]]] = {}
        for name in loss.inputs:
            source, at = (name, entry) if name in _FEATURES else _of_list(name)
            forms = {spec.rename(axes).axes for spec in loss.layouts(name)}
            wanted[name] = (name if at is None else f"{source}_{at}", forms, (source, at))
        shared = all(self._axes.get(given, forms) & forms for given, forms, _ in wanted.values())
        if not shared:  # tensors under names of its own, with axes of its own
            own = {spec_axis for name in loss.inputs for spec in loss.layouts(name) for spec_axis in spec.names}
            axes = {axis: f"{axes.get(axis, axis)}_for_{loss.name}" for axis in own if axis not in ("batch", "classes")}
        inputs: dict[str, str] = {}
        for name, (given, _, origin) in wanted.items():
            forms = {spec.rename(axes).axes for spec in loss.layouts(name)}
            free = given if self._axes.get(given, forms) & forms else f"{given}_for_{loss.name}"
            inputs[name] = free
            self.sources[free] = origin
            self._axes[free] = self._axes.get(free, forms) & forms
        return Part(loss, weight, weight_name, {n: g for n, g in inputs.items() if n != g}, axes)


def _of_list(name: str) -> tuple[str, int | None]:
    """The list, and the entry, that a flat name of a loss on several layers means."""
    for features in _FEATURES:
        number = name.removeprefix(f"{features}_")
        if number != name and number.isdecimal():
            return features, int(number)
    return name, None


def _indices(features_index: Sequence[int]) -> list[int]:
    try:
        return [operator.index(index) for index in features_index]
    except TypeError as error:
        raise TypeError(
            f"expected features_index to be a list of whole numbers, got {features_index!r}; pass for example [-1]"
        ) from error


def _named(argument: str, given: str | Sequence[str] | None) -> list[tuple[str, type[Loss]]]:
    """The losses that an argument names, each with the word for it."""
    words = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if given is not None and (not words or len(words) > 3 or not all(isinstance(word, str) for word in words)):
        raise ValueError(
            f"expected {argument} to be None, a name, or a list of one to three names, got {given!r}; pass these"
        )
    found = []
    for word in words:
        try:
            cls = registry.get("soft_target" if word == _SOFT else word)
        except ValueError:
            cls = None
        if cls is None or (word == _SOFT and argument != "logit_loss"):
            others = f"None, {_SOFT!r} or " if argument == "logit_loss" else "None or "
            raise ValueError(
                f"expected {argument} to be {others}the name of a registered loss, got {word!r}; `pykd list` shows all of them"
            )
        found.append((word, cls))
    return found


def _logit(name: str, cls: type[Loss], tau: float, mode: str | None) -> Loss:
    if "student_logits" not in cls.inputs:
        raise ValueError(
            f"expected logit_loss to name a loss that takes student_logits, got {name!r}, which takes {', '.join(cls.inputs)}; "
            "pass it as aux_loss"
        )
    settings: dict[str, Any] = {"temperature": tau} if "temperature" in cls.scalars else {}
    if name == _SOFT:
        settings["soften_student"] = mode == "student_softening"
    elif mode is not None:
        raise ValueError(
            f"expected mode to be None for logit_loss={name!r}, which softens as its formula says, got {mode!r}; leave mode out"
        )
    return cls(**settings)


def _aux(name: str, cls: type[Loss], spatial_avg: str | None, count: int) -> Loss:
    layers = {spec.layers for given in cls.inputs for spec in cls.declared(given) if spec.layers is not None}
    settings: dict[str, Any] = dict.fromkeys(layers, count)
    if spatial_avg is not None:
        if "spatial_avg" not in inspect.signature(cls).parameters:
            raise ValueError(
                f"expected spatial_avg to be None for aux_loss={name!r}, which has no such setting, got {spatial_avg!r}; leave it out"
            )
        settings["spatial_avg"] = spatial_avg
    return cls(**settings)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"expected {name} to be one of {known}, got {value!r}; pass one of these")

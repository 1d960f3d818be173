"""What a loss does before and after its kernels, noted once and done again.

To walk through a loss takes longer than a kernel takes for a small call, and comes to the same each time: shapes, types and
numbers decide what happens, and :mod:`pykd.definition.plan` tells calls apart by these. A :class:`Program` is such a walk:
the operations of torch on the way to the kernels and to the weights of samples, and the forms.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from pykd.fused.linear import Linear, Reduced
from pykd.fused.point import Call

Outputs = dict[str, Tensor | Linear]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A tensor of the walk, by its number."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation: its function, its arguments with slots in the place of tensors, and where its results go."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    results: Sequence[int]


class Unknown(Exception):
    """A tensor came from somewhere that was not seen."""


class Recorder(TorchFunctionMode):
    """Notes the operations of a walk that makes tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.kept = list(tensors)  # so that no id comes twice
        self.steps: list[_Step] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(argument, Linear) for argument in (*args, *kwargs.values())):
            with self:  # what a form does with tensors counts
                return Linear.__torch_function__(function, types, args, kwargs)
        result = function(*args, **kwargs)
        made = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple | list) else []
        if any(isinstance(one, Tensor) for one in made):
            numbers = [self._keep(one) for one in made]
            arguments = [self.noted(argument) for argument in args]
            self.steps.append(_Step(function, arguments, {k: self.noted(v) for k, v in kwargs.items()}, numbers))
        return result

    def _keep(self, result: Any) -> int:
        if not isinstance(result, Tensor):
            raise Unknown
        if id(result) not in self.known:  # an operation may return what it got
            self.known[id(result)] = len(self.kept)
            self.kept.append(result)
        return self.known[id(result)]

    def noted(self, argument: Any) -> Any:
        """An argument with slots in the place of tensors."""
        if isinstance(argument, Tensor):
            if id(argument) not in self.known:
                raise Unknown
            return _Slot(self.known[id(argument)])
        if type(argument) in (list, tuple):
            return type(argument)(map(self.noted, argument))
        if type(argument) is dict:
            return {name: self.noted(each) for name, each in argument.items()}
        return argument


class Program:
    """A walk through a loss that was noted.

    Args:
        recorder: that saw the walk.
        calls: the kernel calls that it asked for.
        outputs: what came out of it.
    """

    def __init__(self, recorder: Recorder, calls: Sequence[Call], outputs: Outputs) -> None:
        self._noted = recorder.noted
        self._steps = recorder.steps
        self._room: list[Any] = [None] * len(recorder.kept)
        self._calls = [(call.kernel, recorder.noted(call.tensors), call.attributes, call.values) for call in calls]
        self._outputs = {name: self._of(output) for name, output in outputs.items()}
        del self._noted

    @property
    def has_steps(self) -> bool:
        """Whether torch has something to do on the way."""
        return bool(self._steps)

    def _of(self, output: Tensor | Linear) -> Any:
        """An output with slots in the place of tensors; a form without any as it is."""
        if isinstance(output, Tensor):
            return self._noted(output)
        pieces = [(piece, self._noted(piece.weight), self._noted(factor)) for piece, factor in output.pieces]
        rest = self._noted(output.rest)
        if rest is None and not any(isinstance(slot, _Slot) for _, *slots in pieces for slot in slots):
            return output
        return _Form([(piece.but(weight=None), weight, factor) for piece, weight, factor in pieces], rest)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[list[Call], Outputs]:
        """The same walk with other tensors of the same shapes."""
        slots = [*tensors, *self._room[len(tensors) :]]
        for step in self._steps:
            keywords = _filled(step.keywords, slots) if step.keywords else step.keywords
            result = step.function(*_filled(step.arguments, slots), **keywords)
            if len(step.results) == 1 and isinstance(result, Tensor):
                slots[step.results[0]] = result
            else:
                for number, one in zip(step.results, result, strict=True):
                    slots[number] = one
        calls = [
            Call(kernel, _filled(given, slots), attributes, values) for kernel, given, attributes, values in self._calls
        ]
        return calls, {name: _filled(output, slots) for name, output in self._outputs.items()}


@dataclasses.dataclass(frozen=True)
class _Form:
    """A form with slots in the place of tensors."""

    pieces: Sequence[tuple[Reduced, Any, Any]]
    rest: Any

    def filled(self, slots: Sequence[Tensor]) -> Linear:
        pieces = [
            (piece if weight is None else piece.but(weight=_filled(weight, slots)), _filled(factor, slots))
            for piece, weight, factor in self.pieces
        ]
        return Linear(pieces, _filled(self.rest, slots))


def _filled(noted: Any, slots: Sequence[Any]) -> Any:
    """What was noted, with tensors in the place of slots."""
    kind = type(noted)
    if kind is _Slot:
        return slots[noted.number]
    if kind is list:
        return [_filled(each, slots) for each in noted]
    if kind is dict:
        return {name: _filled(each, slots) for name, each in noted.items()}
    if kind is tuple:
        return tuple([_filled(each, slots) for each in noted])
    return noted.filled(slots) if kind is _Form else noted


def record(tensors: Sequence[Tensor], walk: Callable[[], tuple[Sequence[Call], Outputs]]) -> Program | None:
    """Walks once, and notes it; None where tensors came from somewhere that cannot be seen."""
    recorder = Recorder(tensors)
    try:
        with recorder:
            calls, outputs = walk()
        return Program(recorder, calls, outputs)
    except Unknown:
        return None

"""Losses through their fused kernels, with autograd: what ``fused=True`` does.

    loss = pykd.functional.soft_target(student_logits, teacher_logits, temperature=4.0, fused=True)
    loss.backward()

    values = composition(student_logits=…, teacher_logits=…, labels=…, fused=True)

One call computes the value and the gradient, so ``backward()`` has only to hand it on; for float16 students the kernels
run once more in ``backward()``, because a gradient must meet the factor of a scaled loss before it is rounded. Nothing is fused unless it is
asked for, and what was asked for and cannot be had (a dtype, a device, the library) is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pykd.definition import Loss, checks, ops
from pykd.fused import torch_operators
from pykd.fused.point import Call, Point, value_and_gradient


def evaluate(loss: Loss, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    """A loss through its kernel; differentiable once, with respect to the student's tensors.

    Args:
        loss: a loss that has a kernel.
        tensors: its inputs.
        numbers: those of its scalars that differ from the setting.

    Raises:
        ValueError: for a loss without a kernel, and what the kernel refuses.
        RuntimeError: inside a trace or a compiled function; where the library of torch operators is missing.
    """
    if not loss.has_kernel():
        raise ValueError(f"expected a loss that has a kernel for fused=True, got {loss.name}; leave fused out")
    specs = {name: checks.resolve(name, tensor, loss.layouts(name)) for name, tensor in tensors.items()}
    if not loss.covered_by_kernel(specs):
        raise ValueError(
            f"expected settings and inputs that the kernel of {loss.name} computes for fused=True, got {loss!r} with "
            f"{', '.join(specs)}; leave fused out"
        )
    _refuse_learned(numbers)
    students = [name for name in tensors if loss.layouts(name)[0].grad]
    function = _of_loss(loss, numbers)
    if loss.reduction == "none":
        return _per_sample(function, tensors, students)
    return _scalar(function, tensors, students)["loss"]


def evaluate_graph(graph: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Tensor]:
    """A graph built with ``fused=True``: every output by name. ``loss`` has autograd, the others are detached."""
    if graph.kernel_point is None:
        raise ValueError(
            "expected a composition with a loss that has a kernel for fused=True, got none; leave fused out"
        )
    _refuse_learned(numbers)
    students = [name for name, spec in graph.signature.inputs.items() if spec.grad]

    def function(point: Point, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(graph(**given, **numbers))

    return _scalar(function, tensors, students, graph.kernel_point)


Function = Callable[[Point, Mapping[str, Tensor]], dict[str, Tensor]]


def _of_loss(loss: Loss, numbers: Mapping[str, Any]) -> Function:
    return lambda point, given: {"loss": loss.by_kernel(point, {**given, **numbers})}


def _scalar(
    function: Function, tensors: Mapping[str, Tensor], students: list[str], point: Point | None = None
) -> dict[str, Tensor]:
    """Value and gradient in one run of the kernels, which write the gradient in the student's type.

    The gradient of a float16 student would underflow before a scaled loss's factor meets it: the kernels run again in
    backward(), where the factor is known and goes in with their weights. bfloat16 has the range of float32; there the
    factor costs a second rounding, one unit of the last place at most.
    """
    wanted = _wanted(tensors, students)
    own = point or Point()

    def compute(names: list[str], scale: Any, widened: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = _leaves(tensors, names, widened)
        return value_and_gradient(lambda: function(own, leaves), own, [leaves[name] for name in names], scale, run)

    def gradients_of(upstream: Tensor) -> list[Tensor]:
        if torch_operators.is_plain(upstream):
            return compute(wanted, upstream)[1]
        wide = compute(wanted, 1.0, widened=True)[1]
        return [(gradient * upstream).to(tensors[name].dtype) for name, gradient in zip(wanted, wide, strict=True)]

    if any(tensors[name].dtype == torch.float16 for name in wanted):
        values, _ = compute([], 1.0)
        values["loss"] = _later(values["loss"], gradients_of, tensors, wanted)
        return values
    values, gradients = compute(wanted, 1.0)
    if wanted:
        given = (*gradients, *(tensors[name] for name in wanted))
        values["loss"] = _Given.apply(values["loss"], len(wanted), *given)  # type: ignore[no-untyped-call]
    return values


def _per_sample(function: Function, tensors: Mapping[str, Tensor], students: list[str]) -> Tensor:
    """Values per sample: what flows back is known in backward() alone, so the kernel runs again there."""
    wanted = _wanted(tensors, students)

    def compute(names: list[str], upstream: Tensor | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = _leaves(tensors, names)
        point = Point()

        def weighted() -> dict[str, Tensor]:
            values = function(point, leaves)["loss"]
            return {"loss": values if upstream is None else (values * upstream).sum()}

        return value_and_gradient(weighted, point, [leaves[name] for name in names], 1.0, run)

    def gradients_of(upstream: Tensor) -> list[Tensor]:
        if not torch_operators.is_plain(upstream):
            raise RuntimeError(
                "expected one upstream gradient at a time for a fused loss with reduction='none', got a batch of them "
                "(is_grads_batched=True, vectorize=True, vmap); take them one by one, or leave fused out"
            )
        return compute(wanted, upstream)[1]

    value = compute([], None)[0]["loss"]
    return _later(value, gradients_of, tensors, wanted) if wanted else value


def _wanted(tensors: Mapping[str, Tensor], students: list[str]) -> list[str]:
    """The students whose gradient this call is to have, after a check that it is a call and no trace of one."""
    _refuse_traces(tensors)
    torch_operators.refuse_transforms(tensors, students, "leave fused out")
    return [name for name in students if tensors[name].requires_grad] if torch.is_grad_enabled() else []


def _leaves(tensors: Mapping[str, Tensor], wanted: list[str], widened: bool = False) -> dict[str, Tensor]:
    """The same memory under new leaves; ``widened``: in float32 where it is float16."""
    leaves = {name: ops.upcast(tensor.detach()) if widened else tensor.detach() for name, tensor in tensors.items()}
    return {name: leaf.requires_grad_() if name in wanted else leaf for name, leaf in leaves.items()}


def run(call: Call, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs one kernel call through the torch operator."""
    return torch_operators.fused_call(call.kernel.name, call.inputs(weights), call.attributes, call.outputs(weights))


def _refuse_learned(numbers: Mapping[str, Any]) -> None:
    """A temperature that is learned would stay as it is: kernels have gradients of tensors alone."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"expected numbers that need no gradient for fused=True, got {name}, which does; leave fused out, "
                f"or detach it"
            )


def _refuse_traces(tensors: Mapping[str, Tensor]) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    if (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or any(isinstance(tensor, FakeTensor) for tensor in tensors.values())
    ):
        raise RuntimeError(
            "expected fused=True outside of tracing and compiling, got a call inside; leave fused out there, "
            "or use torch.ops.pykd.loss"
        )


class _Given(torch.autograd.Function):
    """A value whose gradients have been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        ctx.count = count
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        torch_operators.refuse_second_derivatives()
        gradients = [torch_operators.scaled(gradient, upstream[0]) for gradient in ctx.saved_tensors]
        return (None, None, *[None] * ctx.count, *gradients)


def _later(
    value: Tensor,
    gradients_of: Callable[[Tensor], list[Tensor]],
    tensors: Mapping[str, Tensor],
    students: Sequence[str],
) -> Tensor:
    """The value with autograd for ``students``; their gradients are had from the upstream one in backward()."""
    constants = [tensor for name, tensor in tensors.items() if name not in students]
    given = (tensors[name] for name in students)
    return _Later.apply(value, gradients_of, constants, *given)  # type: ignore[no-any-return, no-untyped-call]


class _Later(torch.autograd.Function):
    """A value whose gradients are computed when the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        gradients_of: Callable[[Tensor], list[Tensor]],
        constants: Sequence[Tensor],
        *students: Tensor,
    ) -> Tensor:
        ctx.gradients_of = gradients_of
        ctx.save_for_backward(*students, *constants)  # a change in place is noticed
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        torch_operators.refuse_second_derivatives()
        _ = ctx.saved_tensors
        return (None, None, None, *ctx.gradients_of(upstream[0]))

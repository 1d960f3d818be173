"""Teacher, student and loss as three sessions of ONNX Runtime: where one file is not possible, and to check it with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from pykd.scoring import merge as merging
from pykd.scoring.merge import ROLES


class _Named(NamedTuple):
    """What ONNX Runtime says of an input, under another name."""

    name: str
    type: str
    shape: list[int | str | None]


class Sessions:
    """Scores as :func:`pykd.scoring.merge.merge`'s file does, with a session for each part. The models' operators may be of different versions.

    What a model returns goes to the loss without a copy (but for halves, which are widened where the loss takes float32).

        >>> scorer = Sessions("teacher.onnx", "student.onnx", "loss/")                 # doctest: +SKIP
        >>> scorer({"pixels": pixels})["loss_per_sample"]                              # doctest: +SKIP

    Args:
        teacher: an ONNX model.
        student: an ONNX model.
        loss: a folder that :func:`pykd.export` wrote with ``kind="score"`` or ``per_sample=True``, or its ONNX file.
        connect: see :func:`pykd.scoring.merge.merge`, as for ``share`` and ``separate``.
        share: inputs of other names that are one.
        separate: inputs of one name that are two.
        kernels: whether the loss runs pykd's kernels.
        options: makes the options of a session; None: those of ONNX Runtime.
        providers: ONNX Runtime's execution providers; kernels run on the CPU.
    """

    def __init__(
        self,
        teacher: str | Path,
        student: str | Path,
        loss: str | Path,
        *,
        connect: Mapping[str, str] | None = None,
        share: Mapping[str, str] | None = None,
        separate: Sequence[str] = (),
        kernels: bool = True,
        options: Any = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        import onnxruntime

        from pykd.config import onnxruntime_ops_path

        self._parts = merging.read(teacher, student, loss)
        self._connections = merging.connections(self._parts, dict(connect or {}))
        self._fed = merging.inputs_of_models(self._parts, dict(share or {}), set(separate))
        made = options or onnxruntime.SessionOptions

        def session(model: str | bytes, ours: bool = False) -> Any:
            chosen = made()
            if ours and kernels:
                chosen.register_custom_ops_library(onnxruntime_ops_path())
            return onnxruntime.InferenceSession(model, chosen, providers=list(providers))

        self._models = {role: session(str(self._parts.models[role].path)) for role in ROLES}
        judging = merging.judging(self._parts.loss, self._parts)
        self._loss = session(judging.SerializeToString(), ours=True)
        # By a session as well: NumPy has no bfloat16.
        self._widened = {
            name: onnxruntime.InferenceSession(
                _cast(self._parts.models[place[0]].outputs[place[1]], self._parts.loss_inputs[name]),
                made(),
                providers=list(providers),
            )
            for name, place in self._connections.items()
            if merging.is_widened(self._parts, name, place)
        }

    @property
    def inputs(self) -> list[str]:
        """What a call takes: the models' inputs, and those of the loss that no model gives; parameters may be added."""
        return list(
            dict.fromkeys([*self._fed.values(), *(n for n in self._parts.loss_inputs if n not in self._connections)])
        )

    @property
    def described(self) -> Mapping[str, Any]:
        """What the file of the loss says of itself."""
        described: Mapping[str, Any] = self._parts.described
        return described

    @property
    def outputs(self) -> list[str]:
        """What a call returns: one vector per score."""
        return [value.name for value in self._parts.scores]

    def arguments(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Inputs (by the names that a call takes), parameters with a default, and outputs, as ONNX Runtime describes them."""
        found: dict[str, Any] = {}
        for (role, name), fed in self._fed.items():
            (value,) = [value for value in self._models[role].get_inputs() if value.name == name]
            found.setdefault(fed, _Named(fed, value.type, value.shape))
        for value in self._loss.get_inputs():
            if value.name not in self._connections:
                found[value.name] = value
        outputs = [value for value in self._loss.get_outputs() if value.name in self.outputs]
        return list(found.values()), list(self._loss.get_overridable_initializers()), outputs

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The scores of a batch, by name."""
        known = {*self.inputs, *self._parts.parameters}
        if wrong := {*(set(self.inputs) - inputs.keys()), *(inputs.keys() - known)}:
            raise ValueError(
                f"expected the inputs {', '.join(self.inputs)}, got {', '.join(inputs) or 'none'}; look at {', '.join(sorted(wrong))}"
            )
        returned: dict[tuple[str, str], Any] = {}
        for role, model in self._models.items():
            wanted = [output for r, output in self._connections.values() if r == role]
            binding = model.io_binding()
            for (owner, name), fed in self._fed.items():
                if owner == role:
                    binding.bind_ortvalue_input(name, _value(inputs[fed]))
            for name in wanted:
                binding.bind_output(name)
            model.run_with_iobinding(binding)
            returned |= {(role, name): value for name, value in zip(wanted, binding.get_outputs(), strict=True)}
        binding = self._loss.io_binding()
        for name, place in self._connections.items():
            value = returned[place]
            if name in self._widened:
                (value,) = self._widened[name].run_with_ort_values(["to"], {"from": value})
            binding.bind_ortvalue_input(name, value)
        for name in inputs.keys() - set(self._fed.values()):
            binding.bind_ortvalue_input(name, _value(inputs[name]))
        for name in self.outputs:
            binding.bind_output(name)
        self._loss.run_with_iobinding(binding)
        return {name: value.numpy() for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}


def _value(array: Any) -> Any:
    """ONNX Runtime's value of an array; of one number, too, which np.ascontiguousarray would give an axis."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))


def _cast(value: Any, wanted: Any) -> bytes:
    """A model that gives a value another type."""
    types = value.type.tensor_type.elem_type, wanted.type.tensor_type.elem_type
    ends = [
        onnx.helper.make_tensor_value_info(name, type, None) for name, type in zip(("from", "to"), types, strict=True)
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["from"], ["to"], to=types[1])], "cast", ends[:1], ends[1:]
    )
    opset = [onnx.helper.make_opsetid("", merging.LEAST_OPSET)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())

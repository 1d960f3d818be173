"""Axes of one name have one length, and none is empty: ONNX files that say so themselves.

ONNX broadcasts: a teacher of one sample would silently serve three, and an empty batch has a loss of 0. The names of
axes in a file are remarks to a runtime, which may even take them for granted. So every input goes through a ``Reshape``
that no runtime can carry out where a length is another one: the target 0, 5, 0 keeps the first and the last axis, and fits
a tensor of the right size alone where its second axis has length 5. A Reshape moves no memory, and no optimiser can
tell that it does nothing, since its target is computed from another input. An axis of the first input that has it is
asked to have length 1 where it is empty, and its least length where it is shorter.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper


def check_in_graph(
    model: onnx.ModelProto,
    axes: Mapping[str, Sequence[str]],
    compared: Collection[Collection[str]] = (),
    least: Mapping[str, int] | None = None,
) -> None:
    """Puts the checks at the start of a graph.

    Args:
        model: its inputs have these names; changed in place.
        axes: the names of the axes of its tensors.
        compared: sets of inputs whose axes an operator compares anyway; it refuses empty ones, too.
        least: the least length of axes that need more than one entry.
    """
    least = least or {}
    checks = _Checks(axes, least)
    first: dict[str, tuple[str, int]] = {}  # of each axis: the input that has it first, and where
    for name, names in axes.items():
        known = [first.setdefault(axis, (name, at)) for at, axis in enumerate(names)]
        own = [axis for axis, place in zip(names, known, strict=True) if place[0] == name]
        if own and (any(axis in least for axis in own) or not any(name in group for group in compared)):
            checks.reshape(name, checks.lengths(name))
        wrong = [
            (at, place)
            for at, place in enumerate(known)
            if place != (name, at) and not any({name, place[0]} <= set(group) for group in compared)
        ]
        whole = (
            bool(wrong)
            and len(wrong) == len(names)
            and all(place == (wrong[0][1][0], at) and len(axes[place[0]]) == len(names) for at, place in wrong)
        )
        for at, (owner, owners_at) in wrong[:-1] if whole else wrong:
            checks.reshape(name, checks.only(name, at, owner, owners_at))
        if whole:  # all others are right: the last is, where the number of elements is
            checks.reshape(name, checks.lengths(wrong[0][1][0]))
    nodes = [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = checks.checked.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend([*checks.nodes, *nodes])
    model.graph.initializer.extend(checks.constants.values())


class _Checks:
    """The nodes and constants of the checks, and how each input is called after its own."""

    def __init__(self, axes: Mapping[str, Sequence[str]], least: Mapping[str, int]) -> None:
        self.axes = axes
        self.least = least
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.checked: dict[str, str] = {}
        self.made: set[str] = set()

    def reshape(self, name: str, target: str) -> None:
        before = self.checked.get(name, name)
        self.checked[name] = f"{name}_checked_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Reshape", [before, target], [self.checked[name]]))

    def lengths(self, name: str) -> str:
        """The lengths of an input, at least 1 each, or what is least."""
        shape = self._node("Shape", f"{name}_shape", name)
        least = [self.least.get(axis, 1) for axis in self.axes[name]]
        one = self._constant("one", [1]) if set(least) <= {1} else self._constant(f"{name}_least", least)
        return self._node("Max", f"{name}_lengths", shape, one)

    def only(self, name: str, at: int, owner: str, owners_at: int) -> str:
        """A target that keeps every axis of ``name`` but one, which has the length of one of ``owner``."""
        lengths = self.lengths(owner)
        rank = len(self.axes[name])
        mask = self._constant(f"axis_{at}_of_{rank}", [int(i == at) for i in range(rank)])
        if len(self.axes[owner]) == rank and at == owners_at:
            return self._node("Mul", f"{owner}_length_{at}", lengths, mask)
        if len(self.axes[owner]) > 1:
            place = self._constant(f"at_{owners_at}", [owners_at])
            lengths = self._node("Gather", f"{owner}_along_{owners_at}", lengths, place)
        return (
            lengths if rank == 1 else self._node("Mul", f"{owner}_along_{owners_at}_as_{at}_of_{rank}", lengths, mask)
        )

    def _node(self, op: str, output: str, *inputs: str) -> str:
        if output not in self.made:
            self.nodes.append(helper.make_node(op, list(inputs), [output]))
            self.made.add(output)
        return output

    def _constant(self, name: str, values: list[int]) -> str:
        name = f"{name}_check"
        self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

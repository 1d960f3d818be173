"""The fused kernels in Python, from what a loss knows of them to raw memory.

- :mod:`~pykd.fused.description`: what a kernel takes and returns; the losses that have one import this, and no more.
- :mod:`~pykd.fused.point`: where a loss hands part of its work to a kernel, and the plan of a call.
- :mod:`~pykd.fused.linear`: what a loss makes of values that a kernel is still to compute.
- :mod:`~pykd.fused.eager`: losses in eager mode by their kernels, with autograd.
- :mod:`~pykd.fused.blocks`: losses that compare all samples, by blocks of rows, in operators of torch.
- :mod:`~pykd.fused.torch_operators`: the kernels on torch tensors (public as :mod:`pykd.torch_kernels`).
"""

from pykd.definition import routing
from pykd.fused import blocks
from pykd.fused.eager import Evaluator

routing.evaluator = Evaluator()
routing.least_entries = blocks.LEAST_ENTRIES

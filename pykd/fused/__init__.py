"""The fused kernels in Python, from what a loss knows of them to raw memory; nothing here is imported unasked.

- :mod:`~pykd.fused.description`: what a kernel takes and returns; the losses that have one import this, and no more.
- :mod:`~pykd.fused.point`: where a loss hands part of its work to a kernel, and the plan of a call.
- :mod:`~pykd.fused.autograd`: ``fused=True`` of :mod:`pykd.functional` and of compositions.
- :mod:`~pykd.fused.torch_operators`: the kernels on torch tensors (public as :mod:`pykd.torch_kernels`).
- :mod:`~pykd.fused.library`: the kernels on raw memory, without torch (public as :mod:`pykd.kernels`).
"""

"""The fused kernels on torch tensors; :mod:`pykd.fused.torch_operators` under its public name."""

from pykd.fused.torch_operators import fused_call, fused_loss, load

__all__ = ["fused_call", "fused_loss", "load"]

"""The fused kernels on raw tensors, through libpykd alone; :mod:`pykd.fused.library` under its public name."""

from pykd.fused.library import descriptions, run, simd_targets, use_simd

__all__ = ["descriptions", "run", "simd_targets", "use_simd"]

"""How far from float64 tests allow a number to be. Of exported files: ``pykd.export.verification.LIMITS``.

(value, gradient) by the type of the inputs: relative to max(1, |value|), and to the largest entry of the gradient. A case of a
loss may multiply what its formula is allowed (``Case(tolerance=…, why=…)``).
"""

from tests.conftest import Subject

# Of a formula in its own type. Halves are computed in float32, so only their gradient is rounded to the type: by half a
# unit of its last place, and once more where it has been summed.
FORMULA = {"float64": (1e-12, 1e-10), "float32": (3e-6, 1e-5), "float16": (3e-6, 2**-10), "bfloat16": (3e-6, 2**-7)}

# Of a kernel, beyond the error of the formula in the same type: some roundings of float32, since it sums in another order; of
# the gradient's own type for halves, where the formula rounds once and the kernel does, too, but elsewhere.
KERNEL = {"float32": (2e-6, 4e-6), "float16": (2e-6, 2**-11), "bfloat16": (2e-6, 2**-8)}

# What is below the smallest step of float16 gradients is lost in any case.
LEAST = {"float16": 2.0**-25}


def of_formula(subject: Subject, dtype: str) -> tuple[float, float]:
    """(value, gradient) for a subject, in a type."""
    value, gradient = FORMULA[dtype]
    factor = subject.composition.tolerance(dtype)
    return value * factor, gradient * factor

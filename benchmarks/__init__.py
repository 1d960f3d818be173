"""Side-by-side comparisons: ``python -m benchmarks``, or ``make bench``."""

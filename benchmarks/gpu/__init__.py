"""The check for a machine with a GPU that is at hand for minutes: ``scripts/gpu-check``, described in docs/gpu.md.

Everything is prepared beforehand (:mod:`benchmarks.gpu.pack`) and rehearsed on a CPU (:mod:`benchmarks.gpu.rehearse`). On the machine
:mod:`benchmarks.gpu.runner` works through :mod:`benchmarks.gpu.plan`: stages that do not need each other, each a process of
its own with a limit of time, the most valuable first. A stage is a module in :mod:`benchmarks.gpu.stages`; what it finds it
writes down at once (:mod:`benchmarks.gpu.stage`), so that nothing is lost when it fails, hangs or crashes.

Only stages import torch and pykd; the rest is the standard library, for a machine where these cannot be imported.
"""

"""What is done on the machine, in this order, with the most time that each may take."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the check.

    Attributes:
        name: of the module in ``benchmarks.gpu.stages``.
        limit: seconds.
        arguments: what the module is told.
        fallback: the name of a stage that is run where this one is not well, and then this one again.
    """

    name: str
    limit: float
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fallback: "Stage | None" = None

    @property
    def title(self) -> str:
        return " ".join([self.name, *self.arguments.values()])

    def with_patience(self, factor: float) -> "Stage":
        """The same with `factor` times the limit."""
        fallback = None if self.fallback is None else self.fallback.with_patience(factor)
        return dataclasses.replace(self, limit=factor * self.limit, fallback=fallback)


PLAN = (
    Stage("facts", 60),
    Stage("load", 90, fallback=Stage("build", 240)),
    Stage("smoke", 40),
    Stage("parity", 100),
    Stage("parity_features", 40),
    Stage("parity_mmd", 40),
    Stage("parity_distributions", 40),
    Stage("capture", 40),
    Stage("speed", 80),
    Stage("torch_paths", 80),
    Stage("profile", 60),
    Stage("sanitize", 50, {"tool": "memcheck"}),
    Stage("sanitize", 50, {"tool": "racecheck"}),
    Stage("sanitize", 50, {"tool": "synccheck"}),
    Stage("competitors", 90),
    Stage("speed_features", 60),
)

# The second run: ONNX Runtime with its CUDA provider, which has to be carried along.
ONNXRUNTIME_PLAN = (
    Stage("facts", 60),
    Stage("load", 90),
    Stage("onnxruntime_cuda", 240),
)

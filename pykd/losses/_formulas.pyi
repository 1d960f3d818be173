"""Written by scripts/stubs: every loss as a function."""

from torch import Tensor

def distribution_distillation(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    labels: Tensor,
    positive_weight: float = 0.1,
    negative_weight: float = 0.02,
    order_weight: float = 0.5,
    bins: int = 1000,
    width: float = 0.1,
    negatives: str = "hardest",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def feature_l1(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    spatial_avg: str | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def feature_l2(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    spatial_avg: str | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def hard_target(
    student_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def mk_mmd(
    student_features: Tensor,
    teacher_features: Tensor,
    spatial_avg: str | None = None,
    bandwidth: str = "joint",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 2.0,
    soften_student: bool = True,
    form: str = "cross_entropy",
    beta: float = 0.5,
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...

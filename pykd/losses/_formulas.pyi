"""Written by scripts/stubs: every loss as a function."""

from torch import Tensor

def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    tau_squared: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
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
def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    of: str = "logits",
    over_classes: str = "mean",
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def logit_standardization(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 2.0,
    unbiased: bool = False,
    tau_squared: bool = True,
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
def multi_level_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    class_level_weight: float = 1.0,
    batch_level_weight: float = 1.0,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def normalized_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    tau_squared: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
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
def stronger_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    inter_class_weight: float = 1.0,
    intra_class_weight: float = 1.0,
    epsilon: float = 0.0,
    tau_squared: bool = True,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def transformed_teacher_matching(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    exponent: float = 0.5,
    weighted: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def weighted_soft_labels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 2.0,
    tau_squared: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...

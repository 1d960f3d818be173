"""Written by scripts/stubs: every loss as a function."""

from torch import Tensor

def activation_boundaries(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    margin: float = 1.0,
    entry_reduction: str = "sum",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    head_mass: float = 0.5,
    boundary: str = "head",
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def affinity(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    per: str = "image",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def alpha_beta_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.2,
    beta: float = 0.7,
    limits: str = "exact",
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def attention_cross_entropy(
    student_attention: Tensor,
    teacher_attention: Tensor,
    sample_weight: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    heads: str = "each",
    form: str = "cross_entropy",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def attention_map_mse(
    student_attention: Tensor,
    teacher_attention: Tensor,
    sample_weight: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    heads: str = "each",
    threshold: float = -100.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def attention_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    form: str = "paper",
    power: float = 2.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def attentive_features(
    student_features: Tensor,
    teacher_features: Tensor,
    channel_scores: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def balanced_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    emphasis: float = 3.0,
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def category_similarity(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 4.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def channel_distillation(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    sample_weight: Tensor | None = None,
    layers: int = 1,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def channel_wise(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 4.0,
    tau_squared: bool = True,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def contrastive_representation(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    negatives: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 0.07,
    log_normalizer: float = 0.0,
    form: str = "noise_contrastive",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def correlation_congruence(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    form: str = "mean_square",
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalized: bool = True,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def cosine_features(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def cross_image_relations(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float = 0.1,
    *,
    kernels: str | None = None,
) -> Tensor: ...
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
    convention: str = "paper",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def factor_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    distance: str = "l1",
    norm: str = "l2",
    entry_reduction: str = "sum",
    reduction: str = "mean",
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
def flow_of_solution(
    student_features: Tensor,
    teacher_features: Tensor,
    student_later_features: Tensor | None = None,
    teacher_later_features: Tensor | None = None,
    sample_weight: Tensor | None = None,
    entry_reduction: str = "sum",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def focal_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    foreground: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 0.5,
    foreground_weight: float = 0.001,
    background_weight: float = 0.0005,
    attention_weight: float = 0.001,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def hard_dark_rank(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    alpha: float = 3.0,
    beta: float = 3.0,
    length: int = 3,
    normalized: bool = True,
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
def hierarchical_context(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def hint(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    distance: str = "mse",
    beta: float = 1.0,
    entry_reduction: str = "mean",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def in_batch_contrastive(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 0.07,
    direction: str = "student",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def instance_relationship_graph(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def inter_channel_correlation(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def intra_class_variation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    classes: int = 19,
    ignore_index: int = 255,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def listwise_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    tau_squared: bool = True,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def localization_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 10.0,
    tau_squared: bool = True,
    over_bins: str = "sum",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def logistic_ranking(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None = None,
    average: str = "pairs",
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
def margin_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    sample_weight: Tensor | None = None,
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
def mutual_information(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    form: str = "difference",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def neighbour_differences(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def neuron_selectivity(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    kernel: str = "polynomial",
    reduction: str = "mean",
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
def overhaul(
    student_features: Tensor,
    teacher_features: Tensor,
    margin: Tensor,
    sample_weight: Tensor | None = None,
    entry_reduction: str = "sum",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def pair_wise(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def pairwise_hinge(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None = None,
    margins: str = "teacher",
    margin: float = 0.1,
    average: str = "pairs",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def patient_kd(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    sample_weight: Tensor | None = None,
    layers: int = 1,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def pearson_features(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def pixel_similarity(
    student_features: Tensor,
    student_later_features: Tensor,
    teacher_features: Tensor,
    teacher_later_features: Tensor,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def pixel_wise(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    form: str = "kl",
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def prime_aware(
    student_features: Tensor,
    teacher_features: Tensor,
    student_log_variance: Tensor,
    sample_weight: Tensor | None = None,
    epsilon: float = 1e-06,
    entry_reduction: str = "mean",
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def probabilistic_transfer(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    own: bool = False,
    average: str = "samples",
    epsilon: float = 1e-07,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def relational_angle(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def relational_distance(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def sampled_reverse_kl(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    sampled_ids: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def self_attention_relations(
    student_queries: Tensor,
    student_keys: Tensor,
    student_values: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_values: Tensor,
    sample_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    query_weight: float = 1.0,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def similarity_preserving(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None = None,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def simple_recipe(
    student_features: Tensor,
    teacher_features: Tensor,
    power: float = 4.0,
    epsilon: float = 1e-12,
    *,
    kernels: str | None = None,
) -> Tensor: ...
def skewed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.1,
    direction: str = "forward",
    tau_squared: bool = False,
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
def top_k_kl(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    convention: str = "tail",
    tau_squared: bool = False,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    tau_squared: bool = False,
    reduction: str = "mean",
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
def universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: str = "mean",
    *,
    kernels: str | None = None,
) -> Tensor: ...
def variational_information(
    student_features: Tensor,
    teacher_features: Tensor,
    student_log_variance: Tensor,
    sample_weight: Tensor | None = None,
    entry_reduction: str = "sum",
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

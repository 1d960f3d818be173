"""Written by scripts/stubs: every loss by its class."""

from pykd.losses.attention.attention_cross_entropy import AttentionCrossEntropy as AttentionCrossEntropy
from pykd.losses.attention.attention_map_mse import AttentionMapMSE as AttentionMapMSE
from pykd.losses.attention.self_attention_relations import SelfAttentionRelations as SelfAttentionRelations
from pykd.losses.dense.channel_wise import ChannelWise as ChannelWise
from pykd.losses.features.feature_l1 import FeatureL1 as FeatureL1
from pykd.losses.features.feature_l2 import FeatureL2 as FeatureL2
from pykd.losses.features.mk_mmd import MKMMD as MKMMD
from pykd.losses.logits.decoupled_kd import DecoupledKD as DecoupledKD
from pykd.losses.logits.hard_target import HardTarget as HardTarget
from pykd.losses.logits.logit_mse import LogitMSE as LogitMSE
from pykd.losses.logits.logit_standardization import LogitStandardization as LogitStandardization
from pykd.losses.logits.multi_level_correlation import MultiLevelCorrelation as MultiLevelCorrelation
from pykd.losses.logits.normalized_kd import NormalizedKD as NormalizedKD
from pykd.losses.logits.soft_target import SoftTarget as SoftTarget
from pykd.losses.logits.stronger_teacher import StrongerTeacher as StrongerTeacher
from pykd.losses.logits.transformed_teacher_matching import TransformedTeacherMatching as TransformedTeacherMatching
from pykd.losses.logits.weighted_soft_labels import WeightedSoftLabels as WeightedSoftLabels
from pykd.losses.relations.distribution_distillation import DistributionDistillation as DistributionDistillation

"""Written by scripts/stubs: every loss by its class."""

from pykd.losses.features.feature_l1 import FeatureL1 as FeatureL1
from pykd.losses.features.feature_l2 import FeatureL2 as FeatureL2
from pykd.losses.features.mk_mmd import MKMMD as MKMMD
from pykd.losses.logits.hard_target import HardTarget as HardTarget
from pykd.losses.logits.soft_target import SoftTarget as SoftTarget
from pykd.losses.relations.distribution_distillation import DistributionDistillation as DistributionDistillation

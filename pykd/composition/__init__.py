"""Losses joined into one: terms, what they take together, the graph they become, and recipes.

The order is that of the imports: terms → interface → graph → composition → distillation_loss → recipe.
"""

from pykd.composition.composition import Composition as Composition
from pykd.composition.composition import as_composition as as_composition
from pykd.composition.composition import compose as compose
from pykd.composition.distillation_loss import DistillationLoss as DistillationLoss
from pykd.composition.graph import GraphSignature as GraphSignature
from pykd.composition.graph import LossGraph as LossGraph
from pykd.composition.terms import MAX_PARTS as MAX_PARTS
from pykd.composition.terms import STUDENTS as STUDENTS
from pykd.composition.terms import Parameter as Parameter
from pykd.composition.terms import Part as Part
from pykd.composition.terms import Term as Term

"""What a loss is: its declaration, its checks, the registry, and the pieces that formulas and references share.

A loss is one file in ``pykd/losses/<family>/``, which takes everything it needs from here (and a kernel from
:mod:`pykd.fused.description`); ``pykd/losses/_template.py`` is the file to copy. This room imports nothing else of pykd.
"""

from pykd.definition.loss import REDUCTIONS as REDUCTIONS
from pykd.definition.loss import Loss as Loss
from pykd.definition.registry import get as get
from pykd.definition.registry import register as register
from pykd.definition.routing import set_kernels as set_kernels
from pykd.definition.routing import using_kernels as using_kernels
from pykd.definition.settings import choice as choice
from pykd.definition.settings import flag as flag
from pykd.definition.settings import number as number
from pykd.definition.settings import scalar as scalar
from pykd.definition.settings import whole as whole
from pykd.definition.spec import SAMPLE_WEIGHT as SAMPLE_WEIGHT
from pykd.definition.spec import Alias as Alias
from pykd.definition.spec import Case as Case
from pykd.definition.spec import Layouts as Layouts
from pykd.definition.spec import Properties as Properties
from pykd.definition.spec import Scalar as Scalar
from pykd.definition.spec import Spec as Spec

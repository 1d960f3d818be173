"""Losses of other libraries to compare with, without the packages that those libraries want for everything else.

``tests/oracles.txt`` pins the libraries; ``scripts/python-environment`` puts them, without their dependencies, into a folder of
their own, where nothing else sees them; ``importable`` lets their files with losses be imported on their own.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass
class Library:
    """What of a distribution is imported: modules as they are; a package above one without its ``__init__``; the rest of it,
    and what others it mentions, as stand-ins."""

    modules: tuple[str, ...]
    mentions: tuple[str, ...] = ()
    # What a stand-in must be for a loss to be computed.
    names: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return self.modules[0].split(".")[0]


LIBRARIES = {
    "axolotl": Library(("axolotl.integrations.kd.topk_logprob.forward_kl",)),
    "liger-kernel": Library(("liger_kernel",)),
    "mmrazor": Library(
        ("mmrazor.models.losses",),
        ("mmcls", "mmengine"),
        {"mmrazor.registry": {"MODELS": SimpleNamespace(register_module=lambda: lambda loss: loss)}},
    ),
    "nvidia-modelopt": Library(
        ("modelopt.torch.distill.losses", "modelopt.torch.distill.plugins.megatron"), ("megatron", "yaml")
    ),
    "pytorch-metric-learning": Library(("pytorch_metric_learning",), ("scipy", "sklearn", "tqdm")),
    "sentence-transformers": Library(
        (
            "sentence_transformers.sentence_transformer.losses.margin_mse",
            "sentence_transformers.sentence_transformer.losses.distill_kl_div",
        )
    ),
    "textbrewer": Library(("textbrewer.losses", "textbrewer.compatibility", "textbrewer.schedulers")),
    "timm": Library(
        (
            "timm.loss",
            "timm.task.distillation",
            "timm.task.token_distillation",
            "timm.task.classification",
            "timm.task.task",
        ),
        names={name: {"unwrap_model": lambda model: model} for name in ("timm.utils", "timm.utils.model")},
    ),
    "torchdistill": Library(("torchdistill",)),
    "torchmetrics": Library(
        (
            "torchmetrics.functional.regression.js_divergence",
            "torchmetrics.functional.regression.kl_divergence",
            "torchmetrics.utilities.checks",
            "torchmetrics.utilities.compute",
            "torchmetrics.utilities.data",
        ),
        ("lightning_utilities",),
    ),
    "torchtune": Library(("torchtune.modules.loss.kd_losses",)),
    "trl": Library(
        (
            "trl.experimental.gkd.gkd_trainer",
            "trl.experimental.gold.gold_trainer",
            "trl.experimental.sdft.loss_utils",
            "trl.trainer.utils",
        ),
        ("accelerate", "datasets", "huggingface_hub", "pandas", "transformers"),
    ),
}
PINS = dict(
    line.split("==")
    for line in Path(__file__).with_name("oracles.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


FOLDER = str(Path(sys.prefix) / "oracles")


def missing(distribution: str) -> str:
    """Why the library cannot be compared with; nothing if it can."""
    wanted = PINS[distribution]
    found = [there.version for there in importlib.metadata.distributions(name=distribution, path=[FOLDER])]
    return "" if wanted in found else f"{FOLDER} has no {distribution} {wanted}: scripts/python-environment installs it"


class _Nothing:
    """What a stand-in's names make: ``is_…_available()`` is false."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __bool__(self) -> bool:
        return False


class _StandIn(ModuleType):
    """A module, or a package without its ``__init__``, every other name of which is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, library: Library):
        self.library = library

    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root != self.library.root and root not in self.library.mentions:
            return None
        if any(name == module or name.startswith(module + ".") for module in self.library.modules):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        if any(module.startswith(name + ".") for module in self.library.modules):
            found = importlib.machinery.PathFinder.find_spec(name, path)
            spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        vars(module).update(self.library.names.get(module.__name__, {}))


@contextlib.contextmanager
def importable(distribution: str) -> Iterator[None]:
    """Within this context the library's files with losses can be imported; afterwards no stand-in is left."""
    library = LIBRARIES[distribution]

    def concerned():
        return [name for name in sys.modules if name.split(".")[0] in (library.root, *library.mentions)]

    before = {name: sys.modules.pop(name) for name in concerned()}
    finder = _Finder(library)
    sys.meta_path.insert(0, finder)
    sys.path.append(FOLDER)
    try:
        yield
    finally:
        sys.path.remove(FOLDER)
        sys.meta_path.remove(finder)
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)

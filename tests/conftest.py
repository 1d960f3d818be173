"""Every registered loss with every case that it declares reaches the tests through here."""

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pykd
from pykd.composition import Composition, LossGraph, as_composition
from pykd.definition import Loss, Spec, registry
from pykd.definition.sizes import long_sizes, trial_sizes

torch.set_num_threads(1)  # small tensors, and one process per core beside this one


@dataclass(frozen=True)
class Subject:
    """One loss (or composition) under one case."""

    name: str
    composition: Composition
    layouts: dict[str, str]
    optional: tuple[str, ...]

    def graph(self, per_sample: bool = False, check: bool = False) -> LossGraph:
        return self.composition.graph(self.layouts, self.optional, per_sample, check)

    def draw(
        self, sizes: dict[str, int] | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, Any]:
        return self.composition.draw(self.graph().signature.inputs, sizes, seed, dtype)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The inputs, each in its one layout."""
        return self.graph().signature.inputs

    def trial_sizes(self) -> dict[str, dict[str, int]]:
        """Lengths at which to try it, by what they are."""
        return self.composition.trial_sizes(self.specs)

    def long_sizes(self) -> list[dict[str, int]]:
        """Lengths for kernels."""
        return long_sizes(axis for spec in self.specs.values() for axis in spec.names)

    def inputs_of(self, *kinds: str) -> list[str]:
        """The inputs that hold one of these: ``"logits"``, ``"features"``, …"""
        return [name for name, spec in self.specs.items() if spec.draw in kinds]

    def holds(self, name: str) -> bool | str | None:
        """Whether a property holds of all losses that have it, or the reason of one that has it not."""
        found = [getattr(part.loss.properties(), name) for term in self.composition.named_terms for part in term.parts]
        reasons = [answer for answer in found if isinstance(answer, str)]
        return reasons[0] if reasons else next((answer for answer in found if answer is not None), None)

    @property
    def loss(self) -> Loss:
        """The one loss of a subject that is no composition."""
        return self.composition.named_terms[0].parts[0].loss

    @functools.cached_property
    def has_kernel(self) -> bool:
        """Whether a kernel computes some of it, under these settings and inputs."""
        return self.composition.graph(self.layouts, self.optional, check=False, fused=True).kernel_point is not None

    def take(self, tensors: dict[str, Any], rows: Any) -> dict[str, Any]:
        """The tensors at these entries of the batch."""
        specs = self.graph().signature.inputs
        return {name: t[rows] if specs[name].names[0] == "batch" else t for name, t in tensors.items()}

    def __str__(self) -> str:
        return self.name


@functools.cache
def loss_subjects() -> tuple[Subject, ...]:
    """Every case of every registered loss; made once, since every file of tests asks."""
    return tuple(_loss_subjects())


def _loss_subjects() -> Iterator[Subject]:
    registry.load_all()
    for cls, case in registry.every_case():
        loss = cls(**case.settings)
        name = f"{cls.name}[{case}]"
        yield Subject(name, as_composition(loss), dict(case.layouts), tuple(case.optional))


@functools.cache
def composed_subjects() -> tuple[Subject, ...]:
    """Compositions: the two recipes the project starts from, and the corners of the composition itself."""
    return tuple(_composed_subjects())


def _composed_subjects() -> Iterator[Subject]:
    seed = dict(logit_loss="soft_entropy", lambda1=1.0, lambda2=0, tau=2, mode="student_softening", features_index=[-1])
    yield Subject("recipe-l1", pykd.DistillationLoss(aux_loss="l1", **seed), {}, ())
    yield Subject("recipe-mk-mmd", pykd.DistillationLoss(aux_loss="MK-MMD", **seed), {"labels": "batch"}, ())
    both = pykd.DistillationLoss(
        logit_loss="soft_entropy",
        aux_loss="l2",
        lambda1=0.5,
        tau=3,
        features_index=[-1, 0],
        alpha=2.0,
        beta=0.5,
        gamma=1.5,
    )
    yield Subject("two-parts-two-features", both, {"labels": "batch"}, ())
    students = pykd.DistillationLoss(logit_loss="soft_entropy", aux_loss="l1", multiple_lrs=3, spatial_avg="mean")
    yield Subject("students", students, {"labels": "batch"}, ())
    yield Subject("students-labels", students, {"labels": "batch students classes"}, ("sample_weight",))
    hard = pykd.HardTarget(ignore_index=1)
    composed = pykd.compose({"hard": (hard, 1.0), "soft": (pykd.SoftTarget(temperature=2.0), 0.5)})
    yield Subject("composed", composed, {"labels": "batch"}, ("sample_weight",))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random tensors in every run; PYKD_TEST_SEED takes others, to try a bound with many."""
    torch.manual_seed(int(os.environ.get("PYKD_TEST_SEED", "0")))


TRIALS = tuple(trial_sizes([]))  # the names of what trial_sizes() gives


def subjects() -> list[Subject]:
    """Everything there is to test."""
    return [*loss_subjects(), *composed_subjects()]


def forms_of_inputs() -> list[Subject]:
    """One case for every loss and form of its inputs, and every composition: for what settings do not change."""
    found: dict[tuple[Any, ...], Subject] = {}
    for subject in loss_subjects():
        found.setdefault((subject.loss.name, *sorted(subject.layouts.items()), *subject.optional), subject)
    return [*found.values(), *composed_subjects()]


def one_per_loss() -> list[Subject]:
    """The last case of every loss, which has most in it: for what neither settings nor forms change."""
    return list({subject.loss.name: subject for subject in loss_subjects()}.values())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loss", metavar="NAME", action="append", default=[],
        help="run the tests that are made for the loss of exactly this name; given again, for another as well",
    )  # fmt: skip
    parser.addoption(
        "--fast", action="store_true",
        help="run no slow tests, and of those that differ in nothing but the case of a loss the last one",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if wanted := config.getoption("--loss"):
        registry.load_all()
        for name in wanted:
            if not registry.is_registered(name):
                known = ", ".join(registry.registered())
                raise pytest.UsageError(f"expected --loss to name a registered loss ({known}), got {name!r}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if wanted := config.getoption("--loss"):
        kept = [item for item in kept if not losses_of(item).isdisjoint(wanted)]
    if config.getoption("--fast"):
        kept = [item for item in kept if item.get_closest_marker("slow") is None]
        kept = list({apart_from_its_case(item): item for item in kept}.values())
    if kept is not items:
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def loss_of(value: Any) -> str | None:
    """The name of the loss of which a parameter of a test is a case of any kind; compositions are no case of a loss."""
    if not isinstance(value, Subject) or value.composition.single:
        value = getattr(value, "loss", value)
    return value.name if isinstance(value, Loss) or (isinstance(value, type) and issubclass(value, Loss)) else None


def losses_of(item: pytest.Item) -> set[str]:
    """The names of the losses that a test is made for."""
    return {name for value in parameters_of(item).values() if (name := loss_of(value)) is not None}


def apart_from_its_case(item: pytest.Item) -> tuple[Any, ...]:
    """What a test is and takes, with the loss alone of what is a case of one."""
    if not losses_of(item):
        return (item.nodeid,)
    taken = {name: loss_of(value) or str(value) for name, value in parameters_of(item).items()}
    return (item.path, item.originalname, *taken.items())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "loss_subject" in metafunc.fixturenames:
        metafunc.parametrize("loss_subject", list(loss_subjects()), ids=str)
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", subjects(), ids=str)
    if "loss_class" in metafunc.fixturenames:
        registry.load_all()
        metafunc.parametrize("loss_class", list(registry.registered().values()), ids=lambda cls: cls.name)


@pytest.fixture(scope="session")
def exported() -> Any:
    """A function from a subject and a dtype to its exported folder, shared with the C++ tests."""
    from tests.make_vectors import prepare

    root = Path(__file__).parents[1] / "build" / "vectors"

    def folder(subject: Subject, dtype: str = "float32") -> Path:
        return prepare(subject, dtype, root)

    return folder


@pytest.fixture(scope="session")
def per_sample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name, ``"soft"`` or ``"both"``, to the folder of a loss of logits with values per sample: a score, and a loss."""
    root = tmp_path_factory.mktemp("per-sample")
    soft = pykd.SoftTarget(temperature=2.0)
    losses = {"soft": soft, "both": pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (soft, 0.5)})}

    def exported_loss(name: str) -> Path:
        if not (root / name).exists():
            how = {"layouts": {"labels": "batch"}, "per_sample": True} if name == "both" else {"kind": "score"}
            pykd.export(losses[name], root / name, progress=lambda line: None, **how)
        return root / name

    return exported_loss


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artefact in every format, made by hand in tests/test_runtime.py."""
    from tests.test_runtime import onnx_artefact, torchscript_artefact, write_manifest

    path = tmp_path_factory.mktemp("squares")
    (path / "loss.onnx").write_bytes(onnx_artefact("value"))
    (path / "loss.grad.onnx").write_bytes(onnx_artefact("gradient"))
    torchscript_artefact(path / "loss.pt")
    write_manifest(path)
    return path

"""A newcomer adds a loss by adding one file: this one drops it into a package and gets every engine and check."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pykd
import pykd.losses
from pykd.definition import registry

# The file a newcomer copies, as it stands, under a name of its own.
TEMPLATE = Path(pykd.losses.__path__[0]) / "_template.py"
NEW_LOSS = TEMPLATE.read_text().replace("template", "probability_distance").replace("Template", "ProbabilityDistance")

# The package path of the losses gains a folder; the rest is the ordinary test suite and command line.
PLUGIN = """
import pykd.losses
pykd.losses.__path__.append({folder!r})
"""


def run(arguments, plugin_folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin_folder), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTEST_ADDOPTS", None)  # what is printed is read
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )


def run_tests(losses, plugin_folder, *arguments):
    chosen = [option for name in losses.split() for option in ("--loss", name)]
    return run(["-m", "pytest", "-p", "new_loss_plugin", "-q", *chosen, *arguments], plugin_folder)


@pytest.mark.slow
def test_one_file_is_enough(tmp_path):
    losses, plugins = tmp_path / "losses", tmp_path / "plugins"
    losses.mkdir()
    plugins.mkdir()
    (losses / "probability_distance.py").write_text(NEW_LOSS)
    (plugins / "new_loss_plugin.py").write_text(PLUGIN.format(folder=str(losses)))

    ran = run_tests(
        "probability_distance",
        plugins,
        "tests/test_every_loss.py",
        "tests/test_forms.py",
        "tests/test_engines.py",
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = int(ran.stdout.split(" passed")[0].split()[-1])
    assert passed > 40, f"the new loss reached only {passed} tests\n{ran.stdout}"

    # A loss whose name is a part of it, and of other words: --loss means the one that is named.
    (losses / "distance.py").write_text(
        NEW_LOSS.replace("probability_distance", "distance").replace("ProbabilityDistance", "Distance")
    )
    ran = run_tests("distance", plugins, "--collect-only", "tests/test_every_loss.py")
    tests = [line for line in ran.stdout.splitlines() if "::" in line]
    assert len(tests) > 20 and all("[distance" in line or "-distance[" in line for line in tests), ran.stdout
    (losses / "distance.py").unlink()
    ran = run(["-m", "pytest", "-q", "--loss", "distance"], plugins)
    assert ran.returncode != 0 and "expected --loss to name a registered loss" in ran.stderr

    broken = NEW_LOSS.replace("((q - p) ** 2)", "abs(q - p)")
    assert broken != NEW_LOSS
    (losses / "probability_distance.py").write_text(broken)
    ran = run_tests("probability_distance", plugins, "tests/test_every_loss.py")
    assert ran.returncode == 1 and "test_value_matches_the_reference" in ran.stdout

    (losses / "probability_distance.py").write_text(NEW_LOSS)
    code = "import new_loss_plugin, sys; from pykd.command_line import main; sys.exit(main(sys.argv[1:]))"
    assert "ProbabilityDistance" in run(["-c", code, "list"], plugins).stdout
    assert "| `probability_distance` | `ProbabilityDistance` |" in run(["-c", code, "table"], plugins).stdout
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('loss = "probability_distance"\nsettings = {temperature = 2.0}\n')
    ran = run(["-c", code, "export", "--recipe", str(recipe), "--out", str(tmp_path / "out")], plugins)
    assert ran.returncode == 0, ran.stderr
    loss = pykd.load(str(tmp_path / "out"))  # this process does not know the loss: the file is enough
    student, teacher = np.float32([[0.0, 2 * np.log(3)]]), np.float32([[0.0, 0.0]])  # probabilities ¼, ¾ and ½, ½
    got = loss.value_and_gradient(student_logits=student, teacher_logits=teacher)
    assert got["loss"] == pytest.approx(0.125)
    np.testing.assert_allclose(got["grad_student_logits"], [[-3 / 32, 3 / 32]], rtol=1e-5)


# Files of a newcomer, each with names and axes of its own: logits with two classes at least and an invariance less, feature
# maps with a mask and channels that differ, maps of several layers, relations.
NEWCOMERS = sorted(path.stem for path in (Path(__file__).parent / "new_losses").glob("*.py"))


@pytest.fixture
def newcomers(tmp_path):
    """A folder with the plugin that adds tests/new_losses to the losses."""
    folder = Path(__file__).parent / "new_losses"
    (tmp_path / "new_loss_plugin.py").write_text(PLUGIN.format(folder=str(folder)))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "chosen", "least"),
    [
        (
            "every_loss forms properties left_out range autocast copies tracing tokens names_of_losses",
            ("-m", "not slow"),
            60,
        ),
        ("engines", ("-k", "float32 or changing_shapes or every_reduction"), 3),
    ],
    ids=["formula", "engines"],
)
def test_a_loss_of_any_shape_is_one_file(files, chosen, least, newcomers):
    """Every test that is made for it, and every engine, with nothing written but the file."""
    ran = run_tests(
        " ".join(NEWCOMERS), newcomers, "-rp", *chosen, *(f"tests/test_{each}.py" for each in files.split())
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = [line for line in ran.stdout.splitlines() if line.startswith("PASSED")]
    for name in NEWCOMERS:
        assert sum(re.search(rf"\[(.*-)?{name}\b", line) is not None for line in passed) >= least, (
            f"{name}\n{ran.stdout}"
        )


def test_what_a_newcomer_declares_is_held_against_it(newcomers, tmp_path):
    """Declared the other way round, each of them fails the test of it."""
    text = (Path(__file__).parent / "new_losses" / "species_correlation.py").read_text()
    wrong = {
        "masked_classes": ('masked_classes="a class of probability 0 has a part in the mean"', "masked_classes=True"),
        "logit_shift": ("logit_shift=True", 'logit_shift="it sees them as they are"'),
        "zero_when_equal": ("zero_when_equal=True", 'zero_when_equal="it is no divergence"'),
        "symmetric": ("            symmetric=True,\n", ""),
    }
    losses = tmp_path / "wrong"
    losses.mkdir()
    for right, replacement in wrong.values():
        assert text.count(right) == 1
        text = text.replace(right, replacement)
    (losses / "species_correlation.py").write_text(text)
    (newcomers / "new_loss_plugin.py").write_text(PLUGIN.format(folder=str(losses)))
    ran = run_tests("species_correlation", newcomers, "tests/test_properties.py")
    failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    for name in wrong:
        assert any(name in line for line in failed), f"{name}\n{ran.stdout}"


def test_lengths_below_the_least_are_refused(newcomers):
    """In the class, the composition, its graph and TorchScript; renamed axes keep their least length."""
    code = """
import new_loss_plugin, torch, pykd
from pykd.composition import Part, compose
from pykd.definition import registry
registry.load_all()
loss = registry.get("species_correlation")()
one, two = torch.zeros(3, 1), torch.zeros(3, 2)
part = Part(loss, inputs={"seen": "s", "expected": "t"}, axes={"species": "birds"})
composed = compose({"own": loss, "birds": [part]})
graph = compose({"own": loss}).graph()
for call in (loss, lambda **given: composed(**given, s=two, t=two), graph, torch.jit.script(graph)):
    call(seen=two, expected=two)
    try:
        call(seen=one, expected=one)
    except Exception as error:
        assert 'expected seen to have at least 2 entries along "species", got shape [3, 1]; pass more of them' in str(error), error
    else:
        raise AssertionError(call)
try:
    composed(seen=two, expected=two, s=one, t=one)
except ValueError as error:
    assert 'expected s to have at least 2 entries along "birds"' in str(error), error
else:
    raise AssertionError("birds")
"""
    ran = run(["-c", code], newcomers)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_files_know_the_least_length_and_the_maximum(newcomers):
    """The loader refuses by both; any session of ONNX by the length, whatever it makes of the metadata."""
    code = """
import sys, numpy, onnx, onnxruntime, pykd, new_loss_plugin
from onnx.reference import ReferenceEvaluator
from pykd.definition import registry
registry.load_all()
path = sys.argv[1]
pykd.export(pykd.compose({"own": registry.get("species_correlation")()}), path, progress=lambda line: None)
one, two = numpy.zeros((3, 1), numpy.float32), numpy.zeros((3, 2), numpy.float32)

def refused(function, *words):
    try:
        function()
    except Exception as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

for engine in ("onnxruntime", "torchscript"):
    loss = pykd.load(path, engine=engine)
    assert "(batch, species >= 2)" in repr(loss.signature) and "> 0, <= 1" in repr(loss.signature), loss.signature
    loss.value(seen=two, expected=two, own_sharpness=1.0)
    short = 'expected seen of length at least 2 along "species", got shape [3, 1]; give more of them'
    refused(lambda: loss.value(seen=one, expected=one), short)
    high = "expected the parameter own_sharpness at most 1, got 1.5; give a smaller value"
    refused(lambda: loss.value(seen=two, expected=two, own_sharpness=1.5), high)
for name in ("loss.onnx", "loss.grad.onnx"):
    model = onnx.load(path + "/" + name)
    scale = {"grad_scale": numpy.float32(1)} if name == "loss.grad.onnx" else {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path + "/" + name, options)
    evaluator = ReferenceEvaluator(model)
    for run in (lambda given: session.run(None, given), lambda given: evaluator.run(None, {**scale, "own_sharpness": numpy.float32(1), "own_weight": numpy.float32(1), **given})):
        run({"seen": two, "expected": two})
        refused(lambda: run({"seen": one, "expected": one}))
"""
    ran = run(["-c", code, str(newcomers / "loss")], newcomers)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def layered_maps(monkeypatch):
    """The class, for the length of a test: other tests go through what is registered."""
    known = dict(registry._LOSSES)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "new_losses"))
    from layered_maps import LayeredMaps

    yield LayeredMaps
    registry._LOSSES.clear()
    registry._LOSSES.update(known)


def test_a_list_of_layers(layered_maps):
    loss = layered_maps(layers=3)
    assert isinstance(loss, layered_maps) and loss.with_settings(layers=1).settings()["layers"] == 1
    student = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 1), torch.randn(2, 7, 1, 1)]
    teacher = [torch.randn_like(x) for x in student]
    flat = {f"{who}_maps_{i}": x for who, xs in (("student", student), ("teacher", teacher)) for i, x in enumerate(xs)}
    want = sum(0.5**i * ((x - y) ** 2).mean() for i, (x, y) in enumerate(zip(student, teacher, strict=True)))
    for value in (
        loss(student, teacher),
        loss(student_maps=student, teacher_maps=teacher),
        loss(**flat),
        copy.deepcopy(loss)(student, teacher),
        pickle.loads(pickle.dumps(loss))(student, teacher),
        torch.jit.script(loss)(**flat),
        pykd.compose({"maps": loss}).graph()(**flat)["maps"],
    ):
        torch.testing.assert_close(value, want)
    with pytest.raises(
        ValueError, match="expected student_maps to be a list of 3 tensors, got 2 of them; pass one per layer"
    ):
        loss(student[:2], teacher)
    with pytest.raises(ValueError, match="expected teacher_maps to be a list of 3 tensors, got Tensor"):
        loss(student, teacher[0])
    with pytest.raises(ValueError, match='expected teacher_maps_1 to have length 5 along "channels_1"'):
        loss(student, [teacher[0], teacher[0], teacher[2]])
    with pytest.raises(
        TypeError, match=r"expected the inputs of LayeredMaps \(student_maps, teacher_maps, .*, got the unknown colour"
    ):
        loss(student, teacher, colour=1)

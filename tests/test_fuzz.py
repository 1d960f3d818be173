"""Recipes and manifests at random: each becomes a loss or a ValueError, and nothing in one is run.

The files, the metadata and the kernels have fuzz targets in C++ (cpp/fuzz). `make fuzz` runs all of them as long as one
likes: PYKD_FUZZ_SECONDS is the time that each test here takes, 5 seconds by default.
"""

import contextlib
import copy
import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pykd
from pykd.composition import Part, compose, recipe
from pykd.definition import names, registry
from pykd.export import verify
from pykd.losses.logits.soft_target import SoftTarget
from tests.test_untrusted import works_in_torchscript

SECONDS = float(os.environ.get("PYKD_FUZZ_SECONDS", "5"))
MARK = Path(os.environ.get("TMPDIR", "/tmp")) / f"pykd-fuzz-{os.getpid()}"
# Enough for the longest run; what ends one is the clock.
forever = settings(max_examples=10**9, deadline=None, database=None, suppress_health_check=list(HealthCheck))


class TimeIsOver(BaseException):  # one that Hypothesis does not take for a failure
    pass


def for_a_while(test):
    """Runs a Hypothesis test for SECONDS; an example that fails is shrunk and shown as ever."""

    def run(*arguments, **fixtures):
        end = time.monotonic() + SECONDS
        with contextlib.suppress(TimeIsOver):
            test(*arguments, end=end, **fixtures)
        assert not MARK.exists()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def refused(function):
    """The message of a ValueError; None where there was none."""
    try:
        function()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


registry.load_all()
WORDS = [
    *registry.registered(),
    *("loss", "terms", "distillation_loss", "settings", "weight", "weight_name", "parts", "inputs", "axes", "students"),
    *("student_logits", "teacher_logits", "batch", "classes", "soft", "soft_weight", "kl", "mean", "none", "labels"),
    *("temperature", "reduction", "ignore_index", "bins", "features_index", "tau", "aux_loss", "l1", "grad_scale"),
    *("a, *z, b=open({0!r}, 'w'), c", "x\nopen({0!r}, 'w')", "torch", "self", "__class__", "é", "a" * 201, ""),
]
texts = st.sampled_from([word.format(str(MARK)) for word in WORDS]) | st.text(max_size=8)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2.0, -1, 10**400, 2**63])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
GOOD = [
    {"loss": "soft_target", "settings": {"temperature": 2.0, "form": "kl"}},
    {"loss": "hard_target", "settings": {"ignore_index": 3}},
    {"terms": {"hard": {"loss": "hard_target"}, "soft": {"loss": "soft_target", "weight": 0.5}}},
    {
        "terms": {
            "aux": {
                "weight": 0.1,
                "parts": [
                    {"loss": "feature_l2", "weight": 2.0, "weight_name": "first", "axes": {"tokens": "tokens_0"}},
                    {"loss": "mk_mmd", "inputs": {"student_features": "s", "teacher_features": "t"}},
                ],
            }
        },
        "students": True,
    },
    {"distillation_loss": {"logit_loss": "soft_entropy", "lambda2": 0, "tau": 2, "aux_loss": "l1", "multiple_lrs": 2}},
]


@st.composite
def changed(draw, good, most, depth):
    """One of the good tables with up to ``most`` places replaced; the larger ``depth``, the deeper they lie."""
    table = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, most))):
        place = table
        while place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, depth)):
                place = place[key]
                continue
            if isinstance(place, dict) and draw(st.booleans()):
                place[draw(texts)] = place.pop(key)
            else:
                place[key] = draw(values)
            break
    return table


@st.composite
def recipes(draw):
    """A good recipe with a few places replaced, or anything at all."""
    return draw(values if draw(st.integers(0, 9)) == 0 else changed(GOOD, most=3, depth=3))


@pytest.mark.slow
@for_a_while
@forever
@given(table=recipes())
def test_recipes(table, end):
    """Built, a recipe gives a graph whose code holds checked names alone, and comes back as it was."""
    if time.monotonic() > end:
        raise TimeIsOver
    message = refused(lambda: recipe.build(table))
    if message is not None:
        assert message.startswith("expected ")
        return
    composition = recipe.build(table)
    graph = composition.graph()
    for name in (*graph.signature.inputs, *graph.signature.parameters, *graph.signature.outputs):
        assert names.check(name, "a name") == name
    again = recipe.build(recipe.tomllib.loads(recipe.dumps(composition.recipe())))
    assert again.recipe() == composition.recipe()
    assert again.graph().code == graph.code


@for_a_while
@forever
@given(data=st.binary(max_size=200) | st.text(alphabet="[]{}\"'=.#\n a1_-", max_size=200).map(str.encode))
def test_toml(data, end):
    if time.monotonic() > end:
        raise TimeIsOver
    path = MARK.with_suffix(".toml")
    path.write_bytes(data)
    assert (refused(lambda: recipe.build(recipe.load(path))) or "expected ").startswith("expected ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pykd.export(SoftTarget(), tmp_path_factory.mktemp("fuzz"), progress=lambda line: None)


@pytest.mark.slow
def test_manifests(folder, monkeypatch):
    """verify() of a folder whose manifest was changed: a report or a ValueError, and loss.pt is never run."""
    good = json.loads((folder / "manifest.json").read_text())
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **keywords: MARK.touch())

    @for_a_while
    @forever
    @given(table=changed([good], most=2, depth=2))
    def run(table, end):
        if time.monotonic() > end:
            raise TimeIsOver
        try:
            (folder / "manifest.json").write_text(json.dumps(table))
        except ValueError:  # a number that JSON has no room for
            return
        message = refused(lambda: verify(folder, engines=("python",), quick=True))
        assert (message or "expected ").startswith("expected ")

    run()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,20}", fullmatch=True))
def test_every_name_that_is_taken_works_in_torchscript(name):
    try:
        composition = compose({"soft": [Part(SoftTarget(), inputs={"student_logits": name})]})
    except ValueError:
        return
    works_in_torchscript(composition)

"""Folders that earlier releases exported go on loading, with the numbers of their time.

``data/format-1`` holds some of the first format: files, and ``vectors.json`` as make_vectors.py writes it. Most lack
their loss.pt, which their manifest lists.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pykd
from pykd.export.verification import errors, verify

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("data/format-*/*/vectors.json"))


def tensor(described):
    numbers = np.array([float(number) for number in described["data"]]).reshape(described["shape"])
    return torch.from_numpy(np.asarray(numbers)).to(getattr(torch, described["dtype"]))


@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_old_exports_load_and_compute_what_they_did(folder, engine):
    if engine == "torchscript" and not (folder / "loss.pt").exists():
        with pytest.raises(FileNotFoundError, match='for the engine "torchscript", got ONNX alone'):
            pykd.load(folder, engine=engine)
        return
    vectors = json.loads((folder / "vectors.json").read_text())
    limits = vectors["tolerance"]
    for kernels in ("auto", "off") if engine == "onnxruntime" else ("auto",):
        loss = pykd.load(folder, engine=engine, kernels=kernels, threads=1)
        for call in vectors["calls"]:
            inputs = {name: tensor(described) for name, described in call["inputs"].items()}
            want = {name: tensor(described).double().numpy() for name, described in call["outputs"].items()}
            got = loss.value_and_gradient(**inputs, **call["parameters"])
            value, gradient = errors({name: got[name] for name in want}, want)
            assert value <= limits["value"] and gradient <= limits["gradient"]
            alone = loss.value(**inputs, **call["parameters"])
            assert set(alone) == {name for name in got if not name.startswith("grad_")}


def test_verify_checks_what_is_there():
    report = verify(FOLDERS[-1], engines=("python",), quick=True)
    assert report.ok and "loss.pt is not in the folder" in report.missing


def test_the_value_comes_from_the_gradients_file_alone(tmp_path):
    composed = next(folder for folder in FOLDERS if folder.name == "composed")
    for name in ("loss.grad.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((composed / name).read_bytes())
    call = json.loads((composed / "vectors.json").read_text())["calls"][0]
    inputs = {name: tensor(described) for name, described in call["inputs"].items()}
    whole, alone = pykd.load(composed, engine="onnxruntime"), pykd.load(tmp_path)
    want = whole.value(**inputs)
    got = alone.value(**inputs)
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert "grad_student_logits" in alone.value_and_gradient(**inputs)

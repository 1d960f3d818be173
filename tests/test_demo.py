"""The demo and both C++ trainers, short: two seeds, two epochs. It checks every route and the trainer's backward itself."""

import json

import numpy as np
import onnx
import pytest

from pykd import demo
from pykd.scoring.results import Scores


@pytest.mark.slow
def test_demo(tmp_path, capfd):
    assert demo.main(tmp_path, seeds=2, epochs=2) == 0, capfd.readouterr()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["students"]) == 2
    assert results["teacher_test_accuracy"] > 95
    for name in ("parity.png", "learning_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "every route agrees with float64" in printed
    assert "central differences" in printed
    scored(tmp_path / "scoring", results["scores"], printed)


def scored(folder, results, printed):
    """Both students, against the logits that were written, and not only against each other."""
    assert results["ways_agree"] == {"student": True, "student_int8": True}
    assert printed.count("merged file, three sessions, and pykd score: the same scores, bit for bit") == 2
    assert "899 of 899 rows count in both" in printed
    teacher = np.load(folder / "teacher.npy").astype(np.float64)
    means, right = [], []
    for name in ("student", "student_int8"):
        student = np.load(folder / f"{name}.npy").astype(np.float64)
        log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (teacher, student))
        kl = np.concatenate([block["kl"] for block in Scores(folder / f"{name}.parquet").blocks("kl")])
        np.testing.assert_allclose(kl, (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-4, atol=1e-6)
        means.append(kl.mean(dtype=np.float64))
        right.append((student.argmax(axis=1) == np.load(folder / "labels.npy")).mean())
        page = folder / f"{name}.html"
        assert "<svg" in page.read_text(encoding="utf-8") and f"report: {page}" in printed
    assert "the teachers are different files" not in printed
    difference = results["int8_minus_full_precision"]
    assert difference["scores"]["kl"]["difference"] == pytest.approx(means[1] - means[0], abs=1e-9)
    assert difference["shares"]["accuracy"]["difference"] == pytest.approx(right[1] - right[0])
    quantised = onnx.load(folder / "student_int8.onnx")
    weights = [tensor for tensor in quantised.graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == 3 and {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}

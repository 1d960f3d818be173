"""The demo and both C++ trainers, short: two seeds, two epochs. It checks every route and the trainer's backward itself."""

import json

import pytest

from pykd import demo


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

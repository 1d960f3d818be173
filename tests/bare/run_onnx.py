"""Runs an exported loss where there is neither torch nor pykd: NumPy and onnxruntime, nothing else.

``python run_onnx.py <folder> <tensors.npz>`` prints, for loss.onnx and loss.grad.onnx, every output as JSON.
"""

import importlib.util
import json
import sys

import numpy as np
import onnxruntime

folder, tensors = sys.argv[1:]
for absent in ("torch", "pykd", "onnx"):
    assert importlib.util.find_spec(absent) is None, f"expected an environment without {absent}, got one with it"

with np.load(tensors) as archive:
    inputs = dict(archive)
answers = {}
for file in ("loss.onnx", "loss.grad.onnx"):
    session = onnxruntime.InferenceSession(f"{folder}/{file}", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, inputs)
    answers[file] = {name: np.asarray(result).tolist() for name, result in zip(names, results, strict=True)}
json.dump(answers, sys.stdout)

"""The kernels from Python: on raw arrays, and inside ONNX Runtime sessions, ours and the user's own.

The files of these tests are made by hand. Their node carries the function of a kernel's name as its portable body, and
the function computes something else on purpose: so the numbers tell which of the two ran.
"""

import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import pykd
from pykd import kernels

STUDENT = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
TEACHER = np.array([[0, 2, 4], [4, 2, 0]], np.float32)
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference(student, teacher, temperature, weight, form="cross_entropy"):
    """Value and weighted gradient per row, in float64, of the forms that the tests use."""
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    value = -(p * np.log(q)).sum(-1)
    if form == "kl":
        value += (p * np.log(p)).sum(-1)
    return value, weight[:, None] * (q - p) / temperature


def model(op="soft_target_float32", inputs=None, outputs=("soft", "", "grad"), dtype="float32", **attributes):
    """A file of one node of domain pykd. The body's outputs are −1 and −2 everywhere."""
    tensor = DTYPES[dtype]
    types = {
        "student": (tensor, ["batch", "classes"]),
        "teacher": (tensor, ["batch", "classes"]),
        "temperature": (TensorProto.FLOAT, []),
        "weight": (TensorProto.FLOAT, ["batch"]),
        "labels": (TensorProto.INT64, ["batch"]),
        "soft": (TensorProto.FLOAT, ["batch"]),
        "hard": (TensorProto.FLOAT, ["batch"]),
        "grad": (tensor, ["batch", "classes"]),
    }
    inputs = ["student", "teacher", "temperature", "weight"] if inputs is None else inputs

    def infos(names):
        return [helper.make_tensor_value_info(name, *types[name]) for name in names if name]

    nodes = [
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("Constant", [], ["minus"], value_float=-1.0),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Cast", ["student"], ["student32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["student32", "zero"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros", "axis"], ["row"], keepdims=0),
        helper.make_node("Add", ["row", "minus"], ["soft"]),
        helper.make_node("Identity", ["soft"], ["hard"]),
        helper.make_node("Add", ["zeros", "minus"], ["ones"]),
        helper.make_node("Add", ["ones", "minus"], ["twos"]),
        helper.make_node("Cast", ["twos"], ["grad"], to=tensor),
    ]
    formal = ["student", "teacher", "temperature", "weight", "labels", "probabilities", "hard_weight"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("pykd", 1)]
    function = helper.make_function("pykd", op, formal, ["soft", "hard", "grad"], nodes, [opsets[0]], list(attributes))
    graph = helper.make_graph(
        [helper.make_node(op, inputs, list(outputs), domain="pykd", name="the_node", **attributes)],
        "one_node",
        infos(inputs),
        infos(outputs),
    )
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(made, full_check=len(outputs) == 3)  # its shape inference wants every output named or ""
    return made.SerializeToString()


def session(file, with_ops=True, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if with_ops:
        options.register_custom_ops_library(pykd.onnxruntime_ops_path())
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def feeds(**others):
    return {
        "student": STUDENT,
        "teacher": TEACHER,
        "temperature": np.array(2, np.float32),
        "weight": np.array([0.5, 2], np.float32),
        **others,
    }


# ---- Sessions of the user's own ----------------------------------------------------------------------------------


def test_the_kernel_runs_with_the_library_and_the_body_without():
    file = model()
    soft, grad = session(file, with_ops=False).run(None, feeds())
    assert (soft == -1).all() and (grad == -2).all()
    soft, grad = session(file).run(None, feeds())
    want_soft, want_grad = reference(STUDENT, TEACHER, 2.0, feeds()["weight"])
    np.testing.assert_allclose(soft, want_soft, **CLOSE)
    np.testing.assert_allclose(grad, want_grad, **CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_in_the_name_of_the_op(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy_dtype = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    ran = session(model(f"soft_target_{dtype}", outputs=("soft",), dtype=dtype))
    tensors = feeds(student=STUDENT.astype(numpy_dtype), teacher=TEACHER.astype(numpy_dtype))
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
        if array.dtype != numpy_dtype or dtype == "float16"
        else onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), DTYPES[dtype])
        for name, array in tensors.items()
    }
    [soft] = ran.run_with_ort_values(None, values)
    np.testing.assert_allclose(soft.numpy(), reference(STUDENT, TEACHER, 2.0, feeds()["weight"])[0], **CLOSE)


def test_a_dtype_without_a_kernel_runs_the_body():
    [soft] = session(model("soft_target_float64", outputs=("soft", "", ""))).run(None, feeds())
    assert (soft == -1).all()


def test_outputs_may_be_left_out_anywhere():
    want_soft, want_grad = reference(STUDENT, TEACHER, 2.0, feeds()["weight"])
    for outputs in [("soft",), ("soft", "", "")]:
        [soft] = session(model(outputs=outputs)).run(None, feeds())
        np.testing.assert_allclose(soft, want_soft, **CLOSE)
    # The portable body wants the empty names at the end, too.
    [soft] = session(model(outputs=("soft", "", "")), with_ops=False).run(None, feeds())
    assert (soft == -1).all()
    [grad] = session(model(outputs=("", "", "grad"))).run(None, feeds())
    np.testing.assert_allclose(grad, want_grad, **CLOSE)


def test_inputs_may_be_left_out_anywhere():
    file = model(inputs=["student", "", "", "", "labels"], outputs=("", "hard"))
    [hard] = session(file).run(None, {"student": STUDENT, "labels": np.array([2, 1])})
    q = softmax(STUDENT)
    np.testing.assert_allclose(hard, -np.log([q[0, 2], q[1, 1]]), **CLOSE)


def test_attributes_come_from_the_node():
    [soft] = session(model(outputs=("soft",), form="kl")).run(None, feeds())
    np.testing.assert_allclose(soft, reference(STUDENT, TEACHER, 2.0, feeds()["weight"], "kl")[0], **CLOSE)
    [soft] = session(model(outputs=("soft",), form="jsd", beta=0.25)).run(None, feeds())
    want = np.empty(2, np.float32)
    kernels.run(
        "soft_target",
        {"student": STUDENT, "teacher": TEACHER, "temperature": 2},
        {"form": "jsd", "beta": 0.25},
        {"soft": want},
    )
    np.testing.assert_allclose(soft, want, rtol=1e-6)
    with pytest.raises(
        Exception, match="one of cross_entropy.*as the attribute form of soft_target_float32.*manhattan"
    ):
        session(model(form="manhattan"))
    with pytest.raises(Exception, match="a number"):
        session(model(form=3.0))
    with pytest.raises(Exception, match="a float as the attribute beta.*half"):
        session(model(beta="half"))
    # One that cannot be read must not pass for one that is not there.
    with pytest.raises(Exception, match="a string as the attribute form.*another type"):
        session(model(form=["kl"]))
    with pytest.raises(Exception, match="a float as the attribute beta.*another type"):
        session(model(beta=[0.25]))


def test_wrong_calls_say_what_is_wrong():
    ran = session(model())
    with pytest.raises(Exception, match="teacher of length 3 along .classes.*as student has, got shape .2, 2."):
        ran.run(None, feeds(teacher=TEACHER[:, :2].copy()))
    with pytest.raises(Exception, match="student of length at least 1 along .batch., got shape .0, 3."):
        ran.run(None, feeds(student=STUDENT[:0], teacher=TEACHER[:0], weight=np.empty(0, np.float32)))
    # The same where the tensor comes from another node: ONNX Runtime gives such a one no memory.
    made = onnx.load_from_string(model())
    made.graph.node[0].input[0] = "negated"
    made.graph.node.insert(0, helper.make_node("Neg", ["student"], ["negated"]))
    behind = session(made.SerializeToString())
    with pytest.raises(Exception, match="student of length at least 1 along .batch., got shape .0, 3."):
        behind.run(None, feeds(student=STUDENT[:0], teacher=TEACHER[:0], weight=np.empty(0, np.float32)))
    alone = session(model(inputs=["student", "teacher"], outputs=("soft",)))
    with pytest.raises(Exception, match="temperature"):
        alone.run(None, {"student": STUDENT, "teacher": TEACHER})


def test_a_session_has_threads_and_callers():
    """Larger tensors, so that the kernel splits its work; the numbers depend on neither."""
    generator = np.random.default_rng(0)
    student, teacher = (3 * generator.standard_normal((300, 1000)).astype(np.float32) for _ in range(2))
    tensors = feeds(student=student, teacher=teacher, weight=np.full(300, 1 / 300, np.float32))
    alone = session(model(), threads=1).run(None, tensors)
    together = session(model(), threads=4)
    results = [None] * 6

    def call(index):
        results[index] = together.run(None, tensors)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in results:
        for got, want in zip(result, alone, strict=True):
            np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(alone[0], reference(student, teacher, 2.0, tensors["weight"])[0], rtol=1e-4)


def test_every_kernel_has_an_op_for_each_of_its_dtypes():
    """ONNX Runtime refuses a file whose op is not registered and has no body."""
    for name, kernel in kernels.descriptions().items():
        for dtype in kernel["dtypes"]:
            roles = {"tensor": DTYPES[dtype], "float32": 1, "number": 1, "index": 7}
            infos = [
                [
                    helper.make_tensor_value_info(item["name"], roles[item["role"]], item["axes"])
                    for item in kernel[side]
                ]
                for side in ("inputs", "outputs")
            ]
            node = helper.make_node(
                f"{name}_{dtype}",
                [info.name for info in infos[0]],
                [f"{info.name}_out" for info in infos[1]],
                domain="pykd",
            )
            for info in infos[1]:
                info.name += "_out"
            opsets = [helper.make_opsetid("", 18), helper.make_opsetid("pykd", 1)]
            graph = helper.make_graph([node], "one_node", *infos)
            session(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


# ---- Raw arrays --------------------------------------------------------------------------------------------------


def test_run_writes_into_arrays():
    weight = np.array([0.5, 2], np.float32)
    soft, grad = np.empty(2, np.float32), np.empty_like(STUDENT)
    inputs = {"student": STUDENT, "teacher": TEACHER, "temperature": 2.0, "soft_weight": weight}
    assert kernels.run("soft_target", inputs, {"form": "kl"}, {"soft": soft, "grad_student": grad}, threads=2) is None
    want_soft, want_grad = reference(STUDENT, TEACHER, 2.0, weight, "kl")
    np.testing.assert_allclose(soft, want_soft, **CLOSE)
    np.testing.assert_allclose(grad, want_grad, **CLOSE)


def test_run_takes_torch_and_bfloat16():
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    want = reference(STUDENT, TEACHER, 2.0, np.ones(2))[0]
    soft = torch.empty(2)
    student = torch.tensor(STUDENT, requires_grad=True)
    kernels.run(
        "soft_target", {"student": student, "teacher": torch.tensor(TEACHER), "temperature": 2}, {}, {"soft": soft}
    )
    np.testing.assert_allclose(soft.numpy(), want, **CLOSE)
    halves = {"student": STUDENT.astype(ml_dtypes.bfloat16), "teacher": TEACHER.astype(ml_dtypes.bfloat16)}
    soft = np.empty(2, np.float32)
    kernels.run("soft_target", {**halves, "temperature": 2}, {}, {"soft": soft})
    np.testing.assert_allclose(soft, want, **CLOSE)


def test_run_says_what_is_wrong():
    soft = np.full(2, -7, np.float32)
    good = {"student": STUDENT, "teacher": TEACHER, "temperature": 2.0}

    def call(inputs=good, attributes=None, outputs=None, name="soft_target", threads=0):
        kernels.run(name, inputs, attributes or {}, outputs or {"soft": soft}, threads)

    with pytest.raises(ValueError, match='"soft_targets"; did you mean "soft_target"?'):
        call(name="soft_targets")
    with pytest.raises(ValueError, match='did you mean "student"'):
        call({"students": STUDENT})
    with pytest.raises(ValueError, match='did you mean "reverse_kl"'):
        call(attributes={"form": "reversekl"})
    with pytest.raises(ValueError, match="contiguous"):
        call({**good, "student": np.asfortranarray(STUDENT)})
    with pytest.raises(ValueError, match="from 0 to 1024 threads"):
        call(threads=-1)
    with pytest.raises(RuntimeError, match="float64"):
        call({**good, "student": STUDENT.astype(np.float64), "teacher": TEACHER.astype(np.float64)})
    with pytest.raises(TypeError, match="expected a tensor for student"):
        call({**good, "student": "logits"})
    with pytest.raises(TypeError):
        call(attributes={"beta": None})
    read_only = np.empty(2, np.float32)
    read_only.flags.writeable = False
    with pytest.raises((ValueError, TypeError), match="read-only|readonly"):
        call(outputs={"soft": read_only})
    assert (soft == -7).all()


def test_descriptions():
    soft_target = kernels.descriptions()["soft_target"]
    assert soft_target["inputs"][0] == {
        "name": "student", "axes": ["batch", "classes"], "role": "tensor", "optional": False,
    }  # fmt: skip
    assert soft_target["outputs"][-1]["name"] == "grad_student"
    assert "kl" in soft_target["attributes"][0]["choices"]
    assert set(soft_target["dtypes"]) == set(DTYPES)


def test_every_simd_target_agrees():
    generator = np.random.default_rng(1)
    student, teacher = (generator.standard_normal((7, 45)).astype(np.float32) for _ in range(2))
    want_soft, want_grad = reference(student, teacher, 3.0, np.ones(7))
    targets = kernels.simd_targets()
    assert targets
    try:
        for target in targets:
            kernels.use_simd(target)
            soft, grad = np.empty(7, np.float32), np.empty_like(student)
            inputs = {"student": student, "teacher": teacher, "temperature": 3, "soft_weight": np.ones(7, np.float32)}
            kernels.run("soft_target", inputs, {}, {"soft": soft, "grad_student": grad})
            np.testing.assert_allclose(soft, want_soft, **CLOSE, err_msg=target)
            np.testing.assert_allclose(grad, want_grad, **CLOSE, err_msg=target)
    finally:
        kernels.use_simd(None)
    with pytest.raises(ValueError, match="ABACUS"):
        kernels.use_simd("ABACUS")


def test_kernels_need_no_torch():
    check = "import sys, pykd.kernels; pykd.kernels.descriptions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# ---- Loaded files: the option is tested in cpp/tests/api_test.cpp ---------------------------------------------------


def test_load_passes_the_option_on(tmp_path):
    folder = pykd.export(pykd.HardTarget(), tmp_path / "hard", progress=lambda line: None)
    loss = pykd.load(folder, engine="onnxruntime", kernels="off")
    assert loss.kernels_in_use == ()
    with pytest.raises(ValueError, match='"auto", "on" or "off" for kernels, got "fast"'):
        pykd.load(folder, kernels="fast")
    with pytest.raises(RuntimeError, match='as kernels "on" asks for.*TorchScript'):
        pykd.load(folder, engine="torchscript", kernels="on")

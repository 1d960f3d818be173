"""What somebody else wrote is data: no recipe and no folder runs code, and none costs more than it may."""

import builtins
import io
import json
import keyword
import os
import time

import pytest
import torch

import pykd
from pykd import Part, SoftTarget, compose
from pykd.command_line import main
from pykd.command_line.artefacts import export_arguments
from pykd.composition import MAX_PARTS
from pykd.composition import recipe as recipes
from pykd.definition import names
from pykd.export import verify

PWNED = "__import__('pathlib').Path('{mark}').touch()"
ATTACKS = [
    "a, *z, b={code}, c",
    "a={code}",
    "a: {code}",
    "a):\n    {code}\ndef g(self, b",
    "x\n{code}",
    "{code}",
    "x; {code}",
    "x if {code} else y",
    "lambda: {code}",
    "a=({code})#",
]
NO_NAMES = [
    "",
    " ",
    "a b",
    "a.b",
    "1a",
    "a-b",
    "é",
    "ａ",
    "a\0b",
    "a\n",
    "class",
    "None",
    "_a",
    "__class__",
    "a" * 201,
    3,
    None,
]
# Each puts a string where a recipe has a name of its own.
PLACES = {
    "term": lambda name: {"terms": {name: {"loss": "soft_target"}}},
    "input": lambda name: part(inputs={"student_logits": name}),
    "input renamed": lambda name: part(inputs={name: "student_logits"}),
    "axis": lambda name: part(axes={"classes": name}),
    "axis renamed": lambda name: part(axes={name: "classes"}),
    "weight": lambda name: part(weight_name=name),
    "setting": lambda name: {"loss": "soft_target", "settings": {name: 1.0}},
    "value of a setting": lambda name: {"loss": "soft_target", "settings": {"form": name}},
    "loss": lambda name: {"loss": name},
    "argument": lambda name: {"distillation_loss": {name: 1.0}},
    "value of an argument": lambda name: {"distillation_loss": {"spatial_avg": name}},
}


def part(**fields):
    return {"terms": {"soft": {"parts": [{"loss": "soft_target", **fields}]}}}


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return pykd.export(compose({"soft": SoftTarget()}), folder, progress=lambda line: None)


def copy(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return json.loads((to / "manifest.json").read_text())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", PLACES)
def test_no_name_in_a_recipe_runs_code(place, attack, tmp_path):
    mark = tmp_path / "mark"
    recipe = PLACES[place](attack.format(code=PWNED.format(mark=mark)))
    with pytest.raises(ValueError, match="expected "):
        recipes.build(recipe).graph()
    assert not mark.exists()


@pytest.mark.parametrize("attack", ATTACKS[:3])
@pytest.mark.parametrize("place", PLACES)
def test_no_manifest_runs_code(place, attack, tmp_path):
    """A folder with nothing but a manifest, and with no file in it."""
    mark = tmp_path / "mark"
    recipe = PLACES[place](attack.format(code=PWNED.format(mark=mark)))
    manifest = {"format": "pykd", "format_version": 1, "recipe": recipe, "files": {}, "parameters": []}
    manifest["inputs"] = [
        {"name": n, "axes": ["batch", "classes"], "dtype": "float32"} for n in ("student_logits", "b")
    ]
    manifest["outputs"] = [{"name": "loss", "axes": []}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="expected "):
        verify(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2
    assert not mark.exists()


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("place", ["term", "input", "axis", "weight"])
def test_names_are_ascii_identifiers_of_at_most_200_characters(place, name):
    if place == "weight" and name is None:
        return  # no name: the weight is fixed
    with pytest.raises(ValueError, match="expected "):
        recipes.build(PLACES[place](name))


@pytest.mark.parametrize(
    "name", ["torch", "self", "fork", "nan", "getattr", "Ellipsis", "kernels", "constants_at", "grad_scale"]
)
@pytest.mark.parametrize("place", ["input", "weight"])
def test_variables_leave_the_words_of_the_generated_code_alone(place, name):
    with pytest.raises(ValueError, match="expected .* to be a name without a meaning|to differ in name"):
        recipes.build(PLACES[place](name))


def works_in_torchscript(composition):
    """Its graph, saved and loaded, computes what the module computes."""
    graph = composition.graph()
    tensors = composition.draw(graph.signature.inputs)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(graph.eval()), buffer)
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
    torch.testing.assert_close(loaded(**tensors), composition(**tensors))


@pytest.mark.parametrize(
    "name", ["x", "a" * 188, "match", "training", "code", "forward", "loss_", "shape", "pykd", "Tensor"]
)
def test_other_names_work_everywhere(name):
    """In the module, and in TorchScript that was saved and loaded."""
    terms = {name: ([Part(SoftTarget(), 2.0, f"{name}_factor", inputs={"student_logits": f"{name}_in"})], 0.5)}
    composition = compose(terms)
    works_in_torchscript(composition)


def test_every_word_that_python_or_torchscript_takes_is_refused_or_works():
    words = {
        *dir(builtins),
        *keyword.softkwlist,
        *torch.fx.graph._custom_builtins,
        "add",
        "mul",
        "upcast",
        "pykd_ops_upcast",
    }
    for word in sorted(words):
        try:
            composition = compose({"soft": [Part(SoftTarget(), inputs={"student_logits": word})]})
        except ValueError:
            continue
        works_in_torchscript(composition)


def test_a_graph_takes_no_name_that_was_not_checked():
    """Whatever route a name took past the checks of a composition."""
    composition = compose({"soft": SoftTarget()})
    for name in ("a=print(1)", "torch", "a b"):
        changed = recipes.build(composition.recipe())
        changed.input_layouts[name] = changed.input_layouts.pop("student_logits")
        with pytest.raises(ValueError, match="expected an input or parameter of the loss"):
            changed.graph()
        changed = recipes.build(composition.recipe())
        changed.scalars[name] = changed.scalars["soft_weight"]
        with pytest.raises(ValueError, match="expected an input or parameter of the loss"):
            changed.graph()


CLASHES = {
    "a term like an input": {"student_logits": {"loss": "soft_target"}},
    "a term like a parameter": {"soft": {"loss": "soft_target"}, "soft_weight": {"loss": "hard_target"}},
    "an input like the loss": {"soft": {"parts": [{"loss": "soft_target", "inputs": {"teacher_logits": "loss"}}]}},
    "an input like a term": {"soft": {"parts": [{"loss": "soft_target", "inputs": {"teacher_logits": "soft"}}]}},
    "an input like a gradient": {
        "soft": {"parts": [{"loss": "soft_target", "inputs": {"teacher_logits": "grad_student_logits"}}]}
    },
    "an input like values per sample": {
        "soft": {"parts": [{"loss": "soft_target", "inputs": {"teacher_logits": "soft_per_sample"}}]}
    },
    "an input like a parameter": {
        "soft": {"parts": [{"loss": "soft_target", "inputs": {"teacher_logits": "soft_temperature"}}]}
    },
    "a factor of another range": {
        "soft": {"parts": [{"loss": "soft_target", "weight": 2.0, "weight_name": "soft_temperature"}]}
    },
    "axes of one name": {"soft": {"parts": [{"loss": "soft_target", "axes": {"classes": "batch"}}]}},
    "another batch": {"soft": {"parts": [{"loss": "soft_target", "axes": {"batch": "rows"}}]}},
}


@pytest.mark.parametrize("terms", CLASHES.values(), ids=CLASHES)
def test_names_that_clash(terms):
    with pytest.raises(ValueError, match="expected "):
        recipes.build({"terms": terms})


WRONG_TYPES = [
    {"loss": "soft_target", "settings": {"temperature": "2"}},
    {"loss": "soft_target", "settings": {"temperature": True}},
    {"loss": "soft_target", "settings": {"temperature": float("nan")}},
    {"loss": "soft_target", "settings": {"temperature": float("inf")}},
    {"loss": "soft_target", "settings": {"temperature": 10**400}},
    {"loss": "soft_target", "settings": {"temperature": [2.0]}},
    {"loss": "soft_target", "settings": {"soften_student": "no"}},
    {"loss": "soft_target", "settings": {"tau_squared": 1}},
    {"loss": "soft_target", "settings": {"beta": "0.5"}},
    {"loss": "soft_target", "settings": {"beta": float("nan")}},
    {"loss": "soft_target", "settings": {"form": ["kl"]}},
    {"loss": "soft_target", "settings": {"reduction": {}}},
    {"loss": "soft_target", "settings": []},
    {"loss": "soft_target", "settings": "temperature"},
    {"loss": ["soft_target"]},
    {"loss": {}},
    {"loss": "hard_target", "settings": {"ignore_index": 1.5}},
    {"loss": "hard_target", "settings": {"ignore_index": 2**64}},
    {"loss": "hard_target", "settings": {"ignore_index": "x"}},
    {"loss": "distribution_distillation", "settings": {"bins": 10**9}},
    {"loss": "distribution_distillation", "settings": {"bins": 2.0}},
    {"loss": "distribution_distillation", "settings": {"width": float("inf")}},
    {"loss": "feature_l1", "settings": {"spatial_avg": 1}},
    {"terms": []},
    {"terms": "soft"},
    {"terms": {}},
    {"terms": {"soft": "soft_target"}},
    {"terms": {"soft": ["soft_target"]}},
    {"terms": {"soft": {"loss": "soft_target", "weight": "1"}}},
    {"terms": {"soft": {"loss": "soft_target", "weight": float("inf")}}},
    {"terms": {"soft": {"loss": "soft_target", "weight": False}}},
    {"terms": {"soft": {"loss": "soft_target", "weight": 10**400}}},
    {"terms": {"soft": {"parts": {"loss": "soft_target"}}}},
    {"terms": {"soft": {"parts": "soft_target"}}},
    {"terms": {"soft": {"parts": []}}},
    {"terms": {"soft": {"parts": [[]]}}},
    {"terms": {"soft": {"parts": [{"loss": "soft_target"}], "settings": {"temperature": 3.0}}}},
    {"terms": {"soft": {"parts": [{"loss": "soft_target", "weight": float("nan")}]}}},
    {"terms": {"soft": {"parts": [{"loss": "soft_target", "inputs": ["student_logits"]}]}}},
    {"terms": {"soft": {"parts": [{"loss": "soft_target", "axes": "classes"}]}}},
    {"terms": {"soft": {"loss": "soft_target"}}, "students": "no"},
    {"terms": {f"t{i}": {"loss": "soft_target"} for i in range(MAX_PARTS + 1)}},
    {"terms": {"soft": {"parts": [{"loss": "soft_target"}] * (MAX_PARTS + 1)}}},
    {"terms": {f"t{i}": {"parts": [{"loss": "soft_target"}] * 60} for i in range(2)}},
    {"distillation_loss": []},
    {"distillation_loss": {"tau": "3"}},
    {"distillation_loss": {"alpha": float("nan")}},
    {"distillation_loss": {"alpha": True}},
    {"distillation_loss": {"multiple_lrs": True}},
    {"distillation_loss": {"multiple_lrs": 2.0}},
    {"distillation_loss": {"aux_loss": "l1", "features_index": "0"}},
    {"distillation_loss": {"aux_loss": "l1", "features_index": [0.5]}},
    {"distillation_loss": {"aux_loss": "l1", "features_index": [True]}},
    {"distillation_loss": {"aux_loss": "l1", "features_index": list(range(100_000))}},
    {"distillation_loss": {"logit_loss": [1]}},
    [],
    "loss",
    None,
]


@pytest.mark.parametrize("recipe", WRONG_TYPES, ids=lambda recipe: str(recipe)[:60])
def test_wrong_types_in_a_recipe(recipe):
    before = time.perf_counter()
    with pytest.raises(ValueError, match="expected "):
        recipes.build(recipe)
    assert time.perf_counter() - before < 2


WRONG_EXPORTS = [
    {"layouts": "batch"},
    {"layouts": {"labels": 1}},
    {"optional_inputs": "sample_weight"},
    {"optional_inputs": [1]},
    {"per_sample": "no"},
    {"dtype": 32},
    {"directory": "/tmp"},
    {"loss": "x"},
    {"progress": "print"},
    {"anything": 1},
    [],
]


@pytest.mark.parametrize("table", WRONG_EXPORTS, ids=str)
def test_wrong_tables_of_an_export(table):
    with pytest.raises(ValueError, match="expected "):
        export_arguments({"loss": "soft_target", "export": table})


TOML_BOMBS = {
    "nested lists": "a = " + "[" * 100_000,
    "nested tables": "a = " + "{a = " * 20_000,
    "a long dotted key": ".".join("a" * 120_000) + " = 1",
    "a long dotted table": "[" + ".".join("a" * 120_000) + "]",
    "a long number": "a = " + "9" * 200_000,
    "long dotted keys": "\n".join(f"{i}." + ".".join("a" * 99) + " = 1" for i in range(1_200)),
    "many tables": "\n".join(f"[t{i}]" for i in range(25_000)),
    "too large": "#" * (recipes.MAX_SIZE + 1),
    "no text": "\udcff",
    "NUL": "\0",
}


@pytest.mark.parametrize("text", TOML_BOMBS.values(), ids=TOML_BOMBS)
def test_toml_bombs(text, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = time.perf_counter()
    with pytest.raises(ValueError, match="expected "):
        recipes.build(recipes.load(path))
    assert time.perf_counter() - before < 5


def test_the_largest_recipe_is_within_the_limit(tmp_path):
    part = {"loss": "distribution_distillation", "inputs": {"student_embeddings": "s" * 190}, "weight_name": "w" * 200}
    terms = {f"t{i:03}" + "x" * 160: {"parts": [part]} for i in range(MAX_PARTS)}
    composition = recipes.build({"terms": terms})
    assert len(recipes.dumps(composition.recipe())) < recipes.MAX_SIZE


# ---- Folders ------------------------------------------------------------------------------------


def test_verify_runs_loss_pt_only_where_it_is_trusted(exported_folder, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **keywords: loaded.append(arguments))
    report = verify(exported_folder, quick=True)
    assert report.ok and not loaded
    assert {row.engine for row in report.rows} == {"onnxruntime", "onnxruntime (C++)"}
    assert any("loss.pt is a program" in line for line in report.missing)
    assert main(["verify", str(exported_folder)]) == 0
    assert "loss.pt is a program" in capsys.readouterr().out and not loaded


def test_verify_runs_loss_pt_where_it_is_trusted(exported_folder):
    report = verify(exported_folder, quick=True, trust=True)
    assert report.ok
    assert {row.engine for row in report.rows} >= {"torch.jit", "torchscript (C++)"}


def test_load_of_what_is_not_trusted_takes_no_program(exported_folder, tmp_path):
    assert pykd.load(exported_folder, trust=False).engine == "onnxruntime"
    with pytest.raises(ValueError, match="runs a program"):
        pykd.load(exported_folder, engine="torchscript", trust=False)
    program = (exported_folder / "loss.pt").read_bytes()
    (tmp_path / "loss.onnx").write_bytes(program)
    for source in (exported_folder / "loss.pt", program, tmp_path / "loss.onnx"):
        assert pykd.load(source).engine == "torchscript"
        with pytest.raises((ValueError, OSError), match="expected "):
            pykd.load(source, trust=False)


def test_verify_of_nothing_but_a_program_runs_nothing(exported_folder, tmp_path, capsys):
    manifest = copy(exported_folder, tmp_path)
    for name in ("loss.onnx", "loss.grad.onnx"):
        del manifest["files"][name]
        (tmp_path / name).unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not verify(tmp_path).rows
    assert main(["verify", str(tmp_path)]) == 2
    assert "expected a file to run" in capsys.readouterr().err
    assert verify(tmp_path, quick=True, trust=True).ok


@pytest.mark.parametrize(
    "name", ["../loss.onnx", "/etc/passwd", "loss.onnx/../loss.onnx", "manifest.json", "", ".", "x\0"]
)
def test_a_manifest_names_files_of_its_folder_alone(exported_folder, tmp_path, name):
    manifest = copy(exported_folder, tmp_path)
    manifest["files"][name] = manifest["files"]["loss.onnx"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError,
        match=r"expected the manifest to list files out of loss.pt, loss.onnx, loss.grad.onnx, score.onnx, got",
    ):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["loss.pt", "loss.onnx", "manifest.json"])
def test_pipes_and_devices_are_no_files(exported_folder, tmp_path, name):
    copy(exported_folder, tmp_path)
    path = tmp_path / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="expected a regular file"):
        verify(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="expected a regular file"):
        verify(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="expected "):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["loss.pt", "loss.onnx", "manifest.json"])
def test_large_files_are_not_read(exported_folder, tmp_path, name):
    copy(exported_folder, tmp_path)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(1 << 33)  # sparse
    before = time.perf_counter()
    with pytest.raises(ValueError, match="expected a file of at most .* bytes"):
        verify(tmp_path)
    assert time.perf_counter() - before < 1


CHANGES = {
    "no table": lambda m: [],
    "no recipe": lambda m: {**m, "recipe": None},
    "no files": lambda m: {**m, "files": []},
    "a file without a hash": lambda m: {**m, "files": {"loss.onnx": None}},
    "a hash of another type": lambda m: {**m, "files": {"loss.onnx": {"sha256": 1}}},
    "no inputs": lambda m: {**m, "inputs": 3},
    "inputs without names": lambda m: {**m, "inputs": [{}]},
    "axes of another type": lambda m: {**m, "inputs": [{**m["inputs"][0], "axes": 3}]},
    "axes of other types": lambda m: {**m, "inputs": [{**m["inputs"][0], "axes": [1, None]}]},
    "a dtype that is no dtype": lambda m: {**m, "inputs": [{**entry, "dtype": "save"} for entry in m["inputs"]]},
    "two dtypes": lambda m: {**m, "inputs": [m["inputs"][0], {**m["inputs"][1], "dtype": "float16"}]},
    "a dtype of another type": lambda m: {**m, "inputs": [{**m["inputs"][0], "dtype": {}}]},
    "outputs of another type": lambda m: {**m, "outputs": {"loss": 1}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_wrong_manifests(exported_folder, tmp_path, change):
    manifest = copy(exported_folder, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(ValueError, match="expected "):
        verify(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "9" * 10_000, "\xff", '{"format": "pykd", "files": ' + "9" * 5000 + "}"]
)
def test_manifests_that_are_no_json(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="expected "):
        verify(tmp_path)


def test_the_longest_names_export_verify_and_load(tmp_path):
    """The limit of a recipe is the loader's: with the longest that is added to a name, 200."""
    term = "t" * (names.MAX_LENGTH - len("_temperature"))
    loss = compose({term: [Part(SoftTarget(), inputs={"student_logits": "s" * (names.MAX_LENGTH - len("grad_"))})]})
    pykd.export(loss, tmp_path, per_sample=True, progress=lambda line: None)
    assert pykd.load(tmp_path).signature.outputs[1].name == term
    for longer in ({term + "t": SoftTarget()}, {"t": [Part(SoftTarget(), inputs={"student_logits": "s" * 196})]}):
        with pytest.raises(ValueError, match="of at most 200 ASCII letters"):
            compose(longer)

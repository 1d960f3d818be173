"""What editors and type checkers know of the losses: classes, settings, functions, and no name that does not exist."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pykd.definition import registry

ROOT = Path(__file__).parents[1]


def test_the_stubs_are_up_to_date():
    for path, text in runpy.run_path(str(ROOT / "scripts" / "stubs"))["stubs"]().items():
        assert path.read_text() == text, "run `scripts/stubs`"
        for name, cls in registry.registered().items():
            assert (f"def {name}(" if "def " in text else f"import {cls.__name__} as {cls.__name__}\n") in text


# Each line with what a type checker has to say of it; nothing: it says nothing.
PROGRAM = {
    "import pykd": "",
    "from torch import ones": "",
    "loss = pykd.SoftTarget(temperature=2.0, form='kl', reduction='sum')": "",
    "pykd.SoftTarget()": "",
    "reveal_type(loss)": 'note: .*"pykd.losses.logits.soft_target.SoftTarget"',
    "reveal_type(loss.temperature)": 'note: .*"float"',
    "pykd.SoftTarget(colour=1)": 'error: .*"colour"',
    "pykd.SoftTarget(temperature='hot')": 'error: .*"str"; expected "float"',
    "pykd.MKMMD(reduction=1)": 'error: .*"int"; expected "str"',
    "pykd.SoftTargets()": 'error: .*no attribute "SoftTargets"',
    "pykd.functional.soft_target(ones(2, 3), ones(2, 3), temperature=3.0, kernels='on')": "",
    "pykd.functional.soft_target(ones(2, 3), ones(2, 3), heat=1)": 'error: .*"heat"',
    "pykd.functional.soft_targets": 'error: .*no attribute "soft_targets"',
    "reveal_type(pykd.get('KD'))": r'note: .*"type\[pykd.definition.loss.Loss\]"',
    "pykd.export(loss, 'folder')": "",
    "pykd.export(loss, 'folder', colour=1)": 'error: .*"colour"',
    "pykd.verify('folder', colour=1)": 'error: .*"colour"',
}


@pytest.mark.slow
def test_type_checkers_see_what_there_is(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("\n".join(PROGRAM))
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={tmp_path}", str(program)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    said: dict[str, str] = {}
    for number, text in re.findall(r"program\.py:(\d+): (.*)", ran.stdout):
        said.setdefault(number, text)
    for number, (line, wanted) in enumerate(PROGRAM.items(), 1):
        found = said.pop(str(number), "")
        assert re.match(wanted, found) if wanted else not found, f"{line}\n{found}\n{ran.stdout}"
    assert not said, ran.stdout

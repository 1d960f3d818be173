"""A newcomer adds a loss by adding one file: this one drops it into a package and gets every engine and check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pykd

NEW_LOSS = '''
"""Logit matching: mean squared difference of logits."""

from typing import Optional

import numpy as np
from torch import Tensor

from pykd import ops
from pykd.reference import reduce_samples
from pykd.registry import Case, Loss, Scalar, Spec, register


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    difference = (ops.upcast(student_logits) - ops.upcast(teacher_logits.detach())) / temperature
    return ops.reduce((difference * difference).mean(dim=-1), None, reduction)


@register("logit_mse")
class LogitMSE(Loss):
    r"""Mean squared difference of the logits, divided by the temperature.

    .. math:: \\\\frac1C \\\\sum_c ((s_{bc} - t_{bc}) / T)^2

    Args:
        temperature: T > 0.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"``.

    Inputs:
        student_logits: ``(batch, classes)``; receives the gradient.
        teacher_logits: ``(batch, classes)``; constant.

    Returns:
        At least 0; 0 when the logits are equal.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> LogitMSE(temperature=2.0)(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(2.)

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014, arXiv:1312.6184.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True),
        "teacher_logits": Spec("batch classes"),
    }
    scalars = {"temperature": Scalar(minimum=0.0, exclusive=True)}
    cases = (Case(), Case({"temperature": 2.0, "reduction": "sum"}))
    paper = "Ba, Caruana 2014, arXiv:1312.6184"

    def __init__(self, temperature: float = 1.0, reduction: str = "mean"):
        super().__init__(reduction, temperature=temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: Optional[float] = None) -> Tensor:
        if temperature is None:
            temperature = self.temperature
        return logit_mse(student_logits, teacher_logits, temperature, self.reduction)

    def zero_when_equal(self) -> bool:
        return True

    @staticmethod
    def reference(student_logits, teacher_logits, temperature=1.0, reduction="mean"):
        values = [np.mean(((s - t) / temperature) ** 2) for s, t in zip(student_logits, teacher_logits)]
        return reduce_samples(values, np.ones(len(values)), reduction)
'''

# The package path of the losses gains a folder; the rest is the ordinary test suite and command line.
PLUGIN = """
import pykd.losses
pykd.losses.__path__.append({folder!r})
"""


def run(arguments, plugin_folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin_folder), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )


@pytest.mark.slow
def test_one_file_is_enough(tmp_path):
    losses, plugins = tmp_path / "losses", tmp_path / "plugins"
    losses.mkdir()
    plugins.mkdir()
    (losses / "logit_mse.py").write_text(NEW_LOSS.replace("\\\\", "\\"))
    (plugins / "new_loss_plugin.py").write_text(PLUGIN.format(folder=str(losses)))

    ran = run(
        ["-m", "pytest", "-p", "new_loss_plugin", "-q", "-k", "logit_mse", "tests/test_every_loss.py", "tests/test_engines.py"],
        plugins,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = int(ran.stdout.split(" passed")[0].split()[-1])
    assert passed > 40, f"the new loss reached only {passed} tests\n{ran.stdout}"

    broken = NEW_LOSS.replace("\\\\", "\\").replace("/ temperature) ** 2)", "/ temperature))")
    (losses / "logit_mse.py").write_text(broken)
    ran = run(["-m", "pytest", "-p", "new_loss_plugin", "-q", "-k", "logit_mse", "tests/test_every_loss.py"], plugins)
    assert ran.returncode == 1 and "test_value_matches_the_reference" in ran.stdout

    (losses / "logit_mse.py").write_text(NEW_LOSS.replace("\\\\", "\\"))
    code = "import new_loss_plugin, sys; from pykd.__main__ import main; sys.exit(main(sys.argv[1:]))"
    assert "LogitMSE" in run(["-c", code, "list"], plugins).stdout
    assert "| `logit_mse` | `LogitMSE` |" in run(["-c", code, "table"], plugins).stdout
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('loss = "logit_mse"\nsettings = {temperature = 3.0}\n')
    ran = run(["-c", code, "export", "--recipe", str(recipe), "--out", str(tmp_path / "out")], plugins)
    assert ran.returncode == 0, ran.stderr
    loss = pykd.load(str(tmp_path / "out"))  # this process does not know the loss: the file is enough
    import numpy as np

    got = loss.value_and_gradient(student_logits=np.float32([[3.0, 0.0]]), teacher_logits=np.float32([[0.0, 0.0]]))
    assert got["loss"] == pytest.approx(0.5)
    np.testing.assert_allclose(got["grad_student_logits"], [[1 / 3, 0.0]], rtol=1e-6)

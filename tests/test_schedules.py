"""Schedules of temperatures and weights: their shapes, the same numbers in C++, and what a loss makes of them."""

import doctest
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pykd
from pykd import schedules
from pykd.schedules import Schedules, constant, cosine, linear, warm_up

INCLUDE = Path(__file__).parents[1] / "cpp" / "include"
STEPS = (-1.0, 0.0, 0.5, 1.0, 3.0, 7.0, 10.0, 12.5, 20.0, 1e9)


def test_the_example():
    assert doctest.testmod(schedules).attempted >= 5 and doctest.testmod(schedules).failed == 0


def test_shapes():
    for shape in (linear, cosine):
        falls = shape(4.0, 1.0, steps=10)
        assert falls(-1) == falls(0) == 4.0 and falls(10) == falls(99) == 1.0
        numbers = [falls(step) for step in range(11)]
        assert numbers == sorted(numbers, reverse=True) and math.isclose(falls(5), 2.5)
    assert linear(4.0, 1.0, 10)(1) == 3.7
    assert linear(4.0, 0.1, 10)(10) == linear(4.0, 0.1, 10)(11) == 0.1
    assert math.isclose(cosine(4.0, 1.0, 10)(1), 1 + 3 * (1 + math.cos(math.pi / 10)) / 2, rel_tol=1e-15)
    assert [constant(2.0)(step) for step in STEPS] == [2.0] * len(STEPS)
    warmed = warm_up(linear(4.0, 1.0, steps=10), steps=4, start=2.0)
    assert [warmed(step) for step in (0, 2, 4, 9, 14)] == [2.0, 3.0, 4.0, 2.5, 1.0]
    assert warm_up(constant(0.5), steps=2)(1) == 0.25


# The same in both languages.
WRITTEN = {
    "linear(4.0, 0.1, 10)": "pykd::linear(4.0, 0.1, 10)",
    "constant(2.5)": "pykd::constant(2.5)",
    "linear(4.0, 1.0, 10)": "pykd::linear(4.0, 1.0, 10)",
    "cosine(0.1, 0.7, 7)": "pykd::cosine(0.1, 0.7, 7)",
    "warm_up(cosine(4.0, 1.0, 10), 3)": "pykd::warm_up(pykd::cosine(4.0, 1.0, 10), 3)",
    "warm_up(warm_up(linear(1.0, 0.1, 5), 2.5, 0.3), 4, 9.0)": "pykd::warm_up(pykd::warm_up(pykd::linear(1.0, 0.1, 5), 2.5, 0.3), 4, 9.0)",
}
PROGRAM = """
#include <cstdio>
#include <pykd/schedules.hpp>
int main() {
  const pykd::Schedules all = {%s};
  for (double step : {%s}) {
    for (const auto& [name, number] : pykd::at(all, step)) std::printf("%%s %%.17g %%.17g\\n", name.c_str(), step, number);
  }
  const auto refused = [](auto&& make) {
    try {
      make();
    } catch (const pykd::Error& error) {
      std::printf("%%s\\n", error.what());
    }
  };
  refused([] { pykd::linear(1, 2, 0); });
  refused([] { pykd::linear(1, 2, -1e-300); });
  refused([] { pykd::cosine(1, 1.0 / 0.0, 3); });
  refused([] { pykd::warm_up(pykd::Schedule(), 3); });
  refused([] { pykd::at({{"x", pykd::Schedule()}}, 0); });
}
"""
IN_CPP = [
    "expected steps to be a number greater than 0, got 0; pass another",
    "expected steps to be a number greater than 0, got -1e-300; pass another",
    "expected end to be a finite number, got inf; pass another",
    "expected schedule to be a function of the step, got an empty one; pass one, such as pykd::constant(1)",
    "expected the schedule of x to be a function of the step, got an empty one; pass one, such as pykd::constant(1)",
]


def test_the_same_numbers_in_cpp(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None
    table = ", ".join(f'{{"s{i}", {text}}}' for i, text in enumerate(WRITTEN.values()))
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM % (table, ", ".join(map(repr, STEPS))))
    subprocess.run([compiler, "-std=c++17", "-O2", f"-I{INCLUDE}", source, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    count = len(WRITTEN) * len(STEPS)
    numbers = Schedules(**{f"s{i}": eval(text) for i, text in enumerate(WRITTEN)})
    for line in lines[:count]:
        name, step, number = line.split()
        assert math.isclose(float(number), numbers(float(step))[name], rel_tol=1e-15), line
    assert lines[count:] == IN_CPP


def test_a_loss_takes_its_numbers_from_them():
    loss = pykd.compose({"soft": (pykd.SoftTarget(temperature=4.0), 1.0)})
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    numbers = Schedules(soft_temperature=linear(4.0, 1.0, steps=3), soft_weight=constant(0.5))
    for step in range(5):
        got = loss(student_logits=student, teacher_logits=teacher, **numbers(step))["loss"]
        want = 0.5 * pykd.SoftTarget(temperature=max(4.0 - step, 1.0))(student, teacher)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(1, 2, 0), "expected steps to be a number greater than 0, got 0; pass another"),
        (lambda: cosine(1, math.inf, 3), "expected end to be a finite number, got inf; pass another"),
        (lambda: warm_up(constant(1), -1), "expected steps to be a number greater than 0, got -1; pass another"),
        (lambda: warm_up(2.0, 3), "expected schedule to be a function of the step, got 2.0; pass constant"),
        (lambda: constant("2"), "expected value to be a number, got '2'; pass a number"),
        (lambda: Schedules(x=2.0), "expected the schedule of x to be a function of the step, got 2.0; pass constant"),
        (lambda: Schedules(x=constant(2.0))(math.nan), "expected step to be a finite number, got nan; pass another"),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

"""How far an answer is from the one of float64."""

import math

import torch
from torch import Tensor


def multiple(values: Tensor, want: Tensor, bound: Tensor | float) -> float:
    """The largest error as a multiple of what is allowed; infinite where a NaN or an infinity is missing or new."""
    values = values.double()
    error = (values - want).abs() / bound
    same = (values == want) | (values.isnan() & want.isnan())
    return float(torch.where(same, 0.0, torch.where(error.isnan(), math.inf, error)).max())

"""The variance-preserving noise that score networks on parameters are trained with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0


def beta(t: Any) -> Any:
    """Rate of the variance-preserving SDE d theta = -beta/2 theta dt + sqrt(beta) dw, linear in t in [0, 1]."""
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def alpha_bar(t: Any) -> Any:
    """Squared signal level exp(-int_0^t beta); theta_t = sqrt(alpha_bar) theta_0 + sqrt(1 - alpha_bar) e."""
    integral = BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t * t
    return torch.exp(-integral) if isinstance(t, Tensor) else math.exp(-integral)

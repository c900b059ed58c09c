"""The learning rate of a step: linear warm-up, then half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5)."""

from __future__ import annotations

import math

from estimator.describe.checks import ConfigError


def lr_cosine_schedule(t: int, lr_max: float, lr_min: float, t_w: int, t_c: int) -> float:
    """The learning rate at step `t`, counted from 0.

    Up to `t_w` it rises as t / t_w to `lr_max`; from there half a cosine takes it down to `lr_min` at `t_c`, where it
    stays. A warm-up of no steps (t_w = 0) starts at `lr_max`, a cosine of no steps (t_c = t_w) is over when it begins:
    neither divides by its length.

    Args:
        t: the step, at least 0.
        lr_max: the learning rate at the end of the warm-up, at least lr_min.
        lr_min: the learning rate from t_c on, at least 0.
        t_w: steps of warm-up, at least 0.
        t_c: the step at which the cosine ends, at least t_w.

    Raises:
        ConfigError: an argument is out of its range.
    """
    if not t >= 0:
        raise ConfigError(f"t = {t!r}: must be at least 0")
    if not 0 <= lr_min < math.inf:
        raise ConfigError(f"lr_min = {lr_min!r}: must be at least 0 and finite")
    if not lr_min <= lr_max < math.inf:
        raise ConfigError(f"lr_max = {lr_max!r}: must be at least lr_min ({lr_min!r}) and finite")
    if not t_w >= 0:
        raise ConfigError(f"t_w = {t_w!r}: must be at least 0")
    if not t_c >= t_w:
        raise ConfigError(f"t_c = {t_c!r}: must be at least t_w ({t_w!r})")
    if t < t_w:
        return lr_max * t / t_w
    if t >= t_c:
        return lr_min
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * (t - t_w) / (t_c - t_w)))

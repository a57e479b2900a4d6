"""How far r and d may go at a given step: the clip limits r_max(t) and d_max(t)."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import ClassVar, NoReturn, overload

import torch
from torch import Tensor

_FLOAT32_MAX = 3.4028234663852886e38
_FOR_EVER = 2.0**61  # batches: the operators count in 64 bits


@dataclass(frozen=True)
class ClipSchedule:
    """The clip limits of Batch Renormalization as a function of the number of batches seen, t.

    Until ``hold`` the limits are closed (r_max = 1, d_max = 0: the layer is BatchNorm). Then r_max(t) rises linearly
    from 1 and reaches ``r_max`` at ``hold + r_ramp``; d_max(t) rises from 0 and reaches ``d_max`` at ``hold + d_ramp``.
    There each stops. A ramp of 0 steps opens the limit at once.

    The defaults are the paper's (Ioffe 2017, section 4.1): hold 5,000 steps, r_max 3 at 40,000, d_max 5 at 25,000.

    Args:
        r_max: final limit of r, at least 1; ``inf`` for none (its ramp must then be 0).
        d_max: final limit of abs(d), at least 0; ``inf`` for none (its ramp must then be 0).
        hold: steps before the limits open.
        r_ramp: steps r_max takes from 1 to its final value.
        d_ramp: steps d_max takes from 0 to its final value.

    Raises:
        ValueError: a limit below its neutral value or NaN; a duration that is negative, not finite or not whole.
    """

    adapts: ClassVar[bool] = False  # whether the limits follow the layer's statistics, not its steps

    r_max: float = 3.0
    d_max: float = 5.0
    hold: int = 5_000
    r_ramp: int = 35_000
    d_ramp: int = 20_000

    def __post_init__(self) -> None:
        check_limits(self.r_max, self.d_max)
        for name in ("hold", "r_ramp", "d_ramp"):
            steps = getattr(self, name)
            if not (is_number(steps) and math.isfinite(steps) and steps >= 0 and steps == int(steps)):
                raise ValueError(f"{name} must be a whole, non-negative, finite number of steps, got {steps!r}")
            object.__setattr__(self, name, int(steps))
        for limit, ramp in (("r_max", "r_ramp"), ("d_max", "d_ramp")):
            if math.isinf(getattr(self, limit)) and getattr(self, ramp) > 0:
                raise ValueError(f"{ramp} must be 0 when {limit} is infinite, got {getattr(self, ramp)}")

    @classmethod
    def paper(cls) -> ClipSchedule:
        """The schedule of the paper's ImageNet training."""
        return cls()

    @classmethod
    def constant(cls, r_max: float, d_max: float) -> ClipSchedule:
        """These limits from the first step on."""
        return cls(r_max, d_max, hold=0, r_ramp=0, d_ramp=0)

    @classmethod
    def batchnorm(cls) -> ClipSchedule:
        """Limits that stay closed: the layer is BatchNorm for ever."""
        return cls.constant(1.0, 0.0)

    @classmethod
    def unclipped(cls) -> ClipSchedule:
        """No limits: training normalizes by the running statistics, as evaluation does."""
        return cls.constant(math.inf, math.inf)

    @classmethod
    def for_training(cls, total_steps: int) -> ClipSchedule:
        """The paper's schedule scaled to a training of ``total_steps``.

        Limits are closed for 1/32 of the training, d reaches its limit at 5/32 and r at 1/4, so that
        ``for_training(160_000)`` is ``paper()``.
        """
        if not (is_number(total_steps) and math.isfinite(total_steps) and total_steps >= 1):
            raise ValueError(f"total_steps must be a finite number of at least 1, got {total_steps!r}")
        paper = cls.paper()
        hold, r_ramp, d_ramp = (round(n * total_steps / 160_000) for n in (paper.hold, paper.r_ramp, paper.d_ramp))
        return cls(hold=hold, r_ramp=r_ramp, d_ramp=d_ramp)

    @classmethod
    def auto(cls) -> ClipSchedule:
        """No hyperparameters: each channel's limits are as wide as the noise of its own batch statistics.

        Where batches are large and alike the layer is all but BatchNorm; where they are small or one-sided the limits
        open by themselves, after 10 batches at the soonest; where weights move faster than running statistics follow,
        the lag is clipped. Running statistics start with the first batch's and reach the layer's ``momentum`` within
        3/momentum steps, so that a short training needs no other momentum than a long one. The rule and measurements:
        ``docs/auto-schedule.md``. A layer keeps what it needs in the buffer ``auto_state``, (5, C).
        """
        return _AutoSchedule.constant(1.0, 0.0)

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """``(r_max, d_max, hold, r_ramp, d_ramp)`` as floats, the form the operators take."""
        hold, r_ramp, d_ramp = (min(float(each), _FOR_EVER) for each in (self.hold, self.r_ramp, self.d_ramp))
        return (float(self.r_max), float(self.d_max), hold, r_ramp, d_ramp)

    @overload
    def limits(self, step: int) -> tuple[float, float]: ...
    @overload
    def limits(self, step: Tensor, dtype: torch.dtype = ...) -> tuple[Tensor, Tensor]: ...

    def limits(
        self, step: int | Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """``(r_max, d_max)`` in force while ``step`` batches have been seen before this one.

        Args:
            step: a Python int, or an integer tensor of any shape (``num_batches_tracked``), which is computed with on
                its own device, without a synchronization.
            dtype: of the limits returned for a tensor.

        Returns:
            Two floats for an int, two tensors of ``step``'s shape for a tensor.
        """
        if isinstance(step, Tensor):
            return limits_at(step, self.numbers, dtype)
        r_max, d_max = limits_at(torch.tensor(step), self.numbers, torch.float64)
        return r_max.item(), d_max.item()


@dataclass(frozen=True, repr=False)
class _AutoSchedule(ClipSchedule):
    """``ClipSchedule.auto()``. Its numbers are closed limits."""

    adapts: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "ClipSchedule.auto()"

    def limits(self, step: int | Tensor, dtype: torch.dtype = torch.float32) -> NoReturn:
        """Raise ``ValueError``: there are none by steps."""
        raise ValueError(
            "ClipSchedule.auto() has no limits that depend on the step: each channel of a layer has its own, which "
            "follow its statistics (layer.auto_limits())"
        )


def check_limits(r_max: float, d_max: float) -> None:
    """Raise ``ValueError`` unless r_max >= 1 and d_max >= 0, both infinite or within float32."""
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not (is_number(limit) and limit >= least):
            raise ValueError(f"{name} must be a number of at least {least}, got {limit!r}")
        if _FLOAT32_MAX < limit < math.inf:
            raise ValueError(f"{name} must be infinite or fit float32, got {limit!r}")


def is_number(value: object) -> bool:
    """Whether it is a real number: Python's or NumPy's, no tensor."""
    return isinstance(value, (int, float)) or isinstance(value, numbers.Real)


def limits_at(step: Tensor, numbers: tuple[float, ...] | list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The schedule ``numbers`` at ``step`` (integer tensor), on its device: ``(r_max, d_max)`` in ``dtype``."""
    r_max, d_max, hold, r_ramp, d_ramp = numbers
    return _ramp(step, 1.0, r_max, hold, r_ramp, dtype), _ramp(step, 0.0, d_max, hold, d_ramp, dtype)


def _ramp(step: Tensor, closed: float, final: float, hold: float, ramp: float, dtype: torch.dtype) -> Tensor:
    since = step - int(hold)  # in integers: exact however long the training
    value = torch.full(step.shape, final, dtype=dtype, device=step.device)
    if ramp > 0:
        fraction = since.to(dtype) / ramp
        value = torch.where(since < int(ramp), closed + (final - closed) * fraction, value)
    return torch.where(since < 0, closed, value)

"""What is compared in every experiment: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from brn_kernels import ClipSchedule, convert_batchnorm

Schedule = Callable[[int], ClipSchedule]  # of the number of steps


@dataclass(frozen=True)
class Candidate:
    """A normalization: BatchNorm where there is no schedule."""

    name: str
    momentum: float
    schedule: Schedule | None = None

    def put_into(self, model: nn.Module, steps: int, masked: bool = False) -> nn.Module:
        """Give all BatchNorm layers of ``model`` this normalization, in place, for a training of ``steps``.

        BatchNorm that must leave masked values out is our layer with limits that stay closed: PyTorch's takes no mask.
        """
        schedule = self.schedule or ((lambda _: ClipSchedule.batchnorm()) if masked else None)
        if schedule is not None:
            return convert_batchnorm(model, schedule=schedule(steps), momentum=self.momentum)
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.momentum = self.momentum
        return model


def table(*candidates: Candidate) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in candidates}


BN, PAPER, AUTO = "BN, 0.1", "BRN, scaled, 0.01", "BRN, auto, 0.01"
CANDIDATES = table(
    Candidate(BN, 0.1),
    Candidate("BN, 0.01", 0.01),
    Candidate(PAPER, 0.01, ClipSchedule.for_training),
    Candidate("BRN, scaled, 0.1", 0.1, ClipSchedule.for_training),
    Candidate("BRN, (3, 5), 0.01", 0.01, lambda steps: ClipSchedule.constant(3.0, 5.0)),
    Candidate(AUTO, 0.01, lambda steps: ClipSchedule.auto()),
)
JUDGED = {PAPER: "the paper's schedule and momentum", AUTO: "automatic limits"}
COLORS: dict[str, Any] = dict(
    zip(CANDIDATES, ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#CC79A7", "#009E73"), strict=True)
)  # told apart by colour-blind eyes too

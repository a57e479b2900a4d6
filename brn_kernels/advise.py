"""``brn.advise``: is BatchNorm enough for this model and these batches, or is it Batch Renormalization?

How far batch means stray from the population's is split three ways, channel by channel, in population standard
deviations: the variance of the sample means over N is what independent samples would give (exactly, however correlated
the pixels of a sample are); the rest is the batches' composition, and a trend over time so far as successive batches
differ by less than any two (von Neumann's mean squared successive difference).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .advise_collect import Collected, Observation, collect
from .advise_measure import LayerAdvice, in_all, summarize
from .advise_rule import Statement, caution, decide, recommend
from .modules import BatchRenorm

LEAST_BATCHES = 8  # fewer give no between-batch variance worth the name


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` found; ``print`` it.

    Attributes:
        choice: ``"BatchNorm"`` or ``"Batch Renormalization"``.
        momentum: of the running statistics.
        r_max: final limit of r, 1 with BatchNorm.
        d_max: final limit of d, 0 with BatchNorm.
        code: a line of Python that does it.
        statements: what is said, each with its number and its reason; the first says why this choice.
        overall: the layers' root mean squares, under the name ``"all"``.
        layers: one entry per layer.
        batches: how many were run.
        notes: what was left out of the measurement, and where the advice is not certain.
    """

    choice: str
    momentum: float
    r_max: float
    d_max: float
    code: str
    statements: tuple[Statement, ...]
    overall: LayerAdvice
    layers: tuple[LayerAdvice, ...]
    batches: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from .advise_report import as_text

        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it in dictionaries, lists, strings and numbers (``None`` for what is not finite)."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def figure(self, path: str | Path) -> None:
        """Draw noise, composition and trend of each layer into ``path`` (.png, .svg, .pdf). Needs matplotlib."""
        from .advise_figure import draw

        draw(self, path)


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int = 48,
    total_steps: int | None = None,
) -> Advice:
    """Say whether BatchNorm is enough for ``model`` on ``batches``, or Batch Renormalization should be used, and how.

    Runs batches in training mode without gradients, Batch Renormalization layers with closed limits: as BatchNorm does.
    Parameters, gradients, buffers, training flags, hooks and the global random number generators are as before
    afterwards, also if something raises. Batches are of this process alone: where a layer pools those of several, the
    real noise is smaller.

    Args:
        model: has ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm`` or Batch Renormalization layers.
        batches: composed as in training and in its order (a data loader): tensors, ``(input, ...)``, or dicts with an
            input, the samples in the first dimension. Taken to the model's device.
        forward: called as ``forward(model, batch)`` instead of ``model(input)``.
        max_batches: so many are run.
        total_steps: of the training, for the schedule; the line of code leaves it open otherwise.

    Raises:
        ValueError: a number out of its range; a model without such layers or with lazy ones; no input to be told in a
            batch; fewer than 8 batches that can be used; batches of one sample.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < LEAST_BATCHES:
        raise ValueError(f"max_batches must be a whole number of at least {LEAST_BATCHES}, got {max_batches!r}")
    if total_steps is not None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
    collected = collect(model, batches, forward, max_batches)
    usable = _usable(collected)
    summaries = {name: summarize(name, seen) for name, seen in usable.items()}
    layers = tuple(layer for layer in summaries.values() if layer is not None)
    if not layers:
        raise ValueError("the inputs of all layers are constant")
    overall = in_all(layers)
    choice, why = decide(layers, overall, min(len({o.batch for o in seen}) for seen in usable.values()))
    renorm = any(isinstance(module, BatchRenorm) for module in model.modules())
    recommended = recommend(choice, overall, renorm, total_steps)
    notes = []
    if collected.left_out:
        notes.append(f"{collected.left_out} batches with fewer than two values per channel were left out")
    if collected.not_finite:
        notes.append(f"{collected.not_finite} inputs of layers with NaN or Inf were left out")
    careful = caution(choice, layers)
    if careful:
        notes.append(careful)
    again = [name for name, seen in usable.items() if len({o.batch for o in seen}) < len(seen)]
    if again:
        notes.append(f"what differs between the calls of a layer counts as composition: {', '.join(again)}")
    constant = [name for name, layer in summaries.items() if layer is None]
    if constant:
        notes.append(f"layers with constant inputs were left out: {', '.join(constant)}")
    return Advice(
        choice=choice,
        momentum=recommended.momentum,
        r_max=recommended.r_max,
        d_max=recommended.d_max,
        code=recommended.code,
        statements=(why, *recommended.statements),
        overall=overall,
        layers=layers,
        batches=collected.batches,
        notes=tuple(notes),
    )


def _usable(collected: Collected) -> dict[str, list[Observation]]:
    """The observations of more than one sample, of the layers with enough of them."""
    if collected.batches == 0:
        raise ValueError("batches yielded nothing")
    several = {name: [o for o in seen if o.samples > 1] for name, seen in collected.layers.items()}
    kept = {name: seen for name, seen in several.items() if len({o.batch for o in seen}) >= LEAST_BATCHES}
    if kept:
        return kept
    if collected.not_finite:
        raise ValueError(f"{collected.not_finite} inputs of layers held NaN or Inf, and too few did not")
    if not any(several.values()) and (collected.left_out or any(collected.layers.values())):
        raise ValueError("batches of one sample: what differs between samples and between batches cannot be told apart")
    if not collected.layers:
        raise ValueError("no normalization layer was called in training mode")
    most = max(len({o.batch for o in seen}) for seen in several.values())
    raise ValueError(f"at least {LEAST_BATCHES} batches of two samples or more are needed, got {most}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

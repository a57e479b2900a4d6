"""``ClipMonitor``: how often r and d are clipped, layer by layer, while a model trains."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import observe
from .backends import auto_limits
from .modules import BatchRenorm
from .schedule import limits_at

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SHARES = ("clipped_r", "clipped_d", "not_finite", "hits")
COLUMNS = (*_SHARES, *(f"{name}_{round(100 * q)}" for name in ("r", "d") for q in QUANTILES))


class ClipMonitor:
    """Watches the Batch Renormalization layers of a model: the share of channels clipped, the quantiles of r and d.

    Nothing is read from the device until it is asked for, so that a step does not wait; what is kept are a few numbers
    for each call that is looked at. Use it as a context manager, or call :meth:`close`.

    For each training call of a layer that is looked at, over its channels, with r and d from before they are clipped::

        clipped_r, clipped_d   the share clipped in r, and in d
        not_finite             the share whose batch statistics are NaN or infinite; it counts as clipped in neither
        hits                   the share in which the prediction (limits open, and not clipped at the call before) was
                               right, so that the Triton kernels needed no second pass
        r_5 ... d_95           quantiles of r and d, in percent

    Evaluation is not looked at, nor is the second run of a checkpointed region. Calls inside compiled code, in
    CUDA graphs and under ``torch.func`` transforms are not seen: monitor the model before that.

    Args:
        model: whose layers are watched: those it has now.
        every: only each so-manieth call of a layer is looked at.
        history: calls of a layer that are kept; older ones are dropped.

    Raises:
        ValueError: the model has no Batch Renormalization layer with running statistics, or a number is below 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 10, history: int = 1000) -> None:
        for name, number in (("every", every), ("history", history)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        self.layers = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, BatchRenorm) and module.running_mean is not None
        }
        if not self.layers:
            raise ValueError(
                "the model has no Batch Renormalization layer: convert it with brn_kernels.convert_batchnorm"
            )
        self.every = every
        self._calls = dict.fromkeys(self.layers, 0)
        self._kept: dict[str, deque[tuple[int, Tensor]]] = {name: deque(maxlen=history) for name in self.layers}
        observe.observers.append(self)

    def __enter__(self) -> ClipMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; what was seen can still be read."""
        if self in observe.observers:
            observe.observers.remove(self)

    def reset(self) -> None:
        """Forget what was seen."""
        for name in self.layers:
            self._calls[name] = 0
            self._kept[name].clear()

    def begin(self, before: observe.Before) -> Callable[[Tensor], None] | None:
        """See ``observe.Observer``."""
        name = next((name for name, m in self.layers.items() if m.running_mean is before.running_mean), None)
        if name is None or (before.running_mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        call = self._calls[name]
        self._calls[name] += 1
        if call % self.every:
            return None
        with torch.no_grad():
            running_std = torch.sqrt(before.running_var + before.eps)
            return functools.partial(
                self._end, name, call, before.running_mean.clone(), running_std, _limits(before),
                None if before.clipped is None else before.clipped.clone(),
            )  # fmt: skip

    @torch.no_grad()
    def _end(
        self,
        name: str,
        call: int,
        running_mean: Tensor,
        running_std: Tensor,
        limits: tuple[Tensor, Tensor],
        clipped_before: Tensor | None,
        saved: Tensor,
    ) -> None:
        batch_mean, inv_std, _, _ = saved.unbind()
        r_max, d_max = limits
        r, d = 1 / (inv_std * running_std), (batch_mean - running_mean) / running_std
        finite = torch.isfinite(r) & torch.isfinite(d)
        clipped_r, clipped_d = finite & ((r > r_max) | (r < 1 / r_max)), finite & (d.abs() > d_max)
        predicted = ((r_max > 1) & (d_max > 0)).expand_as(finite)
        if clipped_before is not None:
            predicted = predicted & ~clipped_before
        hits = predicted == (finite & ~clipped_r & ~clipped_d)
        shares = torch.stack([clipped_r, clipped_d, ~finite, hits]).to(saved.dtype).mean(1)
        both = torch.where(finite, torch.stack([r, d]), torch.nan)
        quantiles = torch.nanquantile(both, _quantiles(both.dtype, both.device), dim=1)
        self._kept[name].append((call, torch.cat([shares, quantiles.T.flatten()])))

    def rows(self) -> list[dict[str, Any]]:
        """What was seen, oldest first: ``layer``, ``call`` (from 0), and the numbers above. Reads from the device."""
        kept = [(name, call, row) for name, rows in self._kept.items() for call, row in rows]
        if not kept:
            if not any(self._calls.values()):
                warnings.warn("no training call was seen; those of compiled code and CUDA graphs are not", stacklevel=2)
            return []
        values = torch.stack([row.double().to(kept[0][2].device) for _, _, row in kept]).tolist()
        return [
            {"layer": name, "call": call} | dict(zip(COLUMNS, numbers, strict=True))
            for (name, call, _), numbers in zip(kept, values, strict=True)
        ]

    def means(self) -> dict[str, dict[str, float]]:
        """For each layer that was seen the means of its numbers over the calls kept."""
        by_layer: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows():
            by_layer.setdefault(row["layer"], []).append(row)
        return {
            name: {column: sum(row[column] for row in rows) / len(rows) for column in COLUMNS}
            for name, rows in by_layer.items()
        }

    def table(self) -> str:
        """The means as text, a line for each layer; needs tabulate."""
        from tabulate import tabulate

        shown = (*_SHARES, "r_5", "r_50", "r_95", "d_5", "d_50", "d_95")
        lines = [[name, *(numbers[column] for column in shown)] for name, numbers in self.means().items()]
        return tabulate(lines, ["layer", *shown], floatfmt=".3f")

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | Path) -> None:
        """Draw shares and quantiles over the calls, a line for each layer; needs matplotlib."""
        from matplotlib.figure import Figure

        panels = {
            "clipped in r, share": ("clipped_r",), "clipped in d, share": ("clipped_d",),
            "right predictions, share": ("hits",), "r: 5, 50, 95 %": ("r_5", "r_50", "r_95"),
            "d: 5, 50, 95 %": ("d_5", "d_50", "d_95"),
        }  # fmt: skip
        rows = self.rows()
        figure = Figure(figsize=(8, 12), layout="constrained")
        for axes, (title, columns) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
            for index, name in enumerate(dict.fromkeys(row["layer"] for row in rows)):
                of_layer = [row for row in rows if row["layer"] == name]
                for column in columns:
                    label = name if column == columns[0] and len(self.layers) <= 12 else None
                    calls, values = [row["call"] for row in of_layer], [row[column] for row in of_layer]
                    axes.plot(calls, values, color=f"C{index % 10}", linewidth=1, label=label)
            axes.set_title(title, loc="left")
        axes.set_xlabel("call of the layer")
        if rows and len(self.layers) <= 12:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(path)

    def write(self, writer: Any, step: int) -> None:
        """Each layer's newest numbers as scalars of a ``torch.utils.tensorboard.SummaryWriter``."""
        newest = {row["layer"]: row for row in self.rows()}
        for name, row in newest.items():
            for column in COLUMNS:
                writer.add_scalar(f"batch_renorm/{name}/{column}", row[column], step)


@functools.cache
def _quantiles(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(QUANTILES, dtype=dtype, device=device)  # once: this waits for a GPU


def _limits(before: observe.Before) -> tuple[Tensor, Tensor]:
    """r_max and d_max of the call: 0-d, or (C,) each."""
    dtype = torch.float64 if before.running_var.dtype == torch.float64 else torch.float32
    if before.auto_state is not None:
        r_max, d_max = auto_limits.limits_of(before.auto_state, dtype).unbind()
    elif before.limits is not None:
        r_max, d_max = before.limits.to(dtype, copy=True).unbind()
    else:
        step = before.num_batches_tracked
        step = torch.zeros((), dtype=torch.long, device=before.running_mean.device) if step is None else step
        r_max, d_max = limits_at(step, before.schedule, dtype)
    return r_max, d_max

"""``ClipMonitor``: how often r and d are clipped, layer by layer, while a model trains."""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import observe
from .backends import auto_limits
from .modules import BatchRenorm
from .schedule import limits_at

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SHARES = ("clipped_r", "clipped_d", "not_finite", "hits")
COLUMNS = (*_SHARES, *(f"{name}_{round(100 * q)}" for name in ("r", "d") for q in QUANTILES))
_ROUNDING = 16  # times the dtype's precision
_WAITING_VALUES = 2**21  # of calls whose numbers are computed later, all at once: 8 MB in float32


class _Seen(NamedTuple):
    """A call that was looked at: copies from before it (3 launches), and what it found."""

    name: str
    number: int
    statistics: Tensor  # (2, C): running mean, running variance
    clipped: Tensor | None
    limits: Tensor | None  # auto_state (5, C), or (r_max, d_max), or the counter
    kind: tuple[Any, ...]  # how to read ``limits``, and what else calls must share to be computed together
    saved: Tensor  # (4, C)


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
        ValueError: ``model`` is no module, or has no Batch Renormalization layer with running statistics; a number is
            below 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 10, history: int = 1000) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, number in (("every", every), ("history", history)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
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
        self._names: dict[int, str] = {}  # of layers, by the identity of their running mean
        # of the calls kept: its number, and the row of a tensor in which its numbers are
        self._kept: dict[str, deque[tuple[int, Tensor, int]]] = {name: deque(maxlen=history) for name in self.layers}
        self._waiting: dict[Any, list[_Seen]] = {}  # by stream
        self._waiting_values = 0
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
        self._drop_waiting()

    def begin(self, before: observe.Before) -> Callable[[Tensor], None] | None:
        """See ``observe.Observer``."""
        name = self._name_of(before.running_mean)
        if name is None or (before.running_mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        call = self._calls[name]
        self._calls[name] += 1
        if call % self.every:
            return None
        with torch.no_grad():
            copies = torch.stack([before.running_mean, before.running_var])
            clipped = None if before.clipped is None else before.clipped.clone()
            limits = _what_limits_depend_on(before)
            limits = None if limits is None else limits.clone()
        return functools.partial(self._end, name, call, copies, clipped, limits, _kind(before))

    def _name_of(self, running_mean: Tensor) -> str | None:
        name = self._names.get(id(running_mean))
        if name is not None and self.layers[name]._buffers["running_mean"] is running_mean:
            return name
        for name, layer in self.layers.items():  # the first time, and after a layer got other tensors
            if layer._buffers["running_mean"] is running_mean:
                self._names[id(running_mean)] = name
                return name
        return None

    def _end(
        self,
        name: str,
        call: int,
        statistics: Tensor,
        clipped: Tensor | None,
        limits: Tensor | None,
        kind: tuple[Any, ...],
        saved: Tensor,
    ) -> None:
        seen = _Seen(name, call, statistics, clipped, limits, (*kind, saved.shape, saved.dtype), saved)
        stream = torch.cuda.current_stream(saved.device) if saved.is_cuda else saved.device
        self._waiting.setdefault(stream, []).append(seen)
        self._waiting_values += statistics.numel() + saved.numel()
        if self._waiting_values > _WAITING_VALUES:
            self._compute_waiting()

    def _drop_waiting(self) -> None:
        self._waiting, self._waiting_values = {}, 0

    @torch.no_grad()
    def _compute_waiting(self) -> None:
        """The numbers of all calls that wait: calls alike together, so that a call costs few launches."""
        waiting = self._waiting
        self._drop_waiting()
        for stream, calls in waiting.items():
            alike: dict[tuple[Any, ...], list[_Seen]] = {}
            for seen in calls:
                alike.setdefault(seen.kind, []).append(seen)
            with torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext():
                numbers = {kind: _numbers(group) for kind, group in alike.items()}
            rows = dict.fromkeys(alike, 0)
            for seen in calls:
                self._kept[seen.name].append((seen.number, numbers[seen.kind], rows[seen.kind]))
                rows[seen.kind] += 1

    def rows(self) -> list[dict[str, Any]]:
        """What was seen, oldest first: ``layer``, ``call`` (from 0), and the numbers above. Reads from the device."""
        if not any(self._calls.values()):
            warnings.warn("no training call was seen; those of compiled code and CUDA graphs are not", stacklevel=2)
        self._compute_waiting()
        for device in {numbers.device for calls in self._kept.values() for _, numbers, _ in calls}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # they may be of other streams than the current one
        read: dict[int, list[list[float]]] = {}
        found = []
        for name, calls in self._kept.items():
            for call, numbers, row in calls:
                if id(numbers) not in read:
                    read[id(numbers)] = numbers.tolist()
                found.append({"layer": name, "call": call} | dict(zip(COLUMNS, read[id(numbers)][row], strict=True)))
        return found

    def means(self) -> dict[str, dict[str, float]]:
        """For each layer that was seen the means of its numbers over the calls kept, those that have the number."""
        by_layer: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows():
            by_layer.setdefault(row["layer"], []).append(row)
        return {
            name: {column: _mean([row[column] for row in rows]) for column in COLUMNS}
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


def _mean(values: list[float]) -> float:
    """Without NaN, which a call has for quantiles if none of its channels is finite."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _what_limits_depend_on(before: observe.Before) -> Tensor | None:
    if before.auto_state is not None:
        return before.auto_state
    return before.num_batches_tracked if before.limits is None else before.limits


def _kind(before: observe.Before) -> tuple[Any, ...]:
    how = "auto" if before.auto_state is not None else "given" if before.limits is not None else "schedule"
    return how, tuple(before.schedule), before.eps, before.clipped is None, before.num_batches_tracked is None


def _numbers(calls: list[_Seen]) -> Tensor:
    """(calls, len(COLUMNS)), of calls of one kind."""
    running_mean, running_var = torch.stack([seen.statistics for seen in calls], 1)
    batch_mean, inv_std, clipped_to_r, clipped_to_d = torch.stack([seen.saved for seen in calls], 1)
    r_max, d_max = _limits(calls, inv_std.dtype)
    running_std = torch.sqrt(running_var + calls[0].kind[2])
    r, d = 1 / (inv_std * running_std), (batch_mean - running_mean) / running_std
    finite = torch.isfinite(r) & torch.isfinite(d)
    clipped_r, clipped_d = finite & _differ(r, clipped_to_r), finite & _differ(d, clipped_to_d)
    predicted = ((r_max > 1) & (d_max > 0)).expand_as(finite)
    if calls[0].clipped is not None:
        predicted = predicted & ~torch.stack([seen.clipped for seen in calls if seen.clipped is not None])
    hits = predicted == (finite & ~clipped_r & ~clipped_d)
    shares = torch.stack([clipped_r, clipped_d, ~finite, hits], 1).to(r.dtype).mean(2)
    both = torch.where(finite, torch.stack([r, d]), torch.nan)
    quantiles = torch.nanquantile(both, _quantiles(both.dtype, both.device), dim=2)  # (quantiles, 2, calls)
    return torch.cat([shares, quantiles.permute(2, 1, 0).flatten(1)], 1)


def _differ(found: Tensor, clipped_to: Tensor) -> Tensor:
    """Where the call used another number than this one, which is computed again and may be rounded otherwise."""
    return (found - clipped_to).abs() > _ROUNDING * torch.finfo(found.dtype).eps * found.abs()


def _limits(calls: list[_Seen], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """r_max and d_max of each call: (calls, 1) or (calls, C) each."""
    how, schedule = calls[0].kind[:2]
    given = [seen.limits for seen in calls if seen.limits is not None]
    if how == "auto":
        r_max, d_max = auto_limits.limits_of(torch.stack(given, 1), dtype).unbind()
        return r_max, d_max
    if how == "given":
        r_max, d_max = torch.stack(given, 1).to(dtype)[:, :, None].unbind()
        return r_max, d_max
    if not given:  # no counter
        given = [torch.zeros((), dtype=torch.long, device=calls[0].saved.device)] * len(calls)
    return limits_at(torch.stack(given).view(-1, 1), schedule, dtype)

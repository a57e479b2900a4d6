"""Activation checkpointing: the second run of a forward sees the running statistics the first one saw.

A checkpointed region runs twice per step: once for its output, and again inside the backward, to rebuild what the
first run did not keep. The training output depends on the running statistics from before the update, so the second
run needs those, and must not update again. ``pre_update_statistics`` keeps a copy (a few small tensors) of them
whenever a call may be run again, and hands it out when one is.

How a call is recognized, without synchronizing and without knowing the checkpointing code:

- The first run of ``use_reentrant=False`` happens under saved-tensor hooks, that of ``use_reentrant=True`` under
  no_grad. Any other call with gradients pays nothing.
- The second run happens while the autograd engine executes a node of the graph. Nodes are numbered as they are made:
  a call under hooks lies in the region of the executing node and was made no later than it; calls under no_grad
  were made after the region's node and before any later region's. Within a region they come in the same order again.
- Each thread numbers for itself, and on a GPU a backward runs in a thread of its own. What a backward runs again under
  no_grad (nested ``use_reentrant=True``) is therefore kept apart by the backward that made it: only one within that
  can ask for it, and with that it goes.
- Copies live as long as the graph: they hang on its unpack hook (the newest ``_HOOKED_CALLS_KEPT`` of each layer, as a
  hook may outlive its graph). Those made under no_grad have no graph to hang on; the newest ``_NO_GRAD_CALLS_KEPT`` of
  each layer are kept. A second run whose copy is gone raises.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import recompute

_NO_GRAD_CALLS_KEPT = 64
_HOOKED_CALLS_KEPT = 1024

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Call(NamedTuple):
    sequence: int  # of the autograd nodes, when the call was made
    statistics: Statistics  # copies from before its update
    graph_task: int  # the backward in which it was made; -1: none


class _Calls(deque[_Call]):
    """The newest calls; ``dropped`` is the sequence number of the last one that had to make room."""

    dropped = -1

    def append(self, call: _Call) -> None:
        if len(self) == self.maxlen:
            self.dropped = self[0].sequence
        super().append(call)


class _Log:
    """The calls of one layer that may be run again."""

    def __init__(self) -> None:
        self.under_hooks: weakref.WeakKeyDictionary[Callable[..., Any], _Calls] = weakref.WeakKeyDictionary()
        self.under_no_grad: dict[int, _Calls] = {}  # by the backward in which they were made
        self._run = (0, 0)  # the backward and the region now run again ...
        self._runs_in_region = 0  # ... and how many of its calls have been

    def add(self, call: _Call, unpack_hook: Callable[..., Any] | None) -> None:
        try:
            calls = None if unpack_hook is None else self.under_hooks.setdefault(
                unpack_hook, _Calls(maxlen=_HOOKED_CALLS_KEPT)
            )  # fmt: skip
        except TypeError:  # a hook that cannot be referred to weakly
            calls = None
        if calls is None and call.graph_task == -1:
            for failed in [task for task in self.under_no_grad if task != -1]:  # what raised has not called back
                del self.under_no_grad[failed]
        if calls is None and call.graph_task not in self.under_no_grad:
            self.under_no_grad[call.graph_task] = _Calls(maxlen=_NO_GRAD_CALLS_KEPT)
            if call.graph_task != -1:
                forget = functools.partial(self._forget, call.graph_task)
                torch.autograd.Variable._execution_engine.queue_callback(forget)
        (self.under_no_grad[call.graph_task] if calls is None else calls).append(call)

    def _forget(self, graph_task: int) -> None:
        self.under_no_grad.pop(graph_task, None)

    def first_run(self, graph_task: int, under_hooks: bool) -> Statistics | None:
        """The statistics of the call that is being run again; None if no such call is known."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return None
        now = node._sequence_nr()
        hooked = [calls for calls in self.under_hooks.values() if calls]
        enclosing = max((task for task in self.under_no_grad if task < graph_task), default=None)
        ungraded = _Calls() if enclosing is None else self.under_no_grad[enclosing]
        region, later = _made_by(now, hooked), _made_after(now, ungraded)
        calls = next(filter(None, [region, later] if under_hooks else [later, region]), None)
        if not calls:
            return None
        if calls is later and ungraded.dropped > now or calls is region and region.dropped >= 0:
            raise RuntimeError(
                "activation checkpointing runs a Batch Renormalization layer again whose statistics from before the "
                f"first run are no longer kept: at most {_NO_GRAD_CALLS_KEPT} calls of a layer may wait for their "
                f"backward with use_reentrant=True, {_HOOKED_CALLS_KEPT} in one region with use_reentrant=False"
            )
        run = (graph_task, calls[0].sequence)
        self._runs_in_region = self._runs_in_region + 1 if run == self._run else 0
        self._run = run
        return calls[self._runs_in_region % len(calls)].statistics


def _made_by(now: int, regions: Iterable[_Calls]) -> _Calls | None:
    """The calls of the latest region begun by ``now``, else of the first one."""
    regions = sorted(regions, key=lambda calls: calls[0].sequence)
    begun = [calls for calls in regions if calls[0].sequence <= now]
    return begun[-1] if begun else next(iter(regions), None)


def _made_after(now: int, calls: Iterable[_Call]) -> list[_Call]:
    """The calls after ``now``: first those of the region that began then."""
    return [call for call in calls if call.sequence > now]


_logs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # running_mean -> _Log


def pre_update_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    auto_state: Tensor | None,
) -> Statistics:
    """The statistics a training call must use and update: these, or copies of older ones if it is run again."""
    live = (running_mean, running_var, num_batches_tracked, clipped, auto_state)
    graph_task = torch._C._current_graph_task_id()
    hooks = recompute.hooks_of_others()
    graded = torch.is_grad_enabled()
    if graph_task == -1 and hooks is None and graded:
        return live

    log = _logs.setdefault(running_mean, _Log())
    first = log.first_run(graph_task, hooks is not None) if graph_task != -1 else None
    if hooks is not None or not graded:
        sequence = torch._C._autograd._get_sequence_nr()
        log.add(_Call(sequence, first or _copy(live), graph_task), hooks[1] if hooks is not None and graded else None)
    return live if first is None else _copy(first)


def _copy(statistics: Statistics) -> Statistics:
    mean, var, counter, clipped, auto_state = statistics
    return (
        mean.clone(),
        var.clone(),
        None if counter is None else counter.clone(),
        None if clipped is None else clipped.clone(),
        None if auto_state is None else auto_state.clone(),
    )

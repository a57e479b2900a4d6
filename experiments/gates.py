"""LSTM and GRU whose inputs-to-hidden are normalized, all seeds side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brn_kernels import BatchRenorm

HIDDEN, STEPS, FEATURES, CLASSES = 24, 8, 8, 10
GATES = {"LSTM": 4, "GRU": 3}


class Recurrent(nn.Module):
    """(N, seeds * FEATURES, STEPS) to (N, seeds * CLASSES): the last valid state's logits.

    Args:
        kind: ``"LSTM"`` or ``"GRU"``.
        per_step: whether each time step has a normalization of its own; otherwise one pools all of them.
        seeds: networks side by side, which do not see each other.
    """

    def __init__(self, kind: str, per_step: bool, seeds: int) -> None:
        super().__init__()
        self.kind, self.seeds = kind, seeds
        gates = GATES[kind] * HIDDEN
        self.inputs = nn.Conv1d(seeds * FEATURES, seeds * gates, 1, groups=seeds, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(seeds * gates) for _ in range(STEPS if per_step else 1))
        self.recurrent = nn.Conv1d(seeds * HIDDEN, seeds * gates, 1, groups=seeds)
        self.head = nn.Conv1d(seeds * HIDDEN, seeds * CLASSES, 1, groups=seeds)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool (N, STEPS), True where there is a step; its normalizations must take masks."""
        gates_in = self._normalized(self.inputs(x), mask)
        state = x.new_zeros(len(x), self.seeds, HIDDEN)
        cell = state
        for t, gate_in in enumerate(gates_in):
            before = state, cell
            gate_in, gate_hidden = (
                part.view(len(x), self.seeds, -1, HIDDEN).unbind(2) for part in (gate_in, self.recurrent(_flat(state)))
            )
            if self.kind == "LSTM":
                forget, write, read, new = (a + b for a, b in zip(gate_in, gate_hidden, strict=True))
                cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(write) * torch.tanh(new)
                state = torch.sigmoid(read) * torch.tanh(cell)
            else:
                reset, keep = (torch.sigmoid(a + b) for a, b in zip(gate_in[:2], gate_hidden[:2], strict=True))
                state = keep * state + (1 - keep) * torch.tanh(gate_in[2] + reset * gate_hidden[2])
            if mask is not None:
                state, cell = (torch.where(mask[:, t, None, None], *s) for s in zip((state, cell), before, strict=True))
        return self.head(_flat(state)).squeeze(2)

    def _normalized(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """(N, C, STEPS) to STEPS times (N, C)."""
        if len(self.norms) == 1:
            return list(_call(self.norms[0], x, mask).unbind(2))
        masks = [None] * STEPS if mask is None else mask.unbind(1)
        return [_call(norm, *each) for norm, *each in zip(self.norms, x.unbind(2), masks, strict=True)]


def _call(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return norm(x)
    if not isinstance(norm, BatchRenorm):
        raise ValueError(f"a mask needs a layer that takes one, not {type(norm).__name__}")
    return norm(x, mask=mask)


def _flat(state: Tensor) -> Tensor:
    return state.flatten(1)[..., None]

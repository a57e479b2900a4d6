"""What is measured: layers of real networks and sweeps, in formats, with the limits in different states."""

from __future__ import annotations

import csv
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .networks import NETWORKS, TABLE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward", "both")
# What the clip limits do: closed is BatchNorm's phase of the schedule; "clip 10" clips 10 % of the channels
STATES = ("open", "closed", "clip 1", "clip 10", "clip 100")
MAIN_FORMATS = (("bfloat16", "channels_last"), ("float32", "contiguous"))
ALL_FORMATS = tuple(itertools.product(DTYPES, LAYOUTS))
ALL_PEERS, FEW_PEERS = "all", "few"
SIZES, CHANNELS, HOST = "sweep of sizes", "sweep of channels", "host time"
SWEPT_CHANNELS = (8, 32, 128, 512, 2048, 4096)


@dataclass(frozen=True)
class Layer:
    """A normalization: the shape of its input, what follows it, and how often ``net`` has it."""

    net: str
    batch: int
    channels: int
    size: tuple[int, ...]
    follows: str  # "plain", or an activation, or "add", or "add_" and an activation
    count: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def activation(self) -> str | None:
        return {"plain": None, "add": None}.get(self.follows, self.follows.removeprefix("add_"))

    @property
    def adds(self) -> bool:
        return self.follows.startswith("add")

    def __str__(self) -> str:
        return f"{self.net}: {self.batch} x {self.channels} x {'x'.join(map(str, self.size))} {self.follows}"


@dataclass(frozen=True)
class Case:
    """One measurement: all candidates take turns on it."""

    layer: Layer
    dtype: str
    layout: str
    state: str = "open"
    peers: str = FEW_PEERS

    @property
    def bytes(self) -> int:
        """Of the input."""
        return math.prod(self.layer.shape) * DTYPES[self.dtype].itemsize

    def necessary_bytes(self, direction: str) -> int:
        """Every tensor read or written once: x, residual, y; dy, x, dx, the residual's gradient."""
        forward, backward = (3, 4) if self.layer.adds else (2, 3)
        return self.bytes * {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def __str__(self) -> str:
        return f"{self.layer}, {self.dtype} {self.layout}, {self.state}"


@functools.cache
def layers_of(net: str) -> tuple[Layer, ...]:
    """All distinct normalizations of a network, the largest first."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["net"] == net]
    return tuple(
        Layer(net, int(row["batch"]), int(row["channels"]), tuple(map(int, row["size"].split("x"))),
              row["follows"], int(row["count"]))
        for row in rows
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which cases a run measures, in the order of their importance."""

    nets: Sequence[str] = tuple(NETWORKS)
    layers: int | None = None  # of the first network, spread over its list; None for all
    other_layers: int | None = None  # of each other one
    divisor: int = 1  # of the networks' own batch sizes
    formats: Sequence[tuple[str, str]] = MAIN_FORMATS
    states: Sequence[str] = STATES
    state_layers: int = 4  # on which the states other than open are measured
    peer_layers: int | None = None  # of ResNet-50, on which all peers are measured
    largest: int = 2**32  # bytes of the largest tensor of a sweep
    size_step: int = 4  # ratio of neighbours in the sweep of sizes
    channels_bytes: int = 2**26

    def cases(self) -> list[Case]:
        """All cases, without repetition."""
        found = dict.fromkeys(self._host())
        for case in itertools.chain(self._nets(self.nets[:1]), self._states(), self._sweeps(), self._nets(self.nets)):
            found.setdefault(case)
        return list(found)

    def _chosen(self, net: str, number: int | None) -> list[Layer]:
        layers = layers_of(net)
        if number is not None and number < len(layers):
            layers = tuple(layers[i * len(layers) // number] for i in range(number))
        return [replace(layer, batch=max(1, layer.batch // self.divisor)) for layer in layers]

    def _nets(self, nets: Sequence[str]) -> Iterator[Case]:
        for net in nets:
            layers = self._chosen(net, self.layers if net == self.nets[0] else self.other_layers)
            compared = layers if self.peer_layers is None else layers[: self.peer_layers]
            for layer, form in itertools.product(layers, self.formats):
                peers = ALL_PEERS if net == self.nets[0] and layer in compared else FEW_PEERS
                yield Case(layer, *form, peers=peers)

    def _states(self) -> Iterator[Case]:
        for layer, form, state in itertools.product(
            self._chosen(self.nets[0], self.state_layers), self.formats, self.states
        ):
            if state != "open":
                yield Case(layer, *form, state=state)

    def _sweeps(self) -> Iterator[Case]:
        for form in self.formats:
            for exponent in range(12, self.largest.bit_length(), int(math.log2(self.size_step))):
                yield Case(_square(SIZES, 64, 2**exponent, form[0]), *form)
            for channels in SWEPT_CHANNELS:
                yield Case(_square(CHANNELS, channels, self.channels_bytes, form[0]), *form)

    def _host(self) -> Iterator[Case]:
        yield Case(Layer(HOST, 2, 64, (2, 2), "relu"), "float32", "contiguous", peers=ALL_PEERS)


def _square(net: str, channels: int, size_in_bytes: int, dtype: str) -> Layer:
    """A layer of that many bytes; images are at most 64 x 64, and there are several of them."""
    values = size_in_bytes // (channels * DTYPES[dtype].itemsize)  # a channel's
    side = 1
    while side < 64 and 4 * side * side * 4 <= values:
        side *= 2
    return Layer(net, values // side**2, channels, (side, side), "plain")

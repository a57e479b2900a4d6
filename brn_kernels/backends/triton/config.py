"""Launch settings: how a tensor is cut into tiles and programs. A short table with reasons, no tuning at run time.

Words used here and in the kernels: a *tile* is what one program holds in registers, ``outer`` x ``inner`` elements; an
*item* is one tile's worth of work; a *split* is the items that one program goes through; a *channel tile* is the
set of channels that share a program: ``inner`` channels in channels_last; in the contiguous layout one, or a few whose
planes lie side by side in a row, so that it divides into accesses of 16 bytes where a plane does not (7 x 7).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from ..layout import Layout

ACCESS_BYTES = 16
MAX_NARROW = 16  # elements a thread, where accesses are narrower: each has an address of its own in registers
REGISTERS_PER_MULTIPROCESSOR = 65536


@dataclass(frozen=True)
class Settings:
    """How much work a program and a multiprocessor have in hand.

    By Little's law a Hopper GPU needs some 32 KB in flight on each multiprocessor: tiles of a few KB, and as many
    programs as find room. The bound on registers follows from that number; without it the compiler aims at another.
    """

    warps: int  # of a program
    accesses: int  # of 16 bytes, of each thread in each tensor of a tile
    programs: int  # resident on a multiprocessor at once

    @property
    def registers(self) -> int:
        """A thread's, so that ``programs`` are resident."""
        bound = REGISTERS_PER_MULTIPROCESSOR // (32 * self.warps * self.programs)
        return min(255, bound // 8 * 8)


# By direction and layout; "side by side": contiguous planes that accesses of 16 bytes do not divide, several in a row
SETTINGS = {
    ("forward", "channels_last"): Settings(warps=4, accesses=4, programs=3),
    ("forward", "contiguous"): Settings(warps=4, accesses=4, programs=4),
    ("forward", "side by side"): Settings(warps=4, accesses=4, programs=3),
    ("backward", "channels_last"): Settings(warps=4, accesses=4, programs=3),
    ("backward", "contiguous"): Settings(warps=4, accesses=2, programs=5),
    ("backward", "side by side"): Settings(warps=4, accesses=4, programs=4),
}
# Narrow accesses, float64, half-precision planes side by side, the derivatives of smooth activations, and both passes
# in one launch (but for contiguous forwards, and float32 planes side by side, backward) need more registers
WARPS_OF_MANY_REGISTERS = 8  # of all programs on a multiprocessor


@dataclass(frozen=True)
class Residence:
    """Which tiles are held in registers, and by how many threads."""

    values: int  # the most of a tile; half of that where arithmetic takes many registers, a quarter in float64
    values_a_thread: int
    values_a_thread_of_few: int  # where there are fewer channel tiles than multiprocessors
    most_warps: int
    programs: int  # that are to find room on a multiprocessor, at least


# By direction and access; measured like the settings above. What comes to more than these does not pay: one program a
# multiprocessor waits while it reads and while it writes
RESIDENCE = {
    ("forward", "channels_last"): Residence(2**14, 64, 16, most_warps=8, programs=1),
    ("forward", "contiguous"): Residence(2**14, 64, 16, most_warps=8, programs=1),
    ("forward", "narrow"): Residence(2**12, 64, 16, most_warps=8, programs=1),
    ("backward", "channels_last"): Residence(2**14, 32, 32, most_warps=16, programs=1),
    ("backward", "contiguous"): Residence(2**13, 16, 16, most_warps=16, programs=2),
    ("backward", "narrow"): Residence(2**12, 4, 4, most_warps=16, programs=2),
}
SECTOR_BYTES = 32  # what memory is read by

MAX_INNER_CHANNELS_LAST = 64  # 128-byte rows in half precision: whole cache lines, and enough channel tiles
MIN_INNER = 8  # a byte of packed bits
MIN_INNER_CONTIGUOUS = 64
MAX_DEAD_LANES = 0.125  # of a contiguous tile, beyond the end of a plane
MERGED_BYTES = 4096  # of partial results that a program reads at a time: each time costs a trip to L2, some 0.65 us
DIRECT_TRIPS = 3  # by which one program merges all; for more, several do that side by side, and then one their results

# of a row, and channels: columns and the workspace are counted in 32 bits
MAX_COLUMNS = 2**28
# of a tile's rows, and of its last element from its first: counted in 32 bits, from where the tile begins in 64
MAX_OFFSET = 2**31 - MAX_COLUMNS
MAX_WAVES = 8  # of programs
ITEMS_WITHOUT_SPLIT = 4  # so few take about as long as another launch
SECOND_LAUNCH = 2  # its cost and that of merging, in items of a full wave


@dataclass(frozen=True)
class Launch:
    """How one tensor is worked through. ``grid`` is (channel tiles, splits)."""

    channels_last: bool  # or planes side by side: rows of columns that each belong to one channel
    tile_channels: int  # of a channel tile
    plane: int  # columns of a channel
    row: int  # columns of a row in memory
    outer: int  # of a tile, a power of 2
    inner: int  # of a tile, a power of 2
    vector: int  # elements that every row start and row length is a multiple of; at most 16 bytes
    channel_tiles: int
    max_registers: int
    num_warps: int
    resident: bool = False  # a program reads all values of its channels once, and holds them in registers
    chunks: int = 1  # tiles side by side in a row (contiguous layout)
    items: int = 1  # of a channel tile
    splits: int = 1
    group: int = 1  # elements of a tile that one thread holds and reduces alone ...
    group_rows: bool = True  # ... in one column, outer / group rows apart; otherwise side by side

    @property
    def items_per_split(self) -> int:
        """The most: the kernels count so too (``items_of``)."""
        return -(-self.items // self.splits)

    @property
    def alone(self) -> bool:
        """Whether each program has all values of its channels: one launch does for a direction."""
        return self.splits == 1

    @property
    def grid(self) -> tuple[int, int]:
        """One program for each channel tile and split."""
        return self.channel_tiles, self.splits

    def merge_rows(self, itemsize: int) -> int:
        """Partial results, of ``itemsize`` bytes, that a program reads at a time."""
        return max(1, min(512, MERGED_BYTES // (itemsize * self.tile_channels)))

    def bundle(self, itemsize: int) -> int:
        """Splits whose partial results, of ``itemsize`` bytes, are merged by one program."""
        rows = self.merge_rows(itemsize)
        return self.splits if self.splits <= DIRECT_TRIPS * rows else rows

    @property
    def padded_channels(self) -> int:
        """Channels including those that pad the last channel tile: the row length of the workspace."""
        return self.channel_tiles * self.tile_channels


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """The GPU's; those of an H200 where there is none (interpreter, compile check)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.lru_cache(maxsize=4096)
def launch_for(
    direction: str,
    layout: Layout,
    itemsize: int,
    strides: tuple[int, ...],
    multiprocessors: int,
    has_bits: bool = False,
    smooth: bool = False,
    may_be_resident: bool = True,
) -> Launch:
    """The settings for one pass over tensors of this layout.

    Args:
        direction: "forward" or "backward".
        layout: of all tensors of the pass.
        itemsize: bytes of an element.
        strides: (outer, channel) of each tensor in turn, in elements.
        multiprocessors: of the GPU it runs on.
        has_bits: it writes or reads packed bits, which begin anew with each channel.
        smooth: it computes a smooth activation, or its derivative.
        may_be_resident: it gathers statistics; one that only writes has nothing to hold.
    """
    smooth_derivative = smooth and direction == "backward"
    if may_be_resident:
        resident = _resident(direction, layout, itemsize, strides, multiprocessors, smooth_derivative or has_bits)
        if resident is not None:
            return resident
    access = max(1, ACCESS_BYTES // itemsize)
    plane = 1 if layout.channels_last else layout.inner
    side_by_side = 1
    if not (has_bits or layout.channels_last):
        # one access a thread: few coefficients in registers
        a_row = 32 * SETTINGS[direction, "side by side"].warps * access
        side_by_side = _side_by_side(layout, access, strides, a_row)
    kind = "channels_last" if layout.channels_last else "side by side" if side_by_side > 1 else "contiguous"
    if kind == "side by side":
        layout = Layout(True, layout.outer, layout.channels, layout.channels * plane)
        strides = strides[::2]
    vector = _common_vector(access, (layout.inner, *strides))
    narrow = vector < access
    settings = within = _settings(direction, kind, smooth, layout.channels / multiprocessors)
    if narrow or itemsize == 8 or smooth_derivative or (side_by_side > 1 and itemsize == 2):
        settings = _of_many_registers(settings)
    per_thread = min(settings.accesses * access, MAX_NARROW) if narrow else settings.accesses * access
    elements = settings.warps * 32 * per_thread
    chunks, tile_channels = 1, side_by_side
    if side_by_side > 1:
        inner = max(_power_of_2(side_by_side * plane), MIN_INNER)
    elif layout.channels_last:
        inner = tile_channels = min(max(_power_of_2(layout.inner), MIN_INNER), MAX_INNER_CHANNELS_LAST)
    else:
        inner = _inner_of_plane(layout.inner, elements)
        chunks = -(-layout.inner // inner)
    channel_tiles = -(-layout.channels // tile_channels)
    outer = min(elements // inner, _power_of_2(layout.outer), _rows_in_32_bits(layout, strides))
    items = -(-layout.outer // outer) * chunks
    splits = _split(items, channel_tiles, multiprocessors * settings.programs)
    if splits == 1 and (direction, kind) == ("forward", "contiguous") and itemsize < 8:
        settings = within  # narrow or not: all programs are to find room
    elif splits == 1 and (direction, kind) != ("backward", "side by side"):  # there it has room for both passes
        settings = _of_many_registers(settings)
    group_rows = layout.channels_last or narrow
    return Launch(
        channels_last=layout.channels_last,
        tile_channels=tile_channels,
        plane=plane,
        row=layout.inner,
        outer=outer,
        inner=inner,
        vector=vector,
        group=min(settings.accesses, outer) if group_rows else access,
        group_rows=group_rows,
        channel_tiles=channel_tiles,
        chunks=chunks,
        items=items,
        splits=splits,
        max_registers=settings.registers,
        num_warps=settings.warps,
    )


def _resident(
    direction: str,
    layout: Layout,
    itemsize: int,
    strides: tuple[int, ...],
    multiprocessors: int,
    many_registers: bool,
) -> Launch | None:
    """A tile for all values of a channel, or of a few in channels_last, if registers can hold it."""
    access = max(1, ACCESS_BYTES // itemsize)
    vector = _common_vector(access, (layout.inner, *strides))
    kind = "narrow" if vector < access else "channels_last" if layout.channels_last else "contiguous"
    residence = RESIDENCE[direction, kind]
    most = residence.values // (2 if many_registers else 1) // (4 if itemsize == 8 else 1)
    outer = _power_of_2(layout.outer)
    if layout.channels_last:
        widths = [1 << k for k in range(3, 7) if SECTOR_BYTES <= itemsize << k and outer << k <= most]
        enough = [width for width in widths if layout.channels >= width * multiprocessors]
        if not widths:
            return None
        inner = max(enough, default=widths[0])
    else:
        inner = max(_power_of_2(layout.inner), MIN_INNER)
    values = outer * inner
    if values > most or outer > _rows_in_32_bits(layout, strides):
        return None
    tile_channels = inner if layout.channels_last else 1
    channel_tiles = -(-layout.channels // tile_channels)
    a_thread = residence.values_a_thread_of_few if channel_tiles < multiprocessors else residence.values_a_thread
    warps = max(values // (32 * a_thread), min(4, values // (32 * access)), 1)
    warps = min(warps, residence.most_warps)
    return Launch(
        channels_last=layout.channels_last,
        resident=True,
        tile_channels=tile_channels,
        plane=1 if layout.channels_last else layout.inner,
        row=layout.inner,
        outer=outer,
        inner=inner,
        vector=vector,
        channel_tiles=channel_tiles,
        max_registers=Settings(warps, 1, 1 if many_registers or itemsize == 8 else residence.programs).registers,
        num_warps=warps,
    )


def _rows_in_32_bits(layout: Layout, strides: tuple[int, ...]) -> int:
    """The most rows of a tile, a power of 2, in tensors of these strides and in packed bits."""
    bytes_of_bits = (1 if layout.channels_last else layout.channels) * -(-layout.inner // 8)
    return 1 << max(1, MAX_OFFSET // max(bytes_of_bits, *strides)).bit_length() - 1


def _settings(direction: str, kind: str, smooth: bool, channels: float) -> Settings:
    """The table's, or those of smaller programs where a multiprocessor has so many channels."""
    settings = SETTINGS[direction, kind]
    if (direction, kind) != ("forward", "contiguous"):
        return settings
    if smooth:  # spills on sm_100 otherwise
        settings = dataclasses.replace(settings, programs=max(1, settings.programs - 1))
    return _smaller(settings, channels) if channels > settings.programs else settings


def _of_many_registers(settings: Settings) -> Settings:
    return dataclasses.replace(settings, programs=min(settings.programs, WARPS_OF_MANY_REGISTERS // settings.warps))


def _smaller(settings: Settings, channels: float) -> Settings:
    """Smaller programs and more of them, for so many channels a multiprocessor that all begin at once.

    What a program does before and after its items then goes on beside other programs' items, and nobody's channels wait
    for a second wave.
    """
    warps = settings.warps * settings.programs
    of_each = 1 << max(0, int(warps / channels).bit_length() - 1)
    return dataclasses.replace(settings, warps=of_each, programs=warps // of_each)


def _side_by_side(layout: Layout, access: int, strides: tuple[int, ...], most_columns: int) -> int:
    """Channels whose planes are to be a row of whole accesses; 1 if a plane is one, or if nothing makes them so."""
    channels = access // math.gcd(access, layout.inner)
    fits = layout.channels % channels == 0 and channels * layout.inner <= most_columns
    rows_in_32_bits = layout.channels * layout.inner < MAX_COLUMNS
    dense = all(channel == layout.inner for channel in strides[1::2])
    aligned = all(outer % access == 0 for outer in strides[::2])
    return channels if fits and rows_in_32_bits and dense and aligned else 1


def _split(items: int, tiles_at_once: int, programs: int) -> int:
    """Splits of a channel tile, such that the last wave of programs ends soonest.

    Each wave is ``programs`` programs; a program costs one item more than it has, since it starts with nothing in
    flight. Of equal costs the fewest splits.
    """
    if items <= ITEMS_WITHOUT_SPLIT:
        return 1
    best = (math.inf, 0)
    for waves in range(1, MAX_WAVES + 1):
        wanted = max(1, min(waves * programs // tiles_at_once, items))
        items_per_split = -(-items // wanted)
        splits = -(-items // items_per_split)
        cost = -(-splits * tiles_at_once // programs) * (items_per_split + 1) + (SECOND_LAUNCH if splits > 1 else 0)
        best = min(best, (cost, splits))
    return best[1]


def _inner_of_plane(positions: int, elements: int) -> int:
    """The widest tile that leaves few lanes beyond the end of a plane."""
    widest = max(MIN_INNER, min(_power_of_2(positions), elements))
    narrowest = min(widest, MIN_INNER_CONTIGUOUS)
    widths = [1 << k for k in range(widest.bit_length() - 1, narrowest.bit_length() - 2, -1)]
    dead = {width: 1 - positions / (-(-positions // width) * width) for width in widths}
    return next((width for width in widths if dead[width] <= MAX_DEAD_LANES), min(widths, key=lambda w: dead[w]))


def _common_vector(access: int, numbers: tuple[int, ...]) -> int:
    vector = access
    while any(number % vector for number in numbers):
        vector //= 2
    return vector


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

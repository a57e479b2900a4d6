"""How launches are chosen: tiles, splits, bundles, and what registers hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brn_kernels.backends import layout

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from brn_kernels.backends.triton import config, kernels_common  # noqa: E402


def test_the_tiny_tiles_are_several(tiny_tiles):
    rows = config.launch_for("forward", layout.Layout(True, 600, 19, 19), 8, (19,), 7)
    assert rows.channel_tiles > 1 and rows.splits > 2 and rows.items_per_split > 2
    planes = config.launch_for("forward", layout.Layout(False, 90, 3, 41), 8, (123, 41), 7)
    assert planes.chunks > 1 and planes.splits > 1 and planes.items_per_split > planes.chunks


@given(
    channels_last=st.booleans(), outer=st.integers(1, 10**6), channels=st.integers(1, 3000),
    positions=st.integers(1, 20000), itemsize=st.sampled_from([2, 4, 8]), multiprocessors=st.integers(1, 200),
    has_bits=st.booleans(), apart=st.sampled_from([1, 1000, 10**6]),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_launches_cover_everything_once(
    channels_last, outer, channels, positions, itemsize, multiprocessors, has_bits, apart
):
    shape = layout.Layout(channels_last, outer, channels, channels if channels_last else positions)
    strides = (channels * apart,) if channels_last else (channels * positions * apart, positions)
    it = config.launch_for("forward", shape, itemsize, strides, multiprocessors, has_bits=has_bits)
    assert it.outer == 1 or (it.outer - 1) * strides[0] + config.MAX_COLUMNS <= 2**31
    assert it.outer & (it.outer - 1) == 0 and it.inner & (it.inner - 1) == 0 and it.inner >= 8
    assert it.items == -(-shape.outer // it.outer) * it.chunks
    assert (it.splits - 1) * it.items_per_split < it.items <= it.splits * it.items_per_split
    assert all(
        number % it.vector == 0 for number in ((it.row, strides[0]) if it.channels_last else (positions, *strides))
    )
    assert it.outer * it.inner % it.group == 0 and (it.outer if it.group_rows else it.inner) % it.group == 0
    assert it.tile_channels * it.channel_tiles >= channels > it.tile_channels * (it.channel_tiles - 1)
    if channels_last:
        assert it.tile_channels == it.inner and it.chunks == it.plane == 1
    elif it.channels_last:
        assert not has_bits and channels % it.tile_channels == 0 and it.chunks == 1 and it.plane == positions
        assert it.tile_channels * positions <= it.inner and it.vector * itemsize == 16 and positions * itemsize % 16
    else:
        assert it.tile_channels == 1 and it.chunks * it.inner >= positions
    accesses = config.SETTINGS["forward", "channels_last" if it.channels_last else "contiguous"].accesses
    values_a_thread = it.outer * it.inner / (32 * it.num_warps)
    assert values_a_thread <= 64 if it.resident else values_a_thread * itemsize <= 16 * accesses
    assert not it.resident or (it.splits == it.items == it.chunks == 1 and it.outer >= shape.outer)


@pytest.mark.parametrize("channels_last", (True, False))
def test_the_most_channels_are_counted_in_32_bits(channels_last):
    """The workspace's rows are found in 32-bit arithmetic: 4 rows of coefficients, then 3 of partial results."""
    channels = config.MAX_COLUMNS - 1
    shape = layout.Layout(channels_last, 2, channels, channels if channels_last else 2)
    strides = (channels, 0) if channels_last else (2 * channels, 2)
    chosen = config.launch_for("forward", shape, 2, strides, 132)
    assert 4 * chosen.padded_channels < 2**31 and 3 * chosen.splits * chosen.padded_channels < 2**31


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("channels, row_bytes", [(2**28 - 8, 9), (2**24, 138)])
def test_bits_of_a_sample_beyond_32_bits(device, channels, row_bytes):
    """A product of two 32-bit numbers had been the distance between samples."""
    found = torch.zeros((), dtype=torch.int64, device=device)
    bits_of_the_second_sample[(1,)](found, channels, row_bytes)
    assert found.item() == channels * row_bytes


@triton.jit(do_not_specialize=["channels", "row_bytes"])
def bits_of_the_second_sample(found_ptr, channels, row_bytes):
    bits_ptr = found_ptr.to(tl.pointer_type(tl.uint8))
    first_row = tl.full([], 1, tl.int64)
    p_bits, _ = kernels_common.bits_pointers(bits_ptr, first_row, 0, 0, 1, 2, channels, row_bytes, 8, False, 1, 8)
    tl.store(found_ptr, tl.sum(p_bits.to(tl.int64) - bits_ptr.to(tl.int64), 0))


def test_many_splits_of_many_channels_are_bundled_and_few_are_not():
    """One program that reads the results of 396 splits, 16 at a time, took a tenth of a forward's time."""
    for outer, channels, bundled in ((256 * 112 * 112, 64, True), (256 * 56 * 56, 256, True), (256 * 49, 2048, False)):
        it = config.launch_for("forward", layout.Layout(True, outer, channels, channels), 2, (channels,), 132)
        assert (it.bundle(4) < it.splits) == bundled
        trips = -(-it.bundle(4) // it.merge_rows(4)) + -(-it.splits // it.bundle(4)) // it.merge_rows(4)
        assert trips <= config.DIRECT_TRIPS


def test_one_launch_where_there_is_little_to_do_or_a_program_for_each_channel():
    few = config.launch_for("forward", layout.Layout(True, 1000, 7, 7), 4, (7,), 132)
    many = config.launch_for("forward", layout.Layout(False, 256, 2112, 196), 4, (196 * 2112, 196), 132)
    large = config.launch_for("forward", layout.Layout(True, 10**6, 64, 64), 4, (64,), 132)
    assert few.alone and many.alone and not large.alone
    assert not any(it.resident for it in (few, many, large))


def test_a_program_holds_what_registers_can_hold():
    def chosen(direction, itemsize, *shape):
        channels_last, outer, channels, positions = shape
        strides = (channels,) if channels_last else (channels * positions, positions)
        planned = layout.Layout(channels_last, outer, channels, channels if channels_last else positions)
        return config.launch_for(direction, planned, itemsize, strides, 132)

    for direction in ("forward", "backward"):
        held = chosen(direction, 4, False, 8, 2048, 1024)
        assert held.resident and held.alone and held.outer * held.inner == 8192
        assert not chosen(direction, 4, False, 8, 2048, 4096).resident
        assert not chosen(direction, 4, False, 256, 512, 49).resident  # narrow accesses: slower than two reads
        assert chosen(direction, 4, False, 64, 512, 49).resident
        assert chosen(direction, 2, True, 784, 512, None).inner == 16  # a sector's width, of many programs
        assert chosen(direction, 4, True, 64, 64 * 132, None).inner == 64  # as wide as leaves enough of them
        assert not chosen(direction, 2, True, 1100, 512, None).resident
        assert not chosen(direction, 4, False, 4, 2**20, 1024).resident  # its offsets would not fit 32 bits
        for channels, is_held in ((2**21, True), (2**22, False)):  # expanded, with packed bits that would not
            expanded = layout.Layout(False, 4, channels, 1024)
            assert config.launch_for(direction, expanded, 2, (0, 0), 132, has_bits=True).resident == is_held


def test_more_channels_have_smaller_programs_so_that_all_begin_at_once():
    for channels, warps in ((512, 4), (1024, 2), (2048, 1), (30_000, 1)):
        shape = layout.Layout(False, 8, channels, 4096)
        forward, backward = (
            config.launch_for(direction, shape, 4, (4096 * channels, 4096), 132)
            for direction in ("forward", "backward")
        )
        assert forward.alone and not forward.resident and (forward.num_warps, backward.num_warps) == (warps, 4)
        assert channels > 2112 or channels * warps <= 132 * 16


@pytest.mark.parametrize(
    "channels, positions, itemsize, has_bits",
    [(512, 28 * 28, 4, True), (512, 28 * 28, 2, False), (1024, 14 * 14, 2, True), (2048, 7 * 7, 4, True)],
)
def test_registers_leave_room_for_a_program_of_each_channel(channels, positions, itemsize, has_bits):
    """Those of a forward with packed bits let a second wave wait for the first: 3 programs where 4 were needed."""
    shape = layout.Layout(False, 256, channels, positions)
    it = config.launch_for("forward", shape, itemsize, (channels * positions, positions), 132, has_bits=has_bits)
    room = config.REGISTERS_PER_MULTIPROCESSOR // (32 * it.num_warps * it.max_registers)
    assert it.alone and it.channel_tiles <= 132 * room


@pytest.mark.parametrize("programs", (1, 2, 4))
def test_settings_with_few_programs_keep_one(programs, monkeypatch):
    """`brn bench settings` tries a single program; a smooth activation takes one away."""
    settings = config.Settings(4, 4, programs)
    monkeypatch.setitem(config.SETTINGS, ("forward", "contiguous"), settings)
    config.launch_for.cache_clear()
    shape = layout.Layout(False, 256, 64, 3136)
    it = config.launch_for("forward", shape, 4, (64 * 3136, 3136), 132, smooth=True)
    config.launch_for.cache_clear()
    assert it.max_registers >= settings.registers

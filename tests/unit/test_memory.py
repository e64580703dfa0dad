"""Regions and block grids: what they refuse, what they point at, whom they keep alive."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import BlockGrid, MemoryKind, Region, order_grids


def region(size: int, *grids: BlockGrid) -> tuple[np.ndarray, Region]:
    array = np.arange(size, dtype=np.uint8)
    return array, Region(array.ctypes.data, array.nbytes, grids, keepalive=array)


@pytest.mark.parametrize(
    "field", [{"group": -1}, {"layer": -1}, {"offset": -1}, {"block_bytes": 0}, {"num_blocks": 0}, {"block_stride": 63}]
)
def test_a_grid_that_cannot_be_is_refused(field: dict[str, int]) -> None:
    good = {"group": 0, "layer": 0, "offset": 0, "block_stride": 64, "block_bytes": 64, "num_blocks": 1}
    BlockGrid(**good)
    with pytest.raises(LocalProtocolError):
        BlockGrid(**{**good, **field})


def test_a_grid_ends_with_its_last_block_not_its_last_stride() -> None:
    grid = BlockGrid(0, 0, 10, 100, 60, 3)
    assert grid.end == 10 + 200 + 60
    region(270, grid)
    with pytest.raises(LocalProtocolError, match="270"):
        region(269, grid)


@pytest.mark.parametrize(("address", "length"), [(0, 64), (-8, 64), (4096, 0), (4096, -1)])
def test_a_region_that_cannot_be_is_refused(address: int, length: int) -> None:
    with pytest.raises(LocalProtocolError):
        Region(address, length, ())


def test_the_view_is_the_memory_itself() -> None:
    array, made = region(256)
    view = made.view()
    assert (view.nbytes, view.format, view.readonly) == (256, "B", False)
    view[7] = 99
    assert array[7] == 99
    array[8] = 77
    assert view[8] == 77


def test_a_slice_of_the_view_keeps_the_owner_alive() -> None:
    class Owner:
        pass

    owner = Owner()
    array = np.zeros(64, np.uint8)
    made = Region(array.ctypes.data, array.nbytes, (), keepalive=(owner, array))
    alive, piece = weakref.ref(owner), made.view()[8:16]
    del owner, array, made
    gc.collect()
    assert alive() is not None
    assert bytes(piece) == bytes(8)
    del piece
    gc.collect()
    assert alive() is None


def test_device_memory_has_no_view() -> None:
    with pytest.raises(LocalProtocolError, match="cuda"):
        Region(4096, 64, (), MemoryKind.CUDA).view()


def test_populate_keeps_the_contents() -> None:
    array, made = region(256)
    made.populate()
    assert (array == np.arange(256, dtype=np.uint8)).all()
    Region(4096, 64, (), MemoryKind.NPU).populate()


def resident(pages: mmap.mmap) -> int:
    """Bytes of a mapping that have memory. Advice for a part of it splits it into several entries."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    text = Path("/proc/self/smaps").read_text()
    entries = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ .*?^Rss: *(\d+) kB", text, re.MULTILINE | re.DOTALL)
    return sum(int(rss) << 10 for low, rss in entries if start <= int(low, 16) < start + len(pages))


@pytest.mark.parametrize(("looks", "least", "most"), [(9, 80 << 20, 80 << 20), (1, 1, 64 << 20), (0, 0, 0)])
def test_populate_faults_pages_in_and_stops_when_told(looks: int, least: int, most: int) -> None:
    pages = mmap.mmap(-1, 80 << 20)  # more than one piece
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    answers = iter([True] * looks)
    Region(address, len(pages), (), keepalive=pages).populate(lambda: next(answers, False))
    assert least <= resident(pages) <= most


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=6), max_size=4))
def test_the_canonical_order_is_by_group_and_layer_then_as_registered(spec: list[list[tuple[int, int]]]) -> None:
    regions = []
    for index, pairs in enumerate(spec):
        grids = tuple(BlockGrid(group, layer, at * 8, 8, 8, 1) for at, (group, layer) in enumerate(pairs))
        regions.append(Region(4096 * (index + 1), 4096, grids))
    refs = order_grids(regions)
    assert len(refs) == sum(map(len, spec))
    keys = [(ref.grid.group, ref.grid.layer, ref.region, ref.grid.offset) for ref in refs]
    assert keys == sorted(keys)
    assert all(ref.grid in regions[ref.region].grids for ref in refs)

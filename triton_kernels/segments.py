"""Rows sorted by adapter, in tiles that each belong to one adapter.

order [M] holds the rows of adapter j at offsets[j] .. offsets[j + 1]. Tiles of BLOCK rows are
counted through, adapter by adapter; how many there are only the device knows, and the grid has as
many as there can be.
"""

import triton
import triton.language as tl


@triton.jit
def find_tile(pid, offsets_ptr, G, BLOCK, BLOCK_G: tl.constexpr):
    """(adapter, first position in order, position after the adapter's last row) of tile `pid`.

    A tile past the last one has adapter G.
    """
    offs_g = tl.arange(0, BLOCK_G).to(tl.int64)
    mask_g = offs_g < G
    begin = tl.load(offsets_ptr + offs_g, mask=mask_g, other=0)
    end = tl.load(offsets_ptr + (offs_g + 1), mask=mask_g, other=0)
    tiles = tl.where(mask_g, (end - begin + BLOCK - 1) // BLOCK, 0)
    after = tl.cumsum(tiles, axis=0)
    slot = tl.sum((mask_g & (after <= pid)).to(tl.int32), axis=0)
    here = offs_g == slot
    first = tl.sum(tl.where(here, begin + (pid - after + tiles) * BLOCK, 0), axis=0)
    last = tl.sum(tl.where(here, end, 0), axis=0)
    return slot, first, last


@triton.jit
def tiles_before(slot, offsets_ptr, G, BLOCK, BLOCK_G: tl.constexpr):
    """(tiles of the adapters before `slot`, tiles of `slot`)."""
    offs_g = tl.arange(0, BLOCK_G).to(tl.int64)
    mask_g = offs_g < G
    begin = tl.load(offsets_ptr + offs_g, mask=mask_g, other=0)
    end = tl.load(offsets_ptr + (offs_g + 1), mask=mask_g, other=0)
    tiles = tl.where(mask_g, (end - begin + BLOCK - 1) // BLOCK, 0)
    before = tl.sum(tl.where(offs_g < slot, tiles, 0), axis=0)
    return before, tl.sum(tl.where(offs_g == slot, tiles, 0), axis=0)


def max_tiles(M: int, G: int, block: int) -> int:
    """The most tiles that M rows of G adapters can make: each adapter may end in a part of one."""
    return min(M, triton.cdiv(M, block) + min(G, M))


def block_g(G: int) -> int:
    return max(16, triton.next_power_of_2(G))

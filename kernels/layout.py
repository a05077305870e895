"""Layouts of a sample: NCHW images, and the token sequences of a network with patches.

A sample is a table of C channels by S = H W places. NCHW addresses (c, s) as c S + s; tokens of
patch size p as ((n p + i) p + j) C + c, with n the patch in reading order and (i, j) the place in
it: (B, H/p W/p, p p C), features in the order of SiT's `unpatchify`. Random numbers are indexed by
the NCHW address in either layout.

Kernels walk a sample in tiles of channels by places. NCHW needs no channels: it is one row of C H W
places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.runtime import jit, tl, triton

NCHW = 0
# Programs of 4 warps that the 132 multiprocessors of an H100 or H200 hold at once.
_RESIDENT = 132 * 16


@dataclass(frozen=True)
class Layout:
    """A sample's shape as kernels see it.

    Attributes:
        channels, places: the table's sides.
        width: places in an image row (tokens only).
        patch_size: of the tokens; 0 is NCHW.
        block_channels, block_places: a tile's sides, powers of two.
        loops: tiles that one program works through, one after the other; the last one fewer.
    """

    channels: int
    places: int
    width: int
    patch_size: int
    block_channels: int
    block_places: int
    loops: int

    @property
    def numel(self) -> int:
        """Elements of one sample."""
        return self.channels * self.places

    @property
    def even(self) -> bool:
        """Whether tiles have nothing outside of the sample: no element needs a mask."""
        return self.places % self.block_places == 0 and self.channels % self.block_channels == 0

    def vector(self, element_size: int) -> int:
        """`normal_pairs`' VECTOR beside loads of elements of so many bytes."""
        # A block of four numbers must not reach over the end of a channel.
        if self.channels > 1 and self.places % 4:
            return 1
        return 8 if element_size == 2 else 4

    @property
    def place_programs(self) -> int:
        """Programs side by side along the places."""
        return triton.cdiv(self.places, self.block_places * self.loops)

    @property
    def programs(self) -> int:
        """Programs that work on one sample."""
        return self.place_programs * triton.cdiv(self.channels, self.block_channels)

    def constants(self, element_size: int) -> dict[str, object]:
        """Keyword arguments of a kernel that moves elements of so many bytes."""
        return {
            "C": self.channels,
            "W": self.width,
            "PATCH": self.patch_size,
            "VECTOR": self.vector(element_size),
            "EVEN": self.even,
            "BLOCK_C": self.block_channels,
            "BLOCK_S": self.block_places,
            "loops": self.loops,
            "num_warps": 4,
            **runtime.OPTIONS,
        }


def get_layout(sample_shape: tuple[int, ...], patch_size: int, loops: int | None = None) -> Layout:
    """The layout of samples (C, H, W), or of any shape where `patch_size` is 0 (NCHW).

    The tiles depend on the shape of a sample alone, never on the batch: sums over tiles then have
    the same bits for a sample alone and in a batch. Large samples take several tiles a program:
    what a program does once (times, coefficients, addresses) is then a small part of its
    instructions, and there are fewer partial sums to add up. `loops`: so many instead.
    """
    numel = math.prod(sample_shape)
    if loops is None:
        loops = 1 if numel <= 1 << 14 else 4 if numel < 1 << 17 else 8
    if patch_size == NCHW:
        return Layout(1, numel, 1, 0, 1, 1024, loops)
    channels, height, width = sample_shape
    places = height * width
    block_channels = min(triton.next_power_of_2(channels), 32)
    block_places = min(2048 // block_channels, max(16, triton.next_power_of_2(places)))
    loops = min(loops, triton.cdiv(places, block_places))
    return Layout(channels, places, width, patch_size, block_channels, block_places, loops)


def one_wave(numel: int, batch: int) -> int:
    """Tiles a program of an NCHW layout for which all programs of a batch run at once, at most 24.

    For kernels without sums, whose bits do not depend on how work is divided. By 24 tiles what is
    done once is 1.6 instructions an element.
    """
    tiles = triton.cdiv(numel, 1024)
    least = min(max(triton.cdiv(tiles * batch, _RESIDENT), 1), 24)
    # A divisor, if there is one near, so that all programs have the same to do.
    return next((n for n in range(least, min(2 * least, 24) + 1) if tiles % n == 0), least)


def to_tokens(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p W/p, p p C), channels last in each token."""
    B, C, H, W = x.shape
    p = patch_size
    return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def from_tokens(tokens: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    """(B, N, p p C') -> (B, C', H, W) for data of `shape` (B, C, H, W); SiT's `unpatchify`."""
    B, _, H, W = shape
    p = patch_size
    x = tokens.reshape(B, H // p, W // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)


@jit
def tile_start(program, S, loops, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """(first channel, first place, number) of the tiles of a program of a sample."""
    columns = tl.cdiv(S, BLOCK_S * loops)
    first_s = (program % columns) * (BLOCK_S * loops)
    tiles = tl.minimum(loops, tl.cdiv(S - first_s, BLOCK_S))
    return (program // columns) * BLOCK_C, first_s, tiles


@jit
def load_pairs(
    tile_ptr, place, S, mask, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Elements at i S + place + 2 j of `tile_ptr`, and those after each of them.

    Two tiles of (BLOCK_C, BLOCK_S / 2) float32. `mask`: of the (BLOCK_C, BLOCK_S) elements; not
    asked where EVEN says that all of them are there.
    """
    row = tl.arange(0, BLOCK_C)[:, None]
    if EVEN and tile_ptr.dtype.element_ty == tl.bfloat16:
        # Two elements are one word, and each a float by itself with zeros after it.
        at = row * (S // 2) + place // 2 + tl.arange(0, BLOCK_S // 2)[None, :]
        word = tl.load(tile_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + at)
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        at = row * S + place + tl.arange(0, BLOCK_S)[None, :]
        if EVEN:
            x = tl.load(tile_ptr + at)
        else:
            x = tl.load(tile_ptr + at, mask=mask, other=0.0)
        first, second = split_pairs(x.to(tl.float32), BLOCK_C, BLOCK_S)
    return first, second


@jit
def tile_address(
    c,
    first_s,
    place,
    S,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`address` of the tile that begins at place first_s + `place`, for the loop over `place`."""
    s = tl.arange(0, BLOCK_S)
    if PATCH == 0:
        at = c[:, None] * S + (place + s)[None, :]
    elif BLOCK_S % (W * PATCH) == 0:
        # Whole rows of patches: the next tile is so many tokens further, and the rest of this does
        # not depend on the loop.
        at = address(c, first_s + s, S, W, CHANNELS, PATCH) + place * CHANNELS
    else:
        at = address(c, first_s + place + s, S, W, CHANNELS, PATCH)
    return at


@jit
def split_pairs(x, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The even and the odd columns of a tile."""
    return tl.split(tl.reshape(x, (BLOCK_C, BLOCK_S // 2, 2)))


@jit
def address(c, s, S, W: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Offsets inside a sample for channels c (rows) and places s (columns).

    CHANNELS is the width of a token's channel dimension, which may be more than the sample's.
    """
    if PATCH == 0:
        offset = c[:, None] * S + s[None, :]
    else:
        h = s // W
        w = s % W
        token = (h // PATCH) * (W // PATCH) + w // PATCH
        row = token * (PATCH * PATCH) + (h % PATCH) * PATCH + w % PATCH
        offset = row[None, :] * CHANNELS + c[:, None]
    return offset

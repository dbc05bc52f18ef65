# SPDX-License-Identifier: Apache-2.0
"""The native kernels' weight layout: every 32 x 32 tile of a matrix is 544 bytes, codes in fragment order, then scales.

A matrix of `rows` x `K` (multiples of 32) becomes [rows/32, K/32, 544] bytes, exactly as many as the checkpoint's codes
and scales together: tile (R, C) covers rows 32R.. and k 32C... Of its 544 bytes, the first 512 are codes: lane l = 4g +
q of a warp owns bytes 16l..16l+15, four little-endian words; word r holds row 4g + r, k = 8q .. 8q+7, recoded as
`encode_words` says. The last 32 are the rows' scales, as the exponent field of the BF16 that the kernel multiplies
with. kernels/csrc/common/fp4.cuh reads it back.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 32
TILE_BYTES = TILE * TILE // 2 + TILE

# Both stand in kernels/csrc/common/fp4.cuh with their reasons: the byte stored for scale s is s + 126 - 48, exact for
# s in 43..176.
SCALE_BIAS = 126 - 48
MIN_SCALE, MAX_SCALE = 43, 176
# Stored for a block whose codes are all zero and whose own scale lies outside: the exponent field of 1.0.
ZERO_BLOCK_SCALE = 127


def _rotate_right(words: Tensor, bits: int) -> Tensor:
    # int32's >> repeats the sign, hence the mask.
    return (words >> bits) & ((1 << (32 - bits)) - 1) | words << (32 - bits)


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


_BF16_MASK = _signed(0x81C081C0)


def encode_words(words: Tensor) -> Tensor:
    """int32 words of eight codes, low nibble first -> the placement that `decode_word` in common/fp4.cuh undoes."""
    # A code's sign on bit 15 and the rest on 8..6: what the kernel shall see of pair p (codes 2p and 2p + 1, in the low
    # and the high half).
    pairs = []
    for p in range(4):
        pair = words >> (8 * p)
        pairs.append((pair & 0x08) << 12 | (pair & 0x07) << 6 | (pair & 0x80) << 24 | (pair & 0x70) << 18)
    # Three pairs are found a rotation away (0, 4, 10): put them there.
    encoded = pairs[0] | _rotate_right(pairs[1], 4) | _rotate_right(pairs[2], 10)
    # The fourth is read as r ^ (r << 8), r the word rotated by 6: take away what the other three show there,
    rotated = _rotate_right(encoded, 26)
    missing = (pairs[3] ^ rotated ^ rotated << 8) & _BF16_MASK
    # and solve f ^ (f << 8) = missing for the free bits f of r: bits 7 mod 8 form a chain, whose inverse is a running
    # XOR; bits 8 and 24 come from one byte below; 6 and 22 from themselves.
    chain = missing & _signed(0x80808080)
    chain = chain ^ chain << 8
    chain = chain ^ chain << 16
    free = chain | missing & 0x00400040 | (missing >> 8) & 0x00010001
    return encoded | _rotate_right(free, 6)


def decode_words(words: Tensor) -> Tensor:
    """The exact inverse of `encode_words`, by the kernel's own formulas."""
    r = _rotate_right(words, 26)
    codes = torch.zeros_like(words)
    for p, pair in enumerate((words, words << 4, r << 4, r ^ r << 8)):
        nibbles = (pair >> 12) & 0x08 | (pair >> 6) & 0x07 | (pair >> 24) & 0x80 | (pair >> 18) & 0x70
        codes |= nibbles << (8 * p)
    return codes


def tile_matrix(codes: Tensor, scales: Tensor) -> Tensor:
    """One matrix: codes uint8 [rows, K/2] and scales uint8 [rows, K/32] -> new uint8 [rows/32, K/32, 544]."""
    rows, blocks = scales.shape
    words = encode_words(codes.view(torch.int32))
    # [R, g, r, C, q] -> [R, C, g, q, r]
    words = words.view(rows // TILE, 8, 4, blocks, 4).permute(0, 3, 1, 4, 2)
    tiles = torch.empty(rows // TILE, blocks, TILE_BYTES, dtype=torch.uint8, device=codes.device)
    tiles[..., :512].view(torch.int32).view(rows // TILE, blocks, 8, 4, 4).copy_(words)
    outside = (scales < MIN_SCALE) | (scales > MAX_SCALE)
    stored = (scales + SCALE_BIAS).masked_fill_(outside, ZERO_BLOCK_SCALE)
    tiles[..., 512:] = stored.view(rows // TILE, TILE, blocks).transpose(1, 2)
    return tiles


def untile_matrix(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The exact inverse of `tile_matrix`, but for scales outside of all-zero blocks: (codes, scales)."""
    tile_rows, blocks, _ = tiles.shape
    words = decode_words(tiles[..., :512].contiguous().view(torch.int32))
    words = words.view(tile_rows, blocks, 8, 4, 4).permute(0, 2, 4, 1, 3).reshape(tile_rows * TILE, blocks * 4)
    scales = tiles[..., 512:].transpose(1, 2).reshape(tile_rows * TILE, blocks) - SCALE_BIAS
    return words.view(torch.uint8), scales


def tile_experts(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """codes uint8 [E, rows, K/2] and scales uint8 [E, rows, K/32] -> uint8 [E, rows/32, K/32, 544].

    In place, one expert at a time, where each expert's scales follow its codes in one run of bytes
    (`MoEWeights.empty`); the inputs are then gone. Into a new tensor otherwise. Scales outside MIN_SCALE to MAX_SCALE
    are taken for those of all-zero blocks (`Native.why_not_weights`). Raises ValueError for other sizes.
    """
    experts, rows, blocks = scales.shape
    if rows % TILE or codes.shape[2] % 16:
        raise ValueError(f"{name}: rows and K must be multiples of {TILE}, not {rows} and {codes.shape[2] * 2}")
    shape = (experts, rows // TILE, blocks, TILE_BYTES)
    tiles = _run_of_bytes(codes, scales)
    tiles = torch.empty(shape, dtype=torch.uint8, device=codes.device) if tiles is None else tiles.view(shape)
    for expert in range(experts):
        tiles[expert] = tile_matrix(codes[expert].contiguous(), scales[expert].contiguous())
    return tiles


def untile_experts(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [E, rows/32, K/32, 544] -> codes uint8 [E, rows, K/2], scales uint8 [E, rows, K/32]."""
    codes, scales = zip(*(untile_matrix(expert) for expert in tiles), strict=True)
    return torch.stack(codes), torch.stack(scales)


def _run_of_bytes(codes: Tensor, scales: Tensor) -> Tensor | None:
    """Codes and scales as one uint8 [E, bytes per expert] if that is how they lie in memory, else None."""
    code_bytes, scale_bytes = codes[0].numel(), scales[0].numel()
    run = code_bytes + scale_bytes
    side_by_side = (
        codes.untyped_storage().data_ptr() == scales.untyped_storage().data_ptr()
        and scales.data_ptr() == codes.data_ptr() + code_bytes
        and (len(codes) == 1 or codes.stride(0) == scales.stride(0) == run)
        and codes[0].is_contiguous()
        and scales[0].is_contiguous()
    )
    return codes.as_strided((len(codes), run), (run, 1)) if side_by_side else None

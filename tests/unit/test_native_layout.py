# SPDX-License-Identifier: Apache-2.0
"""The native layout: the kernel's own decode reads it back; exact inverses; in place; refusals write nothing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.layers import random_weights
from vllm_mxfp4_sm120.backends.native import layout
from vllm_mxfp4_sm120.moe import MoEShape

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"


def all_half_words() -> torch.Tensor:
    """int32: every 16-bit pattern in the low half and in the high half, the other half random; and the corners."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.arange(1 << 16)
    noise = torch.randint(0, 1 << 16, (1 << 16,), generator=generator)
    words = torch.cat(
        [halves | noise << 16, noise | halves << 16, halves | halves << 16, torch.tensor([0, 0xFFFFFFFF])]
    )
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def fp4_in_bf16(words: torch.Tensor) -> torch.Tensor:
    """[N] int32 of eight codes -> [N, 4] int32: what decode_word must give, spelled code by code."""
    codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=1)
    halves = (codes & 8) << 12 | (codes & 7) << 6
    return halves[:, 0::2] | halves[:, 1::2] << 16


@pytest.fixture(scope="module")
def decode_word(tmp_path_factory: pytest.TempPathFactory):
    """common/fp4.cuh's decode_word, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build common/fp4.cuh for the host with")
    folder = tmp_path_factory.mktemp("decode")
    source, library = folder / "decode.cpp", folder / "decode.so"
    source.write_text(
        "#define __host__\n#define __device__\n#define __forceinline__ inline\n"
        f'#include "{CSRC / "common/fp4.cuh"}"\n'
        'extern "C" int scale_offset_exp() { return mxfp4_sm120::SCALE_OFFSET_EXP; }\n'
        'extern "C" void decode(const uint32_t* w, uint32_t* out, int n) {\n'
        "  for (int i = 0; i < n; i++) mxfp4_sm120::decode_word(w[i], out + 4 * i);\n}\n"
    )
    subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def test_the_kernel_reads_back_every_code(decode_word):
    words = all_half_words()
    encoded = layout.encode_words(words)
    out = torch.empty(len(words), 4, dtype=torch.int32)
    decode_word.decode(ctypes.c_void_p(encoded.data_ptr()), ctypes.c_void_p(out.data_ptr()), len(words))
    assert torch.equal(out, fp4_in_bf16(words))


def test_scale_bias_is_the_kernel_s(decode_word):
    assert 126 - decode_word.scale_offset_exp() == layout.SCALE_BIAS


def test_words_decode_to_themselves():
    words = all_half_words()
    assert torch.equal(layout.decode_words(layout.encode_words(words)), words)


def test_usable_scales_give_exact_weights():
    """Every code times every usable scale, in BF16 as the kernel multiplies: fp4 * 2^(s - 127 - 48), unrounded."""
    fp4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    code = (torch.arange(8) << 6).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(code.double(), fp4 * 2.0**-126)
    s = torch.arange(layout.MIN_SCALE, layout.MAX_SCALE + 1)
    multiplier = ((s + layout.SCALE_BIAS) << 7).to(torch.int16).view(torch.bfloat16)
    product = code.double()[:, None] * multiplier.double()
    assert torch.equal(product, fp4[:, None] * 2.0 ** (s.double() - 127 - 48))
    assert torch.equal(product.to(torch.bfloat16).double(), product)
    below = fp4 * 2.0 ** (layout.MIN_SCALE - 1 - 127 - 48)
    assert not torch.equal(below.to(torch.bfloat16).double(), below)
    assert layout.MAX_SCALE + layout.SCALE_BIAS == 254


SHAPE = MoEShape(num_experts=3, local_experts=3, hidden_size=96, intermediate_size=32, top_k=2)


def test_tiles_are_where_the_layout_says():
    weights = random_weights(SHAPE, scales=(layout.MIN_SCALE, layout.MAX_SCALE))
    codes, scales = weights.w13.clone(), weights.w13_scale.clone()
    tiles = layout.tile_experts(codes, scales, "w13")
    assert tiles.shape == (3, 2, 3, 544)
    for expert, row, k in ((0, 0, 0), (1, 37, 40), (2, 63, 88)):
        tile = tiles[expert, row // 32, k // 32]
        lane = 4 * (row % 32 // 4) + k % 32 // 8
        start = 16 * lane + 4 * (row % 4)
        word = layout.decode_words(tile[start : start + 4].clone().view(torch.int32)).view(torch.uint8)
        assert torch.equal(word, codes[expert, row, k // 2 : k // 2 + 4])
        assert tile[512 + row % 32] == scales[expert, row, k // 32] + layout.SCALE_BIAS


@pytest.mark.parametrize("shape", [SHAPE, MoEShape(2, 2, 32, 64, 1), MoEShape(1, 1, 736, 672, 1)])
def test_in_place_and_back(shape: MoEShape):
    weights = random_weights(shape, scales=(layout.MIN_SCALE, layout.MAX_SCALE))
    for name, codes, scales in (("w13", weights.w13, weights.w13_scale), ("w2", weights.w2, weights.w2_scale)):
        before = codes.clone(), scales.clone()
        apart = layout.tile_experts(*before, name)
        tiles = layout.tile_experts(codes, scales, name)
        assert tiles.data_ptr() == codes.data_ptr()
        assert tiles.is_contiguous()
        assert tiles.numel() == before[0].numel() + before[1].numel()
        assert torch.equal(tiles, apart)
        back = layout.untile_experts(tiles)
        assert torch.equal(back[0], before[0]) and torch.equal(back[1], before[1])


def test_a_zero_block_may_have_any_scale():
    weights = random_weights(SHAPE, scales=(layout.MIN_SCALE, layout.MAX_SCALE))
    weights.w13[2, 5, 16:32] = 0x80  # zeros of both signs
    weights.w13_scale[2, 5, 1] = 0
    tiles = layout.tile_experts(weights.w13, weights.w13_scale, "w13")
    assert tiles[2, 0, 1, 512 + 5] == layout.ZERO_BLOCK_SCALE
    assert bool((tiles[..., 512:] >= 1).all()) and bool((tiles[..., 512:] <= 254).all())


def test_sizes_must_be_multiples_of_a_tile():
    with pytest.raises(ValueError, match="w2: rows and K must be multiples of 32, not 48 and 32"):
        layout.tile_experts(torch.zeros(1, 48, 16, dtype=torch.uint8), torch.zeros(1, 48, 1, dtype=torch.uint8), "w2")

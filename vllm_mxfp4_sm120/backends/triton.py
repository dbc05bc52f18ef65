"""The layer in Triton, for cards without the compiled library. FP4 is decoded in registers, SwiGLU fused into a GEMM.

Five launches, whose grids depend on the number of tokens only, so a CUDA graph can hold them: route (logits only),
place (count first, when there are many pairs), gate-up + SwiGLU, down, combine. A *pair* is a (token, slot) of the
router's choice, numbered token * top_k + slot; `order` lists the pairs expert by expert, and a *tile* is up to BLOCK_M
consecutive entries of `order` with one expert. Nothing is added atomically: the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the module still loads, so that `why_not` can say so
    triton = tl = None

    def jit(**_):
        return lambda function: function


# Triton's interpreter (TRITON_INTERPRET=1) runs kernels on the CPU, for tests.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

# fp4's bits, moved to BF16's places, read as fp4 * 2^-126 (subnormal 0.5 included); times 2^(s - 1) that is the weight.
# 2^(s - 1) is a BF16 number for s up to 128, which is weights up to 12: far beyond any model's.
MAX_SCALE = 128
# Tokens per pass: bounds the float32 workspace, top_k * H * 4 bytes a token, at 190 MB for GPT-OSS.
MAX_TOKENS = 4096
# Pairs that one program of `_place` ranks by comparing all with all.
MAX_CHUNK = 256


@jit(do_not_specialize=["tokens"])
def _route(
    logits,
    topk_ids,
    topk_weights,
    tokens,
    experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k largest of each row's logits (the lower index where equal), and the softmax over those k."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    live = (token < tokens)[:, None]
    at = token[:, None] * experts + expert[None, :]
    left = tl.load(logits + at, mask=live & (expert < experts)[None, :], other=float("-inf")).to(tl.float32)
    ids = tl.zeros((BLOCK, SLOTS), dtype=tl.int32)
    values = tl.full((BLOCK, SLOTS), float("-inf"), dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        value, index = tl.max(left, axis=1, return_indices=True)
        index = tl.minimum(index, experts - 1)  # rows of NaN must not lead outside
        ids = tl.where(slot[None, :] == i, index[:, None], ids)
        values = tl.where(slot[None, :] == i, value[:, None], values)
        left = tl.where(expert[None, :] == index[:, None], float("-inf"), left)
    values = tl.exp(values - tl.max(values, axis=1)[:, None])
    values = values / tl.sum(values, axis=1)[:, None]
    at = token[:, None] * TOP_K + slot[None, :]
    live = live & (slot < TOP_K)[None, :]
    tl.store(topk_ids + at, ids, mask=live)
    tl.store(topk_weights + at, values, mask=live)


@jit()
def _local_expert(topk_ids, expert_map, pair, live, HAS_MAP: tl.constexpr):
    """Local expert of each pair, -1 where it lives on another rank or the pair isn't live."""
    expert = tl.load(topk_ids + pair, mask=live, other=0).to(tl.int32)
    if HAS_MAP:
        expert = tl.load(expert_map + expert, mask=live, other=-1).to(tl.int32)
    return tl.where(live, expert, -1)


@jit(do_not_specialize=["pairs"])
def _count(topk_ids, expert_map, counts, pairs, HAS_MAP: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """counts [chunks, EXPERTS]: how many pairs of each chunk go to each expert."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = _local_expert(topk_ids, expert_map, pair, pair < pairs, HAS_MAP)
    every = tl.arange(0, EXPERTS)
    count = tl.sum((expert[:, None] == every[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * EXPERTS + every, count)


@jit(do_not_specialize=["pairs", "chunks", "tiles"])
def _place(
    topk_ids,
    expert_map,
    counts,
    order,
    table,
    pairs,
    chunks,
    tiles,
    HAS_MAP: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """order int32 [pairs], stable; table int32 [3, tiles]: a tile's expert (-1: none), first place in order, pairs."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _local_expert(topk_ids, expert_map, pair, pair < pairs, HAS_MAP)
    every = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == every[None, :]).to(tl.int32)
    if ONE_CHUNK:
        total = tl.sum(mine, axis=0)
        before = tl.zeros((EXPERTS,), dtype=tl.int32)
    else:
        total = tl.zeros((EXPERTS,), dtype=tl.int32)
        before = tl.zeros((EXPERTS,), dtype=tl.int32)
        for first in range(0, chunks, 32):
            other = first + tl.arange(0, 32)
            count = tl.load(counts + other[:, None] * EXPERTS + every[None, :], mask=(other < chunks)[:, None], other=0)
            total += tl.sum(count, axis=0)
            before += tl.sum(tl.where((other < chunk)[:, None], count, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    # Rank within the chunk: how many earlier pairs go to the same expert.
    index = tl.arange(0, CHUNK)
    earlier = (expert[None, :] == expert[:, None]) & (index[None, :] < index[:, None])
    place = tl.sum(earlier.to(tl.int32), axis=1) + tl.sum(mine * (start + before)[None, :], axis=1)
    tl.store(order + place, pair, mask=expert >= 0)
    if chunk == 0:
        need = (total + BLOCK_M - 1) // BLOCK_M
        end = tl.cumsum(need, axis=0)
        for first in range(0, tiles, 128):
            tile = first + tl.arange(0, 128)
            owner = tl.sum((tile[:, None] >= end[None, :]).to(tl.int32), axis=1)
            is_owner = (owner[:, None] == every[None, :]).to(tl.int32)
            skip = (tile - tl.sum(is_owner * (end - need)[None, :], axis=1)) * BLOCK_M
            size = tl.minimum(tl.sum(is_owner * total[None, :], axis=1) - skip, BLOCK_M)
            live = tile < tiles
            tl.store(table + tile, tl.where(owner < EXPERTS, owner, -1), mask=live)
            tl.store(table + tiles + tile, tl.sum(is_owner * start[None, :], axis=1) + skip, mask=live)
            tl.store(table + 2 * tiles + tile, size, mask=live)


@jit()
def _decode(words, scales, INTERPRETED: tl.constexpr):
    """words int32 [N, K/8] as `_repack` makes them, scales uint8 [K/32, N] -> weights bf16 [N, K]."""
    N: tl.constexpr = words.shape[0]
    K: tl.constexpr = words.shape[1] * 8
    word = words.to(tl.uint32, bitcast=True)
    pair0 = word & 0x81C081C0
    pair1 = (word << 3) & 0x81C081C0
    pair2 = (word << 6) & 0x81C081C0
    pair3 = ((word << 1) & 0x80008000) | ((word >> 5) & 0x01000100) | ((word >> 4) & 0x00C000C0)
    pairs = tl.reshape(tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3)), (N, K // 2))
    factor = tl.trans(scales.to(tl.uint32) + 126) * 0x00800080  # 2^(s - 1) twice: bit 7 is the exponent's first
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (N, K // 32, 16)), (N, K // 2))
    if INTERPRETED:  # the interpreter has neither assembly nor BF16 arithmetic
        even = (pairs << 16).to(tl.float32, bitcast=True) * (factor << 16).to(tl.float32, bitcast=True)
        odd = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * (factor & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (N, K))
    # Two products at once; SM 8.x has the packed BF16 product only as a fused multiply-add, here of -0.
    pairs = tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, factor, 0x80008000], tl.uint32, is_pure=True, pack=1
    )
    weight = tl.reshape(tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)), (N, K))
    return weight.to(tl.bfloat16, bitcast=True)


@jit()
def _gemm(
    rows,
    weights,
    scales,
    columns,
    row_live,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """rows: BLOCK_M pointers to bf16 [K]; one expert's words [N, K/8], scales [K/32, N] -> f32 [BLOCK_M, BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    block = tl.arange(0, BLOCK_K // 32)
    column_live = columns < N
    x_at = rows[:, None] + k[None, :]
    w_at = weights + columns[:, None] * (K // 8) + word[None, :]
    s_at = scales + block[:, None] * N + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for at in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at, mask=row_live[:, None], other=0.0)
            words = tl.load(w_at, mask=column_live[:, None], other=0)
            scale = tl.load(s_at, mask=column_live[None, :], other=0)
        else:
            x = tl.load(x_at, mask=row_live[:, None] & (k < K - at)[None, :], other=0.0)
            words = tl.load(w_at, mask=column_live[:, None] & (word < (K - at) // 8)[None, :], other=0)
            scale = tl.load(s_at, mask=column_live[None, :] & (block < (K - at) // 32)[:, None], other=0)
        weight = _decode(words, scale, INTERPRETED)
        if INTERPRETED:
            x = x.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total)
        x_at += BLOCK_K
        w_at += BLOCK_K // 8
        s_at += BLOCK_K // 32 * N
    return total


@jit(do_not_specialize=["tiles"])
def _gate_up(
    x,
    w13,
    w13_scale,
    w13_bias,
    order,
    table,
    hidden,
    tiles,
    w13_stride,
    scale_stride,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU_OAI: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """hidden bf16 [pairs, I], in the order of `order`: the activation of x @ w13[expert].T + bias."""
    N: tl.constexpr = 2 * I
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // blocks
    expert = tl.load(table + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + tiles + tile)
    row = tl.arange(0, BLOCK_M)
    row_live = row < tl.load(table + 2 * tiles + tile)
    column0 = tl.program_id(0) % blocks * BLOCK_N
    columns = column0 + tl.arange(0, BLOCK_N)
    token = tl.load(order + first + row, mask=row_live, other=0) // TOP_K
    total = _gemm(
        x + token.to(tl.int64) * H,
        w13 + expert * w13_stride,
        w13_scale + expert * scale_stride,
        columns,
        row_live,
        N,
        H,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        INTERPRETED,
    )
    if HAS_BIAS:
        total += tl.load(w13_bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
    if SWIGLU_OAI:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        gate = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    out = column0 // 2 + tl.arange(0, BLOCK_N // 2)
    at = hidden + (first + row).to(tl.int64)[:, None] * I + out[None, :]
    tl.store(at, (gate * up).to(tl.bfloat16), mask=row_live[:, None] & (out < I)[None, :])


@jit(do_not_specialize=["tiles"])
def _down(
    hidden,
    w2,
    w2_scale,
    w2_bias,
    order,
    table,
    down,
    tiles,
    w2_stride,
    scale_stride,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """down float32 [pairs, H], each pair at its own number: hidden @ w2[expert].T + bias."""
    blocks: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // blocks
    expert = tl.load(table + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + tiles + tile)
    row = tl.arange(0, BLOCK_M)
    row_live = row < tl.load(table + 2 * tiles + tile)
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.load(order + first + row, mask=row_live, other=0)
    total = _gemm(
        hidden + (first + row).to(tl.int64) * I,
        w2 + expert * w2_stride,
        w2_scale + expert * scale_stride,
        columns,
        row_live,
        H,
        I,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        INTERPRETED,
    )
    if HAS_BIAS:
        total += tl.load(w2_bias + expert * H + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    at = down + pair.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(at, total, mask=row_live[:, None] & (columns < H)[None, :])


@jit()
def _combine(
    down,
    topk_ids,
    topk_weights,
    expert_map,
    out,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out bf16 [tokens, H]: the weighted sum of a token's pairs, slot by slot in float32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        weight = tl.load(topk_weights + pair).to(tl.float32)
        width = H
        if HAS_MAP:  # a scalar condition & a block's is no mask to the interpreter of Triton 3.9
            width = tl.where(tl.load(expert_map + tl.load(topk_ids + pair)) >= 0, H, 0)
        total += weight * tl.load(down + pair * H + column, mask=column < width, other=0.0)
    tl.store(out + token * H + column, total.to(tl.bfloat16), mask=column < H)


@dataclass(frozen=True)
class Tiles:
    """One GEMM program's share: block_m pairs x block_n weight rows, block_k values at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tiles_for(pairs: int, experts: int) -> Tiles:
    """Tiles by the average number of pairs per chosen expert: the fastest on an H100 of those that benchmarks/
    triton_tiles.py tries. All fit the 99 KB of shared memory that a block has on SM 12.x."""
    average = pairs / min(experts, pairs)
    if average <= 16:
        return Tiles(16, 64, 256, 4, 3)
    if average <= 64:
        return Tiles(64, 128, 128, 4, 3)
    return Tiles(128, 128, 64, 4, 4)


class Triton(Backend):
    """The grouped layer as Triton kernels, for every NVIDIA GPU with BF16 tensor cores."""

    name = "triton"
    capturable = True
    scale_range = (0, MAX_SCALE)

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        if triton is None:
            return "Triton is not installed"
        if machine.capability is None:
            return "Triton needs an NVIDIA GPU"
        if shape.hidden_size % 32 or shape.intermediate_size % 32:
            return f"sizes {shape.hidden_size} x {shape.intermediate_size} are no multiples of 32"
        return None

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """The checkpoint's layout with the codes of each word rearranged, and scales K-major, [E, K/32, N], so that

        a tile's load is contiguous. In place, an expert at a time.
        """
        for name, scale in (("w13_scale", weights.w13_scale), ("w2_scale", weights.w2_scale)):
            if scale.numel() and int(scale.max()) > MAX_SCALE:
                raise ValueError(
                    f"{name} holds {int(scale.max())}, the triton backend takes at most {MAX_SCALE} "
                    f"(2^{MAX_SCALE - 127}): set MXFP4_SM120_BACKEND=tiled"
                )
        prepared = {name: tensor for name, tensor in vars(weights).items() if tensor is not None}
        for name in ("w13", "w2"):
            prepared[name] = prepared[name].view(torch.int32)
            for words in prepared[name]:
                words.copy_(_repack(words))
        for name in ("w13_scale", "w2_scale"):
            scales = prepared[name]
            prepared[name] = scales.view(scales.shape[0], scales.shape[2], scales.shape[1])
            for scale, turned in zip(scales, prepared[name], strict=True):
                turned.copy_(scale.T.clone(memory_format=torch.contiguous_format))
        return prepared

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        out = torch.empty_like(x)
        for start in range(0, x.shape[0], MAX_TOKENS):
            part = slice(start, start + MAX_TOKENS)
            self._forward(prepared, x[part], topk_ids[part], topk_weights[part], expert_map, out[part])
        return out

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        tokens, experts = router_logits.shape
        top_k = self.shape.top_k
        topk_ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
        topk_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
        if tokens:
            block = 1 if tokens <= 1024 else 8
            _route[(triton.cdiv(tokens, block),)](
                router_logits.contiguous(),
                topk_ids,
                topk_weights,
                tokens,
                experts,
                TOP_K=top_k,
                SLOTS=triton.next_power_of_2(top_k),
                EXPERTS=triton.next_power_of_2(experts),
                BLOCK=block,
                num_warps=1,
            )
        return self.forward(prepared, x, topk_ids, topk_weights, expert_map)

    def _forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None,
        out: Tensor,
    ) -> None:
        shape, device = self.shape, x.device
        hidden_size, intermediate_size, top_k = shape.hidden_size, shape.intermediate_size, shape.top_k
        pairs = topk_ids.numel()
        tiles = tiles_for(pairs, shape.local_experts)
        # An expert's last tile may be part empty, so there are at most this many; the rest of the grid leaves at once.
        most_tiles = pairs // tiles.block_m + min(shape.local_experts, pairs)
        experts = max(2, triton.next_power_of_2(shape.local_experts))
        chunk = min(MAX_CHUNK, max(16, triton.next_power_of_2(pairs)))
        chunks = triton.cdiv(pairs, chunk)
        has_map = expert_map is not None
        gemm = {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "INTERPRETED": INTERPRETED,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

        order = torch.empty(pairs, dtype=torch.int32, device=device)
        table = torch.empty(3, most_tiles, dtype=torch.int32, device=device)
        counts = torch.empty(chunks, experts, dtype=torch.int32, device=device) if chunks > 1 else order
        if chunks > 1:
            _count[(chunks,)](topk_ids, expert_map, counts, pairs, HAS_MAP=has_map, EXPERTS=experts, CHUNK=chunk)
        _place[(chunks,)](
            topk_ids,
            expert_map,
            counts,
            order,
            table,
            pairs,
            chunks,
            most_tiles,
            HAS_MAP=has_map,
            ONE_CHUNK=chunks == 1,
            EXPERTS=experts,
            CHUNK=chunk,
            BLOCK_M=tiles.block_m,
            num_warps=8 if chunk > 64 else 4,
        )

        hidden = torch.empty(pairs, intermediate_size, dtype=x.dtype, device=device)
        w13, w13_scale = prepared["w13"], prepared["w13_scale"]
        _gate_up[(most_tiles * triton.cdiv(2 * intermediate_size, tiles.block_n),)](
            x,
            w13,
            w13_scale,
            prepared.get("w13_bias"),
            order,
            table,
            hidden,
            most_tiles,
            w13.stride(0),
            w13_scale.stride(0),
            H=hidden_size,
            I=intermediate_size,
            TOP_K=top_k,
            HAS_BIAS="w13_bias" in prepared,
            SWIGLU_OAI=shape.activation is Activation.SWIGLU_OAI,
            ALPHA=SWIGLU_ALPHA,
            LIMIT=SWIGLU_LIMIT,
            **gemm,
        )

        down = torch.empty(pairs, hidden_size, dtype=torch.float32, device=device)
        w2, w2_scale = prepared["w2"], prepared["w2_scale"]
        _down[(most_tiles * triton.cdiv(hidden_size, tiles.block_n),)](
            hidden,
            w2,
            w2_scale,
            prepared.get("w2_bias"),
            order,
            table,
            down,
            most_tiles,
            w2.stride(0),
            w2_scale.stride(0),
            H=hidden_size,
            I=intermediate_size,
            HAS_BIAS="w2_bias" in prepared,
            **gemm,
        )
        _combine[(x.shape[0], triton.cdiv(hidden_size, 1024))](
            down,
            topk_ids,
            topk_weights,
            expert_map,
            out,
            H=hidden_size,
            TOP_K=top_k,
            HAS_MAP=has_map,
            BLOCK=1024,
        )


def _repack(words: Tensor) -> Tensor:
    """int32 words of 8 codes each, in the checkpoint's order -> the same with the bits where `_decode` wants them.

    Code 2j goes to the low half and 2j + 1 to the high, so that one word operation decodes both: each half holds the
    signs of pairs 0 to 3 in bits 15, 12, 9, 14, their exponents and mantissas in bits 8-6, 5-3, 2-0, and 13, 11, 10.
    """
    packed = torch.zeros_like(words)
    for half in range(2):
        for pair, (sign_bit, value_bit) in enumerate(((15, 6), (12, 3), (9, 0), (14, 10))):
            code = words >> (8 * pair + 4 * half)
            value = (code & 7) << value_bit
            if pair == 3:  # bit 12 is taken: the high exponent bit moves one further
                value = ((code & 3) << 10) | ((code & 4) << 11)
            packed |= (((code & 8) >> 3 << sign_bit) | value) << (16 * half)
    return packed

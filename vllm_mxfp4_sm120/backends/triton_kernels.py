# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `triton.py`, in the order in which they are launched.

A *pair* is a (token, slot) of the router's choice, numbered token * top_k + slot; `order` lists the pairs expert by
expert, and a *tile* is up to BLOCK_M consecutive entries of `order` with one expert. Nothing is added atomically: the
same bits on every run.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the module still loads, so that `Triton.why_not` can say so
    triton = tl = None

    def jit(**_):
        return lambda function: function


@jit()
def _ordered(bits):
    """A float32's bits -> an int32 in the floats' order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit(do_not_specialize=["tokens"])
def route(
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
    """The k largest of each row's logits and the softmax over those k, as `moe.topk_softmax`.

    Of equals the lower index, and NaN above all. They are compared as integers, for where NaN stands among floats is
    the hardware's affair.
    """
    lowest: tl.constexpr = -2147483648
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    live = (token < tokens)[:, None]
    at = token[:, None] * experts + expert[None, :]
    value = tl.load(logits + at, mask=live & (expert < experts)[None, :], other=0.0).to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 is 0
    left = tl.where(value != value, 0x7FFFFFFF, _ordered(bits))
    left = tl.where((expert < experts)[None, :], left, lowest)
    ids = tl.zeros((BLOCK, SLOTS), dtype=tl.int32)
    values = tl.full((BLOCK, SLOTS), float("-inf"), dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        largest, index = tl.max(left, axis=1, return_indices=True)
        ids = tl.where(slot[None, :] == i, index[:, None], ids)
        values = tl.where(slot[None, :] == i, _ordered(largest).to(tl.float32, bitcast=True)[:, None], values)
        left = tl.where(expert[None, :] == index[:, None], lowest, left)
    values = tl.exp(values - tl.max(values, axis=1)[:, None])
    values = values / tl.sum(values, axis=1)[:, None]
    at = token[:, None] * TOP_K + slot[None, :]
    live = live & (slot < TOP_K)[None, :]
    tl.store(topk_ids + at, ids, mask=live)
    tl.store(topk_weights + at, values, mask=live)


@jit()
def _local_expert(topk_ids, expert_map, pair, live, MAPPED: tl.constexpr, LOCAL: tl.constexpr):
    """Local expert of each pair, -1 where it isn't here or the pair isn't live. `routing.local_ids` says what is here.

    MAPPED: the experts that the map has, 0 without one. In 64 bits: no id may come back into range by being narrowed.
    """
    expert = tl.load(topk_ids + pair, mask=live, other=-1).to(tl.int64)
    if MAPPED:
        expert = tl.load(expert_map + expert, mask=(expert >= 0) & (expert < MAPPED), other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < LOCAL), expert, -1).to(tl.int32)


@jit(do_not_specialize=["pairs"])
def count(
    topk_ids,
    expert_map,
    counts,
    pairs,
    MAPPED: tl.constexpr,
    LOCAL: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts [chunks, EXPERTS]: how many pairs of each chunk go to each expert."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = _local_expert(topk_ids, expert_map, pair, pair < pairs, MAPPED, LOCAL)
    every = tl.arange(0, EXPERTS)
    count = tl.sum((expert[:, None] == every[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * EXPERTS + every, count)


@jit(do_not_specialize=["pairs", "chunks", "tiles"])
def place(
    topk_ids,
    expert_map,
    counts,
    order,
    table,
    pairs,
    chunks,
    tiles,
    MAPPED: tl.constexpr,
    LOCAL: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """order int32 [pairs], stable; table int32 [3, tiles]: a tile's expert (-1: none), first place in order, pairs."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _local_expert(topk_ids, expert_map, pair, pair < pairs, MAPPED, LOCAL)
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
    # 2^(s - 1) twice, where s + 5 is stored: bit 7 is the exponent's first.
    factor = tl.trans(scales.to(tl.uint32) + 121) * 0x00800080
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
    factor,
    expert,
    columns,
    row_live,
    N,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
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
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
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
    if HAS_FACTOR:
        total *= tl.load(factor + expert)
    return total


@jit()
def _activate(gate_up, SWIGLU_OAI: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """gate_up f32 [BLOCK_M, BLOCK_N], columns gate, up, gate, up... -> f32 [BLOCK_M, BLOCK_N / 2]: `moe.activate`."""
    gate, up = tl.split(tl.reshape(gate_up, (gate_up.shape[0], gate_up.shape[1] // 2, 2)))
    if SWIGLU_OAI:
        # Told to, these keep NaN; by themselves they would take the limit for it.
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
        gate = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    return gate * up


@jit(do_not_specialize=["tiles"])
def gate_up(
    x,
    w13,
    w13_scale,
    w13_factor,
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
    HAS_FACTOR: tl.constexpr,
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
        w13_factor,
        expert,
        columns,
        row_live,
        N,
        H,
        BLOCK_K,
        HAS_FACTOR,
        INTERPRETED,
    )
    if HAS_BIAS:
        total += tl.load(w13_bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    activated = _activate(total, SWIGLU_OAI, ALPHA, LIMIT)
    out = column0 // 2 + tl.arange(0, BLOCK_N // 2)
    at = hidden + (first + row).to(tl.int64)[:, None] * I + out[None, :]
    tl.store(at, activated.to(tl.bfloat16), mask=row_live[:, None] & (out < I)[None, :])


@jit(do_not_specialize=["tiles"])
def down(
    hidden,
    w2,
    w2_scale,
    w2_factor,
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
    HAS_FACTOR: tl.constexpr,
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
        w2_factor,
        expert,
        columns,
        row_live,
        H,
        I,
        BLOCK_K,
        HAS_FACTOR,
        INTERPRETED,
    )
    if HAS_BIAS:
        total += tl.load(w2_bias + expert * H + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    at = down + pair.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(at, total, mask=row_live[:, None] & (columns < H)[None, :])


@jit()
def combine(
    down,
    topk_ids,
    topk_weights,
    expert_map,
    out,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    MAPPED: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out bf16 [tokens, H]: the weighted sum of a token's pairs, slot by slot in float32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        here = _local_expert(topk_ids, expert_map, pair, pair >= 0, MAPPED, LOCAL) >= 0
        # What isn't here has no row in `down`, and adds nothing even if its gate is NaN.
        weight = tl.where(here, tl.load(topk_weights + pair).to(tl.float32), 0.0)
        width = tl.where(here, H, 0)  # a scalar condition & a block's is no mask to the interpreter of Triton 3.9
        total += weight * tl.load(down + pair * H + column, mask=column < width, other=0.0)
    tl.store(out + token * H + column, total.to(tl.bfloat16), mask=column < H)

"""numba kernels for float32 on the CPU, which `nanopd.cpu.ops` launches. They see numpy arrays only.

Every kernel computes each output element in one fixed order of operations, whatever other rows share the launch.
So logits do not depend on the batch, nor on where a prompt was cut into chunks. Kernels release the GIL and are
cached on disk. Products and attention run on all threads that `numba.set_num_threads` allows. A cache kv is
[num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim].
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, njit, prange

from nanopd.cpu.dot_tile import COLUMNS, LANES, ROWS, make_dot_tile

# These flags of fastmath let sums be divided among vector lanes and multiply-adds be fused; NaN and infinity keep their
# meaning. Python's error model would check for division by zero, and so keep loops from being vectorised.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}

ROWS_PER_TASK = 32  # rows of the weight in a task of `linear`

_prefetching_tile = make_dot_tile(COLUMNS, prefetch=True)
_tile = make_dot_tile(COLUMNS, prefetch=False)
_narrow_tile = make_dot_tile(1, prefetch=True)


@njit(inline="always")
def _exp(x):  # float32 -> float32
    """e**x to about 1 ulp, written so that loops over it vectorise (the C library's expf does not).

    The polynomial is that of the Cephes library's expf (S. Moshier): e**x = 2**n * e**r with |r| <= ln(2) / 2.
    """
    x = min(max(x, float32(-87.0)), float32(88.0))
    n = np.floor(x * float32(1.44269504088896341) + float32(0.5))
    r = x - n * float32(0.693359375) - n * float32(-2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1.0)
    return p * np.int32((int32(n) + int32(127)) << int32(23)).view(np.float32)


@njit(**OPTIONS)
def rms_norm(x, weight, eps, out):
    """x, out [num_tokens, hidden]; weight [hidden]."""
    hidden = x.shape[1]
    for t in range(x.shape[0]):
        total = float32(0.0)
        for i in range(hidden):
            total += x[t, i] * x[t, i]
        scale = float32(1.0) / np.sqrt(total / float32(hidden) + eps)
        for i in range(hidden):
            out[t, i] = weight[i] * (x[t, i] * scale)


@njit(**OPTIONS)
def silu_and_mul(gate_up, out):
    """out [num_tokens, size] = silu(gate_up[:, :size]) * gate_up[:, size:]."""
    size = out.shape[1]
    for t in range(out.shape[0]):
        for i in range(size):
            gate = gate_up[t, i]
            out[t, i] = gate / (float32(1.0) + _exp(-gate)) * gate_up[t, size + i]


@njit(**OPTIONS)
def _norm_and_rotate(head, norm, eps, cos_sin, out):
    """head, out, norm (or None), cos_sin (cosines, then sines): [head_dim]; rotates halves, as Llama does."""
    half = head.shape[0] // 2
    scale = float32(1.0)
    if norm is not None:
        total = float32(0.0)
        for i in range(head.shape[0]):
            total += head[i] * head[i]
        scale = float32(1.0) / np.sqrt(total / float32(head.shape[0]) + eps)
    for i in range(half):
        first, second = head[i], head[half + i]
        if norm is not None:
            first, second = norm[i] * (first * scale), norm[half + i] * (second * scale)
        cos, sin = cos_sin[i], cos_sin[half + i]
        out[i] = first * cos - second * sin
        out[half + i] = second * cos + first * sin


@njit(**OPTIONS)
def rotary_and_store(qkv, positions, slot_mapping, cos_sin, kv, layer, q_norm, k_norm, eps, q_out):
    """qkv [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]; q_out [num_tokens, num_heads, head_dim]."""
    num_heads, head_dim = q_out.shape[1], q_out.shape[2]
    num_kv_heads, block_size = kv.shape[3], kv.shape[4]
    for t in range(qkv.shape[0]):
        angles = cos_sin[positions[t]]
        for h in range(num_heads):
            _norm_and_rotate(qkv[t, h * head_dim : (h + 1) * head_dim], q_norm, eps, angles, q_out[t, h])
        block, offset = slot_mapping[t] // block_size, slot_mapping[t] % block_size
        for h in range(num_kv_heads):
            key = (num_heads + h) * head_dim
            value = key + num_kv_heads * head_dim
            _norm_and_rotate(qkv[t, key : key + head_dim], k_norm, eps, angles, kv[block, layer, 0, h, offset])
            for d in range(head_dim):
                kv[block, layer, 1, h, offset, d] = qkv[t, value + d]


@njit(**OPTIONS)
def _score_keys(q, keys, num_keys, scale, scores):
    """scores[g, j] = scale * q[g] . keys[j]; four keys at a time, so that each number of q is used four times.

    The last key stands for keys past it, and the scores of those are not used.
    """
    last = num_keys - 1
    for j in range(0, num_keys, 4):
        j1, j2, j3 = min(j + 1, last), min(j + 2, last), min(j + 3, last)
        key0, key1, key2, key3 = keys[j], keys[j1], keys[j2], keys[j3]
        for g in range(q.shape[0]):
            s0 = s1 = s2 = s3 = float32(0.0)
            for d in range(q.shape[1]):
                s0 += q[g, d] * key0[d]
                s1 += q[g, d] * key1[d]
                s2 += q[g, d] * key2[d]
                s3 += q[g, d] * key3[d]
            scores[g, j], scores[g, j1], scores[g, j2], scores[g, j3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale


@njit(**OPTIONS)
def _add_values(weights, values, num_keys, out):
    """out[g] += sum of weights[g, j] * values[j]; four values at a time, to load and store out less often."""
    whole = num_keys - num_keys % 4
    for j in range(0, whole, 4):
        value0, value1, value2, value3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        for g in range(out.shape[0]):
            w0, w1, w2, w3 = weights[g, j], weights[g, j + 1], weights[g, j + 2], weights[g, j + 3]
            for d in range(out.shape[1]):
                out[g, d] += w0 * value0[d] + w1 * value1[d] + w2 * value2[d] + w3 * value3[d]
    for j in range(whole, num_keys):
        for g in range(out.shape[0]):
            for d in range(out.shape[1]):
                out[g, d] += weights[g, j] * values[j, d]


@njit(**OPTIONS)
def _softmax(scores):
    """The softmax of each row, in place."""
    for g in range(scores.shape[0]):
        row = scores[g]
        largest = row[0]
        for j in range(1, row.shape[0]):
            largest = max(largest, row[j])
        total = float32(0.0)
        for j in range(row.shape[0]):
            weight = _exp(row[j] - largest)
            row[j] = weight
            total += weight
        for j in range(row.shape[0]):
            row[j] /= total


@njit(**OPTIONS)
def _attend(q, kv, layer, kv_head, block_table, context_len, scale, out):
    """Attention of the query heads of one token that share a KV head; q, out [group, head_dim].

    The scores of the whole context come first, then the softmax, then the weighted sum of V: K and V are read once.
    """
    block_size = kv.shape[4]
    scores = np.empty((q.shape[0], context_len), np.float32)
    for start in range(0, context_len, block_size):
        keys = kv[block_table[start // block_size], layer, 0, kv_head]
        _score_keys(q, keys, min(block_size, context_len - start), scale, scores[:, start:])
    _softmax(scores)
    out[:] = float32(0.0)
    for start in range(0, context_len, block_size):
        values = kv[block_table[start // block_size], layer, 1, kv_head]
        _add_values(scores[:, start:], values, min(block_size, context_len - start), out)


@njit(parallel=True, **OPTIONS)
def paged_attention(q, kv, layer, block_tables, context_lens, scale, out):
    """q, out [num_tokens, num_heads, head_dim]; context_lens [num_tokens], the token itself included.

    block_tables [num_tokens or 1, max_blocks] has one table for each token, or one for all.
    """
    num_tokens, num_kv_heads = q.shape[0], kv.shape[3]
    group = q.shape[1] // num_kv_heads
    for unsigned in prange(num_tokens * num_kv_heads):
        task = int64(unsigned)
        index, h = task // num_kv_heads, task % num_kv_heads
        # Late tokens of a chunk cost more than early ones. Tokens from both ends in turn give threads equal shares.
        t = index // 2 if index % 2 == 0 else num_tokens - 1 - index // 2
        block_table = block_tables[t % block_tables.shape[0]]
        heads = slice(h * group, (h + 1) * group)
        _attend(q[t, heads], kv, layer, h, block_table, context_lens[t], scale, out[t, heads])


@njit(**OPTIONS)
def _add_rest(weight, row, x, bias, out):
    """Adds what the tiles leave out to out[:, row : row + ROWS]: the last in_features % LANES products and the bias."""
    start = x.shape[1] // LANES * LANES
    for t in range(out.shape[0]):
        for r in range(row, row + ROWS):
            rest = float32(0.0)
            for k in range(start, x.shape[1]):
                rest += weight[r, k] * x[t, k]
            out[t, r] += rest
            if bias is not None:
                out[t, r] += bias[r]


@njit(parallel=True, **OPTIONS)
def linear(x, weight, bias, out):
    """out [num_tokens, out_features >= ROWS] = x [num_tokens, in_features] @ weight.T + bias (or None).

    weight [out_features, in_features]. Where ROWS does not divide out_features, the last tile repeats some rows.
    """
    num_tokens, out_features = out.shape
    num_tasks = max(out_features // ROWS_PER_TASK, 1)  # the last one takes the remainder, so that no two share a row
    needs_rest = bias is not None or x.shape[1] % LANES > 0
    for task in prange(num_tasks):
        last = out_features if task == num_tasks - 1 else (task + 1) * ROWS_PER_TASK
        for first in range(task * ROWS_PER_TASK, last, ROWS):
            row = min(first, out_features - ROWS)
            t = 0  # loops over ranges measured 10 % slower for one token
            if num_tokens >= COLUMNS:
                _prefetching_tile(weight, row, x, 0, out)
                t = COLUMNS
            while t + COLUMNS <= num_tokens:
                _tile(weight, row, x, t, out)
                t += COLUMNS
            while t < num_tokens:
                _narrow_tile(weight, row, x, t, out)
                t += 1
            if needs_rest:
                _add_rest(weight, row, x, bias, out)

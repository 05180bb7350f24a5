"""Attention of chunks of prompts: all rows of a step together, in torch's kernels.

K and V of the rows' contexts are gathered from the cache, token after token. Flash attention takes all rows in one
call, packed. Where cuDNN is faster (on Hopper it is twice as fast; the first step measures it), it takes long prompts.
cuDNN makes a plan for each new shape, which takes 36 ms, and its causal mask knows no history. So it gets the head of a
prompt's first chunk, a multiple of GRAIN tokens; the rest is a packed row with the head as its history. Prompts of
equal length share a call once as many prompts of that length have come together REPEATS times. Knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanopd.models.batch import PrefillRow
from nanopd.models.operations import AttentionSpec

Rows = Sequence[PrefillRow]

LONG = 1024  # a first chunk of as many tokens, or more, has a head that is worth a call of its own
GRAIN = 256  # tokens; the length of a head is a multiple of it
REPEATS = 3
MEASURED_TOKENS = 2048
MEASURED_RUNS = 5


@dataclass(frozen=True, slots=True)
class Dense:
    """Prompts of equal length without history, or the head of one prompt; each attends to itself, causally."""

    start: int  # the first of them among the step's tokens
    count: int
    length: int
    context: int  # where their context starts in the gathered contexts


@dataclass(frozen=True, slots=True)
class Packed:
    """Segments that follow each other in Q and in K. The last query of each sees all of its keys, if it has any."""

    q_lens: list[int]
    k_lens: list[int]
    starts: Tensor  # [2 (Q, K), num_segments + 1] int32


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls that make up a step's attention, the same in each layer."""

    blocks: Tensor  # [num_context] int64, the block of each token of the contexts
    offsets: Tensor  # [num_context] int64, the place of each token in its block
    dense: list[Dense]
    packed: Packed | None


@dataclass(frozen=True, slots=True)
class Backends:
    packed: Callable[[Tensor, Tensor, Tensor, Packed, float], Tensor]  # has the signature of `flash_attention`
    dense: Callable[..., Tensor] | None  # has the signature of `cudnn_attention`; None where packed is as fast


class PrefillAttention:
    """Attention of the chunks of one step after another.

    `begin_step` comes before the first layer of a step, then each layer calls the object.
    """

    def __init__(self, max_tokens: int, backends: Backends | None = None) -> None:
        """A step has at most `max_tokens` tokens. `backends` are by default those that are fastest on the device."""
        self._max_tokens, self._backends = max_tokens, backends
        self._plan: Plan | None = None
        self._num_seen: Counter[tuple[int, int]] = Counter()  # steps, by number and length of rows of equal length

    def begin_step(self, slot_mapping: Tensor) -> None:
        """slot_mapping [T] int64 has the slots of the step's tokens."""
        self._slot_mapping, self._plan = slot_mapping, None

    def __call__(self, q: Tensor, kv: Tensor, layer: int, spec: AttentionSpec, rows: Rows) -> Tensor:
        """Causal attention of the rows over their histories and themselves, all already stored in the cache.

        q [T, num_heads, head_dim] is of all tokens of the step, and so is the result; what it holds for tokens of no
        row is undefined. The rows are the same in each layer, in the order of their tokens, the last ones of the step.
        """
        if self._backends is None:
            self._backends = fastest_backends(q, spec)
            if self._backends.dense is not None:
                self._warm_up(q, spec, self._backends)
        if self._plan is None:
            has_dense = self._backends.dense is not None
            self._plan = make_plan(rows, self._slot_mapping, spec.layout.block_size, has_dense, self._is_frequent(rows))
        return attend(q, gather(kv, layer, self._plan), self._plan, self._backends, spec.scale)

    def _is_frequent(self, rows: Rows) -> bool:
        """Whether the rows are of equal length, and as many of that length have come together REPEATS times before."""
        length, *others = {row.end - row.start for row in rows}
        if others:
            return False
        self._num_seen[len(rows), length] += 1
        return self._num_seen[len(rows), length] > REPEATS

    def _warm_up(self, q: Tensor, spec: AttentionSpec, backends: Backends) -> None:
        """Lets the dense backend make its plans for heads of all lengths: 1 s for 8,192 tokens on an H200."""
        queries = q.new_zeros(self._max_tokens, *q.shape[1:])
        context = q.new_zeros(self._max_tokens, 2, spec.layout.num_kv_heads, q.shape[2])
        nowhere = torch.empty(0, dtype=torch.int64)
        for length in range(LONG, self._max_tokens + 1, GRAIN):
            plan = Plan(nowhere, nowhere, [Dense(0, 1, length, 0)], None)
            attend(queries, context, plan, backends, spec.scale)


def make_plan(rows: Rows, slot_mapping: Tensor, block_size: int, has_dense: bool, share_call: bool) -> Plan:
    """Decides which call computes which tokens. With `share_call`, rows of equal length may share a dense call."""
    lengths = [row.end - row.start for row in rows]
    is_fresh = [has_dense and not row.num_cached for row in rows]
    are_alike = share_call and all(is_fresh) and len(set(lengths)) == 1 and lengths[0] % GRAIN == 0
    is_long = [fresh and (length >= LONG or are_alike) for fresh, length in zip(is_fresh, lengths, strict=True)]
    heads = [length // GRAIN * GRAIN if long else 0 for length, long in zip(lengths, is_long, strict=True)]
    has_rest = [head < length for head, length in zip(heads, lengths, strict=True)]
    segments = [(rows[0].start, 0)]  # the decode rows and the heads of rows are segments without keys
    for row, length, head in zip(rows, lengths, heads, strict=True):
        segments += [(head, 0), (length - head, row.num_cached + length)]
    # Contexts of packed rows come first, so that they follow each other.
    order = sorted(range(len(rows)), key=lambda i: not has_rest[i])
    contexts = [rows[i].num_cached + lengths[i] for i in order]
    where = dict(zip(order, accumulate(contexts, initial=0), strict=False))
    dense = [Dense(row.start, 1, heads[i], where[i]) for i, row in enumerate(rows) if heads[i]]
    if are_alike:
        dense = [Dense(rows[0].start, len(rows), lengths[0], 0)]
    slots = torch.cat([_slots(rows[i], slot_mapping, block_size) for i in order])
    packed = _pack([s for s in segments if s[0]], slots.device) if any(has_rest) else None
    return Plan(slots // block_size, slots % block_size, dense, packed)


def _slots(row: PrefillRow, slot_mapping: Tensor, block_size: int) -> Tensor:
    """The slots [num_cached + length] int64 of the tokens of the row's context."""
    if not row.num_cached:
        return slot_mapping[row.start : row.end]
    offsets = torch.arange(block_size, device=slot_mapping.device)
    slots = row.block_table.long()[:, None] * block_size + offsets
    return slots.view(-1)[: row.num_cached + row.end - row.start]


def _pack(segments: list[tuple[int, int]], device: torch.device) -> Packed:
    q_lens, k_lens = ([s[i] for s in segments] for i in range(2))
    starts = [list(accumulate(lens, initial=0)) for lens in (q_lens, k_lens)]
    on_host = torch.tensor(starts, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Packed(q_lens, k_lens, on_host.to(device, non_blocking=True))


def gather(kv: Tensor, layer: int, plan: Plan) -> Tensor:
    """K and V of the contexts, [num_context, 2, num_kv_heads, head_dim]; no length changes their strides."""
    sixteen_bytes = kv.view(torch.complex128)  # an index then copies 16 bytes at a time
    return sixteen_bytes[:, layer][plan.blocks, :, :, plan.offsets].view(kv.dtype)


def attend(q: Tensor, context: Tensor, plan: Plan, backends: Backends, scale: float) -> Tensor:
    """Computes one layer; `context` is a result of `gather`. Returns [T, num_heads, head_dim]."""
    keys, values = context.unbind(1)
    out = None if plan.packed is None else backends.packed(q, keys, values, plan.packed, scale)
    for part in plan.dense:
        assert backends.dense
        size = part.count * part.length
        tokens, places = slice(part.start, part.start + size), slice(part.context, part.context + size)
        batch = (x.unflatten(0, (part.count, part.length)) for x in (q[tokens], keys[places], values[places]))
        y = backends.dense(*(x.transpose(1, 2) for x in batch), scale).transpose(1, 2).flatten(0, 1)
        if size == len(q):
            return y
        out = torch.empty_like(q) if out is None else out
        out[tokens] = y
    assert out is not None
    return out


def has_flash_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch has flash attention for heads of this type and size, without which nothing here works."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def flash_attention(q: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float) -> Tensor:
    """Attention of packed segments: the shape of q, undefined where a segment has no keys.

    q [T, num_heads, head_dim]; keys and values [>= sum of k_lens, num_kv_heads, head_dim]; scale is that of the scores.
    """
    seen = [q_len for q_len, k_len in zip(packed.q_lens, packed.k_lens, strict=True) if k_len]
    max_q = max(2, *seen)  # torch takes 1 to mean that each segment has one query
    lens = packed.starts[0], packed.starts[1], max_q, max(packed.k_lens)
    return torch.ops.aten._flash_attention_forward(q, keys, values, *lens, 0.0, True, False, scale=scale)[0]


def cudnn_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of q [count, num_heads, length, head_dim]; keys and values have num_kv_heads heads."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, keys, values, None, False, 0.0, True, scale=scale)[0]


def fastest_backends(q: Tensor, spec: AttentionSpec) -> Backends:
    """The fastest backends for queries like q [T, num_heads, head_dim], by a measurement on the current stream."""
    queries = q.new_zeros(MEASURED_TOKENS, *q.shape[1:])
    keys = q.new_zeros(MEASURED_TOKENS, spec.layout.num_kv_heads, q.shape[2])
    packed = _pack([(MEASURED_TOKENS, MEASURED_TOKENS)], q.device)
    batch_q, batch_k = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys))
    flash_ms = _milliseconds(lambda: flash_attention(queries, keys, keys, packed, spec.scale))
    try:
        cudnn_ms = _milliseconds(lambda: cudnn_attention(batch_q, batch_k, batch_k, spec.scale))
    except RuntimeError:  # cuDNN does not know this device or type
        return Backends(flash_attention, None)
    return Backends(flash_attention, cudnn_attention if cudnn_ms < flash_ms else None)


def _milliseconds(run: Callable[[], Tensor]) -> float:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(MEASURED_RUNS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / MEASURED_RUNS

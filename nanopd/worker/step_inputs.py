"""From the rows of a StepBatch to arrays of indices: which tokens, at which positions, written and read where.

Numpy on the host; knows slots and block tables, no model and no device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanopd.messages import RowFlag, StepBatch

FROM_SLOT = -1  # in place of a token id: stands for the token last sampled in the row's slot


@dataclass(frozen=True, slots=True)
class ChunkInputs:
    """A row of several tokens: a chunk of a prompt."""

    start: int  # the chunk's tokens are start .. end of the step's tokens
    end: int
    num_cached: int  # tokens of the sequence before the chunk
    slot: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens: those of the decode rows first, then those of the chunks. All arrays int64.

    A draft is a decode row by itself, whose context ends with it. So rows with drafts need no code of their own, and
    a kernel or a graph for n decode rows takes any rows with n tokens together.
    """

    token_ids: np.ndarray  # [T], a token id or FROM_SLOT
    token_slots: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    slot_mapping: np.ndarray  # [T], block_id * block_size + offset: where K and V of each token go
    num_decode_rows: int
    chunks: list[ChunkInputs]
    logit_indices: np.ndarray  # [num_samples], the tokens whose successors are sampled, in the order of the rows
    sampled_slots: np.ndarray  # [num_samples]
    sampled_positions: np.ndarray  # [num_samples], of the tokens to come


def step_inputs(batch: StepBatch, block_tables: np.ndarray, block_size: int) -> StepInputs:
    """`block_tables` [num_slots, max_blocks] int32, the batch's own updates applied."""
    lens = batch.row_lens
    has_drafts = (batch.row_flags & RowFlag.DRAFTS) != 0
    is_decode = (lens == 1) | has_drafts
    order = np.argsort(~is_decode, kind="stable")
    first = np.cumsum(lens[order]) - lens[order]  # [num_rows], where each row's tokens begin, in the new order
    row = np.repeat(order, lens[order])  # [T], the batch's row of each token
    within = np.arange(len(row)) - np.repeat(first, lens[order])
    slots = batch.row_slots[row].astype(np.int64)
    positions = batch.row_starts[row] + within
    blocks = block_tables[slots, positions // block_size].astype(np.int64)
    num_decode_rows = int(lens[is_decode].sum())
    first_of_row = np.empty(len(order), np.int64)
    first_of_row[order] = first
    ends = first_of_row + lens
    num_samples = np.where(batch.row_flags & RowFlag.SAMPLE, np.where(has_drafts, lens, 1), 0)
    sampled = np.repeat(np.arange(len(lens)), num_samples)  # [num_samples], rows
    before_end = (np.cumsum(num_samples) - 1)[sampled] - np.arange(len(sampled))  # samples of the row still to come
    return StepInputs(
        token_ids=_token_ids(batch, row, within),
        token_slots=slots,
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        num_decode_rows=num_decode_rows,
        chunks=[_chunk(batch, r, int(first_of_row[r])) for r in order.tolist() if not is_decode[r]],
        logit_indices=ends[sampled] - 1 - before_end,
        sampled_slots=batch.row_slots[sampled].astype(np.int64),
        sampled_positions=(batch.row_starts + lens)[sampled].astype(np.int64) - before_end,
    )


def _token_ids(batch: StepBatch, row: np.ndarray, within: np.ndarray) -> np.ndarray:
    from_slot = (batch.row_flags & RowFlag.FROM_SLOT) != 0
    host_lens = np.where(from_slot, 0, batch.row_lens)
    host_first = np.cumsum(host_lens) - host_lens  # [num_rows], index into batch.token_ids
    token_ids = np.full(len(row), FROM_SLOT, np.int64)
    on_host = np.flatnonzero(~from_slot[row])
    token_ids[on_host] = batch.token_ids[host_first[row[on_host]] + within[on_host]]
    return token_ids


def _chunk(batch: StepBatch, row: int, first: int) -> ChunkInputs:
    length = int(batch.row_lens[row])
    return ChunkInputs(first, first + length, int(batch.row_starts[row]), int(batch.row_slots[row]))

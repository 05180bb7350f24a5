"""The index arithmetic of a step, against a plain loop over rows and tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanopd.messages import BLOCK_COPY, SLOT_INIT, TABLE_UPDATE, RowFlag, StepBatch
from nanopd.worker.decode_graphs import ladder
from nanopd.worker.step_inputs import FROM_SLOT, step_inputs

NUM_SLOTS, MAX_BLOCKS, BLOCK_SIZE = 12, 8, 4

ROWS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=NUM_SLOTS
)


def make_batch(rows: list[tuple[int, int, bool, bool]]) -> StepBatch:
    """Rows of (start, length, samples, from its slot if it has one token, else with drafts), on slots 0, 1, ..."""
    flags = [
        (RowFlag.SAMPLE if samples else 0)
        | (RowFlag.FROM_SLOT if special and length == 1 else 0)
        | (RowFlag.DRAFTS if special and samples and length > 1 else 0)
        for _, length, samples, special in rows
    ]
    num_host_tokens = sum(length for (_, length, _, _), f in zip(rows, flags, strict=True) if not f & RowFlag.FROM_SLOT)
    columns = [range(len(rows)), [r[0] for r in rows], [r[1] for r in rows], flags]
    return StepBatch(
        1,
        np.empty(0, SLOT_INIT),
        np.empty(0, np.int32),
        np.empty(0, TABLE_UPDATE),
        np.empty(0, BLOCK_COPY),
        *(np.array(column, np.int32) for column in columns),
        np.arange(100, 100 + num_host_tokens, dtype=np.int32),
    )


@given(ROWS)
def test_every_token_of_every_row(rows: list[tuple[int, int, bool, bool]]) -> None:
    batch = make_batch(rows)
    tables = np.random.default_rng(0).permutation(NUM_SLOTS * MAX_BLOCKS).reshape(NUM_SLOTS, MAX_BLOCKS)
    inputs = step_inputs(batch, tables.astype(np.int32), BLOCK_SIZE)
    expected: dict[int, list[tuple[int, int, int, int]]] = {}  # row -> token, slot, position, cache slot
    taken = 0
    for slot, (start, length, _, _) in enumerate(rows):
        expected[slot] = []
        for position in range(start, start + length):
            token = FROM_SLOT
            if not batch.row_flags[slot] & RowFlag.FROM_SLOT:
                token, taken = int(batch.token_ids[taken]), taken + 1
            block = int(tables[slot, position // BLOCK_SIZE])
            expected[slot].append((token, slot, position, block * BLOCK_SIZE + position % BLOCK_SIZE))
    has_drafts = (batch.row_flags & RowFlag.DRAFTS) != 0
    decodes = [slot for slot, row in enumerate(rows) if row[1] == 1 or has_drafts[slot]]
    chunks = [slot for slot in range(len(rows)) if slot not in decodes]
    tokens = [token for slot in decodes + chunks for token in expected[slot]]
    columns = (inputs.token_ids, inputs.token_slots, inputs.positions, inputs.slot_mapping)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == tokens
    assert inputs.num_decode_rows == sum(rows[slot][1] for slot in decodes)
    assert [(c.slot, c.num_cached, c.end - c.start) for c in inputs.chunks] == [(s, *rows[s][:2]) for s in chunks]
    sampled = [t for s, row in enumerate(rows) if row[2] for t in (expected[s] if has_drafts[s] else expected[s][-1:])]
    assert [tokens[i] for i in inputs.logit_indices] == sampled
    assert inputs.sampled_slots.tolist() == [slot for _, slot, _, _ in sampled]
    assert inputs.sampled_positions.tolist() == [position + 1 for _, _, position, _ in sampled]


@given(st.integers(1, 1000))
def test_ladder_covers_every_batch(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= max_rows
    assert len(sizes) < 2 or sizes[-2] < max_rows

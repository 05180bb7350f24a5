"""The tensors of one step, as the decoder sees them. Knows no sequences, no sampling and no scheduling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A chunk of one sequence with any number of tokens."""

    start: int  # the chunk's tokens are start .. end of the step's tokens
    end: int
    num_cached: int  # tokens of the sequence before the chunk
    block_table: Tensor  # [num_blocks] int32


@dataclass(slots=True)
class InputBatch:
    """One step of T tokens: first those of the decode rows (one each), then those of the prefill rows."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64, the slot that each token's K and V go to
    num_decode_rows: int
    decode_block_tables: Tensor  # [num_decode_rows, max_blocks] int32
    decode_seq_lens: Tensor  # [num_decode_rows] int32, context length including the current token
    prefill_rows: tuple[PrefillRow, ...]
    logit_indices: Tensor | None  # [num_samples] int64, the tokens whose logits are wanted; None for all

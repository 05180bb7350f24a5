"""Runs a decoder on a paged cache by hand: what a worker does, without scheduling and sampling."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopd.checkpoints.model_files import read_model_config
from nanopd.config import KVLayout, ModelConfig
from nanopd.cpu import ops
from nanopd.models import Decoder, InputBatch, PrefillRow, load_model

BLOCK_SIZE = 16


def load(
    path: Path,
    dtype: str = "float32",
    config: ModelConfig | None = None,  # by default what the files say
    load_format: str = "auto",
    max_model_len: int = 512,
    **options: Any,
) -> Decoder:
    """A decoder on the CPU."""
    config = config or read_model_config(path, dtype, device_is_cpu=True)
    layout, device = KVLayout.of(config, BLOCK_SIZE), torch.device("cpu")
    return load_model(config, layout, ops, path, device, load_format, max_model_len, **options)


@dataclass
class PagedSequence:
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0


class PagedRun:
    """A decoder with a KV cache that is NaN wherever nothing was stored, and block ids in random order."""

    def __init__(self, model: Decoder, num_blocks: int = 64) -> None:
        layout = model.weights.layers[0].attention.spec.layout
        self.model = model
        self.block_size = layout.block_size
        self.kv = torch.full(layout.shape(num_blocks), torch.nan, dtype=getattr(torch, layout.dtype))
        self.free_blocks = list(range(1, num_blocks))
        random.Random(0).shuffle(self.free_blocks)

    def step(self, rows: list[tuple[PagedSequence, int]]) -> list[Tensor]:
        """Computes the next n tokens of each sequence; returns their logits, [n, vocab] for each row.

        Rows with one token are decode rows if the sequence has a history.
        """
        order = sorted(range(len(rows)), key=lambda i: not self._is_decode(*rows[i]))
        sequences = [rows[i] for i in order]
        for sequence, n in sequences:
            while len(sequence.block_table) * self.block_size < sequence.num_computed + n:
                sequence.block_table.append(self.free_blocks.pop())
        with torch.inference_mode():
            logits = self.model.forward(self._batch(sequences), self.kv)
        for sequence, n in sequences:
            sequence.num_computed += n
        parts = dict(zip(order, logits.split([n for _, n in sequences]), strict=True))
        return [parts[i] for i in range(len(rows))]

    def _is_decode(self, sequence: PagedSequence, n: int) -> bool:
        return n == 1 and sequence.num_computed > 0

    def _batch(self, rows: list[tuple[PagedSequence, int]]) -> InputBatch:
        decode = [sequence for sequence, n in rows if self._is_decode(sequence, n)]
        max_blocks = max((len(sequence.block_table) for sequence in decode), default=0)
        tables = [sequence.block_table + [0] * (max_blocks - len(sequence.block_table)) for sequence in decode]
        token_ids, positions, slots, prefill_rows = [], [], [], []
        for sequence, n in rows:
            start, cached = len(token_ids), sequence.num_computed
            where = range(cached, cached + n)
            token_ids += sequence.token_ids[cached : cached + n]
            positions += where
            slots += [sequence.block_table[p // self.block_size] * self.block_size + p % self.block_size for p in where]
            if not self._is_decode(sequence, n):
                table = torch.tensor(sequence.block_table, dtype=torch.int32)
                prefill_rows.append(PrefillRow(start, start + n, cached, table))
        return InputBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            num_decode_rows=len(decode),
            decode_block_tables=torch.tensor(tables, dtype=torch.int32).view(len(decode), max_blocks),
            decode_seq_lens=torch.tensor([s.num_computed + 1 for s in decode], dtype=torch.int32),
            prefill_rows=tuple(prefill_rows),
            logit_indices=torch.arange(len(token_ids)),
        )

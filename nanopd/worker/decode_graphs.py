"""Decode steps as CUDA graphs: one captured for each batch size of a ladder, replayed for any step that fits.

A step with fewer rows than its graph is filled up with rows of the last slot, whose KV entries go to the null block.
Only steps whose rows all have one token and all sample are run here; the greedy token is chosen inside the graph.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanopd.models.batch import InputBatch
from nanopd.models.decoder import Decoder
from nanopd.worker.step_inputs import FROM_SLOT, StepInputs
from nanopd.worker.upload import Uploader

NUM_COLUMNS = 4  # the inputs of a graph: token ids, slots, positions, slot mapping
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LADDER_STEP = 64  # the distance of batch sizes above those of LADDER

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [size, vocab_size], the model's dtype
    tokens: Tensor  # [size] int64


def ladder(max_rows: int) -> list[int]:
    """Batch sizes to capture, ascending; the last is at least `max_rows`."""
    sizes = [*LADDER, *range(LADDER[-1] + LADDER_STEP, max_rows + LADDER_STEP, LADDER_STEP)]
    return sizes[: bisect_left(sizes, max_rows) + 1]


class DecodeGraphs:
    """The graphs of one model on one GPU."""

    def __init__(self, decoder: Decoder, kv: Tensor, tables: Tensor, last_tokens: Tensor, max_rows: int) -> None:
        """Captures all graphs.

        Args:
            tables: [num_slots, max_blocks] int32; tables and last_tokens [num_slots] int64 must stay at their addresses
        """
        self._decoder, self._kv, self._tables, self._last_tokens = decoder, kv, tables, last_tokens
        self._sizes = ladder(max_rows)
        self._columns = torch.zeros(NUM_COLUMNS * self._sizes[-1], dtype=torch.int64, device=kv.device)
        self._graphs: dict[int, _Graph] = {}
        start = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._graphs[size] = self._capture(size, pool)
        logger.info("%d decode graphs captured in %.1f s", len(self._sizes), time.perf_counter() - start)

    def can_run(self, inputs: StepInputs) -> bool:
        num_rows = len(inputs.token_ids)
        return not inputs.chunks and len(inputs.logit_indices) == num_rows <= self._sizes[-1]

    def run(self, inputs: StepInputs, upload: Uploader) -> tuple[Tensor, Tensor]:
        """Logits [num_rows, vocab_size] in the model's dtype, and greedy tokens [num_rows] int64.

        The tokens are written to last_tokens too. Both results are overwritten by a later step, on the same stream.
        """
        num_rows = len(inputs.token_ids)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        columns = [inputs.token_ids, inputs.token_slots, inputs.positions, inputs.slot_mapping]
        filled = [_fill(column, size, filler) for column, filler in zip(columns, self._fillers(), strict=True)]
        upload(filled, out=self._columns[: NUM_COLUMNS * size])
        graph = self._graphs[size]
        graph.graph.replay()
        return graph.logits[:num_rows], graph.tokens[:num_rows]

    def _fillers(self) -> tuple[int, int, int, int]:
        return 0, len(self._last_tokens) - 1, -1, 0  # position -1 gives a context of 0 tokens

    def _capture(self, size: int, pool: Any) -> _Graph:
        columns = self._columns[: NUM_COLUMNS * size].view(NUM_COLUMNS, size)
        for column, filler in zip(columns, self._fillers(), strict=True):
            column.fill_(filler)
        stream = torch.cuda.Stream(self._kv.device)
        with torch.cuda.stream(stream):
            self._forward(columns)  # this compiles and loads kernels and makes workspaces
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits, tokens = self._forward(columns)
        return _Graph(graph, logits, tokens)

    def _forward(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        token_ids, slots, positions, slot_mapping = columns
        batch = InputBatch(
            token_ids=torch.where(token_ids == FROM_SLOT, self._last_tokens[slots], token_ids),
            positions=positions.clamp(min=0),
            slot_mapping=slot_mapping,
            num_decode_rows=len(slots),
            decode_block_tables=self._tables.index_select(0, slots),
            decode_seq_lens=(positions + 1).int(),
            prefill_rows=(),
            logit_indices=None,
        )
        logits = self._decoder.forward(batch, self._kv)
        tokens = logits.argmax(-1)
        self._last_tokens.index_copy_(0, slots, tokens)
        return logits, tokens


def _fill(column: np.ndarray, size: int, filler: int) -> np.ndarray:
    return np.concatenate((column, np.full(size - len(column), filler, np.int64)))

"""Executes steps: keeps the slots' state, makes input tensors of a StepBatch, runs the model, samples.

Knows slots, blocks and rows; which request they belong to, and why they are computed, is the parent's to know.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig
from nanopd.messages import RowFlag, StepBatch, StepResult
from nanopd.models.batch import InputBatch, PrefillRow
from nanopd.models.decoder import Decoder
from nanopd.worker.sampler import Sampler


class ModelRunner:
    """One model on one device, with its KV cache and its slots."""

    def __init__(self, decoder: Decoder, kv: Tensor, config: EngineConfig, model: ModelConfig) -> None:
        max_len = config.max_model_len or model.max_position_embeddings
        max_blocks = -(-max_len // config.block_size)
        num_slots = config.num_slots
        self._decoder = decoder
        self._kv = kv  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        self._block_size = config.block_size
        self._block_tables = np.zeros((num_slots, max_blocks), np.int32)
        self._last_tokens = np.zeros(num_slots, np.int64)
        self._sampler = Sampler(num_slots, model.vocab_size, kv.device)

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepResult:
        start = time.perf_counter()
        self._apply_changes(batch)
        rows = np.flatnonzero(batch.row_flags & RowFlag.SAMPLE)
        logits = self._decoder.forward(self._input_batch(batch, rows), self._kv)  # [num_samples, vocab_size]
        slots = batch.row_slots[rows].astype(np.int64)
        positions = (batch.row_starts + batch.row_lens)[rows].astype(np.int64)  # of the tokens to come
        host_slots = torch.from_numpy(slots)
        tokens = self._sampler.sample(logits, host_slots, torch.from_numpy(positions))
        logprobs = self._sampler.logprobs(logits, host_slots, tokens)
        self._last_tokens[slots] = tokens.numpy()
        return StepResult(
            batch.step_id,
            int((time.perf_counter() - start) * 1e6),
            tokens.int().numpy(),
            logprobs.rows,
            logprobs.ids.numpy(),
            logprobs.values.numpy(),
        )

    def _apply_changes(self, batch: StepBatch) -> None:
        if len(batch.slot_inits):
            self._sampler.apply(batch.slot_inits, batch.stop_ids)
        updates, copies = batch.table_updates, batch.copies
        self._block_tables[updates["slot"], updates["index"]] = updates["block_id"]
        if len(copies):
            src, dst = (torch.from_numpy(copies[name].astype(np.int64)) for name in ("src", "dst"))
            self._kv[dst] = self._kv[src]

    def _input_batch(self, batch: StepBatch, sampled_rows: np.ndarray) -> InputBatch:
        """The rows as tensors, those of one token first."""
        lens, block_size = batch.row_lens, self._block_size
        order = np.argsort(lens > 1, kind="stable")
        first = np.cumsum(lens[order]) - lens[order]  # [num_rows], where each row's tokens begin, in the new order
        row = np.repeat(order, lens[order])  # [num_tokens], the batch's row of each token
        within = np.arange(len(row)) - np.repeat(first, lens[order])
        positions = batch.row_starts[row].astype(np.int64) + within
        blocks = self._block_tables[batch.row_slots[row], positions // block_size].astype(np.int64)

        num_decodes = int(np.count_nonzero(lens == 1))
        decodes = order[:num_decodes]
        seq_lens = batch.row_starts[decodes] + 1
        max_blocks = -(-int(seq_lens.max(initial=0)) // block_size)
        tables = self._block_tables[batch.row_slots[decodes], :max_blocks]
        first_of_row = np.empty(len(order), np.int64)
        first_of_row[order] = first
        return InputBatch(
            token_ids=torch.from_numpy(self._token_ids(batch, row, within)),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
            num_decode_rows=num_decodes,
            decode_block_tables=torch.from_numpy(tables),
            decode_seq_lens=torch.from_numpy(seq_lens),
            prefill_rows=tuple(self._prefill_row(batch, int(r), int(first_of_row[r])) for r in order[num_decodes:]),
            logit_indices=torch.from_numpy((first_of_row + lens - 1)[sampled_rows]),
        )

    def _token_ids(self, batch: StepBatch, row: np.ndarray, within: np.ndarray) -> np.ndarray:
        """[num_tokens] int64: from the message, or what was sampled last in the row's slot."""
        from_slot = (batch.row_flags & RowFlag.FROM_SLOT) != 0
        host_lens = np.where(from_slot, 0, batch.row_lens)
        host_first = np.cumsum(host_lens) - host_lens  # [num_rows], index into batch.token_ids
        tokens = self._last_tokens[batch.row_slots[row]]
        on_host = np.flatnonzero(~from_slot[row])
        tokens[on_host] = batch.token_ids[host_first[row[on_host]] + within[on_host]]
        return tokens

    def _prefill_row(self, batch: StepBatch, row: int, first: int) -> PrefillRow:
        start, length = int(batch.row_starts[row]), int(batch.row_lens[row])
        num_blocks = -(-(start + length) // self._block_size)
        table = torch.from_numpy(self._block_tables[batch.row_slots[row], :num_blocks])
        return PrefillRow(first, first + length, start, table)

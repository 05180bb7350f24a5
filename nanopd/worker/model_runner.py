"""Executes steps: keeps the slots' state, turns a StepBatch into tensors, runs the model, samples.

Knows slots, blocks and rows; which request they belong to, and why they are computed, is the parent's to know. On a
GPU nothing here waits for the device: `launch` queues a step, and what it returns says when the step is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig
from nanopd.messages import SlotExtras, StepBatch, StepResult
from nanopd.models.batch import InputBatch, PrefillRow
from nanopd.models.decoder import Decoder
from nanopd.worker.block_mover import copy_blocks
from nanopd.worker.decode_graphs import DecodeGraphs
from nanopd.worker.kv_cache import allocate_host_kv
from nanopd.worker.pending import mark
from nanopd.worker.sampler import Sampler, TokenLogprobs, joined, token_logprobs
from nanopd.worker.step_inputs import FROM_SLOT, ChunkInputs, StepInputs, step_inputs
from nanopd.worker.upload import Uploader

WARM_UP_RATIO = 1.25  # of a length of the warm-up to the next
PROMPT_PIECE = 256  # as many tokens of prompts have their logits in memory at a time


class LaunchedStep:
    """A step that has been queued on the device."""

    def __init__(self, step_id: int, device: torch.device) -> None:
        self._step_id, self._device = step_id, device
        self._start = mark(device)

    def set_outputs(self, tokens: Tensor, logprobs: TokenLogprobs, errors: np.ndarray) -> None:
        """Takes the outputs when everything has been queued; tokens [num_samples] are on the device."""
        self._logprob_rows, self._errors = logprobs.rows, errors
        self._outputs = [_to_host(t) for t in (tokens.int(), logprobs.ids, logprobs.values)]
        self._end = mark(self._device)

    def is_done(self) -> bool:
        return self._end.query()

    def result(self) -> StepResult:
        """The outputs on the host; the step must be done."""
        token_ids, ids, values = (output.numpy() for output in self._outputs)
        duration_us = int(self._start.elapsed_time(self._end) * 1e3)
        return StepResult(self._step_id, duration_us, token_ids, self._logprob_rows, ids, values, self._errors)


class ModelRunner:
    """One model on one device, with its KV cache and its slots."""

    def __init__(self, decoder: Decoder, kv: Tensor, config: EngineConfig, model: ModelConfig) -> None:
        max_len = config.max_len_of(model)
        num_slots = config.num_slots + 1  # the last slot is for rows that only fill up a graph
        self._decoder = decoder
        self._kv = kv  # of the layout that the decoder was loaded with
        self._host_kv = allocate_host_kv(kv, config, model)
        self.num_host_blocks = len(self._host_kv)
        self._block_size = config.block_size
        self._host_tables = np.zeros((num_slots, -(-max_len // config.block_size)), np.int32)
        self._tables = torch.from_numpy(self._host_tables).to(kv.device)  # on the CPU both are the same memory
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=kv.device)
        self._sampler = Sampler(num_slots, model.vocab_size, kv.device)
        self._upload = Uploader(kv.device)
        self._graphs: DecodeGraphs | None = None
        with torch.inference_mode():
            self._sampler.warm_up(self._warm_up(2))
            if kv.device.type == "cuda":
                for num_tokens in warm_up_lengths(min(config.max_num_batched_tokens, max_len)):
                    self._warm_up(num_tokens)
                self._graphs = DecodeGraphs(decoder, kv, self._tables, self._last_tokens, config.max_decode_rows)

    def _warm_up(self, num_tokens: int) -> Tensor:
        """Logits of a decode row, computed beside a chunk in blocks that no sequence has yet.

        So kernels are compiled, loaded and chosen now, and memory is taken, rather than at the first requests.
        """
        zeros = np.zeros(1 + num_tokens, np.int64)
        positions = np.concatenate([zeros[:1], np.arange(num_tokens)])
        chunk = ChunkInputs(start=1, end=1 + num_tokens, num_cached=0, slot=0)
        inputs = StepInputs(zeros, zeros, positions, positions, 1, [chunk], zeros[:1], zeros[:1], zeros[:1])
        return self._run(inputs)[0]

    def take_extras(self, extras: SlotExtras) -> None:
        """Takes what a sequence that enters a slot in the next step has beside its slot's record."""
        self._sampler.take_extras(extras)

    @torch.inference_mode()
    def launch(self, batch: StepBatch, between_layers: Callable[[], object]) -> LaunchedStep:
        """Queues a step on the device; on the CPU, executes it.

        `between_layers` is called between the layers of a step, unless the step is a captured graph.
        """
        self._apply_changes(batch)
        inputs = step_inputs(batch, self._host_tables, self._block_size)
        step = LaunchedStep(batch.step_id, self._kv.device)  # a step's time begins when its work can be started
        of_prompts: list[TokenLogprobs] = []
        if self._graphs is not None and self._graphs.can_run(inputs):
            logits, tokens = self._graphs.run(inputs, self._upload)
        else:
            (logits, of_prompts), tokens = self._run(inputs, between_layers), None
        host_slots, positions = inputs.sampled_slots, inputs.sampled_positions
        if tokens is None or not self._sampler.is_plain_argmax(host_slots, positions):
            tokens = self._sampler.sample(logits, host_slots, positions)
            (slots,) = self._upload([host_slots])
            self._last_tokens.index_copy_(0, slots, tokens)
        logprobs = joined([*self._sampler.logprobs(logits, host_slots, tokens), *of_prompts])
        step.set_outputs(tokens, logprobs, self._sampler.take_errors())
        return step

    def _apply_changes(self, batch: StepBatch) -> None:
        if len(batch.slot_inits):
            self._sampler.apply(batch.slot_inits, batch.stop_ids)
        updates = batch.table_updates
        if len(updates):
            columns = [updates[name].astype(np.int64) for name in ("slot", "index", "block_id")]
            self._host_tables[columns[0], columns[1]] = columns[2]
            if self._tables.is_cuda:
                slots, indices, block_ids = self._upload(columns)
                self._tables.index_put_((slots, indices), block_ids.int())
        if len(batch.copies):
            self._copy_blocks(*(batch.copies[name].astype(np.int64) for name in ("src", "dst")))

    def _copy_blocks(self, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
        """Copies blocks within the cache, then to host memory, then from there; ids [n] int64, negative on the host."""
        kinds = (dst_ids < 0) + 2 * (src_ids < 0)
        order, counts = np.argsort(kinds, kind="stable"), np.bincount(kinds, minlength=3).tolist()
        uploaded = self._upload([np.abs(src_ids[order]), np.abs(dst_ids[order])])
        within, out, back = zip(*(ids.split(counts) for ids in uploaded), strict=True)
        self._decoder.ops.copy_blocks(self._kv, *within)
        copy_blocks(self._kv, out[0], self._host_kv, out[1])
        copy_blocks(self._host_kv, back[0], self._kv, back[1])

    def _run(
        self, inputs: StepInputs, between_layers: Callable[[], object] = lambda: None
    ) -> tuple[Tensor, list[TokenLogprobs]]:
        """Logits [num_samples, vocab_size] of any step, in the model's dtype, and the logprobs of prompts."""
        n = inputs.num_decode_rows
        token_ids, slots, positions, slot_mapping, logit_indices = self._upload(
            [inputs.token_ids, inputs.token_slots, inputs.positions, inputs.slot_mapping, inputs.logit_indices]
        )
        batch = InputBatch(
            token_ids=torch.where(token_ids == FROM_SLOT, self._last_tokens[slots], token_ids),
            positions=positions,
            slot_mapping=slot_mapping,
            num_decode_rows=n,
            decode_block_tables=self._tables.index_select(0, slots[:n]),
            decode_seq_lens=(positions[:n] + 1).int(),
            prefill_rows=tuple(map(self._prefill_row, inputs.chunks)),
            logit_indices=logit_indices,
        )
        x = self._decoder.hidden(batch, self._kv, between_layers)  # [T, hidden]
        return self._decoder.logits(x.index_select(0, logit_indices)), self._prompt_logprobs(inputs, x)

    def _prompt_logprobs(self, inputs: StepInputs, x: Tensor) -> list[TokenLogprobs]:
        """The logprobs of prompts that ask for them, by pieces, as the logits of a whole prompt are large."""
        targets = self._sampler.prompt_targets(inputs.token_slots, inputs.positions)
        if targets is None:
            return []
        columns = self._upload([targets.indices, targets.token_ids, targets.wanted])
        rows, num_best, parts = (-1 - targets.slots).astype(np.int32), int(targets.wanted.max(initial=0)), []
        for start in range(0, len(rows), PROMPT_PIECE):
            piece = slice(start, start + PROMPT_PIECE)
            indices, token_ids, wanted = (column[piece] for column in columns)
            logits = self._decoder.logits(x.index_select(0, indices))
            parts.append(TokenLogprobs(rows[piece], *token_logprobs(logits, token_ids, wanted, num_best)))
        return parts

    def _prefill_row(self, chunk: ChunkInputs) -> PrefillRow:
        num_tokens = chunk.num_cached + chunk.end - chunk.start
        table = self._tables[chunk.slot, : -(-num_tokens // self._block_size)]
        return PrefillRow(chunk.start, chunk.end, chunk.num_cached, table)


def warm_up_lengths(most: int) -> list[int]:
    """Lengths of chunks, the longest first, so close that hardly any choice by shape changes only in between."""
    return [round(most / WARM_UP_RATIO**i) for i in range(1 + int(math.log(most / 2, WARM_UP_RATIO)))]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, complete when the step is done."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

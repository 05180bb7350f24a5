"""A worker: one model, one KV cache, on one device; does what messages say.

`Worker` is the part without processes, so that a test can hold one in its own. Never imports `core`: which request a
slot or a block belongs to is the parent's to know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from nanopd.config import EngineConfig, ModelConfig
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.models.loader import load_model
from nanopd.worker.decode_graphs import ladder
from nanopd.worker.kv_cache import allocate_kv, derive_num_blocks, map_kv
from nanopd.worker.kv_transfer import KVTransfer
from nanopd.worker.model_runner import ModelRunner


class Launched(Protocol):
    """Something under way on the device."""

    def is_done(self) -> bool: ...

    def result(self) -> StepResult | TransferAck:
        """To be called when it is done."""


class Done:
    """Something that was done at once."""

    def __init__(self, result: StepResult | TransferAck) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult | TransferAck:
        return self._result


class Worker:
    """Loads on construction."""

    def __init__(
        self,
        index: int,
        config: EngineConfig,
        model: ModelConfig,
        path: Path,
        kv_memories: list[SharedMemory],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`kv_memories`: of all workers, by index; `on_progress(done_bytes, total_bytes)` hears of loaded weights."""
        self._config, self._model, self._kv_memories = config, model, kv_memories
        max_len = config.max_len_of(model)
        device = torch.device(config.workers[index].device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        decoder = load_model(model, path, device, config.load_format, max_len, config.seed, on_progress)
        if device.type == "cuda":
            decoder.ops = cuda_operations(config, model, device)
        self.num_blocks = derive_num_blocks(decoder, config, model)
        kv = allocate_kv(kv_memories[index], self.num_blocks, device, config, model)
        self._runner = ModelRunner(decoder, kv, config, model)
        self._transfer = KVTransfer(index, kv, config.verify_transfers)

    def connect(self, worker: int, generation: int, num_blocks: int) -> None:
        """Open the KV cache of a peer, which has `num_blocks` blocks."""
        if self._config.workers[worker].device == "cpu":
            kv = map_kv(self._kv_memories[worker], num_blocks, self._config, self._model)
            self._transfer.connect(worker, generation, kv)

    def launch(self, message: StepBatch | TransferPlan) -> Launched:
        """Start what a message says, in the order of calls; on the CPU it is done at once."""
        if isinstance(message, StepBatch):
            return self._runner.launch(message)
        return Done(self._transfer.execute(message))


def cuda_operations(config: EngineConfig, model: ModelConfig, device: torch.device) -> Any:
    from nanopd.cuda import PagedDecodeAttention  # not at the top: numba's CUDA side is needed by GPU workers only
    from nanopd.cuda.operations import Operations

    return Operations(
        PagedDecodeAttention(
            ladder(config.max_num_seqs)[-1],
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            config.block_size,
            getattr(torch, model.dtype),
            device,
        ),
        config.max_num_batched_tokens,
    )

"""A worker: one model, one KV cache, on one device; does what messages say.

`Worker` is the part without processes, so that a test can hold one in its own. Never imports `core`: which request a
slot or a block belongs to is the parent's to know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nanopd.config import EngineConfig, ModelConfig
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.models.loader import load_model
from nanopd.worker.kv_cache import allocate_kv, derive_num_blocks, map_kv
from nanopd.worker.kv_transfer import KVTransfer
from nanopd.worker.model_runner import ModelRunner


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
        max_len = config.max_model_len or model.max_position_embeddings
        device = torch.device(config.workers[index].device)
        decoder = load_model(model, path, device, config.load_format, max_len, config.seed, on_progress)
        self.num_blocks = derive_num_blocks(config, model)
        kv = allocate_kv(kv_memories[index], self.num_blocks, config, model)
        self._runner = ModelRunner(decoder, kv, config, model)
        self._transfer = KVTransfer(index, kv, config.verify_transfers)

    def connect(self, worker: int, generation: int, num_blocks: int) -> None:
        """Open the KV cache of a peer, which has `num_blocks` blocks."""
        kv = map_kv(self._kv_memories[worker], num_blocks, self._config, self._model)
        self._transfer.connect(worker, generation, kv)

    def execute(self, message: StepBatch | TransferPlan) -> StepResult | TransferAck:
        if isinstance(message, StepBatch):
            return self._runner.execute(message)
        return self._transfer.execute(message)

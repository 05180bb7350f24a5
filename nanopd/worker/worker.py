"""A worker: one model and one KV cache on one device, which does what messages say.

`Worker` is the part without processes, so that a test can hold one in its own. Never imports `core`: which request a
slot or a block belongs to is the parent's to know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nanopd.config import EngineConfig, ModelConfig
from nanopd.cpu import ops
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Peer, SlotExtras, StepBatch, TransferPath, TransferPlan
from nanopd.models import Operations, load_model
from nanopd.worker.decode_graphs import ladder
from nanopd.worker.kv_cache import allocate_kv, derive_num_blocks, export_kv, open_kv
from nanopd.worker.kv_transfer import KVTransfer, path_between
from nanopd.worker.launched import Done, Launched
from nanopd.worker.model_runner import ModelRunner


class Worker:
    """Loads its model and allocates its cache on construction."""

    def __init__(
        self,
        index: int,
        config: EngineConfig,
        model: ModelConfig,
        path: Path,
        memories: Memories,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`on_progress(done_bytes, total_bytes)` hears of loaded weights.

        Raises:
            ConfigError: not enough memory, or blocks cannot get here as the configuration says.
        """
        self._index, self._memories = index, memories
        max_len = config.max_len_of(model)
        device = torch.device(config.workers[index].device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.paths = {
            peer: path_between(peer, index, config) for peer in range(len(config.workers)) if peer != index
        }  # by source, how blocks get here
        self._layout = config.kv_layout(model)
        operations = cuda_operations(config, model, device) if device.type == "cuda" else ops
        decoder = load_model(
            model, self._layout, operations, path, device, config.load_format, max_len, config.seed, on_progress
        )
        self.num_blocks = derive_num_blocks(decoder, config, model)
        kv = allocate_kv(memories.caches[index], self.num_blocks, self._layout, device)
        self.kv_handle = export_kv(kv) if TransferPath.IPC in self.paths.values() else None
        self._runner = ModelRunner(decoder, kv, config, model)
        self._between_layers: Callable[[], object] = lambda: None
        self._transfer = KVTransfer(index, kv, memories.relays, config.verify_transfers)

    def connect(self, worker: int, peer: Peer | None) -> None:
        """Opens the KV cache of another worker in place of its older one; None only closes that."""
        self._transfer.disconnect(worker)  # first, as the new cache may need the memory of the old one
        if peer is not None and worker != self._index:
            path, shared = self.paths[worker], self._memories.caches[worker]
            cache = open_kv(path, shared, peer, self._layout)
            self._transfer.connect(worker, peer.generation, cache)

    def knows(self, plan: TransferPlan) -> bool:
        """Whether the plan's other worker has been connected; if not, it is about to be."""
        return self._transfer.knows(plan)

    def call_between_layers(self, function: Callable[[], object]) -> None:
        """Has `function` called between the layers of steps that are launched from now on, but of captured graphs.

        Launching a long prompt takes the host a while, and what else is done meanwhile should not wait for its end.
        """
        self._between_layers = function

    def launch(self, message: SlotExtras | StepBatch | TransferPlan) -> Launched:
        """Begins what a message says: steps in the order of calls, plans beside them. On the CPU a step is done here.

        Plans of one pair of workers must be polled one after the other, in the order of calls.
        """
        if isinstance(message, SlotExtras):
            self._runner.take_extras(message)
            return Done(None)
        if isinstance(message, StepBatch):
            return self._runner.launch(message, self._between_layers)
        return self._transfer.launch(message)


def cuda_operations(config: EngineConfig, model: ModelConfig, device: torch.device) -> Operations:
    """The operations of a GPU for this model."""
    from nanopd.cuda import operations, prefill  # imported here, as CPU workers load nothing of CUDA

    dtype, sizes = getattr(torch, model.dtype), (model.head_dim, config.block_size)
    decode_attention = prefill_attention = None
    if operations.has_kernels(dtype, *sizes, model.hidden_size, model.intermediate_size):
        max_rows, layout = ladder(config.max_decode_rows)[-1], config.kv_layout(model)
        decode_attention = operations.PagedDecodeAttention(max_rows, model.num_heads, layout, dtype, device)
    if prefill.has_flash_attention(dtype, model.head_dim):
        prefill_attention = prefill.PrefillAttention(config.max_num_batched_tokens)
    return operations.CudaOperations(ops, decode_attention, prefill_attention)

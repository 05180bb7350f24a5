"""A worker: one model, one KV cache, on one device; does what messages say.

`Worker` is the part without processes, so that a test can hold one in its own. Never imports `core`: which request a
slot or a block belongs to is the parent's to know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig
from nanopd.cpu import ops
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Peer, StepBatch, ToWorker, TransferPath, TransferPlan
from nanopd.models import Operations, load_model
from nanopd.worker.decode_graphs import ladder
from nanopd.worker.kv_cache import allocate_kv, derive_num_blocks, export_kv, open_kv
from nanopd.worker.kv_transfer import KVTransfer, paths_to
from nanopd.worker.model_runner import ModelRunner
from nanopd.worker.pending import Done, Pending


class Worker:
    """What one worker process does: steps by its `ModelRunner`, plans by its `KVTransfer`."""

    def __init__(
        self,
        index: int,
        config: EngineConfig,
        model: ModelConfig,
        memories: Memories,
        paths: dict[int, TransferPath],
        kv: Tensor,
        runner: ModelRunner | None,
        transfer: KVTransfer,
    ) -> None:
        """A worker made of its parts.

        Args:
            paths: by source, how blocks get here.
            kv: [num_blocks, ...], the cache that `runner` and `transfer` read and write.
            runner: None: the worker is never sent a step, and has no host blocks.

        Raises:
            ConfigError: other processes cannot open the cache.
        """
        self._index, self._config, self._model, self._memories = index, config, model, memories
        self._runner, self._transfer = runner, transfer
        self._layout = config.kv_layout(model)
        self._between_layers: Callable[[], object] = lambda: None
        self.num_blocks = len(kv)
        self.num_host_blocks = 1 if runner is None else runner.num_host_blocks
        self.paths = paths
        self.kv_handle = export_kv(kv) if TransferPath.IPC in paths.values() else None

    @classmethod
    def load(
        cls,
        index: int,
        config: EngineConfig,
        model: ModelConfig,
        path: Path,
        memories: Memories,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Worker:
        """A worker with the weights of `path`; `on_progress(done_bytes, total_bytes)` hears of them while they load.

        Raises:
            ConfigError: there is not enough memory, or blocks cannot get here as the configuration says.
        """
        device, paths = use_device(config.workers[index].device), paths_to(index, config)
        layout = config.kv_layout(model)
        operations = cuda_operations(config, model, device) if device.type == "cuda" else ops
        sizes = config.load_format, config.max_len_of(model), config.seed
        decoder = load_model(model, layout, operations, path, device, *sizes, on_progress)
        kv = allocate_kv(memories.caches[index], derive_num_blocks(decoder, config, model), layout, device)
        transfer = KVTransfer(index, kv, memories.relays, config.verify_transfers)
        return cls(index, config, model, memories, paths, kv, ModelRunner(decoder, kv, config, model), transfer)

    def connect(self, worker: int, peer: Peer | None) -> None:
        """Open the KV cache of another worker, in place of its older one. None: the worker is dead, so close that."""
        self._transfer.disconnect(worker)  # before a cache is opened that may need the memory of the old one
        if peer is not None and worker != self._index:
            path, shared = self.paths[worker], self._memories.caches[worker]
            cache = open_kv(path, shared, peer, self._layout)
            self._transfer.connect(worker, peer.generation, cache)

    def knows(self, plan: TransferPlan) -> bool:
        """Whether the plan's other worker has been connected; if not, it is about to be."""
        return self._transfer.knows(plan)

    def call_between_layers(self, function: Callable[[], object]) -> None:
        """Have `function` called between the layers of steps that are launched from now on, a captured graph's aside.

        Launching a long prompt takes the host a while, and what else is done meanwhile should not wait for its end.
        """
        self._between_layers = function

    def launch(self, message: ToWorker) -> Pending:
        """Begin what a message says: steps in the order of calls, plans beside them; on the CPU steps are done at once.

        Plans of one pair of workers are to be polled one after the other, in the order of calls.
        """
        if isinstance(message, TransferPlan):
            return self._transfer.launch(message)
        assert self._runner is not None
        if isinstance(message, StepBatch):
            return self._runner.launch(message, self._between_layers)
        self._runner.take_extras(message)
        return Done(None)


def use_device(name: str) -> torch.device:
    """The device of that name, on which this process computes from now on."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def cuda_operations(config: EngineConfig, model: ModelConfig, device: torch.device) -> Operations:
    """The decoder's `ops` for a GPU."""
    from nanopd.cuda import operations, prefill  # not at the top: numba's CUDA side is needed by GPU workers only

    dtype, sizes = getattr(torch, model.dtype), (model.head_dim, config.block_size)
    decode_attention = prefill_attention = None
    if operations.has_kernels(dtype, *sizes, model.hidden_size, model.intermediate_size):
        max_rows, layout = ladder(config.max_decode_rows)[-1], config.kv_layout(model)
        decode_attention = operations.PagedDecodeAttention(max_rows, model.num_heads, layout, dtype, device)
    if prefill.has_flash_attention(dtype, model.head_dim):
        prefill_attention = prefill.PrefillAttention(config.max_num_batched_tokens)
    return operations.CudaOperations(ops, decode_attention, prefill_attention)

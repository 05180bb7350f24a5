"""A worker: one model and one KV cache on one device, which does what messages say.

`Worker` is the part without processes, so that a test can hold one in its own. Never imports `core`: which request a
slot or a block belongs to is the parent's to know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig, WorkerSpec
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
        self, spec: WorkerSpec, memories: Memories, kv: Tensor, runner: ModelRunner | None, transfer: KVTransfer
    ) -> None:
        """A worker made of its parts.

        Args:
            kv: [num_blocks, ...], the cache that `runner` and `transfer` read and write.
            runner: None: the worker is never sent a step, and has no host blocks.

        Raises:
            ConfigError: blocks cannot get here as the configuration says, or other processes cannot open the cache.
        """
        self._spec, self._memories, self._runner, self._transfer = spec, memories, runner, transfer
        self._between_layers: Callable[[], object] = lambda: None
        self.num_blocks = len(kv)
        self.num_host_blocks = 1 if runner is None else runner.num_host_blocks
        self.paths = paths_to(spec.index, spec.config)  # by source, how blocks get here
        self.kv_handle = export_kv(kv) if TransferPath.IPC in self.paths.values() else None

    @classmethod
    def load(
        cls, spec: WorkerSpec, memories: Memories, on_progress: Callable[[int, int], None] | None = None
    ) -> Worker:
        """A worker with its weights; `on_progress(done_bytes, total_bytes)` hears of them while they load.

        Raises:
            ConfigError: there is not enough memory, or blocks cannot get here as the configuration says.
        """
        index, config, model = spec.index, spec.config, spec.model
        device = use_device(config.workers[index].device)
        paths_to(index, config)  # raises now what the worker would raise once it has loaded
        layout = config.kv_layout(model)
        operations = cuda_operations(config, model, device) if device.type == "cuda" else ops
        sizes = config.load_format, config.max_len_of(model), config.seed
        decoder = load_model(model, layout, operations, spec.path, device, *sizes, on_progress)
        kv = allocate_kv(memories.caches[index], derive_num_blocks(decoder, config, model), layout, device)
        transfer = KVTransfer(index, kv, memories.relays, config.verify_transfers)
        return cls(spec, memories, kv, ModelRunner(decoder, kv, config, model), transfer)

    def connect(self, worker: int, peer: Peer | None) -> None:
        """Open the KV cache of another worker, in place of its older one. None: the worker is dead, so close that."""
        self._transfer.disconnect(worker)  # before a cache is opened that may need the memory of the old one
        if peer is not None and worker != self._spec.index:
            layout = self._spec.config.kv_layout(self._spec.model)
            cache = open_kv(self.paths[worker], self._memories.caches[worker], peer, layout)
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

        Plans of one pair of workers must be polled one after the other, in the order of calls.
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

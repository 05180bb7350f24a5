"""The KV cache of one worker: how many blocks it has, and its memory, which the peers can open.

How K and V lie in a block is known to `nanopd.config.KVLayout` alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor

from nanopd.config import EngineConfig, KVLayout, ModelConfig
from nanopd.errors import ConfigError
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import Peer, TransferPath
from nanopd.models.batch import InputBatch, PrefillRow
from nanopd.models.decoder import Decoder

if TYPE_CHECKING:
    from nanopd.cuda.peer_memory import MemoryHandle

GRAPHS_BYTES = 1 << 30  # for the decode graphs, which are captured after the cache has been allocated
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # environment variables that torch reads
CPU_MEMORY_SHARE = 0.5  # of the memory available at start, for the caches of all CPU workers together


def derive_num_blocks(decoder: Decoder, config: EngineConfig, model: ModelConfig) -> int:
    """What memory holds beside the weights and the largest step, and no more than `max_num_seqs` full sequences need.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    max_len = config.max_len_of(model)
    blocks_per_seq = -(-max_len // config.block_size)
    budget = _cpu_budget(config) if decoder.device.type == "cpu" else _cuda_budget(decoder, config, model)
    affordable = int(budget // config.kv_layout(model).bytes_per_block)
    if affordable <= blocks_per_seq:
        allowed = f"at most {max(affordable - 1, 0) * config.block_size} tokens, which is what memory holds"
        raise ConfigError("max_model_len", max_len, allowed)
    return min(affordable, config.max_num_seqs * blocks_per_seq + 1)


def _cpu_budget(config: EngineConfig) -> float:
    num_cpu_workers = sum(worker.device == "cpu" for worker in config.workers)
    return psutil.virtual_memory().available * CPU_MEMORY_SHARE / num_cpu_workers


def _cuda_budget(decoder: Decoder, config: EngineConfig, model: ModelConfig) -> float:
    """Bytes for the cache: this worker's share of the GPU, less what weights and the largest step were seen to take."""
    device = decoder.device
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        _run_largest_prefill(decoder, config, model)
    torch.cuda.synchronize(device)
    num_workers = sum(worker.device == str(device) for worker in config.workers)
    free, total = torch.cuda.mem_get_info(device)
    outside_torch = total - free - torch.cuda.memory_reserved(device)  # contexts, kernels, other programs
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return total * config.gpu_memory_utilization / num_workers - peak - outside_torch / num_workers - GRAPHS_BYTES


def _run_largest_prefill(decoder: Decoder, config: EngineConfig, model: ModelConfig) -> None:
    """A step of `max_num_batched_tokens` tokens with the longest histories, all in the null block."""
    max_len = config.max_len_of(model)
    num_tokens = config.max_num_batched_tokens
    kv = _zeros(1, config.kv_layout(model), decoder.device)
    positions = torch.arange(num_tokens, device=decoder.device) % max_len
    starts = range(0, num_tokens, max_len)
    ends = [min(start + max_len, num_tokens) for start in starts]
    table = torch.zeros(-(-max_len // config.block_size), dtype=torch.int32, device=decoder.device)
    rows = [PrefillRow(start, end, max_len - (end - start), table) for start, end in zip(starts, ends, strict=True)]
    zeros = torch.zeros_like(positions)
    last = torch.tensor(ends, device=decoder.device)[: config.max_num_seqs] - 1
    decoder.forward(InputBatch(zeros, positions, zeros, 0, table[None, :0], table[:0], tuple(rows), last), kv)


def _zeros(num_blocks: int, layout: KVLayout, device: torch.device) -> Tensor:
    return torch.zeros(layout.shape(num_blocks), dtype=getattr(torch, layout.dtype), device=device)


def map_kv(memory: SharedMemory, num_blocks: int, layout: KVLayout) -> Tensor:
    """A KV cache in shared memory; the memory must have been given its size."""
    mapped = memory.map(num_blocks * layout.bytes_per_block)
    kv: Tensor = layout.view(torch.frombuffer(mapped, dtype=getattr(torch, layout.dtype)))
    return kv


def allocate_kv(memory: SharedMemory, num_blocks: int, layout: KVLayout, device: torch.device) -> Tensor:
    """The worker's own cache, all zeros; on the CPU, in memory that its peers can map too."""
    if device.type == "cuda":
        return _zeros(num_blocks, layout, device)
    # The memory may be a dead predecessor's, and memory cannot shrink.
    memory.resize(max(num_blocks * layout.bytes_per_block, memory.nbytes))
    return map_kv(memory, num_blocks, layout)


def allocate_host_kv(kv: Tensor, config: EngineConfig, model: ModelConfig) -> Tensor:
    """Room for the blocks that are swapped out of the cache `kv`, in host memory that its GPU can address.

    Raises:
        ConfigError: there is not as much memory.
    """
    num_blocks, available = config.num_host_blocks(model), psutil.virtual_memory().available
    layout = config.kv_layout(model)
    if num_blocks * layout.bytes_per_block > available:
        raise ConfigError("swap_space_gb", config.swap_space_gb, f"at most {available / 1e9:.1f}, which is available")
    host_kv = torch.empty(layout.shape(num_blocks), dtype=kv.dtype)
    if kv.is_cuda:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(host_kv.data_ptr(), host_kv.nbytes, 0))
    return host_kv


def export_kv(kv: Tensor) -> object:
    """What another process needs to open a cache on a GPU.

    Raises:
        ConfigError: torch was told to allocate memory that cannot be shared.
    """
    for name in ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in (value := os.environ.get(name, "")).lower():
            raise ConfigError(name, value, "no expandable_segments, as other processes cannot open their memory")
    from nanopd.cuda.peer_memory import export_memory  # not at the top: CPU workers load nothing of CUDA

    return export_memory(kv)


def open_kv(path: TransferPath, memory: SharedMemory, peer: Peer, layout: KVLayout) -> Any:
    """A peer's cache as `Mover.pull` takes it; None, where blocks come through the relay."""
    if path is TransferPath.RELAY:
        return None
    if path is TransferPath.SHM:
        return map_kv(memory, peer.num_blocks, layout)
    from nanopd.cuda.peer_memory import PeerMemory

    return PeerMemory(cast("MemoryHandle", peer.kv_handle))

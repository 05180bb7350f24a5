"""The KV cache of one worker: how large it is, and its memory, which the peers can open.

Storage is block-major, so that a block is one run of bytes and moves as one piece:

    [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]

Block 0 is the null block: padding points at it, and no sequence owns it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig
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


def kv_shape(num_blocks: int, config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    return (num_blocks, model.num_layers, 2, model.num_kv_heads, config.block_size, model.head_dim)


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
    affordable = int(budget // (model.kv_bytes_per_token() * config.block_size))
    if affordable <= blocks_per_seq:
        allowed = f"at most {max(affordable - 1, 0) * config.block_size} tokens, which is what memory holds"
        raise ConfigError("max_model_len", max_len, allowed)
    return min(affordable, config.max_num_seqs * blocks_per_seq + 1)


def _cpu_budget(config: EngineConfig) -> float:
    num_cpu_workers = sum(worker.device == "cpu" for worker in config.workers)
    return psutil.virtual_memory().available * CPU_MEMORY_SHARE / num_cpu_workers


def _cuda_budget(decoder: Decoder, config: EngineConfig, model: ModelConfig) -> float:
    """Bytes: this worker's share of the GPU, less what the weights and the largest prefill step were seen to take."""
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
    kv = torch.zeros(kv_shape(1, config, model), dtype=getattr(torch, model.dtype), device=decoder.device)
    positions = torch.arange(num_tokens, device=decoder.device) % max_len
    starts = range(0, num_tokens, max_len)
    ends = [min(start + max_len, num_tokens) for start in starts]
    table = torch.zeros(-(-max_len // config.block_size), dtype=torch.int32, device=decoder.device)
    rows = [PrefillRow(start, end, max_len - (end - start), table) for start, end in zip(starts, ends, strict=True)]
    zeros = torch.zeros_like(positions)
    last = torch.tensor(ends, device=decoder.device)[: config.max_num_seqs] - 1
    decoder.forward(InputBatch(zeros, positions, zeros, 0, table[None, :0], table[:0], tuple(rows), last), kv)


def map_kv(memory: SharedMemory, num_blocks: int, config: EngineConfig, model: ModelConfig) -> Tensor:
    """A KV cache in shared memory as a tensor of `kv_shape`; the memory must have been given its size."""
    dtype = getattr(torch, model.dtype)
    shape = kv_shape(num_blocks, config, model)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(memory.map(num_bytes), dtype=dtype).view(shape)


def allocate_kv(
    memory: SharedMemory, num_blocks: int, device: torch.device, config: EngineConfig, model: ModelConfig
) -> Tensor:
    """The worker's own cache, all zeros; on the CPU, in memory that its peers can map too."""
    if device.type == "cuda":
        return torch.zeros(kv_shape(num_blocks, config, model), dtype=getattr(torch, model.dtype), device=device)
    num_bytes = num_blocks * config.block_size * model.kv_bytes_per_token()
    memory.resize(max(num_bytes, memory.nbytes))  # which may be a dead predecessor's, and cannot shrink
    return map_kv(memory, num_blocks, config, model)


def allocate_host_kv(kv: Tensor, config: EngineConfig, model: ModelConfig) -> Tensor:
    """Room for what is swapped out of the cache `kv`: blocks like its own, in host memory that its GPU can address.

    Raises:
        ConfigError: there is not as much memory.
    """
    num_blocks, available = config.num_host_blocks(model), psutil.virtual_memory().available
    if num_blocks * kv[0].nbytes > available:
        raise ConfigError("swap_space_gb", config.swap_space_gb, f"at most {available / 1e9:.1f}, which is available")
    host_kv = torch.empty(num_blocks, *kv.shape[1:], dtype=kv.dtype)
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


def open_kv(path: TransferPath, memory: SharedMemory, peer: Peer, config: EngineConfig, model: ModelConfig) -> Any:
    """A peer's cache as `Mover.pull` takes it; None, where blocks come through the relay."""
    if path is TransferPath.RELAY:
        return None
    if path is TransferPath.SHM:
        return map_kv(memory, peer.num_blocks, config, model)
    from nanopd.cuda.peer_memory import PeerMemory

    return PeerMemory(cast("MemoryHandle", peer.kv_handle))

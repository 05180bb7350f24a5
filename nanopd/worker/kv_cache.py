"""The KV cache of one worker: how large it is, and its memory, which the peers can open.

Storage is block-major, so that a block is one run of bytes and moves as one piece:

    [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]

Block 0 is the null block: padding points at it, and no sequence owns it.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from nanopd.config import EngineConfig, ModelConfig
from nanopd.errors import ConfigError
from nanopd.ipc.shared_memory import SharedMemory

CPU_MEMORY_SHARE = 0.5  # of the memory available at start, for the caches of all CPU workers together


def kv_shape(num_blocks: int, config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    return (num_blocks, model.num_layers, 2, model.num_kv_heads, config.block_size, model.head_dim)


def derive_num_blocks(config: EngineConfig, model: ModelConfig) -> int:
    """Blocks of a CPU worker: for `max_num_seqs` sequences of full length, if memory allows.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    max_len = config.max_model_len or model.max_position_embeddings
    blocks_per_seq = -(-max_len // config.block_size)
    num_cpu_workers = sum(worker.device == "cpu" for worker in config.workers)
    budget = psutil.virtual_memory().available * CPU_MEMORY_SHARE / num_cpu_workers
    affordable = int(budget // (model.kv_bytes_per_token() * config.block_size))
    if affordable <= blocks_per_seq:
        allowed = f"at most {max(affordable - 1, 0) * config.block_size} tokens, which is what memory holds"
        raise ConfigError("max_model_len", max_len, allowed)
    return min(affordable, config.max_num_seqs * blocks_per_seq + 1)


def map_kv(memory: SharedMemory, num_blocks: int, config: EngineConfig, model: ModelConfig) -> Tensor:
    """A KV cache in shared memory as a tensor of `kv_shape`; the memory must have been given its size."""
    dtype = getattr(torch, model.dtype)
    shape = kv_shape(num_blocks, config, model)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(memory.map(num_bytes), dtype=dtype).view(shape)


def allocate_kv(memory: SharedMemory, num_blocks: int, config: EngineConfig, model: ModelConfig) -> Tensor:
    """The worker's own cache, all zeros, in memory that its peers can map too."""
    memory.resize(num_blocks * config.block_size * model.kv_bytes_per_token())
    return map_kv(memory, num_blocks, config, model)

"""The layout of a KV cache against addresses and sizes that torch works out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopd.config import EngineConfig, KVLayout, ModelConfig

SIZES = st.integers(1, 5)
DTYPES = ["float32", "bfloat16", "float16"]


@given(SIZES, SIZES, SIZES, SIZES, SIZES, st.sampled_from(DTYPES))
def test_bytes_and_strides_are_those_of_a_tensor(
    num_blocks: int, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str
) -> None:
    layout = KVLayout(num_layers, num_kv_heads, block_size, head_dim, dtype)
    kv = torch.zeros(layout.shape(num_blocks), dtype=getattr(torch, dtype))
    assert kv.nbytes == num_blocks * layout.bytes_per_block
    assert kv[0].nbytes == layout.bytes_per_block == block_size * layout.bytes_per_token
    assert kv[0, 0].nbytes == layout.layer_bytes

    def distance(*indices: int) -> int:
        """Bytes from the first element of the cache to the element at the indices."""
        return kv[indices].data_ptr() - kv.data_ptr()

    block, head, value = layout.strides
    assert distance(num_blocks - 1) == (num_blocks - 1) * block
    assert distance(0, num_layers - 1) == (num_layers - 1) * layout.layer_bytes
    assert distance(0, 0, 1) == value
    assert distance(0, 0, 0, num_kv_heads - 1) == (num_kv_heads - 1) * head


@pytest.mark.parametrize("dtype", DTYPES)
def test_view_of_memory(dtype: str) -> None:
    layout, num_blocks = KVLayout(3, 2, 4, 8, dtype), 5
    memory = bytearray(num_blocks * layout.bytes_per_block)
    kv = layout.view(torch.frombuffer(memory, dtype=getattr(torch, dtype)))
    assert kv.shape == layout.shape(num_blocks) == (5, 3, 2, 2, 4, 8)
    kv.view(-1).copy_(torch.arange(kv.numel()))
    indices, place = (2, 1, 1, 0, 3, 7), 0
    for index, size in zip(indices, kv.shape, strict=True):
        place = place * size + index
    assert kv[indices] == torch.tensor(place, dtype=kv.dtype)
    assert torch.frombuffer(memory, dtype=kv.dtype)[place] == kv[indices]


def test_an_engine_has_one_layout() -> None:
    model = ModelConfig("qwen3", 100, 64, 96, 7, 8, 2, 16, 512, 1e-6, 1e4, dtype="bfloat16")
    config = EngineConfig("some/model", block_size=8, swap_space_gb=1e-3)
    layout = config.kv_layout(model)
    assert layout == KVLayout(7, 2, 8, 16, "bfloat16")
    assert layout.bytes_per_token == 2 * 7 * 2 * 16 * 2
    assert config.num_host_blocks(model) == 1 + math.floor(1e6 / layout.bytes_per_block)

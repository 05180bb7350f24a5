"""Models for tests: tiny random checkpoints of every architecture, written by transformers, and the demo model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from nanopd.checkpoints.model_files import resolve

CONFIGS: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}


def make_tiny_model(
    path: Path,
    architecture: str,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    num_layers: int = 2,
    vocab_size: int = 512,
    tie_word_embeddings: bool = False,
    rope: str = "default",
    max_position_embeddings: int = 512,
    eos_token_id: int | list[int] | None = None,
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Writes a float32 checkpoint to `path` (made if need be) and returns it; the same arguments give the same model.

    Weights are large enough that greedy output varies from token to token.
    """
    config = CONFIGS[architecture](
        architectures=[f"{architecture.capitalize()}ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=16 * num_heads,
        intermediate_size=40 * num_heads,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters=ROPES[rope],
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomise(model)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Norms around one, biases that matter, projections that grow what they are given."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias") or "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, 2.0 * parameter.shape[1] ** -0.5)


def load_hf(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The reference: transformers' own model of the same files."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def demo_model_path() -> Path:
    """The demo model's directory; downloaded and converted by the first test that asks."""
    return resolve("smollm2-135m-instruct", load_format="auto")

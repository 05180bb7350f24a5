"""What the engine and the workers know of a model: its shape and what follows from it. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element of each dtype that a model may run in


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary embeddings; the fields of the Hugging Face entry of the same name."""

    kind: str  # default | linear | llama3 | yarn
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only model, read from its Hugging Face configuration."""

    architecture: str  # llama | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = field(default=RopeScaling("default"))
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"  # the dtype to run in, of ITEMSIZES
    scheme: str = "plain"  # how the layers' projections are stored, of `nanopd.models.weights.SCHEMES`
    mlp: str = "gated"  # of `nanopd.models.mlp.MLPS`
    eos_token_ids: tuple[int, ...] = ()  # of config and generation_config

    def num_matrix_weights(self) -> int:
        """Weights of all matrix products of a token: every layer's, and the output head's."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer_size = 2 * q_size + 2 * kv_size + 3 * self.intermediate_size
        return self.hidden_size * (self.num_layers * layer_size + self.vocab_size)

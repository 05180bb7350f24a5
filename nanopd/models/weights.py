"""Weights of a model: the parts that a checkpoint fills, and projections, which a scheme stores in a way of its own.

A scheme says what a projection allocates and which tensors of a checkpoint fill it. How its weights are multiplied is
said by `PRODUCTS` of `nanopd.cpu.ops` and of `nanopd.cuda.linear`, under the scheme's name. A new scheme is a class
here, an entry in SCHEMES, and an entry in each of those tables. Knows no layers and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DUMMY_STD = 0.02  # keeps activations of order one through any depth


def ones(tensor: Tensor, generator: torch.Generator) -> None:
    """What dummy weights of a norm are."""
    tensor.fill_(1.0)


def normal(tensor: Tensor, generator: torch.Generator) -> None:
    """What all other dummy weights are, where they are floating-point numbers."""
    tensor.normal_(0.0, DUMMY_STD, generator=generator)


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one tensor of a checkpoint."""

    tensor: Tensor  # a weight or a view of one, of the checkpoint's shape
    fill_randomly: Callable[[Tensor, torch.Generator], None] = normal  # what stands for the checkpoint in dummy weights


Parts = Iterator[tuple[str, Part]]  # by the names of the checkpoint's tensors


@dataclass(slots=True, eq=False)
class Linear:
    """A projection: y = x @ weight.T + bias. A scheme with more tensors than these has a subclass with more fields."""

    weight: Tensor  # as the scheme stores it
    bias: Tensor | None  # [out_features], the type of activations
    scheme: Scheme


class Scheme:
    """A way to store projections. This one is the plain way: the weight is [out_features, in_features].

    Others derive from it, and override what is different.
    """

    name = "plain"  # under which SCHEMES and the tables of products have the scheme

    def allocate(self, out_features: int, in_features: int, like: Tensor, has_bias: bool = False) -> Linear:
        """An uninitialised projection [T, in_features] -> [T, out_features], for activations of the type of `like`."""
        bias = like.new_empty(out_features) if has_bias else None
        return Linear(like.new_empty(out_features, in_features), bias, self)

    def parts(self, linear: Linear, rows: dict[str, int]) -> Parts:
        """The parts of a projection that holds several of a checkpoint's, which lie one after the other.

        `rows` has the number of output features of each, by its name in the checkpoint.
        """
        yield from split_rows(linear.weight, rows, "weight")
        if linear.bias is not None:
            yield from split_rows(linear.bias, rows, "bias")


def split_rows(tensor: Tensor, rows: dict[str, int], suffix: str) -> Parts:
    """The parts of a tensor whose first dimension is that of the output features."""
    for name, part in zip(rows, tensor.split(tuple(rows.values())), strict=True):
        yield f"{name}.{suffix}", Part(part)


PLAIN = Scheme()
SCHEMES: dict[str, Scheme] = {PLAIN.name: PLAIN}

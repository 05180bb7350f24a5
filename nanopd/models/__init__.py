"""Decoder-only language models of the Llama family: Llama, Qwen2 and Qwen3."""

from nanopd.models.batch import InputBatch, PrefillRow
from nanopd.models.decoder import Decoder
from nanopd.models.loader import load_model
from nanopd.models.operations import AttentionSpec, Operations

__all__ = ["AttentionSpec", "Decoder", "InputBatch", "Operations", "PrefillRow", "load_model"]

"""Decoder-only language models of the Llama family: Llama, Qwen2 and Qwen3."""

from nanopd.models.batch import InputBatch, PrefillRow
from nanopd.models.decoder import Decoder
from nanopd.models.loader import load_model

__all__ = ["Decoder", "InputBatch", "PrefillRow", "load_model"]

"""One decoder for Llama, Qwen2 and Qwen3, which differ in what their layers hold; inference only.

Owns the weights and the order of the layers; the operations come from `nanopd.cpu.ops` or `nanopd.cuda`, the KV
cache from the caller. Knows nothing of sequences, and of a layer only that it has two halves that add to the residual
stream. The caller sets `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nanopd.config import ModelConfig
from nanopd.models.batch import InputBatch
from nanopd.models.layers import DecoderWeights
from nanopd.models.operations import Operations


def _nothing() -> None: ...


class Decoder:
    """A loaded model on one device."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, ops: Operations) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.device = weights.embedding.device

    def forward(self, batch: InputBatch, kv: Tensor) -> Tensor:
        """Computes the step's tokens, stores their K and V, and returns the wanted logits.

        kv is a cache of the layout that the model was loaded with. Returns [num_samples, vocab] in the model's dtype,
        rows in the order of `batch.logit_indices`.
        """
        x = self.hidden(batch, kv)
        return self.logits(x if batch.logit_indices is None else x.index_select(0, batch.logit_indices))

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], some of what `hidden` returned -> [n, vocab], both in the model's dtype."""
        return self.ops.norm_linear(x, self.weights.norm, self.config.rms_norm_eps, self.weights.lm_head)

    def hidden(self, batch: InputBatch, kv: Tensor, between_layers: Callable[[], object] = _nothing) -> Tensor:
        """As `forward`, but returns what all tokens' logits are made of: [T, hidden].

        `between_layers` is called before each layer. Launching all layers of a prompt takes a GPU's host so long that
        a worker has other things to look after meanwhile.
        """
        ops = self.ops
        ops.begin_step(batch.decode_seq_lens, batch.slot_mapping, not batch.prefill_rows)
        x = ops.embedding(batch.token_ids, self.weights.embedding)  # [T, hidden], the residual stream
        for layer in self.weights.layers:
            between_layers()
            layer.attention.add(ops, x, batch, kv)
            layer.mlp.add(ops, x)
        return x

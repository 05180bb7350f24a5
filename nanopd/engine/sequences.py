"""Makes sequences of requests, and knows those that have not finished. Engine's thread; any thread may look."""

from __future__ import annotations

from dataclasses import replace

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.sequence import Chooser, Sequence
from nanopd.core.speculation import Drafter
from nanopd.request import Request


class Sequences:
    """The sequences of one engine, numbered in order of submission."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.unfinished: dict[str, Sequence] = {}  # by request_id
        self._config, self._model = config, model
        self._count = 0
        self._root_key = repr((config.model, model)).encode()  # of all prefixes: KV entries depend on the model

    def new(self, request: Request, chooser: Chooser | None = None) -> Sequence:
        limits = self._config.max_len_of(self._model), self._model.eos_token_ids
        seed = _mix(self._config.seed, self._count)
        seq = Sequence(self._count, request, *limits, seed, self._root_key, chooser)
        if self._config.num_speculative_tokens and chooser is None and not seq.params.changes_logits:
            seq.drafter, seq.is_watched = Drafter(seq.token_ids), True
        self._count += 1
        self.unfinished[seq.request_id] = seq
        return seq

    def fork(self, parent: Sequence, request_id: str, token_ids: list[int]) -> Sequence:
        """A sequence that goes on from `token_ids`, of which all but the last are tokens of `parent`."""
        child = self.new(replace(parent.request, request_id=request_id), parent.chooser)
        child.token_ids = token_ids
        child.token_times_s = parent.token_times_s[: len(token_ids) - parent.num_prompt_tokens]
        child.rank = (*parent.rank[:2], child.seq_id)
        return child


def _mix(seed: int, number: int) -> int:
    """A 64-bit seed for request `number` of an engine (the finaliser of splitmix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)

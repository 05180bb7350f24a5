"""How many workers should only prefill, at the present mix of requests.

A fluid model: k workers do nothing but prefill; all answers decode on the others, which put prompts into what the TPOT
limit leaves of their steps. How many times the present load could be served so? The k that bears the most wins, so that
it is right before the load comes; at a clear gain only, lest workers change sides with every request.
"""

from __future__ import annotations

import math

import numpy as np

from nanopd.routing.cost_model import CostModel, chunk_history, chunk_pairs

CLEAR_GAIN = 1.02
MIN_REQUESTS = 5
LOADS = np.geomspace(0.2, 5, 200)[:, None]  # times the present one
NUM_ITERATIONS = 8  # until a batch and its step time agree
MAX_BATCH = 1e4
PLAN_SHARE = 0.05  # of the memory, between one plan and the next


class Split:
    """Counts what is asked for, and says how many workers should do nothing but prefill."""

    def __init__(
        self, num_workers: int, costs: CostModel, max_chunk: int, tpot_ms: float | None, memory_ms: float
    ) -> None:
        self.num_prefill = 0
        self.mean_new = 0.0  # tokens of a prompt that have to be computed
        self.mean_prompt = 0.0  # tokens of a prompt
        self.prompt_rate = [0.0] * num_workers  # tokens per ms sent to each worker to prefill
        self._costs, self._max_chunk, self._tpot_ms, self._memory_ms = costs, max_chunk, tpot_ms, memory_ms
        self._num_requests = self._prompt = self._output = 0.0  # these and the following decay
        self._new = [0.0] * num_workers  # tokens to be computed
        self._seen_ms = 0.0
        self._total_ms = 0.0
        self._planned_ms = -np.inf
        self._updated_s: float | None = None

    def advance(self, now_s: float) -> None:
        """Let time pass: what was long ago counts less."""
        elapsed_s = 0.0 if self._updated_s is None else now_s - self._updated_s
        kept = math.exp(-elapsed_s * 1e3 / self._memory_ms)
        self._updated_s = now_s
        self._total_ms += elapsed_s * 1e3
        self._num_requests *= kept
        self._prompt *= kept
        self._output *= kept
        self._new = [num_tokens * kept for num_tokens in self._new]
        self._seen_ms = self._seen_ms * kept + self._memory_ms * (1 - kept)
        elapsed_ms = self._elapsed_ms
        self.prompt_rate = [num_tokens / elapsed_ms for num_tokens in self._new]

    @property
    def _elapsed_ms(self) -> float:
        return max(self._seen_ms, 0.05 * self._memory_ms)  # the first requests say little about the rate

    @property
    def request_rate(self) -> float:
        """Per ms."""
        return self._num_requests / self._elapsed_ms

    def count(self, prefill_worker: int, num_prompt: int, num_new: int, num_output: float) -> None:
        """A request is sent to `prefill_worker`, which has to compute `num_new` tokens of its prompt."""
        self._num_requests += 1
        self._prompt += num_prompt
        self._output += num_output
        self._new[prefill_worker] += num_new
        self.mean_new, self.mean_prompt = sum(self._new) / self._num_requests, self._prompt / self._num_requests

    def update(self, num_usable_tokens: float) -> int:
        """The number of workers to keep free of decodes; each has a cache of `num_usable_tokens`."""
        if self._tpot_ms is None or self._num_requests < MIN_REQUESTS:
            return 0
        if self._total_ms - self._planned_ms < PLAN_SHARE * self._memory_ms:
            return self.num_prefill
        self._planned_ms = self._total_ms
        limit_ms, num_workers, terms = self._tpot_ms, len(self._new), self._costs.terms
        num_prefill = np.arange(num_workers)  # arrays are [num_workers] or, with loads, [num_loads, num_workers]
        num_decode = num_workers - num_prefill
        token_rate = LOADS * self._output / self._elapsed_ms / num_decode  # per ms and decoding worker
        num_context = self.mean_prompt + self._output / self._num_requests / 2

        def step_ms(batch: np.ndarray) -> np.ndarray:
            return terms.decode_ms(batch, batch * num_context, np.maximum)

        batch = token_rate * terms.beta  # with prompts elsewhere
        for _ in range(NUM_ITERATIONS):
            batch = np.minimum(token_rate * step_ms(batch), MAX_BATCH)
        batch = batch + np.sqrt(batch)  # it fluctuates
        is_kept = (step_ms(batch) <= limit_ms) & (batch * num_context <= num_usable_tokens)
        mean_new, mean_cached = self.mean_new, self.mean_prompt - self.mean_new
        alone_ms = terms.step_ms(0, 0, self._max_chunk) / self._max_chunk * mean_new
        alone_ms += terms.a2 * chunk_pairs(mean_new, mean_cached)
        alone_ms += terms.a3 * chunk_history(mean_new, mean_cached, self._max_chunk)
        # prompts that stretch the steps of the others to the limit
        batch = np.minimum(token_rate * limit_ms, MAX_BATCH)
        chunk = terms.chunk_within(limit_ms, batch, batch * num_context, maximum=np.maximum)
        beside = num_decode * (chunk / limit_ms) * (alone_ms / mean_new)  # in workers that only prefill
        is_kept &= LOADS * self.request_rate * alone_ms <= num_prefill + beside
        bearable = (is_kept * LOADS).max(axis=0)
        if bearable.max() > CLEAR_GAIN * bearable[self.num_prefill]:
            self.num_prefill = int(np.argmax(bearable))
        return self.num_prefill

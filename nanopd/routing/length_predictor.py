"""How long an answer will be: learned online from the answers so far, predicted before its first token and later.

A Dirichlet distribution over bins of output length for each bucket of prompt lengths (a factor of two each), whose
prior is the distribution over all prompts: a bucket with few answers looks like the whole, one with many like itself.
Every completion is a conjugate update, older ones are discounted. No shape is assumed: answers to code completions
have several modes, and a log-normal's 80 % interval covers 88 % of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.errors import ConfigError

# Set by hand, no measurement is on record: how fine, how strong the prior, how fast old answers fade, how stale.
BINS_PER_OCTAVE = 8
MAX_LEN = 2**20
SHRINKAGE = 20.0  # answers that the distribution over all prompts is worth in a bucket
DISCOUNT = 0.995  # of all counts, at each completion
# [num_bins + 1] int64: bin i holds the lengths edges[i] .. edges[i + 1] - 1
EDGES = np.unique(np.rint(2.0 ** np.arange(0, math.log2(MAX_LEN) + 1e-9, 1 / BINS_PER_OCTAVE)).astype(np.int64))
NUM_BUCKETS = 24
STALENESS = 0.02  # a prediction is made again after so many more answers, as a share of those that still count
# Before the first answer there is a belief worth one answer: an exponential distribution, and a tail of weight TAIL.
PRIOR_MEAN, TAIL = 200.0, 0.01


class LengthPredictor:
    """Quantiles and mean of output lengths, given the prompt's length and what has been generated."""

    def __init__(self) -> None:
        # [1 + NUM_BUCKETS, num_bins]: all prompts, then each bucket
        self._counts = np.zeros((1 + NUM_BUCKETS, len(EDGES) - 1))
        self._counts[0] = -np.diff(np.exp(-EDGES / PRIOR_MEAN) + TAIL / EDGES)
        self._centres = (EDGES[:-1] + EDGES[1:] - 1) / 2  # [num_bins] mean length of a bin
        self._cumulative = np.zeros(len(EDGES))
        self._num_observed = 0
        # by arguments: how many answers had been observed, and what was predicted from them
        self._cache: dict[tuple, tuple[int, tuple[float, list[int]]]] = {}

    def observe(self, num_prompt: int, num_output: int) -> None:
        """An answer is complete."""
        self._num_observed += 1
        rows = [0, _bucket(num_prompt)]
        self._counts[rows] *= DISCOUNT
        self._counts[rows, np.searchsorted(EDGES, min(num_output, MAX_LEN - 1), side="right") - 1] += 1

    def finished(self, seq: Sequence) -> None:
        """A request has ended; its length counts if its answer is complete."""
        if seq.status in (SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH):
            self.observe(seq.num_prompt_tokens, seq.num_tokens - seq.num_prompt_tokens)

    def quantiles(self, num_prompt: int, probabilities: tuple[float, ...], num_generated: int = 0) -> list[int]:
        """Output lengths in tokens, those generated included, that are not exceeded with these probabilities."""
        return self.predict(num_prompt, probabilities, num_generated)[1]

    def mean(self, num_prompt: int, num_generated: int = 0) -> float:
        """Expected output length in tokens, those generated included."""
        return self.predict(num_prompt, (), num_generated)[0]

    def predict(
        self, num_prompt: int, probabilities: tuple[float, ...], num_generated: int = 0
    ) -> tuple[float, list[int]]:
        """`mean` and `quantiles` at once.

        Before the first token they may be STALENESS old: what was predicted for the same bucket of prompts is reused.
        """
        key = _bucket(num_prompt), probabilities
        then, predicted = self._cache.get(key, (-1, (0.0, [])))
        if not num_generated and self._num_observed - then <= STALENESS * min(then, 1 / (1 - DISCOUNT)):
            return predicted
        weights = self._probabilities(num_prompt, num_generated)
        self._cumulative[1:] = np.cumsum(weights)
        total = float(self._cumulative[-1])
        # A bin is taken as evenly filled, from half a token below its first length to half a token above its last.
        lengths = np.interp(np.multiply(probabilities, total), self._cumulative, EDGES - 0.5).tolist()
        mean = float(weights @ self._centres) / total
        predicted = max(mean, num_generated + 1.0), [max(round(length), num_generated + 1) for length in lengths]
        if not num_generated:
            self._cache[key] = self._num_observed, predicted
        return predicted

    def _probabilities(self, num_prompt: int, num_generated: int) -> np.ndarray:
        """[num_bins] float64, not normalised: the posterior of the bucket, lengths already exceeded cut off."""
        counts = self._counts[_bucket(num_prompt)] + SHRINKAGE / self._counts[0].sum() * self._counts[0]
        if num_generated:
            last = np.searchsorted(EDGES, min(num_generated + 1, MAX_LEN - 1), side="right") - 1
            counts[:last] = 0
            counts[last] *= (EDGES[last + 1] - min(num_generated + 1, MAX_LEN - 1)) / (EDGES[last + 1] - EDGES[last])
        return counts

    def save(self, path: Path) -> None:
        """Write the counts in one step: a reader sees the old file or the new one, and never half of it."""
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self._counts.tolist()), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> LengthPredictor:
        """Raises ConfigError: not a file that `save` wrote."""
        predictor = cls()
        try:
            counts = np.array(json.loads(path.read_text(encoding="utf-8")), np.float64)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError("answer_lengths", str(path), f"a file of saved counts ({error})") from None
        if counts.shape != predictor._counts.shape or not (counts >= 0).all():
            raise ConfigError("answer_lengths", str(path), f"counts >= 0 of shape {predictor._counts.shape}")
        predictor._counts = counts
        return predictor


def _bucket(num_prompt: int) -> int:
    return min(num_prompt.bit_length(), NUM_BUCKETS)

"""Chooses the next token of every row of a step.

Owns what each slot asked for (temperature, top-k, top-p, seed, stop ids) and the arithmetic from logits to token ids
and logprobs. Knows nothing of sequences, blocks or models. What a slot asked for stays on the host, so the path is
chosen without reading the device.

A row's token depends on its logits, its seed and its position, never on the other rows: one Philox number per
(seed, position) is looked up in the row's cumulative distribution, whose probabilities are fixed-point integers, so
that their sums are exact in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanopd.messages import MAX_LOGPROBS, SLOT_INIT

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM
PROBABILITY_ONE = 2.0**40  # fixed point: a token less likely than 2**-40 is never drawn
NUM_CANDIDATES = 256  # best tokens looked at first for top-p
GROWTH = 16  # times as many where these do not reach it

PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
PHILOX_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
PHILOX_ROUNDS = 10
LOW_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)


class TokenLogprobs(NamedTuple):
    """Logprobs in the layout of `StepResult`; columns are the chosen token, then the best ones."""

    rows: np.ndarray  # [num_logprob_rows] int32, indices into the sampled rows
    ids: Tensor  # [num_logprob_rows * (1 + MAX_LOGPROBS)] int32, -1: none
    values: Tensor  # the same shape, float32, -inf: none


class Sampler:
    """Sampling parameters of every slot, and the choice of tokens by them."""

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._slots = np.zeros(max_slots, SLOT_INIT)  # row s: the record that last entered slot s
        self._stop_ids = [np.empty(0, np.int32)] * max_slots

    def apply(self, slot_inits: np.ndarray, stop_ids: np.ndarray) -> None:
        """Take over the parameters of sequences that enter slots.

        Args:
            slot_inits: [*] SLOT_INIT
            stop_ids: [sum of num_stop_ids] int32, the records' stop ids one after another
        """
        self._slots[slot_inits["slot"]] = slot_inits
        ends = np.cumsum(slot_inits["num_stop_ids"])
        for slot, ids in zip(slot_inits["slot"].tolist(), np.split(stop_ids, ends[:-1]), strict=False):
            self._stop_ids[slot] = ids.copy()  # the message's memory is used again

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """The next token of every row.

        Args:
            logits: [num_rows, vocab_size] float32, on the sampler's device; left as they are
            slots: [num_rows] int64, on the CPU
            positions: [num_rows] int64, on the CPU; index in its sequence, prompt included, of the token to choose

        Returns:
            [num_rows] int64, on the sampler's device
        """
        params, host_positions = self._slots[slots.numpy()], positions.numpy()
        logits = self._mask_stop_ids(logits, params, host_positions)
        is_random = params["temperature"] >= GREEDY_BELOW
        if not is_random.any():
            return logits.argmax(-1)
        token_ids = torch.empty(len(params), dtype=torch.int64, device=self.device)
        if not is_random.all():
            greedy_rows = self._to_device(np.flatnonzero(~is_random))
            token_ids[greedy_rows] = logits[greedy_rows].argmax(-1)
        rows = np.flatnonzero(is_random)
        chosen = params[rows]
        uniforms = uniform_numbers(chosen["seed"], host_positions[rows])
        # A row at a time: the temporaries stay in the cache (measured: a batch's take up to six times as long).
        for row, param, uniform in zip(rows.tolist(), chosen, uniforms.tolist(), strict=True):
            temperature, top_k, top_p = param[["temperature", "top_k", "top_p"]].item()
            token_ids[row] = draw_token(logits[row], temperature, top_k, top_p, uniform)
        return token_ids

    def logprobs(self, logits: Tensor, slots: Tensor, token_ids: Tensor) -> TokenLogprobs:
        """Log-softmax of the logits as the model gave them, for the rows whose slots ask for it.

        Args:
            logits: [num_rows, vocab_size] float32
            slots: [num_rows] int64, on the CPU
            token_ids: [num_rows] int64, the chosen tokens
        """
        num_logprobs = self._slots["num_logprobs"][slots.numpy()]
        host_rows = np.flatnonzero(num_logprobs >= 0)
        ids = torch.full((len(host_rows), 1 + MAX_LOGPROBS), -1, dtype=torch.int64, device=logits.device)
        values = torch.full(ids.shape, -torch.inf, device=logits.device)
        if len(host_rows):
            rows = self._to_device(host_rows)
            wanted = self._to_device(num_logprobs[host_rows])[:, None]  # [num_logprob_rows, 1]
            num_best = min(int(num_logprobs.max()), self.vocab_size)
            log_probs = torch.log_softmax(logits[rows], -1)
            ids[:, :1] = token_ids[rows, None]
            values[:, :1] = log_probs.gather(-1, ids[:, :1])
            best = log_probs.topk(num_best)
            unwanted = torch.arange(num_best, device=logits.device) >= wanted
            ids[:, 1 : 1 + num_best] = best.indices.masked_fill(unwanted, -1)
            values[:, 1 : 1 + num_best] = best.values.masked_fill(unwanted, -torch.inf)
        return TokenLogprobs(host_rows.astype(np.int32), ids.int().flatten(), values.flatten())

    def is_plain_argmax(self, slots: Tensor, positions: Tensor) -> bool:
        """Whether `sample` would choose the largest logit in every row; arguments as for `sample`."""
        params = self._slots[slots.numpy()]
        is_masked = (positions.numpy() < params["min_len"]) & (params["num_stop_ids"] > 0)
        return not bool((is_masked | (params["temperature"] >= GREEDY_BELOW)).any())

    def wants_logprobs(self, slots: Tensor) -> bool:
        """Whether any of `slots` ([*] int64, on the CPU) asks for logprobs."""
        return bool((self._slots["num_logprobs"][slots.numpy()] >= 0).any())

    def _mask_stop_ids(self, logits: Tensor, params: np.ndarray, positions: np.ndarray) -> Tensor:
        """The logits, with -inf at the stop ids of rows that are still below their min_len."""
        rows = np.flatnonzero((positions < params["min_len"]) & (params["num_stop_ids"] > 0))
        if len(rows) == 0:
            return logits
        ids = np.concatenate([self._stop_ids[slot] for slot in params["slot"][rows]])
        index = np.repeat(rows, params["num_stop_ids"][rows]), ids.astype(np.int64)
        minus_inf = torch.tensor(-torch.inf, device=logits.device)
        return logits.index_put((self._to_device(index[0]), self._to_device(index[1])), minus_inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def fixed_point(probs: Tensor) -> Tensor:
    """Probabilities (float32) as int64 multiples of 2**-40; sums of a row are exact, and exact in float64."""
    return (probs * PROBABILITY_ONE).long()


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> Tensor:
    """The token at which the cumulative distribution, in the order of the vocabulary, passes `uniform`.

    Args:
        logits: [vocab_size] float32
        temperature: > 0
        top_k: 0: off
        top_p: 1: off
        uniform: 0 <= uniform < 1

    Returns:
        [] int64
    """
    probs = torch.softmax(logits / temperature, -1)
    weights = fixed_point(probs)
    if top_k > 0 or top_p < 1.0:
        weights = weights.where(probs >= keep_threshold(probs, weights.sum(), top_k, top_p), 0)
    cdf = weights.cumsum(-1)
    target = (cdf[-1].double() * uniform).long()  # below the total, as uniform is below 1
    return torch.searchsorted(cdf, target, right=True)


def keep_threshold(probs: Tensor, total: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest probability that top-k, and then top-p of what top-k has left, keep.

    Top-p keeps the smallest set of best tokens that reaches `top_p` of the mass. A threshold keeps all tokens that are
    as likely as the last one, so the kept set does not depend on the order of ties.

    Args:
        probs: [vocab_size] float32
        total: [] int64, the sum of their fixed-point weights
        top_k: 0: off
        top_p: 1: off

    Returns:
        [] float32
    """
    vocab_size = len(probs)
    num_candidates = min(top_k or NUM_CANDIDATES, vocab_size)
    while True:
        best = probs.topk(num_candidates).values  # descending
        mass = fixed_point(best).cumsum(-1)
        target = ((mass[-1] if top_k > 0 else total).double() * top_p).ceil().long()
        if mass[-1] >= target:
            return best[torch.searchsorted(mass, target)]
        num_candidates = min(GROWTH * num_candidates, vocab_size)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: [4, n] uint64, 32-bit words
        key: [2, n] uint64, 32-bit words

    Returns:
        [4, n] uint64, 32-bit words
    """
    even, odd = counter[0::2], counter[1::2]
    for _ in range(PHILOX_ROUNDS):
        product = (even * PHILOX_MULTIPLIERS)[::-1]
        even, odd = (product >> SHIFT_32) ^ odd ^ key, product & LOW_32
        key = (key + PHILOX_WEYL) & LOW_32
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniform_numbers(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) with 53 bits for each (seed, position).

    Args:
        seeds: [n] uint64
        positions: [n] int64, >= 0

    Returns:
        [n] float64
    """
    counter = np.zeros((4, len(seeds)), np.uint64)
    counter[0] = positions
    words = philox4x32(counter, np.stack((seeds & LOW_32, seeds >> SHIFT_32)))
    return ((words[0] << SHIFT_32 | words[1]) >> np.uint64(11)) * 2.0**-53

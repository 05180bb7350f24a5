"""Chooses the next token of every row of a step.

Owns what each slot asked for (temperature, top-k, top-p, min-p, seed, stop ids) and the arithmetic from logits to
token ids and logprobs. Changes of the logits before that are the part of adjustments.py. Knows nothing of sequences,
blocks or models. What a slot asked for stays on the host, so the path is chosen without reading the device, and on a
GPU nothing here waits for it.

A row's token depends on its logits, its seed and its position, never on the other rows: one Philox number per
(seed, position) is looked up in the row's cumulative distribution. A token's likelihood is relative to the best
token's, and is summed as a fixed-point integer, so that sums are exact in any order. `draw_token` here and the kernel
of `nanopd.cuda.sampling` are the same rule.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanopd.messages import MAX_LOGPROBS, SLOT_INIT, SlotExtras
from nanopd.worker.adjustments import Adjustments
from nanopd.worker.upload import Uploader

GREEDY_BELOW = 1e-5  # sampling with a lower temperature is greedy, as in vLLM
ONE = 2.0**40  # fixed point: a token less likely than 2**-40 of the best one is never drawn
LOG2_E = 1.4426950408889634
NUM_CANDIDATES = 256  # top-p looks at that many best tokens first,
GROWTH = 16  # and at that many times as many where these do not reach it
GROUP = 64  # the search for the best tokens looks at the best one of each group of that many first

# What a row's token is drawn by. uniform and top_p are multiples of 2**-64. The kernel reads these records.
DRAW = np.dtype(
    [
        ("uniform", "<u8"),
        ("top_p", "<u8"),  # 0: off
        ("top_k", "<i4"),  # 0: off
        ("scale", "<f4"),  # log2(e) / temperature
        ("min_p", "<f4"),  # tokens of less likelihood are dropped
        ("padding", "<i4"),
    ]
)
MIN_SCALE = 1e-30  # not 0, as -inf times the scale has to be -inf
GREEDY = (0, 0, 0, 1e30, 0, 0)  # draws the first of the best tokens, as all others have no likelihood

PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
PHILOX_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
PHILOX_ROUNDS = 10
LOW_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)


class TokenLogprobs(NamedTuple):
    """Logprobs in the layout of `StepResult`; columns are the chosen token, then the best ones."""

    rows: np.ndarray  # [num_logprob_rows] int32, indices into the sampled rows; for a token of a prompt -1 - slot
    ids: Tensor  # [num_logprob_rows * (1 + MAX_LOGPROBS)] int32, -1: none
    values: Tensor  # the same shape, float32, -inf: none


def joined(parts: list[TokenLogprobs]) -> TokenLogprobs:
    if not parts:
        return TokenLogprobs(np.empty(0, np.int32), torch.empty(0, dtype=torch.int32), torch.empty(0))
    rows, ids, values = zip(*parts, strict=True)
    return TokenLogprobs(np.concatenate(rows), torch.cat(ids), torch.cat(values)) if len(parts) > 1 else parts[0]


class PromptTargets(NamedTuple):
    """Tokens of prompts whose logprobs are wanted; all [*] int64."""

    indices: np.ndarray  # into the step's tokens: the token before each target
    token_ids: np.ndarray  # the targets
    wanted: np.ndarray  # how many best tokens are wanted beside each target
    slots: np.ndarray  # of the targets' sequences


class Sampler:
    """Sampling parameters of every slot, and the choice of tokens by them."""

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._upload = Uploader(device)
        self._slots = np.zeros(max_slots, SLOT_INIT)  # row s: the record that last entered slot s
        self._stop_ids = [np.empty(0, np.int32)] * max_slots
        self._adjustments = Adjustments(max_slots, vocab_size, device)
        self._arrived: dict[int, SlotExtras] = {}  # by slot that a sequence enters in the step to come
        self._prompts: dict[int, SlotExtras] = {}  # by slot of a sequence that asks for logprobs of its prompt

    def take_extras(self, extras: SlotExtras) -> None:
        """The extras hold from when a sequence enters their slot, which is in the next step."""
        self._arrived[extras.slot] = extras

    def apply(self, slot_inits: np.ndarray, stop_ids: np.ndarray) -> None:
        """Take over the parameters of sequences that enter slots.

        slot_inits [*] SLOT_INIT; stop_ids [sum of num_stop_ids] int32, the records' stop ids one after another
        """
        self._slots[slot_inits["slot"]] = slot_inits
        ends = np.cumsum(slot_inits["num_stop_ids"])
        for slot, ids in zip(slot_inits["slot"].tolist(), np.split(stop_ids, ends[:-1]), strict=False):
            self._stop_ids[slot] = ids
            extras = self._arrived.pop(slot, None)
            self._adjustments.enter(slot, extras)
            self._prompts.pop(slot, None)
            if extras is not None and extras.num_prompt_logprobs >= 0:
                self._prompts[slot] = extras

    def sample(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """The next token of every row, [num_rows] int64; -1 where a user's function has failed.

        Args:
            logits: [num_rows, vocab_size], float32 or a 16-bit type, contiguous; left as they are.
            slots: [num_rows] int64.
            positions: [num_rows] int64, index in its sequence, prompt included, of the token to choose.
        """
        if not self._adjustments.concern(slots):
            return self._draw(logits, slots, positions)
        token_ids = self._draw(self._adjustments.apply(logits, slots), slots, positions)
        self._adjustments.note(slots, token_ids)
        return token_ids

    def warm_up(self, logits: Tensor) -> None:
        """Have kernels compile and load: those that most requests need, and those that extras need."""
        zeros = np.zeros(len(logits), np.int64)
        self.sample(logits, zeros, zeros)
        self._draw(self._adjustments.apply(logits, zeros), zeros, zeros)

    def take_errors(self) -> np.ndarray:
        """Why rows of the last `sample` have -1, as text: [*] uint8."""
        return self._adjustments.take_errors()

    def _draw(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """As `sample`, once the adjustments have been applied to the logits."""
        params = self._slots[slots]
        logits = self._mask_stop_ids(logits, params, positions)
        draws = draws_of(params, positions)
        if logits.is_cuda:
            from nanopd.cuda.sampling import draw_tokens  # not at the top: numba's CUDA side is for GPU workers only

            return draw_tokens(logits, *self._upload([draws.view(np.int64)]))
        token_ids = logits.argmax(-1)
        # One row at a time, as its temporaries stay in the cache (measured: a batch's take up to six times as long).
        for row in np.flatnonzero(params["temperature"] >= GREEDY_BELOW).tolist():
            token_ids[row] = draw_token(logits[row].float(), *draws[row].item()[:-1])
        return token_ids

    def logprobs(self, logits: Tensor, slots: np.ndarray, token_ids: Tensor) -> list[TokenLogprobs]:
        """Log-softmax of the logits as the model gave them, for the rows whose slots ask for it, if there are any.

        logits and slots as for `sample`; token_ids [num_rows] int64, the chosen tokens.
        """
        num_logprobs = self._slots["num_logprobs"][slots].astype(np.int64)
        host_rows = np.flatnonzero(num_logprobs >= 0)
        if not len(host_rows):
            return []
        rows, wanted = self._upload([host_rows, num_logprobs[host_rows]])
        if len(rows) < len(logits):
            logits, token_ids = logits.index_select(0, rows), token_ids.index_select(0, rows)
        ids, values = token_logprobs(logits, token_ids, wanted, int(num_logprobs.max(initial=0)))
        return [TokenLogprobs(host_rows.astype(np.int32), ids, values)]

    def prompt_targets(self, slots: np.ndarray, positions: np.ndarray) -> PromptTargets | None:
        """The prompt tokens of a step whose logprobs are asked for; slots, positions [T] int64 of all its tokens."""
        parts = []
        for slot, extras in self._prompts.items():
            indices = np.flatnonzero((slots == slot) & (positions + 1 < extras.num_prompt_tokens))
            following = extras.token_ids[positions[indices] + 1].astype(np.int64)
            wanted = np.full(len(indices), extras.num_prompt_logprobs)
            parts.append((indices, following, wanted, np.full(len(indices), slot)))
        targets = PromptTargets(*map(np.concatenate, zip(*parts))) if parts else None
        return targets if targets and len(targets.slots) else None

    def is_plain_argmax(self, slots: np.ndarray, positions: np.ndarray) -> bool:
        """Whether `sample` would choose the largest logit in every row; arguments as for `sample`."""
        if self._adjustments.concern(slots):
            return False
        params = self._slots[slots]
        return not bool((_is_masked(params, positions) | (params["temperature"] >= GREEDY_BELOW)).any())

    def _mask_stop_ids(self, logits: Tensor, params: np.ndarray, positions: np.ndarray) -> Tensor:
        """The logits, with -inf at the stop ids of rows that are still below their min_len."""
        rows = np.flatnonzero(_is_masked(params, positions))
        if len(rows) == 0:
            return logits
        ids = np.concatenate([self._stop_ids[slot] for slot in params["slot"][rows]])
        (index,) = self._upload([np.repeat(rows, params["num_stop_ids"][rows]) * self.vocab_size + ids])
        return logits.flatten().index_fill(0, index, -torch.inf).view_as(logits)


def _is_masked(params: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Whether rows must not stop yet: params [num_rows] SLOT_INIT, positions [num_rows] int64 -> [num_rows] bool."""
    return (positions < params["min_len"]) & (params["num_stop_ids"] > 0)


def token_logprobs(logits: Tensor, token_ids: Tensor, wanted: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Ids and values of `TokenLogprobs`.

    Args:
        logits: [num_rows, vocab_size] float32 or a 16-bit type.
        token_ids: [num_rows] int64.
        wanted: [num_rows] int64, how many best tokens.
        num_best: the largest of `wanted`.
    """
    num_best = min(num_best, logits.shape[1])
    ids = torch.full((len(logits), 1 + MAX_LOGPROBS), -1, dtype=torch.int64, device=logits.device)
    values = torch.full(ids.shape, -torch.inf, device=logits.device)
    best = best_tokens(logits, num_best)
    ids[:, 0] = token_ids
    ids[:, 1 : 1 + num_best] = best
    found = ids[:, : 1 + num_best].clamp(min=0)  # the token is -1 where a user's function has failed
    values[:, : 1 + num_best] = logits.log_softmax(-1, torch.float32).gather(-1, found)
    unwanted = torch.arange(ids.shape[1], device=logits.device) > wanted[:, None]
    return ids.masked_fill_(unwanted, -1).int().flatten(), values.masked_fill_(unwanted, -torch.inf).flatten()


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """The ids of the best tokens, [num_rows, count] int64, the best one first.

    All of them are within the `count` groups of tokens with the largest maxima.
    """
    num_rows, vocab_size = logits.shape
    num_groups = vocab_size // GROUP
    if vocab_size % GROUP or num_groups <= count:
        return logits.topk(count).indices
    groups = logits.view(num_rows, num_groups, GROUP)
    first = GROUP * groups.amax(-1).topk(count).indices
    candidates = (first[:, :, None] + torch.arange(GROUP, device=logits.device)).flatten(1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(count).indices)


def draws_of(params: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What tokens are drawn by: params [num_rows] SLOT_INIT, positions [num_rows] int64 -> [num_rows] DRAW."""
    draws = np.zeros(len(params), DRAW)
    is_random = params["temperature"] >= GREEDY_BELOW
    draws["uniform"] = random_numbers(params["seed"], positions)
    draws["top_p"] = np.where(params["top_p"] < 1.0, np.ceil(params["top_p"] * 2.0**64), 0)
    draws["top_k"] = params["top_k"]
    draws["min_p"] = params["min_p"]
    draws["scale"] = np.maximum(LOG2_E / np.where(is_random, params["temperature"], 1.0), MIN_SCALE)
    draws[~is_random] = GREEDY
    return draws


def fixed_point(likelihood: Tensor) -> Tensor:
    """Likelihoods (float32, at most 1) as int64 multiples of 2**-40."""
    return (likelihood * ONE).long()


def draw_token(logits: Tensor, uniform: int, top_p: int, top_k: int, scale: float, min_p: float = 0.0) -> int:
    """The token at which the cumulative distribution, in the order of the vocabulary, passes `uniform`.

    logits [vocab_size] float32; the others are the fields of a DRAW.
    """
    likelihood = ((logits - logits.max()) * scale).exp2_().nan_to_num_(1.0)  # a NaN counts as the best
    cdf = kept_weights(likelihood, top_k, top_p, min_p).numpy().cumsum()
    return int(np.searchsorted(cdf, int(cdf[-1]) * uniform >> 64, side="right"))


def kept_weights(likelihood: Tensor, top_k: int, top_p: int, min_p: float = 0.0) -> Tensor:
    """The weights of the tokens that min-p, then top-k, and then top-p of what they have left, keep; 0 for the others.

    Top-p keeps the smallest set of best tokens that reaches `top_p` of the mass. All tokens as likely as the last one
    kept are kept, so the set does not depend on the order of ties. likelihood [vocab_size] float32, at most 1; the
    others are fields of a DRAW. Returns [vocab_size] int64.
    """
    if min_p > 0:
        likelihood = likelihood.where(likelihood >= min_p, 0)
    if 0 < top_k < len(likelihood):
        likelihood = likelihood.where(likelihood >= likelihood.topk(top_k).values[-1], 0)
    weights = fixed_point(likelihood)
    if top_p > 0:
        mass = -(-int(weights.sum()) * top_p >> 64)  # rounded up
        weights = weights.where(likelihood >= _last_of_mass(likelihood, mass), 0)
    return weights


def _last_of_mass(likelihood: Tensor, mass: int) -> Tensor:
    """The least likely of the best tokens whose weights reach `mass`: [] float32."""
    num_candidates = min(NUM_CANDIDATES, len(likelihood))
    while True:
        best = likelihood.topk(num_candidates).values  # descending
        sums = fixed_point(best).cumsum(-1)
        if sums[-1] >= mass:
            return best[torch.searchsorted(sums, mass)]
        num_candidates = min(GROWTH * num_candidates, len(likelihood))


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    32-bit words in uint64: counter [4, n], key [2, n] -> [4, n].
    """
    even, odd = counter[0::2], counter[1::2]
    for _ in range(PHILOX_ROUNDS):
        product = (even * PHILOX_MULTIPLIERS)[::-1]
        even, odd = (product >> SHIFT_32) ^ odd ^ key, product & LOW_32
        key = (key + PHILOX_WEYL) & LOW_32
    return np.stack((even[0], odd[0], even[1], odd[1]))


def random_numbers(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each (seed, position): seeds [n] uint64, positions [n] int64, >= 0 -> [n] uint64."""
    counter = np.zeros((4, len(seeds)), np.uint64)
    counter[0] = positions
    words = philox4x32(counter, np.stack((seeds & LOW_32, seeds >> SHIFT_32)))
    return words[0] << SHIFT_32 | words[1]

"""Guesses the next tokens of one sequence from its own text (prompt lookup), and knows how good it is at that.

After a wrong guess, the latest occurrence of the last 3 tokens is looked for, or else of the last 2, or the last one;
what follows it is guessed, token by token, for as long as that is right (Saxena, prompt lookup decoding, 2023). It
guesses whether or not anybody asks for drafts, so a sequence that has stopped drafting finds out by itself, at no cost
for the device, when to begin again. Parent process; knows tokens, not where they come from.
"""

from __future__ import annotations

from array import array

import numpy as np

MAX_NGRAM = 3
WINDOW = 1 << 14  # latest tokens that are looked through
WEIGHT = 0.25  # the weight of the latest guess in the share of right guesses
FIRST = 0.3  # the share that is assumed in the beginning
START, STOP = 0.4, 0.2  # the share at which drafting begins and ends
PROBE_EVERY = 4  # a sequence whose guesses are wrong looks for a match after so many tokens
MIN_LIKELY = 0.2  # a draft that is less likely than that to be reached and right is left out


class Drafter:
    """The text of one sequence so far."""

    __slots__ = ("_guess", "_token_ids", "is_drafting", "num_accepted", "num_drafts", "share")

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = array("i", token_ids)
        self._guess: int | None = None  # index of the token that the next one is taken to equal
        self.share = FIRST  # of guesses that were right, lately; no guess is a wrong one
        self.is_drafting = False  # drafts are worth waiting for each step's result
        self.num_drafts = 0  # that were verified
        self.num_accepted = 0

    def observe(self, token_id: int) -> None:
        """The sequence's next token."""
        tokens, guess = self._token_ids, self._guess
        is_right = guess is not None and tokens[guess] == token_id
        tokens.append(token_id)
        self.share += WEIGHT * (is_right - self.share)
        self.is_drafting = self.share >= (STOP if self.is_drafting else START)
        if guess is not None and is_right:
            self._guess = guess + 1
        else:
            self._guess = self._find() if self.share >= STOP or len(tokens) % PROBE_EVERY == 0 else None

    def count_verified(self, num_drafts: int) -> None:
        """A step has verified so many drafts."""
        self.num_drafts += num_drafts

    def count_accepted(self) -> None:
        """One of the verified drafts was right."""
        self.num_accepted += 1

    def propose(self, max_drafts: int) -> list[int]:
        """What comes next: fewer tokens the less often guesses were right, and at most `max_drafts`."""
        if self._guess is None:
            return []
        count, likely = 0, self.share
        while count < max_drafts and likely >= MIN_LIKELY:
            count, likely = count + 1, likely * self.share
        period = len(self._token_ids) - self._guess  # beyond the end, the drafts are what follows
        return [self._token_ids[self._guess + i % period] for i in range(count)]

    def _find(self) -> int | None:
        """Behind the latest of the longest matches."""
        tokens = np.frombuffer(self._token_ids, np.int32)[-WINDOW:]
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])  # of matches
        if not len(ends):
            return None
        for length in range(2, MAX_NGRAM + 1):
            longer = ends[ends >= length - 1]
            longer = longer[tokens[longer - (length - 1)] == tokens[-length]]
            if not len(longer):
                break
            ends = longer
        return len(self._token_ids) - len(tokens) + int(ends[-1]) + 1


def rounds_of(slots: np.ndarray, drafts: dict[int, list[int]], token_ids: np.ndarray) -> list[np.ndarray]:
    """Which samples of a step count: the first of each row, then the second where that was the first draft, and so on.

    This is the rule of Leviathan et al. (arXiv:2211.17192) for proposals that are certain: a draft x is taken with
    probability p(x), and what is sampled instead is distributed as p without x. As the random number belongs to (seed,
    position), the tokens are even those that would have come without drafts.

    Args:
        slots: [num_samples] int32; the samples of a row follow each other
        drafts: by slot
        token_ids: [num_samples] int32, what was sampled

    Returns:
        Indices of samples, [*] int64 each
    """
    is_first = np.concatenate(([True], slots[1:] != slots[:-1]))
    rounds = [np.flatnonzero(is_first)]
    later: list[list[int]] = []
    for row in rounds[0][np.isin(slots[rounds[0]], list(drafts))].tolist():
        for i, draft in enumerate(drafts[int(slots[row])]):
            if token_ids[row + i] != draft:
                break
            if i == len(later):
                later.append([])
            later[i].append(row + i + 1)
    return rounds + [np.array(rows) for rows in later]

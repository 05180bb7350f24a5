"""Changes the logits of the rows whose sequences ask for it: penalties, biases, banned words, users' own functions.

Owns what that needs for every slot: how often each token was seen, what is added to its logit, the last tokens, and,
for users' functions, all generated tokens on the host. `SlotExtras` says how a slot begins and `note` which token was
drawn in it, so the parent is asked nothing in between. On a GPU nothing here waits for it but users' functions.

Order, as in vLLM: users' functions, biases (with -inf for what is not allowed or banned), repetition penalty, frequency
penalty, presence penalty. `adjust_logits` here and the kernel of `nanopd.cuda.adjusting` are the same arithmetic.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanopd.messages import MAX_BAD_WORD_TOKENS, LogitsProcessor, SlotExtras
from nanopd.worker.upload import Uploader, upload_once

IN_PROMPT = 1 << 24  # bit of a count: the token stands in the prompt; the lower bits say how often it was generated
WIDTH_MULTIPLE = 8  # the width of a table's rows is a multiple of what a thread of the kernel takes

# How the logits of a row change. The kernel reads these records.
ADJUSTMENT = np.dtype(
    [
        ("row", "<i4"),  # of the tables; 0: nothing changes
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("repetition", "<f4"),  # factor of the logits of tokens seen before, where the logit is not positive
        ("inverse", "<f4"),  # the same where the logit is positive
        ("padding", "<i4"),
    ]
)


class Adjustments:
    """All slots of a worker."""

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._upload = Uploader(device)
        self._records = np.zeros(max_slots, ADJUSTMENT)
        self._tables = _Tables(-(-vocab_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, device)
        self._words: dict[int, np.ndarray] = {}  # by slot: [num_words, MAX_BAD_WORD_TOKENS] int64, with -1 in front
        self._recent = torch.full((max_slots, MAX_BAD_WORD_TOKENS - 1), -1, device=device)  # last generated
        self._processing: dict[int, _Processing] = {}  # by slot
        self._failed: dict[int, str] = {}  # by row of this step whose user's function has failed: the traceback

    def concern(self, slots: np.ndarray) -> bool:
        """Whether any of the rows' logits are to be changed; slots [num_rows] int64."""
        return bool(self._records["row"][slots].any())

    def enter(self, slot: int, extras: SlotExtras | None) -> None:
        """A sequence enters a slot, which forgets what its last sequence had."""
        if row := int(self._records["row"][slot]):
            self._tables.free.append(row)
            self._words.pop(slot, None)
            self._processing.pop(slot, None)
            self._records[slot] = 0
        if extras is None or not extras.changes_logits:
            return
        words = extras.bad_words.reshape(-1, MAX_BAD_WORD_TOKENS).astype(np.int64)
        is_long = words[:, -2] >= 0
        generated = extras.token_ids[extras.num_prompt_tokens :]
        presence, frequency, repetition = extras.penalties[0].item()
        row = self._tables.take(extras, words[~is_long, -1])
        self._records[slot] = row, presence, frequency, repetition, 1 / repetition, 0
        if is_long.any():
            self._words[slot] = words[is_long]
            num_recent = self._recent.shape[1]
            recent = np.concatenate((np.full(num_recent, -1), generated))[-num_recent:]
            self._recent[slot].copy_(upload_once(recent, self._recent.device))
        if len(extras.processors):
            self._processing[slot] = _Processing(extras.processors.tobytes(), generated.tolist())

    def apply(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        """The rows' logits, changed: float32, contiguous.

        logits [num_rows, vocab_size], float32 or a 16-bit type, contiguous, stay as they are; slots [num_rows] int64
        """
        logits = self._processed(logits, slots)
        records, tables = self._records[slots], self._tables
        if logits.is_cuda:
            from nanopd.cuda import adjusting  # not at the top: numba's CUDA side is for GPU workers only

            (params,) = self._upload([records.view(np.int64)])
            logits = adjusting.adjust_logits(logits, tables.counts, tables.biases, params)
        else:
            logits = adjust_logits(logits, tables.counts, tables.biases, records)
        self._ban_words(logits, slots)
        return logits

    def note(self, slots: np.ndarray, token_ids: Tensor) -> None:
        """The drawn tokens: slots, token_ids [num_rows] int64. Sets the token to -1 in rows that failed."""
        table_rows = self._records["row"][slots].astype(np.int64)
        counted = np.flatnonzero(table_rows)
        if len(counted):
            rows, first = self._upload([counted, table_rows[counted] * self._tables.width])
            self._tables.count(first + token_ids[rows])
        followed = _rows_in(self._words, slots)
        if followed:
            rows, of_slots = self._upload([np.array(followed), slots[followed]])
            recent = torch.cat((self._recent[of_slots, 1:], token_ids[rows, None]), 1)
            self._recent.index_copy_(0, of_slots, recent)
        for row in _rows_in(self._processing, slots):
            self._processing[int(slots[row])].token_ids.append(int(token_ids[row]))
        for row in self._failed:
            token_ids[row] = -1

    def take_errors(self) -> np.ndarray:
        """Why rows of the last step have -1, as text: [*] uint8."""
        text, self._failed = "\n".join(self._failed.values()), {}
        return np.frombuffer(text.encode(), np.uint8)

    def _processed(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        """The logits, changed by users' functions where there are any."""
        rows = _rows_in(self._processing, slots)
        if rows:
            logits = logits.to(torch.float32, copy=True)
        for row in rows:
            try:
                logits[row] = self._processing[int(slots[row])](logits[row].clone())
            except Exception:
                self._failed[row] = f"a logits processor has failed:\n{traceback.format_exc()}"
        return logits

    def _ban_words(self, logits: Tensor, slots: np.ndarray) -> None:
        """Sets -inf, in place, for the last token of each word whose other tokens were generated just before."""
        rows = _rows_in(self._words, slots)
        if not rows:
            return
        of_rows = [self._words[int(slots[row])] for row in rows]
        words, row_of_word = np.concatenate(of_rows), np.repeat(rows, [len(words) for words in of_rows])
        ends = row_of_word * self._vocab_size + words[:, -1]
        before, end, of_slot = self._upload([words[:, :-1].ravel(), ends, slots[row_of_word]])
        before = before.view(len(words), -1)
        is_next = ((before == self._recent[of_slot]) | (before < 0)).all(-1)
        # The least value wins, as several words may have the same last token.
        logits.view(-1).scatter_reduce_(0, end, torch.where(is_next, -torch.inf, torch.inf), "amin")


def _rows_in(holders: dict[int, Any], slots: np.ndarray) -> list[int]:
    """The rows whose slots (slots [num_rows] int64) are among the keys."""
    return [row for row, slot in enumerate(slots.tolist()) if slot in holders] if holders else []


class _Tables:
    """A row of counts and one of biases for each sequence that needs them, in memory that grows with their number.

    Row 0 is all zeros, which changes nothing.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width  # at least vocab_size
        self.counts = torch.zeros(1, width, dtype=torch.int32, device=device)  # [num_rows, width], see IN_PROMPT
        self.biases: Tensor | None = None  # [num_rows, width] float32; None: no sequence has had a bias yet
        self.free: list[int] = []  # rows of no sequence
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def take(self, extras: SlotExtras, banned: np.ndarray) -> int:
        """A row for a sequence; banned [*] int64 token ids."""
        if not self.free:
            num_rows = len(self.counts)
            self.counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
            self.biases = None if self.biases is None else torch.cat((self.biases, torch.zeros_like(self.biases)))
            self.free = list(range(num_rows, 2 * num_rows))
        row, device = self.free.pop(), self.counts.device
        prompt, generated = np.split(extras.token_ids.astype(np.int64), [extras.num_prompt_tokens])
        self.counts[row].zero_().index_fill_(0, upload_once(prompt, device), IN_PROMPT)
        self.count(upload_once(generated + row * self.width, device))
        if self.biases is None and (len(extras.biases) or len(extras.allowed_ids) or len(banned)):
            self.biases = torch.zeros(self.counts.shape, device=device)
        if self.biases is not None:
            self._set_biases(self.biases[row], extras, banned)
        return row

    def _set_biases(self, biases: Tensor, extras: SlotExtras, banned: np.ndarray) -> None:
        """biases [width] float32"""
        device = biases.device
        biases.zero_()
        if len(extras.allowed_ids):
            allowed = upload_once(extras.allowed_ids.astype(np.int64), device)
            biases.fill_(-torch.inf).index_fill_(0, allowed, 0.0)
        ids = upload_once(extras.biases["token_id"].astype(np.int64), device)
        biases.index_add_(0, ids, upload_once(extras.biases["bias"].copy(), device))
        biases.index_fill_(0, upload_once(banned, device), -torch.inf)

    def count(self, cells: Tensor) -> None:
        """Count one more of each token; cells [*] int64, row * width + token id."""
        self.counts.view(-1).index_add_(0, cells, self._one.expand(len(cells)))


@dataclass(slots=True)
class _Processing:
    """The users' functions of one slot."""

    pickled: bytes
    token_ids: list[int]  # generated so far
    functions: tuple[LogitsProcessor, ...] | None = None  # None: not unpickled yet

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [vocab_size] float32 -> the same; raises whatever the functions raise."""
        if self.functions is None:
            self.functions = pickle.loads(self.pickled)
        for function in self.functions:
            logits = function(self.token_ids, logits)
        return logits


def adjust_logits(logits: Tensor, counts: Tensor, biases: Tensor | None, records: np.ndarray) -> Tensor:
    """Biases and penalties: [num_rows, vocab_size] float32.

    Args:
        logits: [num_rows, vocab_size] float32 or a 16-bit type.
        counts: [num_table_rows, >= vocab_size] int32.
        biases: the same shape, float32.
        records: [num_rows] ADJUSTMENT.
    """
    rows, vocab_size = torch.from_numpy(records["row"].astype(np.int64)), logits.shape[1]
    names = ("presence", "frequency", "repetition", "inverse")
    presence, frequency, repetition, inverse = (torch.from_numpy(records[name].copy())[:, None] for name in names)
    x = logits.float() if biases is None else logits.float() + biases[rows, :vocab_size]
    count = counts[rows, :vocab_size]
    x = torch.where(count > 0, x * torch.where(x > 0, inverse, repetition), x)
    num_generated = count & (IN_PROMPT - 1)
    return x - num_generated * frequency - (num_generated > 0) * presence

"""From a sequence to the message that tells a worker what only few sequences ask for (`SlotExtras`)."""

from __future__ import annotations

import numpy as np

from nanopd.core.sequence import Sequence
from nanopd.messages import BIAS, MAX_BAD_WORD_TOKENS, PENALTIES, SlotExtras
from nanopd.request import SamplingParams


def extras_of(seq: Sequence, slot: int) -> SlotExtras:
    """What there is to know of the sequence as it enters a slot; its list of tokens is up to date."""
    params = seq.params
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    wanted = params.prompt_logprobs if seq.awaits_prompt_logprobs else None
    head = slot, seq.num_prompt_tokens, -1 if wanted is None else wanted, int(params.changes_logits)
    tokens, allowed = np.array(seq.token_ids, np.int32), np.array(params.allowed_token_ids or (), np.int32)
    biases = np.array(list((params.logit_bias or {}).items()), BIAS)
    processors = np.frombuffer(params.pickled_processors(), np.uint8)
    words = _padded_words(params)
    return SlotExtras(*head, tokens, np.array([penalties], PENALTIES), biases, allowed, words, processors)


def _padded_words(params: SamplingParams) -> np.ndarray:
    """[num_words * MAX_BAD_WORD_TOKENS] int32"""
    words = np.full((len(params.bad_words), MAX_BAD_WORD_TOKENS), -1, np.int32)
    for row, word in zip(words, params.bad_words, strict=True):
        row[len(row) - len(word) :] = word
    return words.reshape(-1)

"""From a sequence to the message that tells a worker what only few sequences ask for (`SlotExtras`)."""

from __future__ import annotations

import numpy as np

from nanopd.core.sequence import Sequence
from nanopd.messages import BIAS, MAX_BAD_WORD_TOKENS, PENALTIES, SlotExtras
from nanopd.request import SamplingParams


def has_extras(seq: Sequence) -> bool:
    return seq.params.changes_logits or seq.awaits_prompt_logprobs


def extras_of(seq: Sequence, slot: int) -> SlotExtras:
    """What there is to know of the sequence as it enters a slot; its list of tokens is up to date."""
    params = seq.params
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    wanted = params.prompt_logprobs if seq.awaits_prompt_logprobs else None
    return SlotExtras(
        slot,
        seq.num_prompt_tokens,
        -1 if wanted is None else wanted,
        int(params.changes_logits),
        np.array(seq.token_ids, np.int32),
        np.array([penalties], PENALTIES),
        np.array(list((params.logit_bias or {}).items()), BIAS),
        np.array(params.allowed_token_ids or (), np.int32),
        _padded_words(params),
        np.frombuffer(params.pickled_processors(), np.uint8),
    )


def _padded_words(params: SamplingParams) -> np.ndarray:
    """[num_words * MAX_BAD_WORD_TOKENS] int32"""
    words = np.full((len(params.bad_words), MAX_BAD_WORD_TOKENS), -1, np.int32)
    for row, word in zip(words, params.bad_words, strict=True):
        row[len(row) - len(word) :] = word
    return words.reshape(-1)

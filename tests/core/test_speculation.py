"""Drafts against a plain search, and their verification against the definition."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nanopd.core import speculation
from nanopd.core.speculation import Drafter, rounds_of
from nanopd.messages import MAX_LOGPROBS, SLOT_INIT, StepResult
from nanopd.worker.sampler import Sampler

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def expected_drafts(tokens: list[int], count: int) -> list[int]:
    """What followed the latest of the longest matches of the last 3 tokens, or fewer, over and over."""
    for length in (3, 2, 1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[end - length : end] == tokens[len(tokens) - length :]:
                text = tokens[end:]
                return [text[i % len(text)] for i in range(count)]
    return []


@given(TOKENS, st.integers(1, 7))
def test_drafts_follow_the_latest_longest_match(tokens: list[int], count: int) -> None:
    drafter = Drafter(tokens[:-1])
    drafter.share = 1.0  # of an earlier success
    drafter.observe(tokens[-1])
    drafter.share = 1.0
    assert drafter.propose(count) == expected_drafts(tokens, count)


def test_the_window_bounds_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "WINDOW", 8)
    for gap, drafts in ((5, [2]), (6, [])):
        drafter = Drafter([1, 2, *range(10, 10 + gap)])
        drafter.observe(1)
        drafter.share = 1.0
        assert drafter.propose(1) == drafts


def test_length_follows_the_share_of_right_guesses() -> None:
    """It begins when its guesses come true, grows, and ends when they do not; a text without repeats has no drafts."""
    text = list(range(100, 140))
    drafter = Drafter(text)
    assert drafter.propose(7) == []
    lengths = []
    for token in text:
        drafter.observe(token)
        lengths.append(len(drafter.propose(7)) if drafter.is_drafting else 0)
    assert lengths[0] == 0 and lengths == sorted(lengths) and lengths[12:] == [7] * 28
    for token in range(200, 206):
        drafter.observe(token)
    assert not drafter.is_drafting and drafter.propose(7) == []
    for token in text[: 2 * speculation.PROBE_EVERY]:
        drafter.observe(token)
    assert drafter.is_drafting


BITS = st.integers(0, 1)


@given(st.lists(st.tuples(st.lists(BITS, max_size=5), st.lists(BITS, min_size=6, max_size=6))))
def test_rounds(rows: list[tuple[list[int], list[int]]]) -> None:
    """A row has its drafts, and what is sampled before and behind each."""
    slots = np.array([10 + i for i, (drafts, _) in enumerate(rows) for _ in range(len(drafts) + 1)], np.int32)
    sampled = [token for drafts, tokens in rows for token in tokens[: len(drafts) + 1]]
    by_slot = {10 + i: drafts for i, (drafts, _) in enumerate(rows) if drafts}
    if not by_slot:
        return
    rounds = rounds_of(slots, by_slot, np.array(sampled))
    for i, (drafts, tokens) in enumerate(rows):
        num_right = next((n for n, draft in enumerate(drafts) if draft != tokens[n]), len(drafts))
        taken = [sampled[index] for indices in rounds for index in indices if slots[index] == 10 + i]
        assert taken == tokens[: num_right + 1]


def test_parts_of_a_result_have_their_logprobs() -> None:
    rows = np.array([-4, 0, 2, 3], np.int32)
    ids = np.repeat(np.arange(4, dtype=np.int32), 1 + MAX_LOGPROBS)
    result = StepResult(1, 1, np.arange(5, dtype=np.int32), rows, ids, ids.astype(np.float32))
    first, second = result.part(np.array([0, 1, 3])), result.part(np.array([2, 4]))
    assert (first.token_ids.tolist(), second.token_ids.tolist()) == ([0, 1, 3], [2, 4])
    assert (first.logprob_rows.tolist(), second.logprob_rows.tolist()) == ([-4, 0, 2], [0])
    assert first.logprob_ids[:: 1 + MAX_LOGPROBS].tolist() == [0, 1, 3]
    assert second.logprobs.tolist() == [2.0] * (1 + MAX_LOGPROBS)


@pytest.mark.parametrize("num_seqs", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_distribution_is_that_of_the_model(num_seqs: int) -> None:
    """Of many sequences: the token behind a prompt, and the one behind that where the draft was right, together."""
    vocab_size, draft, temperature = 6, 2, 0.8
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(2, vocab_size)).astype(np.float32))
    p, p_behind_draft = (logits.double() / temperature).softmax(-1).numpy()
    inits = np.zeros(num_seqs, SLOT_INIT)
    inits["slot"], inits["seed"] = np.arange(num_seqs), np.arange(num_seqs)
    inits["temperature"], inits["top_p"], inits["num_logprobs"] = temperature, 1.0, -1
    sampler = Sampler(num_seqs, vocab_size, torch.device("cpu"))
    sampler.apply(inits, np.empty(0, np.int32))
    slots = np.repeat(np.arange(num_seqs), 2)
    tokens = sampler.sample(logits.repeat(num_seqs, 1), slots, np.tile([7, 8], num_seqs)).numpy()
    first, second = rounds_of(slots, {slot: [draft] for slot in range(num_seqs)}, tokens)
    wrong = tokens[first][tokens[first] != draft]
    observed = np.concatenate([np.bincount(part, minlength=vocab_size) for part in (wrong, tokens[second])])
    expected = np.concatenate([p * (np.arange(vocab_size) != draft), p[draft] * p_behind_draft]) * num_seqs
    kept = expected > 0
    assert observed[~kept].sum() == 0
    assert chisquare(observed[kept], expected[kept]).pvalue > 0.01


def test_a_token_takes_little_time() -> None:
    """Microseconds of the parent, of 8k tokens of text without repeats; generous, as machines are shared."""
    drafter = Drafter(np.random.default_rng(0).zipf(1.3, 8192).clip(max=50_000).tolist())
    start = time.perf_counter()
    for token in np.random.default_rng(1).integers(60_000, 90_000, 2000).tolist():
        drafter.observe(token)
    assert (time.perf_counter() - start) / 2000 < 100e-6

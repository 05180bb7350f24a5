"""The sampler against transformers' logits processors, exact distributions and published known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanopd.messages import MAX_LOGPROBS, SLOT_INIT
from nanopd.worker.sampler import DRAW, Sampler, draw_token, draws_of, joined, kept_weights, philox4x32, random_numbers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_sampler(
    vocab_size: int, slots: list[dict], stop_ids: list[list[int]] | None = None, device: str = "cpu"
) -> Sampler:
    """A sampler whose slot i has the fields of slots[i] over defaults, entered in reverse order."""
    stop_ids = stop_ids or [[] for _ in slots]
    records = np.zeros(len(slots), SLOT_INIT)
    for slot, (record, fields) in enumerate(zip(records, slots, strict=True)):
        defaults = {"slot": slot, "temperature": 1.0, "top_p": 1.0, "num_logprobs": -1}
        for name, value in {**defaults, **fields, "num_stop_ids": len(stop_ids[slot])}.items():
            record[name] = value
    sampler = Sampler(len(slots), vocab_size, torch.device(device))
    flat = [token_id for ids in reversed(stop_ids) for token_id in ids]
    sampler.apply(records[::-1].copy(), np.array(flat, np.int32))
    return sampler


def likelihood_of(logits: Tensor) -> Tensor:
    """[vocab_size] float32, of the best token 1."""
    return (logits - logits.max()).exp()


def fraction(x: float) -> int:
    """In multiples of 2**-64; 1, which is off, as 0."""
    return math.ceil(x * 2**64) % 2**64


def random_logits(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


# ------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = [np.array([[int(word, 16)] for word in text.split()], np.uint64) for text in (counter, key, expected)]
    assert np.array_equal(philox4x32(words[0], words[1]), words[2])


def test_random_numbers_are_uniform_and_distinct() -> None:
    positions = np.arange(20_000)
    by_position = random_numbers(np.full(20_000, 2**63 + 5, np.uint64), positions)
    by_seed = random_numbers(positions.astype(np.uint64) << np.uint64(32), np.full(20_000, 7))
    for numbers in (by_position, by_seed):
        assert len(np.unique(numbers)) == len(numbers)
        assert stats.kstest(numbers / 2.0**64, "uniform").pvalue > 0.001


# ------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("vocab_size", [11, 1000, 5003])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])  # 20: nearly flat, top-p keeps most of the vocabulary
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1, 0),
        (10, 1, 0),
        (700, 1, 0),
        (0, 0.5, 0),
        (0, 0.99, 0),
        (50, 0.9, 0),
        (0, 1, 0.1),
        (9, 1, 0.01),
        (0, 0.8, 0.2),
    ],
)
def test_kept_tokens_are_those_of_transformers(
    vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, vocab_size, seed=vocab_size + top_k)
    warpers = [TemperatureLogitsWarper(temperature), *([MinPLogitsWarper(min_p)] if min_p else [])]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    expected = torch.softmax(LogitsProcessorList(warpers)(None, logits), -1)[0]

    weights = kept_weights(likelihood_of(logits[0] / temperature), top_k, fraction(top_p), min_p)
    torch.testing.assert_close((weights / weights.sum()).float(), expected, rtol=1e-5, atol=1e-10)
    assert not ((weights > 0) & (expected == 0)).any()
    assert not ((weights == 0) & (expected > 2.0**-39)).any()  # fixed point rounds very little to nothing


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}],
)
@pytest.mark.parametrize("device", DEVICES)
def test_samples_follow_the_exact_distribution(fields: dict, device: str) -> None:
    num_samples, logits = 4000, random_logits(1, 12, seed=1, scale=1.5)
    sampler = make_sampler(12, [{"seed": 99, **fields}], device=device)
    slots, positions = np.zeros(num_samples, np.int64), np.arange(num_samples)
    token_ids = sampler.sample(logits.repeat(num_samples, 1).to(device), slots, positions)
    counts = np.bincount(token_ids.cpu(), minlength=12)

    warpers = [TemperatureLogitsWarper(fields.get("temperature", 1.0)), TopKLogitsWarper(fields.get("top_k", 12))]
    warpers.append(TopPLogitsWarper(fields.get("top_p", 1.0)))
    exact = torch.softmax(LogitsProcessorList(warpers)(None, logits.double()), -1)[0].numpy()
    assert counts[exact == 0].sum() == 0
    kept = exact > 0
    assert stats.chisquare(counts[kept], exact[kept] * num_samples).pvalue > 0.001


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    likelihood = likelihood_of(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]))
    for top_k, top_p, num_kept in ((2, 1.0, 4), (0, 0.6, 4), (0, 1e-6, 1), (2, 0.6, 4), (1, 0.99, 1), (0, 1e-30, 1)):
        kept = kept_weights(likelihood, top_k, fraction(top_p)) > 0
        assert kept.tolist() == [i < num_kept for i in range(5)]


def test_top_p_that_is_reached_exactly() -> None:
    likelihood = torch.tensor([0.5, 1.0, 0.5])
    assert (kept_weights(likelihood, 0, fraction(0.5)) > 0).tolist() == [False, True, False]
    assert (kept_weights(likelihood, 0, fraction(0.5) + 1) > 0).tolist() == [True, True, True]


@pytest.mark.parametrize("uniform", [0, 2**64 - 1])
def test_draw_at_the_ends_of_the_unit_interval(uniform: int) -> None:
    logits = torch.tensor([-math.inf, 0.0, 3.0, 0.5, -math.inf])
    assert draw_token(logits, uniform, 0, 0, math.log2(math.e)) == (1 if uniform == 0 else 3)


def test_draws_of_slots() -> None:
    params = np.zeros(4, SLOT_INIT)
    params["temperature"], params["top_k"] = [0.5, 0.0, 1e38, 1.0], [0, 5, 7, 0]
    params["top_p"], params["min_p"] = [1.0, 0.5, 1e-30, 0.75], [0, 0.5, 0, 0.125]
    draws = draws_of(params, np.arange(4))
    assert draws.dtype.itemsize == 32, "four words, as they are uploaded"
    assert draws["top_p"].tolist() == [0, 0, 1, 3 << 62]
    assert draws["top_k"].tolist() == [0, 0, 7, 0]
    assert draws["min_p"].tolist() == [0, 0, 0, 0.125]
    assert draws["scale"][0] == np.float32(2 * math.log2(math.e))
    assert draws[1] == np.array((0, 0, 0, 1e30, 0, 0), DRAW), "greedy"
    assert (draws["uniform"] != 0).tolist() == [True, False, True, True]


# ------------------------------------------------------------------------------------------------- determinism

FIELDS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 5.0]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1]),
        "top_k": st.sampled_from([0, 1, 7, 600, 10**6]),
        "seed": st.integers(0, 2**64 - 1),
        "min_len": st.sampled_from([0, 10**6]),
    }
)


@pytest.mark.parametrize("device", DEVICES)
@given(slots=st.lists(FIELDS, min_size=2, max_size=9), data=st.data(), vocab_size=st.sampled_from([1003, 4096]))
@settings(max_examples=60)
def test_a_row_does_not_depend_on_the_other_rows(
    slots: list[dict], data: st.DataObject, vocab_size: int, device: str
) -> None:
    num_rows = len(slots)
    logits = random_logits(num_rows, vocab_size, seed=data.draw(st.integers(0, 100))).to(device)
    positions = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=num_rows, max_size=num_rows)))
    sampler = make_sampler(vocab_size, slots, [[3, 5]] * num_rows, device)
    together = sampler.sample(logits, np.arange(num_rows), positions)
    order = np.array(data.draw(st.permutations(range(num_rows))))[: data.draw(st.integers(1, num_rows))]
    assert torch.equal(sampler.sample(logits[order], order, positions[order]), together[order])


def test_another_slot_gives_the_same_tokens_and_another_seed_others() -> None:
    logits, positions = random_logits(1, 1000, seed=0).expand(50, -1), np.arange(50)
    sampler = make_sampler(1000, [{"seed": 1}, {"seed": 1}, {"seed": 2}])
    tokens = [sampler.sample(logits, np.full(50, slot), positions) for slot in range(3)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


# ------------------------------------------------------------------------------------------------- greedy, min_tokens


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_first_of_equal_logits(device: str) -> None:
    logits = torch.zeros(3, 5000, device=device)
    logits[1, [17, 4000]] = 1.0
    logits[2, -1] = 1.0
    sampler = make_sampler(5000, [{"temperature": 0.0}] * 3, device=device)
    assert sampler.sample(logits, np.arange(3), np.zeros(3, np.int64)).tolist() == [0, 17, 4999]


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("device", DEVICES)
def test_stop_ids_are_masked_below_min_len(temperature: float, device: str) -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 7.0, -1.0]], device=device).repeat(4, 1)
    before = logits.clone()
    fields = {"temperature": temperature, "min_len": 10}
    sampler = make_sampler(5, [fields] * 4, [[1, 3], [1], [], [1, 3]], device)
    token_ids = sampler.sample(logits, np.arange(4), np.array([9, 3, 9, 10]))
    assert token_ids.tolist() == [2, 3, 1, 1]  # the last one has reached min_len
    assert torch.equal(logits, before), "logprobs are taken of these logits later"


def test_a_slot_forgets_its_last_sequence() -> None:
    sampler = make_sampler(4, [{"temperature": 0.0, "min_len": 5}], [[2]])
    record = np.zeros(1, SLOT_INIT)
    record["min_len"], record["num_stop_ids"] = 5, 1
    sampler.apply(record, np.array([0], np.int32))
    token_ids = sampler.sample(torch.tensor([[9.0, 1.0, 8.0, 1.0]]), np.array([0]), np.array([0]))
    assert token_ids.tolist() == [2]


# ------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_those_of_the_raw_logits(device: str) -> None:
    wanted = [3, -1, 0, MAX_LOGPROBS]
    slots = [{"num_logprobs": n, "temperature": 0.3, "top_k": 2, "min_len": 99} for n in wanted]
    sampler = make_sampler(300, slots, [[0, 1, 2]] * 4, device)
    logits, token_ids = random_logits(4, 300, seed=4), torch.tensor([5, 6, 7, 8])
    ((rows, ids, values),) = sampler.logprobs(logits.to(device), np.arange(4), token_ids.to(device))
    assert rows.tolist() == [0, 2, 3]
    exact = torch.log_softmax(logits.double(), -1)
    ids, values = ids.view(3, -1).cpu(), values.view(3, -1).cpu()
    assert (ids.dtype, values.dtype, ids.shape) == (torch.int32, torch.float32, (3, 1 + MAX_LOGPROBS))
    for row, row_ids, row_values in zip(rows, ids, values, strict=True):
        n = wanted[row]
        expected = [int(token_ids[row]), *exact[row].argsort(descending=True)[:n].tolist()]
        assert row_ids.tolist() == expected + [-1] * (MAX_LOGPROBS - n)
        torch.testing.assert_close(row_values[: n + 1].double(), exact[row, expected], rtol=1e-5, atol=1e-5)


def test_logprobs_of_a_vocabulary_smaller_than_the_columns() -> None:
    sampler = make_sampler(4, [{"num_logprobs": MAX_LOGPROBS}])
    ((_, ids, _),) = sampler.logprobs(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), np.array([0]), torch.tensor([2]))
    assert ids.tolist() == [2, 1, 2, 0, 3] + [-1] * (MAX_LOGPROBS - 4)


def test_no_logprobs_wanted() -> None:
    sampler = make_sampler(4, [{}])
    parts = sampler.logprobs(torch.zeros(1, 4), np.array([0]), torch.tensor([2]))
    assert [len(column) for column in joined(parts)] == [0, 0, 0]


# ------------------------------------------------------------------------------------------------- no waiting


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [4096, 1003])
def test_nothing_waits_for_the_gpu(dtype: torch.dtype, vocab_size: int) -> None:
    slots = [{"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.9, "num_logprobs": 0}, {"num_logprobs": 5, "min_len": 99}]
    sampler = make_sampler(vocab_size, slots, [[1], [], [], [2, 3]], "cuda")
    logits = random_logits(4, vocab_size, seed=5).to("cuda", dtype)
    for mode in ("default", "error"):  # a kernel is loaded by its first call
        torch.cuda.set_sync_debug_mode(mode)
        try:
            token_ids = sampler.sample(logits, np.arange(4), np.arange(4))
            (logprobs,) = sampler.logprobs(logits, np.arange(4), token_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert token_ids[0] == logits[0].argmax()
    assert logprobs.rows.tolist() == [2, 3]

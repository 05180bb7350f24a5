"""What changes logits, against transformers' processors and float64; the CPU twin against the kernel."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from transformers import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from nanopd.messages import BIAS, MAX_BAD_WORD_TOKENS, PENALTIES, SLOT_INIT, SlotExtras
from nanopd.worker.adjustments import Adjustments
from nanopd.worker.sampler import Sampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 60


def make_extras(
    slot: int = 0,
    prompt: Sequence[int] = (1,),
    generated: Sequence[int] = (),
    penalties: tuple[float, float, float] = (0, 0, 1),
    biases: dict[int, float] | None = None,
    allowed: list[int] | None = None,
    words: Sequence[list[int]] = (),
    processors: tuple = (),
) -> SlotExtras:
    padded = [[-1] * (MAX_BAD_WORD_TOKENS - len(word)) + word for word in words]
    return SlotExtras(
        slot,
        len(prompt),
        -1,
        1,
        np.array([*prompt, *generated], np.int32),
        np.array([penalties], PENALTIES),
        np.array(list((biases or {}).items()), BIAS),
        np.array(allowed or [], np.int32),
        np.array(padded, np.int32).reshape(-1),
        np.frombuffer(pickle.dumps(processors) if processors else b"", np.uint8),
    )


def adjusted(extras: list[SlotExtras], logits: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Row i is of the slot of extras[i]."""
    adjustments = Adjustments(64, logits.shape[1], torch.device(device))
    for one in extras:
        adjustments.enter(one.slot, one)
    return adjustments.apply(logits.to(device), np.array([one.slot for one in extras])).cpu()


def random_logits(num_rows: int = 1, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def brute_force(x: np.ndarray, extras: SlotExtras) -> np.ndarray:
    """[vocab_size] float64, token by token."""
    x = x.astype(np.float64)
    presence, frequency, repetition = extras.penalties[0].item()
    tokens, out = extras.token_ids.tolist(), extras.token_ids[extras.num_prompt_tokens :].tolist()
    biases = dict(extras.biases.tolist())
    words = [[t for t in word if t >= 0] for word in extras.bad_words.reshape(-1, MAX_BAD_WORD_TOKENS).tolist()]
    for token in range(len(x)):
        x[token] += biases.get(token, 0.0)
        if len(extras.allowed_ids) and token not in extras.allowed_ids:
            x[token] = -math.inf
        if any(word[-1] == token and out[len(out) - len(word) + 1 :] == word[:-1] for word in words):
            x[token] = -math.inf
        if token in tokens:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= frequency * out.count(token) + presence * (token in out)
    return x


def assert_same(got: torch.Tensor, expected: torch.Tensor | np.ndarray) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty: float, device: str) -> None:
    prompt, generated, logits = [3, 5, 5, 9], [11, 3, 59], random_logits()
    got = adjusted([make_extras(prompt=prompt, generated=generated, penalties=(0, 0, penalty))], logits, device)
    assert_same(got, RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits.clone()))


@pytest.mark.parametrize("device", DEVICES)
def test_biases_and_what_is_allowed_are_those_of_transformers(device: str) -> None:
    logits, biases, allowed = random_logits(3), {3: 5.0, 40: -100.0, 0: 0.5}, [3, 7, 40, 59]
    extras = [
        make_extras(0, biases=biases),
        make_extras(1, allowed=allowed),
        make_extras(2, biases=biases, allowed=allowed),
    ]
    got, ids = adjusted(extras, logits, device), torch.tensor([[1]])
    biased = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})
    suppressed = SuppressTokensLogitsProcessor([token for token in range(VOCAB) if token not in allowed])
    assert_same(got[:1], biased(ids, logits[:1].clone()))
    assert_same(got[1:2], suppressed(ids, logits[1:2]))
    assert_same(got[2:], suppressed(ids, biased(ids, logits[2:].clone())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "generated", [[], [8], [7, 8], [9, 7, 8], [7, 8, 9], [7], list(range(20)), [*range(3, 18), 7, 8]]
)
def test_bad_words_are_those_of_transformers(generated: list[int], device: str) -> None:
    words, logits = [[5], [7, 8], [7, 9], [7, 8, 9], [8, 9], list(range(1, 17))], random_logits()
    # token 59 is in no word; transformers 5.17 passes over words that are longer than the whole context
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([[59, *generated]]), logits.clone())
    assert_same(adjusted([make_extras(prompt=[2], generated=generated, words=words)], logits, device), expected)


def test_the_beginning_of_a_bad_word_in_the_prompt_does_not_count() -> None:
    logits = random_logits()
    assert torch.equal(adjusted([make_extras(prompt=[7, 8], words=[[7, 8, 9], [8, 9]])], logits), logits)


def test_words_with_the_same_end_do_not_undo_each_other() -> None:
    got = adjusted([make_extras(generated=[1, 2], words=[[2, 9], [3, 9], [1, 2, 9], [4, 9]])], random_logits())
    assert torch.isinf(got[0]).nonzero().tolist() == [[9]]


# ------------------------------------------------------------------------------------------------- all together

TOKENS = st.integers(0, 15)
EXTRAS = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKENS, min_size=1, max_size=20),
        "generated": st.lists(TOKENS, max_size=30),
        "penalties": st.tuples(
            st.sampled_from([0, 0.7, -0.3]), st.sampled_from([0, 0.2]), st.sampled_from([1, 1.5, 0.8])
        ),
        "biases": st.dictionaries(TOKENS, st.floats(-5, 5), max_size=4),
        "allowed": st.lists(TOKENS, max_size=6, unique=True),
        "words": st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=5),
    }
)


@pytest.mark.parametrize("device", DEVICES)
@given(rows=st.lists(EXTRAS, min_size=1, max_size=6), vocab_size=st.sampled_from([16, 37, 64]), data=st.data())
@examples(0.6)
def test_all_at_once_as_tokens_come(rows: list[dict], vocab_size: int, data: st.DataObject, device: str) -> None:
    """Slots that are entered midway know as much as those that saw their tokens come."""
    adjustments = Adjustments(8, vocab_size, torch.device(device))
    slots = np.array(data.draw(st.permutations(range(8))))[: len(rows)]
    complete = [make_extras(int(slot), **row) for slot, row in zip(slots, rows, strict=True)]
    for one, row in zip(complete, rows, strict=True):
        adjustments.enter(one.slot, make_extras(one.slot, **{**row, "generated": row["generated"][:-3]}))
    for back in (3, 2, 1):
        for one, row in zip(complete, rows, strict=True):
            if len(row["generated"]) >= back:
                adjustments.note(np.array([one.slot]), torch.tensor([row["generated"][-back]], device=device))
    logits = random_logits(len(rows), vocab_size)
    got = adjustments.apply(logits.to(device), slots).cpu()
    for x, result, one in zip(logits.numpy(), got, complete, strict=True):
        assert_same(result, brute_force(x, one))


def test_a_slot_forgets_its_last_sequence_and_rows_are_used_again() -> None:
    adjustments, logits = Adjustments(8, VOCAB, torch.device("cpu")), random_logits()
    for length in range(1, 50):
        slot = length % 8
        extras = make_extras(slot, [length], [1] * length, (0.5, 0.1, 2), {length: 1.0}, words=[[1, 2], [3]])
        adjustments.enter(slot, extras)
        assert_same(adjustments.apply(logits, np.array([slot]))[0], brute_force(logits[0].numpy(), extras))
    assert len(adjustments._tables.counts) == 16, "rows 1 to 8 are in use"
    for slot in range(8):
        adjustments.enter(slot, None)
        assert not adjustments.concern(np.array([slot]))
        assert torch.equal(adjustments.apply(logits, np.array([slot])), logits)


# --------------------------------------------------------------------------------------- users' functions, the sampler


def favour_next(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[len(token_ids) + sum(token_ids)] += 100
    return logits


def fail_at_two(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(token_ids) == 2:
        raise ValueError("no third token")
    return logits


def make_sampler(extras: list[SlotExtras], vocab_size: int = VOCAB, device: str = "cpu", **fields: float) -> Sampler:
    sampler, records = Sampler(8, vocab_size, torch.device(device)), np.zeros(8, SLOT_INIT)
    records["slot"], records["num_logprobs"], records["top_p"] = np.arange(8), -1, 1.0
    for name, value in fields.items():
        records[name] = value
    for one in extras:
        sampler.take_extras(one)
    sampler.apply(records, np.empty(0, np.int32))
    return sampler


@pytest.mark.parametrize("device", DEVICES)
def test_users_functions_see_the_tokens_generated_so_far(device: str) -> None:
    extras = [make_extras(0, generated=[4], processors=(favour_next,)), make_extras(1, processors=(fail_at_two,))]
    sampler, drawn = make_sampler(extras, device=device), []
    logits = torch.arange(VOCAB, dtype=torch.float32).repeat(3, 1).to(device)
    for position in range(4):
        drawn.append(sampler.sample(logits, np.arange(3), np.full(3, position)).tolist())
        has_failed = position == 2
        assert ("no third token" in sampler.take_errors().tobytes().decode()) == has_failed
        if has_failed:
            sampler.apply(np.array([(0, 1, 0, 1, 0, -1, 0, 0, 0)], SLOT_INIT), np.empty(0, np.int32))
    assert drawn == [[5, 59, 59], [11, 59, 59], [23, -1, 59], [47, 59, 59]]


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_with_penalties_walks_through_the_best_tokens(device: str) -> None:
    sampler = make_sampler(
        [make_extras(0, prompt=[9], penalties=(1, 0, 100)), make_extras(1, words=[[8, 7]])], 10, device
    )
    logits = torch.arange(1, 11, dtype=torch.float32).repeat(3, 1).to(device)
    logits[1] = torch.tensor([0, 0, 0, 0, 0, 0, 6, 7, 8, 1])
    assert not sampler.is_plain_argmax(np.arange(3), np.zeros(3, np.int64))
    assert sampler.is_plain_argmax(np.array([2]), np.zeros(1, np.int64))
    drawn = [sampler.sample(logits, np.arange(3), np.full(3, i)).tolist() for i in range(3)]
    assert drawn == [[8, 8, 9], [7, 8, 9], [6, 8, 9]]


# ----------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [151936, 50257])
def test_the_kernel_gives_the_bits_of_its_twin(dtype: torch.dtype, vocab_size: int) -> None:
    rng, extras = np.random.default_rng(0), []
    for slot in range(40):
        prompt, generated = (rng.integers(0, vocab_size, n).tolist() for n in (500, 300))
        biases = {int(t): float(rng.normal()) for t in rng.integers(0, vocab_size, slot % 3 * 50)}
        penalties = (*rng.choice([0.0, 0.3, 1.1, 2.0], 2), rng.choice([1.0, 1.2, 0.7]))
        words = [[3], [4, 5]] if slot % 3 else []
        extras.append(make_extras(slot, prompt, generated + generated[:50], penalties, biases, words=words))
    logits = random_logits(40, vocab_size).to(dtype)
    for some in (extras, extras[::3]):  # with biases; and those without
        assert torch.equal(adjusted(some, logits[: len(some)], "cuda"), adjusted(some, logits[: len(some)]))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    words = [[8, 7], [5], [7, 8, 9]]
    extras = [make_extras(slot, [1, 2], [3], (0.5, 0.1, 1.1), {4: 2.0}, list(range(9)), words) for slot in range(4)]
    logits = random_logits(6).cuda()
    for mode in ("default", "error"):  # kernels are loaded by their first calls
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sampler = make_sampler(extras, device="cuda", temperature=0.8, top_p=0.9, min_p=0.01, num_logprobs=5)
            for position in range(3):
                tokens = sampler.sample(logits, np.arange(6), np.full(6, position))
                sampler.logprobs(logits, np.arange(6), tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")

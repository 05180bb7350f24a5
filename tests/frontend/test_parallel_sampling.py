"""Several answers to one prompt and beam search through the library's face, on all routes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_zoo import load_hf
from tiny_chat_model import EOS, make_tiny_chat_model

from nanopd import LLM, AsyncLLM, BeamSearchParams, RequestError, Route, SamplingParams
from nanopd.frontend.handle import RequestHandle
from nanopd.messages import FinishReason

pytestmark = pytest.mark.process

WAIT_S = 30.0
ROUTES = [Route(p, d) for p in (0, 1) for d in (0, 1)]
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)
FOUR = dataclasses.replace(SEEDED, n=4)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPT = "a prompt of more than one block of the cache"
each_route = pytest.mark.parametrize("route", ROUTES, ids=str)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def async_llm(model: Path) -> Iterator[AsyncLLM]:
    workers = [{"device": "cpu", "role": "mixed"}] * 2
    llm = AsyncLLM(str(model), workers=workers, policy="round_robin", num_blocks=200, max_num_seqs=8)
    with llm.llm:
        yield llm


@pytest.fixture
def llm(async_llm: AsyncLLM) -> Iterator[LLM]:
    """Whatever a test does, no block is in use after it."""
    llm = async_llm.llm
    llm.stats(reset=True)
    yield llm
    end = time.monotonic() + WAIT_S
    while any(blocks.used for blocks in llm.stats().blocks):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(async_llm: AsyncLLM) -> list[list[int]]:
    """Answers of single requests with the seeds from 7 on."""
    params = [dataclasses.replace(SEEDED, seed=7 + i) for i in range(8)]
    outputs = async_llm.llm.generate([PROMPT] * 8, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@each_route
def test_answers_are_those_of_single_requests(llm: LLM, alone: list[list[int]], route: Route) -> None:
    output = llm.submit(PROMPT, FOUR, route=route).result(WAIT_S)
    assert [completion.token_ids for completion in output.outputs] == alone[:4]
    assert len(set(map(tuple, alone))) == 8
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    texts = [llm.tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in alone[:4]]
    assert [completion.text for completion in output.outputs] == texts
    assert (output.route, output.error) == (route, None)
    assert len(llm.stats().logs) == 4


def test_several_prompts_with_more_answers_than_places(llm: LLM, alone: list[list[int]]) -> None:
    params = dataclasses.replace(SEEDED, n=8)
    for output in llm.generate([PROMPT] * 5, params, use_tqdm=False):
        assert [completion.token_ids for completion in output.outputs] == alone


@each_route
def test_streams_tell_answers_apart(llm: LLM, alone: list[list[int]], route: Route) -> None:
    tokens: list[list[int]] = [[] for _ in range(4)]
    handle = llm.submit(PROMPT, FOUR, route=route, stream=True)
    *deltas, last = handle
    for delta in (*deltas, last):
        tokens[delta.index] += delta.token_ids
    assert tokens == alone[:4]
    assert [delta.finished for delta in deltas] == [False] * len(deltas)
    assert last.finished and handle.done()
    assert sum(delta.finish_reason == "length" for delta in (*deltas, last)) == 4


@pytest.mark.parametrize("stream", [True, False])
def test_awaiting_all_answers(async_llm: AsyncLLM, llm: LLM, alone: list[list[int]], stream: bool) -> None:
    async def run() -> None:
        output = await async_llm.generate(PROMPT, FOUR, stream=stream)
        assert [completion.token_ids for completion in output.outputs] == alone[:4]
        deltas = [delta async for delta in async_llm.generate(PROMPT, FOUR)]
        assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2, 3]

    asyncio.run(run())


@pytest.mark.parametrize("logprobs", [None, 2])
def test_best_of(llm: LLM, alone: list[list[int]], logprobs: int | None) -> None:
    """The likeliest of eight, by the log probabilities of single requests."""
    params = [dataclasses.replace(SEEDED, seed=7 + i, logprobs=0) for i in range(8)]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * 8, params, use_tqdm=False)]
    sums = [sum(next(iter(row.values())) for row in output.logprobs) for output in outputs]
    assert [output.cumulative_logprob for output in outputs] == pytest.approx(sums)
    best = sorted(range(8), key=lambda i: -sums[i])[:3]
    params = dataclasses.replace(SEEDED, n=3, best_of=8, logprobs=logprobs)
    found = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs
    assert [completion.token_ids for completion in found] == [alone[i] for i in best]
    assert [completion.cumulative_logprob for completion in found] == pytest.approx([sums[i] for i in best], abs=1e-4)
    assert [completion.index for completion in found] == [0, 1, 2]
    assert all((completion.logprobs is None) == (logprobs is None) for completion in found)
    with pytest.raises(RequestError, match="best_of=8 .* for a stream"):
        llm.submit(PROMPT, params, stream=True)


def test_abort_ends_all_answers(llm: LLM) -> None:
    handles = [llm.submit(PROMPT, dataclasses.replace(LONG, n=n), request_id="all") for n in [3]]
    while llm.stats().num_running < 3:
        time.sleep(0.001)
    with pytest.raises(RequestError, match="request_id='all'"):
        llm.submit(PROMPT, LONG, request_id="all")
    llm.abort("all")
    reasons = [completion.finish_reason for completion in handles[0].result(WAIT_S).outputs]
    assert reasons == ["abort"] * 3
    assert llm.submit(PROMPT, SEEDED, request_id="all").result(WAIT_S).error is None


def test_queue_timeout_and_priority(llm: LLM) -> None:
    running = [llm.submit(PROMPT, LONG, route=Route(0, 0)) for _ in range(8)]
    late = llm.submit(PROMPT, FOUR, route=Route(0, 0), queue_timeout_s=0.001)
    last, first = (llm.submit(PROMPT, LONG, route=Route(0, 0), priority=p) for p in (1, -1))
    output = late.result(WAIT_S)
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 4
    assert "queue_timeout_s" in output.error
    ends = [handle.result(WAIT_S).metrics.finished_s for handle in (first, last)]
    assert ends[0] < ends[1]
    assert {handle.result(WAIT_S).outputs[0].finish_reason for handle in running} == {"length"}


# --------------------------------------------------------------------------------------------------------- beam search


def test_beam_search(llm: LLM, model: Path) -> None:
    """Every route in turn."""
    hf, prompts = load_hf(model), [f"{PROMPT} {number}" for number in range(4)]
    outputs = llm.beam_search(prompts, BeamSearchParams(num_beams=3, max_tokens=12), use_tqdm=False)
    assert {output.route for output in outputs} == set(ROUTES)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        args = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "do_sample": False}
        found = hf.generate(
            ids, **args, eos_token_id=EOS, pad_token_id=EOS, return_dict_in_generate=True, output_scores=True
        )
        answers = [row[len(ids[0]) :] for row in found.sequences.tolist()]
        texts = [llm.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        assert [completion.text for completion in output.outputs] == texts
        scores = found.sequences_scores.tolist()
        assert [completion.score for completion in output.outputs] == pytest.approx(scores, abs=1e-4)
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        assert (output.prompt, output.prompt_token_ids) == (prompt, ids[0].tolist())
        assert 0 < output.metrics.ttft_ms <= output.metrics.e2e_ms
    assert len(llm.stats().logs) == 4


def test_a_beam_search_that_is_aborted_or_impossible(llm: LLM) -> None:
    params = BeamSearchParams(num_beams=2, max_tokens=400, ignore_eos=True)
    sampling = SamplingParams(temperature=0, max_tokens=400, logprobs=4, ignore_eos=True)
    handle = RequestHandle(llm._request(PROMPT, sampling, beams=params), llm._output, llm.abort)
    llm._thread.submit_all([handle])
    while llm.stats().num_running < 2:
        time.sleep(0.001)
    handle.abort()
    output = handle.result(WAIT_S)
    assert {completion.finish_reason for completion in output.outputs} == {"abort"}
    [log] = llm.stats().logs
    assert log.finish_reason is FinishReason.ABORT
    with pytest.raises(RequestError, match="max_tokens"):
        llm.beam_search([PROMPT, list(range(200))], BeamSearchParams(max_tokens=400))

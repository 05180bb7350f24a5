"""The asynchronous face against the synchronous one: the same tokens, on any loop; who stops waiting aborts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_chat_model import make_tiny_chat_model

from nanopd import AsyncLLM, NanopdError, RequestError, SamplingParams
from nanopd.messages import FinishReason

pytestmark = pytest.mark.process

WAIT_S = 30.0
PARAMS = SamplingParams(temperature=1, seed=3, max_tokens=30, ignore_eos=True, logprobs=1)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module_llm(model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(model), num_blocks=300, max_num_seqs=16)
    with llm.llm:
        yield llm


@pytest.fixture
def llm(module_llm: AsyncLLM) -> Iterator[AsyncLLM]:
    """Whatever a test does, no block is in use after it."""
    module_llm.llm.stats(reset=True)
    yield module_llm
    end = time.monotonic() + 2.0
    while module_llm.llm.stats().blocks[0].used:
        assert time.monotonic() < end
        time.sleep(0.01)


def finish_reasons(llm: AsyncLLM, count: int) -> list[FinishReason | None]:
    """Of all requests, once as many have ended."""
    end = time.monotonic() + WAIT_S
    while len(logs := llm.llm.stats().logs) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return [log.finish_reason for log in logs]


def test_increments_and_result(llm: AsyncLLM) -> None:
    [expected] = llm.llm.generate("Hello", PARAMS, use_tqdm=False)

    async def run() -> None:
        request = llm.generate("Hello", PARAMS)
        deltas = [delta async for delta in request]
        assert "".join(delta.text for delta in deltas) == expected.outputs[0].text
        assert [token for delta in deltas for token in delta.token_ids] == expected.outputs[0].token_ids
        assert [row for delta in deltas for row in delta.logprobs] == expected.outputs[0].logprobs
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert (await request).outputs == expected.outputs
        assert [delta async for delta in request] == []
        outputs = await asyncio.gather(*(llm.generate("Hello", PARAMS, stream=bool(n % 2)) for n in range(4)))
        assert [output.outputs for output in outputs] == [expected.outputs] * 4

    asyncio.run(run())


def test_loops_in_several_threads(llm: AsyncLLM) -> None:
    [expected] = llm.llm.generate("Hello", PARAMS, use_tqdm=False)

    async def text() -> str:
        return "".join([delta.text async for delta in llm.generate("Hello", PARAMS)])

    async def texts() -> list[str]:
        return await asyncio.gather(*(text() for _ in range(3)))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: asyncio.run(texts()), range(6)))
    assert found == [[expected.outputs[0].text] * 3] * 6


def test_cancelling_who_awaits_aborts(llm: AsyncLLM) -> None:
    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.generate("Hello", LONG, stream=False), 0.05)

    asyncio.run(run())
    assert finish_reasons(llm, 1) == [FinishReason.ABORT]


def test_cancelling_who_iterates_aborts(llm: AsyncLLM) -> None:
    async def read() -> None:
        async for _ in llm.generate("Hello", LONG):
            started.set()

    started = asyncio.Event()

    async def run() -> None:
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert finish_reasons(llm, 1) == [FinishReason.ABORT]


def test_leaving_the_iteration_aborts(llm: AsyncLLM) -> None:
    async def run() -> None:
        async for _ in llm.generate("Hello", LONG):
            break
        request = llm.generate("Hello", LONG)
        request.abort()
        assert (await request).outputs[0].finish_reason == "abort"

    asyncio.run(run())
    assert finish_reasons(llm, 2) == [FinishReason.ABORT] * 2


def test_a_loop_that_ends_harms_nobody(llm: AsyncLLM) -> None:
    async def run() -> None:
        llm.generate("Hello", LONG)

    asyncio.run(run())
    assert finish_reasons(llm, 1) == [FinishReason.LENGTH]


def test_bad_requests(llm: AsyncLLM) -> None:
    async def run() -> None:
        with pytest.raises(RequestError, match="at least one token"):
            llm.generate([])
        with pytest.raises(RequestError, match="deadline_s"):
            llm.generate("Hello", deadline_s=-1)

    asyncio.run(run())
    assert llm.llm.stats().logs == []


def test_shutdown_answers_who_waits(model: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(str(model), num_blocks=40) as llm:
            waiting = asyncio.ensure_future(llm.generate("Hello", LONG))
            streamed = llm.generate("Hello", LONG)
            assert (await llm.stats()).num_restarts == [0]
        with pytest.raises(NanopdError, match="shut down"):
            await waiting
        deltas = [delta async for delta in streamed]
        assert (deltas[-1].finish_reason, deltas[-1].error) == ("error", "the engine was shut down")
        with pytest.raises(NanopdError, match="shut down"):
            llm.generate("Hello")

    asyncio.run(run())

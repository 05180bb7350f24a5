"""`AsyncLLM`: nanopd for programs that run an event loop.

A thin layer over `LLM`, whose engine has a thread of its own. Increments cross from that thread to the loop of the
caller by `call_soon_threadsafe`, with one wake-up for all that have come meanwhile. Any loop, in any thread, may
submit. Cancelling the task that waits for a request aborts the request. Knows neither engine nor workers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from functools import partial
from typing import Any

from nanopd.frontend.llm import LLM, Prompt
from nanopd.frontend.outputs import EngineStats, RequestOutput, RequestOutputDelta
from nanopd.request import SamplingParams


class AsyncRequest:
    """A submitted request: `async for` gives its increments, each of them once; `await` gives its result.

    The result is that of `RequestHandle.result`. The request is aborted when the task that waits is cancelled, or when
    the iteration is left before its end.
    """

    def __init__(self, submit: Callable, mailbox: _Mailbox) -> None:
        self._deltas: asyncio.Queue[RequestOutputDelta] = asyncio.Queue()
        self._ended = asyncio.Event()
        self._is_exhausted = False
        self._handle = submit(on_delta=partial(mailbox.put, self._take))
        self.request_id: str = self._handle.request_id

    def abort(self) -> None:
        """End the request with the tokens that it has; does nothing once it has ended."""
        if not self._handle.done():
            self._handle.abort()

    async def __aiter__(self) -> AsyncIterator[RequestOutputDelta]:
        try:
            while not self._is_exhausted:
                delta = await self._deltas.get()
                self._is_exhausted = delta.finished
                yield delta
        finally:
            self.abort()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._result().__await__()

    async def _result(self) -> RequestOutput:
        try:
            await self._ended.wait()
        finally:
            self.abort()
        return self._handle.result()

    def _take(self, delta: RequestOutputDelta) -> None:
        self._deltas.put_nowait(delta)
        if delta.finished:
            self._ended.set()


class AsyncLLM:
    """An `LLM` for event loops; made with the arguments of `LLM`, and blocks while the model loads.

    Attributes:
        llm: the `LLM` itself
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self.llm = LLM(model, **settings)
        self._mailbox: _Mailbox | None = None  # to the loop that submitted last

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, stream: bool = True, **submit_args: Any
    ) -> AsyncRequest:
        """Queue one request and return at once; to be called in a running event loop.

        Args:
            stream: give increments as they come. With False, which costs less, only the last one is given, for callers
                that await the result.
            submit_args: other arguments of `LLM.submit`.

        Raises:
            RequestError: the request can never be served.
        """
        loop, mailbox = asyncio.get_running_loop(), self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = _Mailbox(loop)
        return AsyncRequest(partial(self.llm.submit, prompt, sampling_params, stream=stream, **submit_args), mailbox)

    async def stats(self, reset: bool = False) -> EngineStats:
        """What `LLM.stats` returns."""
        return await asyncio.to_thread(self.llm.stats, reset)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.llm.shutdown)


class _Mailbox:
    """Carries increments from the engine's thread to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[Callable[[RequestOutputDelta], None], RequestOutputDelta]] = deque()
        self._is_due = False  # whether a wake-up is under way, which will find what is added meanwhile

    def put(self, take: Callable[[RequestOutputDelta], None], delta: RequestOutputDelta) -> None:
        self._items.append((take, delta))
        if not self._is_due:
            self._is_due = True
            try:
                self.loop.call_soon_threadsafe(self._empty)
            except RuntimeError:
                pass  # the loop is closed, so that no task waits any more

    def _empty(self) -> None:
        self._is_due = False
        while self._items:
            take, delta = self._items.popleft()
            take(delta)

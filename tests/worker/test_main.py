"""The loop of a worker: what is answered in which order, and news of peers at any time."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from nanopd.ipc.channel import Endpoint, channel
from nanopd.messages import Peer, Peers, Shutdown, StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.wire import decode, encode, sections
from nanopd.worker.main import _Server
from nanopd.worker.pending import Pending

NONE = np.empty(0, np.int32)
WAIT_S = 20.0


class Task:
    """Done when the test says so."""

    def __init__(self, result: StepResult | TransferAck | None) -> None:
        self.may_end = threading.Event()
        self._result = result

    def is_done(self) -> bool:
        return self.may_end.is_set()

    def result(self) -> StepResult | TransferAck | None:
        return self._result


class FakeWorker:
    """This is worker 1. A plan without blocks is the source's half of one, and has no result."""

    def __init__(self) -> None:
        self.generations: dict[int, int | None] = {}
        self.tasks: dict[tuple[str, int], Task] = {}
        self.num_layers: dict[int, int] = {}  # of a step's launch, those to come; by step id

    def call_between_layers(self, function: Callable[[], object]) -> None:
        self._between_layers = function

    def connect(self, worker: int, peer: Peer | None) -> None:
        self.generations[worker] = None if peer is None else peer.generation

    def knows(self, plan: TransferPlan) -> bool:
        return (self.generations.get(plan.src_worker) or 0) >= plan.src_generation

    def launch(self, message: StepBatch | TransferPlan) -> Pending:
        if isinstance(message, StepBatch):
            key, result = ("step", message.step_id), StepResult(message.step_id, 0, NONE, NONE, NONE, NONE.astype("f4"))
            while self.num_layers.get(message.step_id):
                self._between_layers()
        else:
            result = TransferAck(message.plan_id, 0, 1) if len(message.src_blocks) else None
            key = ("plan", message.plan_id)
        self.tasks[key] = Task(result)
        return self.tasks[key]


class Parent:
    def __init__(self, worker: FakeWorker, endpoint: Endpoint, control: multiprocessing.connection.Connection) -> None:
        self.worker, self._endpoint, self.control = worker, endpoint, control

    def send(self, message: StepBatch | TransferPlan) -> None:
        self._endpoint.send(encode(message))

    def end(self, kind: str, number: int) -> None:
        wait_until(lambda: (kind, number) in self.worker.tasks)
        self.worker.tasks[kind, number].may_end.set()

    def receive(self) -> tuple[str, int]:
        received: list[bytes] = []
        wait_until(lambda: (data := self._endpoint.receive()) is not None and not received.append(data))
        message = decode(received[0])
        return ("step", message.step_id) if isinstance(message, StepResult) else ("plan", message.plan_id)


def wait_until(condition) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@contextmanager
def running(poll_interval_s: float) -> Iterator[Parent]:
    worker = FakeWorker()
    here, there = channel(4096, 8)
    control, their_control = multiprocessing.Pipe()
    thread = threading.Thread(target=_Server(worker, there, their_control, poll_interval_s, 0.0).run)
    thread.start()
    try:
        yield Parent(worker, here, control)
    finally:
        control.send(Shutdown())
        thread.join(WAIT_S)
    assert not thread.is_alive()


def step(number: int) -> StepBatch:
    return StepBatch(number, *(np.empty(0, dtype) for dtype in sections(StepBatch).values()))


def plan(number: int, src: int, generation: int = 0, num_blocks: int = 1) -> TransferPlan:
    blocks = np.ones(num_blocks, np.int32)
    return TransferPlan(number, src, generation, 1, 0, blocks, blocks)


def test_steps_in_order_and_plans_beside_them() -> None:
    with running(0.0) as parent:
        for message in (step(1), plan(1, src=0), step(2), plan(2, src=2), plan(3, src=0)):
            parent.send(message)
        parent.end("step", 2)
        parent.end("plan", 3)
        parent.end("plan", 2)  # of another pair: not held up by a step, nor by plans 1 and 3
        assert parent.receive() == ("plan", 2)
        parent.end("plan", 1)
        assert [parent.receive() for _ in range(2)] == [("plan", 1), ("plan", 3)]
        parent.end("step", 1)
        assert [parent.receive() for _ in range(2)] == [("step", 1), ("step", 2)]


def test_what_is_done_while_a_step_is_launched_is_told() -> None:
    with running(0.0) as parent:
        parent.worker.num_layers[2] = 1
        parent.send(step(1))
        parent.send(step(2))
        parent.end("step", 1)
        assert parent.receive() == ("step", 1)
        assert ("step", 2) not in parent.worker.tasks
        parent.worker.num_layers[2] = 0
        parent.end("step", 2)
        assert parent.receive() == ("step", 2)


def test_a_half_without_result() -> None:
    with running(0.001) as parent:
        parent.send(plan(1, src=0, num_blocks=0))
        parent.send(plan(2, src=0))
        parent.end("plan", 2)
        parent.end("plan", 1)
        assert parent.receive() == ("plan", 2)


def test_news_of_peers() -> None:
    """Heard while a step is under way; a plan of a generation to come waits for them, as they were sent before it."""
    with running(0.0) as parent:
        parent.send(step(1))
        parent.control.send(Peers({0: None, 2: Peer(1, 10)}))
        wait_until(lambda: parent.worker.generations == {0: None, 2: 1})
        parent.control.send(Peers({0: Peer(5, 10)}))
        parent.send(plan(1, src=0, generation=5))
        parent.end("plan", 1)
        assert parent.receive() == ("plan", 1)
        assert parent.worker.generations[0] == 5
        parent.end("step", 1)
        assert parent.receive() == ("step", 1)

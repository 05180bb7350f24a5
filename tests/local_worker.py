"""Workers in the test's own process: everything but the processes and the rings (messages do go through the codec)."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from nanopd.checkpoints.model_files import read_model_config
from nanopd.config import EngineConfig, ModelConfig, WorkerSpec
from nanopd.engine.engine import Engine
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Peer, SlotExtras, StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.wire import decode, encode
from nanopd.worker.worker import Worker


class LocalWorker:
    """A WorkerClient that executes one message per `poll`, so that results come as late as they may."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.num_blocks, self.num_host_blocks = worker.num_blocks, worker.num_host_blocks
        self.paths = worker.paths
        self.num_swapped = 0  # blocks that came back
        self._inbox: deque[SlotExtras | StepBatch | TransferPlan] = deque()

    def send(self, message: SlotExtras | StepBatch | TransferPlan) -> None:
        self._inbox.append(_through_the_codec(message))
        if isinstance(message, StepBatch):
            self.num_swapped += int((message.copies["src"] < 0).sum())

    def poll(self) -> list[StepResult | TransferAck]:
        if not self._inbox:
            return []
        launched = self.worker.launch(self._inbox.popleft())
        while not launched.is_done():
            pass
        result = launched.result()
        return [] if result is None else [_through_the_codec(result)]


def _through_the_codec(message):
    return decode(encode(message))


def local_engine(config: EngineConfig, path: Path, model: ModelConfig | None = None, **engine_args) -> Engine:
    """An engine with its workers in this process."""
    model = model or read_model_config(path, config.dtype, True)
    config = config.replace(max_model_len=config.max_model_len or model.max_position_embeddings)
    memories = Memories.of(len(config.workers), with_relays=False)
    workers = [Worker.load(WorkerSpec(i, config, model, path), memories) for i in range(len(config.workers))]
    for worker in workers:
        for peer, other in enumerate(workers):
            worker.connect(peer, Peer(0, other.num_blocks))
    return Engine(config, model, [LocalWorker(w) for w in workers], time.monotonic, **engine_args)


def run_to_end(engine: Engine) -> None:
    """Step until nothing is left, then check that nothing was lost."""
    engine.drain(lambda: None)
    engine.check_integrity()
    for scheduler in engine.schedulers:
        for blocks in (scheduler.residency.blocks, scheduler.residency.host_blocks):
            assert blocks.num_free == blocks.num_usable

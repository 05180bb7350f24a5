"""A worker without a model: its KV cache holds token ids, and the next token is a hash of what it reads there.

A block that is shared too long, freed too early, copied wrongly or moved too soon shows as a wrong token. Steps and
transfers are carried out in any order that the real worker allows: steps in turn, plans whenever they like. Workers
die, hang and come back with an empty cache.
"""

from __future__ import annotations

import zlib
from collections import deque
from random import Random

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.errors import WorkerError
from nanopd.messages import MAX_LOGPROBS, RowFlag, StepBatch, StepResult, TransferAck, TransferPath, TransferPlan

VOCAB_SIZE = 64
EOS = 7
POISON = VOCAB_SIZE - 1  # in a prompt: kills the worker that computes it, if that minds


def model_config(max_len: int = 512) -> ModelConfig:
    return ModelConfig("llama", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, max_len, 1e-5, 1e4, eos_token_ids=(EOS,))


def next_token(context: np.ndarray) -> int:
    """The model: context [num_tokens] -> token id."""
    return zlib.crc32(np.ascontiguousarray(context, np.int64).tobytes()) % VOCAB_SIZE


def logprobs_of(context: np.ndarray) -> dict[int, float]:
    """The model's likeliest next tokens, for beam search: context [num_tokens] -> MAX_LOGPROBS of them."""
    first = next_token(context)
    return {(first + 3 * i) % VOCAB_SIZE: -0.1 * i - (first * i % 7) / 10 for i in range(1, 1 + MAX_LOGPROBS)}


def generate(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = (EOS,)) -> list[int]:
    """What any correct engine answers."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(np.array(tokens)))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class SymbolicWorker:
    """A WorkerClient. `rng` decides how much gets done in a poll, and in which order; None: everything at once."""

    def __init__(self, config: EngineConfig, num_blocks: int, rng: Random | None, max_len: int = 512) -> None:
        self.num_blocks = num_blocks
        self.paths: dict[int, TransferPath] = {}
        self.generation = 0
        self.block_size = config.block_size
        self.num_host_blocks = config.num_host_blocks(model_config())  # block -i is host block i
        self.kv = np.full((num_blocks + self.num_host_blocks, config.block_size), -1, np.int64)
        self.tables = np.zeros((config.num_slots, -(-max_len // config.block_size)), np.int64)
        self.last_tokens = np.full(config.num_slots, -1, np.int64)
        self.num_logprobs = np.full(config.num_slots, -1, np.int64)
        self.peers: list[SymbolicWorker] = []
        self.num_swapped = 0  # blocks that came back
        self.is_dead = False
        self.is_buried = False  # the others have been told of its death
        self.is_hung = False
        self.minds_poison = False
        self._rng = rng
        self._steps: deque[StepBatch] = deque()
        self._plans: list[TransferPlan] = []

    def send(self, message: StepBatch | TransferPlan) -> None:
        (self._steps if isinstance(message, StepBatch) else self._plans).append(message)

    def poll(self) -> list[StepResult | TransferAck]:
        if self.is_dead:
            raise WorkerError(0, "killed by the test")
        results: list[StepResult | TransferAck] = []
        if self.is_hung:
            return results
        while (self._steps or self._plans) and (self._rng is None or self._rng.random() < 0.6):
            if self._plans and (not self._steps or (self._rng is not None and self._rng.random() < 0.5)):
                index = self._rng.randrange(len(self._plans)) if self._rng is not None else 0
                results.append(self._move(self._plans.pop(index)))
            else:
                results.append(self._step(self._steps.popleft()))
        return results

    def _move(self, plan: TransferPlan) -> TransferAck:
        assert plan.dst_generation == self.generation
        source = self.peers[plan.src_worker]
        if source.is_buried or source.generation != plan.src_generation:
            self.kv[plan.dst_blocks] = -1  # at worst
            return TransferAck(plan.plan_id, 1, 0)
        self.kv[plan.dst_blocks] = source.kv[plan.src_blocks]
        return TransferAck(plan.plan_id, 1, 1)

    def _step(self, batch: StepBatch) -> StepResult:
        if self.minds_poison and POISON in batch.token_ids:
            self.is_dead = True
            raise WorkerError(0, "was poisoned by the test")
        updates = batch.table_updates
        for init in batch.slot_inits:
            slot = init["slot"]
            self.tables[slot], self.last_tokens[slot], self.num_logprobs[slot] = 0, -1, init["num_logprobs"]
        self.tables[updates["slot"], updates["index"]] = updates["block_id"]
        is_out, is_in = batch.copies["dst"] < 0, batch.copies["src"] < 0
        for chosen in (~is_out & ~is_in, is_out, is_in):
            self.kv[batch.copies["dst"][chosen]] = self.kv[batch.copies["src"][chosen]]
        self.num_swapped += np.count_nonzero(is_in)
        sampled, taken = [], 0
        for slot, start, length, flags in zip(
            batch.row_slots, batch.row_starts, batch.row_lens, batch.row_flags, strict=True
        ):
            if flags & RowFlag.FROM_SLOT:
                tokens = self.last_tokens[slot : slot + 1]
            else:
                tokens, taken = batch.token_ids[taken : taken + length], taken + length
            positions = np.arange(start, start + length)
            blocks = self.tables[slot, positions // self.block_size]
            assert (blocks > 0).all(), "writes to the null block"
            self.kv[blocks, positions % self.block_size] = tokens
            if flags & RowFlag.SAMPLE:
                first = 1 if flags & RowFlag.DRAFTS else length
                sampled += [(slot, start + i) for i in range(first, length + 1)]
        tokens, rows, ids, values = [], [], [], []
        for slot, num_tokens in sampled:  # after all writes, as in a real forward pass
            positions = np.arange(num_tokens)
            context = self.kv[self.tables[slot, positions // self.block_size], positions % self.block_size]
            self.last_tokens[slot] = next_token(context)
            if self.num_logprobs[slot] >= 0:
                best = logprobs_of(context)
                rows.append(len(tokens))
                ids += [-1, *best]  # what is sampled is not among them
                values += [-np.inf, *best.values()]
            tokens.append(self.last_tokens[slot])
        logprobs = np.array(rows, np.int32), np.array(ids, np.int32), np.array(values, np.float32)
        return StepResult(batch.step_id, 1, np.array(tokens, np.int32), *logprobs)


def symbolic_workers(
    config: EngineConfig, num_blocks: list[int], rng: Random | None, max_len: int = 512
) -> list[SymbolicWorker]:
    workers = [SymbolicWorker(config, n, rng, max_len) for n in num_blocks]
    for worker in workers:
        worker.peers = workers
    return workers

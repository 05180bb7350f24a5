"""What a step costs the parent: schedule, encode, decode the results, append tokens, make text if streaming.

The real engine drives workers that answer at once, through real rings in one process; the time that the answering
takes is measured and left out. All sequences decode: prompts are one token long and answers do not end. Figures are
microseconds of parent time per step of one worker (all of its sequences), the median over `--steps` engine steps.

Last, what the prefix cache adds when a prompt is admitted: making the keys of its blocks, and finding all of them.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product

import numpy as np

from bench.lib.report import Row, arguments, emit, seconds_of
from nanopd.checkpoints.demo_model import NAME as DEMO_MODEL
from nanopd.checkpoints.model_files import load_tokenizer, resolve
from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.block_manager import BlockManager, extend_keys
from nanopd.engine.engine import Engine
from nanopd.frontend.detokenizer import StoppableText, TokenPieces
from nanopd.ipc.channel import channel
from nanopd.messages import RowFlag, StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.request import Request, SamplingParams
from nanopd.wire import decode, encode

MAX_LEN = 4096
RING_NBYTES = 1 << 20
BARS_US = {(256, False): 100, (256, True): 400}  # per step of 256 decoding sequences, by streaming
PREFIX_LEN = 8192
PREFIX_BARS_US = {16: 600, 64: 350}  # by block size: keys and finding


class InstantWorker:
    """Answers each step when it is sent, with tokens drawn from `token_ids`; counts the time that this takes."""

    def __init__(self, num_blocks: int, token_ids: list[int], seed: int) -> None:
        self.num_blocks, self.num_host_blocks = num_blocks, 1
        self.answering_s = 0.0
        self._parent, self._worker = channel(RING_NBYTES, 4)
        self._rng, self._token_ids = np.random.default_rng(seed), np.array(token_ids, np.int32)

    def send(self, message: StepBatch | TransferPlan) -> None:
        self._parent.send(encode(message))
        self.answering_s += seconds_of(self._answer)

    def poll(self) -> list[StepResult | TransferAck]:
        results = []
        while (message := self._parent.receive()) is not None:
            results.append(decode(message))
        return results

    def _answer(self) -> None:
        message = self._worker.receive()
        assert message is not None
        batch = decode(message)
        assert isinstance(batch, StepBatch)
        none = np.empty(0, np.int32)
        num_sampled = np.count_nonzero(batch.row_flags & RowFlag.SAMPLE)
        tokens = self._rng.choice(self._token_ids, num_sampled)
        result = StepResult(batch.step_id, 1, tokens, none, none, np.empty(0, np.float32))
        self._worker.send(encode(result))


def measure(num_seqs: int, num_workers: int, streaming: bool, num_steps: int) -> Row:
    tokenizer = load_tokenizer(resolve(DEMO_MODEL, load_format="auto"))
    model = ModelConfig("llama", len(tokenizer), 8, 8, 1, 1, 1, 8, MAX_LEN, 1e-5, 1e4)
    workers_of = [{"device": "cpu"}] * num_workers
    config = EngineConfig(model="none", workers=workers_of, max_num_seqs=num_seqs, max_model_len=MAX_LEN)
    num_blocks = num_seqs * (MAX_LEN // config.block_size) + 1
    words = tokenizer.encode(__doc__)  # English: a token of it is whole characters, as nearly always in a real stream
    workers = [InstantWorker(num_blocks, words, w) for w in range(num_workers)]
    make_text = partial(StoppableText, TokenPieces(tokenizer))
    engine = Engine(config, model, list(workers), time.monotonic, make_text)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for number in range(num_seqs * num_workers):
        # spread over the block, so that in each step one sequence in block_size needs a block
        prompt = [1] * (1 + number % config.block_size)
        engine.submit(Request(str(number), prompt, params, time.monotonic(), is_streamed=streaming))
    for _ in range(20):
        engine.step()
    times_us = [_timed_step(engine, workers) for _ in range(num_steps)]
    p50, p99 = np.percentile(np.array(times_us) / num_workers, [50, 99]) / config.steps_in_flight
    row = {"num_seqs": num_seqs, "num_workers": num_workers, "streaming": streaming, "step_us": round(p50, 1)}
    bar = BARS_US.get((num_seqs, streaming), "")
    return {**row, "p99_us": round(p99, 1), "bar_us": bar, "us_per_seq": round(p50 / num_seqs, 2)}


def _timed_step(engine: Engine, workers: list[InstantWorker]) -> float:
    answering_s = sum(worker.answering_s for worker in workers)
    elapsed_s = seconds_of(engine.step)
    return 1e6 * (elapsed_s - (sum(worker.answering_s for worker in workers) - answering_s))


def measure_prefix(block_size: int, num_repeats: int) -> Row:
    tokens = np.random.default_rng(0).integers(0, 150_000, PREFIX_LEN).tolist()
    manager = BlockManager(PREFIX_LEN // block_size + 1, block_size)
    table = manager.allocate(manager.num_usable)
    times_us = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        keys: list[bytes] = []
        extend_keys(keys, tokens, block_size, b"")
        hashed = time.perf_counter()
        found = manager.find(keys)
        times_us.append((1e6 * (hashed - start), 1e6 * (time.perf_counter() - hashed)))
        if not found:
            manager.publish(table, keys)
    hash_us, find_us = np.median(times_us, axis=0).round(1)
    row = {"prompt_len": PREFIX_LEN, "block_size": block_size, "hash_us": hash_us, "find_us": find_us}
    return {**row, "bar_us": PREFIX_BARS_US[block_size]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--num-workers", type=int, nargs="+", default=[1, 2, 8])
    args = parser.parse_args()
    cases = product((False, True), args.num_workers, args.num_seqs)
    rows = [measure(num_seqs, num_workers, streaming, args.steps) for streaming, num_workers, num_seqs in cases]
    rows += [measure_prefix(block_size, args.steps) for block_size in PREFIX_BARS_US]
    columns = list(dict.fromkeys([*rows[0], *rows[-1]]))
    emit("scheduler", {"steps": args.steps}, rows, columns, path=args.json)


if __name__ == "__main__":
    main()

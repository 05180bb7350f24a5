"""KV blocks between two workers: rates and times over 16 to 32k tokens, beside a plain copy of as many bytes.

Two real worker processes that hold a KV cache of the model's shape and no weights; plans of scattered blocks go to them
as the engine sends them. `ms` is what the acknowledgement says (on the GPU: from event to event), `seen_ms` from the
parent's sending to its reading of the acknowledgement; both are medians. The floor is one large copy between the same
two devices, measured in the same run: peer to peer, or, for the relay, the slower of device to host and host to device.
With --sweep also the number of CTAs that a pull runs on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from bench.lib.report import Row, arguments, emit, gpu_name, save
from nanopd import EngineConfig
from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import KVLayout, ModelConfig
from nanopd.ipc.doorbell import Doorbell
from nanopd.messages import TransferAck, TransferPath, TransferPlan
from nanopd.worker.block_mover import MAX_CTAS
from nanopd.workers import process
from nanopd.workers.paths import send_plan
from nanopd.workers.process import WorkerProcess
from nanopd.workers.supervisor import WorkerSupervisor

TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
SWEEP_TOKENS = (2048, 8192)
CTAS = (8, 16, 32, 48, 64, 96, 132, 264)
BARS = {TransferPath.IPC: {2048: 300, 8192: 300}, TransferPath.RELAY: {2048: 40, 8192: 40}}  # GB/s, two H200
LINK_BYTES = 1 << 30
BLOCK_SIZE = 16
TIMEOUT_S = 60
PLAN_STRIDE = 1024  # of plan ids; what is below says how many CTAs

Pair = tuple[int, int]  # source, destination


def pool_config(model: str, devices: Sequence[str], num_tokens: int, transfer: str = "auto") -> EngineConfig:
    """Workers that may hand over to each other, with room for what `num_tokens` have at both ends of a move."""
    workers = [{"device": device} for device in devices]
    keys = {"load_format": "dummy", "policy": "round_robin", "max_num_seqs": 1, "max_model_len": num_tokens}
    room = {"block_size": BLOCK_SIZE, "num_blocks": 2 * -(-num_tokens // BLOCK_SIZE) + 1}
    return EngineConfig.from_dict({"model": model, "workers": workers, "transfer": transfer, **keys, **room})


class Pool:
    """Workers that get blocks of each other."""

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path) -> None:
        self._num_blocks = config.num_blocks or 0
        self._rng = np.random.default_rng(0)
        self._processes = WorkerSupervisor(config, model, path, Doorbell())
        with mock.patch.object(process, "WORKER_ENTRY", "bench.lib.pool_worker"):
            self._workers: list[WorkerProcess] = self._processes.start()
        self.close, self._num_plans = self._processes.close, 0

    def path(self, src: int = 0, dst: int = 1) -> TransferPath:
        return self._workers[dst].paths[src]

    def move(self, pairs: Sequence[Pair], num_blocks: int, ctas: int) -> tuple[float, float]:
        """Milliseconds of plans sent together, one for each pair: their mean, as acknowledged; all, as seen here."""
        plans = [self._plan(*pair, num_blocks, ctas) for pair in pairs]
        start = time.perf_counter()
        for plan in plans:
            send_plan(plan, self._workers)
        acks: list[TransferAck] = []
        while len(acks) < len(plans):
            acks += [cast("TransferAck", ack) for worker in self._workers for ack in worker.poll()]
            assert time.perf_counter() - start < TIMEOUT_S, "no acknowledgement"
        seen_ms = (time.perf_counter() - start) * 1e3
        assert all(ack.num_bytes for ack in acks)
        return statistics.mean(ack.duration_us for ack in acks) / 1e3, seen_ms

    def median(
        self, num_blocks: int, repeats: int, ctas: int = MAX_CTAS, pairs: Sequence[Pair] = ((0, 1),)
    ) -> tuple[float, float]:
        times = [self.move(pairs, num_blocks, ctas) for _ in range(repeats + 2)][2:]
        return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)

    def _plan(self, src: int, dst: int, num_blocks: int, ctas: int) -> TransferPlan:
        self._num_plans += 1
        ids = [1 + self._rng.permutation(self._num_blocks - 1)[:num_blocks].astype(np.int32) for _ in range(2)]
        return TransferPlan(self._num_plans * PLAN_STRIDE + ctas, src, 0, dst, 0, *ids)


def timed_ms(copy: Callable[[], object], devices: Sequence[str], count: int = 8) -> float:
    """Of one of `count` copies in a row, which hide what it costs to begin and to wait: the median of five."""
    times = []
    for _ in range(6):
        for is_end in (False, True):
            for _ in range(count if is_end else 0):
                copy()
            for device in devices:
                if device != "cpu":
                    torch.cuda.synchronize(device)
            times.append(time.perf_counter())
    return statistics.median(np.diff(times)[2::2]) * 1e3 / count


class PlainCopies:
    """Contiguous copies with torch, in this process; to be closed before the workers start."""

    def __init__(self, devices: Sequence[str], max_bytes: int) -> None:
        self._devices = devices
        self._src, self._dst = (torch.empty(max_bytes, dtype=torch.uint8, device=device) for device in devices)

    def peer_ms(self, nbytes: int) -> float:
        src, dst = self._src[:nbytes], self._dst[:nbytes]
        return timed_ms(lambda: dst.copy_(src, non_blocking=True), self._devices)

    def through_host_gb_s(self, nbytes: int) -> float:
        """The slower of the two ways over the host's pinned memory."""
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=any(device != "cpu" for device in self._devices))
        ways = ((self._src[:nbytes], host), (host, self._dst[:nbytes]))
        times_ms = [timed_ms(lambda w=way: w[1].copy_(w[0], non_blocking=True), self._devices) for way in ways]
        return nbytes / max(times_ms) / 1e6


def move_row(pool: Pool, block_bytes: int, count: int, repeats: int, ctas: int | None = None) -> dict[str, Any]:
    """Of moves of `count` tokens by so many CTAs, or by the usual number of them."""
    num_blocks = -(-count // BLOCK_SIZE)
    ms, seen_ms = pool.median(num_blocks, repeats, ctas or MAX_CTAS)
    what = f"{pool.path().value}, {count} tokens" + (f", {ctas} CTAs" if ctas else "")
    rate = num_blocks * block_bytes / max(ms, 1e-3) / 1e6
    return {"what": what, "ms": round(ms, 3), "seen_ms": round(seen_ms, 3), "GB/s": round(rate, 1)}


def token_row(pool: Pool, block_bytes: int, count: int, plain_ms: float, link: float) -> Row:
    row = move_row(pool, block_bytes, count, 20 if count <= 8192 else 8)
    nbytes = -(-count // BLOCK_SIZE) * block_bytes
    plain = {"plain_ms": round(plain_ms, 3), "plain_GB/s": round(nbytes / plain_ms / 1e6, 1)}
    row |= {"MB": round(nbytes / 1e6, 1), "bar": BARS.get(pool.path(), {}).get(count), **plain}
    return {**row, "floor_GB/s": round(link, 1), "of_floor": round(row["GB/s"] / link, 2)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="Qwen3-8B", help="the shape")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="source, destination")
    parser.add_argument("--paths", nargs="+", help="values of `transfer`; default: auto relay")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sweep", action="store_true", help="numbers of CTAs")
    args = parser.parse_args()
    devices = args.devices.split(",")
    on_gpu = devices != ["cpu", "cpu"]
    path = resolve(args.model, load_format="dummy")
    model = read_model_config(path, "auto", not on_gpu)
    block_bytes = KVLayout.of(model, BLOCK_SIZE).bytes_per_block
    sweep_tokens = [count for count in SWEEP_TOKENS if count in args.tokens] if args.sweep and on_gpu else []
    plain = PlainCopies(devices, max(LINK_BYTES, -(-max(args.tokens) // BLOCK_SIZE) * block_bytes))
    plain_ms = {count: plain.peer_ms(-(-count // BLOCK_SIZE) * block_bytes) for count in args.tokens}
    links = {True: plain.through_host_gb_s(LINK_BYTES), False: LINK_BYTES / plain.peer_ms(LINK_BYTES) / 1e6}
    del plain
    rows: list[Row] = []
    sweep: list[Row] = []
    if on_gpu:
        torch.cuda.empty_cache()
    for transfer in args.paths or ("auto", "relay"):
        pool = Pool(pool_config(args.model, devices, max(args.tokens), transfer), model, path)
        link = links[pool.path() is TransferPath.RELAY]
        rows += [token_row(pool, block_bytes, count, plain_ms[count], link) for count in args.tokens]
        if pool.path() is TransferPath.IPC:
            sweep += [move_row(pool, block_bytes, count, 10, ctas) for count in sweep_tokens for ctas in CTAS]
        pool.close()
    settings = {"model": args.model, "devices": devices, "block_size": BLOCK_SIZE, "max_ctas": MAX_CTAS}
    device = gpu_name(max(devices))  # "cuda:0" is behind "cpu"
    report = emit("transfer", settings, rows, device=device)
    if sweep:
        report = {**report, "sweep": emit("transfer sweep", settings, sweep, device=device)["rows"]}
    if args.json:
        save(report, args.json)


if __name__ == "__main__":
    main()

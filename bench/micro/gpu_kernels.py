"""Every kernel beside its floor, and beside what torch has for the same work; Qwen3-8B's shapes, bfloat16.

The floor is the bytes that must move over the copy speed measured in the same run. Calls are captured in CUDA graphs
over data that does not fit the L2 cache, and a figure is the median of several replays. `us` is a graph of plain
launches, `overlapped_us` the same with programmatic dependent launch, as in a decode step. Peers of the paged
attention read contiguous K and V, which no engine has.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lib.report import Row, arguments, emit, gpu_name
from nanopd import cuda
from nanopd.config import KVLayout
from nanopd.cuda import linear
from nanopd.models import AttentionSpec
from nanopd.models.weights import PLAIN, Linear

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE, VOCAB, NUM_LAYERS = 4096, 12288, 151936, 36
LINEARS = {
    "qkv": (6144, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "lm_head": (VOCAB, HIDDEN),
}
COLD_BYTES = 1 << 29  # several times any L2
COLUMNS = ("kernel", "shape", "us", "overlapped_us", "floor_us", "of_floor", "overlapped_of_floor", "error", "peers")
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")

Call = Callable[[], object]


def time_graph(calls: Sequence[Call], replays: int = 15) -> float:
    """Seconds per call in a graph of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_time(graph.replay, replays) / len(calls)


def median_time(run: Call, repeats: int = 15) -> float:
    """Seconds on the GPU."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copy_speed() -> float:
    """Bytes read and written per second, by a copy outside of a graph: inside, another engine does it, and slower."""
    source = torch.empty(1 << 30, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_time(lambda: target.copy_(source))


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


class Report:
    """Collects rows; knows the copy speed that floors come from."""

    def __init__(self) -> None:
        self.copy_speed = copy_speed()
        self.rows: list[Row] = []

    def measure(
        self,
        kernel: str,
        shape: str,
        num_bytes: float,
        calls: Callable[[bool], Sequence[Call]] | Sequence[Call],
        peers: dict[str, Sequence[Call]] | None = None,
        **more: object,
    ) -> None:
        """`calls(overlap)`, or `calls`, are what a graph holds; a peer that cannot do the shape is left out."""
        plain, *overlapped = map(time_graph, map(calls, (False, True)) if callable(calls) else [calls])
        floor = num_bytes / self.copy_speed
        row = {"kernel": kernel, "shape": shape, "us": plain * 1e6, "floor_us": floor * 1e6, "of_floor": floor / plain}
        for time_s in overlapped:
            row |= {"overlapped_us": time_s * 1e6, "overlapped_of_floor": floor / time_s}
        if peers:
            times: dict[str, float] = {}
            for name, peer in peers.items():
                with contextlib.suppress(RuntimeError):
                    times[name] = time_graph(peer) * 1e6
            row |= {"peers": " ".join(f"{name} {us:.1f}" for name, us in times.items()), "peers_us": times}
        self.rows.append(row | more)


def spec_of(kv: Tensor, cos_sin: Tensor | None = None) -> AttentionSpec:
    """Of each layer of a cache; cos_sin is wanted by the rotation alone."""
    layout = KVLayout(*kv.shape[1:2], *kv.shape[3:], str(kv.dtype).removeprefix("torch."))
    return AttentionSpec(layout.head_dim**-0.5, kv if cos_sin is None else cos_sin, layout)


class AttentionCase:
    """A batch over a paged cache whose layers are the distinct data of consecutive calls."""

    def __init__(self, seq_lens: Sequence[int], block_size: int, num_queries: int = 1) -> None:
        blocks = [-(-n // block_size) for n in seq_lens]
        self.num_bytes = sum(seq_lens) * NUM_KV_HEADS * HEAD_DIM * 4
        self.num_layers = min(NUM_LAYERS, max(2, math.ceil(COLD_BYTES / self.num_bytes)))
        self.kv = random(sum(blocks) + 1, self.num_layers, 2, NUM_KV_HEADS, block_size, HEAD_DIM)
        order = iter((torch.randperm(sum(blocks)) + 1).split(blocks))
        tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        self.block_tables = tables.to(DEVICE, torch.int32)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
        self.q = random(len(seq_lens) * num_queries, NUM_HEADS, HEAD_DIM)
        self.out = torch.empty_like(self.q)
        self.spec = spec_of(self.kv)
        sizes = (len(seq_lens), NUM_HEADS, self.spec.layout)
        self.attend = cuda.PagedDecodeAttention(*sizes, DTYPE, DEVICE, num_queries)
        self.num_queries = num_queries

    def plan(self) -> None:
        self.attend.begin_step(self.seq_lens, self.num_queries)

    def calls(self, overlap: bool) -> list[Call]:
        tensors = (self.spec, self.block_tables, self.seq_lens, self.out)
        layers = range(self.num_layers)
        calls = [partial(self.attend, self.q, self.kv, layer, *tensors, overlap=overlap) for layer in layers]
        return calls * max(1, 16 // self.num_layers)

    def error(self) -> float:
        """Of the first few rows of one layer, against float64."""
        self.plan()
        self.calls(overlap=False)[0]()
        got, expected = [], []
        for row in range(min(4, len(self.seq_lens))):
            n = int(self.seq_lens[row])
            kv = self.kv[self.block_tables[row].long(), 0].double()  # [blocks, 2, kv heads, block_size, head_dim]
            keys, values = kv.permute(1, 2, 0, 3, 4).reshape(2, NUM_KV_HEADS, -1, HEAD_DIM)[:, :, :n]
            for i in range(self.num_queries):
                q = self.q[row * self.num_queries + i].double().view(NUM_KV_HEADS, -1, HEAD_DIM)
                limit = n - self.num_queries + 1 + i
                expected.append(F.scaled_dot_product_attention(q, keys[:, :limit], values[:, :limit]).flatten())
                got.append(self.out[row * self.num_queries + i].flatten())
        return relative_error(torch.stack(got), torch.stack(expected))


def sdpa_calls(num_rows: int, context: int, backend: SDPBackend) -> list[Call]:
    num_bytes = num_rows * context * NUM_KV_HEADS * HEAD_DIM * 4
    q = random(num_rows, NUM_HEADS, 1, HEAD_DIM)
    kv = random(max(2, math.ceil(COLD_BYTES / num_bytes)), 2, num_rows, NUM_KV_HEADS, context, HEAD_DIM)

    def run(keys: Tensor, values: Tensor) -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return [partial(run, *pair) for pair in kv]


def bench_attention(report: Report, block_size: int) -> None:
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for num_rows, context in ((1, 512), (1, 4096), (8, 4096), (64, 2048), (256, 1024), (16, 32768)):
        case = AttentionCase([context] * num_rows, block_size)
        peers = {name: sdpa_calls(num_rows, context, backend) for name, backend in backends.items()}
        shape, error = f"{num_rows} x {context}", case.error()
        report.measure("decode attention", shape, case.num_bytes, case.calls, peers, error=error)
        del case, peers
        torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(64, generator=generator) * math.log(32768 / 64) + math.log(64)
    ragged = [int(n) for n in spread.exp()]
    for name, seq_lens, queries in (("64 x 64..32k", ragged, 1), ("64 x 2048, 2 queries", [2048] * 64, 2)):
        case = AttentionCase(seq_lens, block_size, queries)
        error = case.error()
        report.measure("decode attention", name, case.num_bytes, case.calls, error=error)


def bench_linear(report: Report) -> None:
    norm = random(HIDDEN)
    for name, shape in LINEARS.items():
        matrices = [random(*shape) * shape[1] ** -0.5 for _ in range(1 if name == "lm_head" else 12)]
        cold = matrices * (4 if len(matrices) == 1 else 1)
        for num_rows in (1, 4, 8, 16):
            x = random(num_rows, shape[1])
            expected = product_in_torch(name, x.double(), norm.double(), matrices[0].double())
            error = relative_error(product_of(name, x, norm, matrices[0]), expected)
            calls = partial(with_overlap, [partial(product_of, name, x, norm, w) for w in cold])
            peers = {"torch": [partial(product_in_torch, name, x, norm, w) for w in cold]}
            report.measure("products", f"{num_rows} x {name}", matrices[0].nbytes, calls, peers, error=error)


def product_of(name: str, x: Tensor, norm: Tensor, weight: Tensor, **keys: bool) -> Tensor:
    """The product called `name` as a decoder has it."""
    if name in ("o_proj", "down"):
        residual = x.new_zeros(x.shape[0], HIDDEN)
        linear.add_linear(x, Linear(weight, None, PLAIN), residual, **keys)
        return residual
    product = linear.norm_gated_linear if name == "gate_up" else linear.norm_linear
    return product(x, norm, 1e-6, Linear(weight, None, PLAIN), **keys)


def product_in_torch(name: str, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    if name in ("o_proj", "down"):
        return F.linear(x, weight)
    y = F.linear(F.rms_norm(x, norm.shape, norm, 1e-6), weight)
    return silu_and_mul_in_torch(y) if name == "gate_up" else y


def bench_elementwise(report: Report) -> None:
    kv = torch.zeros(1024, 2, 2, NUM_KV_HEADS, 16, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    spec = spec_of(kv, torch.rand(40960, HEAD_DIM, device=DEVICE))
    norm, head_norm = random(HIDDEN), random(HEAD_DIM)
    for num_rows in (1, 64, 8192):
        copies, shape = 4 if num_rows > 1000 else 20, f"{num_rows} rows"
        x, gate_up = random(copies, num_rows, HIDDEN), random(copies, num_rows, 2 * INTERMEDIATE)
        qkv = random(copies, num_rows, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        tokens = torch.arange(num_rows, device=DEVICE)
        where = (tokens, tokens, kv, 1, spec, head_norm, head_norm)
        num_bytes = 2 * x[0].nbytes, gate_up[0].nbytes * 3 // 2, 2 * qkv[0].nbytes + num_rows * HEAD_DIM * 4
        norms = [partial(F.rms_norm, a, norm.shape, norm, 1e-6) for a in x]
        silus = [partial(silu_and_mul_in_torch, a) for a in gate_up]
        works: list[tuple[str, int, list[Callable[..., object]], dict[str, Sequence[Call]] | None]] = [
            ("RMS norm", num_bytes[0], [partial(cuda.rms_norm, a, norm, 1e-6) for a in x], {"torch": norms}),
            ("SiLU and multiply", num_bytes[1], [partial(cuda.silu_and_mul, a) for a in gate_up], {"torch": silus}),
            ("rotary + norms + KV store", num_bytes[2], [partial(cuda.rotary_and_store, a, *where) for a in qkv], None),
        ]
        for kernel, nbytes, calls, peers in works:
            report.measure(kernel, shape, nbytes, partial(with_overlap, calls), peers)


def with_overlap(calls: Sequence[Callable[..., object]], overlap: bool) -> list[Call]:
    return [partial(call, overlap=overlap) for call in calls]


def silu_and_mul_in_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def bench_blocks(report: Report) -> None:
    kv = random(600, NUM_LAYERS, 2, NUM_KV_HEADS, 16, HEAD_DIM)
    ids = torch.randperm(600, device=DEVICE).to(torch.int32)
    src, dst = cuda.Side.of(kv, ids[:256]), cuda.Side.of(kv, ids[300:556])
    block_bytes = kv[0].nbytes
    for max_ctas in (8, 32, 132, 1 << 16):
        call = partial(cuda.move_blocks, src, dst, 256, block_bytes, 0, max_ctas)
        shape = f"256 x {block_bytes / 1e6:.2f} MB, at most {max_ctas} CTAs"
        report.measure("move blocks", shape, 2 * 256 * block_bytes, [call] * 4)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--only", nargs="*", help="attention, linear, elementwise, blocks (default: all)")
    args = parser.parse_args()
    benches: dict[str, Callable[[Report], None]] = {
        "attention": partial(bench_attention, block_size=args.block_size),
        "linear": bench_linear,
        "elementwise": bench_elementwise,
        "blocks": bench_blocks,
    }
    report = Report()
    for name in args.only or benches:
        benches[name](report)
        torch.cuda.empty_cache()
    config = {"block_size": args.block_size, "copy_bytes_per_s": report.copy_speed}
    emit("kernels", config, report.rows, COLUMNS, gpu_name("cuda"), path=args.json)


if __name__ == "__main__":
    main()

"""Round trip of a message between two spawned processes: rings with doorbells, beside a bare pipe.

Per transport one process asks and another answers with a message of the same size. The transports take turns in
short rounds, so that all see the same machine. Where the scheduler puts two processes changes a figure severalfold,
so both placements are pinned and reported; where memory happens to lie changes it by a tenth or two, so it and
the echoing processes are made afresh several times. A figure is the median of its rounds' medians over all starts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from multiprocessing.connection import Connection

import numpy as np

from bench.lib.report import Row, arguments, emit
from nanopd.ipc.descriptor import Descriptor
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.process import die_with_parent
from nanopd.ipc.ring import RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory

TIMEOUT_S = 10.0
PIPES = ("os.pipe", "multiprocessing.Pipe")


Send, Receive = Callable[[bytes], object], Callable[[], bytes]
Channel = tuple[Send, Receive]  # one end of a transport
Opener = Callable[[], Channel]  # called in the other process
End = tuple[SharedMemory, Doorbell]  # of a ring


def pipe_channel(incoming: Descriptor, outgoing: Descriptor, nbytes: int) -> Channel:
    """os.pipe, one write and one read per message (up to PIPE_BUF, 4096 bytes, a read never splits one)."""

    def receive() -> bytes:
        payload = os.read(incoming.fileno(), nbytes)
        while 0 < len(payload) < nbytes:
            payload += os.read(incoming.fileno(), nbytes - len(payload))
        return payload

    return lambda payload: os.write(outgoing.fileno(), payload), receive


def connection_channel(connection: Connection) -> Channel:
    """multiprocessing.Pipe."""
    return connection.send_bytes, connection.recv_bytes


def ring_channel(incoming: End, outgoing: End, spin_s: float) -> Channel:
    """A ring and a doorbell each way. A message is copied in and copied out, as everywhere in nanopd."""
    reader, writer, waiter = RingReader(incoming[0]), RingWriter(outgoing[0]), Waiter(spin_s)
    waiter.add(incoming[1])

    def send(payload: bytes) -> None:
        writer.write(payload)
        outgoing[1].ring()

    def receive() -> bytes:
        while (message := reader.read()) is None:
            assert waiter.wait(TIMEOUT_S), "no answer"
        return message

    return send, receive


def open_pipe(nbytes: int) -> tuple[Channel, Opener]:
    (here_in, there_out), (there_in, here_out) = (map(Descriptor, os.pipe()) for _ in range(2))
    return pipe_channel(here_in, here_out, nbytes), partial(pipe_channel, there_in, there_out, nbytes)


def open_connection(_: int) -> tuple[Channel, Opener]:
    here, there = multiprocessing.Pipe()
    return connection_channel(here), partial(connection_channel, there)


def open_ring(spin_s: float, nbytes: int) -> tuple[Channel, Opener]:
    ends = [(ring_memory(nbytes, 8), Doorbell()) for _ in range(2)]
    return ring_channel(*ends, spin_s), partial(ring_channel, *ends[::-1], spin_s)


def echo(open_channel: Opener) -> None:
    """The spawned process; it ends with its parent."""
    die_with_parent()
    send, receive = open_channel()
    while True:
        send(receive())


def round_trips_us(channel: Channel, payload: bytes, count: int) -> np.ndarray:
    """[count] float64, one after the other."""
    send, receive = channel
    times = np.empty(count + 1)
    times[0] = time.perf_counter()
    for trip in range(count):
        send(payload)
        answer = receive()
        times[trip + 1] = time.perf_counter()
        assert len(answer) == len(payload)
    return np.diff(times) * 1e6


Samples = dict[tuple[str, str], list[np.ndarray]]  # by placement and transport: [trips] float64 per round


def measure(args: argparse.Namespace, samples: Samples) -> None:
    """Adds to `samples` what fresh memory and fresh echoing processes, which are pinned, bring."""
    openers: dict[str, Callable[[int], tuple[Channel, Opener]]] = {
        "os.pipe": open_pipe,
        "multiprocessing.Pipe": open_connection,
        "ring": partial(open_ring, 0.0),
        "ring, spinning": partial(open_ring, args.spin_us * 1e-6),
    }
    cores, payload = args.cores, os.urandom(args.nbytes)
    placements = {**({"two cores": cores[1]} if cores[1:] else {}), "one core": cores[0]}
    channels: dict[str, Channel] = {}
    echoes = []
    for name, opener in openers.items():
        channels[name], there = opener(args.nbytes)
        echoes.append(multiprocessing.get_context("spawn").Process(target=echo, args=(there,), daemon=True))
        echoes[-1].start()
    for round_, (placement, core) in product(range(args.rounds + 1), placements.items()):
        for process in echoes:
            os.sched_setaffinity(process.pid or 0, {core})
        for name, channel in channels.items():
            times = round_trips_us(channel, payload, args.trips)
            if round_ > 0:  # the first is the warm-up
                samples[placement, name].append(times)
    for process in echoes:
        process.kill()


def summarize(samples: Samples) -> Sequence[Row]:
    """One row per placement and transport; the base of `ratio` is the quicker of the two pipes placed likewise."""
    medians = {key: statistics.median(float(np.median(times)) for times in of) for key, of in samples.items()}
    rows = []
    for (placement, name), of in samples.items():
        ratio = medians[placement, name] / min(medians[placement, pipe] for pipe in PIPES)
        p99 = float(np.percentile(np.concatenate(of), 99))
        row = {"placement": placement, "transport": name, "p50_us": medians[placement, name], "p99_us": p99}
        rows.append({**row, "ratio": ratio})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nbytes", type=int, default=4096)
    parser.add_argument("--starts", type=int, default=5, help="how often all echoing processes are started afresh")
    parser.add_argument("--rounds", type=int, default=5, help="per start")
    parser.add_argument("--trips", type=int, default=1000, help="round trips per round, placement and transport")
    parser.add_argument("--spin-us", type=float, default=50.0, help="of the row that spins before it sleeps")
    args = parser.parse_args()
    args.cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, args.cores[:1])
    samples: Samples = defaultdict(list)
    for _ in range(args.starts):
        measure(args, samples)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "cores")}
    emit("ipc", settings, summarize(samples), path=args.json)


if __name__ == "__main__":
    main()

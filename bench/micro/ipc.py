"""Round trip of a message between two spawned processes: rings with doorbells, beside a bare pipe.

Per transport one process asks and another answers with a message of the same size. The transports take turns in
short rounds, so that all see the same machine. Where the scheduler puts two processes changes a figure severalfold,
so both placements are pinned and reported; where memory happens to lie changes it by a tenth or two, so all
processes are started afresh several times. A figure is the median of its rounds' medians over all starts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np

from bench.lib.report import Row, arguments, emit
from nanopd.ipc.descriptor import Descriptor
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.process import die_with_parent
from nanopd.ipc.ring import RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory

TIMEOUT_S = 10.0
PIPES = ("os.pipe", "multiprocessing.Pipe")


class Channel(Protocol):
    """One end of a transport."""

    def send(self, payload: bytes | memoryview) -> None: ...

    def receive(self) -> bytes | memoryview:
        """The next message, valid until the next call."""


Opener = Callable[[], Channel]  # called in the other process
End = tuple[SharedMemory, Doorbell]  # of a ring


class PipeChannel:
    """os.pipe, one write and one read per message (up to PIPE_BUF, 4096 bytes, a read never splits one)."""

    def __init__(self, incoming: Descriptor, outgoing: Descriptor, nbytes: int) -> None:
        self._incoming, self._outgoing, self._nbytes = incoming, outgoing, nbytes

    def send(self, payload: bytes | memoryview) -> None:
        os.write(self._outgoing.fileno(), payload)

    def receive(self) -> bytes:
        payload = os.read(self._incoming.fileno(), self._nbytes)
        while 0 < len(payload) < self._nbytes:
            payload += os.read(self._incoming.fileno(), self._nbytes - len(payload))
        return payload


class ConnectionChannel:
    """multiprocessing.Pipe."""

    def __init__(self, connection: Connection) -> None:
        self.send, self.receive = connection.send_bytes, connection.recv_bytes


class RingChannel:
    """A ring and a doorbell each way. A message is copied in and copied out, as everywhere in nanopd."""

    def __init__(self, incoming: End, outgoing: End, spin_s: float) -> None:
        self._reader, self._writer = RingReader(incoming[0]), RingWriter(outgoing[0])
        self._outgoing_bell, self._waiter = outgoing[1], Waiter(spin_s)
        self._waiter.add(incoming[1])

    def send(self, payload: bytes | memoryview) -> None:
        self._writer.write(payload)
        self._outgoing_bell.ring()

    def receive(self) -> bytes:
        while (message := self._reader.read()) is None:
            assert self._waiter.wait(TIMEOUT_S), "no answer"
        return message


def open_pipe(nbytes: int) -> tuple[Channel, Opener]:
    (here_in, there_out), (there_in, here_out) = (map(Descriptor, os.pipe()) for _ in range(2))
    return PipeChannel(here_in, here_out, nbytes), partial(PipeChannel, there_in, there_out, nbytes)


def open_connection(_: int) -> tuple[Channel, Opener]:
    here, there = multiprocessing.Pipe()
    return ConnectionChannel(here), partial(ConnectionChannel, there)


def open_ring(spin_s: float, nbytes: int) -> tuple[Channel, Opener]:
    ends = [(ring_memory(nbytes, 8), Doorbell()) for _ in range(2)]
    return RingChannel(*ends, spin_s), partial(RingChannel, *ends[::-1], spin_s)


def echo(open_channel: Opener) -> None:
    """The spawned process; it ends with its parent."""
    die_with_parent()
    channel = open_channel()
    while True:
        channel.send(channel.receive())


def round_trips_us(channel: Channel, payload: bytes, count: int) -> np.ndarray:
    """[count] float64, one after the other."""
    times = np.empty(count + 1)
    times[0] = time.perf_counter()
    for trip in range(count):
        channel.send(payload)
        answer = channel.receive()
        times[trip + 1] = time.perf_counter()
        assert len(answer) == len(payload)
    return np.diff(times) * 1e6


Samples = dict[tuple[str, str], list[np.ndarray]]  # by placement and transport: [trips] float64 per round


def ask(args: argparse.Namespace, connection: Connection) -> None:
    """The process that measures; sends its Samples. The echoing processes are its children."""
    die_with_parent()
    openers: dict[str, Callable[[int], tuple[Channel, Opener]]] = {
        "os.pipe": open_pipe,
        "multiprocessing.Pipe": open_connection,
        "ring": partial(open_ring, 0.0),
        "ring, spinning": partial(open_ring, args.spin_us * 1e-6),
    }
    here, *others = sorted(os.sched_getaffinity(0))
    placements = {"two cores": others[0]} if others else {}
    placements["one core"] = here
    os.sched_setaffinity(0, {here})
    channels: dict[str, Channel] = {}
    echoes = []
    for name, opener in openers.items():
        channels[name], there = opener(args.nbytes)
        process = multiprocessing.get_context("spawn").Process(target=echo, args=(there,), daemon=True)
        process.start()
        echoes.append(process)
    connection.send(measure(channels, [process.pid or 0 for process in echoes], placements, args))
    for process in echoes:
        process.kill()


def measure(
    channels: dict[str, Channel], echoes: list[int], placements: dict[str, int], args: argparse.Namespace
) -> Samples:
    """`echoes` are the process ids of the other ends, `placements` name the core that they run on."""
    payload = os.urandom(args.nbytes)
    samples: Samples = {(placement, name): [] for placement in placements for name in channels}
    for round_ in range(args.rounds + 1):
        for placement, core in placements.items():
            for pid in echoes:
                os.sched_setaffinity(pid, {core})
            for name, channel in channels.items():
                times = round_trips_us(channel, payload, args.trips)
                if round_ > 0:  # the first is the warm-up
                    samples[placement, name].append(times)
    return samples


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
    parser.add_argument("--starts", type=int, default=5, help="how often all processes are started afresh")
    parser.add_argument("--rounds", type=int, default=5, help="per start")
    parser.add_argument("--trips", type=int, default=1000, help="round trips per round, placement and transport")
    parser.add_argument("--spin-us", type=float, default=50.0, help="of the row that spins before it sleeps")
    args = parser.parse_args()
    samples: Samples = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.starts):
        here, there = context.Pipe()
        asker = context.Process(target=ask, args=(args, there))
        asker.start()
        there.close()  # so that the end of the process ends `recv`
        for key, rounds in here.recv().items():
            samples.setdefault(key, []).extend(rounds)
        asker.join()
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    emit("ipc", settings, summarize(samples), path=args.json)


if __name__ == "__main__":
    main()

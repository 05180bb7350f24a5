"""What a machine serves with its workers arranged in one way or another, found in simulation.

An arrangement is a split of the workers into prefill, decode and mixed ones, a chunk budget and the policy that chooses
routes. Its goodput is the highest rate of arrivals at which 90 % of all requests keep the service levels, as DistServe
(Zhong et al. 2024) has it. Knows no devices: a parameter file stands for the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import LEVELS, EngineConfig, ModelConfig
from nanopd.core.sequence import Sequence as Request
from nanopd.errors import ConfigError
from nanopd.lab.simulator import simulate
from nanopd.lab.workload import WorkloadRequest
from nanopd.messages import RequestLog, Role
from nanopd.metrics import SLO, RequestMetrics
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.cost_model import Parameters, chunk_pairs
from nanopd.routing.factory import make_policy

TARGET = 0.9  # attainment
STEP = 1.2  # between rates while the goodput is not enclosed
RESOLUTION = 1.05  # between the rates that enclose it in the end
MAX_RANGE = 100.0  # of rates, up and down from where the search begins
CLEAR_LOSS = 0.85  # of the best goodput so far, below which another's is not looked for
BUDGETS = (512, 2048)  # tokens per step
COLUMNS = ("arrangement", "goodput per worker", "requests/s", "attainment at requests/s")
ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}


@dataclass(frozen=True, slots=True)
class Arrangement:
    """`[policy:]split[/chunk budget]`; without a policy a fixed one, which follows from the split."""

    text: str
    policy: str | None
    workers: tuple[dict[str, str], ...]
    budget: int | None  # tokens per step; None: the configuration's

    @classmethod
    def parse(cls, text: str) -> Arrangement:
        """Raises ConfigError: neither like 8M, 5P3D or 8M/512, nor one of these behind a policy."""
        match = re.fullmatch(r"(?:(adaptive|closed_form|oracle):)?((?:\d+[PDM])+)(?:/(\d+))?", text)
        if match is None:
            raise ConfigError("arrangement", text, "like 8M, 5P3D, 8M/512 or adaptive:8M")
        parts = re.findall(r"(\d+)([PDM])", match[2])
        workers = tuple(
            {"device": "cpu", "role": ROLES[kind].value} for count, kind in parts for _ in range(int(count))
        )
        return cls(text, match[1], workers, int(match[3]) if match[3] else None)

    @property
    def is_split(self) -> bool:
        """Whether no worker is mixed."""
        return all(worker["role"] != "mixed" for worker in self.workers)

    @property
    def prefill_share(self) -> float:
        return float(np.mean([worker["role"] == "prefill" for worker in self.workers]))

    def config(self, base: EngineConfig, slo: SLO) -> EngineConfig:
        fixed = "disaggregated" if self.is_split else "collocated"
        return base.replace(
            workers=self.workers,
            policy="adaptive" if self.policy == "oracle" else self.policy or fixed,
            slo={name: limit for name in LEVELS if (limit := getattr(slo, name)) is not None},
            max_num_batched_tokens=self.budget or base.max_num_batched_tokens,
            admission="queue",
            transfer="auto",
        )


class Oracle(AdaptivePolicy):
    """Knows what nobody can: how long each answer will be."""

    def expected_output(self, seq: Request) -> tuple[float, tuple[float, ...]]:
        return float(seq.end_len - seq.num_tokens), super().expected_output(seq)[1]


def candidates(num_workers: int, budgets: Iterable[int] = BUDGETS) -> list[Arrangement]:
    """All mixed with each budget, the two policies that look ahead, every split into prefill and decode workers."""
    texts = [f"{num_workers}M/{budget}" for budget in budgets]
    texts += [f"{policy}:{num_workers}M" for policy in ("closed_form", "adaptive")]
    texts += [f"{k}P{num_workers - k}D" for k in range(1, num_workers)]
    return [Arrangement.parse(text) for text in texts]


def at_rate(requests: Sequence[WorkloadRequest], requests_per_s: float) -> list[WorkloadRequest]:
    """The same requests at other times: the mean gap between them is 1 / requests_per_s."""
    scale = (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s) / requests_per_s
    return [replace(request, arrival_s=request.arrival_s * scale) for request in requests]


def default_slo(parameters: Parameters, requests: Sequence[WorkloadRequest]) -> SLO:
    """TTFT: four prefills of a long prompt (90th percentile); TPOT: 1.55 idle steps (2.25 if context costs); gap: 5."""
    long = float(np.percentile([r.num_prompt_tokens for r in requests], 90))
    terms = parameters.terms
    tpot_ms = round(terms.beta * (1.55 if terms.kv == 0 else 2.25))
    return SLO(4 * terms.step_ms(0, 0, long, chunk_pairs(long, 0)), tpot_ms, 5 * tpot_ms)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is to be served, on which machine and how well."""

    base: EngineConfig
    model: ModelConfig
    parameters: Parameters
    requests: Sequence[WorkloadRequest]
    slo: SLO

    @classmethod
    def of(cls, base: EngineConfig, parameters: Parameters, requests: Iterable[WorkloadRequest], slo: SLO) -> Scenario:
        """With those of `requests` that the configuration and a worker's cache have room for.

        Raises:
            ConfigError: there are too few of them.
        """
        model = read_model_config(resolve(parameters.model, load_format="dummy"), "auto", device_is_cpu=False)
        most = min(base.max_len_of(model), parameters.num_kv_tokens)
        fitting = [r for r in requests if r.num_prompt_tokens + r.num_output_tokens <= most]
        if len(fitting) < 2:
            raise ConfigError("trace", f"{len(fitting)} requests", f"at least 2, each of at most {most} tokens")
        return cls(base, model, parameters, fitting, slo)

    def run(
        self, arrangement: Arrangement, rate: float | None, until: Callable[[RequestLog], bool] | None = None
    ) -> list[RequestLog]:
        """What became of the requests at `rate` per second (None: at their own times); `until`: see `simulate`."""
        config = arrangement.config(self.base, self.slo)
        requests = at_rate(self.requests, rate) if rate else self.requests
        policy = make_policy(config, self.parameters, Oracle if arrangement.policy == "oracle" else AdaptivePolicy)
        return simulate(config, self.model, self.parameters, requests, policy, until=until)[1]

    def attainment(self, arrangement: Arrangement, rate: float) -> float:
        """The share of all arrivals that keep the service levels; a run that has missed twice too many ends there."""
        num_misses, most = 0, 2 * (1 - TARGET) * len(self.requests)

        def has_failed(log: RequestLog) -> bool:
            nonlocal num_misses
            num_misses += not self.slo.is_met(RequestMetrics.from_log(log))
            return num_misses > most

        self.run(arrangement, rate, has_failed)
        return 1 - num_misses / len(self.requests)

    @property
    def _work_ms(self) -> tuple[float, float]:
        """Of a mean request for one worker: its prompt, and its decode steps where arithmetic begins to bind."""
        terms = self.parameters.terms
        lens = [(r.num_prompt_tokens, r.num_output_tokens) for r in self.requests]
        prompt, output = np.mean(lens, axis=0).tolist()
        batch = terms.compute_bound_rows
        return terms.a1 * prompt, terms.step_ms(batch, batch * (prompt + output / 2)) / batch * output

    def likely_rate(self, num_workers: int) -> float:
        """Requests per second that keep so many workers busy."""
        return num_workers * 1e3 / sum(self._work_ms)

    @property
    def likely_split(self) -> float:
        """The share of the workers that prompts keep busy."""
        prompt_ms, output_ms = self._work_ms
        return prompt_ms / (prompt_ms + output_ms)


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate` requests per second, or below that if `is_bound`; `points` are the rates tried and their attainment."""

    rate: float
    is_bound: bool
    points: tuple[tuple[float, float], ...]


def find_goodput(attainment: Callable[[float], float], start: float, least: float = 0.0) -> Goodput:
    """The rate at which `attainment`, taken to fall with the rate, comes to TARGET; interpolated at the end.

    Args:
        start: where to begin.
        least: what is found to be lower than this is not looked for any further.
    """
    points: dict[float, float] = {}
    low, high, rate, least = 0.0, math.inf, start, max(least, start / MAX_RANGE)
    while high > max(RESOLUTION * low, least) and low < MAX_RANGE * start:
        points[rate] = attainment(rate)
        low, high = (rate, high) if points[rate] >= TARGET else (low, rate)
        if low and high < math.inf:
            rate = math.sqrt(low * high)
        else:  # ever larger strides
            rate = low * STEP ** len(points) if low else max(high / STEP ** len(points), least)
    tried = tuple(sorted(points.items()))
    if not low or high == math.inf:
        return Goodput(low or high, not low, tried)
    share = (points[low] - TARGET) / (points[low] - points[high])
    return Goodput(low + share * (high - low), False, tried)


def search(
    scenario: Scenario, arrangements: Sequence[Arrangement], known: Mapping[str, Goodput] | None = None
) -> Iterator[tuple[Arrangement, Goodput]]:
    """The goodput of each, one after the other; of clear losers only that they are.

    Splits into prefill and decode workers come in order of their distance from a likely one; those behind one that has
    lost clearly are left out. What is `known`, by an arrangement's text, comes first and is not simulated again.
    """
    best, likely = 0.0, scenario.likely_split
    lost: list[float] = []  # prefill shares
    known = known or {}

    def order(arrangement: Arrangement) -> tuple[bool, float]:
        return arrangement.text not in known, abs(arrangement.prefill_share - likely) if arrangement.is_split else -1

    for arrangement in sorted(arrangements, key=order):
        share = arrangement.prefill_share
        if arrangement.is_split and any((other - likely) * (share - other) > 0 for other in lost):
            continue

        def attainment(rate: float, arrangement: Arrangement = arrangement) -> float:
            return scenario.attainment(arrangement, rate)

        least = CLEAR_LOSS * best
        found = known.get(arrangement.text)
        if found is None:
            found = find_goodput(attainment, least or scenario.likely_rate(len(arrangement.workers)), least)
        if not found.is_bound and arrangement.policy != "oracle":  # which nobody can have
            best = max(best, found.rate)
        if found.is_bound and arrangement.is_split:
            lost.append(share)
        yield arrangement, found


def table(found: Sequence[tuple[Arrangement, Goodput]]) -> list[list[object]]:
    """A row of COLUMNS for each."""
    return [
        [
            arrangement.text,
            f"{'<' * goodput.is_bound}{goodput.rate / len(arrangement.workers):.3f}",
            f"{'<' * goodput.is_bound}{goodput.rate:.3f}",
            ", ".join(f"{rate:.2f}: {attainment:.0%}" for rate, attainment in goodput.points),
        ]
        for arrangement, goodput in found
    ]


def draw(found: Sequence[tuple[Arrangement, Goodput]], title: str, path: Path) -> None:
    """A bar for each arrangement's goodput per worker. Raises ImportError: no matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.3 * len(found)), layout="constrained")
    axes: Any = figure.subplots()
    names = [arrangement.text for arrangement, _ in found]
    per_worker = [goodput.rate / len(arrangement.workers) for arrangement, goodput in found]
    colours = ["lightgray" if goodput.is_bound else "tab:blue" for _, goodput in found]
    bars = axes.barh(names, per_worker, color=colours)
    axes.bar_label(bars, [f"{'<' * g.is_bound}{value:.2f}" for (_, g), value in zip(found, per_worker)], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=f"requests/s per worker that {TARGET:.0%} of the requests bear", title=title)
    figure.savefig(path, dpi=120)

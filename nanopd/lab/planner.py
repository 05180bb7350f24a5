"""What a machine serves with its workers arranged in one way or another, found in simulation.

An `Arrangement` is a split of the workers into prefill, decode and mixed ones, a chunk budget and the policy that
chooses routes; benches write theirs in the same way. Its goodput is the highest rate of arrivals at which 90 % of all
requests keep the SLO, as DistServe (Zhong et al. 2024) has it. Knows no devices: a parameter file stands for the
machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import LEVELS, POLICIES, EngineConfig, ModelConfig
from nanopd.core.sequence import Sequence as Request
from nanopd.errors import ConfigError
from nanopd.lab.simulator import simulate
from nanopd.lab.workload import WorkloadRequest
from nanopd.messages import RequestLog, Role
from nanopd.metrics import SLO, RequestMetrics
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.cost_model import Parameters, chunk_pairs
from nanopd.routing.factory import make_policy

# Set by hand, no measurement is on record for any of them, but TARGET, which is DistServe's:
TARGET = 0.9  # attainment
STEP = 1.2  # between rates while the goodput is not enclosed
RESOLUTION = 1.05  # between the rates that enclose it in the end
MAX_RANGE = 100.0  # of rates, up and down from where the search begins
CLEAR_LOSS = 0.85  # of the best goodput so far; what is below is called a loser, and its goodput is not searched for
BUDGETS = (512, 2048)  # tokens per step
COLUMNS = ("arrangement", "goodput per worker", "requests/s", "attainment at requests/s")
ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
ORACLE = "oracle"  # the adaptive policy, told how long each answer will be


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What the workers do, in their order, and which policy chooses routes: `[policy:]split[/chunk budget]`.

    As in 8M, 5P3D, 8M/512 or adaptive:8M. Without a policy it is a fixed one: `collocated` if all workers are mixed,
    else `disaggregated`.
    """

    policy: str  # one of POLICIES, or ORACLE
    split: str  # how many workers of which role
    budget: int | None = None  # tokens per step; None: the configuration's

    @classmethod
    def parse(cls, text: str) -> Arrangement:
        """Raises ConfigError: another form, or an unknown policy."""
        match = re.fullmatch(rf"(?:({'|'.join((*POLICIES, ORACLE))}):)?((?:\d+[PDM])+)(?:/(\d+))?", text)
        if match is None:
            raise ConfigError("arrangement", text, "like 8M, 5P3D, 8M/512 or adaptive:8M")
        return cls(match[1] or _fixed_policy(match[2]), match[2], int(match[3]) if match[3] else None)

    @classmethod
    def of(cls, config: EngineConfig) -> Arrangement:
        """What the configuration says itself."""
        letters = "".join(role.value[0].upper() for role in config.roles)
        return cls(config.policy, "".join(f"{len(same[0])}{same[1]}" for same in re.finditer(r"(.)\1*", letters)))

    @property
    def text(self) -> str:
        """The shortest form that `parse` reads as this."""
        policy = "" if self.policy == _fixed_policy(self.split) else f"{self.policy}:"
        return policy + self.split + (f"/{self.budget}" if self.budget else "")

    @property
    def roles(self) -> list[Role]:
        return [ROLES[kind] for count, kind in re.findall(r"(\d+)([PDM])", self.split) for _ in range(int(count))]

    @property
    def is_split(self) -> bool:
        """Whether no worker is mixed."""
        return Role.MIXED not in self.roles

    @property
    def prefill_share(self) -> float:
        return self.roles.count(Role.PREFILL) / len(self.roles)

    def applied(self, config: EngineConfig, **changes: Any) -> EngineConfig:
        """The devices of `config` with these roles, this policy and this budget, and with `changes` of other fields.

        Raises:
            ConfigError: the configuration has more or fewer workers.
        """
        if len(self.roles) != len(config.workers):
            raise ConfigError("arrangement", self.text, f"one of {len(config.workers)} workers, as the configuration")
        workers = [{"device": w.device, "role": role.value} for w, role in zip(config.workers, self.roles)]
        policy = "adaptive" if self.policy == ORACLE else self.policy
        budget = self.budget or config.max_num_batched_tokens
        return config.replace(workers=workers, policy=policy, max_num_batched_tokens=budget, **changes)

    def config(self, base: EngineConfig, slo: SLO) -> EngineConfig:
        """A configuration to simulate, of as many workers as the arrangement has."""
        limits = {name: limit for name in LEVELS if (limit := getattr(slo, name)) is not None}
        base = base.replace(workers=[{"device": "cpu", "count": len(self.roles)}], policy="collocated")
        return self.applied(base, slo=limits, admission="queue", transfer="auto")


def _fixed_policy(split: str) -> str:
    return "disaggregated" if "P" in split or "D" in split else "collocated"


class Oracle(AdaptivePolicy):
    """The adaptive policy with what no real one can know: how long each answer will be."""

    def expected_output(self, seq: Request) -> tuple[float, tuple[float, ...]]:
        return float(seq.end_len - seq.num_tokens), super().expected_output(seq)[1]


def candidates(num_workers: int, budgets: Iterable[int] = BUDGETS) -> list[Arrangement]:
    """All mixed with each budget, the two policies that predict, every split into prefill and decode workers."""
    texts = [f"{num_workers}M/{budget}" for budget in budgets]
    texts += [f"{policy}:{num_workers}M" for policy in ("closed_form", "adaptive")]
    texts += [f"{k}P{num_workers - k}D" for k in range(1, num_workers)]
    return [Arrangement.parse(text) for text in texts]


def at_rate(requests: Sequence[WorkloadRequest], requests_per_s: float) -> list[WorkloadRequest]:
    """The same requests at other times: the mean gap between them is 1 / requests_per_s."""
    scale = (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s) / requests_per_s
    return [replace(request, arrival_s=request.arrival_s * scale) for request in requests]


def default_slo(parameters: Parameters, requests: Sequence[WorkloadRequest]) -> SLO:
    """Limits in units of idle times on this machine; the factors are set by hand.

    TTFT: 4 prefills of a long prompt (90th percentile). TPOT: 1.55 decode steps, or 2.25 if the terms say what context
    costs. First gap: 5 times the TPOT limit.
    """
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
        """Of `requests` it takes those that fit into the configuration's lengths and one worker's cache.

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
        """The logs of all requests, played at `rate` per second (None: at their own times); `until`: see `simulate`."""
        config = arrangement.config(self.base, self.slo)
        requests = at_rate(self.requests, rate) if rate else self.requests
        policy = make_policy(config, self.parameters, Oracle if arrangement.policy == ORACLE else AdaptivePolicy)
        return simulate(config, self.model, self.parameters, requests, policy, until=until)[1]

    def attainment(self, arrangement: Arrangement, rate: float) -> float:
        """The share of all arrivals that keep the SLO; a run ends when it has missed twice as many as TARGET allows."""
        num_misses, most = 0, 2 * (1 - TARGET) * len(self.requests)

        def has_failed(log: RequestLog) -> bool:
            nonlocal num_misses
            num_misses += not self.slo.is_met(RequestMetrics.from_log(log))
            return num_misses > most

        self.run(arrangement, rate, has_failed)
        return 1 - num_misses / len(self.requests)

    @property
    def _work_ms(self) -> tuple[float, float]:
        """What a mean request costs one worker: its prompt, and its decode steps at the batch where compute binds."""
        terms = self.parameters.terms
        lens = [(r.num_prompt_tokens, r.num_output_tokens) for r in self.requests]
        prompt, output = np.mean(lens, axis=0).tolist()
        batch = terms.compute_bound_rows
        return terms.a1 * prompt, terms.step_ms(batch, batch * (prompt + output / 2)) / batch * output

    def likely_rate(self, num_workers: int) -> float:
        """The requests per second that would keep so many workers busy."""
        return num_workers * 1e3 / sum(self._work_ms)

    @property
    def likely_split(self) -> float:
        """The share of the workers that prompts would keep busy."""
        prompt_ms, output_ms = self._work_ms
        return prompt_ms / (prompt_ms + output_ms)


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate` requests per second, or less than that if `is_bound`; `points` are the rates tried, and attainments."""

    rate: float
    is_bound: bool
    points: tuple[tuple[float, float], ...]


def find_goodput(attainment: Callable[[float], float], start: float, least: float = 0.0) -> Goodput:
    """The rate at which `attainment`, taken to fall with the rate, comes to TARGET; interpolated at the end.

    Args:
        start: where to begin.
        least: the search ends when the goodput is known to be below this.
    """
    points: dict[float, float] = {}
    low, high, rate, least = 0.0, math.inf, start, max(least, start / MAX_RANGE)
    while high > max(RESOLUTION * low, least) and low < MAX_RANGE * start:
        points[rate] = attainment(rate)
        low, high = (rate, high) if points[rate] >= TARGET else (low, rate)
        if low and high < math.inf:
            rate = math.sqrt(low * high)
        else:  # Strides grow while the goodput is not enclosed.
            rate = low * STEP ** len(points) if low else max(high / STEP ** len(points), least)
    tried = tuple(sorted(points.items()))
    if not low or high == math.inf:
        return Goodput(low or high, not low, tried)
    share = (points[low] - TARGET) / (points[low] - points[high])
    return Goodput(low + share * (high - low), False, tried)


def search(
    scenario: Scenario, arrangements: Sequence[Arrangement], known: Mapping[str, Goodput] | None = None
) -> Iterator[tuple[Arrangement, Goodput]]:
    """Yields the goodput of each arrangement; of a clear loser only a bound.

    Splits into prefill and decode workers come in order of their distance from a likely one; those that lie beyond a
    clear loser are left out. What is `known`, by an arrangement's text, comes first and is not simulated again.
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
        least = CLEAR_LOSS * best
        found = known.get(arrangement.text) or find_goodput(
            partial(scenario.attainment, arrangement), least or scenario.likely_rate(len(arrangement.roles)), least
        )
        if not found.is_bound and arrangement.policy != ORACLE:  # No real policy can have its goodput.
            best = max(best, found.rate)
        if found.is_bound and arrangement.is_split:
            lost.append(share)
        yield arrangement, found


def table(found: Sequence[tuple[Arrangement, Goodput]]) -> list[list[object]]:
    """A row of COLUMNS for each."""
    return [
        [
            arrangement.text,
            f"{'<' * goodput.is_bound}{goodput.rate / len(arrangement.roles):.3f}",
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
    per_worker = [goodput.rate / len(arrangement.roles) for arrangement, goodput in found]
    colours = ["lightgray" if goodput.is_bound else "tab:blue" for _, goodput in found]
    bars = axes.barh(names, per_worker, color=colours)
    axes.bar_label(bars, [f"{'<' * g.is_bound}{value:.2f}" for (_, g), value in zip(found, per_worker)], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=f"requests/s per worker that {TARGET:.0%} of the requests bear", title=title)
    figure.savefig(path, dpi=120)

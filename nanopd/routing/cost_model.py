"""What a step, a prompt and a move cost on a machine: fitted terms, predictions, corrections, parameter files.

    T_prefill = hypot(a0, a1 * new) + history                history: a2 * pairs + a3 * cached tokens
    T_step    = beta + row * batch + reading + (jump + excess * (batch - batch_thresh) above batch_thresh)
    T_mixed   = max(hypot(a0, a1 * (new + batch)) + m0, T_step - reading + gamma * new) + history + reading
    T_move    = c0 + bytes / bandwidth                       reading: kv * tokens of context

A short prompt takes a0 however short it is, as launching kernels and reading weights takes that long; from some length
on the arithmetic takes longer. `pairs` is the sum of new * (cached + new / 2) over prompt chunks; a short chunk behind
a long history is bound by reading that history. A decode step reads all weights (beta) and the context of its rows;
above `batch_thresh` rows other kernels make the products, or compute bounds them. In a mixed step a decode row costs
what a prompt token costs. a1, beta and gamma are the seed's alpha, beta and gamma. Numbers only: knows neither requests
nor workers, and does not care whether a time was measured or simulated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import least_squares

from nanopd.errors import ConfigError
from nanopd.messages import RowFlag, StepBatch
from nanopd.rules import number

Numbers = Any  # a number, or an array of them


def chunk_pairs(num_new: Numbers, num_cached: Numbers) -> Numbers:
    """Query-key pairs of a causal chunk of `num_new` tokens behind `num_cached` others."""
    return num_new * (num_cached + num_new / 2)


def chunk_history(num_new: float, num_cached: float, chunk: float) -> float:
    """Tokens before each chunk of a prompt, summed over its chunks."""
    return max(num_new / chunk, 1.0) * (num_cached + max(num_new - chunk, 0.0) / 2)


def rows_of(batch: StepBatch) -> tuple[int, int, int, float, int]:
    """The arguments of `Terms.step_ms`: decode rows, their context, prompt tokens, query-key pairs, cached tokens.

    Each draft token counts as a decode row of its own.
    """
    lens, starts = batch.row_lens, batch.row_starts
    if not len(batch.token_ids):  # Every row is a decode that goes on from its slot.
        return len(lens), int(starts.sum()) + len(lens), 0, 0.0, 0
    is_decode = (lens == 1) | ((batch.row_flags & RowFlag.DRAFTS) != 0)
    rows = lens[is_decode].astype(np.int64)
    new, cached = lens[~is_decode].astype(np.int64), starts[~is_decode]
    num_context = int((rows * starts[is_decode] + rows * (rows + 1) // 2).sum())
    return int(rows.sum()), num_context, int(new.sum()), float(chunk_pairs(new, cached).sum()), int(cached.sum())


@dataclass(frozen=True, slots=True)
class Terms:
    """Fitted terms of one machine and model, in milliseconds per unit."""

    a0: float  # a prefill step, at least
    a1: float  # a prompt token (alpha)
    a2: float  # a query-key pair
    a3: float  # a cached token before a prompt's chunk
    beta: float  # a decode step
    row: float  # a decode row
    jump: float  # a step of more than batch_thresh rows
    excess: float  # a decode row above batch_thresh, on top of `row`
    batch_thresh: float  # rows above which there is a jump or another slope
    kv: float  # a token of context that a decode row reads
    gamma: float  # a prompt token in a step that also decodes, where a1 does not bound the step
    m0: float  # a step of prompts that also decodes
    c0: float  # a move of blocks
    bandwidth: float  # GB/s between two workers

    def step_ms(
        self,
        num_decodes: Numbers,
        num_kv_tokens: Numbers,
        num_new: Numbers = 0,
        num_pairs: Numbers = 0.0,
        num_cached: Numbers = 0,
        maximum: Callable[[Any, Any], Any] = max,
    ) -> Any:
        """A step of `num_decodes` rows with `num_kv_tokens` tokens of context in all, and prompts' chunks.

        Numbers, or with `maximum=np.maximum` arrays of them, one step each.
        """
        history_ms = self.a2 * num_pairs + self.a3 * num_cached
        decodes, prompts = num_decodes > 0, num_new > 0
        rows_ms = self.decode_ms(num_decodes, 0, maximum) + self.gamma * num_new * decodes
        matrix_ms = ((self.a0 * prompts) ** 2 + (self.a1 * prompts * (num_new + num_decodes)) ** 2) ** 0.5
        longest_ms = maximum(rows_ms, matrix_ms + self.m0 * (decodes & prompts))
        return longest_ms + self.kv * num_kv_tokens + history_ms

    def decode_ms(self, num_decodes: Numbers, num_kv_tokens: Numbers, maximum: Callable[[Any, Any], Any] = max) -> Any:
        """`step_ms` without prompts."""
        above = maximum(num_decodes - self.batch_thresh, 0.0)
        rows_ms = self.beta + self.row * num_decodes + self.jump * (above > 0) + self.excess * above
        return rows_ms * (num_decodes > 0) + self.kv * num_kv_tokens

    def chunk_within(
        self, limit_ms: float, num_decodes: Numbers, num_kv_tokens: Numbers, maximum: Callable[[Any, Any], Any] = max
    ) -> Any:
        """Prompt tokens without history that decodes may have beside them in a step of at most `limit_ms`.

        Numbers or arrays, as `step_ms`.
        """
        by_gamma = (limit_ms - self.decode_ms(num_decodes, num_kv_tokens, maximum)) / max(self.gamma, 1e-9)
        matrix_ms = maximum(limit_ms - self.kv * num_kv_tokens - self.m0, self.a0)
        # An array's square is rounded differently from a number's, so the difference can lie just below 0.
        by_matrix = maximum(matrix_ms**2 - self.a0**2, 0.0) ** 0.5 / max(self.a1, 1e-9) - num_decodes
        return maximum(-maximum(-by_gamma, -by_matrix), 0.0)

    @property
    def compute_bound_rows(self) -> float:
        """Rows that take as long as reading the weights; the seed's batch_thresh, where its two terms meet."""
        return self.beta / max(self.row + self.excess, 1e-9)

    def move_ms(self, num_bytes: float) -> float:
        return self.c0 + num_bytes / (self.bandwidth * 1e6)


# ------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, slots=True)
class StepSample:
    """A measured step: what it computed and how long it took."""

    num_decodes: int
    num_kv_tokens: int
    num_new: int
    num_pairs: float
    num_cached: int
    ms: float

    @property
    def kind(self) -> str:
        return "prefill" if not self.num_decodes else "mixed" if self.num_new else "step"

    def predict(self, terms: Terms) -> float:
        return terms.step_ms(self.num_decodes, self.num_kv_tokens, self.num_new, self.num_pairs, self.num_cached)


@dataclass(frozen=True, slots=True)
class MoveSample:
    """A measured move of blocks from one worker to another."""

    num_bytes: int
    ms: float

    kind: ClassVar = "move"

    def predict(self, terms: Terms) -> float:
        return terms.move_ms(self.num_bytes)


Sample = StepSample | MoveSample
FITTED_TERMS = {  # by kind of sample, in the order in which they are fitted
    "prefill": ("a0", "a1", "a2", "a3"),
    "step": ("beta", "row", "kv", "jump", "excess", "batch_thresh"),
    "mixed": ("gamma", "m0"),
    "move": ("c0", "bandwidth"),
}


TOLERANCE = 0.03  # relative error up to which the loss is squared; set by hand, no measurement is on record


@dataclass(frozen=True, slots=True)
class Fit:
    terms: Terms
    stderr: dict[str, float]  # of each fitted term, in its unit
    errors: dict[str, dict[str, float]]  # kind -> {median, p90} of the relative error over the samples


def fit(samples: Sequence[Sample], start: Terms) -> Fit:
    """Terms of least relative error, all >= 0; a term whose kind of sample is missing stays as in `start`.

    The loss is squared for errors within TOLERANCE and linear beyond: single odd points do not bend the rest.
    """
    terms = start
    stderr: dict[str, float] = {}
    for kind, names in FITTED_TERMS.items():
        group = [sample for sample in samples if sample.kind == kind]
        if group and kind == "mixed":  # A fit of gamma that starts much below a1 would not move: a1 bounds the step.
            terms = replace(terms, gamma=terms.a1)
        if group:
            terms, errors = _fit_group(terms, names, group)
            stderr |= errors
    return Fit(terms, stderr, prediction_errors(samples, terms))


def prediction_errors(samples: Sequence[Sample], terms: Terms) -> dict[str, dict[str, float]]:
    """Relative errors by kind of sample, also of samples that were not fitted."""
    result = {}
    for kind in FITTED_TERMS:
        errors = [abs(s.predict(terms) / s.ms - 1) for s in samples if s.kind == kind]
        if errors:
            result[kind] = dict(zip(("median", "p90"), np.percentile(errors, (50, 90)).tolist(), strict=True))
    return result


def _fit_group(terms: Terms, names: Sequence[str], group: Sequence[Sample]) -> tuple[Terms, dict[str, float]]:
    if "batch_thresh" not in names:
        return _fitted(terms, names, group)[1:]
    # The loss is not convex in where the curve bends or jumps, so every batch size but the last is tried.
    names = [name for name in names if name != "batch_thresh"]
    batches = sorted({sample.num_decodes for sample in group if isinstance(sample, StepSample)})[:-1] or [1]
    fits = [_fitted(replace(terms, batch_thresh=float(batch)), names, group) for batch in batches]
    return min(fits, key=lambda found: found[0])[1:]


def _fitted(terms: Terms, names: Sequence[str], group: Sequence[Sample]) -> tuple[float, Terms, dict[str, float]]:
    """The loss, the terms, and the standard deviation of those that are called `names`."""

    def residuals(values: np.ndarray) -> np.ndarray:  # [num_names] -> [num_samples], relative
        trial = replace(terms, **dict(zip(names, values, strict=True)))
        return np.array([sample.predict(trial) / sample.ms - 1 for sample in group])

    start = [max(getattr(terms, name), 1e-9) for name in names]
    bounds = 0, np.inf
    best = least_squares(residuals, start, bounds=bounds, x_scale="jac", loss="soft_l1", f_scale=TOLERANCE)
    variance = 2 * best.cost / max(1, len(group) - len(names))
    deviations = np.sqrt(np.diag(np.linalg.pinv(best.jac.T @ best.jac)) * variance)
    values = dict(zip(names, map(float, best.x), strict=True))
    return best.cost, replace(terms, **values), dict(zip(names, map(float, deviations), strict=True))


# ------------------------------------------------------------------------------------------------ parameter files


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the policies, the simulator and the planner know of a machine."""

    machine: str
    model: str
    provenance: str  # where the numbers come from
    kv_bytes_per_token: int
    num_kv_tokens: int  # that one worker's cache holds
    terms: Terms
    pair_bandwidth: dict[str, float] = field(default_factory=dict)  # "p->d": GB/s, where it differs from the terms'
    stderr: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parameters:
        """Raises ConfigError for a missing, unknown or impossible entry."""
        _check_keys("parameters", values, cls)
        _check_keys("terms", values["terms"], Terms)
        for name, value in values["terms"].items():
            number(0.0 if name != "bandwidth" else 1e-9).check(f"terms.{name}", value, ConfigError)
        for name in ("kv_bytes_per_token", "num_kv_tokens"):
            number(1).check(name, values[name], ConfigError)
        for pair, bandwidth in values.get("pair_bandwidth", {}).items():
            number(1e-9).check(f"pair_bandwidth.{pair}", bandwidth, ConfigError)
            if not re.fullmatch(r"\d+->\d+", pair):
                raise ConfigError("pair_bandwidth", pair, 'pairs of workers like "0->1"')
        return cls(**{**values, "terms": Terms(**values["terms"])})

    @classmethod
    def load(cls, path: Path) -> Parameters:
        """Raises ConfigError: no such file, no JSON, or not what a parameter file holds."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError("params", str(path), f"a JSON file of fitted terms ({error})") from None

    def pair_terms(self) -> dict[tuple[int, int], Terms]:
        """By source and destination, where a pair of workers has a bandwidth of its own."""
        return {
            tuple(map(int, pair.split("->"))): replace(self.terms, bandwidth=bandwidth)  # type: ignore[misc]
            for pair, bandwidth in self.pair_bandwidth.items()
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def _check_keys(what: str, values: object, kind: type) -> None:
    names = [f.name for f in fields(kind)]
    needed = names if kind is Terms else names[:6]
    if not isinstance(values, Mapping) or not set(needed) <= set(values) <= set(names):
        raise ConfigError(what, values, f"a mapping with {', '.join(needed)}")


# -------------------------------------------------------------------------------------------- online correction


RESOLUTION_MS = 0.001  # of measured times
DIFFERENCE = 0.01  # relative change of a correction after which `CostModel.terms` follow; set by hand


WEIGHT, BOUND = 0.02, 2.0  # of one sample, and of a correction up and down; set by hand


def corrected(factor: float, predicted_ms: float, measured_ms: float) -> float:
    """A correction after one more sample: measured over predicted, as a moving geometric mean, and bounded.

    `predicted_ms` is the fitted model's, without the correction; times below the resolution teach nothing.
    """
    if predicted_ms <= 0:
        return factor
    if abs(measured_ms - predicted_ms) < RESOLUTION_MS:
        measured_ms = predicted_ms
    ratio = min(max(measured_ms / predicted_ms, 1 / BOUND), BOUND)
    return factor * (ratio / factor) ** WEIGHT


class CostModel:
    """Predictions for one machine that follow what is measured while it runs."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.terms = parameters.terms  # as corrected when a correction last moved by more than DIFFERENCE
        self.drift = dict.fromkeys(FITTED_TERMS, 1.0)  # corrections: measured over predicted, by kind of work
        self._applied = self.drift.copy()  # the corrections that `terms` have
        self._pair_terms = parameters.pair_terms()

    def mixed_ms(
        self, num_decodes: float, num_kv_tokens: float, num_new: float, num_pairs: float, num_cached: float = 0.0
    ) -> float:
        """`Terms.step_ms` with prompts, corrected."""
        factor = self.drift["mixed" if num_decodes else "prefill"]
        return factor * self.parameters.terms.step_ms(num_decodes, num_kv_tokens, num_new, num_pairs, num_cached)

    def chunk_within(self, limit_ms: float, num_decodes: float, num_kv_tokens: float) -> float:
        """`Terms.chunk_within`, corrected."""
        limit_ms /= self.drift["mixed"]
        return self.parameters.terms.chunk_within(limit_ms, num_decodes, num_kv_tokens)

    def move_ms(self, src_worker: int, dst_worker: int, num_tokens: float) -> float:
        """`Terms.move_ms` between two workers, corrected."""
        terms = self._pair_terms.get((src_worker, dst_worker), self.parameters.terms)
        return self.drift["move"] * terms.move_ms(num_tokens * self.parameters.kv_bytes_per_token)

    def observe(self, sample: Sample, pair: tuple[int, int] | None = None) -> None:
        """Learn from a measured step, or from a measured move from the first to the second of a `pair` of workers."""
        terms = self._pair_terms.get(pair, self.parameters.terms) if pair else self.parameters.terms
        self.drift[sample.kind] = corrected(self.drift[sample.kind], sample.predict(terms), sample.ms)
        if abs(self.drift[sample.kind] / self._applied[sample.kind] - 1) > DIFFERENCE:
            self._apply()

    def _apply(self) -> None:
        self._applied = self.drift.copy()
        factors = {name: self._applied[kind] for kind, names in FITTED_TERMS.items() for name in names}
        factors |= {"batch_thresh": 1.0, "bandwidth": 1 / self._applied["move"]}
        self.terms = Terms(**{name: f * getattr(self.parameters.terms, name) for name, f in factors.items()})

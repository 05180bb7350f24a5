"""Beam search: the algorithm, and a request of an engine that is answered by it.

`Beams` knows tokens and log probabilities alone. `BeamSearch` keeps one sequence of the engine for each beam: what a
step brings is a proposal, and when all beams have theirs, some go on, some are forked and some end. Engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nanopd.core.sequence import FINISH_REASONS, Sequence, SequenceStatus
from nanopd.engine.engine import Engine
from nanopd.errors import RequestError
from nanopd.messages import MAX_LOGPROBS, EventKind, FinishReason, RequestEvent, RequestLog
from nanopd.request import BeamSearchParams, Request, SamplingParams


@dataclass(slots=True)
class Hypothesis:
    """An answer, or the beginning of one."""

    token_ids: list[int]
    logprob: float  # of all tokens
    score: float = 0.0  # of a complete one


class Beams:
    """One search, as `generate` of transformers 5 does it: the same candidates, scores and end."""

    def __init__(self, params: BeamSearchParams, eos_token_ids: tuple[int, ...]) -> None:
        self.params = params
        self.num_candidates = max(2, 1 + len(eos_token_ids)) * params.num_beams
        self.running = [Hypothesis([], 0.0)]  # the best first, as the following
        self.complete: list[Hypothesis] = []
        self.num_tokens = 0
        self.eos_token_ids = eos_token_ids

    def advance(self, rows: list[dict[int, float]]) -> list[tuple[int, int]]:
        """Add a token to the running ones.

        Args:
            rows: of each running one, log probabilities of the `num_candidates` likeliest next tokens

        Returns:
            Which one each of those that run now goes on from, and the token.
        """
        self.num_tokens += 1
        num_beams, length = self.params.num_beams, self.num_tokens**self.params.length_penalty
        is_last = self.num_tokens == self.params.max_tokens
        beams = enumerate(zip(self.running, rows, strict=True))
        found = [(beam.logprob + logprob, i, token) for i, (beam, row) in beams for token, logprob in row.items()]
        found = sorted(found, key=lambda candidate: -candidate[0])[: self.num_candidates]
        for logprob, i, token in found[:num_beams]:
            if is_last or token in self.eos_token_ids:
                self.complete.append(Hypothesis([*self.running[i].token_ids, token], logprob, logprob / length))
        self.complete = sorted(self.complete, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        going_on = [] if is_last else [entry for entry in found if entry[2] not in self.eos_token_ids][:num_beams]
        self.running = [Hypothesis([*self.running[i].token_ids, token], logprob) for logprob, i, token in going_on]
        return [(i, token) for _, i, token in going_on]

    @property
    def is_done(self) -> bool:
        if not self.running:
            return True
        if len(self.complete) < self.params.num_beams:
            return False
        is_open = self.params.early_stopping == "never" and self.params.length_penalty > 0
        length = self.params.max_tokens if is_open else self.num_tokens
        can_improve = self.running[0].logprob / length**self.params.length_penalty > self.complete[-1].score
        return self.params.early_stopping is True or not can_improve


def sampling_params(params: BeamSearchParams, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """Those of the sequences of a search.

    Raises:
        RequestError: with so many end-of-sequence tokens there may be no more than so many beams.
    """
    num_candidates = Beams(params, eos_token_ids).num_candidates
    if num_candidates > MAX_LOGPROBS:
        most = MAX_LOGPROBS // (1 + len(eos_token_ids))
        raise RequestError("num_beams", params.num_beams, f"1 to {most}, as the model has {len(eos_token_ids)} EOS ids")
    return SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=True, logprobs=num_candidates)


class BeamSearch:
    """A request under way; the `Chooser` of its sequences."""

    def __init__(self, engine: Engine, request: Request, on_end: Callable[[BeamSearch], None]) -> None:
        """Start it; `request` has `beams`, and as `params` what `sampling_params` says.

        Raises:
            RequestError: it can never be served.
        """
        params = request.beams
        assert params is not None
        eos_token_ids = () if params.ignore_eos else engine.model.eos_token_ids
        self.beams = Beams(params, eos_token_ids)
        self.reason: FinishReason | None = None  # why the search has ended; None: it has all answers, or goes on
        self.error: str | None = None
        self._engine, self._on_end = engine, on_end
        self._rows: dict[Sequence, dict[int, float]] = {}  # of the beams that have their proposal
        self._token_times_s: list[float] = []
        self._num_forks = 0
        self._ended_s = 0.0
        self.seqs: list[Sequence] = []  # of the running beams
        self.first = engine.submit(request, chooser=self)
        self.seqs.append(self.first)
        if self.first.status.is_finished:
            self.ended(self.first)

    def sampled(self, seq: Sequence) -> None:
        """See `Chooser.sampled`."""
        assert seq.logprobs is not None
        self._rows[seq] = seq.logprobs[-1]
        if len(self._rows) == len(self.seqs):
            rows, self._rows = [self._rows[seq] for seq in self.seqs], {}
            choices = self.beams.advance(rows)
            self._token_times_s.append(self._engine.clock())
            if self.beams.is_done:
                self.end(None)
            else:
                self._go_on(choices)

    def ended(self, seq: Sequence) -> None:
        """See `Chooser.ended`; one that cannot go on ends them all."""
        if seq in self.seqs and seq.status is not SequenceStatus.FINISHED_LENGTH:
            self.end(FINISH_REASONS[seq.status], seq.error)

    def end(self, reason: FinishReason | None, error: str | None = None) -> None:
        """End it with what it has."""
        self.reason, self.error, self._ended_s = reason, error, self._engine.clock()
        seqs, self.seqs = self.seqs, []
        for seq in reversed(seqs):  # else a follower would be computed from the beginning as its parent ends
            self._engine.abort(seq.request_id)
        self._on_end(self)

    def log(self) -> RequestLog:
        """As if the longest answer had been generated alone."""
        log, end = self.first.log(), RequestEvent(self._ended_s, EventKind.FINISHED)
        events = [*(event for event in log.events if event.kind is not EventKind.FINISHED), end]
        times_s, reason = np.array(self._token_times_s), self.reason or FinishReason.STOP
        return replace(log, events=events, token_times_s=times_s, finish_reason=reason)

    def _go_on(self, choices: list[tuple[int, int]]) -> None:
        """Of those that go on from one beam, the first takes its sequence, and the others get forks of it."""
        old, tokens = self.seqs, dict[Sequence, int]()  # of those that go on in their own sequence
        self.seqs = []
        for i, token in choices:
            self.seqs.append(self._fork(old[i], token) if old[i] in tokens else old[i])
            tokens.setdefault(old[i], token)
        for seq in old:
            if seq not in tokens:
                self._engine.abort(seq.request_id)
        for seq, token in tokens.items():
            if self.seqs:  # a beam that cannot go on has ended the search
                self._engine.choose(seq, token)

    def _fork(self, seq: Sequence, token: int) -> Sequence:
        while (name := f"{self.first.request_id}/{self._num_forks}") in self._engine.seqs:
            self._num_forks += 1
        return self._engine.fork(seq, name, [*seq.token_ids[:-1], token])

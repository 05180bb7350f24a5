"""The seed's closed form: how long a request takes collocated and disaggregated, from the load alone.

    T_prefill(L)    = alpha * L
    T_transfer(L)   = L * bytes_per_token / bandwidth
    T_step(B)       = beta                 if B <= batch_thresh else beta * B / batch_thresh
    T_collocated    = T_prefill(L) + T_step(max(load, 1)) * O + [load > 0] * gamma * L * min(load, thr) / thr
    T_disaggregated = T_prefill(L) + T_transfer(L) + T_step(B_decode + 1) * O

The formula stays as it was, without queues and memory, so that the adaptive policy can be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Workers
from dataclasses import dataclass

from nanopd.core.sequence import Sequence
from nanopd.messages import Route
from nanopd.routing.cost_model import Parameters
from nanopd.routing.length_predictor import LengthPredictor
from nanopd.routing.policy import Decision, Policy, Prediction, WorkerLoad


@dataclass(frozen=True, slots=True)
class ClosedForm:
    alpha: float  # prefill, ms per token
    beta: float  # decode step at batch 1, ms
    batch_thresh: float  # batch size from which a decode step is bound by compute
    gamma: float  # interference of prefill with decode, ms per token
    bandwidth: float  # between two workers, GB/s
    bytes_per_token: int

    @classmethod
    def of(cls, parameters: Parameters) -> ClosedForm:
        t = parameters.terms
        return cls(t.a1, t.beta, t.compute_bound_rows, t.gamma, t.bandwidth, parameters.kv_bytes_per_token)

    @property
    def transfer_rate(self) -> float:
        """Milliseconds per token moved."""
        return self.bytes_per_token / (self.bandwidth * 1e6)

    def step_ms(self, batch: int) -> float:
        return self.beta if batch <= self.batch_thresh else self.beta * batch / self.batch_thresh

    def collocated_ms(self, num_prompt: float, num_output: float, load: int) -> float:
        interference = self.gamma * num_prompt * min(load, self.batch_thresh) / self.batch_thresh if load > 0 else 0.0
        return self.alpha * num_prompt + self.step_ms(max(load, 1)) * num_output + interference

    def disaggregated_ms(self, num_prompt: float, num_output: float, num_decoding: int) -> float:
        """`num_decoding`: sequences that the decode worker has without this one."""
        return (self.alpha + self.transfer_rate) * num_prompt + self.step_ms(num_decoding + 1) * num_output

    def winning_load(self) -> int:
        """The least load from which the disaggregated route is faster: gamma / transfer rate > batch_thresh / load."""
        return int(self.batch_thresh * self.transfer_rate / self.gamma) + 1

    def rank(
        self, feasible: list[Route], num_prompt: float, num_output: float, load: Callable[[int], int]
    ) -> list[Route]:
        """The fastest route first; among equally fast ones, the one whose workers have the fewest sequences."""

        def cost(route: Route) -> tuple[float, int, Route]:
            num_seqs = load(route.decode_worker)
            predict = self.collocated_ms if route.is_collocated else self.disaggregated_ms
            return predict(num_prompt, num_output, num_seqs), num_seqs + load(route.prefill_worker), route

        return sorted(feasible, key=cost)

    def predict(self, route: Route, num_prompt: float, num_output: float, load: int) -> Prediction:
        """The time that `rank` compares, in its parts; `load`: sequences at the decode worker."""
        ttft_ms, moved_ms, step_ms, caused_ms = self.alpha * num_prompt, 0.0, self.step_ms(max(load, 1)), 0.0
        if route.is_collocated:
            caused_ms = self.collocated_ms(num_prompt, num_output, load) - ttft_ms - step_ms * num_output
        else:
            moved_ms, step_ms = self.transfer_rate * num_prompt, self.step_ms(load + 1)
        total_ms = ttft_ms + moved_ms + step_ms * num_output + caused_ms
        return Prediction(route, ttft_ms, moved_ms + step_ms, step_ms, caused_ms, 0.0, total_ms)


class ClosedFormPolicy(Policy):
    """Takes the fastest route by the closed form, whose terms are not corrected."""

    def __init__(self, routes: list[Route], parameters: Parameters, predictor: LengthPredictor | None = None) -> None:
        self.routes = routes
        self.predictor = predictor or LengthPredictor()
        self._form = ClosedForm.of(parameters)

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        num_output = self.predictor.mean(seq.num_prompt_tokens, num_generated)
        args = seq.num_tokens, num_output - num_generated
        best = self._form.rank(feasible, *args, lambda w: workers[w].load)[:2]
        taken, *others = (self._form.predict(route, *args, workers[route.decode_worker].load) for route in best)
        return Decision(taken.route, taken, others[0] if others else None, num_output)

    def finished(self, seq: Sequence) -> None:
        """See `Policy.finished`; a complete answer's length is learned."""
        self.predictor.finished(seq)

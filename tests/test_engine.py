"""The control plane as a whole, against a model that is a hash: whatever happens, tokens are right, nothing is lost."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symbolic_worker import EOS, VOCAB_SIZE, generate, model_config, symbolic_workers

from nanopd.config import EngineConfig, routes_for_policy
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine import Engine
from nanopd.messages import Role, SamplingParams

TOPOLOGIES = {
    "mixed": ["mixed"],
    "1P1D": ["prefill", "decode"],
    "2P1D": ["prefill", "prefill", "decode"],
    "1P3D": ["prefill", "decode", "decode", "decode"],
    "all mixed": ["mixed", "mixed", "mixed"],
    "mixed and D": ["mixed", "decode"],
    "P and mixed": ["prefill", "mixed"],
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_engine(
    roles: list[str], policy: str, num_blocks: int = 40, rng: Random | None = None, **keys
) -> tuple[Engine, Clock]:
    workers = [{"device": "cpu", "role": role} for role in roles]
    config = EngineConfig(model="none", workers=workers, policy=policy, max_model_len=512, **keys)
    clock = Clock()
    clients = symbolic_workers(config, [num_blocks] * len(roles), rng)
    return Engine(config, model_config(), clients, clock), clock


def drain(engine: Engine, clock: Clock, max_steps: int = 20_000) -> None:
    for _ in range(max_steps):
        if not engine.has_unfinished:
            break
        clock.now_s += 0.01
        engine.step()
    assert not engine.has_unfinished, "the engine hangs"
    engine.check_integrity()
    for scheduler in engine.schedulers:
        if not scheduler.is_dead:
            assert scheduler.blocks.num_free == scheduler.blocks.num_usable
            assert scheduler.slots.num_free == len(scheduler.slots.seqs)
            assert scheduler.num_seqs == 0


def assert_right(seq: Sequence) -> None:
    expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
    assert seq.output_token_ids == expected
    is_stop = expected[-1] == EOS
    assert seq.status is (SequenceStatus.FINISHED_STOPPED if is_stop else SequenceStatus.FINISHED_LENGTH)
    assert len(seq.token_times_s) == len(expected)


def policies_for(roles: list[str]) -> list[str]:
    return [p for p in ("collocated", "disaggregated", "round_robin") if routes_for_policy(p, [Role(r) for r in roles])]


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_on_any_topology(topology: str, steps_in_flight: int, data: st.DataObject) -> None:
    """Random requests, arrivals, aborts, deadlines, tiny pools and budgets, work done in any order; then a death."""
    roles = TOPOLOGIES[topology]
    rng = Random(data.draw(st.integers(0, 2**32)))
    engine, clock = make_engine(
        roles,
        rng.choice(policies_for(roles)),
        num_blocks=rng.randint(22, 60),
        rng=rng,
        block_size=(block_size := rng.choice([1, 3, 4, 16])),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([1, 2, 7, 16, 17, 512]),
        steps_in_flight=steps_in_flight,
        handover_timeout_s=rng.choice([0.001, 0.05, 1.0]),
    )
    longest = 20 * block_size
    seqs: list[Sequence] = []
    victim = rng.randrange(len(roles)) if rng.random() < 0.3 else None
    for number in range(rng.randint(1, 14)):
        num_prompt = rng.randint(1, longest - 2)
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, min(30, longest - num_prompt)))
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)]
        deadline_s = rng.choice([None, None, None, 0.5])
        seqs.append(engine.submit(str(number), prompt, params, deadline_s=deadline_s))
        for _ in range(rng.choice([0, 1, 3, 20])):
            clock.now_s += 0.01
            engine.step()
            engine.check_integrity()
        if rng.random() < 0.2:
            engine.abort(str(rng.randrange(number + 1)))
        if victim is not None and rng.random() < 0.2:
            engine.workers[victim].is_dead = True
    drain(engine, clock)
    for seq in seqs:
        assert seq.status.is_finished
        if seq.status is SequenceStatus.FINISHED_ABORTED:
            expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
            assert seq.output_token_ids == expected[: len(seq.output_token_ids)]
        elif seq.status is SequenceStatus.FINISHED_ERROR:
            assert engine.workers[victim].is_dead
            assert "killed by the test" in seq.error
        else:
            assert_right(seq)

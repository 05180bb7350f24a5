"""Drafts change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import symbolic_worker
from engine_loads import QUIET, WILD, Life, drain, live, lives, make_engine
from hypothesis import given
from hypothesis import strategies as st
from local_worker import local_engine, run_to_end
from model_zoo import make_tiny_model
from profiles import examples
from safetensors.torch import load_file, save_file
from submitting import submit
from symbolic_worker import EOS, VOCAB_SIZE, generate

from nanopd.config import EngineConfig
from nanopd.core.sequence import Sequence
from nanopd.engine.answers import Answers
from nanopd.request import SamplingParams

MIXED, PREFILL, DECODE = ({"device": "cpu", "role": role} for role in ("mixed", "prefill", "decode"))


# --------------------------------------------------------------------------------------------- a model that is a hash


def repeating(context: np.ndarray) -> int:
    """A model that mostly says what it has said before: context [num_tokens] -> token id."""
    of_all = zlib.crc32(np.ascontiguousarray(context, np.int64).tobytes())
    if of_all % 12 == 0:
        return of_all % VOCAB_SIZE
    return 10 + zlib.crc32(np.ascontiguousarray(context[-2:], np.int64).tobytes()) % 5


@examples(1)
@given(
    st.sampled_from([QUIET, WILD]).flatmap(
        lambda load: lives(*load, step_timeout_s=st.just(0.5), num_speculative_tokens=st.sampled_from([1, 3, 7]))
    )
)
def test_any_load(life: Life) -> None:
    """As in test_engine.py: tiny pools and budgets, aborts, moves, roles, deaths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symbolic_worker, "next_token", repeating)
        live(life, lambda engine, error: None, are_replaced=True)


def test_steps_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that repeats itself takes fewer steps, with stop ids and limits where they would be without drafts."""
    monkeypatch.setattr(symbolic_worker, "next_token", lambda context: 10 + len(context) % 7)
    num_steps = {}
    for num_drafts in (0, 3):
        engine, clock = make_engine(["mixed"], "collocated", num_speculative_tokens=num_drafts)
        params = SamplingParams(temperature=0, max_tokens=101, ignore_eos=True)
        seq = submit(engine, "0", [1, 2, 3], params)
        drain(engine, clock)
        assert seq.output_token_ids == generate([1, 2, 3], 101, ())
        num_steps[num_drafts] = engine.fleet.ledger.of_worker[0].busy_us
    assert seq.drafter is not None and seq.drafter.num_accepted > 60
    assert num_steps[3] < 0.45 * num_steps[0]
    for stop_after in range(20, 30):
        monkeypatch.setattr(
            symbolic_worker, "next_token", lambda c, end=stop_after: EOS if len(c) == 3 + end else 10 + len(c) % 7
        )
        stopped = submit(engine, "1", [1, 2, 3], SamplingParams(temperature=0, max_tokens=101))
        limited = submit(engine, "2", [1, 2, 3], SamplingParams(temperature=0, max_tokens=stop_after, logprobs=2))
        drain(engine, clock)
        assert stopped.output_token_ids == generate([1, 2, 3], 101)
        assert len(stopped.output_token_ids) == stop_after + 1
        assert len(limited.output_token_ids) == len(limited.token_times_s) == stop_after
        assert limited.logprobs is not None and len(limited.logprobs) == stop_after


class Letters:
    """Text of one letter a token."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop, self.text = stop, ""
        self.stopped_by: str | None = None

    def push(self, token_ids: list[int], may_stop: bool) -> str:
        new = "".join(chr(97 + token % 26) for token in token_ids)
        self.text += new
        self.stopped_by = next((stop for stop in self.stop if may_stop and self.text.endswith(stop)), None)
        return new

    def finish(self) -> str:
        return ""


def test_streams_and_stop_strings_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is an update of its own, and none follows the one that ended a stop string."""
    seen = {}
    for num_drafts in (0, 3):
        monkeypatch.setattr(symbolic_worker, "next_token", lambda c: 11 if len(c) == 60 else 20 + len(c) % 5)
        engine, clock = make_engine(["prefill", "decode"], "disaggregated", num_speculative_tokens=num_drafts)
        engine._answers = Answers(lambda prompt, stop: Letters(stop))
        params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
        submit(engine, "stream", [1, 2, 3], params, is_streamed=True)
        submit(engine, "stop", [1, 2, 3], replace(params, stop=("yl",)), is_streamed=True)
        updates = []
        while engine.has_unfinished:
            clock.now_s += 0.01
            updates += [(u.seq.request_id, u.token_ids, u.text, u.is_finished) for u in engine.step()]
            engine.check_integrity()
        seen[num_drafts] = sorted(updates, key=lambda update: update[0])
        tokens = [token for name, token_ids, _, _ in updates if name == "stop" for token in token_ids]
        assert len(tokens) == 58 and tokens[-1] == 11
    assert seen[0] == seen[3]


# ------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With little attention, so that it mostly says again what it has said behind the same token."""
    path = make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", vocab_size=64, max_position_embeddings=256)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        weights[name] *= 0.02 if name.endswith("o_proj.weight") else 1
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    words = rng.integers(64, size=(7, 8)).tolist()
    return [(word * 6)[: 20 + i] for i, word in enumerate(words)]


def answers(path: Path, params: list[SamplingParams], **keys: object) -> list[Sequence]:
    engine = local_engine(EngineConfig(model=str(path), max_num_seqs=8, num_blocks=200, **keys), path)
    seqs = [submit(engine, str(i), prompt, p) for i, (prompt, p) in enumerate(zip(make_prompts(), params, strict=True))]
    run_to_end(engine)
    return seqs


WAYS = {
    "collocated": {},
    "one step in flight": {"steps_in_flight": 1, "block_size": 4},
    "disaggregated": {"policy": "disaggregated", "workers": [PREFILL, DECODE], "max_num_batched_tokens": 33},
    "all routes": {"policy": "round_robin", "workers": [MIXED, MIXED]},
}


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_without_drafts(tiny: Path, way: str, temperature: float) -> None:
    """Greedy or drawn, with logprobs, and whatever the sequence cannot have drafts for beside it."""
    base = {"temperature": temperature, "seed": 5, "ignore_eos": True}
    params = [SamplingParams(max_tokens=130 + i, **base) for i in range(3)]
    params += [SamplingParams(max_tokens=30, logprobs=3, **base), SamplingParams(max_tokens=30, min_tokens=20, **base)]
    params += [SamplingParams(max_tokens=9, repetition_penalty=1.3, **base), SamplingParams(max_tokens=1, **base)]
    plain = answers(tiny, params, **WAYS[way])
    drafted = answers(tiny, params, num_speculative_tokens=3, **WAYS[way])
    for seq, other in zip(plain, drafted, strict=True):
        assert seq.token_ids == other.token_ids
        if seq.logprobs is not None:
            assert other.logprobs is not None
            for row, other_row in zip(seq.logprobs, other.logprobs, strict=True):
                assert row == pytest.approx(other_row, abs=1e-5)
    assert drafted[5].drafter is None
    assert sum(seq.log().num_accepted_tokens for seq in drafted) >= 10

"""Beam search against transformers' own: the same answers with the same scores, in float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from local_worker import local_engine, run_to_end
from model_zoo import load_hf, make_tiny_model
from submitting import start_search, submit
from transformers import PreTrainedModel

from nanopd.checkpoints.model_files import read_model_config
from nanopd.config import EngineConfig
from nanopd.engine.beam_search import BeamSearch
from nanopd.errors import RequestError
from nanopd.messages import FinishReason
from nanopd.request import BeamSearchParams, SamplingParams

MIXED, PREFILL, DECODE = ({"device": "cpu", "role": role} for role in ("mixed", "prefill", "decode"))
PAIR = {"policy": "disaggregated", "workers": [PREFILL, DECODE]}
WAYS = {
    "collocated": {"steps_in_flight": 2},
    "one step at a time, chunks of 7": {"max_num_batched_tokens": 7, "steps_in_flight": 1},
    "preempted": {"num_blocks": 26, "max_num_seqs": 4},
    "without prefix caching, preempted": {"num_blocks": 26, "enable_prefix_caching": False},
    "disaggregated": {**PAIR, "verify_transfers": True},
    "disaggregated, preempted": {**PAIR, "num_blocks": 26, "max_num_seqs": 4, "handover_timeout_s": 0.01},
    "all routes": {"policy": "round_robin", "workers": [MIXED, MIXED], "max_num_batched_tokens": 33},
}
SEARCHES = [
    BeamSearchParams(num_beams=4, max_tokens=20),
    BeamSearchParams(num_beams=3, max_tokens=20, length_penalty=2.0, early_stopping="never"),
    BeamSearchParams(num_beams=6, max_tokens=12, length_penalty=0.0, early_stopping=True),
    BeamSearchParams(num_beams=2, max_tokens=20, length_penalty=-1.0),
    BeamSearchParams(num_beams=5, max_tokens=1),
    BeamSearchParams(num_beams=4, max_tokens=20, ignore_eos=True),
]
PROMPT_LENGTHS = (1, 37)


class Reference:
    def __init__(self, path: Path) -> None:
        self.path, self.hf = path, load_hf(path)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(4, 512, length).tolist() for length in PROMPT_LENGTHS]
        answers = [self.search(prompt, BeamSearchParams(), []) for prompt in self.prompts]
        tokens = [token for answer in answers for ids, _ in answer for token in ids[4:]]
        self.eos = max(set(tokens), key=tokens.count)  # searches shall come upon it
        self.expected = [
            self.search(prompt, params, [] if params.ignore_eos else [self.eos])
            for prompt in self.prompts
            for params in SEARCHES
        ]

    def search(self, prompt: list[int], params: BeamSearchParams, eos: list[int]) -> list[tuple[list[int], float]]:
        """The answers of transformers, without padding, and their scores."""
        model: PreTrainedModel = self.hf
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=params.num_beams,
            num_return_sequences=params.num_beams,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        lengths = (output.beam_indices >= 0).sum(-1).tolist()
        rows = output.sequences[:, len(prompt) :].tolist()
        return [
            (ids[:length], score)
            for ids, length, score in zip(rows, lengths, output.sequences_scores.tolist(), strict=True)
        ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    reference = Reference(make_tiny_model(tmp_path_factory.mktemp("model"), "llama"))
    ends = [ids[-1] == reference.eos for answers in reference.expected for ids, _ in answers]
    assert 0.1 < sum(ends) / len(ends) < 0.9, "some answers shall end early"
    return reference


@pytest.mark.parametrize("way", WAYS)
def test_answers_and_scores(reference: Reference, way: str) -> None:
    """All searches at once, beside requests of another kind."""
    model = replace(read_model_config(reference.path, "float32", True), eos_token_ids=(reference.eos,))
    keys = {"num_blocks": 1000, "max_num_seqs": 100, "block_size": 4, "max_model_len": 64, **WAYS[way]}
    engine = local_engine(EngineConfig(model=str(reference.path), **keys), reference.path, model)
    ended: list[BeamSearch] = []
    searches = []
    for number, prompt in enumerate(reference.prompts):
        submit(engine, f"greedy {number}", prompt, SamplingParams(temperature=0, max_tokens=8))
        for params in SEARCHES:
            name = f"search {len(searches)}"
            searches.append(start_search(engine, name, prompt, params, ended.append))
    run_to_end(engine)
    assert sorted(ended, key=searches.index) == searches
    for search, expected in zip(searches, reference.expected, strict=True):
        assert [beam.token_ids for beam in search.beams.complete] == [ids for ids, _ in expected]
        assert [beam.score for beam in search.beams.complete] == pytest.approx(
            [s for _, s in expected], rel=3e-6, abs=1e-4
        )
    num_preemptions = sum(scheduler.num_preemptions for scheduler in engine.schedulers)
    assert (num_preemptions > 0) == ("preempted" in way)


def test_an_end_before_time(reference: Reference) -> None:
    engine = local_engine(EngineConfig(model=str(reference.path), num_blocks=100, block_size=4), reference.path)
    ended: list[BeamSearch] = []
    params = BeamSearchParams(max_tokens=50)
    searches = [start_search(engine, name, [5, 6], params, ended.append) for name in "ab"]
    while not all(search.beams.num_tokens > 4 for search in searches):
        engine.step()
    engine.abort(searches[0].seqs[1].request_id)  # a beam of it
    searches[1].end(FinishReason.ABORT)
    assert ended == searches
    run_to_end(engine)
    assert [search.reason for search in searches] == [FinishReason.ABORT] * 2
    assert [search.log().finish_reason for search in searches] == [FinishReason.ABORT] * 2
    assert all(len(beam.token_ids) > 4 for search in searches for beam in search.beams.running)


@pytest.mark.parametrize(
    "params",
    [{"num_beams": 0}, {"num_beams": 11}, {"max_tokens": 0}, {"length_penalty": None}, {"early_stopping": "soon"}],
)
def test_bad_parameters(params: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        BeamSearchParams(**params)


def test_more_ends_of_sequence_allow_fewer_beams(reference: Reference) -> None:
    model = replace(read_model_config(reference.path, "float32", True), eos_token_ids=(1, 2, 3))
    engine = local_engine(EngineConfig(model=str(reference.path), num_blocks=100), reference.path, model)
    with pytest.raises(RequestError, match="num_beams=6 .* 1 to 5"):
        start_search(engine, "a", [5], BeamSearchParams(num_beams=6), print)

"""The seed's formulas: its published parameters and conclusions, and sums done by hand."""

from __future__ import annotations

import pytest

from nanopd.config.files import config_dir
from nanopd.messages import Route
from nanopd.routing.closed_form import ClosedForm
from nanopd.routing.cost_model import Parameters

R4090 = ClosedForm.of(Parameters.load(config_dir() / "params" / "8x4090.json"))
H20 = ClosedForm.of(Parameters.load(config_dir() / "params" / "8xh20.json"))


def test_parameters_are_the_seeds() -> None:
    assert ClosedForm(0.1247, 51.56, 16, 0.0869, 12.9, 147456) == R4090
    assert ClosedForm(0.1452, 33.10, 16, 0.1302, 392, 147456) == H20


@pytest.mark.parametrize(("machine", "ratio", "load"), [(R4090, 7.6, 3), (H20, 346, 1)])
def test_from_which_load_disaggregated_wins(machine: ClosedForm, ratio: float, load: int) -> None:
    assert machine.gamma / machine.transfer_rate == pytest.approx(ratio, rel=0.005)
    assert machine.winning_load() == load
    wins = [n for n in range(1, 64) if machine.gamma / machine.transfer_rate > machine.batch_thresh / n]
    assert wins == list(range(load, 64))


def test_sums_done_by_hand() -> None:
    # 1000 * 0.1247 + 51.56 * 128 and, at load 8, + 0.0869 * 1000 * 8 / 16; at 32 the step is 51.56 * 32 / 16
    assert R4090.collocated_ms(1000, 128, 0) == pytest.approx(6724.38)
    assert R4090.collocated_ms(1000, 128, 8) == pytest.approx(6767.83)
    assert R4090.collocated_ms(1000, 128, 32) == pytest.approx(124.7 + 103.12 * 128 + 86.9)
    # 147456 * 1000 bytes at 12.9 GB/s are 11.4307 ms
    assert R4090.disaggregated_ms(1000, 128, 15) == pytest.approx(124.7 + 11.4307 + 51.56 * 128)
    assert R4090.disaggregated_ms(1000, 128, 31) == pytest.approx(124.7 + 11.4307 + 103.12 * 128)


def test_choice_is_the_cheapest_route() -> None:
    routes = [Route(p, d) for p in range(2) for d in range(2)]
    loads = {0: 3, 1: 3}
    assert R4090.rank(routes, 1000, 128, loads.__getitem__)[0] == Route(0, 1)  # from load 3 on: moved
    loads = {0: 2, 1: 2}
    assert R4090.rank(routes, 1000, 128, loads.__getitem__)[0] == Route(0, 0)
    loads = {0: 40, 1: 0}
    assert R4090.rank(routes, 1000, 128, loads.__getitem__)[0] == Route(1, 1)

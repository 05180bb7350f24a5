"""From a configuration to its policy: the one place that makes policies and finds the parameters they predict with.

Parameters come from a file: the user's own, one that was measured on this machine, or a shipped one.
"""

from __future__ import annotations

from pathlib import Path

from nanopd.config import PREDICTING, EngineConfig, routes_for_policy
from nanopd.config.files import config_dir
from nanopd.errors import ConfigError
from nanopd.metrics import SLO
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.closed_form import ClosedFormPolicy
from nanopd.routing.cost_model import CostModel, Parameters
from nanopd.routing.length_predictor import LengthPredictor
from nanopd.routing.policy import FixedPolicy, Policy


def make_policy(
    config: EngineConfig, parameters: Parameters | None = None, adaptive: type[AdaptivePolicy] = AdaptivePolicy
) -> Policy:
    """The policy that `config` names; only the fixed ones do without `parameters`.

    Raises:
        ConfigError: `answer_lengths` lies in no directory, or is something else.
    """
    routes = routes_for_policy(config.policy, config.roles)
    if config.policy not in PREDICTING:
        return FixedPolicy(config.policy, routes)
    assert parameters is not None
    predictor = _predictor(config.answer_lengths)
    if config.policy == "closed_form":
        return ClosedFormPolicy(routes, parameters, predictor)
    slo = SLO(**(config.slo or {}))
    costs, max_chunk = CostModel(parameters), config.max_num_batched_tokens
    return adaptive(routes, len(config.workers), costs, max_chunk, slo, config.admission, predictor, config.roles)


def _predictor(path: str | None) -> LengthPredictor:
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError("answer_lengths", path, "a path in a directory that exists")
    return LengthPredictor.load(Path(path)) if path is not None and Path(path).exists() else LengthPredictor()


def keep_lengths(policy: Policy, path: str | None) -> None:
    """Save what a predicting policy has learned of answers' lengths, if there is a path for it."""
    if path is not None and isinstance(policy, (AdaptivePolicy, ClosedFormPolicy)):
        policy.predictor.save(Path(path))


def find_parameters(name: str | None, measured: Path | None = None) -> Parameters:
    """The file at the path `name`; else the one `measured` here, if there is one; else the shipped one of that name.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    shipped = config_dir() / "params"
    candidates = [measured] if measured is not None else []
    if name is not None:
        path, known = Path(name), shipped / f"{name}.json"
        candidates = [path] if path.is_file() else [*candidates, known] if known.is_file() else []
    for path in candidates:
        if path.is_file():
            return Parameters.load(path)
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.json")))
    how = "" if measured is None else "; null after `launch.py profile` with these devices and this model"
    raise ConfigError("params", name, f"a parameter file's path, or one of {names}{how}")

"""The examples: every one compiles, and the batch job goes on where its output ends."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_says_how_it_is_run(path: Path) -> None:
    assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


@pytest.mark.parametrize(
    ("before", "num_done"),
    [("", 0), ('{"line": 1}\n', 1), ('{"line": 1}\n{"line": 2}\n{"li', 2), ('{"line"', 0)],
)
def test_batch_job_goes_on_behind_the_last_whole_answer(tmp_path: Path, before: str, num_done: int) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(before, encoding="utf-8")
    answers = load_example("batch_job").Answers(path)
    assert answers.num_done == num_done
    for number, reason in enumerate(["length", "stop", "abort", "length"], 1):
        answers.write({"line": number, "finish_reason": reason})
    lines = [json.loads(line)["line"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == list(range(1, num_done + 3))  # what was cut short, and what came after it, is left to the next run

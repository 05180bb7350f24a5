"""The docs: the same sections in both languages, links that resolve, Python that compiles, every key's default, and
the same figures wherever they stand."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from nanopd.config import EngineConfig
from nanopd.messages import SamplingParams

DOCS = Path(__file__).parents[1] / "docs"
LANGUAGES = ("en", "zh")
PAGES = sorted(DOCS.glob("*/*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
each_language = pytest.mark.parametrize("language", LANGUAGES)


def heading_levels(page: Path) -> list[int]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


def tables_of_keys(language: str) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> default as the page writes it: of EngineConfig, and of SamplingParams, which has the last section."""
    text = (DOCS / language / "configuration.md").read_text(encoding="utf-8")
    engine, _, sampling = text.rpartition("\n## ")
    cells = (re.findall(r"^\| `(\w+)` \| [^|]+ \| `?([^|]+?)`? \|", part, re.MULTILINE) for part in (engine, sampling))
    return dict(next(cells)), dict(next(cells))


def numbers_of_tables(language: str) -> list[list[str]]:
    """The numbers in each row of the tables of performance.md."""
    text = (DOCS / language / "performance.md").read_text(encoding="utf-8")
    return [re.findall(r"\d[\d.]*", row) for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]


def references_of_bench() -> set[tuple[object, ...]]:
    """Floor and vLLM's figure of every row of bench/engine.py that has them."""
    tree = ast.parse((DOCS.parent / "bench" / "engine.py").read_text(encoding="utf-8"))
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    tables = [ast.literal_eval(named[f"{kind}_FLOORS"]) for kind in ("DECODE", "PREFILL", "OFFLINE")]
    count, length, *references = ast.literal_eval(named["MANY_PROMPTS"])
    return {(key, *pair) for table in tables for key, pair in table.items()} | {((count, length), *references)}


def test_both_languages_have_the_same_pages() -> None:
    english, chinese = ({page.name for page in (DOCS / language).iterdir()} for language in LANGUAGES)
    assert english == chinese
    assert len(english) >= 6


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.parent.name == "en"])
def test_both_languages_have_the_same_sections(name: str) -> None:
    levels = heading_levels(DOCS / "en" / name)
    assert len(levels) > 3
    assert levels == heading_levels(DOCS / "zh" / name)


def test_both_languages_give_the_same_figures() -> None:
    assert numbers_of_tables("en") == numbers_of_tables("zh")


@each_language
def test_floors_are_those_of_the_bench(language: str) -> None:
    text = (DOCS / language / "performance.md").read_text(encoding="utf-8")
    found = set()
    for name, cells in re.findall(r"^\| (?:decode step|prefill|offline), ([^|,]+) \|(.*)\|$", text, re.MULTILINE):
        key = tuple(map(int, re.findall(r"\d+", name)))
        floor, peer = (None if cell == "-" else float(cell) for cell in map(str.strip, cells.split("|")[-2:]))
        found.add((key if len(key) > 1 else key[0], floor, peer))
    assert found == references_of_bench()


@each_page
def test_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not broken


@each_page
def test_python_compiles(page: Path) -> None:
    for kind, code in FENCED.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            compile(code, str(page), "exec")


@each_language
def test_every_key_of_the_configuration_has_its_default(language: str) -> None:
    cells, _ = tables_of_keys(language)
    assert cells.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
    for field in dataclasses.fields(EngineConfig):
        if field.name == "model":
            assert cells["model"] == "-"
        else:
            config = EngineConfig(model="any", **{field.name: yaml.safe_load(cells[field.name])})
            assert getattr(config, field.name) == field.default, field.name


@each_language
def test_every_sampling_parameter_has_its_default(language: str) -> None:
    _, cells = tables_of_keys(language)
    assert cells.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    for field in dataclasses.fields(SamplingParams):
        assert ast.literal_eval(cells[field.name]) == field.default, field.name

"""The docs: the same sections in both languages, links that resolve, Python that compiles, every key's default."""

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


def test_both_languages_have_the_same_pages() -> None:
    english, chinese = ({page.name for page in (DOCS / language).iterdir()} for language in LANGUAGES)
    assert english == chinese
    assert len(english) >= 5


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.parent.name == "en"])
def test_both_languages_have_the_same_sections(name: str) -> None:
    levels = heading_levels(DOCS / "en" / name)
    assert len(levels) > 3
    assert levels == heading_levels(DOCS / "zh" / name)


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

"""The docs: the same sections in both languages, links that resolve, programs that run, examples that give what they
show, every key's default, and the same figures wherever they stand."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_chat_model import make_tiny_chat_model

import nanopd
from nanopd import LLM
from nanopd.config import EngineConfig
from nanopd.frontend import async_llm
from nanopd.request import SamplingParams

DOCS = Path(__file__).parents[1] / "docs"
LANGUAGES = ("en", "zh")
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_language = pytest.mark.parametrize("language", LANGUAGES)


def names_of_pages(language: str) -> list[str]:
    return sorted(str(page.relative_to(DOCS / language)) for page in (DOCS / language).rglob("*.md"))


def code_blocks(page: Path, kind: str) -> list[str]:
    return [code for name, code in FENCED.findall(page.read_text(encoding="utf-8")) if name == kind]


def headings(page: Path) -> list[tuple[str, str]]:
    """Marks and title of each."""
    return re.findall(r"^(#+) (.*)", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)


def heading_levels(page: Path) -> list[int]:
    return [len(marks) for marks, _ in headings(page)]


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(page)}


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
    """Floor and vLLM's figure of every row of bench/micro/engine.py that has them."""
    tree = ast.parse((DOCS.parent / "bench" / "micro" / "engine.py").read_text(encoding="utf-8"))
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    tables = [ast.literal_eval(named[f"{kind}_FLOORS"]) for kind in ("DECODE", "PREFILL", "OFFLINE")]
    count, length, *references = ast.literal_eval(named["MANY_PROMPTS"])
    return {(key, *pair) for table in tables for key, pair in table.items()} | {((count, length), *references)}


def test_both_languages_have_the_same_pages() -> None:
    assert names_of_pages("en") == names_of_pages("zh")
    assert len(names_of_pages("en")) >= 20


def test_both_languages_have_the_same_sections() -> None:
    for name in names_of_pages("en"):
        levels = heading_levels(DOCS / "en" / name)
        assert len(levels) > 3, name
        assert levels == heading_levels(DOCS / "zh" / name), name


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


def test_links_resolve() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
        for target, anchor in [link for link in links if "://" not in link[0]]:
            path = page.parent / target if target else page
            assert path.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page}: {target}#{anchor}"


def test_python_compiles() -> None:
    for page in PAGES:
        for code in code_blocks(page, "python"):
            compile(code, str(page), "exec")


@pytest.fixture(scope="module")
def one_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Whoever makes an LLM gets this one, of a tiny model and two workers."""
    model = make_tiny_chat_model(tmp_path_factory.mktemp("model"))
    with (
        LLM(str(model), workers=[{"count": 2}], policy="round_robin", num_blocks=200, max_num_seqs=8) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(llm, "shutdown", lambda: None)
        for module in (nanopd, async_llm):
            patch.setattr(module, "LLM", lambda *_args, **_settings: llm)
        yield llm


@pytest.mark.process
@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*/library.md"))], ids=str)
def test_programs_run(page: Path, one_llm: LLM) -> None:
    names = {"__name__": "__main__", "llm": one_llm}
    for code in code_blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def test_examples_give_what_they_show() -> None:
    for page in PAGES:
        session = "\n".join(code_blocks(page, "pycon"))
        examples = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
        assert not doctest.DocTestRunner().run(examples).failed, page


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


@each_language
def test_tables_of_the_configuration_are_those_of_the_code(language: str) -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"))
    text = (DOCS / language / "configuration.md").read_text(encoding="utf-8")
    assert generate["updated"](text, language) == text, "python docs/generate.py brings it up to date"

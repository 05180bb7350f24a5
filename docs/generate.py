"""Bring the tables of docs/*/configuration.md up to date: `python docs/generate.py`, where nanopd is installed.

Allowed values and defaults, in English the meanings too, come from the fields of EngineConfig and SamplingParams.
Which section a key stands in, and all other cells, are the page's own.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

from nanopd.config import EngineConfig
from nanopd.request import SamplingParams

PAGES = {language: Path(__file__).parent / language / "configuration.md" for language in ("en", "zh")}
CHINESE = {  # of what the rules say
    r"an integer from (.+) to ([\d^ -]*\d)": r"\1 到 \2 的整数",
    r"an integer >= (\d+)": r"不小于 \1 的整数",
    r"a finite number from (\S+) to (\S*\d)": r"\1 到 \2 的数",
    r"a finite number > 0 and <= (\d+)": r"大于 0、不超过 \1 的数",
    r"a finite number > 0": "大于 0 的数",
    r"a finite number >= (\d+)": r"不小于 \1 的数",
    r"a list, each ": "列表，每项为",
    r"a list of at most (\S+), each ": r"列表，至多 \1 项，每项为",
    r"a list of at least (\S+), each ": r"列表，至少 \1 项，每项为",
    r"a non-empty list of ": "非空列表，每项为 ",
    r"a mapping of token ids, each to ": "映射，键为 token id，值为 ",
    r"a mapping of (.+) to milliseconds": r"映射，键为 \1，值为毫秒数",
    r"a local directory, a hub id or a built-in name": "本地目录、hub id 或内置名字",
    r"a local directory or a hub id": "本地目录或 hub id",
    r"a shipped file's name, a path": "随包文件名、路径",
    r"a path": "路径",
    r"text, or 1 to (\d+) token ids": r"文本，或 1 到 \1 个 token id",
    r"a non-empty text": "非空文本",
    r"a function": "函数",
    r"(?<=[^\x00-\x7f]),? or ": "或 ",
    r",? or ": " 或 ",
}


def updated(page: str, language: str) -> str:
    """The text of a configuration page with the first cells of its tables as the code has them.

    Raises ValueError for a row without a field, or a field without a row.
    """
    engine, heading, sampling = page.rpartition("\n## ")
    return _updated(engine, EngineConfig, language) + heading + _updated(sampling, SamplingParams, language)


def _updated(part: str, cls: type, language: str) -> str:
    missing = {field.name: field for field in dataclasses.fields(cls)}

    def row(found: re.Match[str]) -> str:
        if found[1] not in missing:
            raise ValueError(f"{language}: {found[1]} is no field of {cls.__name__}, or has two rows")
        cells = _cells(missing.pop(found[1]), cls, language)
        others = [cell.strip() for cell in found[0].strip("|").split("|")][len(cells) :]
        return f"| {' | '.join([*cells, *others])} |"

    text = re.sub(r"^\| `(\w+)` \| .*\|$", row, part, flags=re.MULTILINE)
    if missing:
        raise ValueError(f"{language}: no row for {', '.join(missing)} of {cls.__name__}")
    return text


def _cells(field: dataclasses.Field, cls: type, language: str) -> list[str]:
    """Those of a row that the code knows."""
    allowed = re.sub(r"\d{10,}", lambda digits: f"2^{int(digits[0]).bit_length()} - 1", field.metadata["rule"].text)
    if cls is SamplingParams:
        allowed, default = allowed.replace("null", "None"), f"`{field.default!r}`"
    else:
        default = "-" if field.default is dataclasses.MISSING else f"`{_as_yaml(field.default)}`"
    cells = [f"`{field.name}`", allowed, default]
    if language == "en":
        return [*cells, field.metadata["meaning"]]
    for english, chinese in CHINESE.items():
        cells[1] = re.sub(english, chinese, cells[1])
    if re.search(r"\b(an?|of|each)\b", cells[1]):
        raise ValueError(f"CHINESE has no words for {allowed!r}")
    return cells


def _as_yaml(value: object) -> str:
    if isinstance(value, tuple):
        value = [{"device": worker.device, "role": worker.role.value} for worker in value]
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(updated(page.read_text(encoding="utf-8"), language), encoding="utf-8")

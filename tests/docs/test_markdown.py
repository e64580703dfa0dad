"""The pages as such: both READMEs say the same, links lead somewhere, generated parts are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import gen_docs
import pytest
from documents import READMES, ROOT, commands, pages, read, table, tables

ASCEND = ("docs/ascend.md", "docs/ascend_zh.md")
FOREIGN = {"Unsupported connector type: PDConnector", "PackageNotFoundError: vllm"}
"""Messages of vLLM's, not ours."""


def headings(text: str) -> list[str]:
    without_blocks = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ +(.*)$", without_blocks, re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if fragment:
            assert fragment in map(anchor, headings(path.read_text(encoding="utf-8"))), f"{page.name}: {target}"


def test_every_page_is_linked() -> None:
    linked = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    for page in (ROOT / "docs").glob("*.md"):
        assert f"({page.name}" in linked or f"(docs/{page.name}" in linked, page.name
    for page in (ROOT / "docs" / "adr").glob("*.md"):
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", page.name)


@pytest.mark.parametrize("name", gen_docs.PAGES)
def test_generated_parts_are_up_to_date(name: str) -> None:
    text = read(name)
    assert "<!-- generated: " in text
    assert gen_docs.regenerate(text) == text, "run scripts/gen_docs.py"


def test_an_outdated_part_is_noticed() -> None:
    text = read("docs/wire_protocol.md")
    outdated = text.replace("held --> ended : expired\n", "")
    assert outdated != text
    assert gen_docs.regenerate(outdated) == text


def test_all_three_machines_are_drawn() -> None:
    for name in ("lease", "session", "transfer"):
        assert f"<!-- generated: {name} -->" in read("docs/wire_protocol.md")


@pytest.mark.parametrize("name", READMES)
def test_readme_contains_the_example(name: str) -> None:
    assert f"```python\n{read('examples/custom_engine.py')}```" in read(name)


def test_readmes_have_the_same_headings_commands_and_tables() -> None:
    english, chinese = (read(name) for name in READMES)
    assert len(headings(english)) == len(headings(chinese))
    ours, theirs = ([command.text for command in commands() if command.page == name] for name in READMES)
    assert ours == theirs
    links = [re.findall(r"\]\((docs/[^)]*)\)", text) for text in (english, chinese)]
    assert links[0] == [link.replace("_zh.md", ".md") for link in links[1]], (
        "a page that has a Chinese twin is that one"
    )
    rows = [table(text, heading) for text, heading in ((english, "Troubleshooting"), (chinese, "故障排查"))]
    assert [next(iter(row.values())) for row in rows[0]] == [next(iter(row.values())) for row in rows[1]]


def blocks(text: str) -> list[str]:
    return re.findall(r"^ *```.*?^ *```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_pages_about_ascend_have_the_same_blocks_headings_and_tables() -> None:
    english, chinese = (read(name) for name in ASCEND)
    assert blocks(english) == blocks(chinese)
    assert re.findall(r"^#+ ", english, re.MULTILINE) == re.findall(r"^#+ ", chinese, re.MULTILINE)
    ours, theirs = tables(english), tables(chinese)
    assert [[next(iter(row.values())) for row in rows] for rows in ours] == [
        [next(iter(row.values())) for row in rows] for rows in theirs
    ]
    items = [len(re.findall(r"^(?:-|\d\.) ", text, re.MULTILINE)) for text in (english, chinese)]
    assert items[0] == items[1]


@pytest.mark.parametrize(
    ("name", "words"), [(ASCEND[0], "has run any of this on an NPU"), (ASCEND[1], "从未在 NPU 上运行过")]
)
def test_the_pages_about_ascend_begin_with_what_was_not_run(name: str, words: str) -> None:
    assert words in read(name).splitlines()[2]


@pytest.mark.parametrize("name", ASCEND)
def test_statuses_of_hixl_are_those_of_the_source(name: str) -> None:
    numbers = dict(re.findall(r"^ +(HIXL_[A-Z_]+) = (\d+),", read("csrc/hixl.h"), re.MULTILINE))
    words = re.findall(r'case (HIXL_[A-Z_]+): words = "(.*)"; break;', read("csrc/hixl_engine.c"))
    told = [{numbers[status]: text} for status, text in words]
    assert len(told) > 5
    (rows,) = (rows for rows in tables(read(name)) if any("503900" in row.values() for row in rows))
    assert [dict([list(row.values())[:2]]) for row in rows] == told
    assert all(list(row.values())[2] for row in rows)


def test_quoted_messages_exist() -> None:
    paths = [*(ROOT / "pd_connector").rglob("*.py"), *(ROOT / "csrc").glob("*.c")]
    source = "\n".join(path.read_text() for path in paths)
    for row in table(read("README.md"), "Troubleshooting"):
        assert row["You see"] in FOREIGN or row["You see"] in source, row["You see"]

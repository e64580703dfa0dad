"""The pages as such: both READMEs say the same, links lead somewhere, generated parts are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import gen_docs
import pytest
from documents import READMES, ROOT, commands, pages, read, table

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
    assert links[0] == links[1]
    rows = [table(text, heading) for text, heading in ((english, "Troubleshooting"), (chinese, "故障排查"))]
    assert [next(iter(row.values())) for row in rows[0]] == [next(iter(row.values())) for row in rows[1]]


def test_quoted_messages_exist() -> None:
    paths = [*(ROOT / "pd_connector").rglob("*.py"), *(ROOT / "csrc").glob("*.c")]
    source = "\n".join(path.read_text() for path in paths)
    for row in table(read("README.md"), "Troubleshooting"):
        assert row["You see"] in FOREIGN or row["You see"] in source, row["You see"]

"""Write the generated parts of the documents: state diagrams out of the transition tables, the example in the READMEs.

    python scripts/gen_docs.py

A part lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; everything outside is written by people.
tests/docs checks that running this would change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pd_connector.protocol import lease, session, transfer

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "README_zh.md", "docs/wire_protocol.md")
EXAMPLE = "examples/custom_engine.py"
_PART = re.compile(r"(<!-- generated: ([a-z]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def diagram(states: type[StrEnum], transitions: Mapping[tuple[Any, Any], Any]) -> str:
    """A mermaid state diagram. The first state is where every machine starts, one without a way out is an end."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(states))}"]
    # A second colon would end mermaid's label.
    lines += [
        f"    {before} --> {after} : {str(what).replace(':', '')}" for (before, what), after in transitions.items()
    ]
    lines += [f"    {state} --> [*]" for state in states if all(before is not state for before, _ in transitions)]
    return "\n".join([*lines, "```", ""])


def part(name: str, root: Path = ROOT) -> str:
    """The text of one generated part."""
    match name:
        case "lease":
            return diagram(lease.LeaseState, lease.TRANSITIONS)
        case "session":
            return diagram(session.SessionState, session.TRANSITIONS)
        case "transfer":
            return diagram(transfer.TransferState, transfer.TRANSITIONS)
        case "example":
            return f"```python\n{(root / EXAMPLE).read_text(encoding='utf-8')}```\n"
    raise ValueError(f"nothing is generated under the name {name!r}")


def regenerate(text: str, root: Path = ROOT) -> str:
    """A page with all its generated parts made anew."""
    return _PART.sub(lambda found: found[1] + part(found[2], root) + found[4], text)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = regenerate(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name} changed")


if __name__ == "__main__":
    main()

"""What this repository's files may not contain. Each check takes a repository root and returns its findings in words.

tests/unit/test_tidy.py runs every check on this repository, and on planted files that each must object to.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
CODE_SUFFIXES = {".py", ".c", ".cc", ".h"}
# Modules and calls that run data as code.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}
ENVIRONMENT_READERS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
CONFIG = "pd_connector/config.py"
README_PAIR = ("README.md", "README_zh.md")
# Spelled so that this file does not find itself.
UNFINISHED = re.compile(r"\b(?:TO(?:)DO|FIX(?:)ME|X{3})\b")
MACHINE_PATH = re.compile(r"(?<![\w.~)}\]*-])/(?:work/|root/|tmp/|home/\w|Users/\w|opt/(?:wheels|pypi))")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|debian\.org|npmjs\.(?:com|org)")


def tracked(root: Path) -> list[str]:
    """The files git knows below root that are still there, as sorted relative paths."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, timeout=30, text=True)
    return sorted(name for name in listed.stdout.split("\0") if name and (root / name).is_file())


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Name and content of every tracked text file; what is not UTF-8 is data and not ours to read."""
    for name in tracked(root):
        try:
            yield name, (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for name, text in texts(root):
        if name.endswith(".py"):
            yield name, ast.parse(text, filename=name)


def long_files(root: Path) -> list[str]:
    counts = ((name, len(text.splitlines())) for name, text in texts(root) if Path(name).suffix in CODE_SUFFIXES)
    return [f"{name}: {count} lines, at most {MAX_FILE_LINES}" for name, count in counts if count > MAX_FILE_LINES]


def long_functions(root: Path) -> list[str]:
    """Python functions over the limit; in C the limit on the file has to do."""
    found = []
    for name, tree in trees(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno}: {node.name} has {count} lines, at most {MAX_FUNCTION_LINES}")
    return found


def _imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement mentions; the module and, for `from` imports, module.name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def unsafe_code(root: Path) -> list[str]:
    """Imports and calls through which input could become code: pickle and its kin, eval, exec, yaml.load."""
    found = []
    for name, tree in trees(root):
        for node in ast.walk(tree):
            modules = [module for module in _imported(node) if module.split(".")[0] in UNSAFE_MODULES]
            found += [f"{name}:{node.lineno}: imports {module}" for module in modules[:1]]  # type: ignore[attr-defined]
            match node:
                case ast.Call(func=ast.Name(id=called)) if called in UNSAFE_CALLS:
                    found.append(f"{name}:{node.lineno}: calls {called}")
                case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load")):
                    found.append(f"{name}:{node.lineno}: calls yaml.load, use yaml.safe_load")
    return found


def _matches(root: Path, pattern: re.Pattern[str], what: str) -> list[str]:
    found = []
    for name, text in texts(root):
        for number, line in enumerate(text.splitlines(), 1):
            if hit := pattern.search(line):
                found.append(f"{name}:{number}: {what} {hit.group()!r}")
    return found


def unfinished_marks(root: Path) -> list[str]:
    return _matches(root, UNFINISHED, "unfinished work is an issue, not a comment:")


def machine_paths(root: Path) -> list[str]:
    return _matches(root, MACHINE_PATH, "a path of one machine:")


def registry_hosts(root: Path) -> list[str]:
    return _matches(root, REGISTRY_HOST, "a package registry's host, which is the user's choice:")


def tabs(root: Path) -> list[str]:
    return [f"{name}: contains a tab" for name, text in texts(root) if name.endswith(".py") and "\t" in text]


def _heading_levels(text: str) -> list[int]:
    levels, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and (heading := re.match(r"(#+) ", line)):
            levels.append(len(heading.group(1)))
    return levels


def readme_headings(root: Path) -> list[str]:
    """Both READMEs, where there are two, have the same sequence of heading levels."""
    if not all((root / name).is_file() for name in README_PAIR):
        return []
    ours, theirs = (_heading_levels((root / name).read_text(encoding="utf-8")) for name in README_PAIR)
    return [] if ours == theirs else [f"{' and '.join(README_PAIR)}: heading levels differ: {ours} and {theirs}"]


def _defined(tree: ast.Module) -> set[str]:
    """Names bound at the top level of a module."""
    names = set()
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
    return names


def dangling_entry_points(root: Path) -> list[str]:
    """Entry points of pyproject.toml whose module file, or the name in it, is not there."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    groups = {"scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    found = []
    for group, points in groups.items():
        for point, target in points.items():
            module, _, name = target.partition(":")
            path = root / module.replace(".", "/")
            files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
            if not files:
                found.append(f"pyproject.toml: {group} {point}: no module {module}")
            elif name not in _defined(ast.parse(files[0].read_text(encoding="utf-8"))):
                found.append(f"pyproject.toml: {group} {point}: {module} does not define {name}")
    return found


def environment_reads(root: Path) -> list[str]:
    """Uses of the process environment in the package outside its one reader; processes get theirs from it too."""
    found = []
    for name, tree in trees(root):
        if not name.startswith("pd_connector/") or name == CONFIG:
            continue
        for node in ast.walk(tree):
            used = [module for module in _imported(node) if module.removeprefix("os.") in ENVIRONMENT_READERS]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                used += [f"os.{node.attr}"] if node.attr in ENVIRONMENT_READERS else []
            found += [f"{name}:{node.lineno}: {use} belongs in {CONFIG}" for use in used]  # type: ignore[attr-defined]
    return found


CHECKS = [
    long_files,
    long_functions,
    unsafe_code,
    unfinished_marks,
    machine_paths,
    registry_hosts,
    tabs,
    readme_headings,
    dangling_entry_points,
    environment_reads,
]

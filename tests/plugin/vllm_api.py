"""What a vLLM of some version offers and asks for, read from its sources; and what of ours does not fit, in words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_CONNECTOR = re.compile(r"(^|[.])(kv_)?connector(_cls)?$|get_kv_transfer_group\(\)$")
"""Expressions that vLLM's own code calls a connector by; an "ec_connector" moves something else."""
_CALLERS = ("v1", "distributed/kv_transfer", "model_executor/layers/attention", "config", "entrypoints")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


class Api:
    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)

    def names(self, module: str) -> set[str]:
        """Everything that can be imported from a module."""
        path = self.path(module)
        if path is None:
            return set()
        found = set(_top_names(parsed(path).body))
        if path.name == "__init__.py":
            found |= {each.stem for each in path.parent.glob("*.py")}
            found |= {each.parent.name for each in path.parent.glob("*/__init__.py")}
        for node in _statements(parsed(path).body):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                found |= self.names(_absolute(node, module, path))
        return found

    def class_of(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """A class and the module that defines it, following imports."""
        path = self.path(module)
        for node in _statements(parsed(path).body) if path is not None else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if path is not None and isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name or alias.name == "*":
                        found = self.class_of(_absolute(node, module, path), name if alias.name == "*" else alias.name)
                        if found is not None:
                            return found
        return None

    def members(self, module: str, name: str) -> set[str]:
        """Attributes of a class and its instances, inherited ones included."""
        found = self.class_of(module, name)
        if found is None:
            return set()
        module, node = found
        out = set(_top_names(node.body)) | {"__class__", "__init__"}
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
                out |= {each.attr} if isinstance(each.value, ast.Name) and each.value.id == "self" else set()
        for base in node.bases:
            text = ast.unparse(base).split("[")[0]
            out |= self.members(module, text.split(".")[-1])
        return out

    def callers(self) -> Iterator[tuple[str, ast.Call, str]]:
        """(place, call, method) of every call of a connector in vLLM itself, its connectors aside."""
        for part in _CALLERS:
            for path in sorted((self.root / "vllm" / part).rglob("*.py")):
                if "kv_connector/v1" in path.as_posix() or "onnector" not in path.read_text(encoding="utf-8"):
                    continue
                for node in ast.walk(parsed(path)):
                    match node:
                        case ast.Call(func=ast.Attribute(value=value, attr=method)):
                            if _CONNECTOR.search(ast.unparse(value)):
                                yield f"{path.relative_to(self.root)}:{node.lineno}", node, method


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those under conditions included."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, inner, ()))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _top_names(body: Iterable[ast.stmt]) -> Iterator[str]:
    for node in _statements(body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name).split(".")[0] for alias in names)
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") + ([""] if path.name == "__init__.py" else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


# --- a class of ours beside its base ----------------------------------------------------------------------------------


def methods(node: ast.ClassDef) -> dict[str, Function]:
    return {each.name: each for each in node.body if isinstance(each, Function)}


def abstract(function: Function) -> bool:
    return any(ast.unparse(each).split(".")[-1] == "abstractmethod" for each in function.decorator_list)


def _kind(function: Function) -> str:
    kinds = {"classmethod", "staticmethod", "property"}
    return next((name for each in function.decorator_list if (name := ast.unparse(each)) in kinds), "method")


def misfits(base: ast.ClassDef, ours: ast.ClassDef) -> list[str]:
    """Abstract methods that ours lacks, and methods that cannot be called as those of the base can."""
    mine, out = methods(ours), []
    for name, wanted in methods(base).items():
        if name not in mine:
            if abstract(wanted):
                out.append(f"{name} is abstract and not implemented")
            continue
        if _kind(wanted) != _kind(mine[name]):
            out.append(f"{name} is a {_kind(wanted)}, ours a {_kind(mine[name])}")
        out += [f"{name}: {line}" for line in _differences(wanted.args, mine[name].args)]
    return out


def _differences(wanted: ast.arguments, mine: ast.arguments) -> Iterator[str]:
    theirs, ours = [*wanted.posonlyargs, *wanted.args], [*mine.posonlyargs, *mine.args]
    for place, each in enumerate(theirs[1:], 1):
        if place >= len(ours):
            if mine.vararg is None or mine.kwarg is None:
                yield f"lacks argument {each.arg!r}"
        elif ours[place].arg != each.arg:
            yield f"argument {place} is {each.arg!r}, ours {ours[place].arg!r}"
        elif place >= len(theirs) - len(wanted.defaults) and place < len(ours) - len(mine.defaults):
            yield f"argument {each.arg!r} has a default, ours none"
    for place in range(len(theirs), len(ours) - len(mine.defaults)):
        yield f"wants {ours[place].arg!r} in addition"
    for one, default in zip(mine.kwonlyargs, mine.kw_defaults, strict=True):
        if default is None and one.arg not in {each.arg for each in wanted.kwonlyargs}:
            yield f"wants {one.arg!r} in addition"
    if mine.kwarg is None:
        known = {each.arg for each in (*ours, *mine.kwonlyargs)}
        yield from (f"lacks argument {each.arg!r}" for each in wanted.kwonlyargs if each.arg not in known)
    for star, theirs_of, ours_of in (("*", wanted.vararg, mine.vararg), ("**", wanted.kwarg, mine.kwarg)):
        if theirs_of is not None and ours_of is None:
            yield f"lacks {star}{theirs_of.arg}"


def uncallable(api: Api, base: ast.ClassDef, ours: ast.ClassDef) -> tuple[int, list[str]]:
    """How many calls vLLM makes of what ours overrides, and those that it could not make."""
    mine, known, out, count = methods(ours), methods(base), [], 0
    for place, call, name in api.callers():
        if name not in mine or name not in known:
            continue
        count += 1
        arguments = mine[name].args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        if _kind(mine[name]) != "staticmethod":
            names = names[1:]
        given = {each.arg for each in call.keywords if each.arg is not None}
        spread = any(isinstance(each, ast.Starred) for each in call.args) or len(given) < len(call.keywords)
        needed = set(names[: len(names) - len(arguments.defaults)][len(call.args) :])
        if arguments.vararg is None and len(call.args) > len(names):
            out.append(f"{place}: {name} is called with {len(call.args)} arguments, ours takes {len(names)}")
        if arguments.kwarg is None and (odd := given - set(names[len(call.args) :])):
            out.append(f"{place}: {name} is called with {', '.join(sorted(odd))}, which ours does not take")
        if not spread and (missing := needed - given):
            out.append(f"{place}: {name} is called without {', '.join(sorted(missing))}")
    return count, out

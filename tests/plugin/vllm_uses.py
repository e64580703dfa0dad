"""What our plugin uses of vLLM, imports and attributes of what it imports or is handed; and what of it is missing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .vllm_api import Api, Function, parsed

_SCHED = "vllm.v1.core.sched.output"
_HANDED = {
    "request": ("vllm.v1.request", "Request"),
    "cached": (_SCHED, "CachedRequestData"),
    "new": (_SCHED, "NewRequestData"),
    "vllm_config": ("vllm.config", "VllmConfig"),
    "parallel_config": ("vllm.config", "ParallelConfig"),
    "parallel": ("vllm.config", "ParallelConfig"),
    "model_config": ("vllm.config", "ModelConfig"),
    "transfer": ("vllm.config", "KVTransferConfig"),
    "vllm_config.kv_transfer_config": ("vllm.config", "KVTransferConfig"),
    "vllm_config.parallel_config": ("vllm.config", "ParallelConfig"),
    "vllm_config.model_config": ("vllm.config", "ModelConfig"),
    "vllm_config.compilation_config": ("vllm.config", "CompilationConfig"),
    "self._vllm_config.kv_transfer_config": ("vllm.config", "KVTransferConfig"),
    "kv_cache_config": ("vllm.v1.kv_cache_interface", "KVCacheConfig"),
    "group": ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec"),
    "blocks": ("vllm.v1.core.kv_cache_manager", "KVCacheBlocks"),
    "spec": ("vllm.v1.kv_cache_interface", "AttentionSpec"),
    "output": (_SCHED, "SchedulerOutput"),
}
"""Expressions of the plugin that stand for an object of vLLM, and its class."""
_ELSEWHERE = {
    ("scheduler.py", "workers_reported", "output"): ("vllm.v1.outputs", "KVConnectorOutput"),
    ("metrics.py", "*", "transfer"): None,
    ("worker.py", "*", "transfer"): None,
    ("worker.py", "*", "blocks"): None,
    ("streams.py", "*", "blocks"): None,
}
"""The same names where they mean something else; None: nothing of vLLM."""


@dataclass(frozen=True)
class Import:
    place: str
    module: str
    name: str
    bound: str
    guarded: bool
    """Within a try that lives without it."""


def imports(path: Path) -> Iterator[Import]:
    tree = parsed(path)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any(_catches(each) for each in node.handlers)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and not node.level:
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(f"{path.name}:{node.lineno}", node.module or "", alias.name, bound, id(node) in guarded)


def _catches(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in ("ImportError", "ModuleNotFoundError", "Exception")


def missing_imports(api: Api, plugin: Path) -> tuple[list[str], list[str]]:
    """(what cannot be imported and is needed, what cannot and need not)."""
    needed: list[str] = []
    optional: list[str] = []
    for path in sorted(plugin.glob("*.py")):
        for each in imports(path):
            if each.name not in api.names(each.module):
                (optional if each.guarded else needed).append(f"{each.place}: {each.name} of {each.module}")
    return needed, optional


def missing_attributes(api: Api, plugin: Path) -> tuple[int, list[str]]:
    """How many attributes of vLLM's modules, classes and objects are used unconditionally, and those that do not
    exist. One that its function, or for an imported name any function of the file, first looks for is a feature check.
    """
    count, out = 0, []
    for path in sorted(plugin.glob("*.py")):
        bound = {each.bound: each for each in imports(path)}
        looked = _looked_for(parsed(path))
        for function in [each for each in ast.walk(parsed(path)) if isinstance(each, Function)]:
            here = _looked_for(function)
            for node in ast.walk(function):
                if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                    continue
                value = ast.unparse(node.value)
                if (imported := bound.get(value)) is not None:
                    known, checked = _of_import(api, imported), looked.get(value, set())
                elif (where := _class_of(path.name, function.name, value)) is not None:
                    known, checked = api.members(*where), here.get(value, set())
                    # The other branch of a check is what older or newer versions have instead.
                    checked = {node.attr} if checked and node.attr not in known else checked
                else:
                    continue
                count += 1
                if node.attr not in known and node.attr not in checked:
                    out.append(f"{path.name}:{node.lineno}: {value}.{node.attr} in {function.name}")
    return count, sorted(set(out))


def _class_of(file: str, function: str, value: str) -> tuple[str, str] | None:
    for key in ((file, function, value), (file, "*", value)):
        if key in _ELSEWHERE:
            return _ELSEWHERE[key]
    return _HANDED.get(value)


def _of_import(api: Api, each: Import) -> set[str]:
    """Attributes of what was imported: a module, a class, or an object that vLLM made."""
    if api.path(f"{each.module}.{each.name}") is not None:
        return api.names(f"{each.module}.{each.name}")
    if each.name == "current_platform":
        return api.members("vllm.platforms.interface", "Platform")
    return api.members(each.module, each.name)


def _looked_for(tree: ast.AST) -> dict[str, set[str]]:
    """Per expression the attributes that a function asks after."""
    out: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                out.setdefault(ast.unparse(value), set()).add(name)
    return out

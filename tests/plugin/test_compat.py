"""The plugin beside the sources of other vLLM versions: base classes, calls, what we import and use of them.

The sources come from the package index (see vllm_sources.py) and are kept under build/; without either, all but the
controls are skipped.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from . import vllm_sources
from .vllm_api import Api, methods, misfits, parsed, uncallable
from .vllm_uses import imports, missing_attributes, missing_imports

VERSIONS = ("0.23.0", "0.32.0", "0.33.0")
OLDEST = VERSIONS[0]
ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "pd_connector" / "vllm_plugin"
KV = "vllm.distributed.kv_transfer.kv_connector"
BASE = f"{KV}.v1.base"


def sources(version: str) -> Path:
    try:
        return vllm_sources.sources(version)
    except vllm_sources.Unavailable as reason:
        pytest.skip(f"COMPATIBILITY WITH vLLM {version} IS NOT CHECKED: {reason}")


@pytest.fixture(params=VERSIONS)
def api(request: pytest.FixtureRequest) -> Api:
    return Api(sources(request.param))


def class_of(path: Path, name: str) -> ast.ClassDef:
    return next(node for node in parsed(path).body if isinstance(node, ast.ClassDef) and node.name == name)


def subclasses() -> list[tuple[Path, str, str, str]]:
    """(file, class, module and name of its base) of ours that derive from one of vLLM's."""
    found = []
    for path in sorted(PLUGIN.glob("*.py")):
        bound = {each.bound: each for each in imports(path)}
        for node in parsed(path).body:
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if (each := bound.get(ast.unparse(base))) is not None:
                    found.append((path, node.name, each.module, each.name))
    return found


def test_every_class_fits_its_base(api: Api) -> None:
    ours = subclasses()
    assert {name for _, name, _, _ in ours} >= {"PDConnector", "PDStats", "PDPromMetrics", "Handshake", "StepOrders"}
    for path, name, module, base in ours:
        found = api.class_of(module, base)
        assert found is not None, f"{base} of {module} is gone"
        assert misfits(found[1], class_of(path, name)) == [], name


def test_every_class_for_several_groups_fits_its_base(api: Api) -> None:
    """compat.hybrid_bases: only where vLLM can be told that a load of several groups failed."""
    found = api.class_of(BASE, "SupportsHMA")
    assert found is not None
    assert misfits(found[1], class_of(PLUGIN / "connector.py", "PDConnector")) == []


def test_every_call_that_vllm_makes_is_understood(api: Api) -> None:
    found = api.class_of(BASE, "KVConnectorBase_V1")
    assert found is not None
    calls, problems = uncallable(api, found[1], class_of(PLUGIN / "connector.py", "PDConnector"))
    assert problems == []
    assert calls >= 25  # how vLLM calls its connectors has changed beyond recognition


def test_results_have_the_fields_that_are_filled_in(api: Api) -> None:
    assert api.members("vllm.v1.outputs", "KVConnectorOutput") >= {
        "finished_sending", "finished_recving", "invalid_block_ids", "kv_connector_stats",
    }  # fmt: skip
    wanted = {"finished_sending", "finished_recving", "failed_recving"}
    found = api.class_of(BASE, "KVConnectorBase_V1")
    assert found is not None
    asked = "get_transfer_results" in methods(found[1])
    assert asked == bool(api.class_of(BASE, "KVConnectorTransferResults"))
    assert not asked or api.members(BASE, "KVConnectorTransferResults") >= wanted


def test_the_factory_takes_our_registration(api: Api) -> None:
    found = api.class_of(f"{KV}.factory", "KVConnectorFactory")
    assert found is not None
    register = methods(found[1])["register_connector"]
    assert [each.arg for each in register.args.args][1:] == ["name", "module_path", "class_name"]
    assert "_registry" in api.members(f"{KV}.factory", "KVConnectorFactory")


def test_everything_imported_and_used_is_there(api: Api) -> None:
    needed, _ = missing_imports(api, PLUGIN)
    assert needed == []
    count, missing = missing_attributes(api, PLUGIN)
    assert missing == []
    assert count > 100  # the names by which the plugin calls vLLM's objects have changed: see vllm_uses.py


# --- the oldest version at run time -----------------------------------------------------------------------------------

_STANDIN = """
import sys
import types


class Standin(types.ModuleType):
    __file__, __path__ = "standin", []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# What vLLM 0.23 imports of other packages and newer versions do not; nothing of vLLM itself is made up.
for name in ("gguf", "gguf.constants", "gguf.quants"):
    sys.modules[name] = Standin(name)
"""
_ASK = """
import json
import torch
from vllm import version
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput
from pd_connector import vllm_plugin
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.metadata import StepOrders
from pd_connector.vllm_plugin.metrics import PDStats

vllm_plugin.register()
vllm_plugin.register()
found = KVConnectorFactory.get_connector_class_by_name("PDConnector")
heads = dict(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
specs = [
    FullAttentionSpec(**heads), MLAAttentionSpec(**{**heads, "num_kv_heads": 1}),
    SlidingWindowSpec(**heads, sliding_window=64), MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,)),
]
cached = CachedRequestData.make_empty()
cached.req_ids = ["a"]
print(json.dumps({
    "where": version.__file__,
    "class": found.__name__,
    "abstract": sorted(found.__abstractmethods__),
    "groups": len(compat.hybrid_bases()),
    "state": [compat.is_state(spec) for spec in specs],
    "latent": [compat.is_latent(spec) for spec in specs],
    "forgets": [compat.forgets(spec) for spec in specs],
    "resumed": sorted(compat.resumed_requests(cached)),
    "transfer": list(compat.transfer_groups(KVCacheConfig(1, [], []))),
    "stats": PDStats.of().is_empty(),
    "orders": isinstance(StepOrders(), object),
    "output": KVConnectorOutput().is_empty(),
}))
"""


@pytest.mark.timeout(300)
def test_the_plugin_runs_beside_the_oldest_version() -> None:
    """Its real modules, with torch and the packages that are installed here; what it needs of its C code is not there.
    The newest version that is tested like this is the installed one, with which all other tests of the plugin run."""
    tree = sources(OLDEST)
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", _STANDIN + _ASK], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("where").startswith(str(tree))
    assert answer == {
        "class": "PDConnector",
        "abstract": [],
        "groups": 0,  # it cannot be told of failed loads of several groups, and so makes one
        "state": [False, False, False, True],
        "latent": [False, True, False, False],
        "forgets": [False, False, True, False],
        "resumed": [],
        "transfer": [],
        "stats": True,
        "orders": True,
        "output": True,
    }


# --- controls: every check can fail -----------------------------------------------------------------------------------


def one_class(text: str) -> ast.ClassDef:
    (node,) = ast.parse(textwrap.dedent(text)).body
    assert isinstance(node, ast.ClassDef)
    return node


WANTED = """
class Base:
    @abstractmethod
    def load(self, request, count=1, **kwargs): ...
    @classmethod
    def build(cls, data=None): ...
    def save(self, request, *, layer): ...
"""
GOOD = """
class Ours:
    def load(self, request, count=1, **kwargs): ...
    @classmethod
    def build(cls, data=None): ...
    def save(self, request, *, layer, more=None): ...
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def load", "def load_it", "load is abstract and not implemented"),
        ("request, count", "requests, count", "load: argument 1 is 'request', ours 'requests'"),
        ("count=1", "count", "load: argument 'count' has a default, ours none"),
        (", count=1", "", "load: lacks argument 'count'"),
        (", **kwargs", "", "load: lacks **kwargs"),
        ("@classmethod", "", "build is a classmethod, ours a method"),
        ("layer, more=None", "more", "save: wants 'more' in addition"),
        ("layer, more=None", "more=None", "save: lacks argument 'layer'"),
        ("request, *, layer", "request, now, *, layer", "save: wants 'now' in addition"),
    ],
)
def test_a_misfit_is_found(old: str, new: str, words: str) -> None:
    assert misfits(one_class(WANTED), one_class(GOOD)) == []
    assert words in misfits(one_class(WANTED), one_class(GOOD.replace(old, new, 1)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("load(request, 3, now=1)", None),
        ("save(request, layer=1)", None),
        ("save(request)", "save is called without layer"),
        ("save(request, 1, 2)", "save is called with 3 arguments, ours takes 2"),
        ("save(request, layer=1, now=2)", "save is called with now, which ours does not take"),
    ],
)
def test_a_call_that_is_not_understood_is_found(tmp_path: Path, call: str, words: str | None) -> None:
    write(tmp_path / "vllm/v1/scheduler.py", f"def step(self, request):\n    self.connector.{call}\n")
    ours = one_class(GOOD.replace("*, layer, more=None", "layer"))
    count, problems = uncallable(Api(tmp_path), one_class(WANTED), ours)
    assert count == 1
    assert [line.split(": ", 1)[1] for line in problems] == ([words] if words else [])


FAKE_VLLM = """
import os
if os.name == "posix":
    class Request:
        limit: int
        def __init__(self):
            self.name = ""
"""
USER = """
from vllm.v1.request import Request
from vllm.v1 import request as module


def name(request):
    return request.name, request.limit, Request.limit, module.Request
"""


@pytest.mark.parametrize(
    ("old", "new", "imported", "used"),
    [
        ("", "", 0, 0),
        ("import Request", "import Request, Gone", 1, 0),
        ("vllm.v1.request", "vllm.v2.request", 1, 1),
        ("request.name", "request.title", 0, 1),
        ("request.name", "getattr(request, 'title', 1)", 0, 0),
        ("Request.limit", "Request.bound", 0, 1),
        ("module.Request", "module.Gone", 0, 1),
        ("module.Request", "module.Gone if hasattr(module, 'Gone') else 1", 0, 0),
    ],
)
def test_what_is_not_there_is_found(tmp_path: Path, old: str, new: str, imported: int, used: int) -> None:
    for package in ("vllm", "vllm/v1"):
        write(tmp_path / package / "__init__.py", "")
    write(tmp_path / "vllm/v1/request.py", FAKE_VLLM)
    write(tmp_path / "plugin/user.py", USER.replace(old, new, 1))
    api = Api(tmp_path)
    needed, optional = missing_imports(api, tmp_path / "plugin")
    assert (len(needed), optional) == (imported, [])
    count, missing = missing_attributes(api, tmp_path / "plugin")
    assert len(missing) == used
    assert count >= 3


def test_an_import_that_can_be_done_without_is_told_apart(tmp_path: Path) -> None:
    text = "try:\n    from vllm.gone import a\nexcept ImportError:\n    from vllm.also_gone import a\n"
    write(tmp_path / "user.py", text)
    needed, optional = missing_imports(Api(tmp_path), tmp_path)
    assert needed == ["user.py:4: a of vllm.also_gone"]
    assert optional == ["user.py:2: a of vllm.gone"]


def test_the_oldest_version_lacks_what_the_feature_checks_are_for() -> None:
    """Else the checks above would prove nothing about them."""
    old, new = Api(sources(OLDEST)), Api(sources(VERSIONS[-1]))
    for name in ("KVConnectorTransferResults",):
        assert name not in old.names(BASE)
        assert name in new.names(BASE)
    assert "transfer_group_ids" not in old.members("vllm.v1.kv_cache_interface", "KVCacheConfig")

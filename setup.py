"""The optional C extension; everything else about the package is in pyproject.toml.

PD_NATIVE says what to do about it: `require` fails where it cannot be built, `off` builds a pure Python package, and
`auto` (default) builds it where it can be and a pure Python package where it cannot.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = os.environ.get("PD_NATIVE", "auto")
if NATIVE not in ("auto", "require", "off"):
    raise SystemExit(f"PD_NATIVE={NATIVE!r} is unknown: use auto, require or off")
FLAGS = ["-std=c11", "-O3", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fvisibility=hidden", "-pthread"]


class BuildNative(build_ext):
    """A failed build of an `auto` package leaves it pure Python, and says so."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if NATIVE == "require":
                raise
            print(f"pd-connector: no C extension, this is a pure Python package: {error}", file=sys.stderr)
            self.extensions.clear()


class Wheel(bdist_wheel):
    """Tags a wheel by what is in it: without the extension it runs anywhere."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.distribution.ext_modules:
            self.root_is_pure, self.py_limited_api = True, False
        super().run()


sources = sorted(str(path) for path in Path("csrc").glob("*.c"))
extension = Extension(
    "pd_connector._native",
    sources,
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    py_limited_api=True,
)
# Beside it, for what only a C++ compiler can call; it knows nothing of Python and is opened by the other one.
hixl = Extension(
    "pd_connector._hixl",
    ["csrc/hixl.cc"],
    depends=["csrc/hixl.h"],
    extra_compile_args=["-std=c++17", *FLAGS[1:]],
    py_limited_api=True,
    optional=NATIVE != "require",
)
setup(
    ext_modules=[] if NATIVE == "off" else [extension, hixl],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Build hook for the optional C extension; everything else about the package is in pyproject.toml.

PD_NATIVE says what to do about the extension: `auto` (default) and `off` build a pure Python package, and `require`
fails, because this version has no C sources and a build that was told to have them must not pass without.
"""

import os

from setuptools import setup

native = os.environ.get("PD_NATIVE", "auto")
if native not in ("auto", "require", "off"):
    raise SystemExit(f"PD_NATIVE={native!r} is unknown: use auto, require or off")
if native == "require":
    raise SystemExit("PD_NATIVE=require: this version of pd-connector has no C extension; use PD_NATIVE=auto or off")

setup()

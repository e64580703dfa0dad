"""Options of a transport (config ``transport_options[name]``), checked against a struct of what there is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from pd_connector.errors import ConfigError

Options = TypeVar("Options", bound=msgspec.Struct)


def parse_options(transport: str, options: Mapping[str, Any], kind: type[Options]) -> Options:
    """Raises ConfigError, for an unknown option with the nearest known one."""
    known = kind.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"transport {transport!r} has no option {key!r}: {hint}")
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of transport {transport!r}: {error}") from error

"""Pictures that commands write to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pd_connector.errors import ConfigError


def load_pyplot() -> Any:
    """matplotlib's pyplot, without a display. Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError(f"--plot needs {error.name!r}: pip install 'pd-connector[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write it in the format of the name's ending, and forget it. Raises ConfigError when it cannot be."""
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None
    finally:
        load_pyplot().close(figure)

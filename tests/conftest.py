"""Settings for every test."""

from __future__ import annotations

from hypothesis import settings

# Speed is never asserted, so examples have no deadline of their own: pytest-timeout bounds the whole test. The same
# examples are tried everywhere, so that a failure in CI is a failure at home.
settings.register_profile("pd_connector", deadline=None, derandomize=True)
settings.load_profile("pd_connector")

"""Every way in which a request can end other than well."""

from __future__ import annotations

from collections.abc import Mapping

from pd_connector.errors import PDError


class Fault(PDError):
    """The router's own answer to a request that it cannot serve: an HTTP status and an OpenAI error body."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after_s = retry_after_s


def bad_request(message: str) -> Fault:
    return Fault(400, "invalid_request_error", message)


class Refused(PDError):
    """An upstream found fault with the request itself (4xx). Passed on unchanged and never retried."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"refused with status {status}")
        self.status = status
        self.headers = dict(headers)
        self.body = body


class LegFailed(PDError):
    """One attempt of one leg failed at the upstream; another attempt may do better.

    ``status`` is what the client gets when there is none: 502 a wrong answer or a broken connection, 503 nobody
    listens, 504 no answer in time. ``connection`` says that the connection failed rather than the upstream's work.
    """

    def __init__(self, leg: str, upstream: str, reason: str, *, status: int = 502, connection: bool = False) -> None:
        super().__init__(f"{leg} leg on {upstream} failed: {reason}")
        self.leg = leg
        self.upstream = upstream
        self.reason = reason
        self.status = status
        self.connection = connection

    def as_fault(self, attempts: int) -> Fault:
        kind = {503: "service_unavailable", 504: "timeout"}.get(self.status, "upstream_error")
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return Fault(self.status, kind, f"{self} (gave up after {tried}; look at that instance's log and /health here)")

"""What an operator may tune on the router, with its bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pd_connector.errors import ConfigError

_BOUNDS: dict[str, tuple[float, float]] = {
    "connect_s": (0.01, 60),
    "prefill_s": (0.01, 7200),
    "decode_idle_s": (0.01, 7200),
    "first_token_s": (0.01, 14400),
    "client_stall_s": (0.01, 7200),
    "body_s": (0.01, 600),
    "cooldown_s": (0, 300),
    "abandon_grace_s": (0, 1.5),
    "retry_pause_s": (0, 10),
    "drain_s": (0, 600),
    "retries": (0, 10),
    "stream_min_tokens": (0, 1 << 30),
    "stream_max_queue": (1, 65536),
    "turns": (0, 1 << 20),
    "turn_wait_s": (0, 10),
    "max_in_flight": (1, 65536),
    "max_choices": (1, 1024),
    "max_body_bytes": (1024, 1 << 30),
    "max_response_bytes": (1024, 1 << 30),
}


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits of one router. Times are seconds, sizes are bytes.

    Raises ConfigError when a value is outside its bounds.
    """

    connect_s: float = 5.0
    """Name resolution and TCP (and TLS) connection to an upstream."""
    prefill_s: float = 600.0
    """The whole prefill leg, from its first byte sent to its last byte read."""
    decode_idle_s: float = 600.0
    """Silence on the decode leg, before and between its bytes."""
    first_token_s: float = 900.0
    """All attempts together, from the parsed request to D's first token (to D's whole answer when not streaming)."""
    client_stall_s: float = 600.0
    """A client that does not take the bytes we send."""
    body_s: float = 60.0
    """A client that does not finish sending its request body."""
    cooldown_s: float = 3.0
    """How long an upstream that could not be reached is put aside."""
    abandon_grace_s: float = 0.75
    """How long a prefill whose client has left may still finish, so that its ticket is learned and released.

    Closing the connection makes vLLM abort, but an answer that is already on its way would be lost with its ticket, and
    P's blocks would wait for the lease to run out. Short prefills end within the grace; long ones are aborted after it.
    With the releaser's own second this stays below the two seconds within which P's blocks must be free.
    """
    retry_pause_s: float = 0.1
    """Before the same upstream is tried again, because no other is left."""
    stream_min_tokens: int = 1024
    """Prompts of about this many tokens and more go to both instances at once: D reads while P computes. With the
    largest value none does."""
    stream_max_queue: int = 4
    """With this many other prefills under way at an instance its prompts go one leg after the other: they would wait at
    both."""
    turns: int = 4096
    """Conversations whose last turn is remembered, so that the next one's prefill reads what a decode instance keeps of
    it (there, ``pool_bytes``); 0 for none."""
    turn_wait_s: float = 0.5
    """How long a turn that follows at once waits for what the last one leaves."""
    drain_s: int = 30
    """At shutdown, how long requests in flight may still run."""
    retries: int = 2
    """Extra attempts of one choice, both legs together."""
    max_in_flight: int = 1024
    """Choices (pairs of legs) that may be under way at once; one more is answered 503 with Retry-After."""
    max_choices: int = 128
    """Choices of one request: prompts in the batch times n."""
    max_body_bytes: int = 32 << 20
    max_response_bytes: int = 64 << 20
    """One upstream answer that has to be read whole (prefill leg, plain decode leg)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _BOUNDS[field.name]
            whole = isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise ConfigError(f"router setting {field.name!r} must be {kind}, not {value!r}")
            if not low <= value <= high:
                raise ConfigError(f"router setting {field.name!r} is {value!r}; choose a value from {low} to {high}")
        if self.max_choices > self.max_in_flight:
            raise ConfigError(
                f"router setting 'max_choices' ({self.max_choices}) is above 'max_in_flight' ({self.max_in_flight}): "
                "such a request could never be admitted; lower the first or raise the second"
            )

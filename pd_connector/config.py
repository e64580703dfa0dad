"""Typed configuration: one frozen struct, and the only reader of the process environment.

Keys arrive from ``kv_connector_extra_config`` (vLLM), from a dict (custom engines) or from command lines; a key or
value that cannot be used is a ConfigError that names the key, what is allowed and the nearest known key.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import zmq
from msgspec import Meta

from pd_connector.errors import ConfigError

MAX_MODEL = 256
"""Characters; the bound of every name in the protocol."""
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
Cpu = Annotated[int, Meta(ge=0, lt=1024)]
"""What a CPU set of the C library can name."""
_Z85 = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")
_HOST = re.compile(r"[0-9A-Za-z._:%-]{0,255}")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one agent.

    host: address to bind; anything but loopback needs keys or ``insecure: true``.
    port: port to bind, 0 for an ephemeral one. In vLLM: the instance's one advertised port, offset by the DP rank.
    advertise: host name or address told to peers; empty for VLLM_HOST_IP, then the bound address.
    insecure: allow a non-loopback address without keys.
    public_key, secret_key: CURVE key pair of this agent (``pdc keygen``); encrypts and authenticates the side channel.
    allowed_keys: public keys of the peers that may talk to this agent, and that it may talk to.
    lease_seconds: how long a lease lasts without a sign of life from its reader.
    lease_cap_seconds: how long renewals can prolong it in all.
    transfer_timeout_seconds: a pull that takes longer has failed.
    prefill_wait_seconds: how long a decode request that was sent along with its prefill waits for that to be scheduled.
    drain_seconds: how long a stopping instance waits for readers of its leases.
    transport: "auto", or the names of the only transports to use.
    transport_options: options per transport name, checked by the transport.
    pool_bytes: host memory per rank in which a decode instance keeps finished requests for the next turns of their
        conversations; 0 for none.
    pool_seconds: how long it keeps them; the oldest go sooner when there is no room.
    audit: digest every block read on both sides and compare (costs CPU on both).
    strict: a decode instance answers with an error, instead of computing a prompt whose prefill was handed over; needs
        vLLM's kv_load_failure_policy "fail".
    model: model identity to compare with peers; empty for the engine's own idea of it.
    io_cpus: CPUs for our I/O threads; empty for all of the machine.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    advertise: str = ""
    insecure: bool = False
    public_key: str = ""
    secret_key: str = ""
    allowed_keys: tuple[str, ...] = ()
    lease_seconds: Seconds = 30.0
    lease_cap_seconds: Seconds = 300.0
    transfer_timeout_seconds: Seconds = 60.0
    prefill_wait_seconds: Seconds = 60.0
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    transport: str | tuple[str, ...] = "auto"
    transport_options: dict[str, dict[str, Any]] = {}
    pool_bytes: Annotated[int, Meta(ge=0, le=2**46)] = 0
    pool_seconds: Seconds = 600.0
    audit: bool = False
    strict: bool = False
    model: str = ""
    io_cpus: tuple[Cpu, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for values that are each possible but not together."""
        _check(self)

    def __repr__(self) -> str:  # keys stay out of logs
        shown = {f: getattr(self, f) for f in self.__struct_fields__ if f != "secret_key"}
        return f"Config({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


def parse(settings: Mapping[str, Any], where: str = "configuration") -> Config:
    """A Config from plain data. Raises ConfigError; ``where`` says whose settings they are."""
    for key in settings:
        if key not in Config.__struct_fields__:
            near = difflib.get_close_matches(str(key), Config.__struct_fields__, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(Config.__struct_fields__)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    try:
        return msgspec.convert(dict(settings), Config)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _check(config: Config) -> None:
    if bool(config.public_key) != bool(config.secret_key):
        raise ConfigError("public_key and secret_key go together; make a pair with 'pdc keygen'")
    _check_keys(config)
    for name, options in config.transport_options.items():  # made in Python, nothing else looked at it
        if not isinstance(options, dict):
            raise ConfigError(f"transport_options[{name!r}] is a table of names and values, not {options!r}")
    for name, host in (("host", config.host), ("advertise", config.advertise)):
        if not _HOST.fullmatch(host) and host != "*":
            raise ConfigError(f"{name} {host[:80]!r} is not a host name or an address")
    if not config.secret_key and not config.insecure and not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host!r} is reachable by others and no keys are set; "
            "set public_key, secret_key and allowed_keys ('pdc keygen'), or write insecure: true"
        )
    if len(config.model) > MAX_MODEL:
        raise ConfigError(f"model has {len(config.model)} characters, at most {MAX_MODEL} travel to peers")
    if config.lease_cap_seconds < config.lease_seconds:
        raise ConfigError(f"lease_cap_seconds {config.lease_cap_seconds:g} is below lease_seconds")


def _check_keys(config: Config) -> None:
    if config.allowed_keys and not config.secret_key:
        raise ConfigError("allowed_keys without keys of one's own would admit everybody; see 'pdc keygen'")
    if config.secret_key and not config.allowed_keys:
        raise ConfigError("with a secret_key, allowed_keys must list the public keys of the peers")
    keys = [config.public_key, config.secret_key] if config.secret_key else []
    for key in (*keys, *config.allowed_keys):
        if len(key) != 40 or not set(key) <= _Z85:
            raise ConfigError(f"a CURVE key has 40 Z85 characters, not {len(key)} or others; see 'pdc keygen'")
    if config.secret_key and zmq.curve_public(config.secret_key.encode()) != config.public_key.encode():
        raise ConfigError("public_key does not belong to secret_key; make a pair with 'pdc keygen'")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def engine_host_ip() -> str:
    """The address that vLLM was told to use for this host, or an empty string."""
    return os.environ.get("VLLM_HOST_IP", "")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with additions, for processes that we start."""
    return {**os.environ, **extra}


def vllm_plugins() -> tuple[str, ...] | None:
    """The plugins that vLLM was told to load, or None for all of them; it splits the variable in the same way."""
    names = os.environ.get("VLLM_PLUGINS")
    return None if names is None else tuple(names.split(","))


def ascend_settings() -> dict[str, str]:
    """Those that are set of the variables for where Ascend's software is, which NPUs it shows and how it links them."""
    names = ("ASCEND_HOME_PATH", "ASCEND_RT_VISIBLE_DEVICES", "HCCL_INTRA_ROCE_ENABLE", "HCCL_INTRA_PCIE_ENABLE")
    return {name: os.environ[name] for name in names if name in os.environ}

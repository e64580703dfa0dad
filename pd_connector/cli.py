"""``pdc``: the command line. Every subcommand imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pd_connector.config import Config, parse
from pd_connector.errors import ConfigError, PDError

COULD_NOT_RUN = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; 2 with one line on stderr when it could not run."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PDError as error:
        # Some messages end with the tail of a log, or quote a peer; here an error is always one line of plain text.
        from pd_connector.doctor.report import printable

        print(f"pdc {arguments.command}: {printable(' | '.join(str(error).splitlines()))}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pdc", description="KV-cache transfer for prefill/decode disaggregation")
    parser.add_argument("--version", action="version", version=f"pdc {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_demo(commands)
    _add_router(commands)
    _add_ledger(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_keygen(commands)
    return parser


def _version() -> str:
    try:
        return version("pd-connector")
    except PackageNotFoundError:
        return "from a source tree that is not installed"


# --- demo -------------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    words = "real vLLM prefills in one process, another one decodes from its KV blocks, and a table proves it"
    demo = commands.add_parser(
        "demo", help=words, description=words, epilog="Exit status: 0 pass, 1 fail, 2 could not run."
    )
    demo.add_argument("--json", action="store_true", help="end stdout with one JSON object; progress goes to stderr")
    demo.add_argument("--keep", action="store_true", help="leave all running until Ctrl-C, and print a curl line")
    demo.add_argument("--prompts", metavar="N,N,...", help="lengths in tokens (default: 1,31,128,129,1000,3000)")
    demo.add_argument("--plant", choices=["wrong-byte"], help="flip one byte of D's first read: the demo must fail")
    demo.add_argument("--seed", type=int, default=0, help="of the random prompts (default: %(default)s)")
    demo.add_argument("--deadline", type=float, metavar="S", help="give up after this many seconds (default: 540)")
    demo.add_argument(
        "--workdir", type=Path, metavar="DIR", help="keep model and logs here (default: a temporary directory)"
    )
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from pd_connector.demo.run import Options, run
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs {error.name!r}: pip install 'pd-connector[demo]'") from None
    chosen: dict[str, Any] = {}
    if arguments.prompts is not None:
        try:
            chosen["prompts"] = tuple(int(length) for length in arguments.prompts.split(","))
        except ValueError:
            raise ConfigError(f"--prompts {arguments.prompts!r}: write numbers of tokens, such as 1,128,3000") from None
    if arguments.deadline is not None:
        chosen["deadline"] = arguments.deadline
    return run(
        Options(
            workdir=arguments.workdir,
            seed=arguments.seed,
            keep=arguments.keep,
            json=arguments.json,
            wrong_byte=arguments.plant == "wrong-byte",
            **chosen,
        )
    )


# --- router -----------------------------------------------------------------------------------------------------------


def _add_router(commands: Any) -> None:
    words = "put prefill and decode instances behind one OpenAI-compatible address"
    router = commands.add_parser("router", help=words, description=words)
    router.add_argument("--prefill", nargs="+", required=True, metavar="URL", help="such as http://10.0.0.1:8100")
    router.add_argument("--decode", nargs="+", required=True, metavar="URL")
    router.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    router.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    router.add_argument("--api-key-file", type=Path, metavar="FILE", help="clients must send its content as bearer key")
    router.add_argument("--insecure", action="store_true", help="listen on any address without an API key")
    router.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON settings of its side channel to the instances: public_key, secret_key, allowed_keys, ...",
    )
    router.add_argument("--otlp-traces-endpoint", metavar="URL", help="send spans of hand-overs there (gRPC)")
    router.set_defaults(run=_router)


def _router(arguments: argparse.Namespace) -> int:
    _require_router()
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port {arguments.port} is not a port; choose 0 to 65535")
    api_key = _api_key(arguments)
    config = Config() if arguments.config is None else _agent_config(arguments.config)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if arguments.otlp_traces_endpoint is not None:
        from pd_connector.router.tracing import export_to

        export_to(arguments.otlp_traces_endpoint)
    asyncio.run(_serve(arguments, config, api_key))
    return 0


async def _serve(arguments: argparse.Namespace, config: Config, api_key: str | None) -> None:
    from pd_connector.router import AgentBroker, serve

    def listening(port: int) -> None:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"router listens on http://{host}:{port}", flush=True)

    async with AgentBroker(config) as broker:
        await serve(
            arguments.prefill,
            arguments.decode,
            broker=broker,
            host=arguments.host,
            port=arguments.port,
            api_key=api_key,
            insecure=arguments.insecure,
            on_ready=listening,
        )


def _require_router() -> None:
    try:
        import pd_connector.router  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"the router needs {error.name!r}: pip install 'pd-connector[router]'") from None


def _add_ledger(commands: Any) -> None:
    words = "show where the time to the first token of a router's last requests went"
    ledger = commands.add_parser("ledger", help=words, description=words)
    ledger.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="of the router (default: %(default)s)")
    ledger.add_argument("-n", type=int, default=20, dest="count", help="how many (default: %(default)s)")
    ledger.add_argument("--json", action="store_true", help="print one JSON array, newest last")
    ledger.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png, .svg or .pdf")
    ledger.add_argument("--api-key-file", type=Path, metavar="FILE", help="the router's key")
    ledger.set_defaults(run=_ledger)


def _ledger(arguments: argparse.Namespace) -> int:
    _require_router()
    try:
        from pd_connector.router import show
    except ModuleNotFoundError as error:
        raise ConfigError(f"the table needs {error.name!r}: pip install 'pd-connector[router]'") from None

    ledgers = show.fetch(arguments.url, arguments.count, _api_key(arguments))
    if arguments.plot is not None:
        show.plot(ledgers, arguments.plot)
    if arguments.json:
        print(json.dumps(ledgers))
        return 0
    from rich.console import Console

    console = Console()
    console.print(show.table(ledgers) if ledgers else "no request has been answered yet")
    return 0


def _api_key(arguments: argparse.Namespace) -> str | None:
    return None if arguments.api_key_file is None else _read(arguments.api_key_file, "--api-key-file").strip()


def _agent_config(path: Path) -> Config:
    try:
        settings = json.loads(_read(path, "--config"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f'--config {path}: write one JSON object, such as {{"port": 0}}')
    return parse(settings, f"--config {path}")


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}") from None


# --- doctor -----------------------------------------------------------------------------------------------------------


def _add_doctor(commands: Any) -> None:
    words = "find out what works on this host, or between it and a running agent, by trying it"
    doctor = commands.add_parser(
        "doctor",
        help=words,
        description=words,
        epilog="Exit status: 0 ok or warnings, 1 a check failed, 2 could not run.",
    )
    doctor.add_argument(
        "address", nargs="?", metavar="ADDRESS", help="HOST:PORT or tcp://HOST:PORT#KEY of an agent; default: this host"
    )
    doctor.add_argument("--serve", action="store_true", help="offer test memory to doctors elsewhere until Ctrl-C")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="JSON agent settings: keys, transport, host, ...")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--no-measure", action="store_true", help="connect only, read nothing")
    doctor.add_argument(
        "--selftest", action="store_true", help="read over every transport, compare each byte, kill a peer: a report"
    )
    doctor.add_argument(
        "--transport", action="append", metavar="NAME", help="of --selftest: only this one (repeatable)"
    )
    doctor.add_argument("--device", metavar="N[,M]", help="of --selftest: the owner's NPU or GPU, and the reader's")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    config = Config() if arguments.config is None else _agent_config(arguments.config)
    if arguments.selftest:
        return _selftest(arguments, config)
    if arguments.transport or arguments.device:
        raise ConfigError("--transport and --device choose what --selftest tries: give it too")
    if arguments.serve:
        return _serve_doctor(arguments, config)
    measure = not arguments.no_measure
    if arguments.address is None:
        from pd_connector.doctor import host

        report = host.examine(config, arguments.config, measure=measure)
    else:
        from pd_connector.doctor import peer

        report = peer.examine(config, arguments.address, measure=measure)
    print(report.as_json() if arguments.json else report.as_text())
    return int(report.failed)


def _selftest(arguments: argparse.Namespace, config: Config) -> int:
    from pd_connector.doctor.selftest import Options, parse_devices, run, tell

    if arguments.serve or arguments.no_measure or arguments.address is not None:
        raise ConfigError("--selftest takes no address, --serve or --no-measure: both its processes are its own")
    devices = None if arguments.device is None else parse_devices(arguments.device)
    found = run(Options(config, tuple(arguments.transport or ()), devices), tell)
    print(found.as_json() if arguments.json else found.as_text())
    return int(found.failed)


def _serve_doctor(arguments: argparse.Namespace, config: Config) -> int:
    from pd_connector.doctor.server import serve_until_signal

    if arguments.address is not None or arguments.no_measure:
        raise ConfigError("--serve takes neither an address nor --no-measure: run the doctor that measures elsewhere")

    def listening(address: str) -> None:
        keys = " --config FILE" if config.secret_key else ""
        print(json.dumps({"address": address}) if arguments.json else f"pdc doctor {address}{keys}", flush=True)

    asyncio.run(serve_until_signal(config, listening))
    return 0


# --- bench ------------------------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    from pd_connector.bench.arguments import add_arguments

    bench = commands.add_parser("bench", help="measure this machine and what stands on it")
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="subject")
    words = "move scattered blocks between two processes, beside the speed of the machine's own copies"
    transfer = subjects.add_parser("transfer", help=words, description=words)
    add_arguments(transfer)
    transfer.set_defaults(run=_bench_transfer)


def _bench_transfer(arguments: argparse.Namespace) -> int:
    from pd_connector.bench.command import run

    return run(arguments)


# --- keygen -----------------------------------------------------------------------------------------------------------


def _add_keygen(commands: Any) -> None:
    words = "make a CURVE key pair for the side channel"
    keygen = commands.add_parser("keygen", help=words, description=words)
    keygen.add_argument("--json", action="store_true", help="as one JSON object, ready for a config")
    keygen.set_defaults(run=_keygen)


def _keygen(arguments: argparse.Namespace) -> int:
    import zmq

    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE; install a pyzmq wheel, which has it")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    if arguments.json:
        print(json.dumps({"public_key": public, "secret_key": secret}))
    else:
        print(f"public_key {public}\nsecret_key {secret}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""sfi-local serve: the OpenAI API and a page for several conversations with one model."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Iterator

import click
import uvicorn

from sfi_local.binding.rpc import attach, parse
from sfi_local.cli.options import BriefCommand, model_options, quality_option, set_options, take_settings, usage
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted, say
from sfi_local.errors import SfiError, UsageError
from sfi_local.loading import load_as
from sfi_local.runtime.modes import MODES
from sfi_local.runtime.settings import Settings as ModelSettings
from sfi_local.serve.app import Server, Settings
from sfi_local.serve.connections import Protocol
from sfi_local.serve.guard import LOOPBACK
from sfi_local.serve.metrics import Metrics
from sfi_local.serve.worker import Job, Worker

MAX_SLOTS = 64
MAX_CONNECTIONS = 512


@click.command("serve", cls=BriefCommand, short_help="Serve the OpenAI API and a page for chats.")
@click.argument("model")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; another address than this machine's own needs "
              "a key [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, metavar="N", help="0: any that is free [default: 8080]")
@click.option("--parallel", type=click.IntRange(1, MAX_SLOTS), default=2, metavar="N",
              help="Conversations that are kept and answered at a time, each with a context of its own [default: 2]")
@click.option("--api-key", metavar="KEY", help="A key that requests must bring, or SFI_LOCAL_API_KEY.")
@click.option("--name", metavar="NAME", help="What requests call the model [default: MODEL]")
@click.option("--mode", type=click.Choice(list(MODES)), default=ModelSettings.mode, metavar="MODE",
              help="As of `run`: auto, sfi, exact, dense, stock [default: auto]")
@quality_option
@set_options()
@model_options
@click.option("--quiet", is_flag=True, help="No access log.")
@click.option("--rpc", metavar="HOST:PORT,...", help="Layers on other machines, which run `sfi-local rpc-server`; K and V stay here.")
def command(**options: Any) -> None:
    """Serve MODEL over HTTP: a name from `sfi-local models`, hf:USER/REPO:QUANT, or a path.

    \b
    sfi-local serve smollm2-135m
    sfi-local serve qwen2.5-coder-1.5b --parallel 4 --ctx 16384
    sfi-local serve model.gguf --host 0.0.0.0 --api-key "$KEY"

    A page for chats is at the URL that is printed, the OpenAI API below it at /v1, and /health, /metrics, /slots. What is asked is never
    logged. Ctrl-C lets answers end.
    """
    rpc = options.pop("rpc")
    with usage():
        machines = () if rpc is None else parse(rpc)
    options["kv_host"] |= bool(machines)  # what the other side attends with is not known, nor whether it has our operations
    key = options.pop("api_key") or os.environ.get("SFI_LOCAL_API_KEY") or None
    check_exposed(options["host"], key)
    settings = take_settings(options)
    address = listen(options["host"], options["port"])
    with address:
        attach(machines, lambda why: say(f"A machine of --rpc was lost, and the layers on it ({why}): start again when it is there."))
        serve(options, settings, key, address)


def check_exposed(host: str, key: str | None) -> None:
    """An address that others reach needs a key. Raises UsageError."""
    if host not in LOOPBACK and not key:
        raise UsageError(f"--host {host} lets others reach the server: give a key with --api-key, or SFI_LOCAL_API_KEY.")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SfiError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SfiError(f"Port {port} of {host} is in use: give another one with --port, or 0 for any that is free.") from None
        raise SfiError(f"The server cannot listen at {host} port {port} ({error.strerror or error}): give another --host or --port.") from None


def serve(options: dict[str, Any], settings: ModelSettings, key: str | None, address: socket.socket) -> None:
    """Until a signal. Raises SfiError where the model cannot be loaded."""
    with Progress("fetching", "bytes") as fetching:
        path = resolve_noted(options["model"], fetching)
    log_to_stderr(not options["quiet"])
    share_arenas()

    def load(metrics: Metrics) -> Worker:
        model = load_as(path, settings, options["verbose"])
        model.share_memory(options["parallel"])
        model.tune_auto(model.n_ctx_limit)
        if settings.kv_host and model.gpus:
            say(f"The model has its layers on {' and '.join(model.gpus)}; K, V and attention are here.")

        def tell() -> None:
            for note in model.unread_notes():
                say(note)

        def done(job: Job, error: BaseException | None) -> None:
            metrics.done(job, error)
            tell()
        tell()
        return Worker(model, options["parallel"], metrics.pause.observe, done)

    server = Server(Settings(options["name"] or name_of(options["model"]), key), load, resident_bytes)
    host, port = address.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} serves {server.settings.name}, see /health; Ctrl-C ends it.", flush=True)
    asyncio.run(run(server, address))
    if server.failure is not None:
        raise server.failure


def name_of(model: str) -> str:
    """What requests call a model that is given by name or path."""
    return Path(model).stem if model.endswith(".gguf") else model


async def run(server: Server, address: socket.socket) -> None:
    """Answer requests until a signal comes, or the model cannot be loaded."""
    config = uvicorn.Config(server.app, http=Protocol, ws="none", log_config=None, access_log=False, lifespan="off", server_header=False, timeout_keep_alive=15,
                            limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=32 << 10,
                            timeout_graceful_shutdown=int(server.settings.grace) + 5)
    web = _Web(config)
    loop = asyncio.get_running_loop()
    server.start()
    with on_signals(loop, web.end):
        ending = asyncio.ensure_future(end_with(server, web))
        await web.serve(sockets=[address])
        web.end()
        await ending


async def end_with(server: Server, web: "_Web") -> None:
    """Stop the model when the server ends, and the server when there is no model."""
    await asyncio.to_thread(server.loaded.wait)
    if server.failure is not None:
        web.end()
    await web.ended.wait()
    await asyncio.to_thread(server.stop)


class _Web(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.ended = asyncio.Event()

    def end(self) -> None:
        """The first time: take no more, let answers end. The second time: at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.ended.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def on_signals(loop: asyncio.AbstractEventLoop, do: Any) -> Iterator[None]:
    """Call do() in the loop at Ctrl-C or SIGTERM."""
    before = {sign: signal.signal(sign, lambda *_: loop.call_soon_threadsafe(do)) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def log_to_stderr(access: bool) -> None:
    """Warnings of all, and a line per request."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("sfi_local.access").setLevel(logging.INFO if access else logging.WARNING)


def share_arenas() -> None:
    """Let all threads allocate from two arenas: glibc makes eight a core, and each keeps what was once used. Where there is no glibc, nothing."""
    M_ARENA_MAX = -8
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def resident_bytes() -> float:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0

"""sfi-local rpc-server: lend this machine to another one's `serve --rpc`."""

from __future__ import annotations

import signal

import click

from sfi_local.binding import rpc
from sfi_local.cli.options import BriefCommand, threads_option
from sfi_local.cli.terminal import say
from sfi_local.machine import physical_cores
from sfi_local.serve.command import listen
from sfi_local.serve.guard import LOOPBACK


@click.command("rpc-server", cls=BriefCommand, short_help="Lend this machine to another one's `serve --rpc`.")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), default=50052, metavar="N", help="[default: 50052]")
@threads_option
def command(host: str, port: int, threads: int | None) -> None:
    """Hold layers for one `sfi-local serve --rpc HOST:PORT` after the other, and compute them.

    On this machine's GPUs, or where there are none on its CPU. ggml's RPC has neither a key nor encryption: who reaches the port can do
    with this process what they like. So it is for a cable or a network of one's own.
    """
    listen(host, port).close()  # ggml's own sentence would not say why
    if host not in LOOPBACK:
        say(f"Whoever reaches {host} port {port} may use this machine, and could take it over: ggml's RPC asks for no key.")
    click.echo(f"{host}:{port} lends this machine; Ctrl-C ends it.")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for ggml, which does not return
    rpc.lend(rpc.Address(host, port), threads or physical_cores())

"""Layers on other machines, by ggml's RPC backend: attach what others lend, and lend this machine to others.

ggml ends the process where a machine cannot be reached, or is lost later. So each is asked first, as ggml would, and the end is told.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from ctypes import POINTER, c_char_p, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from sfi_local.binding.devices import CPU, GPU_TYPES, Ggml
from sfi_local.errors import ArgumentError, LibraryError, SfiError

MOST = 16          # machines, as ggml-rpc.h has it
PROTOCOL = 7       # RPC_PROTO_MAJOR_VERSION there
_HELLO = 14        # its command, at all versions
_CAPS = bytes(24)  # what the transport can do: TCP alone
_SECONDS = 5.0     # a machine that answers another one does not answer

_abort: Any = None  # kept alive: ggml calls it


@dataclass(frozen=True)
class Address:
    """Of a machine that lends itself."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str) -> tuple[Address, ...]:
    """HOST:PORT,HOST:PORT as addresses. Raises ArgumentError."""
    found = []
    for one in text.split(","):
        host, _, port = one.strip().rpartition(":")
        if not host or ":" in host or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
            raise ArgumentError(f"{one.strip()!r} is no address of a machine: write HOST:PORT, several with commas between.")
        found.append(Address(host, int(port)))
    if len(found) > MOST:
        raise ArgumentError(f"{len(found)} machines are more than ggml asks: give at most {MOST}.")
    return tuple(found)


def attach(machines: Sequence[Address], on_lost: Callable[[str], None]) -> None:
    """Add what the machines lend to the devices of this process, for good. Raises SfiError, LibraryError.

    on_lost: called with ggml's message when a machine is lost later; the process ends with exit code 1 behind it
    """
    if not machines:
        return
    ggml = Ggml()
    for machine in machines:
        _ask(machine)
    _tell_the_end(ggml, on_lost)
    add = _function(ggml, "ggml_backend_rpc_add_server", c_void_p, [c_char_p])
    for machine in machines:
        lent = add(str(machine).encode())
        if not lent:
            raise SfiError(f"{machine} lends no device: look at what `sfi-local rpc-server` says there.")
        ggml.backend_register(lent)


def lend(machine: Address, n_threads: int) -> None:
    """Compute for one machine after the other, until the process ends. Raises SfiError, LibraryError."""
    ggml = Ggml()
    used = ggml.devices(*GPU_TYPES) or ggml.devices(CPU)
    serve = _function(ggml, "ggml_backend_rpc_start_server", None, [c_char_p, c_char_p, c_size_t, c_size_t, POINTER(c_void_p)])
    serve(str(machine).encode(), None, n_threads, len(used), (c_void_p * len(used))(*used))
    raise SfiError(f"Nothing is lent at {machine} any more: is the address one of this machine's, and the port free?")


def _function(ggml: Ggml, name: str, result: Any, arguments: list[Any]) -> Any:
    backend = ggml.backend_reg_by_name(b"RPC")
    address = backend and ggml.backend_reg_get_proc_address(backend, name.encode())
    if not address:
        raise LibraryError("This build has no RPC backend: build it with -DGGML_RPC=ON.")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def _ask(machine: Address) -> None:
    """Say hello to it. Raises SfiError where ggml would end the process."""
    try:
        with socket.create_connection((machine.host, machine.port), timeout=_SECONDS) as one:
            one.settimeout(_SECONDS)
            answer = _hello(one)
    except TimeoutError:
        raise SfiError(f"{machine} does not answer: is it in use? It lends itself to one machine at a time.") from None
    except OSError as error:
        raise SfiError(f"{machine} cannot be reached ({error.strerror or error}): start `sfi-local rpc-server` there, or see to the "
                       f"address.") from None
    n, major = struct.unpack("<QB", answer[:9]) if len(answer) >= 9 else (0, 0)
    if n != 4 + len(_CAPS) or len(answer) < 8 + n:
        raise SfiError(f"{machine} speaks something else than ggml's RPC: give the port of `sfi-local rpc-server`.")
    if major != PROTOCOL:
        raise SfiError(f"{machine} speaks version {major} of ggml's RPC, and this build {PROTOCOL}: run the same version of sfi-local on both.")


def _hello(one: socket.socket) -> bytes:
    """What it answers, as much as comes of it: who does not understand may hang up."""
    n, read = 8 + 4 + len(_CAPS), b""
    try:
        one.sendall(struct.pack("<BQ", _HELLO, len(_CAPS)) + _CAPS)
        while len(read) < n and (more := one.recv(n - len(read))):
            read += more
    except ConnectionError:
        pass
    return read


def _tell_the_end(ggml: Ggml, on_lost: Callable[[str], None]) -> None:
    """What ggml says when a machine is lost is a stack of addresses: a sentence in its place."""
    global _abort

    def ended(message: bytes) -> None:
        try:
            on_lost(message.decode(errors="replace").strip())
        finally:
            os._exit(1)

    _abort = ctypes.CFUNCTYPE(None, c_char_p)(ended)
    ggml.set_abort_callback(_abort)

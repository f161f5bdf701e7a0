"""sfi-local doctor: what is installed, what this machine offers, and what does not fit together."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

import click

from sfi_local import cpus, machine
from sfi_local.binding import library
from sfi_local.binding.devices import devices
from sfi_local.cli.models import known_models
from sfi_local.machine import human_bytes
from sfi_local.tuning import auto_depth
from sfi_local.tuning import tolerance

PACKAGES = ("sfi-local", "llama-cpp-python", "cffi", "click", "numpy", "huggingface_hub")


@click.command("doctor", short_help="Report on the installation and this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(as_json: bool) -> None:
    """Report on the installation and this machine; a probe that fails says why and the others go on.

    \b
    sfi-local doctor
    sfi-local doctor --json

    Exit code 1 if the native library cannot be used.
    """
    facts = collect()
    click.echo(json.dumps(facts, indent=2, default=str) if as_json else as_text(facts))
    if not facts["library"].get("usable"):
        raise SystemExit(1)


def collect() -> dict[str, dict[str, Any]]:
    """All sections; sizes in bytes. Never raises."""
    return {name: _guarded(probe) for name, probe in SECTIONS.items()}


def as_text(facts: dict[str, dict[str, Any]]) -> str:
    """The report for people."""
    lines = []
    for section, values in facts.items():
        lines.append(section)
        lines += [f"  {name:18} {_shown(name, value)}" for name, value in values.items()]
    return "\n".join(lines)


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:  # the report must always print
        return {"error": f"{type(error).__name__}: {error}"}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _versions() -> dict[str, Any]:
    found = {"python": platform.python_version(), "executable": sys.executable, "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _library() -> dict[str, Any]:
    try:
        info = library.build_info()
        facts = {"path": str(library.LIB_DIR), "source_id": info.source_id, "upstream": info.upstream,
                 "compiler": info.compiler, "build": info.build_type, "portable": info.portable,
                 "needs_cpu_flags": list(info.cpu_flags)}
    except Exception as error:
        return {"path": str(library.LIB_DIR), "usable": False, "why": str(error)}
    try:
        library.open_library()
        return {"usable": True, **facts}
    except Exception as error:
        return {"usable": False, "why": str(error), **facts}


def _devices() -> dict[str, Any]:
    """Every device of ggml, how it can have a support under each policy, and which of our operations it computes itself."""
    return {d.name: f"{d.description}; policies: {', '.join(f'{policy} {path}' for policy, path in d.paths.items())}; "
                    + (f"native operations: {', '.join(d.native)}" if d.native else "no native operation") + f"; {d.proof}"
            for d in devices()}


def _machine() -> dict[str, Any]:
    memory, choice = machine.available_memory(), cpus.choose()
    return {"cpu": machine.cpu_name(), "cores": choice.n, "threads": f"{choice.n} ({choice.why})", "logical_cpus": len(cpus.usable_cpus()),
            "available_memory_bytes": memory if memory is not None else "unknown",
            "cpu_flags": _interesting(machine.cpu_flags())}


def _interesting(flags: set[str] | None) -> list[str]:
    """The CPU flags that matter to the kernels."""
    known = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx512_fp16",
             "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2")
    return [flag for flag in known if flags and flag in flags]


def _models() -> dict[str, Any]:
    folder = machine.cache_dir()
    below = next(p for p in (folder, *folder.parents) if p.exists())
    return {"cache": str(folder), "free_disk_bytes": shutil.disk_usage(below).free,
            "fetched": [row["name"] for row in known_models() if row["path"]]}


def _auto() -> dict[str, Any]:
    """From which depth mode auto is slow-fast, of the models that were measured on this machine."""
    return {"file": str(auto_depth.calibration_file()),
            "measured": [f"{Path(e['key']['model']).name} with {e['key']['threads']} threads, {e['key']['type_k']}, budget "
                         f"{e['key']['budget']}: from {e['auto_depth']}" for e in auto_depth.known() if e["timings"]]}


def _fidelity() -> dict[str, Any]:
    """The calibrations that --fidelity chooses from."""
    return {"file": str(tolerance.fidelity_file()),
            "calibrated": [f"{Path(e['key']['model']).name}, {e['key']['type_k']}: floor {e['floor']:.2g} nats"
                           for e in tolerance.known()]}


SECTIONS = {"library": _library, "devices": _devices, "machine": _machine, "models": _models, "auto": _auto,
            "fidelity": _fidelity, "versions": _versions}

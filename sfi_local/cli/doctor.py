"""sfi-local doctor: what is installed, what this machine offers, what does not fit together, and a verdict."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from pathlib import Path
from textwrap import fill
from typing import Any, Callable

import click

from sfi_local import cpus, machine, strain
from sfi_local.binding import embedding, library
from sfi_local.binding.devices import devices
from sfi_local.cli.models import known_models
from sfi_local.cli.window import width_of
from sfi_local.machine import human_bytes
from sfi_local.params import SfiParams
from sfi_local.tuning import auto_depth, tolerance

PACKAGES = ("sfi-local", "llama-cpp-python", "cffi", "click", "numpy", "huggingface_hub", "prompt_toolkit")
DEFAULT_POLICY = SfiParams().policy
LITTLE = 1 << 30  # bytes; a small model and its cache take as much


@click.command("doctor", short_help="Report on the installation and this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(as_json: bool) -> None:
    """Report on the installation and this machine; a probe that fails says why and the others go on.

    \b
    sfi-local doctor
    sfi-local doctor --json

    The last line is the verdict; the exit code is 1 where something must be put right first.
    """
    facts = collect()
    ready, sentence = verdict(facts)
    if as_json:
        click.echo(json.dumps({**facts, "ready": ready, "verdict": sentence}, indent=2, default=str))
    else:
        click.echo(f"{as_text(facts, width_of(sys.stdout) if sys.stdout.isatty() else None)}\n\n{sentence}")
    if not ready:
        raise SystemExit(1)


def collect() -> dict[str, dict[str, Any]]:
    """All sections; sizes in bytes. Never raises."""
    return {name: _guarded(probe) for name, probe in SECTIONS.items()}


def verdict(facts: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    """(whether models can be run here, one sentence: that, or what is wrong and its remedy)"""
    library, devices, machine, models = (facts[name] for name in ("library", "devices", "machine", "models"))
    if not library.get("usable"):
        return False, f"Not ready: {library.get('why') or library.get('error')}"
    if "error" in devices:
        return False, f"Not ready: the devices cannot be asked ({devices['error']}). Build sfi-local again."
    able = [name for name, text in devices.items() if f"{DEFAULT_POLICY} native" in text]
    if not able:
        return False, (f"Not ready: no device here has sfi's operations ({', '.join(devices) or 'there is none'}). Build sfi-local again "
                       f"on this machine.")
    wishes = [text for text in (
        _too_little(models.get("free_disk_bytes"), f"on the disk of {models.get('cache')}", "make room there, or set SFI_LOCAL_CACHE"),
        _too_little(machine.get("available_memory_bytes"), "of memory", "close other programs"),
        "; ".join(f"the CPU is slowed down: {clause}" for clause in machine.get("slowed_by", [])),
        "memory is short and lies on the disk (swap): close other programs, or take --low-memory" if machine.get("swapping") else "",
        "" if models.get("fetched") or "error" in models else "no model is here yet: run `sfi-local pull smollm2-135m`") if text]
    ready = f"Ready: fast steps on {' and '.join(able)}"
    return True, f"{ready}, but {'; '.join(wishes)}." if wishes else f"{ready}."


def _too_little(n: Any, where: str, remedy: str) -> str:
    """A clause about less than LITTLE bytes; "" where there are more, or it is not known how many."""
    return f"only {human_bytes(n)} are free {where}: {remedy}" if isinstance(n, int) and n < LITTLE else ""


def as_text(facts: dict[str, dict[str, Any]], width: int | None = None) -> str:
    """The report for people. width: columns of the window that long lines are broken for; None: they are not"""
    lines = []
    for section, values in facts.items():
        lines.append(section)
        lines += [_broken(f"  {name:18} {_shown(name, value)}", width) for name, value in values.items()]
    return "\n".join(lines)


def _broken(line: str, width: int | None) -> str:
    indent = " " * (21 if width and width >= 60 else 4)
    return fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) if width else line


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
        return {"usable": True, **facts, "cpu_library": library.cpu_library()}
    except Exception as error:
        return {"usable": False, "why": str(error), **facts}


def _devices() -> dict[str, Any]:
    """Every device of ggml, how it can have a support under each policy, and which of our operations it computes itself."""
    return {d.name: f"{d.description}; policies: {', '.join(f'{policy} {path}' for policy, path in d.paths.items())}; "
                    + (f"native operations: {', '.join(d.native)}" if d.native else "no native operation") + f"; {d.proof}"
            for d in devices()}


def _machine() -> dict[str, Any]:
    memory, choice, degrees, swap = machine.available_memory(), cpus.choose(), strain.temperature(), strain.swap()
    return {"cpu": machine.cpu_name(), "cores": choice.n, "threads": f"{choice.n} ({choice.why})", "logical_cpus": len(cpus.usable_cpus()),
            "available_memory_bytes": memory if memory is not None else "unknown",
            "swap": f"{human_bytes(swap.used)} of {human_bytes(swap.total)} in use" if swap.total else "none", "swapping": swap.hurts,
            "temperature": f"{degrees:.0f} °C" if degrees is not None else "unknown", "slowed_by": strain.slowed_by(),
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
    """The calibrations that --quality chooses from."""
    return {"file": str(tolerance.fidelity_file()),
            "calibrated": [f"{Path(e['key']['model']).name}, {e['key']['type_k']}: floor {e['floor']:.2g} nats"
                           for e in tolerance.known()]}


def _embedding() -> dict[str, Any]:
    """Where a C program finds include/ and lib/; why there is none."""
    return {"prefix": str(embedding.prefix())}


SECTIONS = {"library": _library, "embedding": _embedding, "devices": _devices, "machine": _machine, "models": _models, "auto": _auto,
            "fidelity": _fidelity, "versions": _versions}

"""Errors: a native status or a bad input becomes a named exception, a sentence with the remedy, an exit code.

Nothing here needs the native library. The command line prints ``error.told()`` with its own spelling and exits with :func:`exit_code`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def named(name: str, value: Any = None) -> str:
    """How a parameter is spelled in Python."""
    return name if value is None else f"{name}={value!r}"


@dataclass(frozen=True)
class Remedy:
    """One way on.

    do:    a clause with {} in the place of the parameter, e.g. ``raise {}``, or one that needs none
    field: a parameter as load(), generate(), SfiParams or Sampling name it; ""
    value: what to give it; None: nothing is known
    """

    do: str
    field: str = ""
    value: Any = None

    def told(self, spell: Callable[..., str] = named) -> str:
        """The clause. spell: (field, value) -> how the reader can set it"""
        return self.do.replace("{}", spell(self.field, self.value))


class SfiError(Exception):
    """Base of all errors of sfi-local; its text is one sentence that says what to do.

    sentence: whole, or its first part where remedies follow, without a colon
    remedies: what to do as data, any one of them; the text spells their parameters as in Python, told() as the reader can set them
    """

    def __init__(self, sentence: str = "", *remedies: Remedy):
        self.sentence, self.remedies = sentence, remedies
        super().__init__(self.told())

    def told(self, spell: Callable[..., str] = named) -> str:
        """The whole sentence. spell: (field, value) -> how the reader can set it"""
        ways = [remedy.told(spell) for remedy in self.remedies]
        return f"{self.sentence}: {', or '.join(filter(None, [', '.join(ways[:-1]), ways[-1]]))}." if ways else self.sentence


class UsageError(SfiError):
    """What was typed cannot be meant; exit code 2."""


class ArgumentError(SfiError, ValueError):
    """A parameter is out of range (SFI_ERR_ARGUMENT)."""


class ModelError(SfiError):
    """No layer of the model can be sparse (SFI_ERR_MODEL)."""


class ContextError(SfiError):
    """The settings of the llama_context rule slow-fast decoding out (SFI_ERR_CONTEXT)."""


class KvTypeError(SfiError):
    """There is no kernel for this type of K or V (SFI_ERR_KV_TYPE)."""


class BackendError(SfiError):
    """A device that holds a sparse layer lacks the operations (SFI_ERR_BACKEND)."""


class ContextFullError(SfiError):
    """No free cell is left in the context (SFI_ERR_FULL)."""


class OutOfMemoryError(SfiError):
    """An allocation failed, or would (SFI_ERR_MEMORY)."""


class DecodeError(SfiError):
    """llama_decode failed (SFI_ERR_DECODE)."""


class AbortedError(SfiError):
    """A callback stopped the work (SFI_ERR_ABORTED)."""


class NoSupportError(SfiError):
    """A fast step or an inspection came before the first refresh (SFI_ERR_NO_SUPPORT)."""


class BusyError(SfiError):
    """Another thread is inside the context (SFI_ERR_BUSY)."""


class DetachedError(SfiError):
    """The llama_context is gone (SFI_ERR_DETACHED)."""


class LibraryError(SfiError):
    """The native library is missing, foreign, of another build, or too new for this CPU (SFI_ERR_VERSION, SFI_ERR_CPU)."""


class ModelFileError(SfiError):
    """The model file is missing, not GGUF, damaged or incomplete."""


class CatalogueError(SfiError):
    """A model name that the catalogue does not have."""


class PullError(SfiError):
    """A model could not be fetched."""


class InputError(SfiError):
    """The prompt cannot be used: empty, not text, or longer than the context."""


STATUS_ERRORS: dict[str, type[SfiError]] = {
    "SFI_ERR_ARGUMENT": ArgumentError,
    "SFI_ERR_MODEL": ModelError,
    "SFI_ERR_CONTEXT": ContextError,
    "SFI_ERR_KV_TYPE": KvTypeError,
    "SFI_ERR_BACKEND": BackendError,
    "SFI_ERR_FULL": ContextFullError,
    "SFI_ERR_MEMORY": OutOfMemoryError,
    "SFI_ERR_DECODE": DecodeError,
    "SFI_ERR_ABORTED": AbortedError,
    "SFI_ERR_NO_SUPPORT": NoSupportError,
    "SFI_ERR_BUSY": BusyError,
    "SFI_ERR_DETACHED": DetachedError,
    "SFI_ERR_VERSION": LibraryError,
    "SFI_ERR_CPU": LibraryError,
}


def from_status(name: str, message: str) -> SfiError:
    """The exception of a status name such as ``"SFI_ERR_FULL"``, with the library's sentence."""
    return STATUS_ERRORS.get(name, SfiError)(message or f"The native library failed with {name}.")


def exit_code(error: BaseException) -> int:
    """The exit code of the command line for an error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR

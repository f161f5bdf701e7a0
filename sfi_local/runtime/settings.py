"""What was asked for when a model is loaded, checked once. The command line, load() and SlowFastLlama fill it alike."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from sfi_local.errors import ArgumentError
from sfi_local.params import BUDGET, PORTABLE_POLICY, SfiParams
from sfi_local.runtime.modes import mode_of
from sfi_local.store.layout import KV_TYPES

MAX_CTX = 1 << 30
MAX_THREADS = 512    # of ggml
MAX_LAYERS = 9999    # more than any model has: all of them

KV_TYPE, SMALL_KV_TYPE = "f16", "q8_0"  # where none is asked for; where memory is short

SAME, CLOSE, FAST = QUALITIES = ("same", "close", "fast")
FLOOR = "floor"      # close, and nothing else: as near as two dense implementations are to each other

Lora = str | os.PathLike | Sequence[tuple[str | os.PathLike, float]]
Yarn = float | tuple[float, int]
Quality = str | float  # one of QUALITIES, FLOOR, or nats from dense


def parse_quality(text: str) -> Quality:
    """What is typed: one of QUALITIES, ``floor``, or nats. Raises ArgumentError."""
    try:
        return check_quality(text if text in (*QUALITIES, FLOOR) else float(text))
    except ValueError:
        raise _no_quality(text) from None


def check_quality(quality: Quality) -> Quality:
    """Return it, or raise ArgumentError."""
    if quality in (*QUALITIES, FLOOR) or not isinstance(quality, (str, bool)) and 0 < quality < math.inf:
        return quality
    raise _no_quality(quality)


def _no_quality(quality: Any) -> ArgumentError:
    return ArgumentError(f"quality is {quality!r}: give {', '.join(QUALITIES)}, or the divergence from dense that you allow, in nats, "
                         f"e.g. 0.004, or {FLOOR}.")


@dataclass(frozen=True)
class Settings:
    """How a model is loaded and decodes: what was asked for, and nothing that was decided; see tuning/quality.py for that.

    mode:       ``auto``, ``sfi``, ``dense``, ``exact`` or ``stock``
    n_ctx:      cells of the context; None: grows as needed
    n_threads:  None: one per physical core
    type_k, type_v: of the KV cache; None: KV_TYPE, with low_memory SMALL_KV_TYPE, which they are from then on
    gpu_layers: layers that a GPU holds; None: all
    kv_host:    K and V stay in the host's memory, and the CPU attends to them
    params:     an SfiParams is taken as it is; of a mapping of its fields these are kept, and all others may be adapted; None: {}
    quality:    how close to dense: ``same``, ``close``, ``fast``, ``floor`` or nats; None: close, or whatever the params have
    yarn:       stretch the trained context so many times, or (times, tokens that the model was trained on)
    lora:       a LoRA adapter, or several with their scales
    force:      go on where the memory is too small
    cache:      keep what is read in the prefix store, and take from it what was read before
    low_memory: weights stay in their file, prompts are computed by fewer tokens at once, texts to turn back to lie on the disk alone
    """

    mode: str = "auto"
    n_ctx: int | None = None
    n_threads: int | None = None
    type_k: str = None
    type_v: str = None
    gpu_layers: int | None = None
    kv_host: bool = False
    params: SfiParams | Mapping[str, Any] | None = None
    quality: Quality | None = None
    yarn: Yarn | None = None
    lora: Lora = ()
    force: bool = False
    cache: bool = True
    low_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("type_k", "type_v"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, SMALL_KV_TYPE if self.low_memory else KV_TYPE)

    @property
    def given(self) -> Mapping[str, Any]:
        """The fields of the parameters that were asked for one by one."""
        return {} if self.params is None or isinstance(self.params, SfiParams) else self.params

    @property
    def whole(self) -> bool:
        """Whether all parameters were given, so that none may be adapted."""
        return isinstance(self.params, SfiParams)

    @property
    def asked_params(self) -> SfiParams:
        """The parameters before anything is adapted."""
        return self.params if isinstance(self.params, SfiParams) else SfiParams.of(**{"policy": SfiParams.policy, **self.given})

    @property
    def portable_params(self) -> SfiParams | None:
        """The same choices under the policy that every device has; None: the policy was asked for."""
        return None if self.whole or "policy" in self.given else SfiParams.of(PORTABLE_POLICY, **self.given)

    @property
    def fits_budget(self) -> bool:
        """Whether the budget may be made smaller, because nobody asked for one."""
        return not self.whole and not any(name in self.given for name in BUDGET)

    @property
    def chooses_tolerance(self) -> bool:
        """Whether the quality decides the tolerance: there are fast steps of a policy that has one, and it was not asked for."""
        fixed = "tolerance" in self.given or self.whole and self.quality is None
        mode = mode_of(self.mode)
        return mode.fast and not mode.verifies and self.quality != SAME and self.asked_params.policy == "sketch" and not fixed

    def check(self) -> "Settings":
        """Return self, or raise ArgumentError with a sentence."""
        for name, least, most in (("n_ctx", 1, MAX_CTX), ("n_threads", 1, MAX_THREADS), ("gpu_layers", 0, MAX_LAYERS)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ArgumentError(f"{name} is {value}: give a number from {least} to {most}.")
        for name in ("type_k", "type_v"):
            if getattr(self, name) not in KV_TYPES:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(KV_TYPES)}.")
        return self.check_choices()

    def check_choices(self) -> "Settings":
        """The same of mode, parameters and quality alone."""
        mode_of(self.mode)
        unknown = next((name for name in self.given if name not in SfiParams.__dataclass_fields__), None)
        if unknown is not None:
            raise ArgumentError(f"params has {unknown!r}, which is no field of SfiParams: choose from "
                                f"{', '.join(SfiParams.__dataclass_fields__)}.")
        self.asked_params.validate()
        if self.quality is not None:
            self._check_quality(check_quality(self.quality))
        return self

    def _check_quality(self, quality: Quality) -> None:
        """Refuse two that decide the same, and a quality of steps that are not there."""
        if quality == SAME:
            if self.mode == "sfi":
                raise ArgumentError("quality same is mode exact, and the mode is sfi: leave one of them out.")
            return
        mode = mode_of(self.mode)
        if not mode.fast and quality != CLOSE:
            raise ArgumentError(f"quality {quality} is about fast steps, and mode {self.mode} has none: leave it out, or take mode auto.")
        if mode.verifies and quality != CLOSE:
            raise ArgumentError(f"quality {quality} is about the fast steps of modes auto and sfi, and those of mode exact are verified: "
                                f"leave it out.")
        if "tolerance" in self.given:
            raise ArgumentError("quality chooses the tolerance: leave out quality, or tolerance.")
        if self.asked_params.policy != "sketch" and quality != CLOSE:
            raise ArgumentError(f"quality {quality} is reached by the tolerance of policy sketch, which policy {self.asked_params.policy} "
                                f"has not: leave one of them out.")

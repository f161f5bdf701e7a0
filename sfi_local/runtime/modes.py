"""The modes: what each attaches to a context, of which kind its next step is, and what stands in where it cannot be had.

Strings are for the border: what a user gives is made a Mode by mode_of(), and shown by its name. A new mode is a class here and an
entry of MODES; the command line, load() and SlowFastLlama take their choices from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfi_local.binding.engine import Engine
from sfi_local.errors import ArgumentError, BackendError, ContextError, KvTypeError, ModelError
from sfi_local.params import SfiParams, auto_depth

CANNOT = (ModelError, ContextError, KvTypeError, BackendError)  # a model, a context or a device cannot be sparse


class Mode:
    """How a slot decodes; this one is ``sfi``: slow-fast at every depth.

    kinds:      of its steps, as Step.kind names them
    attaches:   sfi is attached to the context
    fast:       it has fast steps, which a budget, a tolerance and a schedule are about
    keeps_budget: a budget that was made smaller is worth a note
    measures:   the depth from which it is slow-fast is measured
    verifies:   tokens are drafted and verified, see exact.py
    """

    name = "sfi"
    kinds: tuple[str, ...] = ("slow", "fast")
    attaches = fast = keeps_budget = True
    measures = verifies = False

    def __str__(self) -> str:
        return self.name

    @property
    def always_fast(self) -> bool:
        """Whether each step is fast, but for the slow ones that the policy needs."""
        return self.kinds == ("slow", "fast")

    def depth(self, params: SfiParams) -> int:
        """Cells below which its steps are dense."""
        return 0

    def attach(self, context: Any, params: SfiParams) -> Engine | None:
        """To a llama_cpp._internals.LlamaContext. Raises one of CANNOT."""
        return Engine(context.ctx, params.replace(auto_depth=self.depth(params)), owner=context)

    def kind(self, engine: Engine, token: int) -> str:
        """Of the step that takes a token, as Engine.step() calls it."""
        return "auto"

    def stands_in(self) -> Mode | None:
        """The mode that takes its place where a model cannot be sparse."""
        return None


class Dense(Mode):
    """Every step dense, by our kernel."""

    name, kinds, fast, keeps_budget = "dense", ("dense",), False, False

    def kind(self, engine: Engine, token: int) -> str:
        return "dense"


class Auto(Mode):
    """Slow-fast from the depth where it pays, below it dense by what is faster (on a GPU llama.cpp's own attention); stock where the
    model cannot be sparse."""

    name, kinds, keeps_budget, measures = "auto", ("slow", "fast", "dense", "stock"), False, True

    def depth(self, params: SfiParams) -> int:
        return params.auto_depth or auto_depth(params)

    def stands_in(self) -> Mode | None:
        return STOCK


class Exact(Mode):
    """Fast steps whose tokens a dense pass verifies, from the depth where that can pay; below it dense steps."""

    name, kinds, verifies = "exact", ("slow", "fast", "dense"), True

    def depth(self, params: SfiParams) -> int:
        return params.auto_depth or auto_depth(params)

    def attach(self, context: Any, params: SfiParams) -> Engine | None:
        engine = super().attach(context, params)
        if engine and engine.path != "native":
            engine.close()
            raise BackendError("Mode exact verifies drafts in batches, which a device of this model computes with other rounding "
                               "than single tokens: use mode dense, or mode sfi with policy frozen.")
        return engine

    def kind(self, engine: Engine, token: int) -> str:
        """The schedule chooses slow steps alone: what it calls dense may be rounded otherwise."""
        kind, reason = engine.peek(token)
        return "dense" if kind in ("fast", "dense") or reason == "boundary" else "auto"


class Stock(Mode):
    """llama.cpp's own decoding; sfi is never attached."""

    name, kinds, attaches, fast, keeps_budget = "stock", ("stock",), False, False, False

    def attach(self, context: Any, params: SfiParams) -> Engine | None:
        return None


STOCK = Stock()
MODES: dict[str, Mode] = {mode.name: mode for mode in (Auto(), Mode(), Dense(), Exact(), STOCK)}


def mode_of(name: str | Mode) -> Mode:
    """The mode of a name. Raises ArgumentError."""
    mode = name if isinstance(name, Mode) else MODES.get(name)
    if mode is None:
        raise ArgumentError(f"mode is {name!r}: choose one of {', '.join(MODES)}.")
    return mode


@dataclass(frozen=True)
class Attached:
    """engine: None where decoding is llama.cpp's own; params: that were attached; why_stock: why not, though the mode would;
    fell_back: the policy is the portable one, for a device lacks the operations of the other"""

    engine: Engine | None
    params: SfiParams
    why_stock: str = ""
    fell_back: bool = False


def attach(mode: Mode, context: Any, params: SfiParams, portable: SfiParams | None = None) -> Attached:
    """Attach what a mode wants, with portable parameters where a device lacks the operations of these, or what stands in for it.

    portable: None: these parameters or none. Raises one of CANNOT where nothing stands in.
    """
    try:
        try:
            return Attached(mode.attach(context, params), params)
        except BackendError:
            if portable is None or portable.policy == params.policy:
                raise
            return Attached(mode.attach(context, portable), portable, fell_back=True)
    except CANNOT as error:
        if mode.stands_in() is None:
            raise type(error)(f"{error} Mode stock decodes it with llama.cpp's own path.") from None
        return Attached(None, params, why_stock=str(error))

"""What eval was asked for, and which rows that makes."""

from __future__ import annotations

from dataclasses import dataclass

from sfi_local.errors import UsageError
from sfi_local.lab.eval import rows as eval_rows
from sfi_local.lab.eval.rows import Row
from sfi_local.params import SfiParams
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.settings import Settings

MODES = ("dense", "stock", "sfi", "exact", "auto")  # in the order in which they are shown
DEFAULT_MODES = ("dense", "stock", "sfi")


@dataclass(frozen=True)
class EvalPlan:
    """What was asked for; the options of the command by their names."""

    model: str
    text: str | None = None
    depths: tuple[int, ...] = (2000,)
    n: int = 256
    modes: tuple[str, ...] = DEFAULT_MODES
    reference: bool = False
    own_rows: tuple[str, ...] = ()
    n_greedy: int | None = None
    n_exact: int | None = None
    temp: float = 0.0
    seed: int = 0
    passkey: int | None = None
    copy_length: int | None = None
    tasks: str | None = None
    limit: int | None = None
    kv_type: str = "f16"
    threads: int | None = None
    gpu_layers: int | None = None
    verbose: bool = False
    params: SfiParams = SfiParams()
    asked: Settings | None = None

    def sampling(self, number: int) -> "Sampling":
        """Of a prompt of --exact, by its number from 0."""
        return Sampling(temp=self.temp, seed=self.seed + number)

    @property
    def fit_budget(self) -> bool:
        """Whether the budget may be made smaller where the context is."""
        return self.asked is None or self.asked.fits_budget

    @property
    def is_tasks(self) -> bool:
        return bool(self.passkey or self.copy_length or self.tasks)

    def check(self, plot: str | None) -> None:
        """Refuse combinations that cannot be meant."""
        self._check_exact(plot)
        if self.is_tasks and (self.n_greedy or plot):
            raise UsageError("--greedy and --plot belong to the fidelity on a text: leave out --passkey, --copy and --tasks.")
        if self.limit and not self.tasks:
            raise UsageError("--limit takes the first tasks of a file: give one with --tasks.")
        if self.tasks == "-" == self.text:
            raise UsageError("stdin can be read once: give a file to --text or to --tasks.")
        if not self.is_tasks and not self.n_exact and any(row.decodes.verifies for row in self.rows()):
            raise UsageError("Mode exact generates what dense does and has no distributions of its own on a given text: measure it with "
                             "--exact N, or on prompts with --passkey, --copy or --tasks.")
        self.rows()

    def _check_exact(self, plot: str | None) -> None:
        if not self.n_exact and (self.temp or self.seed):
            raise UsageError("--temp and --seed are of --exact: everything else is greedy, or a text that is given.")
        if not self.n_exact:
            return
        if self.is_tasks or self.n_greedy or self.reference or plot or self.modes not in (DEFAULT_MODES, ("exact",)):
            raise UsageError("--exact compares mode exact with dense and nothing else: leave out --passkey, --copy, --tasks, --greedy, "
                             "--reference, --plot and --modes.")
        if self.asked and self.asked.quality is not None:
            raise UsageError("--quality is about the fast steps of modes auto and sfi; those of mode exact are verified: leave it out.")
        if any(not row.decodes.verifies for row in self.rows()[1:]):
            raise UsageError("--exact compares rows of mode exact with dense: give every --row mode=exact.")

    def rows(self) -> list["Row"]:
        """All rows, dense first. Raises UsageError, ArgumentError."""
        if self.n_exact:
            rows = eval_rows.mode_rows(("dense", "exact"), self.fit_budget)
            return eval_rows.unique(rows + [eval_rows.parse_row(text) for text in self.own_rows])
        rows = eval_rows.mode_rows(tuple(dict.fromkeys(("dense", *self.modes))), self.fit_budget)
        rows += eval_rows.read_rows(self.params)
        rows += eval_rows.reference_rows(self.modes, self.kv_type, self.params) if self.reference else []
        return eval_rows.unique(rows + [eval_rows.parse_row(text) for text in self.own_rows])

"""sfi-local eval: how close modes and policies are to dense decoding, on a text and on prompts whose answer is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from sfi_local.errors import UsageError
from sfi_local.kv_layout import KV_TYPES
from sfi_local.options import depth_list, fidelity_option, gpu_option, name_list, sfi_options, take_params
from sfi_local.params import SfiParams
from sfi_local.rows_report import FORMATS

if TYPE_CHECKING:
    from sfi_local.eval_prompts import Prompt
    from sfi_local.eval_rows import Row
    from sfi_local.sampling import Sampling

MODES = ("dense", "stock", "sfi", "exact", "auto")  # in the order in which they are shown
DEFAULT_MODES = ("dense", "stock", "sfi")


@click.command("eval", short_help="Measure fidelity: how close modes and policies are to dense decoding.")
@click.argument("model")
@click.option("--text", metavar="FILE", help="The text that is decoded, or what pass keys are hidden in; - reads stdin "
              "[default: Python's own help topics].")
@click.option("--depth", "depths", default="2000", show_default=True, callback=depth_list, metavar="A,B",
              help="Tokens in the KV cache before the first step; length of the prompts with --passkey, --copy and --exact.")
@click.option("-n", "--n", "n", type=click.IntRange(1), default=256, show_default=True, metavar="N",
              help="Tokens of the text that are decoded at each depth; with --exact tokens that are generated for each prompt.")
@click.option("--modes", default=",".join(DEFAULT_MODES), show_default=True, callback=name_list(MODES, "mode"), metavar="A,B",
              help=f"Of {', '.join(MODES)}; dense is measured in any case, exact on prompts.")
@click.option("--reference", is_flag=True, help="Also the rows a policy is judged against: stock, the policies, frozen as in "
              "the paper and with a fixed period, sink + recent of the same bytes, the oracle, KV in q8_0 and q4_0.")
@click.option("--row", "own_rows", multiple=True, metavar="NAME:FIELD=VALUE,...",
              help="A row of your own: mode, kv_type, slow_every, draft (mode exact: tokens per span), and what --support to "
              "--pool-before set.")
@click.option("--greedy", "n_greedy", type=click.IntRange(1), metavar="N",
              help="Also compare with N tokens of dense's own greedy output.")
@click.option("--exact", "n_exact", type=click.IntRange(1), metavar="N",
              help="Compare mode exact with dense, token by token, on N prompts cut from the text at even distances.")
@click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X",
              help="Temperature of --exact; the other settings of the sampler are those of a run.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="N",
              help="Seed of --exact for the first prompt, N + 1 for the second and so on; the same in both modes.")
@click.option("--passkey", type=click.IntRange(1), metavar="N", help="N prompts with a pass key at ten places in a text.")
@click.option("--copy", "copy_length", type=click.IntRange(2), metavar="N", help="Copy passages of N tokens from ten places.")
@click.option("--tasks", metavar="FILE", help="Prompts of a JSONL file: LongEval lines, key-value retrieval, or prompt and "
              "answer.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N tasks of the file.")
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True,
              help="Type of K and V, of dense too.")
@click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads [default: one per core].")
@gpu_option
@sfi_options
@fidelity_option
@click.option("-o", "--output", "output", type=click.Choice(list(FORMATS)), default="table", show_default=True)
@click.option("--save", metavar="FILE", help="Also write the rows into FILE, as JSON.")
@click.option("--plot", metavar="FILE", help="Draw KL against the bytes read into FILE.png, .svg or .pdf.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def command(**options: Any) -> None:
    """Measure the fidelity of MODEL's modes: everything is decoded step by step, as in a run, never taken from a prefill.

    \b
    sfi-local eval smollm2-135m --text book.txt --depth 2000,6400 -n 512
    sfi-local eval smollm2-135m --depth 6000 --reference --plot fidelity.png
    sfi-local eval smollm2-135m --depth 6000 --row small:n_selected=512 --row window:support=window --greedy 200
    sfi-local eval smollm2-135m --passkey 20 --depth 6000
    sfi-local eval smollm2-135m --exact 20 --depth 2300 -n 200 --temp 0.8
    sfi-local eval smollm2-135m --tasks lines.jsonl --limit 20 -o json

    The text up to the depth is prefilled once. Then every row decodes the tokens that follow, from the same state, and its
    distribution of the next token is compared with dense's: KL is the divergence of the row from dense in nats per token,
    top-1 how often both find the same token most likely, dNLL how much less likely the row finds the text. KV read is
    the bytes of the cache that were read, over those of dense; the row stock is the noise of two dense implementations.

    With --passkey, --copy or --tasks the rows answer prompts instead, greedily, and are counted on the same prompts.

    With --exact mode exact generates from each prompt what mode dense does, with the same random numbers. equal counts the
    tokens before the first difference of each prompt, ties the tokens that rounding might have decided otherwise, kept the
    drafts per span that verification kept. A difference that rounding does not explain is said in the row, and the exit code is 1:
    one that is no tie, and that the same dense passes without drafts do not give.
    """
    params, fit = take_params(options)
    output, save, plot = options.pop("output"), options.pop("save"), options.pop("plot")
    request = Request(**options, params=params, fit_budget=fit.budget)
    request.check(plot)
    from sfi_local import eval_report, rows_report
    from sfi_local.out_file import check_writable

    if plot:
        rows_report.check_plot(plot)
    if save:
        check_writable(save)
    rows = measure(request)
    if save:
        eval_report.save(rows, save)
    if plot:
        eval_report.plot(rows, plot)
    click.echo(eval_report.show(output, rows))
    eval_report.check(rows)


@dataclass(frozen=True)
class Request:
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
    fit_budget: bool = True
    fidelity: float | str | None = None

    def sampling(self, number: int) -> "Sampling":
        """Of a prompt of --exact, by its number from 0."""
        from sfi_local.sampling import Sampling

        return Sampling(temp=self.temp, seed=self.seed + number)

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
        if not self.is_tasks and not self.n_exact and any(row.mode == "exact" for row in self.rows()):
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
        if self.fidelity not in (None, "default"):
            raise UsageError("--fidelity is about the fast steps of modes auto and sfi; those of mode exact are verified: leave it out.")
        if any(row.mode != "exact" for row in self.rows()[1:]):
            raise UsageError("--exact compares rows of mode exact with dense: give every --row mode=exact.")

    def rows(self) -> list["Row"]:
        """All rows, dense first. Raises UsageError, ArgumentError."""
        from sfi_local import eval_rows

        if self.n_exact:
            rows = eval_rows.mode_rows(("dense", "exact"), self.fit_budget)
            return eval_rows.unique(rows + [eval_rows.parse_row(text) for text in self.own_rows])
        rows = eval_rows.mode_rows(tuple(dict.fromkeys(("dense", *self.modes))), self.fit_budget)
        rows += eval_rows.reference_rows(self.modes, self.kv_type, self.params) if self.reference else []
        return eval_rows.unique(rows + [eval_rows.parse_row(text) for text in self.own_rows])


def measure(request: Request) -> list[dict[str, Any]]:
    """All rows, see eval_report. Raises InputError, CheckError, and what loading a model raises."""
    from sfi_local.measured import check_depth, fetch, settled_params

    path = fetch(request.model)
    if not request.n_exact:
        request = replace(request, params=settled_params(request.params, path, request.kv_type, request.fidelity))
    if not request.tasks or request.passkey or request.copy_length:
        check_depth(path, request.depths[-1], 0 if request.is_tasks else max(request.n, request.n_greedy or 0))
    if request.n_exact:
        return measure_exact(request, path)
    return measure_tasks(request, path) if request.is_tasks else measure_text(request, path)


def measure_text(request: Request, path: Any) -> list[dict[str, Any]]:
    """Fidelity on a text."""
    from sfi_local import eval_kl, eval_report
    from sfi_local.bar import Bar
    from sfi_local.measured import text_tokens
    from sfi_local.model import load
    from sfi_local.text_input import measured_text

    rows, need = request.rows(), request.depths[-1] + request.n
    text, source = measured_text(request.text)
    with Bar(len(rows) * len(request.depths)) as bar, load(
            path, mode="stock", n_ctx=need, n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
            gpu_layers=request.gpu_layers, verbose=request.verbose) as model:
        tokens = text_tokens(model, text, source, need, f"--depth {request.depths[-1]} with -n {request.n} takes",
                             "lower --depth, or lower -n")
        found = eval_kl.measure(model, request.depths, request.n, rows, tune_auto(request, model), tokens, request.kv_type,
                                request.n_greedy or 0, bar)
        return eval_report.text_rows(found, request, model)


def measure_tasks(request: Request, path: Any) -> list[dict[str, Any]]:
    """Answers to prompts."""
    from sfi_local import eval_exact, eval_report, eval_tasks
    from sfi_local.bar import Bar
    from sfi_local.model import load

    found = []
    with load(path, mode="stock", n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
              gpu_layers=request.gpu_layers, verbose=request.verbose) as model:
        sets = prompt_sets(request, model)
        params = tune_auto(request, model)
        with Bar(sum(len(prompts) for _, _, prompts in sets)) as bar:
            for task, depth, prompts in sets:
                label = f"{task} @ {depth}" if depth else task
                scores = eval_tasks.answer_all(model, prompts, request.rows(), params, request.kv_type, bar, label)
                eval_exact.refuse(scores)
                found += eval_report.task_rows(scores, task, depth, request, model)
    return found


def measure_exact(request: Request, path: Any) -> list[dict[str, Any]]:
    """Mode exact beside dense."""
    from sfi_local import eval_exact, eval_report, eval_tasks
    from sfi_local.bar import Bar
    from sfi_local.eval_prompts import excerpts
    from sfi_local.model import load
    from sfi_local.text_input import measured_text

    eval_exact.check_depth(request.rows(), request.params, request.depths[0], request.n)
    text, source = measured_text(request.text)
    found = []
    with load(path, mode="stock", n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
              gpu_layers=request.gpu_layers, verbose=request.verbose) as model, Bar(len(request.depths) * request.n_exact) as bar:
        sets = [(depth, excerpts(model, text, source, depth, request.n_exact, request.n)) for depth in request.depths]
        for depth, prompts in sets:
            scores = eval_tasks.answer_all(model, prompts, request.rows(), request.params, request.kv_type, bar, f"exact @ {depth}",
                                           request.sampling)
            eval_exact.check_drafted(scores)
            found += eval_report.exact_rows(scores, depth, request, model)
    return found


def prompt_sets(request: Request, model: Any) -> list[tuple[str, int | None, list["Prompt"]]]:
    """(task, depth asked for, prompts); everything that can be refused is, before anything is measured."""
    from sfi_local import eval_prompts
    from sfi_local.measured import text_tokens
    from sfi_local.text_input import from_file, measured_text

    sets: list[tuple[str, int | None, list["Prompt"]]] = []
    if request.tasks:
        tasks = eval_prompts.task_file(from_file(request.tasks), request.tasks)
        sets.append(("tasks", None, [eval_prompts.ask(model, *task) for task in tasks[:request.limit]]))
    text, source = measured_text(request.text) if request.passkey or request.copy_length else ("", "")
    for depth in request.depths:
        if request.passkey:
            sets.append(("passkey", depth, eval_prompts.passkeys(model, text, source, depth, request.passkey)))
        if request.copy_length:
            tokens = text_tokens(model, text, source, depth, f"--depth {depth} takes", "lower --depth")
            sets.append(("copy", depth, eval_prompts.copies(model, tokens, depth, request.copy_length)))
    return sets


def tune_auto(request: Request, model: Any) -> SfiParams:
    """The parameters, with the depth from which auto is slow-fast, if auto is measured."""
    if "auto" not in request.modes or request.params.auto_depth:
        return request.params
    from sfi_local.calibrate import auto_depth_of

    return request.params.replace(auto_depth=auto_depth_of(model, request.params, request.kv_type, request.kv_type)[0])

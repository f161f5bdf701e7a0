"""sfi-local eval: how close modes and policies are to dense decoding, on a text and on prompts whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from sfi_local.cli.options import COUNT, depth_list, gpu_option, name_list, quality_option, set_options, take_params, threads_option
from sfi_local.cli.progress import Runs
from sfi_local.cli.text_input import from_file
from sfi_local.fields import MAX_INT
from sfi_local.lab import tables
from sfi_local.lab.eval import answers as eval_answers
from sfi_local.lab.eval import exact as eval_exact
from sfi_local.lab.eval import prompts as eval_prompts
from sfi_local.lab.eval import report as eval_report
from sfi_local.lab.eval import text as eval_text
from sfi_local.lab.eval.prompts import Prompt, excerpts
from sfi_local.lab.eval.request import DEFAULT_MODES, MODES, EvalPlan
from sfi_local.lab.facts import check_depth, fetch, measured_text, params_with_quality, text_tokens
from sfi_local.lab.tables import FORMATS
from sfi_local.loading import load
from sfi_local.params import SfiParams
from sfi_local.store.layout import KV_TYPES
from sfi_local.tuning.auto_depth import auto_depth_of
from sfi_local.whole_file import check_writable


@click.command("eval", short_help="Measure fidelity: how close modes and policies are to dense decoding.")
@click.argument("model")
@click.option("--text", metavar="FILE", help="The text that is decoded, or what pass keys are hidden in; - reads stdin "
              "[default: Python's own help topics].")
@click.option("--depth", "depths", default="2000", show_default=True, callback=depth_list, metavar="A,B",
              help="Tokens in the KV cache before the first step; length of the prompts with --passkey, --copy and --exact.")
@click.option("-n", "--n", "n", type=COUNT, default=256, show_default=True, metavar="N",
              help="Tokens of the text that are decoded at each depth; with --exact tokens that are generated for each prompt.")
@click.option("--modes", default=",".join(DEFAULT_MODES), show_default=True, callback=name_list(MODES, "mode"), metavar="A,B",
              help=f"Of {', '.join(MODES)}; dense is measured in any case, exact on prompts.")
@click.option("--reference", is_flag=True, help="Also the rows a policy is judged against: stock, the policies, frozen as in "
              "the paper and with a fixed period, sink + recent of the same bytes, the oracle, KV in q8_0 and q4_0.")
@click.option("--row", "own_rows", multiple=True, metavar="NAME:FIELD=VALUE,...",
              help="A row of your own: mode, kv_type, slow_every, draft (mode exact: tokens per span), and what --set takes.")
@click.option("--greedy", "n_greedy", type=COUNT, metavar="N",
              help="Also compare with N tokens of dense's own greedy output.")
@click.option("--exact", "n_exact", type=COUNT, metavar="N",
              help="Compare mode exact with dense, token by token, on N prompts cut from the text at even distances.")
@click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X",
              help="Temperature of --exact; the other settings of the sampler are those of a run.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="N",
              help="Seed of --exact for the first prompt, N + 1 for the second and so on; the same in both modes.")
@click.option("--passkey", type=COUNT, metavar="N", help="N prompts with a pass key at ten places in a text.")
@click.option("--copy", "copy_length", type=click.IntRange(2, MAX_INT), metavar="N", help="Copy passages of N tokens from ten places.")
@click.option("--tasks", metavar="FILE", help="Prompts of a JSONL file: LongEval lines, key-value retrieval, or prompt and "
              "answer.")
@click.option("--limit", type=COUNT, metavar="N", help="Only the first N tasks of the file.")
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True,
              help="Type of K and V, of dense too.")
@threads_option
@gpu_option
@set_options()
@quality_option
@click.option("-o", "--output", "output", type=click.Choice(list(FORMATS)), default="table", show_default=True)
@click.option("--save", metavar="FILE", help="Also write the rows into FILE, as JSON.")
@click.option("--plot", metavar="FILE", help="Draw KL against the bytes read into FILE.png, .svg or .pdf.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def command(**options: Any) -> None:
    """Measure the fidelity of MODEL's modes: everything is decoded step by step, as in a run, never taken from a prefill.

    \b
    sfi-local eval smollm2-135m --text book.txt --depth 2000,6400 -n 512
    sfi-local eval smollm2-135m --depth 6000 --reference --plot fidelity.png
    sfi-local eval smollm2-135m --depth 6000 --row small:n_selected=512 --row window:policy=window --greedy 200
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
    asked = take_params(options)
    output, save, plot = options.pop("output"), options.pop("save"), options.pop("plot")
    request = EvalPlan(**options, params=asked.asked_params, asked=asked)
    request.check(plot)

    if plot:
        tables.check_plot(plot)
    if save:
        check_writable(save)
    rows = measure(request)
    if save:
        eval_report.save(rows, save)
    if plot:
        eval_report.plot(rows, plot)
    click.echo(eval_report.show(output, rows))
    eval_report.check(rows)


def measure(request: EvalPlan) -> list[dict[str, Any]]:
    """All rows, see report.py. Raises InputError, CheckError, and what loading a model raises."""
    path = fetch(request.model)
    if not request.n_exact:
        request = replace(request, params=params_with_quality(request.params, path, request.kv_type, request.asked))
    if not request.tasks or request.passkey or request.copy_length:
        check_depth(path, request.depths[-1], 0 if request.is_tasks else max(request.n, request.n_greedy or 0))
    if request.n_exact:
        return measure_exact(request, path)
    return measure_tasks(request, path) if request.is_tasks else measure_text(request, path)


def measure_text(request: EvalPlan, path: Any) -> list[dict[str, Any]]:
    """Fidelity on a text."""
    rows, need = request.rows(), request.depths[-1] + request.n
    text, source = measured_text(request.text)
    with Runs(len(rows) * len(request.depths)) as bar, load(
            path, mode="stock", n_ctx=need, n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
            gpu_layers=request.gpu_layers, cache=False, verbose=request.verbose) as model:
        tokens = text_tokens(model, text, source, need, f"--depth {request.depths[-1]} with -n {request.n} takes",
                             "lower --depth, or lower -n")
        found = eval_text.measure(model, request.depths, request.n, rows, tune_auto(request, model), tokens, request.kv_type,
                                request.n_greedy or 0, bar)
        return eval_report.text_rows(found, request, model)


def measure_tasks(request: EvalPlan, path: Any) -> list[dict[str, Any]]:
    """Answers to prompts."""
    found = []
    with load(path, mode="stock", n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
              gpu_layers=request.gpu_layers, cache=False, verbose=request.verbose) as model:
        sets = prompt_sets(request, model)
        params = tune_auto(request, model)
        with Runs(sum(len(prompts) for _, _, prompts in sets)) as bar:
            for task, depth, prompts in sets:
                label = f"{task} @ {depth}" if depth else task
                scores = eval_answers.answer_all(model, prompts, request.rows(), params, request.kv_type, bar, label)
                eval_exact.refuse(scores)
                found += eval_report.task_rows(scores, task, depth, request, model)
    return found


def measure_exact(request: EvalPlan, path: Any) -> list[dict[str, Any]]:
    """Mode exact beside dense."""
    eval_exact.check_depth(request.rows(), request.params, request.depths[0], request.n)
    text, source = measured_text(request.text)
    found = []
    with load(path, mode="exact", n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type,
              gpu_layers=request.gpu_layers, cache=False, verbose=request.verbose) as model, Runs(len(request.depths) * request.n_exact) as bar:
        sets = [(depth, excerpts(model, text, source, depth, request.n_exact, request.n)) for depth in request.depths]
        for depth, prompts in sets:
            scores = eval_answers.answer_all(model, prompts, request.rows(), request.params, request.kv_type, bar, f"exact @ {depth}",
                                           request.sampling)
            eval_exact.check_drafted(scores)
            found += eval_report.exact_rows(scores, depth, request, model)
    return found


def prompt_sets(request: EvalPlan, model: Any) -> list[tuple[str, int | None, list["Prompt"]]]:
    """(task, depth asked for, prompts); everything that can be refused is, before anything is measured."""
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


def tune_auto(request: EvalPlan, model: Any) -> SfiParams:
    """The parameters, with the depth from which auto is slow-fast, if auto is measured."""
    if "auto" not in request.modes or request.params.auto_depth:
        return request.params

    return request.params.replace(auto_depth=auto_depth_of(model, request.params, request.kv_type, request.kv_type)[0])

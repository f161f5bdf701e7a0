"""Load a model and generate with it: what ``sfi_local.load`` returns."""

from __future__ import annotations

import ctypes
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from sfi_local import gpu, kv_layout
from sfi_local.context_cost import check_memory, cost_of
from sfi_local.devices import all_native
from sfi_local.errors import ArgumentError, BackendError, ModelFileError, SfiError
from sfi_local.exact import generate_exact
from sfi_local.generate import generate
from sfi_local.gguf_file import GgufFile, read_gguf
from sfi_local.interrupt import InterruptFlag
from sfi_local.library import last_log_lines, log, open_library
from sfi_local.machine import physical_cores
from sfi_local.params import PORTABLE_POLICY, SfiParams
from sfi_local.prompt import ChatTemplate, Message, too_long
from sfi_local.pull import resolve
from sfi_local.sampling import Sampling
from sfi_local.session import MODES, Progress, Schedule, Session
from sfi_local.span import MAX_DRAFTS
from sfi_local.step import Step

MIN_CTX = 512        # a context smaller than this is of no use
FIRST_CTX = 4096     # a context starts at this size and grows with the conversation
MAX_THREADS = 512    # of ggml
MAX_LAYERS = 9999    # more than any model has: all of them


def load(model: str | os.PathLike, *, mode: str = "auto", n_ctx: int | None = None, n_threads: int | None = None,
         type_k: str = "f16", type_v: str = "f16", params: SfiParams | None = None, fit_budget: bool = False,
         portable_params: SfiParams | None = None, fidelity: float | str | None = None, gpu_layers: int | None = None,
         verbose: bool = False,
         progress: Callable[[float, float], None] | None = None) -> "Model":
    """Load a model given by path, catalogue name (fetched on first use) or ``hf:user/repo:quant``.

    mode:      ``auto``, ``sfi``, ``dense``, ``exact`` or ``stock``, see session.py
    n_ctx:     cells of the context; None: grows as needed, up to what the model was trained on and memory allows
    n_threads: None: one per physical core
    type_k, type_v: f16, bf16, q8_0, q4_0 or f32
    params:    budget, schedule and selector; None: the defaults, with fit_budget, and of policy frozen as portable_params
    fit_budget: make the budget smaller where the context is, instead of refusing it
    portable_params: take these instead where a device of the model lacks the operations of the params' policy
    fidelity:  nats from dense, or ``floor``: takes the place of the params' tolerance in modes ``auto`` and ``sfi``, see
               fidelity.py; None without params: ``floor``, if the model is calibrated
    gpu_layers: layers that a GPU holds and computes, the output being one more; None: all, where the build has a GPU backend
    progress:  called with (done, total) while the weights are read
    Raises ModelFileError, CatalogueError, PullError, OutOfMemoryError, LibraryError, ArgumentError, InputError.
    """
    _check_options(mode, n_ctx, n_threads, type_k, type_v, params, gpu_layers)
    file = read_gguf(resolve(os.fspath(model)))
    gpus, no_gpu = gpu.usable(gpu_layers)
    layers = kv_layout.layers(file)
    settled, note = settle(file, mode, type_k, type_v, params, fidelity)
    portable = portable_params if params else SfiParams.of(PORTABLE_POLICY)
    cost = cost_of(layers, mode, type_k, type_v, settled, portable or settled, bool(gpus))
    room = check_memory(file, cost, n_ctx or MIN_CTX, gpu.share_of(len(layers), gpu_layers, gpus), gpus)
    _check_generates(file)
    native = open_library()
    log.verbose = verbose
    weights = _load_weights(native.llama_cpp, file.path, gpu_layers, progress)
    model = Model(file, weights, room and cost.cells(room), mode=mode, n_ctx=n_ctx, n_threads=n_threads or physical_cores(), type_k=type_k,
                  type_v=type_v, params=settled, fit_budget=fit_budget or params is None, gpu_layers=gpu_layers,
                  portable_params=portable)
    for sentence in filter(None, (note, no_gpu)):
        model._note(sentence)
    return model


class Model:
    """A loaded model and its one conversation. Not for several threads at a time (BusyError).

    n_fit: cells of the largest context that the memory holds; None: not known
    """

    def __init__(self, file: GgufFile, weights: Any, n_fit: int | None, *, mode: str, n_ctx: int | None, n_threads: int,
                 type_k: str, type_v: str, params: SfiParams, fit_budget: bool, gpu_layers: int | None = None,
                 portable_params: SfiParams | None = None):
        self.file, self.mode, self.n_threads, self.gpu_layers = file, mode, n_threads, gpu_layers
        self.notes: list[str] = []  # what was decided on the caller's behalf, in sentences
        self._n_notes_read = 0
        self._weights, self._n_fit, self._n_ctx = weights, n_fit, n_ctx
        self._types, self._params, self._fit_budget, self._portable = (type_k, type_v), params, fit_budget, portable_params
        self.vocabulary = Vocabulary(weights)
        self.session: Session | None = None
        self.auto_found = ""  # how the depth from which auto is slow-fast was found

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def gpus(self) -> list[str]:
        """Descriptions of the GPUs that hold its layers."""
        return [] if self.gpu_layers == 0 else [g.description for g in gpu.gpus()]

    @property
    def name(self) -> str:
        """The model's own name, or its file's."""
        return str(self.file.metadata.get("general.name") or self.path.stem)

    @cached_property
    def n_ctx_limit(self) -> int:
        """The largest context this model may have here: given, else as trained and as memory allows."""
        if self._n_ctx:
            return self._n_ctx
        trained = self.file.n_ctx_train or FIRST_CTX
        return trained if self._n_fit is None else max(MIN_CTX, min(trained, self._n_fit))

    @cached_property
    def template(self) -> ChatTemplate:
        v = self.vocabulary
        return ChatTemplate(self.file.metadata.get("tokenizer.chat_template"), v.bos_text, v.eos_text, v.add_bos,
                            v.tokenize)

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids; with ``special`` the text of a special token becomes that token."""
        return self.vocabulary.tokenize(text, add_bos, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.vocabulary.piece(t) for t in tokens).decode("utf-8", errors="replace")

    def prompt_tokens(self, prompt: str | Sequence) -> list[int]:
        """Token ids of a text (as it is), of messages (in the chat template), or of token ids (unchanged).

        Messages are Message objects or dicts with ``role`` and ``content``.
        """
        if isinstance(prompt, str):
            return self.tokenize(prompt, self.vocabulary.add_bos, True)
        if prompt and isinstance(prompt[0], int):
            return list(prompt)
        messages = [m if isinstance(m, Message) else Message(m["role"], [m["content"]]) for m in prompt]
        return self.template.tokens(messages)

    def generate(self, prompt: str | Sequence, *, n: int | None = 512, sampling: Sampling | None = None,
                 stop: Sequence[str] = (), schedule: Schedule | None = None,
                 draft: int | None = None, progress: Progress | None = None) -> Iterator[Step]:
        """Yield a Step per generated token; see generate.generate, and in mode ``exact`` exact.generate_exact.

        prompt: text, messages or token ids, see prompt_tokens
        n:      tokens at most; None: until the answer ends or the context is full
        draft:  mode ``exact``: tokens drafted per span; None: as many as pay
        Raises InputError if the prompt is empty or does not fit, ArgumentError for options that the mode does not have.
        """
        self._check_generate(schedule, draft)
        tokens = self.prompt_tokens(prompt) if prompt else []
        sampler = (sampling or Sampling()).validate().chain()
        session = self.open_session(len(tokens), n)
        if self.mode == "exact":
            yield from generate_exact(session, self.vocabulary, tokens, sampler, n, stop, draft, progress)
        else:
            yield from generate(session, self.vocabulary, tokens, sampler, n, stop, schedule, progress)

    def _check_generate(self, schedule: Schedule | None, draft: int | None) -> None:
        if self.mode == "exact" and schedule:
            raise ArgumentError("In mode exact every step is a draft or a verification: leave the schedule out.")
        if draft is not None and (self.mode != "exact" or not 0 <= draft <= MAX_DRAFTS):
            raise ArgumentError(f"draft is {draft}: give a number from 0 to {MAX_DRAFTS}, in mode exact.")

    def open_session(self, n_prompt: int, n: int | None) -> Session:
        """The session, with room for a prompt and n more tokens if the limit allows; a larger one is made if needed."""
        if n_prompt > self.n_ctx_limit:
            raise too_long(n_prompt, self.n_ctx_limit)
        need = min(self.n_ctx_limit, n_prompt + n if n else self.n_ctx_limit)
        self._settle_policy()
        self.tune_auto(n_prompt + (n or 0))
        if self.session is None or self.session.n_ctx < need:
            grown = 2 * self.session.n_ctx if self.session else FIRST_CTX
            self.close_session()
            self.session = self._new_session(self._n_ctx or min(self.n_ctx_limit, max(grown, _round_up(need))))
        return self.session

    def tune_auto(self, n_tokens: int) -> SfiParams:
        """Find the depth from which ``auto`` is slow-fast, once, and only where the text may get longer than the budget.

        Returns the parameters; their auto_depth is 0 as long as there was no reason to look.
        """
        if self.mode != "auto" or self._params.auto_depth or n_tokens <= self._params.budget:
            return self._params
        from sfi_local.calibrate import auto_depth_of

        params = self._fit_params(self.n_ctx_limit)
        depth, self.auto_found = auto_depth_of(self, params, *self._types)
        self._params = self._params.replace(auto_depth=depth)
        if self.auto_found == "measured":
            self._note(f"Measured once for this model on this machine: slow-fast decoding pays from a depth of {depth} tokens.")
        elif log.verbose:
            self._note(f"Mode auto is slow-fast from a depth of {depth} tokens ({self.auto_found}).")
        if self.session and self.session.engine:
            self.session.engine.params = self.session.engine.params.replace(auto_depth=depth)
        return self._params

    def close_session(self) -> None:
        """Free the context; the weights stay."""
        if self.session:
            self.session.close()
            self.session = None

    def close(self) -> None:
        """Free everything. May be called twice."""
        self.close_session()
        self._weights.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _new_session(self, n_ctx: int) -> Session:
        session = Session(self._weights, n_ctx, self.mode, self._fit_params(n_ctx), self.n_threads, *self._types)
        if session.why_stock:
            self._note(f"Decoding is dense, by llama.cpp's own path: {session.why_stock}")
        if n_ctx > self.file.n_ctx_train > 0:
            self._note(f"The context of {n_ctx} tokens is longer than the {self.file.n_ctx_train} the model was "
                       f"trained on: expect worse answers beyond that.")
        return session

    def _settle_policy(self) -> None:
        """Take another policy, with a note, where this one was nobody's choice and a device of the model lacks its operations.

        Once, and before anything is measured; where every device has them no context is made to find out.
        """
        portable, self._portable = self._portable, None
        if portable is None or self.mode == "stock" or self._params.support == portable.support:
            return
        if all_native(self._params, bool(self.gpus)):
            return
        mode = "sfi" if self.mode == "auto" else self.mode  # auto would not say why
        try:
            Session(self._weights, MIN_CTX, mode, self._params.fit_context(MIN_CTX), self.n_threads, *self._types).close()
        except BackendError:
            if self.mode != "dense":
                self._note(f"A device of this model lacks the operations of policy {self._params.support}: the policy is "
                           f"{portable.support} here.")
            self._params = portable.validate()
        except SfiError:
            pass  # the session that is wanted says it

    def _fit_params(self, n_ctx: int) -> SfiParams:
        """The parameters for a context of n_ctx cells."""
        if self.mode == "stock":
            return self._params
        if not self._fit_budget and self.mode != "dense":
            self._params.check_context(n_ctx)
            return self._params
        params = self._params.fit_context(n_ctx)
        if self.mode in ("sfi", "exact") and params.budget < self._params.budget:
            self._note(f"The budget of {self._params.budget} cells does not fit a context of {n_ctx} tokens; it is "
                       f"{params.budget} cells here.")
        return params

    def unread_notes(self) -> list[str]:
        """The notes since the last call."""
        unread, self._n_notes_read = self.notes[self._n_notes_read:], len(self.notes)
        return unread

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


class Vocabulary:
    """Tokens and text of a model. Pure reading, safe from any thread."""

    def __init__(self, weights: Any):
        self._weights, self._llama = weights, open_library().llama_cpp
        self.add_bos = bool(weights.add_bos_token())
        self.bos_text, self.eos_text = self._text(weights.token_bos()), self._text(weights.token_eos())

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return self._weights.tokenize(text.encode("utf-8"), add_bos, special)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; b"" for a special one."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self._weights.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def name(self, token: int) -> str:
        """How the vocabulary spells a token, e.g. ``<|im_end|>`` for a special one."""
        return self._text(token)

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self._llama.llama_vocab_is_eog(self._weights.vocab, token))

    def _text(self, token: int) -> str:
        return self._weights.token_get_text(token) if token >= 0 else ""


def _check_options(mode: str, n_ctx: int | None, n_threads: int | None, type_k: str, type_v: str,
                   params: SfiParams | None, gpu_layers: int | None) -> None:
    if mode not in MODES:
        raise ArgumentError(f"mode is {mode!r}: choose one of {', '.join(MODES)}.")
    for name, value, least, most in (("n_ctx", n_ctx, 1, 1 << 30), ("n_threads", n_threads, 1, MAX_THREADS),
                                     ("gpu_layers", gpu_layers, 0, MAX_LAYERS)):
        if value is not None and not least <= value <= most:
            raise ArgumentError(f"{name} is {value}: give a number from {least} to {most}.")
    for kv_type in (type_k, type_v):
        if kv_type not in kv_layout.KV_TYPES:
            raise ArgumentError(f"The KV type is {kv_type!r}: choose one of {', '.join(kv_layout.KV_TYPES)}.")
    if params:
        params.validate()


def settle(file: GgufFile, mode: str, type_k: str, type_v: str, params: SfiParams | None,
           fidelity: float | str | None) -> tuple[SfiParams, str]:
    """(parameters, note), see fidelity.settle; without fast steps there is nothing to settle."""
    from sfi_local import fidelity as calibrated

    if mode not in ("auto", "sfi"):
        return params or SfiParams(), ""
    if fidelity is None and params is None:
        fidelity = calibrated.DEFAULT
    return calibrated.settle(params or SfiParams(), file.path, type_k, type_v, fidelity)


def _check_generates(file: GgufFile) -> None:
    """Refuse what llama.cpp cannot be given, and what it would load and then abort on."""
    try:
        str(file.path).encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFileError(f"The name of {file.path} is not UTF-8, which llama.cpp needs: rename the file.") from None
    if file.architecture in kv_layout.NO_CACHE:
        raise ModelFileError(f"{file.path} is a {file.architecture} model, which does not generate text token by token: "
                             f"give a decoder model.")
    if file.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ModelFileError(f"{file.path} has no tokenizer in it: convert the model again with its tokenizer files.")


def _load_weights(llama: Any, path: Path, gpu_layers: int | None, progress: Callable[[float, float], None] | None) -> Any:
    """llama_cpp._internals.LlamaModel; Ctrl-C stops between two tensors."""
    from llama_cpp._internals import LlamaModel

    with InterruptFlag() as flag:
        def on_progress(done: float, user: Any) -> bool:
            if progress:
                progress(done, 1.0)
            return not flag.requested

        params = llama.llama_model_default_params()
        params.progress_callback = llama.llama_progress_callback(on_progress)
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        log.errors.clear()
        try:
            return LlamaModel(path_model=str(path), params=params, verbose=True)
        except ValueError:
            raise ModelFileError(f"llama.cpp cannot load {path} ({last_log_lines() or 'no message'}): check that this "
                                 f"version supports the model, or fetch the file again.") from None


def _round_up(n: int, to: int = 1024) -> int:
    return -(-n // to) * to

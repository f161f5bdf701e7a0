"""SlowFastLlama: llama-cpp-python's Llama, decoding slow-fast. One changed import:

    from sfi_local import SlowFastLlama as Llama

Chat completion, streaming, grammars, tools and caches are llama-cpp-python's own. Beneath them stands the slot that ``load()`` uses:
tokens are drawn and computed by our loop, one generation at a time, and nothing is freed under a thread.
"""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, Callable, Generator, Iterator, Mapping, Sequence

from sfi_local.binding.library import open_library

_native = open_library()  # before llama_cpp is imported: it must run on our library

from llama_cpp import Llama  # noqa: E402

from sfi_local.binding import gpu  # noqa: E402
from sfi_local.binding.context import GGML_TYPES, logits, mapped_weights  # noqa: E402
from sfi_local.binding.engine import Engine, Stats, StepInfo  # noqa: E402
from sfi_local.binding.library import log  # noqa: E402
from sfi_local.binding.state import get_state  # noqa: E402
from sfi_local.errors import ArgumentError, DetachedError, KvTypeError  # noqa: E402
from sfi_local.loading import taken_for  # noqa: E402
from sfi_local.machine import physical_cores, reads_mapped_weights  # noqa: E402
from sfi_local.params import SfiParams  # noqa: E402
from sfi_local.runtime.access import Access  # noqa: E402
from sfi_local.runtime.auto import find_depth  # noqa: E402
from sfi_local.runtime.exact import Drafting, decode_span  # noqa: E402
from sfi_local.runtime.modes import STOCK, Mode, mode_of  # noqa: E402
from sfi_local.runtime.sampling import MAX_SEED, Chain, Sampling  # noqa: E402
from sfi_local.runtime.settings import Quality, Settings  # noqa: E402
from sfi_local.runtime.slot import Slot  # noqa: E402
from sfi_local.runtime.vocabulary import Vocabulary  # noqa: E402
from sfi_local.store.gguf_file import GgufFile, read_gguf  # noqa: E402
from sfi_local.tuning.auto_depth import auto_depth_of  # noqa: E402
from sfi_local.tuning.quality import Taken  # noqa: E402

ALL_LAYERS = 0x7FFFFFFF  # how llama-cpp-python writes n_gpu_layers=-1
STOCK_TYPES = {*GGML_TYPES.values(), 3, 6, 7, 20}  # also q4_1, q5_0, q5_1, iq4_nl: by llama.cpp's own attention
CTX_UNIT = 256           # llama.cpp makes a context of a multiple of it
MAX_CTX = 1 << 30


class SlowFastLlama(Llama):
    """``llama_cpp.Llama`` whose single tokens are slow, fast or dense steps.

    mode:       ``auto`` (slow-fast from the depth where it pays), ``sfi``, ``dense``, ``exact`` or ``stock``. Where n_ctx is larger
                than the budget, that depth is measured here, once per model and machine (seconds), and remembered, as by
                sfi_local.load; params with an auto_depth of their own keep it
    sfi_params: budget, schedule and selector; None: the defaults, made smaller where n_ctx is, and of policy frozen where a
                device of the model lacks the operations of the default one
    quality:    how close to dense, as in sfi_local.load
    samplers:   fields of sfi_local.Sampling that llama-cpp-python has no argument for, for all answers: ``dry``, ``top_n_sigma``,
                ``xtc_probability`` ...; may be changed between answers
    Everything else is as in llama_cpp.Llama, except that flash attention is always on, that n_threads is one per physical core
    unless given, and n_threads_batch as many, and that n_ctx is made a multiple of 256.

    last_step:  StepInfo of the latest decode step, None before it
    steps:      Stats since the model was loaded or ``reset_steps()``; None where sfi is not attached
    auto_found: how the depth of mode ``auto`` was found; "": it was given, or n_ctx is no larger than the budget
    notes:      what was decided on the caller's behalf, in sentences
    why_stock:  why decoding is llama.cpp's own, "" if it is not: mode ``stock``, a model that cannot be sparse (in mode
                ``auto``), or a draft model, which needs the logits of every token
    Raises ArgumentError (embedding, quality, a number out of range), InputError (no calibration for nats), ModelFileError,
    KvTypeError, and in modes ``sfi``, ``dense`` and ``exact`` ModelError, BackendError.

    One answer at a time: a second one, and any other use of the cache by another thread, gets BusyError before anything changes.
    close() from any thread ends what is running and waits for it, and every method raises DetachedError afterwards.
    """

    def __init__(self, model_path: str, *, mode: str = "auto", sfi_params: SfiParams | Mapping[str, Any] | None = None,
                 quality: Quality | None = None, samplers: Mapping[str, Any] | None = None, **kwargs: Any):
        wanted = mode_of(mode)
        _check(wanted, kwargs)
        file = read_gguf(model_path)
        self._given_params, self._given_quality = sfi_params, quality
        self.samplers = dict(samplers or {})
        self._types = _type_name(kwargs.get("type_k")), _type_name(kwargs.get("type_v"))
        asked = Settings(wanted.name, type_k=self._types[0], type_v=self._types[1], params=sfi_params, quality=quality).check_choices()
        taken = taken_for(file, asked)
        wanted, params = mode_of(taken.mode), taken.params
        self.mode, self.quality = wanted.name, taken.quality
        self.auto_found, self.notes = "", list(taken.notes)
        self.last_step: StepInfo | None = None
        self._stop_tokens: set[int] = set()
        self._logit_bias: dict[int, float] = {}
        kwargs["flash_attn"] = True
        kwargs["n_threads"] = kwargs.get("n_threads") or physical_cores()
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]
        kwargs["n_ctx"] = _round_up(kwargs.get("n_ctx", 512) or file.n_ctx_train or 512)
        log.verbose = kwargs.setdefault("verbose", False)
        self._weights = Access("model", self._free)
        with mapped_weights(_native.llama_cpp, wanted.attaches and kwargs.get("n_gpu_layers", 0) == 0 and reads_mapped_weights()):
            super().__init__(os.fspath(model_path), **kwargs)
        self._vocabulary = Vocabulary(self._model, self._weights)
        self._slot = self._new_slot(STOCK if self.draft_model else wanted, taken)
        self._tell(wanted, file, params)

    @property
    def engine(self) -> Engine | None:
        return self._slot.engine

    @property
    def steps(self) -> Stats | None:
        return self.engine.stats() if self.engine else None

    @property
    def why_stock(self) -> str:
        if self._slot.mode is STOCK:
            return "a draft model needs the logits of every token" if self.draft_model else "mode is stock"
        return self._slot.why_stock

    def reset_steps(self) -> None:
        """Start the counts of ``steps`` anew."""
        if self.engine:
            self.engine.reset_stats()

    def cancel(self) -> None:
        """End the answer that is being generated: a prefill within one operation, a step at once. It raises AbortedError.

        From any thread, a callback or a signal handler; nothing happens where nothing is generated.
        """
        self._slot.cancel()

    def close(self) -> None:
        """End what is running, wait for it, free context and model. May be called twice, and after a failed load."""
        if hasattr(self, "_weights"):
            self._weights.close()

    # ---- tokens into the cache -------------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the first ``n_tokens`` of the cache: one is a step, several are a prefill."""
        tokens = list(tokens)
        if len(tokens) > 1 or not self.n_tokens or self.draft_model:
            return self._prefill(tokens)
        with self._following():
            for token in tokens:
                self.last_step = self._slot.step(token)
                if self._logits_all:
                    self.scores[len(self._slot.tokens) - 1] = logits(self._ctx, -1)

    def _prefill(self, tokens: list[int]) -> None:
        with self._following():
            if not tokens:
                return
            if self._logits_all:
                self._slot.fill(lambda: Llama.eval(self, tokens), tokens)
            else:
                self._slot.prefill(tokens)

    def reset(self) -> None:
        """Forget what the cache holds."""
        with self._following():
            self.n_tokens, self._requires_eval = 0, True
            self._slot.cut(0)

    def save_state(self) -> Any:
        """A LlamaState that carries what fast steps need as well, as its sfi_state."""
        with self._slot.access:
            state: Any = super().save_state()
            state.sfi_state = bytes(get_state(self.engine)) if self.engine else b""
            return state

    def load_state(self, state: Any) -> None:
        with self._slot.access:
            super().load_state(state)
        self._slot.adopt(self._input_ids.tolist(), getattr(state, "sfi_state", b""))

    def embed(self, *_: Any, **__: Any) -> Any:
        raise ArgumentError("SlowFastLlama decodes text and makes no embeddings: use llama_cpp.Llama for them.")

    create_embedding = embed

    @contextmanager
    def _following(self) -> Iterator[None]:
        """What llama-cpp-python counts as the tokens of the cache, and the slot, agree before and after."""
        slot = self._slot
        if self.n_tokens > len(slot.tokens):
            slot.adopt(self._input_ids.tolist())
        elif self.n_tokens < len(slot.tokens):
            slot.cut(self.n_tokens)
        before = self.n_tokens
        try:
            yield
            self._requires_eval = not slot.tokens
        except BaseException:
            self._requires_eval = True
            raise
        finally:
            self._follow(min(before, len(slot.tokens)))

    def _follow(self, first: int) -> None:
        """Take over the slot's tokens from `first` on."""
        tokens = self._slot.tokens
        self.input_ids[first:len(tokens)] = tokens[first:]
        self.n_tokens = len(tokens)

    # ---- tokens out of it ------------------------------------------------------------------------------------------

    def generate(self, tokens: Sequence[int], top_k: int = 40,  # type: ignore[override]  # nobody sends to it
                 top_p: float = 0.95, min_p: float = 0.05, typical_p: float = 1.0,
                 temp: float = 0.80, repeat_penalty: float = 1.0, reset: bool = True, frequency_penalty: float = 0.0,
                 presence_penalty: float = 0.0, tfs_z: float = 1.0, mirostat_mode: int = 0, mirostat_tau: float = 5.0,
                 mirostat_eta: float = 0.1, penalize_nl: bool = True, logits_processor: Any = None, stopping_criteria: Any = None,
                 grammar: Any = None) -> Iterator[int]:
        """Yield tokens after a prompt, as llama_cpp.Llama.generate. One turn: until it is closed no other answer can begin."""
        settings = dict(top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temp=temp, repeat_penalty=repeat_penalty,
                        frequency_penalty=frequency_penalty, presence_penalty=presence_penalty, mirostat_mode=mirostat_mode,
                        mirostat_tau=mirostat_tau, mirostat_eta=mirostat_eta, logits_processor=logits_processor, grammar=grammar)
        if self.draft_model:
            return self._slot.turn(super().generate(tokens, reset=reset, stopping_criteria=stopping_criteria, **settings))
        tokens = list(tokens)
        sampler = self._init_sampler(**settings, prompt=tokens)
        return self._slot.turn(self._generate(tokens, sampler, reset, stopping_criteria))

    def _generate(self, tokens: list[int], sampler: Chain, reset: bool, stopping_criteria: Any) -> Iterator[int]:
        exact = self._slot.mode.verifies and self._slot.engine is not None
        draws = self._draw_exact(sampler) if exact else self._draw(sampler)
        self._prefill(self._new_tokens(tokens) if reset else tokens)
        more: Any = None
        while True:
            try:
                token = draws.send(more)
            except StopIteration:
                return
            if stopping_criteria is not None and stopping_criteria(self._input_ids, logits(self._ctx, -1)):
                return
            more = yield self.token_eos() if token in self._stop_tokens else token

    def _draw(self, sampler: Chain) -> Generator[int, Any, None]:
        """Draw a token, give it to the model with those that were sent, and so on."""
        while True:
            token = sampler.sample(self._ctx)
            sent = yield token
            if len(self._slot.tokens) + 1 > self._n_ctx:
                return
            self.eval([token, *(sent or [])])

    def _draw_exact(self, sampler: Chain) -> Generator[int, Any, None]:
        slot, drafting = self._slot, Drafting(self._slot)
        token = sampler.sample(self._ctx)
        yield token
        while len(slot.tokens) < self._n_ctx:
            room = self._n_ctx - len(slot.tokens) - 2
            with self._following():
                span = decode_span(slot, self._vocabulary, sampler, token, room, drafting)
            for token, self.last_step, _ in span:
                yield token

    def _new_tokens(self, tokens: list[int]) -> list[int]:
        """What the cache does not hold of a prompt; nothing, if the logits after it are there."""
        if self._requires_eval or self._slot.tokens != tokens or self._slot.n_drafted:
            with self._following():
                return tokens[self._slot.reuse(tokens):]
        return []

    def _init_sampler(self, top_k: int = 40, top_p: float = 0.95, min_p: float = 0.05, typical_p: float = 1.0, temp: float = 0.80,
                      repeat_penalty: float = 1.0, frequency_penalty: float = 0.0, presence_penalty: float = 0.0, tfs_z: float = 1.0,
                      mirostat_mode: int = 0, mirostat_eta: float = 0.1, mirostat_tau: float = 5.0, penalize_nl: bool = True,
                      logits_processor: Any = None, grammar: Any = None, prompt: Sequence[int] | None = None) -> Chain:
        """The sampler of llama-cpp-python's arguments and ``samplers``; as there, penalties count the answer alone."""
        seed = int(self._seed) & 0xFFFFFFFF
        sampling = Sampling(
            temp=1.0 if temp < 0 else temp, top_k=0 if temp < 0 else max(0, top_k), top_p=1.0 if temp < 0 else top_p,
            min_p=0.0 if temp < 0 else min_p, typical_p=typical_p, repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty, penalty_last_n=self.last_n_tokens_size, mirostat=mirostat_mode, mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta, seed=seed if seed <= MAX_SEED else random.randrange(MAX_SEED + 1), logit_bias=self._logit_bias,
            grammar=None if grammar is None else grammar._grammar)
        try:
            sampling = replace(sampling, **self.samplers)
        except TypeError as error:
            raise ArgumentError(f"samplers has what is no field of Sampling ({error}): see sfi_local.Sampling.") from None
        prompt = self._input_ids.tolist() if prompt is None else prompt
        return sampling.validate().chain(self._vocabulary, prompt, list(logits_processor or ()), penalize_prompt=False)

    def _create_completion(self, *args: Any, stop: Any = None, logit_bias: Any = None, **kwargs: Any) -> Iterator[Any]:
        stops = [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]
        control = {text: self._vocabulary.control_tokens([text]) for text in stops}
        bias = {int(token): float(value) for token, value in (logit_bias or {}).items()}
        items = super()._create_completion(*args, stop=[text for text in stops if not control[text]], **kwargs)  # type: ignore[misc]
        return self._slot.turn(self._answer(set().union(*control.values()), bias, items))

    def _answer(self, stop_tokens: set[int], logit_bias: dict[int, float], items: Iterator[Any]) -> Iterator[Any]:
        """The items of an answer, during which generate() knows what llama-cpp-python does not hand on to it."""
        self._stop_tokens, self._logit_bias = stop_tokens, logit_bias
        try:
            yield from items
        finally:
            self._stop_tokens, self._logit_bias = set(), {}

    # ---- loading and freeing ---------------------------------------------------------------------------------------

    def _new_slot(self, mode: Mode, taken: Taken) -> Slot:
        """On llama-cpp-python's context."""
        def params_for(n_ctx: int) -> SfiParams:
            if not mode.attaches:
                return taken.params
            fitting = taken.params.fit_context(n_ctx) if taken.fits_budget else taken.params
            fitting.check_context(n_ctx)
            return fitting

        portable = taken.portable and (taken.portable.fit_context(self._n_ctx) if taken.fits_budget else taken.portable)
        return Slot(lambda n_ctx: self._ctx, self._n_ctx, mode, params_for, portable=portable, weights=self._weights)

    def _tell(self, mode: Mode, file: GgufFile, params: SfiParams) -> None:
        """Look for the depth of mode ``auto``; say what was decided."""
        if self._slot.engine:
            subject = _Subject(self, file)
            found = find_depth(auto_depth_of, subject, mode, self._slot.params.replace(auto_depth=params.auto_depth), self._types, self._n_ctx)
            if found:
                self.auto_found = found.how
                self._slot.set_auto_depth(found.depth)
                self.notes += [found.note] if found.note else []
        elif mode is not STOCK:
            self.notes.append(f"Decoding is llama.cpp's own: {self.why_stock}.")

    def _free(self) -> None:
        """Of a model that no thread is in. What llama-cpp-python still holds raises then, instead of crashing."""
        if hasattr(self, "_stack"):
            super().close()
        for holder, names in ((getattr(self, "_ctx", None), ("memory",)), (getattr(self, "_model", None), ("vocab",))):
            for name in names:
                holder.__dict__.pop(name, None) if holder is not None else None
        self._ctx = self._model = self._batch = self.tokenizer_ = _Closed()  # type: ignore[assignment]

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As llama_cpp.Llama does it, of runs of any length, on any thread. Raises DetachedError after close()."""
        return self._vocabulary.tokenize_bytes(text, add_bos, special)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mode": self.mode, "sfi_params": self._given_params, "quality": self._given_quality,
                "samplers": self.samplers}


class _Closed:
    """Stands where a freed object of llama-cpp-python was."""

    def __getattr__(self, name: str) -> Any:
        raise DetachedError("This model was closed: load it again.")


class _Subject:
    """A SlowFastLlama as auto.Subject."""

    def __init__(self, llama: SlowFastLlama, file: GgufFile):
        layers = llama.model_params.n_gpu_layers
        self.file, self.path, self.weights, self.n_threads = file, file.path, llama._model, llama.n_threads
        self.gpu_layers = None if layers == ALL_LAYERS else layers
        self.gpus = [] if self.gpu_layers == 0 else [one.description for one in gpu.gpus()]
        self.kv_gpus = self.gpus if llama.context_params.offload_kqv else []
        self.tokenize = llama._vocabulary.tokenize


def _guarded(method: Callable) -> Callable:
    """A method that reads the weights: they are not freed under it, and it raises once they are."""
    @wraps(method)
    def call(self: SlowFastLlama, *args: Any, **kwargs: Any) -> Any:
        with self._weights:
            return method(self, *args, **kwargs)
    return call


for _name in ("detokenize", "n_embd", "n_vocab", "token_eos", "token_bos", "token_nl", "n_ctx", "pooling_type", "tokenizer"):
    setattr(SlowFastLlama, _name, _guarded(getattr(Llama, _name)))


def _check(mode: Mode, options: Mapping[str, Any]) -> None:
    """Refuse what llama-cpp-python would hand on to an abort, a crash or a wrapped number."""
    if options.get("embedding"):
        raise ArgumentError("SlowFastLlama decodes text and makes no embeddings: use llama_cpp.Llama for them.")
    if options.get("vocab_only"):
        raise ArgumentError("SlowFastLlama decodes text, which vocab_only leaves no weights for: use llama_cpp.Llama.")
    if mode.verifies and (options.get("logits_all") or options.get("draft_model")):
        raise ArgumentError("Mode exact computes several tokens at once and keeps the logits of none: leave out logits_all and draft_model, "
                            "or ask load(..., mode=\"exact\").generate for logprobs.")
    for name, least, most in (("n_ctx", 0, MAX_CTX), ("n_batch", 1, MAX_CTX), ("n_ubatch", 1, MAX_CTX), ("n_threads", 0, 512),
                              ("n_threads_batch", 0, 512), ("n_gpu_layers", -1, ALL_LAYERS), ("last_n_tokens_size", 0, MAX_CTX)):
        value = options.get(name)
        if value is not None and not least <= value <= most:
            raise ArgumentError(f"{name} is {value}: give a number from {least} to {most}.")
    for name in ("type_k", "type_v"):
        value = options.get(name)
        if value is not None and value not in (STOCK_TYPES if mode.stands_in() or not mode.attaches else GGML_TYPES.values()):
            raise KvTypeError(f"{name} is {value}: give the number of a type of K and V, such as "
                              f"{', '.join(f'{number} ({kind})' for kind, number in GGML_TYPES.items())}.")


def _round_up(n: int) -> int:
    return -(-n // CTX_UNIT) * CTX_UNIT


def _type_name(ggml_type: int | None) -> str:
    """Of a type of K or V as llama-cpp-python numbers them; the number where sfi has no kernels for it."""
    names = {number: name for name, number in GGML_TYPES.items()}
    return "f16" if ggml_type is None else names.get(ggml_type, str(ggml_type))

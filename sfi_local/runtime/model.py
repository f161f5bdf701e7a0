"""A loaded model: weights, the slot it generates in, and conversations. What ``sfi_local.load`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from sfi_local.binding import gpu
from sfi_local.binding.context import N_BATCH, load_adapter, maker
from sfi_local.binding.engine import StepInfo
from sfi_local.binding.state import checksum
from sfi_local.errors import ArgumentError, InputError, OutOfMemoryError
from sfi_local.params import SfiParams
from sfi_local.runtime.access import Access
from sfi_local.runtime.auto import FindDepth, find_depth
from sfi_local.runtime.conversation import Conversation
from sfi_local.runtime.draft_length import MAX_DRAFTS
from sfi_local.runtime.exact import generate_exact
from sfi_local.runtime.generate import begin, generate
from sfi_local.runtime.keeper import Keeper
from sfi_local.runtime.memory import MIN_CTX
from sfi_local.runtime.modes import Mode, mode_of
from sfi_local.runtime.sampling import Processor, Sampling
from sfi_local.runtime.slot import Progress, Schedule, Slot
from sfi_local.runtime.step import Step
from sfi_local.runtime.template import ChatTemplate, Message, too_long
from sfi_local.runtime.thoughts import ThoughtBudget
from sfi_local.runtime.vocabulary import Vocabulary
from sfi_local.store.gguf_file import GgufFile

FIRST_CTX = 4096     # a context starts at this size and grows with the conversation
ROOMY_CTX = 32768    # where cells take memory when they are used, it starts with so many, which nearly all texts fit into
MAX_LOGPROBS = 1000


@dataclass(frozen=True)
class ModelStats:
    """What a model is doing, since its last generation began.

    kernels:       ``native``, ``portable`` or ``mixed``, see Engine.path; ``stock`` where sfi is not attached
    n_ctx, n_used: cells of the context, and those in use
    n_prefilled:   tokens of the last prompt that were computed; the others were in the cache
    cached_from:   where the others came from: ``memory``, ``disk`` or None; why_read: why there were no more, or ""
    kv_read_share: bytes of K and V that the steps read, over those of dense decoding
    auto_depth:    mode ``auto``: cells from which it is slow-fast, 0: not found yet; auto_found: how it was found
    why_stock:     why decoding is llama.cpp's own though the mode would not be; ""
    """

    mode: str
    kernels: str
    params: SfiParams
    n_ctx: int
    n_used: int
    n_prefilled: int
    kv_read_share: float
    auto_depth: int
    auto_found: str
    why_stock: str
    cached_from: str | None = None
    why_read: str = ""


class Model:
    """A loaded model. Its one slot serves one answer at a time: a second gets BusyError before anything changes.

    All methods may be called from any thread. close() ends what is running and waits for it; afterwards they raise DetachedError.
    n_fit: cells of the largest context that the memory holds; None: not known
    adapters: LoRA files and their scales
    roomy: cells take memory when they are used, not before: contexts may have more than are needed
    find_auto_depth: how the depth from which ``auto`` is slow-fast is found, see auto_depth.auto_depth_of
    """

    def __init__(self, file: GgufFile, weights: Any, n_fit: int | None, *, mode: str | Mode, n_ctx: int | None, n_threads: int,
                 type_k: str, type_v: str, params: SfiParams, fit_budget: bool, gpu_layers: int | None = None,
                 kv_host: bool = False, portable_params: SfiParams | None = None, adapters: Sequence[tuple[str, float]] = (),
                 quality: str = "", find_auto_depth: FindDepth | None = None, n_ubatch: int = N_BATCH, roomy: bool = False):
        self.file, self.n_threads, self.gpu_layers, self._kv_host = file, n_threads, gpu_layers, kv_host
        self._mode = mode_of(mode)
        self.quality = quality  # how close to dense it is, in words, or ""
        self.notes: list[str] = []  # what was decided on the caller's behalf, in sentences
        self._n_notes_read = 0
        self.weights, self._n_fit, self._n_ctx = weights, n_fit, n_ctx
        self._types, self._params, self._fit_budget, self._portable = (type_k, type_v), params, fit_budget, portable_params
        self.n_ubatch = n_ubatch
        self._roomy = roomy
        self._find_auto_depth = find_auto_depth
        self._access = Access("model", weights.close)
        self.vocabulary = Vocabulary(weights, self._access)
        self._adapters = [(load_adapter(weights, path), scale) for path, scale in adapters]
        self._keeper: Keeper | None = None
        self.slot = self.new_slot()
        self.auto_found = ""  # how the depth from which auto is slow-fast was found

    @property
    def mode(self) -> str:
        """The name of its mode."""
        return self._mode.name

    @property
    def verifies(self) -> bool:
        """Whether tokens are drafted and verified, so that rounding matters."""
        return self._mode.verifies

    @property
    def session(self) -> Slot | None:
        """The slot; None as long as it has no context."""
        return self.slot if self.slot.n_ctx else None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def gpus(self) -> list[str]:
        """Descriptions of the GPUs that hold its layers."""
        return [] if self.gpu_layers == 0 else [g.description for g in gpu.gpus()]

    @property
    def kv_gpus(self) -> list[str]:
        """Descriptions of the GPUs that hold K and V of these layers, and attend to them."""
        return [] if self._kv_host else self.gpus

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
        """The model's chat template, as set_template() left it."""
        self.set_template()
        return self.__dict__["template"]

    def set_template(self, arguments: dict[str, Any] | None = None, think: bool | None = None, keep_thoughts: bool = True) -> None:
        """Give the chat template variables, switch thoughts, let it drop earlier ones: see ChatTemplate. Raises InputError."""
        self._template_options = {"arguments": dict(arguments or {}), "think": think, "keep_thoughts": keep_thoughts}
        self.template = self._new_template(**self._template_options)

    def _new_template(self, **options: Any) -> ChatTemplate:
        v = self.vocabulary
        return ChatTemplate(self.file.metadata.get("tokenizer.chat_template"), v.bos_text, v.eos_text, v.add_bos, v.tokenize,
                            vocabulary=v, note=self._note, **options)

    def template_with(self, tools: Sequence[dict] | None = None, arguments: dict[str, Any] | None = None,
                      think: bool | None = None) -> ChatTemplate:
        """The chat template for one answer, given descriptions of tools, more variables, and a switch for thoughts. Raises InputError."""
        template = self.template
        if not tools and not arguments and think is None:
            return template
        options: dict[str, Any] = dict(self._template_options)
        options["arguments"] = {**options["arguments"], **(arguments or {}), **({"tools": list(tools)} if tools else {})}
        if think is not None:
            options["think"] = think
        return self._new_template(**options)

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids; with ``special`` the text of a special token becomes that token."""
        return self.vocabulary.tokenize(text, add_bos, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.vocabulary.piece(t) for t in tokens).decode("utf-8", errors="replace")

    def prompt_tokens(self, prompt: str | Sequence, tools: Sequence[dict] | None = None) -> list[int]:
        """Token ids of a text (as it is), of messages (in the chat template), or of token ids (unchanged).

        Messages are Message objects or dicts with ``role`` and ``content``; tools are for their template.
        """
        if isinstance(prompt, str):
            return self.tokenize(prompt, self.vocabulary.add_bos, True) if prompt else []
        prompt = list(prompt)
        if not prompt or isinstance(prompt[0], Integral):
            return list(map(int, prompt))
        messages = [m if isinstance(m, Message) else Message(m["role"], [m["content"]]) for m in prompt]
        return self.template_with(tools).tokens(messages)

    def generate(self, prompt: str | Sequence, *, n: int | None = 512, sampling: Sampling | None = None,
                 stop: Sequence[str] = (), schedule: Schedule | None = None, draft: int | None = None,
                 progress: Progress | None = None, think_budget: int | None = None, logprobs: int | None = None,
                 tools: Sequence[dict] | None = None, processors: Sequence[Processor] = (), slot: Slot | None = None) -> Iterator[Step]:
        """Yield a Step per generated token; see generate.generate, and in mode ``exact`` exact.generate_exact.

        The arguments are checked now. Computing begins with the first item, and with it the turn that ends with the last one or when
        the iterator is closed or dropped.

        prompt:   text, messages or token ids, see prompt_tokens
        n:        tokens at most; None: until the answer ends or the context is full
        sampling: a Sampling, or what has its validate() and chain()
        stop:     texts that end the answer, control tokens such as ``<|im_end|>`` among them
        draft:    mode ``exact``: tokens drafted per span; None: as many as pay
        progress: called with (done, total) between batches of the prompt; what it raises ends the answer
        think_budget: tokens of thought, after which the answer begins; None: no limit
        logprobs: give each Step its logprob, and so many of the most likely tokens
        tools:    for the chat template
        processors: (tokens, logits) -> logits, before all samplers
        slot:     of new_slot(); None: the model's own
        Raises InputError if the prompt is empty or does not fit, ArgumentError for options that the mode does not have, BusyError
        while another answer is generated; the iterator raises AbortedError after cancel().
        """
        self._check_generate(n, schedule, draft, logprobs)
        slot = slot or self.slot
        slot.access.check_free()
        tokens = self._checked(self.prompt_tokens(prompt, tools))
        sampler = self._sampler(sampling or Sampling(), tokens, processors)
        if think_budget is not None:
            sampler = ThoughtBudget(sampler, self.template.thoughts(tokens), self.vocabulary, think_budget)
        if self._mode.verifies:
            steps = generate_exact(slot, self.vocabulary, tokens, sampler, n, stop, draft, progress, logprobs)
        else:
            steps = generate(slot, self.vocabulary, tokens, sampler, n, stop, schedule, progress, logprobs, guess=True)
        return slot.turn(self._with_room(slot, steps, len(tokens), n))

    def read(self, prompt: str | Sequence, *, progress: Progress | None = None, tools: Sequence[dict] | None = None,
             slot: Slot | None = None) -> int:
        """Compute a prompt ahead; returns how many tokens it has.

        What is given to generate() or a conversation afterwards and begins as this does starts there. After cancel(), which raises
        AbortedError here, what was read stays. Arguments and errors as of generate.
        """
        slot = slot or self.slot
        slot.access.check_free()
        tokens = self._checked(self.prompt_tokens(prompt, tools))
        for _ in slot.turn(self._reading(slot, tokens, progress)):
            pass
        return len(tokens)

    def complete(self, text: str, **options: Any) -> Iterator[Step]:
        """Go on with a text, as it is and without a chat template. options: of generate"""
        if not isinstance(text, str):
            raise ArgumentError(f"complete() goes on with a text, not with a {type(text).__name__}: give messages to generate().")
        return self.generate(text, **options)

    def chat(self, system: str | None = None, tools: Sequence[dict] | None = None, **options: Any) -> Conversation:
        """A conversation, whose ask() answers one question after the other.

        system: a first message for the model; tools: descriptions of functions, for its chat template
        options: of generate, for every answer
        """
        self._access.check_open()
        return Conversation(self, system, tools, **options)

    def cancel(self) -> None:
        """End the answer that is being generated: a prefill within one operation, a step at once.

        From any thread, a progress callback or a signal handler. Who iterates over it gets AbortedError; nothing happens where
        nothing is generated.
        """
        self.slot.cancel()

    def stats(self) -> ModelStats:
        """What it is doing."""
        slot, engine = self.slot, self.slot.engine
        return ModelStats(self.mode, engine.path if engine else "stock", slot.params if slot.n_ctx else self._params, slot.n_ctx,
                          len(slot.tokens), slot.n_prefilled, engine.stats().kv_read_share if engine else 1.0,
                          self._params.auto_depth, self.auto_found, slot.why_stock, slot.cached_from, slot.why_read)

    def open_session(self, n_prompt: int, n: int | None) -> Slot:
        """The slot, with room for a prompt and n more tokens if the limit allows; its context grows if needed."""
        self.make_room(self.slot, n_prompt, n)
        return self.slot

    def make_room(self, slot: Slot, n_prompt: int, n: int | None) -> None:
        """Give a slot room for a prompt and n more tokens, if the limit allows. Raises InputError, OutOfMemoryError."""
        if n_prompt > self.n_ctx_limit:
            raise too_long(n_prompt, self.n_ctx_limit)
        need = min(self.n_ctx_limit, n_prompt + (n or MIN_CTX))
        slot.n_limit = self.n_ctx_limit
        if slot.n_ctx < need:
            self._grow(slot, need)
            self._note_slot(slot)
        self.tune_auto(n_prompt + (n or self.n_ctx_limit))

    def tune_auto(self, n_tokens: int) -> SfiParams:
        """Find the depth from which ``auto`` is slow-fast, once, and only where the text may get longer than the budget.

        Returns the parameters; their auto_depth is 0 as long as there was no reason to look.
        """
        with self._access:  # it has a context of its own on the weights
            found = find_depth(self._find_auto_depth, self, self._mode, self._fit_params(self.n_ctx_limit), self._types, n_tokens)
        if found:
            self.auto_found = found.how
            self._params = self._params.replace(auto_depth=found.depth)
            self._note(found.note)
            if self.slot.engine:
                self.slot.set_auto_depth(found.depth)
        return self._params

    def keep_prefixes(self, fingerprint: Callable[[], str], settings: str = "", in_memory: bool = True) -> None:
        """From now on keep what is read in the prefix store. fingerprint: names all that K and V depend on; settings: for people

        in_memory: the latest texts there too
        """
        self._keeper = self.slot.keeper = Keeper(fingerprint, checksum, self.name, self.detokenize, self._note, settings, in_memory)

    def close_session(self) -> None:
        """Free the context; the weights stay, and the next answer makes a new one."""
        self.slot.close()
        self.slot = self.new_slot()

    def close(self) -> None:
        """End what is running, wait for it, and free everything. May be called twice, and from any thread."""
        self._access.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def share_memory(self, n_slots: int) -> None:
        """Let so many contexts have room for what one would have had: each may be that much smaller. Before the first is made.

        Raises OutOfMemoryError where that is too little.
        """
        if self._n_fit is None:
            return
        each, need = self._n_fit // n_slots, self._n_ctx or MIN_CTX
        if each < need:
            raise OutOfMemoryError(f"The free memory holds {self._n_fit // need} contexts of {need} tokens beside the weights, and not "
                                   f"{n_slots}: take fewer, or smaller ones.")
        self._n_fit = each

    def new_slot(self) -> Slot:
        """A further sequence on these weights, without a context as yet; it is closed with the model, if not before."""
        return Slot(maker(self.weights, self.n_threads, *self._types, self._adapters, self.n_ubatch, self._kv_host), 0, self._mode, self._fit_params,
                    portable=self._portable, weights=self._access, keeper=self._keeper)

    def _grow(self, slot: Slot, need: int) -> None:
        """To need cells at least, and as many more as spare it to grow soon again."""
        least = self._n_ctx or min(self.n_ctx_limit, max(2 * slot.n_ctx, FIRST_CTX, _round_up(need)))
        roomy = min(self.n_ctx_limit, ROOMY_CTX)
        if self._roomy and not self._n_ctx and least < roomy:
            try:
                return slot.grow(roomy)
            except OutOfMemoryError:
                pass  # a system that promises no more memory than it has
        slot.grow(least)

    def _with_room(self, slot: Slot, steps: Iterator[Step], n_prompt: int, n: int | None) -> Iterator[Step]:
        """The steps, once the context has room for them."""
        self.make_room(slot, n_prompt, n)
        yield from steps

    def _reading(self, slot: Slot, tokens: list[int], progress: Progress | None) -> Iterator[StepInfo]:
        self.make_room(slot, len(tokens), None)
        yield begin(slot, tokens, progress)

    def _note_slot(self, slot: Slot) -> None:
        if slot.why_stock:
            self._note(f"Decoding is dense, by llama.cpp's own path: {slot.why_stock}")
        if slot.fell_back and self._mode.fast:
            self._note(f"A device of this model lacks the operations of policy {self._params.policy}: the policy is "
                       f"{slot.params.policy} here.")
        if slot.fell_back:
            self._params = slot.params
        if slot.n_ctx > self.file.n_ctx_train > 0:
            way = "" if self.file.get("rope.scaling.type") else (
                f" Models that are made for YaRN, as Qwen2.5 and Qwen3 are, keep up when the context is stretched by YaRN, "
                f"{math.ceil(slot.n_ctx / self.file.n_ctx_train)} times.")
            self._note(f"The context of {slot.n_ctx} tokens is longer than the {self.file.n_ctx_train} the model was "
                       f"trained on: expect worse answers beyond that.{way}")

    def _fit_params(self, n_ctx: int) -> SfiParams:
        """The parameters for a context of n_ctx cells."""
        if not self._mode.attaches:
            return self._params
        if not self._fit_budget and self._mode.fast:
            self._params.check_context(n_ctx)
            return self._params
        params = self._params.fit_context(n_ctx)
        if self._mode.keeps_budget and params.budget < self._params.budget:
            self._note(f"The budget of {self._params.budget} cells does not fit a context of {n_ctx} tokens; it is "
                       f"{params.budget} cells here.")
        return params

    def _check_generate(self, n: int | None, schedule: Schedule | None, draft: int | None, logprobs: int | None) -> None:
        if n is not None and (not isinstance(n, Integral) or not 0 < n < 2**31):
            raise ArgumentError(f"n is {n!r}: give a number of tokens from 1 on, or None for no limit.")
        if self._mode.verifies and schedule:
            raise ArgumentError("In mode exact every step is a draft or a verification: leave the schedule out.")
        if draft is not None and (not self._mode.verifies or not 0 <= draft <= MAX_DRAFTS):
            raise ArgumentError(f"draft is {draft}: give a number from 0 to {MAX_DRAFTS}, in mode exact.")
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise ArgumentError(f"logprobs is {logprobs}: give a number from 0 to {MAX_LOGPROBS}.")

    def _checked(self, tokens: list[int]) -> list[int]:
        """The tokens of a prompt, if they can be one."""
        if not tokens:
            raise InputError("The prompt is empty: give some text.")
        last = self.vocabulary.n_vocab - 1
        wrong = next((t for t in (min(tokens), max(tokens)) if not 0 <= t <= last), None)
        if wrong is not None:
            raise InputError(f"The prompt has the token {wrong}, and this model 0 to {last}: tokenize it for this model.")
        if len(tokens) > self.n_ctx_limit:
            raise too_long(len(tokens), self.n_ctx_limit)
        return tokens

    def _sampler(self, sampling: Any, tokens: Sequence[int], processors: Sequence[Processor]) -> Any:
        sampling = sampling.validate()
        return sampling.chain(self.vocabulary, tokens, processors) if isinstance(sampling, Sampling) else sampling.chain()

    def unread_notes(self) -> list[str]:
        """The notes since the last call."""
        unread, self._n_notes_read = self.notes[self._n_notes_read:], len(self.notes)
        return unread

    def _note(self, sentence: str) -> None:
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)


def _round_up(n: int, to: int = 1024) -> int:
    return -(-n // to) * to

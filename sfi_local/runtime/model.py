"""A loaded model and its conversation: what ``sfi_local.load`` returns."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from sfi_local.binding import gpu
from sfi_local.binding.devices import all_native
from sfi_local.binding.library import log
from sfi_local.errors import ArgumentError, BackendError, SfiError
from sfi_local.params import SfiParams
from sfi_local.runtime.draft_length import MAX_DRAFTS
from sfi_local.runtime.exact import generate_exact
from sfi_local.runtime.generate import generate
from sfi_local.runtime.memory import MIN_CTX
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.slot import Progress, Schedule, Session
from sfi_local.runtime.step import Step
from sfi_local.runtime.template import ChatTemplate, Message, too_long
from sfi_local.runtime.thoughts import ThoughtBudget
from sfi_local.runtime.vocabulary import Vocabulary
from sfi_local.store.gguf_file import GgufFile

FIRST_CTX = 4096     # a context starts at this size and grows with the conversation


# (model, parameters, types of K and V) -> (depth in cells, how it was found)
FindAutoDepth = Callable[["Model", SfiParams, str, str], tuple[int, str]]


class Model:
    """A loaded model and its one conversation. Not for several threads at a time (BusyError).

    n_fit: cells of the largest context that the memory holds; None: not known
    find_auto_depth: how the depth from which ``auto`` is slow-fast is found, see auto_depth.auto_depth_of
    """

    def __init__(self, file: GgufFile, weights: Any, n_fit: int | None, *, mode: str, n_ctx: int | None, n_threads: int,
                 type_k: str, type_v: str, params: SfiParams, fit_budget: bool, gpu_layers: int | None = None,
                 portable_params: SfiParams | None = None,
                 find_auto_depth: FindAutoDepth | None = None):
        self.file, self.mode, self.n_threads, self.gpu_layers = file, mode, n_threads, gpu_layers
        self.notes: list[str] = []  # what was decided on the caller's behalf, in sentences
        self._n_notes_read = 0
        self.weights, self._n_fit, self._n_ctx = weights, n_fit, n_ctx
        self._types, self._params, self._fit_budget, self._portable = (type_k, type_v), params, fit_budget, portable_params
        self._find_auto_depth = find_auto_depth
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
        """The model's chat template, as set_template() left it."""
        self.set_template()
        return self.__dict__["template"]

    def set_template(self, arguments: dict[str, Any] | None = None, think: bool | None = None, keep_thoughts: bool = True) -> None:
        """Give the chat template variables, switch thoughts, let it drop earlier ones: see ChatTemplate. Raises InputError."""
        v = self.vocabulary
        self.template = ChatTemplate(self.file.metadata.get("tokenizer.chat_template"), v.bos_text, v.eos_text, v.add_bos, v.tokenize,
                                     vocabulary=v, note=self._note, arguments=arguments, think=think, keep_thoughts=keep_thoughts)

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
                 draft: int | None = None, progress: Progress | None = None, think_budget: int | None = None) -> Iterator[Step]:
        """Yield a Step per generated token; see generate.generate, and in mode ``exact`` exact.generate_exact.

        prompt: text, messages or token ids, see prompt_tokens
        n:      tokens at most; None: until the answer ends or the context is full
        draft:  mode ``exact``: tokens drafted per span; None: as many as pay
        think_budget: tokens of thought, after which the answer begins; None: no limit
        Raises InputError if the prompt is empty or does not fit, ArgumentError for options that the mode does not have.
        """
        self._check_generate(schedule, draft)
        tokens = self.prompt_tokens(prompt) if prompt else []
        sampler = (sampling or Sampling()).validate().chain()
        if think_budget is not None:
            sampler = ThoughtBudget(sampler, self.template.thoughts(tokens), self.vocabulary, think_budget)
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
        self._fall_back()
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
        if self._find_auto_depth is None or self.mode != "auto" or self._params.auto_depth or n_tokens <= self._params.budget:
            return self._params
        params = self._fit_params(self.n_ctx_limit)
        depth, self.auto_found = self._find_auto_depth(self, params, *self._types)
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
        self.weights.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _new_session(self, n_ctx: int) -> Session:
        session = Session(self.weights, n_ctx, self.mode, self._fit_params(n_ctx), self.n_threads, *self._types)
        if session.why_stock:
            self._note(f"Decoding is dense, by llama.cpp's own path: {session.why_stock}")
        if n_ctx > self.file.n_ctx_train > 0:
            self._note(f"The context of {n_ctx} tokens is longer than the {self.file.n_ctx_train} the model was "
                       f"trained on: expect worse answers beyond that.")
        return session

    def _fall_back(self) -> None:
        """Take another policy, with a note, where this one was nobody's choice and a device of the model lacks its operations.

        Once, and before anything is measured; where every device has them no context is made to find out.
        """
        portable, self._portable = self._portable, None
        if portable is None or self.mode == "stock" or self._params.policy == portable.policy:
            return
        if all_native(self._params, bool(self.gpus)):
            return
        mode = "sfi" if self.mode == "auto" else self.mode  # auto would not say why
        try:
            Session(self.weights, MIN_CTX, mode, self._params.fit_context(MIN_CTX), self.n_threads, *self._types).close()
        except BackendError:
            if self.mode != "dense":
                self._note(f"A device of this model lacks the operations of policy {self._params.policy}: the policy is "
                           f"{portable.policy} here.")
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


def _round_up(n: int, to: int = 1024) -> int:
    return -(-n // to) * to

"""What a command that answers a prompt was asked for: texts, model, sampling, and the tokens of the prompt."""

from __future__ import annotations

import os
import select
import stat
import sys
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from sfi_local.cli import text_input
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted, say
from sfi_local.cli.text_input import from_argument
from sfi_local.cli.thinking import Thinking
from sfi_local.errors import InputError, UsageError
from sfi_local.loading import load_as
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.settings import SAME, Settings
from sfi_local.runtime.template import Message, fit_document, too_long


@dataclass
class PromptRequest:
    """The options of options.answer_options and model_options by their names, in their units. samplers: fields of Sampling"""

    model: str
    settings: Settings
    file: str | None
    prompt: str | None
    n: int
    draft: int | None
    seed: int | None
    temp: float
    samplers: dict[str, Any]
    stop: tuple[str, ...]
    system: str | None
    raw: bool
    max_prompt_tokens: int | None
    truncate: bool
    verbose: bool
    thinking: Thinking

    @property
    def mode(self) -> str:
        return self.settings.mode

    def check(self) -> None:
        """Refuse combinations that cannot be meant, and texts that are none."""
        if self.n == 0:
            raise UsageError("-n 0 generates nothing: give 1 or more, or -1 for no limit.")
        if self.draft is not None and self.mode != "exact" and self.settings.quality != SAME:
            raise UsageError("--set draft is for mode exact: add --mode exact, or leave it out.")
        if (self.max_prompt_tokens or self.truncate) and self.file is None:
            raise UsageError("--max-prompt-tokens and --truncate take the head of a file: give one with -f.")
        if self.raw and self.system is not None:
            raise UsageError("--raw leaves out the chat template, so there is no place for --system: put it into -p.")
        self.thinking.check(self.raw)
        for name, text in (("--system", self.system or ""), *(("--stop", text) for text in self.stop)):
            from_argument(text, name)

    def has_prompt(self) -> bool:
        """False where nothing was given and stdin is a terminal."""
        return not (self.prompt is None and self.file is None and sys.stdin is not None and sys.stdin.isatty())

    def texts(self) -> tuple[text_input.Source | None, str]:
        """(document, question); one of them may be missing or empty, not both. Raises InputError."""
        document = text_input.open_text(self.file) if self.file is not None else None
        if self.prompt is not None:
            question = text_input.from_argument(self.prompt, "-p")
            if self.file is None:
                _note_unread_stdin()
        else:
            question = text_input.from_stdin() if self.file is None else ""
        if (document is None or document.is_blank()) and not question.strip():
            raise InputError("The prompt is empty: give text with -p, a file with -f, or text on stdin.")
        return document, question

    def load(self) -> Any:
        """The Model, with progress on stderr."""
        with Progress("fetching", "bytes") as fetching:
            path = resolve_noted(self.model, fetching)
        with Progress("loading", "%") as loading:
            model = load_as(path, self.settings, self.verbose, loading)
        if not self.raw:
            self.thinking.apply(model)
        return model

    def sampling(self) -> Any:
        seed: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        return Sampling(temp=self.temp, **seed, **self.samplers)

    @property
    def n_limit(self) -> int | None:
        return None if self.n < 0 else self.n

    def prompt_tokens(self, model: Any, document: text_input.Source | None, question: str) -> list[int]:
        """Token ids of the prompt, the document cut as the request allows. Raises InputError if it does not fit."""
        def build(head: str) -> list[int]:
            text = head + ("\n\n" if document and question else "") + question
            if self.raw:
                return model.tokenize(text, model.vocabulary.add_bos, special=True)
            system = [] if self.system is None else [Message("system", [self.system])]
            return model.template.tokens([*system, Message("user", [text])])

        def tokenize(head: str) -> list[int]:
            return model.tokenize(head, special=self.raw)

        def text_of(tokens: Sequence[int]) -> str:
            return b"".join(model.vocabulary.spelled(t)[0] for t in tokens).decode("utf-8", errors="replace")

        n_ctx = model.n_ctx_limit
        room = n_ctx - (self.n if self.truncate and self.n > 0 else 1)
        limit = min(room, self.max_prompt_tokens or room)

        def refuse(n: str) -> InputError:
            return too_long(n, n_ctx) if limit == room else InputError(
                f"The prompt has {n} tokens, and --max-prompt-tokens allows {limit}: raise it, or ask a shorter question.")

        if document is None:
            return self._checked(build(""), limit, refuse)
        return fit_document(document, build, tokenize, text_of, limit, refuse,
                            may_cut=self.truncate or self.max_prompt_tokens is not None)

    @staticmethod
    def _checked(tokens: list[int], limit: int, refuse: Callable[[str], InputError]) -> list[int]:
        if len(tokens) > limit:
            raise refuse(str(len(tokens)))
        return tokens


def _note_unread_stdin() -> None:
    """Data piped in beside -p is not read, because a program started from a script inherits its stdin."""
    try:
        fd = sys.stdin.fileno()
        waiting = stat.S_ISFIFO(os.fstat(fd).st_mode) and select.select([fd], [], [], 0)[0]
    except (OSError, ValueError, AttributeError):
        return
    if waiting:
        say("stdin is not read when -p is given; to ask about the text on stdin add -f - .")

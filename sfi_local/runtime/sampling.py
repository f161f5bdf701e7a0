"""How the next token is chosen; the work is llama.cpp's sampler chain.

A new sampler is a field of Sampling, its check in _RANGES or validate(), and a line in _add_samplers(): nothing else.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Callable, Mapping, Sequence

from sfi_local.binding.context import logits
from sfi_local.binding.library import last_log_lines, log, open_library
from sfi_local.binding.samplers import Samplers
from sfi_local.errors import ArgumentError, DecodeError
from sfi_local.runtime.vocabulary import Vocabulary

MAX_SEED = 2**32 - 2  # the next one means "any" to llama.cpp
DRY_BREAKERS = ("\n", ":", '"', "*")

# (tokens so far, logits float32 [n_vocab]) -> logits, as llama-cpp-python's LogitsProcessor
Processor = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Sampling:
    """temp 0 takes the most likely token; otherwise, in this order: logit_bias, penalties, DRY, grammar, top_n_sigma, top_k, typical_p,
    top_p, min_p, XTC, temperature, then a draw with seed. Whatever has its default value but temp, top_k, top_p and min_p does nothing.

    temp, top_k (0: all tokens), top_p, min_p
    seed:              0 .. 4294967294; the same seed gives the same draws
    repeat_penalty:    divides the logits of tokens among the last penalty_last_n; 1: none
    presence_penalty:  is taken from the logit of each of them; frequency_penalty: as often as it is there
    penalty_last_n:    tokens, those of the prompt included; -1: all of the text
    dry:               strength of DRY, against repeating sequences longer than dry_allowed_length; dry_base is its growth per token,
                       dry_last_n the tokens it looks at, -1: all
    xtc_probability:   how often all but the last of the tokens above xtc_threshold are left out
    typical_p:         locally typical sampling; 1: off
    top_n_sigma:       tokens within so many standard deviations of the largest logit; 0: off
    mirostat:          1 or 2, in the place of all that follows the grammar but temperature; with mirostat_tau, mirostat_eta
    logit_bias:        added to logits, by token id
    grammar:           GBNF text that the answer obeys; json_schema: the same as a JSON schema, text or dict
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = field(default_factory=lambda: random.randrange(MAX_SEED + 1))
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    dry: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None

    def validate(self) -> "Sampling":
        """Return self, or raise ArgumentError with a sentence."""
        for name, (least, most, meaning) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most or (
                    isinstance(getattr(Sampling, name, 0), int) and value != int(value)):
                raise ArgumentError(f"{name} is {value!r}: give {meaning}.")
        if self.repeat_penalty == 0:
            raise ArgumentError("repeat_penalty is 0: give more than 0; 1 is none.")
        if self.grammar is not None and self.json_schema is not None:
            raise ArgumentError("Both grammar and json_schema are given: give one of them.")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or not isinstance(bias, (int, float)) or math.isnan(bias):
                raise ArgumentError(f"logit_bias has {token!r}: {bias!r}: give numbers by token id.")
        return self

    @property
    def needs_vocabulary(self) -> bool:
        """Whether chain() needs to know the model's tokens."""
        return bool(self.grammar is not None or self.json_schema is not None or self.dry or self.logit_bias or self._penalizes)

    def chain(self, vocabulary: Vocabulary | None = None, prompt: Sequence[int] = (), processors: Sequence[Processor] = (),
              penalize_prompt: bool = True) -> "Chain":
        """A new sampler chain; ``chain.sample(context)`` gives a token id.

        vocabulary: of the model; may be missing where needs_vocabulary is False
        prompt:     tokens before the first that is drawn; penalties and DRY count them too with penalize_prompt
        processors: change the logits before all samplers
        Raises ArgumentError for a grammar or schema with a mistake, or a token that the model does not have.
        """
        native = Samplers()
        self._add_history(native, vocabulary)
        for token in prompt if penalize_prompt and (self.dry or self._penalizes) else ():
            native.accept(token)  # before the grammar is there, which knows of the answer alone
        grammar = self._grammar()
        if grammar is not None:
            _add_grammar(native, vocabulary, grammar)
        self._add_samplers(native, vocabulary)
        return Chain(native, prompt, processors, checked=grammar is not None)

    @property
    def _penalizes(self) -> bool:
        return (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _grammar(self) -> str | None:
        return self.grammar if self.json_schema is None else grammar_of_schema(self.json_schema)

    def _add_history(self, chain: Any, vocabulary: Vocabulary | None) -> None:
        """What looks at the tokens of the prompt too."""
        if self.logit_bias:
            for token in self.logit_bias:
                if not 0 <= token < vocabulary.n_vocab:
                    raise ArgumentError(f"logit_bias has token {token}: this model has 0 to {vocabulary.n_vocab - 1}.")
            chain.add_logit_bias(vocabulary.n_vocab, self.logit_bias)
        if self._penalizes:
            chain.add("penalties", vocabulary.n_vocab, self._tokens(self.penalty_last_n), self.repeat_penalty, self.frequency_penalty,
                      self.presence_penalty)
        if self.dry:
            chain.add_dry(vocabulary.weights.vocab, self.dry, self.dry_base, self.dry_allowed_length, self._tokens(self.dry_last_n),
                          DRY_BREAKERS)

    def _add_samplers(self, chain: Any, vocabulary: Vocabulary | None) -> None:
        if self.temp == 0:
            chain.add("greedy")
            return
        if self.mirostat:
            chain.add("temp", self.temp)
            if self.mirostat == 2:
                chain.add("mirostat_v2", self.seed, self.mirostat_tau, self.mirostat_eta)
            else:
                chain.add("mirostat", vocabulary.n_vocab, self.seed, self.mirostat_tau, self.mirostat_eta, 100)
            return
        if self.top_n_sigma:
            chain.add("top_n_sigma", self.top_n_sigma)
        if self.top_k:
            chain.add("top_k", self.top_k)
        if self.typical_p < 1:
            chain.add("typical", self.typical_p, 1)
        chain.add("top_p", self.top_p, 1)
        chain.add("min_p", self.min_p, 1)
        if self.xtc_probability:
            chain.add("xtc", self.xtc_probability, self.xtc_threshold, 1, self.seed)
        chain.add("temp", self.temp)
        chain.add("dist", self.seed)

    @staticmethod
    def _tokens(n: int) -> int:
        return n if n >= 0 else 1 << 20


_COUNT = (0, 1 << 20, "a number from 0 to 1048576")
_LAST = (-1, 1 << 20, "a number of tokens up to 1048576, or -1 for all")
_SHARE = (0, 1, "a value from 0 to 1")
_RANGES = {
    "temp": (0, math.inf, "0 (most likely token) or more"),
    "top_k": (0, 2**31 - 1, "0 (all tokens) or more"),
    "top_p": _SHARE, "min_p": _SHARE, "typical_p": _SHARE, "xtc_probability": _SHARE, "xtc_threshold": _SHARE,
    "seed": (0, MAX_SEED, f"a number from 0 to {MAX_SEED}"),
    "repeat_penalty": (0, 100, "a value above 0 and up to 100; 1 is none"),
    "presence_penalty": (-100, 100, "a value from -100 to 100; 0 is none"),
    "frequency_penalty": (-100, 100, "a value from -100 to 100; 0 is none"),
    "penalty_last_n": _LAST, "dry_last_n": _LAST, "dry_allowed_length": _COUNT,
    "dry": (0, 100, "a value from 0 (none) to 100"),
    "dry_base": (1, 100, "a value from 1 to 100"),
    "top_n_sigma": (0, 1e6, "0 (off) or more"),
    "mirostat": (0, 2, "0, 1 or 2"),
    "mirostat_tau": (0, 100, "a value from 0 to 100"),
    "mirostat_eta": (0, 1, "a value from 0 to 1"),
}


def grammar_of_schema(schema: str | Mapping[str, Any]) -> str:
    """The GBNF text that texts of a JSON schema obey. Raises ArgumentError."""
    try:
        return _gbnf(schema if isinstance(schema, str) else json.dumps(schema))
    except Exception as error:  # whatever the schema trips over
        why = str(error) or type(error).__name__
        raise ArgumentError(f"The JSON schema cannot be used ({why}): check it.") from None


@lru_cache(maxsize=16)  # a server asks for it when it checks a request, and again for each answer
def _gbnf(schema: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    return json_schema_to_gbnf(schema)


def _add_grammar(chain: Any, vocabulary: Vocabulary, grammar: str) -> None:
    """Add a grammar's sampler. Raises ArgumentError."""
    log.errors.clear()
    with vocabulary.access:
        added = grammar.strip() and "\0" not in grammar and chain.add("grammar", vocabulary.weights.vocab, grammar.encode("utf-8"), b"root")
    if not added:
        raise ArgumentError(f"The grammar cannot be parsed ({last_log_lines() or 'no message'}): it is GBNF, and begins with a rule "
                            f"named root.")


class Chain:
    """Draws tokens, and can be cloned with what it remembers and its random numbers.

    native:     binding.samplers.Samplers
    prompt:     tokens before the first draw, for the processors
    processors: change the logits first; what they raise reaches the caller
    checked:    a draw that the samplers forbade is an error instead of the end of the process
    """

    def __init__(self, native: Any, prompt: Sequence[int] = (), processors: Sequence[Processor] = (), checked: bool = False):
        self._native, self._processors, self._checked = native, list(processors), checked
        self._tokens = list(prompt) if processors else []

    def sample(self, context: Any, row: int = -1) -> int:
        """The next token, from a row of the logits of a context."""
        if not (self._processors or self._checked):
            return self._native.sample(context, row)
        import numpy as np

        values = logits(context, row).copy()
        if self._processors:
            tokens = np.array(self._tokens, dtype=np.intc)
            for process in self._processors:
                values = np.asarray(process(tokens, values), dtype=np.float32)
        token = self._draw(values)
        if self._processors:
            self._tokens.append(token)
        return token

    def clone(self) -> "Chain":
        return Chain(self._native.clone(), self._tokens, self._processors, self._checked)

    def close(self) -> None:
        self._native.close()

    def _draw(self, values: Any) -> int:
        """llama_sampler_sample() of logits that are not a context's."""
        import numpy as np

        llama_cpp = open_library().llama_cpp
        candidates = np.zeros(len(values), dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"], candidates["logit"] = np.arange(len(values)), values
        array = llama_cpp.llama_token_data_array(data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=len(values),
                                                 selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._native.sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        if chosen is None or not chosen.logit > -math.inf:
            raise DecodeError("No token is left to choose from: the grammar or a logits processor forbids each of this model's tokens "
                              "here. Change it so that an answer can go on, or end.")
        self._native.accept(chosen.id)
        return int(chosen.id)

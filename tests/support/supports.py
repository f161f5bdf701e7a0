"""A prompt whose support is known, the edits of its cache, and sequences that take turns: on the native and the portable path."""

import numpy as np
import pytest

N = 200  # tokens of the prompt
LAYERS, HEADS = range(4), range(2)  # of the tiny model
CLOSE = 1e-3  # of logits; without the cells of one KV head they differ by about one


def took(info):
    return info.kind, info.reason


def load_sequence(c):
    c.set_state(c.state())


def load_everything(c):
    data = (np.ctypeslib.ctypes.c_uint8 * c.llama.llama_state_get_size(c.address))()
    c.llama.llama_state_get_data(c.address, data, len(data))
    c.llama.llama_state_set_data(c.address, data, len(data))


def copy_over(c):
    c.prefill([5] * 50, seq=1)
    c.llama.llama_memory_seq_cp(c.memory, 1, 0, -1, -1)


def abort(c):
    """A step that a callback of the caller stops."""
    from sfi_local.errors import AbortedError

    stop = c.llama.ggml_abort_callback(lambda user: True)
    c.llama.llama_set_abort_callback(c.address, stop, None)
    with pytest.raises(AbortedError):
        c.step(1)
    c.llama.llama_set_abort_callback(c.address, c.llama.ggml_abort_callback(), None)


EDITS = {
    "cut the end": lambda c: c.cut(N),
    "cut the middle": lambda c: c.cut(50, 60),
    "cut everything": lambda c: c.cut(0),
    "shift": lambda c: c.llama.llama_memory_seq_add(c.memory, 0, 100, -1, 7),
    "shift back": lambda c: (c.cut(50, 60), c.llama.llama_memory_seq_add(c.memory, 0, 60, -1, -10)),
    "divide": lambda c: c.llama.llama_memory_seq_div(c.memory, 0, 0, -1, 2),
    "copy over": copy_over,
    "clear": lambda c: c.llama.llama_memory_clear(c.memory, True),
    "load a sequence": load_sequence,
    "load everything": load_everything,
    "plain decode": lambda c: c.decode([9, 9, 9]),
    "aborted step": abort,
    "invalidate": lambda c: c.engine.invalidate(0),
}


def check_interleaved(opened, prompts):
    """Sequences decode as each would alone. Prompts of different lengths, so that the sequences are at different places of their spans."""
    def decode(context, seq):
        context.prefill(prompts[seq][30 * seq:], seq=seq)
        logits = context.logits()
        for i in range(20):
            info = context.step(int(logits.argmax()), "slow" if i == 5 * seq else "auto", seq)
            logits = context.logits()
            yield (info.kind, info.reason, info.pos, info.depth, info.n_cells), logits

    together = opened(n_seq=3)
    for row in zip(*[zip(decode(together, seq), decode(opened(n_seq=3), seq)) for seq in range(3)]):
        for (one, logits), (other, expected) in row:
            assert one == other and np.abs(logits - expected).max() < CLOSE

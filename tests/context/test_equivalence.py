"""A step against the step it must equal: on a tiny model of F32 weights to rounding, on a real one layer by layer.

Noise: the real model's Q4_1 matrices round their input to 8 bits, so two sums in another order, 1e-7 apart, may round
apart in one of 30 layers, and then the logits differ by up to one. So the real model is compared with the input of
each layer given (then nothing but the attention can differ), or by the KL divergence of next-token distributions.
"""

import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from support.contexts import (  # noqa: F401
    ROW_KINDS,
    Context,
    Watch,
    attend_to,
    load_weights,
    node_rows,
    write_sliding,
)
from support.tiny_model import SEED

N_PROMPT, N_TAIL = 600, 64  # tokens of the real prompt; those whose prefill every test repeats
ROUNDING = 1e-5  # of F32 attention over a few hundred cells, relative; measured: below 1e-6
KL_STOCK = {"q4_0": 0.05}  # else 0.01, mean over steps; measured 0.02 and 0.003: stock rounds q to the bits of K or of Q8_0

STORED_APART = {"f32": 1e-4, "f16": 1e-3}  # of logits, after steps whose new K and V may have been stored a bit apart


@pytest.fixture(scope="module")
def small():
    from sfi_local import SfiParams

    return SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=64, max_span=64)


@pytest.fixture(scope="module")
def real_weights(native, smollm2):
    with load_weights(native, smollm2) as model:
        yield model


@pytest.fixture(scope="module")
def text(native, real_weights):
    """Tokens of English prose with markup, which every Python brings along."""
    llama, prose = native.llama_cpp, Path(pydoc_data.topics.__file__).read_bytes()[:6000]
    tokens = (llama.llama_token * len(prose))()
    n = llama.llama_tokenize(llama.llama_model_get_vocab(real_weights), prose, len(prose), tokens, len(tokens), True, True)
    assert n > N_PROMPT + 50
    return list(tokens[:n])


@pytest.fixture(scope="module")
def real(native, real_weights, text, small):
    """real(kv) is a context of the real model that holds the prompt and a support chosen by its prefill."""
    made = {}

    def start(kv="f16", params=small):
        if kv not in made:
            made[kv] = Context(native, real_weights, small, kv=kv, n_threads=2, watch=Watch("sparse_attn"))
            made[kv].prefill(text[:N_PROMPT])
        one = made[kv]
        one.watch.seen, one.watch.replace = [], None
        one.cut(N_PROMPT - N_TAIL)
        one.engine.params = params
        one.prefill(text[N_PROMPT - N_TAIL:N_PROMPT])
        return one

    yield start
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(SEED).integers(0, 256, 300).tolist()


def support(context, n_refresh, n_cells):
    """{layer: [cells of a KV head]} of a fast step that saw n_cells, n_refresh of them at the refresh; cell = position."""
    p = context.engine.params
    always = np.r_[:p.n_sink, n_refresh - p.n_recent:n_cells]
    return {il: [np.append(always, context.engine.selected(il, h)[0]) for h in range(layer.n_head_kv)]
            for il, layer in enumerate(context.engine.layers()) if layer.sparse}


def kl(a, b):
    """Mean KL divergence of two series of next-token distributions, from logits [n, n_vocab]."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


def same_choice(a, b):
    """The best token is the same at each step, but for ties: where the two best differ less than the series do."""
    gap = np.sort(a, axis=1)[:, -1] - np.sort(a, axis=1)[:, -2]
    return ((a.argmax(axis=1) == b.argmax(axis=1)) | (gap < np.abs(a - b).max(axis=1))).all()


# ---- a fast step equals dense attention masked to the same support ----------------------------------------------------


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_in_each_layer_a_fast_step_equals_masked_dense_attention(real, text, kv):
    """The same token twice: fast, then dense with the attention over the fast step's support computed beside it."""
    context, fast, errors = real(kv), {}, []
    context.steps(text[N_PROMPT:N_PROMPT + 2], "fast")
    context.watch.seen.clear()
    context.watch.replace = lambda il, node: fast.setdefault(il, node_rows(node)[1].view(np.float32).copy())
    logits = context.steps(text[N_PROMPT + 2:][:1], "fast")
    assert context.watch.seen == [(il, "SPARSE_ATTN") for il in range(30)]
    cells = support(context, N_PROMPT, N_PROMPT + 3)

    def compare(il, node):
        masked = attend_to(node, cells[il])
        errors.append(np.abs(masked - fast[il].reshape(masked.shape)).max() / np.abs(masked).max())
        return fast[il]

    context.cut(N_PROMPT + 2)
    context.watch.replace = compare
    assert np.array_equal(context.steps(text[N_PROMPT + 2:][:1], "dense"), logits)
    assert len(errors) == 30 and max(errors) < ROUNDING


@pytest.mark.parametrize("selector", ["topk", "paper"])
@pytest.mark.parametrize("kv", ROW_KINDS)
def test_through_all_layers_a_fast_step_equals_masked_dense_attention(open_context, tiny_weights, small, prompt, kv,
                                                                      selector):
    context = open_context(tiny_weights, small.replace(selector=selector), kv=kv, watch=Watch("sparse_attn"))
    context.prefill(prompt)
    fast = context.steps([1, 2, 3], "fast")[-1]
    cells = support(context, len(prompt), len(prompt) + 3)

    def dense(replace):
        context.cut(len(prompt) + 2)
        context.watch.replace = replace
        return context.steps([3], "dense")[0]

    assert np.abs(dense(lambda il, node: attend_to(node, cells[il])) - fast).max() < 1e-4
    assert np.abs(dense(lambda il, node: attend_to(node, [c[:-1] for c in cells[il]])) - fast).max() > 1e-2  # one missing
    assert np.abs(dense(None) - fast).max() > 1.0


def test_layers_with_a_sliding_window_stay_as_they_are(native, open_context, small, prompt, tmp_path):
    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        context = Context(native, weights, small, watch=Watch("sparse_attn"))
        assert [layer.sparse for layer in context.engine.layers()] == [False, False, False, True]
        context.prefill(prompt)
        assert set(context.watch.seen) == {(3, "SPARSE_ATTN")}
        context.watch.seen.clear()
        fast = context.steps([1, 2, 3], "fast")[-1]
        assert context.watch.seen == [(3, "SPARSE_ATTN")] * 3
        cells = support(context, len(prompt), len(prompt) + 3)
        context.cut(len(prompt) + 2)
        context.watch.replace = lambda il, node: attend_to(node, cells[il])
        assert np.abs(context.steps([3], "dense")[0] - fast).max() < 1e-4
        context.close()


# ---- a budget of everything equals dense ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_a_budget_of_everything_gives_the_tokens_of_dense(open_context, tiny_weights, small, prompt, kv):
    def greedy(kind):
        context = open_context(tiny_weights, small.replace(n_selected=len(prompt)), kv=kv)
        context.prefill(prompt)
        logits = [context.logits()]
        for _ in range(48):
            assert context.step(int(logits[-1].argmax()), kind).kind == kind
            logits.append(context.logits())
        return np.array(logits)

    fast, dense = greedy("fast"), greedy("dense")
    assert fast.argmax(axis=1).tolist() == dense.argmax(axis=1).tolist()
    assert np.abs(fast - dense).max() < STORED_APART.get(kv, 1e-2)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_budget_of_everything_equals_dense_on_a_real_model(real, small, text, kv):
    more = text[N_PROMPT:N_PROMPT + 32]
    fast = real(kv, small.replace(n_selected=N_PROMPT)).steps(more, "fast")
    dense = real(kv).steps(more, "dense")
    assert kl(dense, fast) < 0.01 and same_choice(dense, fast)


def test_lists_that_outgrow_their_padding_lose_no_cell(open_context, tiny_weights, small):
    """From 1000 to 1048 cells, by steps of every kind: lists of all cells are padded to 1024."""
    tokens, params = np.random.default_rng(SEED).integers(0, 256, 1048).tolist(), small.replace(n_selected=1048)
    ours, dense = (open_context(tiny_weights, params, n_ctx=1100, watch=Watch("sparse_attn")) for _ in range(2))
    ours.prefill(tokens[:1000]), dense.prefill(tokens[:1000])
    for i in range(1000, 1048):
        dense.watch.replace = lambda il, node: attend_to(node, [np.arange(i + 1)] * 2)
        ours.step(tokens[i], ("slow", "fast", "dense")[i % 3]), dense.step(tokens[i], "dense")
        assert np.abs(ours.logits() - dense.logits()).max() < 1e-3


# ---- dense, slow and stock steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_a_dense_step_equals_the_stock_step_on_a_real_model(real, text, kv):
    more = text[N_PROMPT:N_PROMPT + 24]
    dense, context = real(kv).steps(more, "dense"), real(kv)
    stock = np.array([context.decode([token]) for token in more])
    assert kl(stock, dense) < KL_STOCK.get(kv, 0.01) and same_choice(stock, dense)


@pytest.mark.parametrize("kv", ["f16", "q4_0"])
def test_a_slow_step_has_the_logits_of_a_dense_step(real, text, kv):
    more = text[N_PROMPT:N_PROMPT + 8]
    assert np.array_equal(real(kv).steps(more, "slow"), real(kv).steps(more, "dense"))


def test_prefill_has_the_logits_of_plain_decode(open_context, tiny_weights, small, prompt):
    """Over several batches and ubatches, and after what the sequence holds."""
    plain, ours = (open_context(tiny_weights, params, n_batch=128, n_ubatch=64) for params in (None, small))
    for part in (prompt, prompt[:100]):
        for i in range(0, len(part), 128):
            plain.decode(part[i:i + 128])
        ours.prefill(part)
        assert np.abs(ours.logits() - plain.logits()).max() < 0.1 * plain.logits().std()  # upstream adds up V in F16


def test_prefill_has_the_logits_of_dense_steps(open_context, tiny_weights, small, prompt):
    prefilled, stepped = (open_context(tiny_weights, small, n_ubatch=64) for _ in range(2))
    prefilled.prefill(prompt)
    logits = stepped.steps(prompt, "dense")[-1]
    assert np.abs(prefilled.logits() - logits).max() < 0.01 * logits.std()


# ---- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "slow", "dense"])
def test_the_number_of_threads_changes_nothing(open_context, tiny_weights, small, prompt, kind):
    def steps(n_threads):
        context = open_context(tiny_weights, small, n_threads=n_threads)
        context.prefill(prompt)
        return context.steps(prompt[:8], kind)

    one = steps(1)
    assert np.abs(steps(2) - one).max() < 1e-4
    assert np.abs(steps(3) - one).max() < 1e-4


def test_detaching_leaves_the_stock_context(open_context, tiny_weights, small, prompt):
    plain, ours = (open_context(tiny_weights, params) for params in (None, small))
    ours.prefill(prompt), ours.steps([1, 2], "dense"), ours.engine.close()
    ours.cut(0)
    assert np.array_equal(ours.decode(prompt), plain.decode(prompt))
    assert np.array_equal(ours.decode([7, 8, 9]), plain.decode([7, 8, 9]))

"""A longer context by YaRN: what the metadata becomes, and that llama.cpp computes with it in every mode."""

import pytest
from support.tiny_model import N_CTX, write_tiny

from sfi_local import load
from sfi_local.errors import ArgumentError
from sfi_local.runtime.sampling import Sampling
from sfi_local.store.gguf_file import read_gguf
from sfi_local.store.stretch import yarn

PROMPT = "The quick brown fox jumps over the lazy dog, and so on. " * 20


def test_the_metadata_of_a_stretched_file(tiny):
    file = read_gguf(tiny)
    stretched, changed = yarn(file, 4)
    assert stretched.n_ctx_train == 4 * N_CTX and stretched.get("rope.scaling.type") == "yarn"
    assert changed["llama.rope.scaling.original_context_length"] == N_CTX and file.n_ctx_train == N_CTX
    assert yarn(file, 2.5, 1000)[0].n_ctx_train == 2500


@pytest.mark.parametrize("factor", [1, 0, -2, 65, float("nan")])
def test_factors_out_of_range_are_refused(tiny, factor):
    with pytest.raises(ArgumentError, match="above 1"):
        yarn(read_gguf(tiny), factor)


def test_a_file_that_is_stretched_by_itself_is_refused(tmp_path, tiny):
    once = yarn(read_gguf(tiny), 2)[0]
    with pytest.raises(ArgumentError, match="stretched by itself"):
        yarn(once, 2)


def tokens(path, mode, n=8, **options):
    """The tokens that are most likely after a prompt."""
    found = []
    with load(path, mode=mode, n_threads=1, n_ctx=2048, **options) as model:
        for step in model.generate(PROMPT, n=n, sampling=Sampling(temp=0)):
            found.append(step.token)
    return found


def test_all_modes_compute_with_it(tiny):
    plain, stock = tokens(tiny, "stock"), tokens(tiny, "stock", yarn=8)
    assert plain != stock  # of a model with random weights every change of the positions shows
    assert tokens(tiny, "dense", yarn=(8, N_CTX)) == stock


def test_it_is_what_a_file_with_the_same_metadata_gives(tmp_path, native):
    import gguf

    plain = write_tiny(tmp_path / "plain.gguf")
    real = gguf.GGUFWriter.add_rope_dimension_count

    def with_yarn(writer, n):
        real(writer, n)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(N_CTX)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_rope_dimension_count", with_yarn)
        written = write_tiny(tmp_path / "written.gguf")
    assert tokens(plain, "stock", yarn=8) == tokens(written, "stock") != tokens(plain, "stock")


def test_the_context_may_be_as_long_as_it_says(tiny):
    with load(tiny, n_threads=1, yarn=4) as model:
        assert model.n_ctx_limit == 4 * N_CTX


@pytest.mark.parametrize("typed, word", [("x", "not understood"), ("4:", "not understood"), ("1", "above 1"), ("-4", "not understood")])
def test_what_is_typed_wrong_is_a_sentence(cli, tiny, typed, word):
    done = cli("run", tiny, "-p", "x", "-n", 1, "--yarn", typed)
    assert done.returncode in (1, 2) and word in done.stderr.decode() and b"Traceback" not in done.stderr


def test_the_note_about_a_longer_context_names_it(tiny):
    with load(tiny, n_threads=1, mode="stock", n_ctx=3 * N_CTX) as model:
        next(model.generate("x", n=1))
        assert "longer than the 4096" in model.notes[-1] and "by YaRN, 3 times" in model.notes[-1]
    with load(tiny, n_threads=1, mode="stock", n_ctx=3 * N_CTX, yarn=2) as model:
        next(model.generate("x", n=1))
        assert "longer than the 8192" in model.notes[-1] and "YaRN" not in model.notes[-1]

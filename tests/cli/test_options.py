"""-o and --set take every field there is; an old option says its new spelling; what cannot be meant is refused before a model is loaded."""

import pytest
from click.testing import CliRunner

from sfi_local.cli import moved
from sfi_local.cli.main import cli as group
from sfi_local.cli.options import take_params, take_settings
from sfi_local.cli.spelling import OPTIONS, spelled
from sfi_local.errors import ContextFullError, Remedy, SfiError, UsageError
from sfi_local.params import SfiParams

WITH_SET = ("run", "view", "bench", "eval", "inspect", "calibrate")


def refused(*words):
    """The sentence of a wrong use."""
    done = CliRunner().invoke(group, [*words, "no-such-model.gguf"], standalone_mode=False)
    assert isinstance(done.exception, UsageError), done.exception
    return str(done.exception)


def parsed(name, *words):
    return group.get_command(None, name).make_context(name, [*words, "model"]).params


@pytest.mark.parametrize("name", WITH_SET)
def test_old_options_say_their_new_spelling(name):
    assert refused(name, "--tolerance", "0.5") == "--tolerance is spelled otherwise now: use --set tolerance=0.5."
    assert "use --set boundary=off." in refused(name, "--no-boundary") and "use --set policy=frozen." in refused(name, "--policy", "frozen")
    assert "sketch_k4=4,sketch_k2=12,sketch_k1=24,sketch_v4=0,sketch_v2=16." in refused(name, "--sketch-bits", "4,12,24:0,16")
    assert all("spelled otherwise" in refused(name, f"--{old.replace('_', '-')}", "1") or old not in SfiParams.__dataclass_fields__
               for old in moved.PARAMETERS)


def test_old_samplers_too():
    assert "use -o top_k=3." in refused("run", "--top-k", "3") and "use --set draft=4." in refused("view", "--draft", "4")


def test_what_a_field_was_called_is_gone_with_it(monkeypatch):
    monkeypatch.setattr(moved, "KNOWN", moved.KNOWN - {"tolerance"})
    assert refused("run", "--tolerance", "1") == "--tolerance is gone with what it set: leave it out."


@pytest.mark.parametrize("name", WITH_SET)
def test_the_same_fields_on_every_command(name):
    options = parsed(name, "--set", "n_selected=512,tolerance=0", "--set", "boundary=on,n_selected=64")
    assert options["set_fields"] == {"n_selected": 64, "tolerance": 0.0, "boundary": True}
    assert "more than 32 bits" in refused(name, "--set", "n_selected=99999999999")
    assert "did you mean n_selected?" in refused(name, "--set", "n_selekted=3")


def test_what_was_typed_becomes_settings():
    options = parsed("run", "--set", "n_selected=512,draft=3", "--mode", "exact", "--ctx", "100", "-t", "3", "--kv-type", "q8_0")
    settings = take_settings(options)
    assert (settings.mode, settings.n_ctx, settings.n_threads, settings.type_k, settings.type_v) == ("exact", 100, 3, "q8_0", "q8_0")
    assert settings.params == {"n_selected": 512} and options["draft"] == 3 and "mode" not in options
    assert take_settings(parsed("run", "--fidelity", "0.01")).quality == 0.01
    assert take_params(parsed("bench", "--quality", "fast")).quality == "fast"
    assert parsed("run", "-o", "top_k=3", "-o", "min_p=0.5")["samplers"] == {"top_k": 3, "min_p": 0.5}


@pytest.mark.parametrize("words, said", [
    (("-o", "top_p=3"), "from 0 to 1"), (("-o", "topk=3"), "did you mean top_k?"), (("-o", "temp=1"), "use --temp"),
    (("-o", "top_k=99999999999"), "32 bits"), (("--quality", "best"), "same, close, fast"), (("--set", "n_selected=0"), "n_selected is 0"),
    (("--set", "policy=frozen,n_recent=8"), "n_recent"), (("--quality", "same", "--mode", "sfi"), "leave one of them out"),
    (("--quality", "1", "--set", "tolerance=1"), "leave out"), (("--fidelity", "1", "--quality", "fast"), "leave out one"),
    (("-p", "x", "--set", "draft=3"), "--mode exact"), (("--quality", "fast", "--mode", "dense"), "fast steps"),
    (("--quality", "0.1", "--set", "policy=window"), "policy window"),
])
def test_what_cannot_be_meant_is_refused_before_a_model_is_looked_for(words, said):
    assert said in refused("run", *words)


def test_a_depth_that_no_context_can_have():
    for depth in ("99999999999", "9999999999k"):
        assert "more than a context can have" in refused("bench", "--depth", depth)


def test_errors_speak_of_options_here_and_of_parameters_in_python():
    error = ContextFullError("The context of 512 tokens is full", Remedy("raise {}", "n_ctx"), Remedy("start anew"))
    assert str(error) == "The context of 512 tokens is full: raise n_ctx, or start anew."
    assert error.told(spelled) == "The context of 512 tokens is full: raise --ctx, or start anew."
    two = SfiError("No", Remedy("take {}", "n_selected", 8), Remedy("use {}", "type_k", "q8_0"), Remedy("lower {}", "top_k"))
    assert str(two) == "No: take n_selected=8, use type_k='q8_0', or lower top_k."
    assert two.told(spelled) == "No: take --set n_selected=8, use --kv-type q8_0, or lower -o top_k."
    assert SfiError("A whole sentence.").told(spelled) == "A whole sentence."
    assert [r.field for r in two.remedies] == ["n_selected", "type_k", "top_k"]


def test_every_spelling_is_an_option():
    names = {name for command in ("run", "bench") for option in group.get_command(None, command).params for name in option.opts}
    assert set(OPTIONS.values()) - {"--force"} <= names


def test_a_grammar_and_a_schema_may_hold_commas_and_come_from_a_file(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {}}')
    assert parsed("run", "-o", 'grammar=root ::= "a", "b"', "-o", "top_k=3,min_p=0")["samplers"] == {
        "grammar": 'root ::= "a", "b"', "top_k": 3, "min_p": 0.0}
    assert parsed("run", "-o", f"json_schema=@{tmp_path / 'schema.json'}")["samplers"]["json_schema"].startswith('{"type"')
    assert "cannot be read" in refused("run", "-o", "grammar=@no-such-file")
    (tmp_path / "long").write_text("x" * (1 << 20) + "y")
    assert "too many for a grammar" in refused("run", "-o", f"grammar=@{tmp_path / 'long'}")


def test_adapters_and_their_strengths():
    assert parsed("run", "--lora", "a.gguf", "--lora", "C:/b.gguf:0.5", "--lora", "C:/c.gguf")["lora"] == (
        ("a.gguf", 1.0), ("C:/b.gguf", 0.5), ("C:/c.gguf", 1.0))

"""The command line: what scripts rely on, and one sentence for everything that can be wrong."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from support.command_line import cli_command, cli_env, sentence
from support.tiny_model import write_tiny

SMALL = ("--set", "policy=frozen,n_recent=32,n_selected=40,max_span=12,min_span=2", "-t", 1)
TEXT = "The quick brown fox jumps over the lazy dog. " * 12
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    return path


# ---- what scripts rely on --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["sfi", "dense", "stock", "auto"])
def test_json_has_what_scripts_rely_on(cli, tiny, document, mode):
    done = cli("run", tiny, "-f", document, "-p", "Why?", "-n", 30, "--mode", mode, "--seed", 1, "--temp", 0, "--json",
               "--ctx", 2048, *SMALL)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["n_prompt"] > len(TEXT) and out["n_generated"] == len(out["tokens"]) == 30 and out["finish"] == "length"
    assert out["prefill_tps"] > 0 and out["decode_tps"] > 0
    assert sum(out["steps"].values()) == 29
    assert out["mode"] == mode and out["model"] == str(tiny) and "+" in out["source_id"]
    if mode in ("sfi", "auto"):
        assert out["steps"]["fast"] > 15 and out["steps"]["slow"] == sum(out["reasons"].values()) > 0
        assert out["kv_read_share"] < 0.5
    else:
        assert out["steps"][mode] == 29 and out["kv_read_share"] == 1.0


def test_stdout_is_the_answer_alone_and_stderr_ends_with_the_statistics(cli, tiny, document):
    options = (tiny, "-f", document, "-p", "Why?", "-n", 30, "--temp", 0, "--mode", "sfi", *SMALL)
    plain, as_json = cli("run", *options), cli("run", *options, "--json")
    text = json.loads(as_json.stdout)["text"]
    assert plain.stdout.decode() == text + "\n" * (not text.endswith("\n"))
    line = plain.stderr.decode().splitlines()[-1]
    for word in ("tokens read at", "30 written at", "fast", "slow", "KV read"):
        assert word in line
    assert b"written" not in cli("run", *options, "--quiet").stderr
    verbose = cli("run", *options, "--verbose").stderr.decode()
    for word in ("prefill", "decode 29 steps", "fast", "slow", "because", "KV read"):
        assert word in verbose


def test_every_mode_gives_the_same_prompt_and_dense_equals_a_budget_of_everything(cli, tiny, document):
    def tokens(*options):
        done = cli("run", tiny, "-f", document, "-n", 20, "--temp", 0, "--json", "-t", 1, *options)
        return json.loads(done.stdout)["tokens"]

    assert tokens("--mode", "dense") == tokens("--mode", "sfi", "--set", "n_selected=1500,tolerance=0")


def test_text_may_come_from_stdin(cli, tiny, document):
    common = ("-n", 3, "--temp", 0, "--json", "-t", 1)
    from_file = json.loads(cli("run", tiny, "-f", document, "-p", "Why?", *common).stdout)
    piped = json.loads(cli("run", tiny, "-f", "-", "-p", "Why?", *common, input=TEXT).stdout)
    alone = json.loads(cli("run", tiny, *common, input=TEXT).stdout)
    assert piped["tokens"] == from_file["tokens"] and alone["n_prompt"] < from_file["n_prompt"]


def test_the_document_stands_before_the_question_in_the_chat_template(cli, tiny, document, native):
    from sfi_local import load

    out = json.loads(cli("run", tiny, "-f", document, "-p", "Why?", "--system", "Be brief.", "-n", 1, "--json").stdout)
    with load(tiny) as model:
        expected = model.prompt_tokens([{"role": "system", "content": "Be brief."},
                                        {"role": "user", "content": f"{TEXT}\n\nWhy?"}])
    assert out["n_prompt"] == len(expected)


def test_raw_leaves_the_template_out(cli, tiny):
    assert json.loads(cli("run", tiny, "-p", "abc", "--raw", "-n", 1, "--json").stdout)["n_prompt"] == 3


@pytest.mark.parametrize("options, n", [(("--max-prompt-tokens", 200), 200), (("--truncate", "--ctx", 512, "-n", 10), 502)])
def test_the_head_of_a_long_file_can_be_taken(cli, tiny, document, options, n):
    out = json.loads(cli("run", tiny, "-f", document, "-p", "Why?", "-n", 10, "--json", "-t", 1, *options).stdout)
    assert out["n_prompt"] == n


def test_stop_texts_end_the_answer(cli, tiny):
    common = ("run", tiny, "-p", "Hello", "-n", 30, "--temp", 0, "--json", "-t", 1)
    text = json.loads(cli(*common).stdout)["text"]
    out = json.loads(cli(*common, "--stop", text[4:6]).stdout)
    assert out["text"] == text[:text.index(text[4:6])] and out["finish"] == "stop"


def test_models_inspect_and_doctor_speak_json(cli, tiny, tmp_path):
    models = json.loads(cli("models", "--json", SFI_LOCAL_CACHE=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub")).stdout)
    assert {"name", "path", "size", "context", "license", "sha256", "fits"} <= set(models[0]) and models[0]["path"] is None
    assert 0 < models[0]["fits"] <= models[0]["context"]
    facts = json.loads(cli("inspect", tiny, "--json").stdout)
    assert facts["n_sparse"] == 4 and facts["kv_bytes"]["f16"]["4096"] == 4096 * 1024 and facts["kv_bytes_by"] == "llama.cpp"
    doctor = json.loads(cli("doctor", "--json").stdout)
    assert doctor["library"]["usable"] is True and "sparse_attn" in doctor["devices"]["CPU"]


def test_inspect_and_doctor_speak_to_people(cli, tiny):
    assert "4 of 4 layers" in cli("inspect", tiny).stdout.decode()
    assert "source_id" in cli("doctor").stdout.decode()


def test_help_is_there_for_every_command_and_needs_no_library(cli):
    from sfi_local.cli.main import COMMANDS

    for command in ((), *((name,) for name in COMMANDS)):
        done = cli(*command, "--help")
        assert done.returncode == 0 and b"sfi-local" in done.stdout
    assert cli("--version").stdout.startswith(b"sfi-local 0")
    code = "import sys, sfi_local.cli.run, sfi_local.cli.main; sys.exit(any(m in sys.modules for m in ('llama_cpp', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env=cli_env()).returncode == 0


# ---- bad input: a sentence each --------------------------------------------------------------------------------------

def test_bad_model_files(cli, tmp_path, tiny):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html>" * 10)
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-1000])
    for path, word in (("none.gguf", "no file"), (".", "directory"), ("empty.gguf", "empty"), ("page.gguf", "not a GGUF"),
                       ("cut.gguf", "truncated")):
        assert word in sentence(cli("run", tmp_path / path, "-p", "x"))


def test_a_model_too_large_for_memory(cli, tmp_path):
    path = tmp_path / "huge.gguf"
    header, tensor = struct.pack("<IQQ", 3, 1, 2), struct.pack("<Q1sIQIQ", 1, b"t", 1, 1 << 40, 0, 0)
    keys = b"".join(struct.pack(f"<Q{len(key)}sIQ{len(value)}s", len(key), key, 8, len(value), value)
                    for key, value in ((b"general.architecture", b"llama"), (b"tokenizer.ggml.model", b"gpt2")))
    path.write_bytes(b"GGUF" + header + keys + tensor)
    os.truncate(path, (1 << 42) + 4096)  # sparse: takes no disk
    line = sentence(cli("run", path, "-p", "x"))
    assert "needs 4.4 TB" in line and "more than can be used" in line and "smaller quantisation" in line and "--force" in line


@pytest.mark.parametrize("kind, word", [("adapter", "adapter (LoRA)"), ("mmproj", "projector"), ("imatrix", "importance matrix"),
                                        ("vocab", "vocabulary without weights"), ("embedding", "for embeddings")])
def test_files_that_are_no_model_are_named_for_what_they_are(cli, tmp_path, kind, word):
    line = sentence(cli("run", write_other(tmp_path / "x.gguf", kind), "-p", "x"))
    assert word in line and "give" in line


def write_other(path, kind):
    """A file that lies beside models in repositories."""
    import gguf
    import numpy as np

    out = gguf.GGUFWriter(path, {"mmproj": "clip", "embedding": "qwen3"}.get(kind, "llama"))
    if kind in ("adapter", "imatrix"):
        out.add_type(kind)
    out.add_tokenizer_model("gpt2" if kind in ("embedding", "vocab") else "no_vocab")
    if kind == "embedding":
        out.add_pooling_type(gguf.PoolingType.LAST)
    if kind != "vocab":
        out.add_tensor("blk.0.attn_q.weight" + (".lora_a" if kind == "adapter" else ""), np.zeros((8, 32), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_rm_removes_what_was_pulled(cli, tmp_path):
    from sfi_local.catalogue import find

    cache = {"SFI_LOCAL_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    place = tmp_path / "cache" / "models" / "smollm2-135m" / find("smollm2-135m").file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    done = cli("rm", "smollm2-135m", **cache)
    assert done.returncode == 0 and b"Removed 1 file of smollm2-135m, 7 B." in done.stderr and not place.exists()
    assert "is not in the cache" in sentence(cli("rm", "smollm2-135m", **cache))
    assert "did you mean" in sentence(cli("rm", "smollm3", **cache)) and "delete the file itself" in sentence(cli("rm", "./x.gguf", **cache))


def test_a_model_that_cannot_be_sparse(cli, tmp_path, native):
    path = write_tiny(tmp_path / "odd.gguf", n_embd=96)  # head size 24
    refusal = sentence(cli("run", path, "-p", "x", "--mode", "sfi"))
    assert "head size" in refusal and "ode stock" in refusal
    auto = cli("run", path, "-p", "x", "-n", 3, "--temp", 0, "--json")
    out = json.loads(auto.stdout)
    assert out["steps"]["stock"] == 2 and "head size" in out["notes"][0] and "head size" in auto.stderr.decode()


def test_prompts_that_do_not_fit(cli, tiny, document):
    line = sentence(cli("run", tiny, "-f", document, "--ctx", 256, "-n", 8, "--mode", "dense", "--set", "n_selected=8,n_recent=16"))
    assert "and the context 256" in line and "--max-prompt-tokens" in line


def test_text_that_is_no_text(cli, tiny, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin1"))
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    assert "byte 3 is 0xe9" in sentence(cli("run", tiny, "-f", "latin1.txt", "-p", "x"))
    assert "NUL byte at offset 2" in sentence(cli("run", tiny, "-f", "binary", "-p", "x"))
    assert "byte 1 is 0xff" in sentence(cli("run", tiny, input=b"a\xffb"))
    assert "no file" in sentence(cli("run", tiny, "-f", "none.txt"))
    assert "directory" in sentence(cli("run", tiny, "-f", "."))


@posix
@pytest.mark.parametrize("option", ["-p", "--system", "--stop"])
def test_an_argument_that_is_no_text(tiny, option):
    command = [*map(os.fsencode, cli_command("run", tiny, "-p", "x", option)), b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, env=cli_env(), stdin=subprocess.DEVNULL)
    assert f"{option} is not UTF-8 text: byte 3 is 0xe9" in sentence(done)


@posix
def test_a_file_name_that_is_no_text(tiny, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    os.symlink(os.fsencode(tiny), path)
    command = [*map(os.fsencode, cli_command("run")), path, b"-p", b"x"]
    done = subprocess.run(command, capture_output=True, env=cli_env(), stdin=subprocess.DEVNULL)
    assert "not UTF-8" in sentence(done)


@pytest.mark.parametrize("options", [("-p", ""), ("-p", "  "), ()])
def test_empty_prompts(cli, tiny, options):
    assert "empty" in sentence(cli("run", tiny, *options))


def test_budgets_that_cannot_be(cli, tiny):
    assert "larger than the context" in sentence(cli("run", tiny, "-p", "x", "--mode", "sfi", "--ctx", 1024,
                                                     "--set", "n_selected=1024"))


@pytest.mark.parametrize("options", [("--mode", "fast"), ("-n", "0"), ("--temp", "-1"), ("--kv-type", "q5_0"),
                                     ("--truncate",), ("--raw", "--system", "x"), ("--threads", "0"), ("--wrong",)])
def test_wrong_uses_of_the_command(cli, tiny, options):
    sentence(cli("run", tiny, "-p", "x", *options), code=2)


def test_an_unknown_name_suggests_the_nearest(cli):
    assert "did you mean smollm2-135m?" in sentence(cli("run", "smolm-135", "-p", "x"))
    assert "did you mean smollm2-135m?" in sentence(cli("pull", "smollm2"))


def test_no_network_is_a_sentence(cli, tmp_path):
    line = sentence(cli("pull", "smollm2-135m", SFI_LOCAL_CACHE=str(tmp_path / "cache"), PIP_RETRIES="0", PIP_TIMEOUT="1",
                        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_EXTRA_INDEX_URL="", PIP_NO_INDEX="false"))
    assert "cannot be reached" in line
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


# ---- pipes and signals -----------------------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("arguments", [("models",), ("run", "{tiny}", "-p", "Hello", "-n", "300", "--ctx", "2048", "-t", "1")])
def test_a_closed_pipe_ends_quietly(tiny, arguments):
    command = [a.format(tiny=tiny) for a in arguments]
    process = subprocess.Popen(cli_command(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli_env(),
                               stdin=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait(60) == 0
    assert b"Traceback" not in (text := process.stderr.read()) and b"Broken pipe" not in text


@posix
@pytest.mark.parametrize("phase", ["load", "prefill", "decode"])
def test_ctrl_c_ends_with_130_and_no_traceback(tiny, tmp_path, phase):
    """The child raises SIGINT itself at the start of the phase, where a user's Ctrl-C may fall."""
    hook = {
        "load": "import sfi_local.loading as m; old = m.load_weights; m.load_weights = lambda *a: (hit(), old(*a))[1]",
        "prefill": "import sfi_local.runtime.slot as s; old = s.Slot._report; s.Slot._report = lambda *a: (hit(), old(*a))[1]",
        "decode": "import sfi_local.runtime.slot as s; old = s.Slot.step; s.Slot.step = lambda *a: (hit(), old(*a))[1]",
    }[phase]
    code = (f"import signal, sys, threading\nhit = lambda: signal.raise_signal(signal.SIGINT)\n{hook}\n"
            f"from sfi_local.cli.main import main\nsys.exit(main())")
    command = [sys.executable, "-c", code, "run", str(tiny), "-p", "Hello", "-n", "200", "-t", "1"]
    done = subprocess.run(command, capture_output=True, env=cli_env(), stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 130, done.stderr
    assert b"Traceback" not in done.stderr


@posix
def test_an_answer_obeys_a_grammar_and_a_missing_adapter_is_said(cli, tiny):
    done = cli("run", tiny, "--raw", "-p", "x", "-n", 9, "-t", 1, "-o", 'grammar=root ::= "yes" | "no"')
    assert done.returncode == 0 and done.stdout.strip() in (b"yes", b"no")
    assert "There is no LoRA adapter" in sentence(cli("run", tiny, "-p", "x", "-n", 1, "--lora", "no.gguf:2"))
    assert "grammar" in sentence(cli("run", tiny, "-p", "x", "-n", 1, "-o", "grammar=root ::= ("))


def test_ctrl_c_from_outside_ends_a_long_run(smollm2):
    command = cli_command("run", smollm2, "--raw", "-p", "one, two, three, four, five,", "--temp", 0, "-n", -1, "--mode", "sfi")
    process = subprocess.Popen(command, env=cli_env(),
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)  # the answer has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert b"Traceback" not in process.stderr.read()

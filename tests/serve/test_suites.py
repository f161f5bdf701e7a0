"""What others made to try a server with: llm-comply, langchain's suite, and the `llm` command."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.serving import serving

MODEL = "smollm2-135m"


# ---- llm-comply: the schemas of the vendors, offline ----

ENDING = {"34": 6, "125": 3, "259": 3}  # logit_bias: the tiny model's strings, objects and answers end soon


@pytest.mark.parametrize("format, n_least", [("openai-chat", 8), ("open-responses", 12), ("anthropic", 8)])
def test_llm_comply(served, format, n_least):
    """What it skips is for models that think."""
    cli = pytest.importorskip("llm_comply.cli", reason="llm-comply is not installed: pip install llm-comply")
    from llm_comply.config import ComplianceConfig
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader

    cases = [replace(case, build_request=lambda config, build=case.build_request: {**build(config), "logit_bias": ENDING})
             for case in cli._get_tests(format)]
    spec = SpecLoader(str(Path(cli.__file__).parent / "specs" / cli._SPEC_FILES[format]))
    found = TestRunner(ComplianceConfig(f"{served.url}/v1", "k", "tiny"), cases, spec).run_all().results
    assert [(one.name, one.errors) for one in found if one.status.value not in ("passed", "skipped")] == []
    assert sum(one.status.value == "passed" for one in found) >= n_least


def run(command, **env):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the llm command ----

MODELS = """
- model_id: served
  model_name: tiny
  api_base: {url}/v1
  api_key_name: served
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture(scope="module")
def llm(served, tmp_path_factory):
    """Run `llm` with arguments; what it prints."""
    pytest.importorskip("llm", reason="the command llm is not installed: pip install llm")
    folder = tmp_path_factory.mktemp("llm")
    (folder / "extra-openai-models.yaml").write_text(MODELS.format(url=served.url))
    return lambda *args: run([sys.executable, "-m", "llm", *args, "--key", "k"], LLM_USER_PATH=str(folder))


def test_llm_asks_goes_on_and_obeys_a_schema(llm):
    short = ("-o", "max_tokens", "20")
    assert llm("-m", "served", "Hello", "-o", "seed", "1", *short).strip()
    assert llm("-c", "And?", "--no-stream", *short).strip()
    assert isinstance(json.loads(llm("-m", "served", "x", "--schema", "day int", "-o", "logit_bias", '{"125": 10}'))["day"], int)
    llm("-m", "served", "x", "--functions", "def double(a: int) -> int:\n    return 2 * a", *short)


# ---- langchain ----

try:
    from langchain_openai import ChatOpenAI
    from langchain_tests.integration_tests import ChatModelIntegrationTests as Langchain
except ImportError:
    Langchain = object  # type: ignore[assignment, misc]

without_langchain = pytest.mark.skipif(Langchain is object, reason="langchain's suite is not installed: pip install langchain-openai langchain-tests")
# of a model that has learned what words mean; SmolLM2 is asked those that it is able to do
SENSE = {"test_tool_calling", "test_tool_calling_async", "test_bind_runnables_as_tools", "test_unicode_tool_call_integration"}
MORE_SENSE = {"test_json_mode", "test_agent_loop"}
LARGER = os.environ.get("SFI_LOCAL_LARGER_MODEL", "")  # the path of a model that is, such as Qwen2.5-Coder 1.5B

for function in vars(Langchain).values():
    if inspect.iscoroutinefunction(function):
        pytest.mark.asyncio(loop_scope="module")(function)  # its clients outlive a test


def only(keep):
    """A class with those of langchain's tests."""
    def of(cls):
        for name in dir(Langchain):
            if name.startswith("test_") and not keep(name):
                setattr(cls, name, None)
        return without_langchain(cls)
    return of


@pytest.fixture(scope="module")
def served_smollm2(smollm2, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("langchain"), smollm2, "--ctx", 2048, "--name", MODEL, "--quiet") as one:
        yield one


@pytest.fixture(scope="module")
def served_larger(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("larger"), LARGER, "--ctx", 4096, "--name", "larger", "--quiet") as one:
        yield one


class Asked(Langchain):
    name, url, more = "tiny", "", {}

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {"base_url": f"{self.url}/v1", "api_key": "k", "model": self.name, "temperature": 0, "stream_usage": True, "max_tokens": 300, **self.more}

    @property
    def supports_json_mode(self):
        return True

    @property
    def model_override_value(self):
        return self.name


@only(lambda name: name not in SENSE | MORE_SENSE | {"test_no_overrides_DO_NOT_OVERRIDE"})
class TestLangchain(Asked):
    more = {"logit_bias": {"34": 8, "125": 3, "92": -100}}  # strings that end

    @pytest.fixture(autouse=True)
    def address(self, served):
        self.url = served.url


@only(lambda name: name in SENSE)
class TestLangchainWithARealModel(Asked):
    name, more = MODEL, {"max_tokens": 100}

    @pytest.fixture(autouse=True)
    def address(self, served_smollm2):
        self.url = served_smollm2.url


@only(lambda name: name in SENSE | MORE_SENSE)
@pytest.mark.skipif(not LARGER, reason="SFI_LOCAL_LARGER_MODEL names no model")
class TestLangchainWithALargerModel(Asked):
    name, more = "larger", {"max_tokens": 200}

    @pytest.fixture(autouse=True)
    def address(self, served_larger):
        self.url = served_larger.url

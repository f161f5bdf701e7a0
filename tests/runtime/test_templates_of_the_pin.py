"""Every chat template that the pinned llama.cpp carries: rendered whole, continued, and its thoughts switched."""

import re

import pytest
from support import pin

from sfi_local.errors import InputError
from sfi_local.runtime.template import ChatTemplate, Message

TEMPLATES = pin.files("models/templates", ".jinja")
MARKS = re.compile(r"<[|｜][^|｜\s]+[|｜]>|</?[a-z:]*think[a-z:]*>|\[/?(?:INST|THINK)\]|<\|channel>|<channel\|>")
# they want tools, or functions, in every conversation
TOOLS_ONLY = {"CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
              "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "fireworks-ai-llama-3-firefunction-v2"}

# whose thoughts can be switched off: that is seen at the end of the prompt, or before
SILENT = {"Apriel-1.6-15b-Thinker-fixed", "ByteDance-Seed-OSS", "Cohere2MoE", "GLM-4.6", "GLM-4.7-Flash", "HuggingFaceTB-SmolLM3-3B",
          "Kimi-K2-Thinking", "Kimi-K3", "LFM2.5-8B-A1B", "MiniMax-M2", "MiniMax-M3", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
          "NVIDIA-Nemotron-Nano-v2", "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "Spark2.5", "StepFun3.5-Flash",
          "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "inclusionai-ling-3.0-flash", "llama-cpp-deepseek-r1", "llama-cpp-rwkv-world",
          "mistralai-Ministral-3-14B-Reasoning-2512", "muse-glimmer", "openai-gpt-oss-120b", "openbmb-MiniCPM5-1B", "poolside-Laguna-S-2.1",
          "unsloth-Apriel-1.5", "upstage-Solar-Open-100B"}
# which do not think unless they are told to
THINK_IF_TOLD = {"Apertus-8B-Instruct", "Bielik-11B-v3.0-Instruct", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "MiniMax-M3",
                 "Qwen-QwQ-32B", "Reka-Edge", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1",
                 "deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731", "google-gemma-4-31B-it",
                 "google-gemma-4-31B-it-interleaved", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world", "openbmb-MiniCPM5-1B",
                 "openai-gpt-oss-120b", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "tencent-Hy3"}


class Marks:
    """A vocabulary of characters, in which all that looks like a mark of some template is a special token."""

    names: list[str] = []

    def tokenize(self, text, add_bos=False, special=False):
        out = []
        for part in re.split(f"({MARKS.pattern})", text) if special else [text]:
            if special and MARKS.fullmatch(part):
                self.names += [part] * (part not in self.names)
                out.append(-1 - self.names.index(part))
            else:
                out += map(ord, part)
        return out

    def continued(self, text, last, special):
        return self.tokenize(text, False, special)

    def structure(self, source, contents):
        return MARKS

    def spelled(self, token):
        return (chr(token).encode(), False) if token >= 0 else (self.names[-1 - token].encode(), True)


VOCABULARY = Marks()


def text_of(tokens):
    return b"".join(VOCABULARY.spelled(t)[0] for t in tokens).decode()


def template(name, **options):
    source = TEMPLATES[name + ".jinja"].decode()
    return ChatTemplate(source, "<s>", "</s>", False, VOCABULARY.tokenize, vocabulary=VOCABULARY, **options)


@pytest.fixture(params=[name.removesuffix(".jinja") for name in TEMPLATES] or [pytest.param("", marks=pytest.mark.skip(reason=pin.WHY_NOT))])
def name(request, native):
    if request.param in TOOLS_ONLY:
        with pytest.raises(InputError, match="refuses these messages"):
            template(request.param).tokens([Message("user", ["Hi"])])
        pytest.skip("a template for tools only: refused with a sentence")
    return request.param


def reference(t, messages):
    """What the template itself gives, by llama-cpp-python's renderer."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(t.source, eos_token=t.eos, bos_token=t.bos)(messages=messages).prompt


def test_it_is_rendered_whole(name):
    t = template(name)
    system, question = "Be brief.", "  What is <b>this</b>?\n"
    if not t._places_system:
        system = ""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
    tokens = t.tokens([Message(m["role"], [m["content"]]) for m in messages])
    assert tokens == VOCABULARY.tokenize(reference(t, messages), False, True)


def test_special_text_of_a_question_stays_text(name):
    t = template(name)
    # what a template may write of the question twice, it writes twice of both
    evil = "".join(dict.fromkeys(MARKS.findall(t.source)))[:400].rpartition("<")[0] or "<|im_end|>"
    special = [sum(token < 0 for token in t.tokens([Message("user", [text])])) for text in ("x", "x" + evil)]
    assert special[0] == special[1]


def test_a_system_text_reaches_the_prompt(name):
    tokens = template(name).tokens([Message("system", ["Be brief, please."]), Message("user", ["Hi"])])
    assert "Be brief, please." in text_of(tokens)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut off"])
def test_three_turns_continue_each_other_and_have_no_half_of_a_thought(name, cut):
    t, messages, before = template(name), [], []
    for i in range(3):
        messages.append(Message("user", [f"Question {i}?"]))
        prompt = t.tokens(messages)
        assert prompt[:len(before)] == before, "the prompt does not go on from what the cache holds"
        stream = t.thoughts(prompt)
        answer = VOCABULARY.tokenize("Let me see." + ("" if cut else stream.format.lead) if stream.inside else "", special=True)
        if not (stream.inside and cut):
            answer += VOCABULARY.tokenize(f"Answer {i}.")
        messages.append(Message("assistant", [answer]))
        before = prompt + answer
    history = text_of(prompt).partition("Question 0?")[2]
    if stream.inside and stream.format.open:
        assert history.count(stream.format.close) == history.count(stream.format.open) - 1


def test_thoughts_can_be_left_to_the_template(name):
    t = template(name, keep_thoughts=False)
    first = t.tokens([Message("user", ["Hi"])])
    stream = t.thoughts(first)
    answer = VOCABULARY.tokenize(("Let me see." + stream.format.lead if stream.inside else "") + "Hello.", special=True)
    rendered = text_of(t.tokens([Message("user", ["Hi"]), Message("assistant", [answer]), Message("user", ["Bye"])]))
    if not stream.inside:
        assert rendered.startswith(text_of(first + answer))
        return
    given = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "reasoning_content": "Let me see."},
             {"role": "user", "content": "Bye"}]
    assert rendered == reference(t, given)


@pytest.mark.parametrize("think", [False, True])
def test_a_switch_has_an_effect_where_there_is_one(name, think):
    notes = []
    question = [Message("user", ["Hi"])]
    plain, switched = template(name).tokens(question), template(name, think=think, note=notes.append).tokens(question)
    assert (plain != switched) == (name in (THINK_IF_TOLD if think else SILENT)), text_of(switched)[-60:]
    if not think:
        assert not template(name).thoughts(switched).inside

"""What of a conversation is trained, by config; where a template comes from."""

from __future__ import annotations

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.source import find_source
from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.chat.templates import CONTROL_TOKENS, TEMPLATES
from posttrain.types import Conversation, Text
from tests.chat.samples import (
    CHATML,
    PLAIN,
    SYSTEM,
    THINK,
    TOOLS,
    byte_tokenizer,
    say,
    template_of,
    trained,
)


@pytest.fixture(scope="module")
def sources(data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row["chat_template"] for row in map(json.loads, lines)}


def texts(template, conversation):
    return [trained(example, template.tokenizer) for example in template.examples(conversation)]


def test_train_on(data_dir):
    last = template_of(data_dir, CHATML, train_on="last")
    assert texts(last, SYSTEM) == [["Answer C<|im_end|>"]]
    weighted = template_of(data_dir, CHATML, train_on="all")
    messages = [dict(m) for m in SYSTEM.messages]
    messages[2]["weight"], messages[4]["weight"] = 0, 0.5
    (example,) = weighted.examples(Conversation(tuple(messages)))
    assert trained(example, weighted.tokenizer) == ["Answer B<|im_end|>", "Answer C<|im_end|>"]
    assert set(np.unique(example.loss_weights)) == {0.0, 0.5, 1.0}
    every = template_of(data_dir, CHATML)
    assert every.render(Conversation(tuple(messages))) == every.render(SYSTEM)  # no weight in it


def test_train_tail(data_dir):
    template = template_of(data_dir, CHATML, train_tail=True)
    assert texts(template, PLAIN) == [["Hello & co<|im_end|>\n"]]


def test_train_thinking(sources, data_dir):
    qwen = template_of(data_dir, sources["trl__qwen3"], train_thinking=False)
    assert texts(qwen, THINK) == [["Answer A<|im_end|>"], ["Answer B<|im_end|>"]]
    # the empty block that Qwen3 writes where there was no thinking is thinking, too
    assert texts(qwen, PLAIN) == [["Hello & co<|im_end|>"]]
    think = template_of(data_dir, sources["mistral-common__v13_think"], train_thinking=False)
    assert texts(think, THINK) == [["Answer A</s>", "Answer B</s>"]]
    called = Conversation(
        (
            TOOLS.messages[0],
            {**TOOLS.messages[1], "reasoning_content": "hmm"},
            *TOOLS.messages[2:],
        ),
        TOOLS.tools,
    )
    (turns,) = texts(qwen, called)
    assert turns[0].startswith('<tool_call>\n{"name": "get_weather"')
    plain = template_of(data_dir, CHATML, train_thinking=False)
    inline = Conversation((say("user", "Q"), say("assistant", "<think>\nhm\n</think>\n\nA")))
    assert texts(plain, inline) == [["A<|im_end|>"]]
    marked = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}"
    marked += "{% endgeneration %}{% endfor %}"
    thinker = template_of(data_dir, marked, train_thinking=False)
    only = Conversation((say("user", "Q"), say("assistant", "<think>hm</think>")))
    with pytest.raises(ChatError, match="every token is masked"):
        thinker.examples(only)


def test_inline_thinking_that_the_template_strips_is_split(sources, data_dir):
    qwen = template_of(data_dir, sources["trl__qwen3"])
    messages = [dict(m) for m in THINK.messages]
    for message in messages[1::2]:
        thought = message.pop("reasoning_content")
        message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    assert texts(qwen, Conversation(tuple(messages))) == texts(qwen, THINK)


def test_thinking_of_an_untrained_turn_may_go(sources, data_dir):
    """Only the last turn is trained: what history shows is what generation will see."""
    template = template_of(
        data_dir, sources["trl__qwen3"], train_on="last", dropped_thinking="refuse"
    )
    assert texts(template, THINK) == [["<think>\nhmm two\n</think>\n\nAnswer B<|im_end|>"]]
    more = Conversation((*THINK.messages, say("user", "and?")))
    split = template_of(data_dir, sources["trl__qwen3"], train_on="last")
    assert texts(split, more) == texts(template, THINK)  # cut after the turn that is trained


def test_stop_tokens_from_the_config(data_dir):
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>;{% endfor %}"
    source = source.replace("<|endoftext|>;", "<|im_end|><|endoftext|>;")
    unclear = template_of(data_dir, source)
    with pytest.raises(ChatError, match=r"no stop token .*name one in `chat\.stop`"):
        unclear.examples(PLAIN)
    named = template_of(data_dir, source, stop=("<|im_end|>",))
    assert texts(named, PLAIN) == [["[assistant] Hello & co<|im_end|>"]]
    assert named.tokenizer.token_id("<|im_end|>") in named.stop_ids
    with pytest.raises(ValueError, match=r"chat\.stop: 'STOP!!' is no token"):
        template_of(data_dir, source, stop=("STOP!!",))


def test_template_kwargs_and_date(sources, data_dir):
    qwen = template_of(data_dir, sources["trl__qwen3"], template_kwargs={"enable_thinking": False})
    asked = [say("user", "Q")]
    assert "<think>" in qwen.tokenizer.decode(qwen.generation_prompt(asked))
    assert "<think>" not in qwen.tokenizer.decode(
        qwen.generation_prompt(asked, enable_thinking=True)
    )
    vision = sources["axolotl__llama3_2_vision"]
    assert "04 Feb 2021" in template_of(data_dir, vision, date="2021-02-04").render(PLAIN)


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_own_templates(name, data_dir):
    tokens = CONTROL_TOKENS[name]
    tokenizer = byte_tokenizer(data_dir, tokens, eos=tokens[-1])
    template = ChatTemplate(TEMPLATES[name], tokenizer, ChatConfig())
    assert template.check() == []
    stop = tokens[-1]
    assert texts(template, SYSTEM) == [[f"Answer {letter}{stop}" for letter in "ABC"]]
    thoughts = ("<think>\nhmm one\n</think>\n\nAnswer A", "<think>\nhmm two\n</think>\n\nAnswer B")
    assert texts(template, THINK) == [[thought + stop for thought in thoughts]]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris <x>", "days": 3}}\n'
    assert texts(template, TOOLS) == [[call + "</tool_call>" + stop, "It is 21." + stop]]
    text = template.render(TOOLS)
    assert text.count("<tools>") == 1
    assert '{"t": 21}' in text


def test_where_a_template_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template \(a base model\?\).*chatml"):
        find_source(tmp_path, None, None)
    assert find_source(tmp_path, "own", None) == "own"
    several = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert find_source(tmp_path, several, None) == "D"
    assert find_source(tmp_path, several, "tool_use") == "T"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_source(tmp_path, "own", None) == "file"
    assert find_source(tmp_path, "own", "chatml") == TEMPLATES["chatml"]
    assert find_source(tmp_path, "own", str(tmp_path / "chat_template.jinja")) == "file"
    with pytest.raises(ValueError, match=r"'chatmk' is neither a file nor one of chatml"):
        find_source(tmp_path, None, "chatmk")


def test_template_and_errors_are_picklable(data_dir):
    template = template_of(data_dir, CHATML, train_tail=True)
    copy = pickle.loads(pickle.dumps(template))
    assert copy.fingerprint() == template.fingerprint()
    assert texts(copy, PLAIN) == texts(template, PLAIN)
    assert template_of(data_dir, CHATML).fingerprint() != template.fingerprint()
    error = pickle.loads(pickle.dumps(ChatError("why", "text")))
    assert (error.reason, error.text) == ("why", "text")


def test_spawned_workers_give_the_same_examples(data_dir):
    template = template_of(data_dir, CHATML)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ((example,),) = pool.map(template.examples, [SYSTEM])
    (want,) = template.examples(SYSTEM)
    assert example.tokens.tolist() == want.tokens.tolist()
    assert example.loss_weights.tolist() == want.loss_weights.tolist()


def test_a_batch_is_its_conversations_one_by_one(sources, data_dir):
    qwen = template_of(data_dir, sources["trl__qwen3"])
    silent = Conversation((say("user", "Hi"),))
    got = qwen.examples_batch([THINK, silent, PLAIN])
    assert isinstance(got[1], ChatError)
    for conversation, examples in ((THINK, got[0]), (PLAIN, got[2])):
        assert not isinstance(examples, ChatError)
        want = qwen.examples(conversation)
        assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in want]


def test_text_examples(data_dir):
    template = template_of(data_dir, CHATML)
    eos = template.tokenizer.eos_id
    whole = template.text_example(Text("one two"))
    assert whole.tokens[-1] == eos
    assert whole.loss_weights.tolist() == [0.0] + [1.0] * (len(whole.tokens) - 1)
    both = template.text_example(Text(" answer", prompt="question"))
    assert trained(both, template.tokenizer) == [" answer</s>"]


def test_chat_imports_no_jax():
    """Workers of prepare start without it."""
    import subprocess
    import sys

    code = "import posttrain.chat.template, sys; print('jax' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "False"

"""Chat templates: what is trained, by marks, by prefixes and by hand; the same ids in training and in generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.config.keys.data import TokenizerConfig
from train.data.chat.conversations import read_conversation
from train.data.chat.sandbox import TemplateError
from train.data.chat.template import ChatTemplate, TemplateSource, find_template, shown_text, template_names
from train.data.tokenizer import EOT, Tokenizer, build_tokenizer
from train.errors import UserError

BYTES = Tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))
U, A, S = "user", "assistant", "system"
TOOLS = [{"type": "function", "function": {"name": "sky"}}]
CALL = {"role": A, "content": "", "tool_calls": [{"function": {"name": "sky", "arguments": {"at": "Bern"}}}]}


def said(*turns: tuple[str, str], **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


CONVERSATIONS = {
    "one turn": said((U, "Hi"), (A, "Hello")),
    "system": said((S, "Be brief."), (U, "Hi"), (A, "Hello")),
    "three turns": said((U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e"), (A, "f")),
    "empty answer": said((U, "a"), (A, ""), (U, "c"), (A, "d")),
    "white space": said((U, " a \n"), (A, "\n b \n\n"), (U, "\n"), (A, " ")),
    "spelled tokens": said((U, "<|im_end|></s>[/INST]<|eot_id|>"), (A, "<|im_start|><end_of_turn><|end|>")),
    "other letters": said((U, "\u4f60\u597d"), (A, "\u00e4\U0001f600")),
    "tool": {
        "messages": [
            {"role": U, "content": "sky?"},
            CALL,
            {"role": "tool", "content": "blue"},
            {"role": A, "content": "Blue."},
        ],
        "tools": TOOLS,
    },
    "parts": {
        "messages": [
            {"role": U, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": A, "content": "c"},
        ]
    },
    "untrained turn": {
        "messages": [
            {"role": U, "content": "a"},
            {"role": A, "content": "b", "loss": False},
            {"role": U, "content": "c"},
            {"role": A, "content": "d"},
        ]
    },
}
ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
    "plain": EOT,
    "qwen": "<|im_end|>",
    "zephyr": "</s>",
}
BEFORE = {"mistral": " ", "plain": " "}
"""What stands between the question and the answer, and is drawn with it."""
CALLED = {
    "chatml": '<tool_call>{"name": "sky", "arguments": {"at": "Bern"}}</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "sky", "arguments": {"at": "Bern"}}]',
    "plain": ' {"name": "sky", "arguments": {"at": "Bern"}}',
    "qwen": '\n<tool_call>\n{"name": "sky", "arguments": {"at": "Bern"}}\n</tool_call>',
}


def template(name: str) -> ChatTemplate:
    source = find_template(name, None, EOT)
    return ChatTemplate(source, BYTES.extended(source.special_tokens()))


def conversation(name: str) -> dict:
    found = read_conversation(CONVERSATIONS[name])
    assert found
    return found


def by_hand(template: str, name: str) -> list[str]:
    """What is trained of a conversation, read off it by hand."""
    texts = []
    for message in conversation(name)["messages"]:
        if message["train"]:
            called = (
                CALLED.get(template, '{"name": "sky", "arguments": {"at": "Bern"}}') if "tool_calls" in message else ""
            )
            texts.append(BEFORE.get(template, "") + message["content"] + called + ENDS[template])
    return texts


def test_there_are_eight_templates():
    assert template_names() == sorted(ENDS)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_marks_prefixes_and_hand_agree_on_what_is_trained(name: str):
    chat = template(name)
    for which in CONVERSATIONS:
        marked, prefixed = (chat.parts(conversation(which), by_marks) for by_marks in (True, False))
        assert marked == prefixed, which
        assert [shown_text(part.text) for part in marked if part.trained] == by_hand(name, which), which


@pytest.mark.parametrize("name", sorted(ENDS))
def test_ids_before_every_turn_are_those_of_generation(name: str):
    chat = template(name)
    for which in CONVERSATIONS:
        whole = conversation(which)
        encoded = chat.encode(whole)
        for number, message in enumerate(whole["messages"]):
            if message["role"] == A:
                prompt = chat.encode_prompt(whole["messages"][:number], whole["tools"])
                assert encoded.ids[: len(prompt)] == prompt, which
                assert encoded.trained[len(prompt)] == message["train"], which
        assert encoded.ids[encoded.turn_ends[-1] - 1] == chat.end_of_turn


@pytest.mark.parametrize("name", sorted(ENDS))
def test_special_token_that_a_message_spells_is_text(name: str):
    chat = template(name)
    special = [chat.tokenizer.id_of(token) for token in [*chat.source.special_tokens(), EOT]]
    counts = []
    for which in ("one turn", "spelled tokens"):
        encoded = chat.encode(conversation(which))
        counts.append(sum(identity in special for identity in encoded.ids))
        if which == "spelled tokens":
            text = chat.tokenizer.decode(encoded.ids)
            assert "<|im_end|></s>[/INST]<|eot_id|>" in text
    assert counts[0] == counts[1]


def test_template_that_writes_history_otherwise_is_refused_with_the_text():
    text = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    chat = ChatTemplate(TemplateSource("shouts", text, "", ""), BYTES)
    with pytest.raises(TemplateError, match="otherwise when others follow"):
        chat.encode(conversation("three turns"))


def test_template_that_marks_too_little_is_refused_with_the_text():
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    text = "{% for m in messages %}{% if loop.last %}" + marked + "{% endif %}{% endfor %}"
    chat = ChatTemplate(TemplateSource("last", text, "", ""), BYTES)
    with pytest.raises(TemplateError, match="marks 1 parts by generation, and the assistant has 3 turns"):
        chat.encode(conversation("three turns"))


def test_tokenizers_own_template_is_found_with_its_tokens(tmp_path: Path):
    about = {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}
    about |= {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    source = find_template("tokenizer", str(tmp_path / "tokenizer.json"), EOT)
    assert (source.bos_token, source.eos_token) == ("<s>", "</s>")
    chat = ChatTemplate(source, BYTES.extended(["<s>", "</s>"]))
    assert [part.text for part in chat.parts(conversation("one turn"))] == ["<s>Hi</s>", "Hello</s>"]


def test_template_that_is_not_there_names_those_that_are(tmp_path: Path):
    with pytest.raises(UserError, match="chatml, gemma"):
        find_template("chatlm", None, EOT)
    with pytest.raises(UserError, match=r"data\.tokenizer\.kind=file"):
        find_template("tokenizer", None, EOT)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for %}")
    with pytest.raises(UserError, match="is no Jinja template"):
        find_template(str(file), None, EOT).special_tokens()

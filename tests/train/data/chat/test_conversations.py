"""Rows of conversations: every kind becomes the one form, and a row that is none says what it lacks."""

from __future__ import annotations

import pytest

from train.data.chat.conversations import NotAConversation, read_conversation, to_text

ASKED = {"role": "user", "content": "2+2?", "train": False}
ANSWERED = {"role": "assistant", "content": "4", "train": True}
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]

SAME = [
    {"messages": MESSAGES},
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"instruction": "2+2?", "input": "", "output": "4"},
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "5"}]},
    {"prompt": "2+2?", "completion": "4", "label": True},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            MESSAGES[1],
        ]
    },
]


@pytest.mark.parametrize("number", range(len(SAME)))
def test_every_kind_of_row_becomes_the_same_conversation(number: int):
    assert read_conversation(SAME[number]) == {"messages": [ASKED, ANSWERED], "tools": []}


def test_only_what_is_asked_for_is_trained():
    early = [*MESSAGES, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]

    def trained(record: dict) -> list[bool]:
        conversation = read_conversation(record)
        assert conversation
        return [message["train"] for message in conversation["messages"]]

    assert trained({"messages": early}) == [False, True, False, True]
    assert trained({"prompt": early[:3], "completion": early[3:]}) == [False, False, False, True]
    assert trained({"messages": [early[0], {**early[1], "loss": False}, *early[2:]]}) == [False, False, False, True]
    assert trained({"messages": [early[0], {**early[1], "weight": 0}, *early[2:]]}) == [False, False, False, True]
    assert trained({"chosen": early, "rejected": [*early[:3], MESSAGES[1]]}) == [False, False, False, True]


def test_row_that_was_not_wanted_is_left_out():
    assert read_conversation({"prompt": "a", "completion": "b", "label": False}) is None


def test_tool_calls_of_both_forms_are_one_form():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{**call, "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    first = read_conversation({"messages": [MESSAGES[0], openai, {"role": "tool", "content": "2"}, MESSAGES[1]]})
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "4"},
    ]
    assert first == read_conversation({"conversations": turns})
    assert first
    assert first["messages"][1]["tool_calls"] == [call]


BAD = [
    ({"text": "a"}, "What it lacks to be one: messages: messages; ShareGPT: conversations"),
    ([1], "it is not an object"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "message 1 of 'messages' of the unknown role 'boss'"),
    ({"messages": []}, "no list of messages"),
    ({"messages": [MESSAGES[0]]}, "nothing to train"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "loss": False}]}, "nothing to train"),
    ({"messages": [MESSAGES[0], {"role": "tool", "content": "2"}, MESSAGES[1]]}, "without a call before it"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}]}, "the weight 0.5"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[1]]}, "parts that are no text (image)"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer as chosen and as rejected"),
    ({"conversations": [{"from": "human"}]}, "message 1 of 'conversations' without value"),
    ({"prompt": "a", "completion": "b", "label": 3}, "neither true nor false"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_row_that_is_no_conversation_says_why(number: int):
    record, words = BAD[number]
    with pytest.raises(NotAConversation) as error:
        read_conversation(record)
    assert words in str(error.value)


def test_text_of_a_conversation_is_ascii_and_equal_only_for_equal_ones():
    texts = [to_text(read_conversation({"prompt": "ä\n", "completion": answer}) or {}) for answer in ("ö", "ö", "o")]
    assert texts[0].isascii()
    assert texts[0] == texts[1] != texts[2]

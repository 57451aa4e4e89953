"""Rows of conversations as public data sets have them, recognised by their keys, and the one form that all become.

{"messages": [{"role", "content", "tool_calls", "loss", "weight"}], "tools"}       OpenAI, TRL
{"prompt", "completion"}                 strings or messages; only the completion is trained
{"conversations": [{"from", "value"}], "system", "tools"}                          ShareGPT
{"instruction", "input", "output", "system", "history"}                            Alpaca
{"prompt", "chosen", "rejected"}         strings or messages, a prompt may be in both; the chosen answer is trained
{"prompt", "completion", "label"}        KTO; rows whose label is false are left out
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class NotAConversation(ValueError):  # noqa: N818  it is shown as a problem of a row
    """A row that is no conversation; the message follows the name of the place."""


Message = dict[str, Any]
"""{"role", "content", "train"}, and what only some have: "tool_calls", "tool_call_id", "name"."""
Conversation = dict[str, Any]
"""{"messages": [...], "tools": [...]}: the form that templates are given."""

ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"developer": "system", "human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_KINDS = {
    "messages": ({"messages"}, {"tools"}),
    "ShareGPT": ({"conversations"}, {"system", "tools"}),
    "pairs": ({"chosen", "rejected"}, {"prompt", "tools"}),
    "KTO": ({"prompt", "completion", "label"}, {"tools"}),
    "prompt and completion": ({"prompt", "completion"}, {"tools"}),
    "Alpaca": ({"instruction", "output"}, {"input", "system", "history"}),
}
"""Kind of row -> keys that it must have, keys that it may have. The first that fits is taken."""


def read_conversation(record: Any) -> Conversation | None:
    """The conversation of a row; None for one that is not trained on. Raises NotAConversation."""
    if not isinstance(record, dict):
        raise NotAConversation("is no conversation: it is not an object")
    kind = next((kind for kind, (needed, _) in _KINDS.items() if needed <= record.keys()), None)
    if kind is None:
        lacking = "; ".join(f"{kind}: {', '.join(sorted(must - record.keys()))}" for kind, (must, _) in _KINDS.items())
        raise NotAConversation(
            f"is no conversation (its fields are {sorted(record)}). What it lacks to be one: {lacking}"
        )
    if kind == "KTO" and record["label"] not in (True, False, 0, 1):
        raise NotAConversation("has a label that is neither true nor false")
    if kind == "KTO" and not record["label"]:
        return None
    messages = {
        "messages": lambda: _messages(record["messages"], "messages"),
        "ShareGPT": lambda: _share_gpt(record),
        "pairs": lambda: _preferred(record),
        "KTO": lambda: _completed(record["prompt"], record["completion"], "completion"),
        "prompt and completion": lambda: _completed(record["prompt"], record["completion"], "completion"),
        "Alpaca": lambda: _alpaca(record),
    }[kind]()
    _check_turns(messages)
    tools = record.get("tools") or []
    if isinstance(tools, str):
        tools = _parse(tools, "tools")
    if not isinstance(tools, list):
        raise NotAConversation("has tools that are no list")
    return {"messages": messages, "tools": tools}


def to_text(conversation: Conversation) -> str:
    """The conversation as one line of ASCII: equal only for equal conversations."""
    return json.dumps(conversation, sort_keys=True, separators=(",", ":"))


def _messages(values: Any, field: str, train: bool = True) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise NotAConversation(f"has no list of messages in the field {field!r}")
    return [_message(value, f"message {n} of {field!r}", train) for n, value in enumerate(values, 1)]


def _message(value: Any, where: str, train: bool) -> Message:
    if not isinstance(value, dict) or "role" not in value:
        raise NotAConversation(f"has {where} without a role")
    role = _SAME_ROLE.get(value["role"], value["role"])
    if role not in ROLES:
        raise NotAConversation(f"has {where} of the unknown role {value['role']!r}: known are {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(value.get("content"), where)}
    for key in ("tool_calls", "tool_call_id", "name"):
        if value.get(key):
            message[key] = value[key]
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    if "content" not in value and "tool_calls" not in message:
        raise NotAConversation(f"has {where} without content")
    weight = value.get("weight", 1 if value.get("loss", train) else 0)
    if weight not in (0, 1):
        raise NotAConversation(f"has {where} with the weight {weight!r}: a message is trained (1) or not (0)")
    message["train"] = role == "assistant" and train and bool(weight) and value.get("loss", True) is not False
    return message


def _content(content: Any, where: str) -> str:
    """Text of a message: a string, or parts of type text one after another."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type", "text")) for part in content}
        texts = [part.get("text") for part in content]
        if kinds <= {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise NotAConversation(f"has {where} with parts that are no text ({', '.join(sorted(kinds))})")
    raise NotAConversation(f"has {where} whose content is no text")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}, arguments as an object, an "id" if given."""
    if not isinstance(calls, list):
        raise NotAConversation(f"has {where} with tool_calls that are no list")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise NotAConversation(f"has {where} with a tool call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parse(arguments, "the arguments of a tool call")
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({"id": str(call["id"]), **made} if call.get("id") else made)
    return found


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotAConversation(f"has {what} that {'is' if what[0] != 't' else 'are'} not JSON") from None


def _said(value: Any, role: str, field: str, train: bool) -> list[Message]:
    """A string as one message of a role, or the messages that are there already."""
    if isinstance(value, str):
        return [{"role": role, "content": value, "train": train and role == "assistant"}]
    return _messages(value, field, train)


def _completed(prompt: Any, completion: Any, field: str) -> list[Message]:
    return [*_said(prompt, "user", "prompt", False), *_said(completion, "assistant", field, True)]


def _preferred(record: dict[str, Any]) -> list[Message]:
    """Prompt and chosen answer; without a prompt it is what chosen and rejected have in common."""
    chosen, rejected = record["chosen"], record["rejected"]
    if chosen == rejected:
        raise NotAConversation("has the same answer as chosen and as rejected")
    if record.get("prompt"):
        return _completed(record["prompt"], chosen, "chosen")
    messages = _messages(chosen, "chosen")
    others, same = _messages(rejected, "rejected"), 0
    while same < min(len(messages), len(others)) and messages[same] == others[same]:
        same += 1
    return [{**message, "train": message["train"] and n >= same} for n, message in enumerate(messages)]


def _share_gpt(record: dict[str, Any]) -> list[Message]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise NotAConversation("has no list of messages in the field 'conversations'")
    values: list[Any] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            lacking = sorted({"from", "value"} - (turn.keys() if isinstance(turn, dict) else set()))
            raise NotAConversation(f"has message {n} of 'conversations' without {' and '.join(lacking)}")
        if turn["from"] == "function_call":
            call = _parse(str(turn["value"]), "a function call")
            values.append({"role": "assistant", "tool_calls": call if isinstance(call, list) else [call]})
        else:
            known = {key: turn[key] for key in ("loss", "weight") if key in turn}
            values.append({"role": turn["from"], "content": turn["value"], **known})
    return _messages(values, "conversations")


def _alpaca(record: dict[str, Any]) -> list[Message]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise NotAConversation("has a history that is no list of pairs")
    question = "\n\n".join(str(part) for part in (record["instruction"], record.get("input")) if part)
    values = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for asked, answered in [*history, [question, record["output"]]]:
        values += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _messages(values, "history")


def _check_turns(messages: list[Message]) -> None:
    """Raise NotAConversation for an order of turns that means nothing, and for a row without anything to train."""
    for n, message in enumerate(messages):
        before = messages[n - 1] if n else None
        called = before is not None and ("tool_calls" in before or before["role"] == "tool")
        if message["role"] == "tool" and not called:
            raise NotAConversation(f"has message {n + 1}, a tool's result, without a call before it")
    if not any(message["train"] for message in messages):
        raise NotAConversation("has nothing to train: no message of the assistant, or none whose loss is wanted")


def said_in(text: str) -> Iterator[str]:
    """The contents of the messages of a conversation that ``to_text`` wrote, one by one."""
    for message in json.loads(text)["messages"]:
        yield message["content"] + "\n"

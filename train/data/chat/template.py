"""The text of a conversation by a chat template, which parts of it are trained, and their token ids.

Trained is what the assistant says and the token that ends its turn. A template says so itself by ``{% generation %}``;
of one that does not, the text is compared with that of the conversation cut before and behind each such message.

Special tokens come from the template alone: one that a message spells is text. The parts that are trained and those
that are not become ids each by itself, so that an answer has the same ids whether it is read in training or follows a
prompt in generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from train.data.chat.conversations import Conversation, Message
from train.data.chat.sandbox import BEGIN_MARK, END_MARK, CompiledTemplate, TemplateError
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.util.io import write_whole
from train.util.reading import read_object, read_text, reading

NAMED = Path(__file__).parent / "templates"
OWN = "tokenizer"
"""The name for the template of a given tokenizer."""
_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]+\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[/?[A-Z]+(?:_[A-Z]+)*\]")
"""How templates spell special tokens."""
_APART = "\ue0f2"
"""Character of private use that is put into a special token which a message spells, until the text is cut at others."""
_RESERVED = (BEGIN_MARK, END_MARK, _APART)


class Part(NamedTuple):
    """A part of a conversation's text, and whether it is trained."""

    text: str
    trained: bool


class EncodedConversation(NamedTuple):
    """Token ids of a conversation, which of them are trained, and the ids up to the end of each trained part."""

    ids: list[int]
    trained: list[bool]
    turn_ends: list[int]


@dataclass(frozen=True)
class TemplateSource:
    """A template as it is kept beside a corpus and a run."""

    name: str
    text: str
    bos_token: str
    eos_token: str

    @property
    def digest(self) -> str:
        """A hash of all that decides what the template writes."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def special_tokens(self) -> list[str]:
        """Names of the special tokens that the template writes, in order."""
        try:
            literals = CompiledTemplate(self.text).literals(self.text)
        except TemplateError as error:
            raise UserError(f"the chat template {self.name} {error}") from None
        return list(dict.fromkeys(name for literal in literals for name in _SPECIAL.findall(literal)))

    def write(self, path: Path) -> None:
        """Write the template to a file of JSON."""
        write_whole(path, json.dumps(asdict(self), ensure_ascii=False, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> TemplateSource:
        """The template that ``write`` wrote. Raises UserError."""
        cure = "Restore it: it says how the run reads conversations"
        values = read_object(path, cure)
        with reading(path, cure):
            return cls(**{key: str(values[key]) for key in ("name", "text", "bos_token", "eos_token")})


def template_names() -> list[str]:
    """Names of the templates that are given."""
    return sorted(file.stem for file in NAMED.glob("*.jinja"))


def find_template(name: str, tokenizer_path: str | None, eos_token: str) -> TemplateSource:
    """The template of ``data.template``: a given one, a file, or the tokenizer's own. Raises UserError.

    ``tokenizer_path``: that of a given tokenizer.json, beside which its own template and tokens are looked for.
    """
    about: dict[str, Any] = {}
    beside = Path(tokenizer_path).expanduser().with_name("tokenizer_config.json") if tokenizer_path else None
    if beside and beside.exists():
        about = read_object(beside, "It belongs to data.tokenizer.path")
    tokens = _token_text(about.get("bos_token")), _token_text(about.get("eos_token")) or eos_token
    if name in template_names():
        return TemplateSource(name, (NAMED / f"{name}.jinja").read_text("utf-8"), *tokens)
    if name == OWN:
        if beside is None:
            raise UserError(
                "data.template=tokenizer is the template of a given tokenizer: set data.tokenizer.kind=file and "
                f"data.tokenizer.path, or take one of {', '.join(template_names())}"
            )
        file = beside.with_name("chat_template.jinja")
        text = read_text(file, "It is beside data.tokenizer.path") if file.exists() else about.get("chat_template")
        if isinstance(text, list):  # several by name
            text = next((one.get("template") for one in text if one.get("name") == "default"), None)
        if not isinstance(text, str):
            raise UserError(f"{beside} has no chat_template: name one, data.template={'|'.join(template_names())}")
        return TemplateSource(name, text, *tokens)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"data.template={name} is neither a given template ({', '.join(template_names())}), nor tokenizer, nor a "
            f"file (looked from {Path.cwd()})"
        )
    return TemplateSource(path.name, read_text(path, "data.template names it"), *tokens)


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


class ChatTemplate:
    """A template with the tokenizer that its text is encoded by."""

    def __init__(self, source: TemplateSource, tokenizer: Tokenizer) -> None:
        """Raises UserError where the source is no template."""
        self.source, self.tokenizer = source, tokenizer
        names = [*source.special_tokens(), source.bos_token, source.eos_token]
        names += [tokenizer.name_of(identity) for identity in tokenizer.special]
        known = [name for name in dict.fromkeys(names) if name and tokenizer.find(name, -1) >= 0]
        self._ids = {name: tokenizer.id_of(name) for name in known}
        longest_first = sorted(known, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if known else re.compile("(?!)")
        self._template = CompiledTemplate(source.text)

    def parts(self, conversation: Conversation, by_marks: bool | None = None) -> list[Part]:
        """The text of a conversation in parts, each turn of the assistant one by itself. Raises TemplateError.

        ``by_marks``: whether the template's marks tell them, or prefixes; by default the marks where it has any.
        """
        said = [message["train"] for message in conversation["messages"] if message["role"] == "assistant"]
        pieces = self._pieces(conversation["messages"], conversation["tools"], by_marks)
        if len(pieces) // 2 != len(said):
            raise TemplateError(
                f"marks {len(pieces) // 2} parts by generation, and the assistant has {len(said)} turns: "
                f"{_shortened(''.join(pieces))!r}"
            )
        return [Part(piece, bool(n % 2) and said[n // 2]) for n, piece in enumerate(pieces) if piece]

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The ids of a conversation. Raises TemplateError, and UserError for text that the tokenizer does not know."""
        ids: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []
        for part in self.parts(conversation):
            ids += self._encode_text(part.text)
            trained += [part.trained] * (len(ids) - len(trained))
            if part.trained:
                ends.append(len(ids))
        return EncodedConversation(ids, trained, ends)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The ids after which the assistant's next turn comes: those that stand before it in training."""
        ids: list[int] = []
        for piece in self._pieces(messages, tools, generate=True):
            ids += self._encode_text(piece)
        return ids

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Any], by_marks: bool | None = None, generate: bool = False
    ) -> list[str]:
        """The text in pieces, those of odd numbers each a turn of the assistant."""
        text = self._render(messages, tools, generate)
        if self._template.marks_generation if by_marks is None else by_marks:
            return re.split(f"{BEGIN_MARK}(.*?){END_MARK}", text, flags=re.DOTALL)
        whole, position, pieces = _unmarked(text), 0, []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _unmarked(self._render(messages[:number], tools, generate=True)) if number else ""
            behind = _unmarked(self._render(messages[: number + 1], tools))
            for prefix in (before, behind):
                if not whole.startswith(prefix):
                    raise TemplateError(
                        f"writes the turns up to message {number + 1} otherwise when others follow, so that what is "
                        f"trained is not known: {_shortened(_where_apart(whole, prefix))!r}. Mark it by "
                        "{% generation %} in the template"
                    )
            end = self._end_of_turn(behind, len(before))
            pieces += [whole[position : len(before)], whole[len(before) : end]]
            position = end
        return [*pieces, whole[position:]]

    @cached_property
    def end_of_turn(self) -> int:
        """The id that ends a turn of the assistant."""
        probe = [{"role": "user", "content": "a", "train": False}, {"role": "assistant", "content": "b", "train": True}]
        encoded = self.encode({"messages": probe, "tools": []})
        return encoded.ids[encoded.turn_ends[-1] - 1]

    def _render(self, messages: Sequence[Message], tools: Sequence[Any], generate: bool = False) -> str:
        variables = {
            "messages": [self._apart(_for_template(message)) for message in messages],
            "tools": self._apart(list(tools)) or None,
            "add_generation_prompt": generate,
            "bos_token": self.source.bos_token,
            "eos_token": self.source.eos_token,
        }
        return self._template.render(variables)

    def _apart(self, value: Any) -> Any:
        """A value of a row in which no text spells a special token, or holds a character that is reserved."""
        if isinstance(value, str):
            if any(sign in value for sign in _RESERVED):
                raise TemplateError("cannot be used for it: it has the private characters U+E0F0 to U+E0F2")
            return self._special.sub(lambda match: match[0][0] + _APART + match[0][1:], value)
        if isinstance(value, dict):
            return {key: self._apart(inner) for key, inner in value.items()}
        return [self._apart(inner) for inner in value] if isinstance(value, list) else value

    def _end_of_turn(self, text: str, begin: int) -> int:
        """Where the turn that begins at ``begin`` of ``text`` ends: behind its last special token, if only white space
        follows that.
        """
        ends = [match.end() for match in self._special.finditer(text, begin)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _encode_text(self, text: str) -> Iterator[int]:
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                yield self._ids[piece]
            elif piece:
                yield from self.tokenizer.encode(piece.replace(_APART, ""))


def shown_text(text: str) -> str:
    """A part's text as a reader should see it."""
    return text.replace(_APART, "")


def _for_template(message: Message) -> dict[str, Any]:
    """What a template sees of a message."""
    return {key: value for key, value in message.items() if key != "train"}


def _unmarked(text: str) -> str:
    return text.replace(BEGIN_MARK, "").replace(END_MARK, "")


def _where_apart(whole: str, other: str) -> str:
    """The text where it stops being the other."""
    at = next((n for n, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), min(len(whole), len(other)))
    return whole[max(0, at - 40) :]


def _shortened(text: str) -> str:
    return shown_text(_unmarked(text))[:120]

"""Text to token ids and back, by a ``tokenizer.json`` of the ``tokenizers`` library."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from train.config.keys.data import TokenizerConfig
from train.data.text_cuts import LONGEST_WORD, TextCuts, bounded_words
from train.errors import UserError
from train.util.io import LFS_POINTER
from train.util.reading import UNREADABLE, as_object, read_text

FILE = "tokenizer.json"
EOT = "<|endoftext|>"
_END_TOKENS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_ENDS = "ends_document"
"""Mark of an entry of ``added_tokens``: it ends a document, whatever _END_TOKENS are there. Other readers ignore it."""
_RUN_TIME = ("truncation", "padding", "post_processor")
"""Parts of a tokenizer.json that have no say in the ids of a text alone."""
_CONFIG_FILE = "tokenizer_config.json"
PREPARE_AGAIN = "Prepare the corpus again (`./launch.sh prepare`)"
_BYTES = 256
MAX_SHOWN = 300
"""Characters of the library's own message that are repeated."""
_DECODED_AT_ONCE, _CONTEXT = 1 << 16, 8
"""Tokens of a long text that are decoded at once, and those before them: a decoder may begin a text in another way."""
_MOST_IDS = 1 << 24
"""Ids of a vocabulary, gaps included, for each of which the library and the model take memory."""
_LONG_WORD = re.compile(
    "|".join(rf"(?<!{sign}){sign}{{{LONGEST_WORD + 1},}}" for sign in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
_LONG_BLANK = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")
_LONG_WORDS_LEARNED = 4 << 20
"""Characters in words of over LONGEST_WORD, such as DNA and rulers of dashes, that a bpe learns from at most: they
hardly repeat, so that each takes memory, and more of them teach nothing."""


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Raise UserError for what the library raises: a bare Exception, or the panic of Rust code, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {str(error)[:MAX_SHOWN]}") from None


class Tokenizer:
    """Encodes and decodes text; ``eot`` is the id before and after every document, ``vocab_size`` counts all ids."""

    def __init__(self, content: str) -> None:
        self._fast, marked = _load(content)
        # A text that spells a special token is text: it must not end a document, and it must come back as it was.
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        if getattr(self._fast.model, "dropout", None):
            self._fast.model.dropout = None  # a text would have other ids each time
        ids = [self._fast.token_to_id(token) for token in ([marked] if marked else _END_TOKENS)]
        known = [identity for identity in ids if identity is not None]
        if not known:
            raise UserError(
                f"the tokenizer has no token that ends a document (looked for {', '.join(_END_TOKENS)}, and for "
                f"eos_token of a {_CONFIG_FILE} beside it): name it with data.tokenizer.end_token"
            )
        self.eot: int = known[0]
        self._marked = marked
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        if self.vocab_size > _MOST_IDS:
            raise UserError(f"the tokenizer numbers its tokens up to {self.vocab_size - 1:,}: {_MOST_IDS:,} are read")
        self.content = content
        added = self._fast.get_added_tokens_decoder()
        self.special = sorted(identity for identity, token in added.items() if token.special)
        self.fingerprint: str = hashlib.sha256(content.encode()).hexdigest()
        # Only a character vocabulary has no pre-tokenizer and no merges; the library silently drops characters that
        # are not in it.
        characters = vocabulary.keys() - {token.content for token in added.values()}
        self._characters = (
            characters if self._fast.pre_tokenizer is None and max(map(len, characters), default=0) == 1 else None
        )
        self._unknown = _unknown_id(self._fast, content)
        self._alphabet = _droppable_alphabet(self._fast, vocabulary) if self._characters is None else None

    @cached_property
    def _cuts(self) -> TextCuts:
        return TextCuts(self._fast)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without ``eot``. Raises UserError for a character that a character vocabulary lacks."""
        return list(itertools.chain.from_iterable(ids for _, ids in self.encode_pieces([text])))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
        """Parts of bounded size of a text that comes in pieces, cut anywhere, and their ids: those of the whole."""
        for part in self._cuts.parts(pieces):
            if self._characters is not None and (unknown := set(part) - self._characters):
                listed = " ".join(f"{character!r}" for character in sorted(unknown)[:20])
                raise UserError(f"characters that the corpus of this tokenizer does not have: {listed}. Leave them out")
            with _library("the tokenizer fails at this text"):
                ids = self._fast.encode_batch_fast([part], add_special_tokens=False)[0].ids
            yield part, ids

    def count_unknown(self, text: str, ids: Sequence[int]) -> int:
        """How many characters of ``text``, whose ids are ``ids``, are dropped, or stand for the unknown token: one such
        token may stand for a whole sentence.
        """
        if self._alphabet is None:
            if self._unknown is None or self._unknown not in ids:
                return 0
            found = self._fast.encode(text, add_special_tokens=False)
            lengths = [end - begin for begin, end in found.offsets]
            return sum(length for length, one in zip(lengths, found.ids, strict=True) if one == self._unknown)
        normalizer, pre_tokenizer = self._fast.normalizer, self._fast.pre_tokenizer
        read = normalizer.normalize_str(text) if normalizer else text
        words = [word for word, _ in pre_tokenizer.pre_tokenize_str(read)] if pre_tokenizer else [read]
        return sum(character not in self._alphabet for character in itertools.chain.from_iterable(words))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that form no whole character become the replacement character."""
        with _library("the tokenizer fails at these tokens"):
            return self._fast.decode(list(ids), skip_special_tokens=False)

    def decode_parts(self, ids: NDArray[Any]) -> Iterator[str]:
        """The text of a document's ids in parts of about ``_DECODED_AT_ONCE`` tokens, cut between characters."""
        begin = 0
        while True:
            end, before = begin + _DECODED_AT_ONCE, ids[max(0, begin - _CONTEXT) : begin].tolist()
            text = self.decode(ids[begin - len(before) : end].tolist())
            while text.endswith("\ufffd") and end < min(len(ids), begin + _DECODED_AT_ONCE + _CONTEXT):
                end += 1  # a character may lie in several tokens
                text = self.decode(ids[begin - len(before) : end].tolist())
            yield text[len(self.decode(before)) :]
            if (begin := end) >= len(ids):
                return

    def find(self, name: str, default: int) -> int:
        """The id of the token of that name, or ``default`` if the vocabulary has none."""
        identity = self._fast.token_to_id(name)
        return default if identity is None else identity

    def id_of(self, name: str) -> int:
        """The id of a token that the vocabulary is known to have."""
        identity = self._fast.token_to_id(name)
        assert identity is not None, name
        return identity

    def name_of(self, identity: int) -> str:
        """The vocabulary's spelling of a token; "" for an id without a token."""
        return self._fast.id_to_token(identity) or ""

    def wrapped(self, before: Sequence[str], after: Sequence[str]) -> str:
        """Content of the tokenizer.json that puts these tokens around a text by default, for other programs."""
        first, between = [*before, "$A", *after], [] if after else [f"{token}:1" for token in before]
        fast, _ = _load(self.content)
        fast.no_padding()
        fast.no_truncation()
        fast.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *between, "$B:1", *(f"{token}:1" for token in after)],
            special_tokens=[(token, self.id_of(token)) for token in {*before, *after}],
        )
        return fast.to_str()

    def extended(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with special tokens of these names; missing ones get ids after all others, in order."""
        lacking = [name for name in names if self._fast.token_to_id(name) is None]
        if not lacking:
            return self
        fast, _ = _load(self.content)
        fast.add_special_tokens(lacking)
        content = fast.to_str()
        extended = Tokenizer(_mark_end(_values(content), self._marked) if self._marked else content)
        if [extended.id_of(name) for name in lacking] != list(range(self.vocab_size, self.vocab_size + len(lacking))):
            raise UserError(
                f"the tokenizer numbers its tokens with gaps, so {lacking[0]} cannot be added: take another"
            )
        return extended


def _load(content: str) -> tuple[Fast, str]:
    """The library's tokenizer, and the token that ``content`` marks as the end of a document, "" if none."""
    marked = ""
    with _library("not a tokenizer.json that the tokenizers library reads"):
        if f'"{_ENDS}"' in content:
            values = _values(content)
            marked = next((entry["content"] for entry in values["added_tokens"] if entry.pop(_ENDS, False)), "")
            content = json.dumps(values)
        return Fast.from_str(content), marked


def _values(content: str) -> dict[str, Any]:
    """The values of a tokenizer.json. Raises UserError where Python's parser is stricter than the library's."""
    with _library("not a tokenizer.json"):
        return as_object(json.loads(content))


def encoding_digest(content: str) -> str:
    """Hash of what decides the ids of a text: equal for a tokenizer.json and the same one with another beginning."""
    fast, _ = _load(content)
    values = json.loads(fast.to_str())
    for part in _RUN_TIME:
        values[part] = None
    values["model"].pop("dropout", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _unknown_id(fast: Fast, content: str) -> int | None:
    """The id of the token that stands for what the vocabulary lacks, or None where there is none."""
    if isinstance(fast.model, models.Unigram):
        unknown: int | None = _values(content)["model"].get("unk_id")
        return unknown
    name = getattr(fast.model, "unk_token", None)
    return fast.token_to_id(name) if name else None


def _droppable_alphabet(fast: Fast, vocabulary: Iterable[str]) -> frozenset[str] | None:
    """The characters of a BPE that silently drops all others; None for a model that does not."""
    model = fast.model
    if not isinstance(model, models.BPE) or model.unk_token or model.byte_fallback:
        return None
    affixes = [affix for affix in (model.continuing_subword_prefix, model.end_of_word_suffix) if affix]
    alphabet = {token for token in vocabulary if len(token) == 1}
    for affix in affixes:
        alphabet |= {token.replace(affix, "") for token in vocabulary if len(token) == len(affix) + 1}
    return None if alphabet.issuperset(_byte_signs()) else frozenset(alphabet)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer in the folder of a prepared corpus or of a run. Raises UserError if it is missing or damaged."""
    path = Path(folder) / FILE
    if not path.exists():
        raise UserError(f"{path} is missing: prepare the corpus again (`./launch.sh prepare`)")
    content = read_text(path, PREPARE_AGAIN)
    try:
        return Tokenizer(content)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}. {PREPARE_AGAIN}") from None


def build_tokenizer(settings: TokenizerConfig, texts: Iterable[str], characters: str) -> str:
    """The content of a new ``tokenizer.json``: a function of the settings and the text alone.

    A bpe learns from ``texts``; chars takes ``characters``, those of the whole corpus. Raises UserError.
    """
    match settings.kind:
        case "bpe":
            return _train_bpe(settings.vocab_size, texts)
        case "chars":
            return _finish(Fast(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[])), decoders.Fuse())
        case "bytes":
            fast = Fast(models.BPE(vocab={sign: byte for byte, sign in enumerate(_byte_signs())}, merges=[]))
            fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return _finish(fast, decoders.ByteLevel())
        case "file":
            return given_tokenizer(settings)


def given_files(settings: TokenizerConfig) -> list[Path]:
    """The files that ``given_tokenizer`` reads; none for a tokenizer that is made from the corpus."""
    if settings.kind != "file" or settings.path is None:
        return []
    path = Path(settings.path).expanduser()
    beside = path.with_name(_CONFIG_FILE)
    return [path, beside] if beside.exists() else [path]


def given_tokenizer(settings: TokenizerConfig, note: Callable[[str], None] = lambda text: None) -> str:
    """The content of the tokenizer.json that ``data.tokenizer.path`` names, read and checked. Raises UserError.

    Without the dropout of its merges, of which ``note`` tells; with a mark at the token that ends a document, where
    that is not the one that it would be taken for.
    """
    if settings.path is None:
        raise UserError("data.tokenizer.kind=file needs data.tokenizer.path=/where/tokenizer.json")
    path = Path(settings.path).expanduser()
    content = read_text(path, f"data.tokenizer.path names it (looked from {Path.cwd()})")
    try:
        if content.startswith(LFS_POINTER.decode()):
            raise UserError("not a tokenizer.json but Git LFS's note of one: fetch it with `git lfs pull`")
        fast, _ = _load(content)
        if dropout := getattr(fast.model, "dropout", None):
            note(f"{path} has a dropout of {dropout:g}, which gives a text other tokens each time: it is switched off")
            values = _values(content)
            values["model"]["dropout"] = None
            content = json.dumps(values, ensure_ascii=False)
        content = _with_end_token(content, fast, settings.end_token, path.with_name(_CONFIG_FILE))
        Tokenizer(content)
    except UserError as error:
        raise UserError(f"data.tokenizer.path={settings.path}: {error}") from None
    return content


def _with_end_token(content: str, fast: Fast, end_token: str | None, config_file: Path) -> str:
    """``content`` with a mark at the token that ends a document: ``end_token``, or else eos_token of ``config_file``.

    Unchanged where it is the first of _END_TOKENS that is there, or where none is named.
    """
    if end_token is not None and fast.token_to_id(end_token) is None:
        raise UserError(f"it has no token {end_token!r}, which data.tokenizer.end_token names")
    end = end_token or _eos_token(config_file)
    known = next((token for token in _END_TOKENS if fast.token_to_id(token) is not None), None)
    if not end or end == known or fast.token_to_id(end) is None:
        return content
    if end not in (token.content for token in fast.get_added_tokens_decoder().values()):
        fast.add_special_tokens([end])  # it keeps its id
        content = fast.to_str()
    return _mark_end(_values(content), end)


def _eos_token(config_file: Path) -> str | None:
    """``eos_token`` of a tokenizer_config.json; None where there is no such file or entry."""
    with contextlib.suppress(*UNREADABLE):
        named = json.loads(config_file.read_text("utf-8")).get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        return text if isinstance(text, str) and text.encode() else None
    return None


def _mark_end(values: dict[str, Any], end: str) -> str:
    """The content of a tokenizer.json, its ``values``, with ``end`` marked as the token that ends a document."""
    for entry in values["added_tokens"]:
        if entry["content"] == end:
            entry[_ENDS] = True
        else:
            entry.pop(_ENDS, None)
    return json.dumps(values, ensure_ascii=False)


def _train_bpe(vocab_size: int | None, texts: Iterable[str]) -> str:
    if vocab_size is None or vocab_size <= _BYTES:
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size}: a byte-level bpe needs more than {_BYTES} ids "
            f"({_BYTES} bytes and {EOT}); set e.g. data.tokenizer.vocab_size=4096"
        )
    fast = _untrained_bpe()
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_few_long_words(texts), trainer)
    return fast.to_str()


def parts_to_learn(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The text of one document, which comes in pieces, in parts of about ``size`` characters, cut between words."""
    return TextCuts(_untrained_bpe()).parts(pieces, size)


def _untrained_bpe() -> Fast:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = bounded_words()
    return fast


def _few_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, without words of over LONGEST_WORD once there have been enough of them."""
    left = _LONG_WORDS_LEARNED

    def take(word: re.Match[str]) -> str:
        nonlocal left
        left -= len(word[0])
        return word[0] if left >= 0 else ""

    for text in texts:
        may_have = max(map(len, text.split()), default=0) > LONGEST_WORD or _LONG_BLANK.search(text)
        yield _LONG_WORD.sub(take, text) if may_have else text


def _finish(fast: Fast, decoder: decoders.Decoder) -> str:
    """Add the end-of-text token after all others, and set the decoder."""
    fast.add_special_tokens([EOT])
    fast.decoder = decoder
    return fast.to_str()


def _byte_signs() -> list[str]:
    """The character that byte-level tokenizers write for each byte, in the order of the bytes.

    Printable bytes stand for themselves; the others, in order, for the characters from 256 up (Radford et al. 2019,
    `bytes_to_unicode` of GPT-2).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return [chr(byte if byte in printable else _BYTES + others.index(byte)) for byte in range(_BYTES)]

"""Text to token ids and back, by a ``tokenizer.json`` of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.config import schema
from train.errors import UserError
from train.util.reading import read_text

FILE = "tokenizer.json"
EOT = "<|endoftext|>"
_END_TOKENS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
PREPARE_AGAIN = "Prepare the corpus again (`./launch.sh prepare`)"
_BYTES = 256
MAX_SHOWN = 300
"""Characters of the library's own message that are repeated."""
_MOST_IDS = 1 << 24
"""Ids of a vocabulary, gaps included, for each of which the library and the model take memory."""
_LONG = 1 << 20
"""Characters above which a text is encoded in chunks: the library needs some 100 bytes of memory a token."""


@contextmanager
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
        with _library("not a tokenizer.json that the tokenizers library reads"):
            self._fast = Fast.from_str(content)
        # A text that spells a special token is text: it must not end a document, and it must come back as it was.
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        ids = [self._fast.token_to_id(token) for token in _END_TOKENS]
        known = [identity for identity in ids if identity is not None]
        if not known:
            raise UserError(f"the tokenizer has no token that ends a document (looked for {', '.join(_END_TOKENS)})")
        self.eot: int = known[0]
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
        # Chunks may be encoded apart only where the tokenizer adds nothing before or between words.
        splittable = isinstance(self._fast.pre_tokenizer, pre_tokenizers.ByteLevel) or self._characters is not None
        self._chunk = _LONG if splittable and self._fast.normalizer is None else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without ``eot``. Raises UserError for a character that a character vocabulary lacks."""
        if self._characters is not None and (unknown := set(text) - self._characters):
            listed = " ".join(f"{character!r}" for character in sorted(unknown)[:20])
            raise UserError(f"characters that the corpus of this tokenizer does not have: {listed}")
        ids: list[int] = []
        with _library("the tokenizer fails at this text"):
            for chunk in _split_text(text, self._chunk or len(text)):
                ids.extend(self._fast.encode_batch_fast([chunk], add_special_tokens=False)[0].ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that form no whole character become the replacement character."""
        with _library("the tokenizer fails at these tokens"):
            return self._fast.decode(list(ids), skip_special_tokens=False)

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

    def extended(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with special tokens of these names; missing ones get ids after all others, in order."""
        lacking = [name for name in names if self._fast.token_to_id(name) is None]
        if not lacking:
            return self
        fast = Fast.from_str(self.content)
        fast.add_special_tokens(lacking)
        extended = Tokenizer(fast.to_str())
        if [extended.id_of(name) for name in lacking] != list(range(self.vocab_size, self.vocab_size + len(lacking))):
            raise UserError(f"the tokenizer numbers its tokens with gaps, so {lacking[0]} cannot stand behind")
        return extended


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


def _split_text(text: str, size: int) -> Iterator[str]:
    """Chunks of at most ``size`` characters, cut at a line break if there is one; joined they are the text."""
    start = 0
    while len(text) - start > size:
        newline = text.rfind("\n", start + 1, start + size)
        stop = newline if newline > 0 else start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def build_tokenizer(settings: schema.TokenizerConfig, texts: Iterable[str], characters: str) -> str:
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


def given_tokenizer(settings: schema.TokenizerConfig) -> str:
    """The content of the tokenizer.json that ``data.tokenizer.path`` names, read and checked. Raises UserError."""
    if settings.path is None:
        raise UserError("data.tokenizer.kind=file needs data.tokenizer.path=/where/tokenizer.json")
    content = read_text(Path(settings.path).expanduser(), f"data.tokenizer.path names it (looked from {Path.cwd()})")
    try:
        Tokenizer(content)
    except UserError as error:
        raise UserError(f"data.tokenizer.path={settings.path}: {error}") from None
    return content


def _train_bpe(vocab_size: int | None, texts: Iterable[str]) -> str:
    if vocab_size is None or vocab_size <= _BYTES:
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size}: a byte-level bpe needs more than {_BYTES} ids "
            f"({_BYTES} bytes and {EOT}); set e.g. data.tokenizer.vocab_size=4096"
        )
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return fast.to_str()


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

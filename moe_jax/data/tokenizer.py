"""Text to token ids and back: UTF-8 bytes, a Hugging Face tokenizer.json, or a SentencePiece model."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from moe_jax.config import Problem, Refused, nearest

# The token that ends a document, by the names that released tokenizers give it; the first one present is taken.
EOS_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|eos_token|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek: full-width bars, block underscores
    "[EOS]",
    "[SEP]",
)


FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # of published folders; the first one present is taken


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
        eos: the id that ends a document. size: one more than the greatest id.
        front: the ids that it puts before a document, such as BOS; models begin with them if `data.bos` says so.
        back: the ids that it puts after a text that is whole, as T5's puts its eos after what an encoder reads.
        special: the tokens that stand for something else than their text, by name.
    """

    eos: int
    size: int
    front: tuple[int, ...]
    back: tuple[int, ...]
    special: dict[str, int]

    def encode(self, text: str, marked: bool = False) -> np.ndarray:
        """Token ids [T] int32 without eos or other special tokens; `marked`: names of special tokens in the text, as a
        chat template writes them, are those tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids and ids of no token are left out, broken UTF-8 becomes U+FFFD."""
        ...

    def fingerprint(self) -> str:
        """Equal for two tokenizers only if they encode alike."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte, ids 0 to 255, and `eos` 256."""

    eos = 256
    size = 257
    front: tuple[int, ...] = ()
    back: tuple[int, ...] = (eos,)
    special: dict[str, int] = {}  # noqa: RUF012  # nothing is ever added

    def encode(self, text: str, marked: bool = False) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        return "bytes"


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Raises:
        Refused: (key `data.tokenizer`) the file is missing or no tokenizer, or has no token that ends a document.
    """

    def __init__(self, path: str):
        from tokenizers import Tokenizer as Rust

        raw = _content(path)
        try:
            self._rust = Rust.from_buffer(raw)
        except Exception as e:  # the library raises plain `Exception`
            raise _refusal(
                f"{path!r} is not a tokenizer.json: {e}", "save it again with `Tokenizer.save(path)`"
            ) from None
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        names = [name for name in EOS_NAMES if name in vocabulary]
        if not names:
            why = f"{path!r} has no token that ends a document; looked for {', '.join(EOS_NAMES)}"
            raise _refusal(why, f"add one of them as a special token, for example {EOS_NAMES[0]}")
        self.eos: int = vocabulary[names[0]]
        self.size: int = max(vocabulary.values()) + 1  # ids may have holes
        self._known = np.zeros(self.size, bool)
        self._known[list(vocabulary.values())] = True
        # A tokenizer.json may cut or fill what it encodes, and reads `</s>` in a text as the end of the document.
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = True
        self.special: dict[str, int] = {
            token.content: id for id, token in self._rust.get_added_tokens_decoder().items() if token.special
        }
        plain, whole = (self._rust.encode("a", add_special_tokens=added).ids for added in (False, True))
        begins = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        self.front: tuple[int, ...] = tuple(whole[: begins[0]]) if begins else ()
        self.back: tuple[int, ...] = tuple(whole[begins[0] + len(plain) :]) if begins else ()
        self._fingerprint = f"tokenizer.json sha256 {hashlib.sha256(raw).hexdigest()}"

    def encode(self, text: str, marked: bool = False) -> np.ndarray:
        self._rust.encode_special_tokens = not marked
        ids = self._rust.encode(text, add_special_tokens=False).ids
        self._rust.encode_special_tokens = True
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        # The eos may be an ordinary entry of the vocabulary, so that the library would print it.
        known = [i for i in map(int, ids) if 0 <= i < self.size and self._known[i] and i != self.eos]
        return self._rust.decode(known, skip_special_tokens=True)

    def fingerprint(self) -> str:
        return self._fingerprint


class PieceTokenizer:
    """A tokenizer.model of the `sentencepiece` library.

    Raises:
        Refused: (key `data.tokenizer`) the file is missing or no model, or has no token that ends a document.
    """

    def __init__(self, path: str):
        from sentencepiece import SentencePieceProcessor

        raw = _content(path)
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(raw)
            names = [self._model.IdToPiece(i) for i in range(self._model.GetPieceSize())]
        except (RuntimeError, ValueError) as e:
            why = f"{path!r} is not a SentencePiece model: {e}"
            raise _refusal(why, "give the tokenizer.model that the library wrote") from None
        self.eos: int = self._model.eos_id()
        if self.eos < 0:
            raise _refusal(f"{path!r} has no token that ends a document", "train it again with an eos_id")
        self.size = len(names)
        self.front: tuple[int, ...] = (self._model.bos_id(),) if self._model.bos_id() >= 0 else ()
        self.back: tuple[int, ...] = (self.eos,)  # such a model says nothing of it; T5's are used so
        self.special = {name: i for i, name in enumerate(names) if self._model.IsControl(i)}
        self._fingerprint = f"tokenizer.model sha256 {hashlib.sha256(raw).hexdigest()}"

    def encode(self, text: str, marked: bool = False) -> np.ndarray:
        if not marked or not self.special:
            return np.array(self._model.EncodeAsIds(text), np.int32)
        parts = re.split("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")", text)
        ids = [[self.special[p]] if p in self.special else self._model.EncodeAsIds(p) for p in parts if p]
        return np.array([i for part in ids for i in part], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.size and not self._model.IsControl(i)]
        return self._model.DecodeIds(known)

    def fingerprint(self) -> str:
        return self._fingerprint


def _content(path: str) -> bytes:
    """What a tokenizer's file holds."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read()
    except (OSError, ValueError) as e:
        inside = [os.path.join(path, name) for name in FILES]
        found = next((name for name in inside if os.path.isfile(name)), None)
        hint = f"did you mean {found!r}? " if found else nearest(path, ["bytes"])
        remedy = f"{hint}give `bytes` or the path of a tokenizer.json or tokenizer.model"
        raise _refusal(f"cannot read {path!r}: {getattr(e, 'strerror', None) or e}", remedy) from None


def _refusal(reason: str, remedy: str) -> Refused:
    return Refused(Problem("data.tokenizer", reason, remedy))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, or the path of a tokenizer.json or tokenizer.model."""
    if spec == "bytes":
        return ByteTokenizer()
    return PieceTokenizer(spec) if spec.endswith(".model") else HFTokenizer(spec)


def continued(tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]) -> str:
    """What `new` ids add to the text of the ids `before` them. Alone they may lose the space that they begin with.

    Where those before end inside a character, its U+FFFD gives way to the character.
    """
    head, whole = (tokenizer.decode(ids) for ids in (before, [*before, *new]))
    same = (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b)
    return whole[next(same, len(head)) :]


def opening(tokenizer: Tokenizer, bos: bool) -> tuple[int, ...]:
    """The ids that a document and a prompt begin with.

    Raises:
        Refused: (key `data.bos`) the tokenizer puts none there.
    """
    if not bos:
        return ()
    if not tokenizer.front:
        why = "is true, and the tokenizer puts nothing before a document"
        raise Refused(Problem("data.bos", why, "set data.bos=false, or give another data.tokenizer"))
    return tokenizer.front

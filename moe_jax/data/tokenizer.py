"""Text to token ids and back: UTF-8 bytes, or a Hugging Face tokenizer.json."""

import hashlib
import os
from collections.abc import Iterable
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


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer. `size` is one more than the greatest id."""

    eos: int
    size: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids [T] int32, without eos or other special tokens."""
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

    def encode(self, text: str) -> np.ndarray:
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

        try:
            with open(os.path.expanduser(path), "rb") as file:
                raw = file.read()
        except (OSError, ValueError) as e:
            inside = os.path.join(path, "tokenizer.json")
            hint = f"did you mean {inside!r}? " if os.path.isfile(inside) else nearest(path, ["bytes"])
            remedy = f"{hint}give `bytes` or the path of a tokenizer.json"
            raise _refusal(f"cannot read {path!r}: {getattr(e, 'strerror', None) or e}", remedy) from None
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
        self._fingerprint = f"tokenizer.json sha256 {hashlib.sha256(raw).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._rust.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        # The eos may be an ordinary entry of the vocabulary, so that the library would print it.
        known = [i for i in map(int, ids) if 0 <= i < self.size and self._known[i] and i != self.eos]
        return self._rust.decode(known, skip_special_tokens=True)

    def fingerprint(self) -> str:
        return self._fingerprint


def _refusal(reason: str, remedy: str) -> Refused:
    return Refused(Problem("data.tokenizer", reason, remedy))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, or the path of a tokenizer.json."""
    return ByteTokenizer() if spec == "bytes" else HFTokenizer(spec)

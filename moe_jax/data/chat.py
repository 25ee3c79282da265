"""Chats: what a user says as the ids that a model was taught on, by the template published beside its tokenizer."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moe_jax.config import Problem, Refused
from moe_jax.data.tokenizer import Tokenizer, continued

LONGEST = 2**20  # bytes of a file beside the tokenizer


class Chat:
    """The template of tokenizer_config.json or chat_template.jinja, run in the sandbox of Jinja.

    Args:
        path: of the tokenizer; the other files lie in its folder.
    Attributes:
        stops: the ids that end an answer, by tokenizer_config.json and generation_config.json.
    Raises:
        Refused: there is no template, or it is none.
    """

    def __init__(self, path: str, tokenizer: Tokenizer):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.tokenizer, self.folder = tokenizer, Path(path).expanduser().parent
        self.settings = self.read("tokenizer_config.json")
        source = self.template()
        if path == "bytes" or source is None:
            why = f"there is no chat template beside the tokenizer {path!r}"
            remedy = "put its tokenizer_config.json or chat_template.jinja there, or leave --chat out"
            raise Refused(Problem("--chat", why, remedy))
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            self.rendered = sandbox.from_string(source).render
        except TemplateError as e:
            raise Refused(Problem("--chat", f"the chat template is none: {e}", "leave --chat out")) from None

    def read(self, name: str) -> dict[str, Any]:
        """What a JSON file beside the tokenizer says; nothing where there is none."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            found = json.loads(bounded(path))
            if isinstance(found, dict):
                return found
            why = "holds no JSON object"
        except (ValueError, RecursionError) as e:
            why = f"is no JSON: {e}"
        raise Refused(Problem(str(path), why, "put the published file there, or leave --chat out"))

    def template(self) -> str | None:
        """The source of the template; where there are several, the one named default."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return bounded(path)
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def name(self, kind: str) -> str:
        """A special token, such as `bos_token`, as text."""
        token = self.settings.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    @property
    def stops(self) -> set[int]:
        ids = self.read("generation_config.json").get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found = {i for i in ids if type(i) is int and 0 <= i < self.tokenizer.size}
        end = self.tokenizer.special.get(self.name("eos_token"))
        return found | ({end} if end is not None else set())

    def prompt(self, user: str, system: str | None = None) -> np.ndarray:
        """What the user says -> ids [T] int32 up to where the answer begins.

        Raises:
            Refused: a text that names a special token, which would end its turn; a template that does not take it.
        """
        from jinja2 import TemplateError

        for flag, text in (("--prompt", user), ("--system", system or "")):
            if named := [name for name in self.tokenizer.special if name in text]:
                why = f"holds {named[0]!r}, which is a token of the chat itself"
                raise Refused(Problem(flag, why, "take it out, or leave --chat out"))
        if not user:
            raise Refused(Problem("--prompt", "is empty", "give at least one character"))
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": user})
        given: dict[str, Any] = {kind: self.name(kind) for kind in ("bos_token", "eos_token", "pad_token", "unk_token")}
        given |= {"raise_exception": refuse, "strftime_now": now}
        try:
            text = self.rendered(messages=messages, add_generation_prompt=True, **given)
        except (TemplateError, TypeError, ValueError, OverflowError, NotTaken) as e:
            why = f"the chat template does not take this: {e}"
            raise Refused(Problem("--chat", why, "change the text, or leave --chat out")) from None
        return self.tokenizer.encode(text, marked=True)


class NotTaken(Exception):
    """What a template says when it does not take a message."""


def refuse(message: str) -> NoReturn:
    """`raise_exception` of templates."""
    raise NotTaken(message)


def now(form: str) -> str:
    """`strftime_now` of templates."""
    return datetime.now().strftime(form)


def bounded(path: Path) -> str:
    """The text of a file that is no longer than a template could be."""
    if (size := path.stat().st_size) > LONGEST:
        raise Refused(Problem(str(path), f"has {size:,} bytes, {LONGEST:,} at the most", "leave --chat out"))
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise Refused(Problem(str(path), f"is not UTF-8: {e}", "put the published file there")) from None


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops` in it."""
    places = [text.find(stop) for stop in stops]
    return text[: min((p for p in places if p >= 0), default=len(text))]


def exactly(tokenizer: Tokenizer, text: str, contexts: Sequence[Sequence[int]]) -> list[int]:
    """The one id that is this text, and no other, after each of the contexts; none where there is no such id.

    A tokenizer may read several texts as one id, such as a tab as a space: the id is then no sign of the text.
    """
    ids = tokenizer.encode(text).tolist()
    return ids if len(ids) == 1 and all(continued(tokenizer, c, ids) == text for c in contexts) else []

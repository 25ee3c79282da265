"""Text from a model: prefill once, then one compiled loop of decoding steps with a key/value cache, dropless.

An encoder reads all of a prompt but its last token, from which the decoder goes on; or, where `model.encoder.start`
names the token that a decoder begins with, all of it.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.cache import Cache
from moe_jax.config import Problem, Refused, require_decoding
from moe_jax.kernels import of_any_length
from moe_jax.mesh import fetch
from moe_jax.rules import sharding
from moe_jax.train.state import Model, Weights


class Sampling(NamedTuple):
    """How the next token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.8
    top_k: int = 0  # among so many of the most probable; 0: all
    seed: int = 0
    top_p: float = 1.0  # among the most probable that together have so much (Holtzman et al. 2020, section 3.1)


SAMPLING = Sampling()


class Generated(NamedTuple):
    """New tokens of each prompt, up to the one that ends its text, and the speed of both phases."""

    tokens: list[list[int]]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    rows: np.ndarray | None = None  # [MoE layers, slots], of each slot in all steps, where experts are placed


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling, known: int) -> jax.Array:
    """Next tokens [B] from logits [B, V] and keys [B]; ids from `known` on have no text and are never chosen."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(ids < known, logits, -jnp.inf)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, known))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        down = jnp.sort(logits, descending=True)  # [B,V]
        prob = jax.nn.softmax(down)
        inside = jnp.cumsum(prob, -1) - prob < sampling.top_p  # the one that reaches top_p is the last inside
        logits = jnp.where(logits < jnp.where(inside, down, jnp.inf).min(-1, keepdims=True), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def numbers(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Which of the equal prompts before it each one is, [prompts] int32."""
    seen: dict[bytes, int] = {}
    out = []
    for prompt in prompts:
        name = np.asarray(prompt, np.int32).tobytes()
        out.append(seen.get(name, 0))
        seen[name] = out[-1] + 1
    return np.array(out, np.int32)


class Generator:
    """Generation for one model, mesh and way to choose tokens; each shape of prompts is compiled once.

    Args:
        known: ids from here on have no text.
        stop: the ids that end a text, one or several.
    Raises:
        ConfigError: a router that needs the whole sequence.
    """

    def __init__(self, model: Model, mesh: Mesh, known: int, stop: int | Sequence[int], sampling: Sampling = SAMPLING):
        require_decoding(model.cfg.model)
        cfg = model.cfg
        if cfg.mesh.over(cfg.rules.length + cfg.rules.residual) > 1:  # a cache holds whole rows; shards take more rows
            cfg = dataclasses.replace(cfg, rules=cfg.rules.by_rows())
        model = model.under(dataclasses.replace(cfg, model=of_any_length(cfg.model)))
        self.model, self.mesh, self.known, self.sampling = model, mesh, known, sampling
        self.stops = (stop,) if isinstance(stop, int) else tuple(stop)
        self.programs: dict[tuple[int, ...], Any] = {}

    def keys(self, number: jax.Array, step: int | jax.Array) -> jax.Array:
        """number [B] of each prompt among equal ones -> keys [B]: what a prompt draws does not depend on what shares
        its batch, nor on its place there."""
        base = jax.random.key(self.sampling.seed)
        return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(base, n), step))(number)

    def prefill(
        self, weights: Weights, tokens: jax.Array, lengths: jax.Array, number: jax.Array, new: int
    ) -> tuple[jax.Array, Cache | None]:
        """tokens [B, L], right-aligned prompts of so many tokens -> next tokens [B] and a cache with room for `new`."""
        module = self.model.module(*weights)
        before = {}
        if (encoder := self.model.cfg.model.encoder) is not None:
            if encoder.start is not None:  # one more token, which is not the prompt's
                tokens, lengths = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=encoder.start), lengths + 1
            place = jnp.arange(tokens.shape[1] - 1)[None] + (lengths[:, None] - tokens.shape[1])
            before = {"inputs": tokens[:, :-1], "input_segments": (place >= 0).astype(jnp.int32)}
            before |= {"input_positions": jnp.maximum(place, 0)}
            tokens, lengths = tokens[:, -1:], jnp.ones_like(lengths)
        B, L = tokens.shape
        cache = module.empty_cache(B, L + new, lengths, L)
        out = module(tokens, cache=cache, prefill=True, capacity_factor=None, **before)
        return choose(out.logits[:, -1], self.keys(number, 0), self.sampling, self.known), out.cache

    def decode(
        self, weights: Weights, first: jax.Array, cache: Cache, number: jax.Array, steps: int
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """At most `steps` more tokens after `first` [B] -> [steps, B], how many steps it took to end all texts, and the
        rows of the slots of a placement."""
        module, stops = self.model.module(*weights), jnp.asarray(self.stops, jnp.int32)

        def ended(token: jax.Array) -> jax.Array:
            return (token[:, None] == stops[None]).any(-1)

        def going(carry: Any) -> jax.Array:
            return (carry[0] < steps) & ~carry[2].all()

        def one(carry: Any) -> Any:
            step, token, done, cache, tokens = carry
            out = module(token[:, None], cache=cache, capacity_factor=None)
            token = choose(out.logits[:, 0], self.keys(number, step + 1), self.sampling, self.known)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, 0)
            return step + 1, token, done | ended(token), out.cache, tokens

        blank = jnp.full((steps, first.shape[0]), self.stops[0], jnp.int32)
        begin = (jnp.zeros((), jnp.int32), first, ended(first), cache, blank)
        step, _, _, cache, tokens = jax.lax.while_loop(going, one, begin)
        return tokens, step, cache.rows

    def __call__(self, weights: Weights, prompts: Sequence[np.ndarray], new_tokens: int) -> Generated:
        """Continue prompts of token ids by at most `new_tokens`; speeds are measured after compiling.

        Raises:
            Refused: an empty prompt, or prompt and new tokens longer than model.max_length.
        """
        longest, limit = max(len(p) for p in prompts), self.model.cfg.model.max_length
        m = self.model.cfg.model
        reads, last = m.encoder is not None, 0 if m.answers else 1  # tokens of a prompt that an encoder leaves out
        most = limit + last if reads else limit - 1  # tokens of a prompt
        room = limit - 1 if reads else limit - longest  # new ones
        if min(len(p) for p in prompts) == 0:
            raise Refused(Problem("--prompt", "is empty", "give at least one character"))
        if longest > most:
            takes = f"its encoder takes {limit}" if reads else f"the model takes {limit} with the new ones"
            why = f"the longest prompt has {longest} tokens, and {takes}"
            raise Refused(Problem("--prompt", why, f"shorten it to at most {most} tokens (model.max_length={limit})"))
        if new_tokens > room:
            read = "the first token" if reads else f"{longest} prompt tokens"
            why = f"{read} and {new_tokens} new ones exceed model.max_length={limit}"
            remedy = f"ask for at most {room}" + ("" if reads else ", or shorten the prompt")
            raise Refused(Problem("--tokens", why, remedy))
        longest = max(longest, reads + last)  # an encoder reads a place of padding where there is nothing else
        rows = len(prompts) + self.repeated(len(prompts))
        tokens, lengths = np.zeros((rows, longest), np.int32), np.zeros(rows, np.int32)
        for i in range(rows):
            prompt = prompts[i % len(prompts)]
            tokens[i, longest - len(prompt) :], lengths[i] = prompt, len(prompt)
        number = np.resize(numbers(prompts), rows)
        with jax.set_mesh(self.mesh):
            wide = sharding(self.mesh, (self.model.cfg.rules.batch,))
            tokens, lengths, number = (jax.device_put(a, wide) for a in (tokens, lengths, number))
            prefill, decode = self.compiled(weights, tokens, lengths, number, new_tokens)
            start = time.perf_counter()
            first, cache = jax.block_until_ready(prefill(weights, tokens, lengths, number))
            filled = time.perf_counter()
            rest, steps, by_slot = jax.tree.map(fetch, decode(weights, first, cache, number))
            end = time.perf_counter()
        new = np.concatenate([fetch(first)[None], rest]).T[: len(prompts)]  # [prompts, new_tokens]
        return Generated(
            [self.cut(row) for row in new],
            sum(len(p) for p in prompts) / (filled - start),
            int(steps) * len(prompts) / (end - filled),
            by_slot,
        )

    def repeated(self, prompts: int) -> int:
        """Rows that fill the last shard: they repeat a prompt, and are not returned."""
        return -prompts % self.model.cfg.mesh.over(self.model.cfg.rules.batch)

    def compiled(self, weights: Weights, tokens: jax.Array, lengths: jax.Array, number: jax.Array, new: int) -> Any:
        """The programs of prefill and decoding for this shape."""
        shape = (*tokens.shape, new)
        if shape not in self.programs:
            given = weights, tokens, lengths, number
            prefill = jax.jit(self.prefill, static_argnums=4).lower(*given, new).compile()
            first, cache = prefill(*given)
            decode = jax.jit(self.decode, static_argnums=4).lower(weights, first, cache, number, new - 1).compile()
            self.programs[shape] = prefill, decode
        return self.programs[shape]

    def cut(self, row: np.ndarray) -> list[int]:
        """The ids up to the first that ends the text."""
        ends = np.flatnonzero(np.isin(row, self.stops))
        return [int(t) for t in (row[: ends[0]] if len(ends) else row)]

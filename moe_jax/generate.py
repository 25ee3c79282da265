"""Text from a model: prefill once, then one compiled loop of decoding steps with a key/value cache, dropless.

An encoder reads all of a prompt but its last token, from which the decoder goes on.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.cache import Cache
from moe_jax.config import Problem, Refused, require_decoding
from moe_jax.mesh import fetch
from moe_jax.rules import sharding
from moe_jax.train.state import Model, Weights


class Sampling(NamedTuple):
    """How the next token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.8
    top_k: int = 0  # 0: all
    seed: int = 0


SAMPLING = Sampling()


class Generated(NamedTuple):
    """New tokens of each prompt, up to its stop token, and the speed of both phases."""

    tokens: list[list[int]]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling, known: int) -> jax.Array:
    """Next tokens [B] from logits [B, V] and keys [B]; ids from `known` on have no text and are never chosen."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(ids < known, logits, -jnp.inf)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, known))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    draw = jax.vmap(lambda key, row: jax.random.categorical(key, row / sampling.temperature))
    return draw(keys, logits).astype(jnp.int32)


class Generator:
    """Compiled generation for one model, mesh and shape.

    Raises:
        ConfigError: a router that needs the whole sequence.
    """

    def __init__(self, model: Model, mesh: Mesh, known: int, stop: int, sampling: Sampling = SAMPLING):
        require_decoding(model.cfg.model)
        cfg = model.cfg
        if cfg.mesh.over(cfg.rules.length + cfg.rules.residual) > 1:  # a cache holds whole rows; shards take more rows
            model = Model.of(dataclasses.replace(cfg, rules=cfg.rules.by_rows()))
        self.model, self.mesh, self.known, self.stop, self.sampling = model, mesh, known, stop, sampling

    def keys(self, step: jax.Array, rows: int) -> jax.Array:
        """One key a row: what a prompt draws does not depend on what shares its batch."""
        base = jax.random.fold_in(jax.random.key(self.sampling.seed), step)
        return jax.random.split(base, rows)

    def prefill(
        self, weights: Weights, tokens: jax.Array, lengths: jax.Array, new: int
    ) -> tuple[jax.Array, Cache | None]:
        """tokens [B, L], right-aligned prompts of so many tokens -> next tokens [B] and a cache with room for `new`."""
        module = self.model.module(*weights)
        before = {}
        if self.model.cfg.model.encoder is not None:
            place = jnp.arange(tokens.shape[1] - 1)[None] + (lengths[:, None] - tokens.shape[1])
            before = {"inputs": tokens[:, :-1], "input_segments": (place >= 0).astype(jnp.int32)}
            before |= {"input_positions": jnp.maximum(place, 0)}
            tokens, lengths = tokens[:, -1:], jnp.ones_like(lengths)
        B, L = tokens.shape
        cache = module.empty_cache(B, L + new, lengths, L)
        out = module(tokens, cache=cache, capacity_factor=None, **before)
        return choose(out.logits[:, -1], self.keys(jnp.asarray(0), B), self.sampling, self.known), out.cache

    def decode(self, weights: Weights, first: jax.Array, cache: Cache, steps: int) -> jax.Array:
        """`steps` more tokens after `first` [B] -> [steps, B]."""
        module = self.model.module(*weights)

        def one(carry, step):
            token, cache = carry
            out = module(token[:, None], cache=cache, capacity_factor=None)
            token = choose(out.logits[:, 0], self.keys(step, token.shape[0]), self.sampling, self.known)
            return (token, out.cache), token

        _, tokens = jax.lax.scan(one, (first, cache), jnp.arange(1, steps + 1))
        return tokens

    def __call__(self, weights: Weights, prompts: Sequence[np.ndarray], new_tokens: int) -> Generated:
        """Continue prompts of token ids by at most `new_tokens`; speeds are measured after compiling.

        Raises:
            Refused: an empty prompt, or prompt and new tokens longer than model.max_length.
        """
        longest, limit = max(len(p) for p in prompts), self.model.cfg.model.max_length
        reads = self.model.cfg.model.encoder is not None
        most = limit + 1 if reads else limit - 1  # tokens of a prompt
        room = limit - 1 if reads else limit - longest  # new ones
        if min(len(p) for p in prompts) == 0:
            raise Refused(Problem("--prompt", "is empty", "give at least one character"))
        if longest > most:
            takes = f"its encoder takes {limit}" if reads else f"the model takes {limit} with the new ones"
            why = f"the longest prompt has {longest} tokens, and {takes}"
            raise Refused(Problem("--prompt", why, f"shorten it to at most {most} tokens (model.max_length={limit})"))
        if new_tokens > room:
            why = f"{1 if reads else longest} prompt tokens and {new_tokens} new ones exceed model.max_length={limit}"
            remedy = f"ask for at most {room}" + ("" if reads else ", or shorten the prompt")
            raise Refused(Problem("--tokens", why, remedy))
        longest = max(longest, 1 + reads)  # an encoder reads a place of padding where there is nothing else
        shards = self.model.cfg.mesh.over(self.model.cfg.rules.batch)
        rows = -(-len(prompts) // shards) * shards  # rows that fill the last shard repeat a prompt and are not returned
        tokens, lengths = np.zeros((rows, longest), np.int32), np.zeros(rows, np.int32)
        for i in range(rows):
            prompt = prompts[i % len(prompts)]
            tokens[i, longest - len(prompt) :], lengths[i] = prompt, len(prompt)
        with jax.set_mesh(self.mesh):
            wide = sharding(self.mesh, (self.model.cfg.rules.batch,))
            placed = (jax.device_put(a, wide) for a in (tokens, lengths))
            first_args = (weights, *placed)
            prefill = jax.jit(self.prefill, static_argnums=3).lower(*first_args, new_tokens).compile()
            first, cache = prefill(*first_args)
            decode = jax.jit(self.decode, static_argnums=3).lower(weights, first, cache, new_tokens - 1).compile()
            start = time.perf_counter()
            first, cache = jax.block_until_ready(prefill(*first_args))
            filled = time.perf_counter()
            rest = fetch(decode(weights, first, cache))
            end = time.perf_counter()
        new = np.concatenate([fetch(first)[None], rest]).T[: len(prompts)]  # [prompts, new_tokens]
        texts = [row[: int((row == self.stop).argmax())] if (row == self.stop).any() else row for row in new]
        return Generated(
            [[int(t) for t in text] for text in texts],
            sum(len(p) for p in prompts) / (filled - start),
            (new_tokens - 1) * len(prompts) / (end - filled),
        )

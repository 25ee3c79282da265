"""The transformer, a decoder alone or with an encoder: dense and MoE layers in a pattern, scanned, rematerialised."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax import config, sequence
from moe_jax.axes import Rules
from moe_jax.balance import Stats
from moe_jax.cache import Cache, Cached, cached_axes, empty_layer, places
from moe_jax.config import ModelConfig
from moe_jax.layers.attention import Context, Source
from moe_jax.layers.block import Block, Routed
from moe_jax.layers.common import Keys, between, dropout, fan_in, fold, gathered, lay, param, row_keys
from moe_jax.layers.distances import Distances, bucket
from moe_jax.layers.embed import Embedding
from moe_jax.layers.moe import FROM_CONFIG, MoELayer, Record, SelectionBias
from moe_jax.layers.norm import Norm
from moe_jax.pattern import Schedule
from moe_jax.pipeline import of_round, pipelined, shared, split
from moe_jax.rules import any_axes, current_mesh, spec

ENCODER = 2**16  # what its random keys are folded with: more than a model has runs of layers
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names("dispatched", "expert_out"),
}


class Output(NamedTuple):
    """What a call of the transformer returns."""

    logits: jax.Array  # [B, L, V] float32
    stats: Stats | None  # leading axis: MoE layers, bottom first; None for a dense model
    cache: Cache | None
    record: Record | None = None  # leading axis: the decoder's MoE layers; where every token went, if it was asked for
    input_record: Record | None = None  # the same of an encoder's tokens and layers


Run = tuple[tuple[str, ...], int]
"""Kinds of the layers of a period, and its repeats."""
Windows = Sequence[int | None]
"""How many tokens each of them sees; None for all."""


class Period(nnx.Module):
    """The layers of one period of a stack."""

    def __init__(
        self, m: ModelConfig, kinds: Sequence[str], windows: Windows, rules: Rules | None, rngs: nnx.Rngs, **place: bool
    ):
        layers = zip(kinds, windows, strict=True)
        self.blocks = nnx.List([Block(m, kind, rules, rngs, window=window, **place) for kind, window in layers])

    def __call__(self, x, context: Context, keys: Keys, caches: tuple, train: bool, options: Sequence[dict]):
        """`options` of each MoE layer -> x, what each MoE layer returns beside it, caches of all layers."""
        routed, out = [], []
        for i, block in enumerate(self.blocks):
            own = options[len(routed)] if isinstance(block.ffn, MoELayer) else {}
            x, r, cache = block(x, context, train=train, keys=fold(keys, i), cache=caches[i], **own)
            routed += [] if r is None else [r]
            out.append(cache)
        return x, (tuple(routed), tuple(out))


def stacked(m: ModelConfig, run: Run, windows: Windows, rules: Rules | None, rngs: nnx.Rngs, **place: bool) -> Period:
    """The periods of a run with their parameters stacked along a leading `layers` axis; `place` as of `Block`."""
    kinds, repeats = run

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return Period(m, kinds, windows, rules, nnx.Rngs(params=key), **place)

    period = create(jax.random.split(rngs.params(), repeats))
    for _, variable in nnx.to_flat_state(nnx.state(period, (nnx.Param, SelectionBias))):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return period


def in_order(routed: tuple[Routed, ...]) -> Routed:
    """m MoE layers a period, each [repeats, ...] -> [repeats * m, ...] in the order of the layers."""
    return jax.tree.map(lambda *s: jnp.stack(s, 1).reshape(-1, *s[0].shape[1:]), *routed)


def joined(parts: Sequence[Any]) -> Any:
    """Trees of arrays along their first axis, the layers; None without any."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if parts else None


def walk(part: "Transformer | Encoder", done: int) -> Iterator[tuple[int, Period, Run, slice]]:
    """The stacks of a decoder or encoder, each with its number, its run, and the places of its MoE layers, of which
    `done` came before."""
    for i, (stack, run) in enumerate(zip(part.stacks, part.runs, strict=True)):
        mine = slice(done, done + run[0].count("moe") * run[1])
        yield i, stack, run, mine
        done = mine.stop


def layer_places(runs: Sequence[Run], prefix: str) -> list[tuple[str, int]]:
    """Of each layer of an encoder or decoder, bottom first: where its leaves are, and its place in their first axis."""
    out: list[tuple[str, int]] = []
    for i, (kinds, repeats) in enumerate(runs):
        out += [(f"{prefix}stacks.{i}.blocks.{j}.", r) for r in range(repeats) for j in range(len(kinds))]
    return out


def moe_layers(m: ModelConfig) -> Iterator[tuple[str, slice]]:
    """The path of each MoE layer of a period in the module, and which of all MoE layers its repeats are."""
    done = 0
    for part, runs in (("encoder.", m.encoder_runs), ("", m.runs)):
        for i, (kinds, repeats) in enumerate(runs):
            blocks = [b for b, kind in enumerate(kinds) if kind == "moe"]
            end = done + len(blocks) * repeats
            for j, b in enumerate(blocks):
                yield f"{part}stacks.{i}.blocks.{b}.ffn", slice(done + j, end, len(blocks))
            done = end


def rows_so_far(before: jax.Array | None, stats: Stats | None) -> jax.Array | None:
    """Rows of the slots of a placement [layers, slots], with those of a call of the decoder, or of all layers."""
    if stats is None or stats.rows is None or before is None:
        return before if stats is None or stats.rows is None else stats.rows
    return before.at[-len(stats.rows) :].add(stats.rows)  # an encoder's layers come first, and ran once


def typed(model: "Transformer", *_: Any, cache: Cache | None = None, record: bool = False, **__: Any) -> Any:
    """Partition specs of what a call of a model returns; without rules it is on one device."""
    rules, none = model.rules, PartitionSpec()
    if rules is None:
        return none
    logits, rows = spec(rules.layout("batch", "length", "act_vocab")), spec(((), rules.batch, rules.length))
    inputs = rows if record and model.encoder is not None else None
    return Output._make((logits, none, None if cache is None else cached(model), rows if record else None, inputs))


def cached(model: "Transformer", *_: Any, **__: Any) -> Any:
    """Partition specs of a model's cache."""
    none = PartitionSpec()
    if model.rules is None:
        return none
    layers = tuple(spec(model.rules.layout(*cached_axes(model.m, repeats))) for _, repeats in model.runs)
    return Cache._make((layers, none, none, spec((model.rules.batch, ())), none))


class Encoder(nnx.Module):
    """Layers that see both ways, over the decoder's embedding or one of their own."""

    def __init__(self, m: ModelConfig, rules: Rules | None, rngs: nnx.Rngs):
        assert m.encoder is not None
        self.runs, V = tuple(m.encoder_runs), m.encoder.vocab
        self.table = None if V is None else param(rngs, (V, m.d_model), ("vocab", "embed"), fan_in(m.d_model))
        self.stacks = nnx.List(
            [stacked(m, run, (None,) * len(run[0]), rules, rngs, both_ways=True) for run in self.runs]
        )
        self.final_norm = Norm(m.norm, m.d_model, m.norm_eps) if m.final_norm else None
        self.relative = distance_biases(m, rngs)


def distance_biases(m: ModelConfig, rngs: nnx.Rngs) -> nnx.Param | None:
    """The biases of distances of all layers."""
    if m.positions != "relative":
        return None
    return param(rngs, (m.distance_buckets, m.heads), ("bias", "heads"), fan_in(m.d_model))


class Transformer(nnx.Module):
    """A causal language model; with `model.encoder` it also reads what that makes of another sequence.

    Args:
        m: the model's config.
        rules: logical axis -> mesh axis; calls then need `jax.set_mesh`. None: no sharding at all.
        rngs: `nnx.Rngs(params=seed)`; only parameters use it, all other keys are passed to the call.
    Raises:
        ConfigError: settings that contradict one another, with the remedy.
    """

    def __init__(self, m: ModelConfig, *, rules: Rules | None = None, rngs: nnx.Rngs):
        config.require(m, "model")
        self.m, self.rules = m, rules
        self.runs = tuple(m.runs)
        self.embedding = Embedding(m, rules, rngs)
        runs = zip(self.runs, m.run_windows, strict=True)
        self.stacks = nnx.List(
            [stacked(m, run, windows, rules, rngs, reads=m.encoder is not None) for run, windows in runs]
        )
        self.final_norm = Norm(m.norm, m.d_model, m.norm_eps) if m.final_norm else None
        self.relative = distance_biases(m, rngs)
        self.encoder = None if m.encoder is None else Encoder(m, rules, rngs)

    @any_axes(typed)
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
        key: Keys = None,
        cache: Cache | None = None,
        prefill: bool = False,
        capacity_factor: float | Sequence[float | None] | None = FROM_CONFIG,
        top_k: int | Sequence[int | None] | None = None,
        replay: jax.Array | None = None,
        record: bool = False,
        balanced: bool = False,
        schedule: Schedule | None = None,
        inputs: jax.Array | None = None,
        input_segments: jax.Array | None = None,
        input_positions: jax.Array | None = None,
    ) -> Output:
        """tokens [B, L] int32 -> logits [B, L, V] float32, routing statistics, cache.

        Args:
            segments: [B, L] int32, tokens attend within their segment; 0 is padding. Default: all ones.
            positions: [B, L] int32. Default: 0, 1, 2, ... With a cache they count from each row's first token and
                cannot be given; segments then only tell padding from tokens. Relative ones are always of the row.
            train: dropout, noise and the training capacity; needs `key`, one or [B], where the config asks for noise.
            cache: from `empty_cache`; the call appends its L tokens. Logits are NaN where its places do not suffice.
            prefill: nothing lies in the cache yet (else NaN), and the logits of the last token alone are asked for,
                [B, 1, V].
            capacity_factor: of every MoE layer, or a list with one for each; default the config's for training or
                evaluation, None is dropless. With a list the layers are unrolled.
            top_k: experts per token, likewise; default the config's.
            replay: [layers, B, L, K] int32, `record.expert` of an earlier call: tokens go where they went then.
            record: also return where every token went.
            balanced: the tokens of every argument are in the order of `sequence.balanced`, and so are the results:
                where rows are split, logits then need not be moved back.
            schedule: how the rows pass through the stages of a pipeline; without one, layers are brought to all stages.
            inputs: [B, M] int32, what the encoder reads, with segments and positions of their own; a token attends to
                the inputs of its segment. With a cache in its first call alone, segments telling padding from tokens.
        Raises:
            ValueError: rows too long, or that do not split over the mesh; a cache where they are split; inputs missing,
                or without an encoder.
        """
        B, L = tokens.shape
        if L > self.m.max_length:
            raise ValueError(f"{L} tokens exceed model.max_length={self.m.max_length}")
        if schedule is not None and (record or replay is not None or cache is not None):
            raise ValueError("a pipeline keeps no record, replay or cache: call without a schedule")
        if cache is not None and positions is not None:
            raise ValueError("positions cannot be given with a cache, which counts them: leave them out")
        if prefill and cache is None:
            raise ValueError("prefill fills a cache, and none is given: pass cache=model.empty_cache(...)")
        if self.encoder is not None and (schedule is not None or replay is not None):
            raise ValueError("a model with an encoder has no replay or schedule: leave them out")
        if self.encoder is None and inputs is not None:
            raise ValueError("inputs are given, and a model without an encoder reads none: leave them out")
        has_read = cache is not None and cache.source is not None
        if self.encoder is not None and has_read and inputs is not None:
            raise ValueError("inputs are given, and the cache holds what the encoder has read: leave them out")
        if self.encoder is not None and not has_read and inputs is None:
            raise ValueError("inputs are missing, which the encoder reads: pass inputs=, token ids [B, M]")
        n = self.shards(L, cache)
        order = jnp.asarray(sequence.places(L, n))  # [L]
        turned = 1 if balanced else n  # shards for which the order of the tokens is still to be changed
        tokens = sequence.ordered(tokens, self.rules, turned)
        given = segments, positions
        segments, positions = (None if a is None else sequence.ordered(a, self.rules, turned) for a in given)
        replay = None if replay is None else sequence.balanced(replay, turned, 2)
        segments = jnp.ones((B, L), jnp.int32) if segments is None else segments
        if cache is None:
            positions = jnp.broadcast_to(order, (B, L)) if positions is None else positions
            context = Context(positions, segments, segments > 0, tokens, None, order if n > 1 else None)
        else:
            context = self.cached_context(cache, segments, tokens, prefill)
        keys = row_keys(key if train else None, B)
        options = self.options(capacity_factor, top_k, record)
        routed, layers, done, read = [], [], 0, []
        if self.encoder is not None:
            done = self.m.encoder_kinds.count("moe")
            if inputs is not None:
                if cache is not None and input_segments is not None:
                    input_segments = (input_segments > 0).astype(jnp.int32)
                given = inputs, input_segments, input_positions
                source, read = self.encode(*given, fold(keys, ENCODER), train, options[:done])
            else:
                assert cache is not None and cache.source is not None
                source = Source(cache.source, None)
            context = context._replace(source=source)
        before = None if prefill else cache
        context = self.with_distances(context, self.relative, L if before is None else places(before), False, before)
        context = self.with_lengths(context, cache)

        outside = self.rules if self.rules is None or schedule is None else shared(self.rules, B)
        with jax.named_scope("embed"):
            x = dropout(
                self.embedding(tokens, context.positions, outside), self.m.dropout, fold(keys, 0), context.places
            )
        for i, stack, run, mine in walk(self, done):
            caches = None if cache is None else cache.layers[i]
            past = None if replay is None else replay[mine]
            if schedule is None:
                x, r, c = self.run(stack, run, x, context, fold(keys, 1 + i), caches, train, options[mine], past)
            else:
                x, r = self.pipeline(stack, run, x, context, fold(keys, 1 + i), train, options[mine], schedule)
                c = None
            routed += [] if r is None else [r]
            layers.append(c)
        with jax.named_scope("head"):
            x = x[:, -1:] if prefill else x
            x = x if self.final_norm is None else self.final_norm(x)
            logits = self.embedding.logits(x, outside)
        stats = joined([r.stats for r in (*read, *routed)])
        past, behind = (joined([r.record for r in part]) for part in (routed, read))
        if cache is not None:
            # A write past the last place would overwrite it in silence, and a prefill sees nothing of what was there
            # before: such a call returns no numbers.
            end = L if prefill else places(cache)
            logits = jnp.where(cache.filled + L <= end, logits, jnp.nan)
            seen = cache.source if context.source is None else context.source.segments
            cache = Cache(tuple(layers), cache.start, cache.filled + L, seen, rows_so_far(cache.rows, stats))
        past = jax.tree.map(lambda a: sequence.restored(a, turned, 2), past)
        return Output(sequence.restored(logits, turned), stats, cache, past, behind)

    def encode(
        self,
        inputs: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        keys: Keys,
        train: bool,
        options: Sequence[dict[str, Any]],
    ) -> tuple[Source, list[Routed]]:
        """inputs [B, M] int32 -> what the decoder reads, and what the MoE layers return beside it."""
        assert self.encoder is not None
        B, M = inputs.shape
        if not 0 < M <= self.m.max_length:
            raise ValueError(f"{M} inputs: give 1 to model.max_length={self.m.max_length}, of segment 0 where none are")
        if self.shards(M, None) > 1:
            why = "rules.length splits rows, and those of an encoder are whole"
            raise ValueError(f"{why}: build the model with rules.by_rows()")
        segments = jnp.ones((B, M), jnp.int32) if segments is None else segments
        positions = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (B, M)) if positions is None else positions
        context = Context(positions, segments, segments > 0, inputs, None)
        context = self.with_lengths(self.with_distances(context, self.encoder.relative, M, True))
        with jax.named_scope("embed"):
            x = self.embedding(inputs, positions, self.rules, self.encoder.table)
            x = dropout(x, self.m.dropout, fold(keys, 0))
        routed = []
        for i, stack, run, mine in walk(self.encoder, 0):
            x, r, _ = self.run(stack, run, x, context, fold(keys, 1 + i), None, train, options[mine], None)
            routed += [] if r is None else [r]
        x = x if self.encoder.final_norm is None else self.encoder.final_norm(x)
        return Source(segments, gathered(x, self.rules)), routed

    def with_distances(
        self, context: Context, table: nnx.Param | None, keys: int, both_ways: bool, cache: Cache | None = None
    ) -> Context:
        """The context of layers whose scores get the biases of distances to the places 0, 1, ... of the keys."""
        if table is None:
            return context
        queries = jnp.arange(context.tokens.shape[1]) + (0 if cache is None else cache.filled)
        behind = queries[:, None] - jnp.arange(keys)[None]  # [L, M]
        buckets = bucket(behind, both_ways, self.m.distance_buckets, self.m.distance_limit)
        return context._replace(distances=Distances(table[...], buckets, self.rules))

    def with_lengths(self, context: Context, cache: Cache | None = None) -> Context:
        """The context of layers whose positions are LongRoPE's, which has other rates in long rows.

        A row is long, with all that is packed in it, where one of its tokens stands behind the first `original_length`
        places of its sequence, as in transformers for a row alone: what shares its batch has no say, padding neither.
        With a cache it is long where the cache has room for that, from the row's first token on: the prompt and the
        new tokens asked for.
        Keys that are kept cannot be turned again, nor what later layers made of them, so that a row has one kind of
        rates from its first token to its last, and decoding past `original_length` changes nothing on the way.
        (`generate` of transformers begins with the short rates and reads the whole row again when it gets long.)
        """
        rope = self.m.rope
        if rope is None or rope.kind != "longrope":
            return context
        assert rope.original_length is not None
        if cache is not None:
            length = places(cache) - cache.start  # [B]
        else:
            length = jnp.where(context.mask, context.positions, 0).max(1) + 1
        return context._replace(long=length > rope.original_length)

    def shards(self, L: int, cache: Cache | None) -> int:
        """Shards of a row of L tokens over the current mesh."""
        n = sequence.shards(self.rules)
        if n > 1 and cache is not None:
            raise ValueError(
                f"rules.length splits rows over {n} shards, and a cache holds whole ones: "
                "build the model with rules.by_rows(), which puts more rows there instead"
            )
        if L % (2 * n) and n > 1:
            why = f"rows of {L} tokens do not split into two pieces for each of {n} shards"
            raise ValueError(f"{why}: use a multiple of {2 * n}, or the rules by_rows(), which leave them whole")
        if self.rules is not None and self.rules.residual:
            parts = prod(current_mesh().shape[a] for a in self.rules.length + self.rules.residual)
            if L % parts:
                why = f"rules.residual splits rows over {parts} shards, and {L} tokens do not divide"
                raise ValueError(f"{why}: use a multiple of {parts}, or the rules by_rows(), which leave rows whole")
        return n

    def options(self, capacity_factor: Any, top_k: Any, record: bool) -> list[dict[str, Any]]:
        """What each MoE layer is called with, bottom first."""
        count = (self.m.encoder_kinds + self.m.layer_kinds).count("moe")
        values = {"capacity_factor": capacity_factor, "top_k": top_k}
        for name, value in values.items():
            if not isinstance(value, list | tuple):
                values[name] = [value] * count
            elif len(value) != count:
                raise ValueError(f"{name} lists {len(value)} values for {count} MoE layers")
        if record and len(set(values["top_k"])) > 1:
            raise ValueError("record needs as many choices in every layer, and top_k differs: record without the list")
        pairs = zip(*values.values(), strict=True)
        return [{"capacity_factor": f, "top_k": k, "record": record} for f, k in pairs]

    def run(self, stack: Period, run: Run, x, context: Context, keys: Keys, caches, train: bool, options, replay):
        """One stack of equal periods: as a loop, unless it has one, `model.scan` is off, or the options differ.

        Returns x, what the MoE layers return beside it [repeats * m, ...] in the order of the layers, and the caches.
        """
        kinds, repeats = run
        m = kinds.count("moe")
        caches = (None,) * len(kinds) if caches is None else caches
        graph, params = nnx.split(stack)
        replay = None if replay is None else replay.reshape(repeats, m, *replay.shape[1:])

        def body(x, layer: tuple[Any, Any, Any, Any], own: Sequence[dict[str, Any]]):
            params, number, caches, replay = layer
            if replay is not None:
                own = [o | {"replay": replay[j]} for j, o in enumerate(own)]
            x, out = nnx.merge(graph, params)(x, context, fold(keys, number), caches, train, own)
            return between(x, self.rules), out

        loop = self.m.scan and repeats > 1 and all(o == options[0] for o in options)

        def step(own: Sequence[dict[str, Any]]) -> Any:
            def one(x, layer):
                return body(x, layer, own)

            if self.m.remat == "none":
                return one
            return jax.checkpoint(one, policy=REMAT[self.m.remat], prevent_cse=not loop)

        layers = (params, jnp.arange(repeats), caches, replay)
        if loop:
            x, (routed, caches) = jax.lax.scan(step(options[:m]), x, layers, length=repeats)
        elif repeats == 1:  # caches as they are: through a leading axis they would be copied at every token
            params, number, replay = jax.tree.map(lambda a: a[0], (params, layers[1], replay))
            x, (routed, caches) = step(options)(x, (params, number, caches, replay))
            routed = jax.tree.map(lambda a: a[None], routed)
        else:
            outs = []
            for n in range(repeats):
                x, out = step(options[n * m : (n + 1) * m])(x, jax.tree.map(lambda a, n=n: a[n], layers))
                outs.append(out)
            routed, caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
        if not routed:
            return x, None, caches
        return x, in_order(routed), caches

    def pipeline(
        self, stack: Period, run: Run, x, context: Context, keys: Keys, train: bool, options, schedule: Schedule
    ):
        """`run` with a stage of the mesh for each share of the periods, which microbatches of rows pass through."""
        assert self.rules is not None
        kinds, repeats = run
        m, rules = kinds.count("moe"), self.rules
        if repeats % (schedule.stages * schedule.rounds) or any(o != options[0] for o in options):
            why = f"{repeats} repeats of {kinds} are no equal shares of {schedule}, or their options differ"
            raise ValueError(f"{why}: give all MoE layers one capacity factor and top_k, or call without a schedule")
        graph, params = nnx.split(stack)

        variables = jax.tree.leaves(params, is_leaf=lambda v: isinstance(v, nnx.Variable))
        layouts = [*(rules.layout(*v.get_metadata("axes")[1:]) for v in variables), ()]

        def stage(layers: Any, turn: jax.Array, x: jax.Array, rows: tuple[Context, Keys]) -> tuple[jax.Array, Any]:
            here, own = rows
            here = here._replace(places=context.places, distances=context.distances)

            def one(x: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
                params, number = of_round(layer, turn, layouts)
                none = (None,) * len(kinds)
                x, (routed, _) = nnx.merge(graph, params)(x, here, fold(own, number), none, train, options[:m])
                return between(x, rules), routed

            again = (
                one if self.m.remat == "none" else jax.checkpoint(one, policy=REMAT[self.m.remat], prevent_cse=False)
            )
            return jax.lax.scan(again, x, layers)

        rows = split(
            (context._replace(places=None, distances=None), keys), schedule.microbatches, schedule.together, rules
        )
        x, routed = pipelined(stage, (params, jnp.arange(repeats)), layouts, x, rows, schedule, rules)
        return x, in_order(routed) if routed else None

    @any_axes(cached)
    def empty_cache(self, batch: int, places: int, lengths: jax.Array | None = None, width: int = 0) -> Cache:
        """A cache of `places` for a batch of prompts whose right ends are aligned at `width` tokens.

        Args:
            lengths: [B] int32 tokens of each prompt; default: all `width`.
        Raises:
            ConfigError: a router that needs the whole sequence.
        """
        config.require_decoding(self.m)
        if places > self.m.max_length:
            raise ValueError(f"a cache of {places} places exceeds model.max_length={self.m.max_length}")
        start = jnp.zeros((batch,), jnp.int32) if lengths is None else (width - lengths).astype(jnp.int32)
        layers = []
        for kinds, repeats in self.runs:
            one = empty_layer(self.m, batch, places, repeats)
            axes = cached_axes(self.m, repeats)
            one = jax.tree.map(lambda a, axes=axes: lay(a, self.rules, names=axes), one)
            layers.append((one,) * len(kinds))
        return Cache(tuple(layers), start, jnp.zeros((), jnp.int32))

    def cached_context(self, cache: Cache, segments: jax.Array, tokens: jax.Array, prefill: bool) -> Context:
        """Positions count from each row's own start; a decoding step sees the places filled so far."""
        L = tokens.shape[1]
        place = (cache.filled + jnp.arange(L))[None]  # [1,L]
        start = cache.start[:, None]  # [B,1]
        segments = jnp.where((place >= start) & (segments > 0), 1, 0)  # [B,L]
        slot = jnp.arange(places(cache))[None, None]  # [1,1,M]
        visible = None if prefill else (slot >= start[..., None]) & (slot <= place[..., None])  # [B,L,M]
        return Context(jnp.maximum(place - start, 0), segments, segments > 0, tokens, Cached(visible, cache.filled))

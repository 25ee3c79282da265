"""The mixture-of-experts layer: logits, routing, slots, dispatch, experts, combine."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import PartitionSpec

from moe_jax import balance, config, cost, exchange
from moe_jax.axes import Axes, Rules
from moe_jax.capacity import Slots, assign, capacity, unlimited
from moe_jax.config import MoEConfig
from moe_jax.dispatch import DISPATCHERS
from moe_jax.grouped import Weights
from moe_jax.layers.common import ACTIVATIONS, Keys, along_last, constant, dropout, fan_in, fold, lay, param, row_keys
from moe_jax.layers.ffn import FFN
from moe_jax.layers.ragged import over_mesh, ragged_experts
from moe_jax.routing import QUIET, Noise, Routing, check_mask, draw, in_slots, jittered, recorded, route
from moe_jax.rules import any_axes, by_hand, current_mesh, platform, spec
from moe_jax.schema import GATED
from moe_jax.sequence import Cut, shards

FROM_CONFIG: Any = "the config's capacity factor"
HIGHEST = jax.lax.Precision.HIGHEST  # of the router's products (Switch, section 2.4: selective precision)


def group_keys(rows: Keys, L: int, S: int) -> Keys:
    """Keys [G] of groups of S tokens from keys [B] of rows of L tokens, whatever rows share the call."""
    if rows is None or S == L:
        return rows
    if S > L:
        return rows[:: S // L]
    return jax.vmap(lambda k: jax.vmap(lambda j: jax.random.fold_in(k, j))(jnp.arange(L // S)))(rows).reshape(-1)


class SelectionBias(nnx.Variable):
    """Biases [E] on the scores that choose experts: no parameter, moved by `balance.updated_bias` after each step."""


class Replicas(nnx.Variable):
    """The slots [E, most] int32 that hold each expert, padded with -1: no parameter, set by `replicas.Placed`."""


class Draws(NamedTuple):
    """Random numbers of a call; None where nothing is drawn."""

    noise: Noise  # [G, S, ...], of the router and of the queues
    jitter: jax.Array | None  # [G, S, D], factors on the router's input
    groups: Keys  # [G]


SILENT = Draws(QUIET, None, None)


class Seen(NamedTuple):
    """What the statistics count."""

    routing: Routing
    slots: Slots
    mask: jax.Array


def plain(number: Any) -> Any:
    """A NumPy or JAX scalar as Python's number, which a config holds; anything else as it is."""
    return number.item() if isinstance(number, np.generic | np.ndarray | jax.Array) and number.ndim == 0 else number


def check_tokens(tokens: jax.Array | None, shape: tuple[int, int]) -> None:
    """Refuse what are no token ids of [B, L]."""
    if tokens is not None and (tokens.shape != shape or not jnp.issubdtype(tokens.dtype, jnp.integer)):
        B, L = shape
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give token ids, integers [B={B}, L={L}]")


def check_replay(replay: jax.Array | None, shape: tuple[int, int], moe: MoEConfig) -> None:
    """Refuse what `Record.expert` of such a call could not be. A compiled program sees no values."""
    if replay is None:
        return
    B, L, K = *shape, moe.experts if moe.router.kind == "expert_choice" else moe.top_k
    if replay.shape != (B, L, K) or not jnp.issubdtype(replay.dtype, jnp.integer):
        why = f"replay is {replay.dtype}{list(replay.shape)}, this call's integers [B={B}, L={L}, K={K}]"
        raise ValueError(f"{why}: record it on the same")
    if not isinstance(replay, Tracer) and replay.size:
        low, high = int(replay.min()), int(replay.max())
        if not -moe.experts <= low <= high < moe.experts:
            why = f"replay names experts {low} to {high}, and there are {moe.experts}"
            raise ValueError(f"{why}: record it on the same")


class Record(NamedTuple):
    """Where each token went. `expert` given back as `replay` sends it there again."""

    expert: jax.Array  # [B, L, K] int32, best first; negative where there was no choice (`routing.recorded`)
    gate: jax.Array  # [B, L, K] float32, weight of the expert's output; 0 where it was dropped


class Experts(nnx.Module):
    """E feed-forward networks side by side, on buffers [E, G, C, D]."""

    def __init__(
        self,
        moe: MoEConfig,
        kind: str,
        d_model: int,
        d_ff: int,
        rules: Rules | None,
        rngs: nnx.Rngs,
        *,
        biases: bool = False,
    ):
        self.kind, self.rules = kind, rules
        E, D, F = moe.experts, d_model, d_ff
        up, down = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
        self.w_gate = param(rngs, (E, D, F), up, fan_in(D)) if kind in GATED else None
        self.w_up = param(rngs, (E, D, F), up, fan_in(D))
        self.w_down = param(rngs, (E, F, D), down, fan_in(F))
        self.b_gate = constant(0.0, (E, F), ("experts", "expert_mlp")) if biases and kind in GATED else None
        self.b_up = constant(0.0, (E, F), ("experts", "expert_mlp")) if biases else None
        self.b_down = constant(0.0, (E, D), ("experts", "bias")) if biases else None

    @property
    def matrices(self) -> int:
        """Matrices of an expert."""
        return 2 if self.w_gate is None else 3

    def weights(self, dtype) -> Weights:
        """The parameters in `dtype`, for grouped products."""
        gate, *biases = (
            None if p is None else p[...].astype(dtype) for p in (self.w_gate, self.b_gate, self.b_up, self.b_down)
        )
        return Weights(gate, self.w_up[...].astype(dtype), self.w_down[...].astype(dtype), *biases)

    def times(self, x: jax.Array, w: nnx.Param, b: nnx.Param | None) -> jax.Array:
        """x [E, R, D] times w [E, D, F] -> [E, R, F]."""
        y = x @ w[...].astype(x.dtype)
        return y if b is None else y + b[...].astype(y.dtype)[:, None]

    def __call__(self, x: jax.Array, *, rate: float = 0.0, keys: Keys = None) -> jax.Array:
        """[E, G, C, D] -> [E, G, C, D], expert e working on row e; `keys` [G] draw the dropout of the hidden layer."""
        E, G, C, D = x.shape
        x = x.reshape(E, G * C, D)  # one batched product; the groups keep their sharding
        ups = [self.times(x, w, b) for w, b in ((self.w_gate, self.b_gate), (self.w_up, self.b_up)) if w is not None]
        h = ACTIVATIONS[self.kind](*ups)  # [E, G*C, F]
        if self.rules is not None:
            experts, groups, _, _ = self.rules.expert_major
            h = lay(h, self.rules, (experts, groups, self.rules.expert_mlp))
        if keys is not None and rate > 0.0:
            by_group = h.reshape(E, G, C, -1).swapaxes(0, 1)  # [G,E,C,F]
            h = dropout(by_group, rate, keys).swapaxes(0, 1).reshape(h.shape)
        return self.times(h, self.w_down, self.b_down).reshape(E, G, C, D)


def gated(y: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """What shared experts made of x [B, L, D], times sigmoid(x w) with w [D, 1], in float32 like the router."""
    gate = jax.nn.sigmoid(jnp.einsum("bld,dk->blk", x.astype(jnp.float32), w, precision=HIGHEST))  # [B,L,1]
    return (y.astype(jnp.float32) * gate).astype(y.dtype)


def typed(layer: "MoELayer", *_: Any, record: bool = False, **__: Any) -> Any:
    """Partition specs of what a call of a layer returns; without rules it is on one device."""
    if layer.rules is None:
        return PartitionSpec()
    rows = spec(layer.rules.layout("batch", "length", None))
    y = spec(layer.rules.layout("batch", "length", "act_embed"))
    return (y, PartitionSpec(), rows)[: 2 + record]


class MoELayer(nnx.Module):
    """A mixture of experts in place of a feed-forward layer (Shazeer et al. 2017; Lepikhin et al. 2020, section 2.2).

    Args:
        moe: experts, router, capacity and dispatch; `MoEConfig(experts=8, top_k=2, d_ff=1024)` is enough.
        d_model: width D of the tokens.
        d_ff: hidden width F of an expert where `moe.d_ff` is unset.
        ffn: `relu`, `gelu` (two matrices), `swiglu`, `geglu` or `clamped_swiglu` (three).
        biases: give experts and shared experts biases.
        rules: logical axis -> mesh axis; calls then need `jax.set_mesh`. None: no sharding at all.
        rngs: `nnx.Rngs(params=seed)`.
    Raises:
        ConfigError: settings that contradict one another, with the remedy.
    """

    def __init__(
        self,
        moe: MoEConfig,
        d_model: int,
        *,
        d_ff: int | None = None,
        ffn: str = "swiglu",
        biases: bool = False,
        rules: Rules | None = None,
        rngs: nnx.Rngs,
    ):
        config.require(moe, "moe")
        if rules is not None and (problems := config.check_exchange(moe, rules, "moe")):
            raise config.ConfigError(*problems)
        width = moe.d_ff or d_ff
        if width is None:
            raise config.ConfigError(config.Problem("moe.d_ff", "is unset", "give moe.d_ff or MoELayer(d_ff=...)"))
        if ffn not in ACTIVATIONS:
            raise config.ConfigError(config.Problem("ffn", f"is {ffn!r}", f"use one of {', '.join(ACTIVATIONS)}"))
        self.moe, self.rules, self.d_model = moe, rules, d_model
        self.gate_in, self.router, self.noise = self.gate(rngs, d_model)
        own = moe.router.bias and self.router is not None
        self.router_bias = constant(0.0, (moe.experts,), ("router_experts",)) if own else None
        biased = moe.bias_rate is not None
        self.bias = SelectionBias(jnp.zeros(moe.experts), axes=("router_experts",)) if biased else None
        self.experts = Experts(moe, ffn, d_model, width, rules, rngs, biases=biases)
        self.replicas: Replicas | None = None
        shared = moe.shared_width(width)
        self.shared = FFN(ffn, d_model, shared, rules, rngs, biases=biases) if shared else None
        gate = moe.shared_gate
        self.shared_gate = param(rngs, (d_model, 1), ("router_embed", "bias"), fan_in(d_model)) if gate else None

    @any_axes(typed)
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        train: bool = False,
        key: jax.Array | None = None,
        tokens: jax.Array | None = None,
        places: jax.Array | None = None,
        capacity_factor: float | None = FROM_CONFIG,
        top_k: int | None = None,
        replay: jax.Array | None = None,
        record: bool = False,
        balanced: bool = False,
    ):
        """x [B, L, D] -> (y [B, L, D], statistics of the routing), and with `record` a `Record` third.

        Args:
            mask: [B, L] bool, False for padding: such tokens take no slot, count in no statistic and come out as 0.
            train: use the training capacity, noise and dropout; needs `key` where the config asks for noise.
            key: random key of this layer and step, or one key a row, [B].
            tokens: [B, L] int32, token ids, for the hash router.
            places: [B, L] int32, of the tokens in their rows, by which they take the replicas of an expert in turn;
                default 0, 1, 2, ...
            capacity_factor: overrides the config's; None is dropless. What overflows is dropped and counted: the
                statistics' `routed - kept`; `overflow="error"` is enforced by the train loop, not here.
            top_k: overrides the config's number of experts per token.
            replay: [B, L, K] int32, experts in place of the router's choice, as `Record` has them; gates are computed
                from this call's logits.
            balanced: the tokens of a row are in the order of `sequence.balanced`, two pieces a shard; random numbers
                and groups are still those of the row's own order.
        Raises:
            ValueError: an x of another rank or width, a batch or a group size that does not fit the mesh or [B, L], a
                mask, tokens or replay of another shape or type, or training noise without a key.
            ConfigError: a `top_k` or capacity factor that the config's other settings do not admit.
            RuntimeError: rules without `jax.set_mesh`.
        """
        self.check_input(x)
        B, L, _ = x.shape
        top_k, capacity_factor = plain(top_k), plain(capacity_factor)
        moe = self.settings(train, top_k, capacity_factor)
        check_mask(mask, (B, L))
        check_tokens(tokens, (B, L))
        check_replay(replay, (B, L), moe)
        if capacity_factor is FROM_CONFIG:
            capacity_factor = moe.capacity_factor if train else moe.eval_capacity_factor
        cut = self.cut(B, L, capacity_factor, balanced)
        S, C = cut.size, capacity(moe, cut.size, capacity_factor)
        self.check_key(train, key)
        rows = row_keys(key if train else None, B)
        draws = self.draws(moe, rows, cut, self.group_size(B, L, capacity_factor))

        if mask is None:
            mask = jnp.ones((B, L), bool)
        else:  # whatever padding holds, even NaN, is neither routed nor multiplied
            x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
        h = self.lay_groups(cut.groups(x, self.width))  # [G,S,D]
        mask = cut.groups(mask)  # [G,S]
        dispatch = self.dispatch_for(moe, S, C)
        fallback = moe.overflow == "fallback" and C < S
        with jax.named_scope("routing"):
            ids, chosen = (None if a is None else cut.groups(a) for a in (tokens, replay))
            routing, slots = self.route(moe, h, mask, draws, C, dispatch, ids, chosen)
            limited = slots
            if fallback:
                slots = unlimited(routing, moe)
            seen = Seen(routing, slots, mask)
            if not cut.plain and (moe.sequence_loss or moe.balance_over == "sequence"):  # tokens of a row in a row
                seen = jax.tree.map(cut.whole, seen)
            stats = balance.statistics(seen.routing, seen.slots, moe, seen.mask, rows=B)
        if self.shared is not None:  # needs nothing of the exchange, which may overlap it
            with jax.named_scope("shared_experts"):
                drawn = cut.places() if moe.expert_dropout else None
                shared = self.shared(x, rate=moe.expert_dropout, keys=fold(rows, 2), places=drawn)
                if self.shared_gate is not None:
                    shared = gated(shared, x, self.shared_gate[...])
                if self.shared.b_down is not None:  # which padding would come out as
                    shared = jnp.where(cut.whole(mask)[..., None], shared, jnp.zeros((), shared.dtype))
        sent = routing
        if self.replicas is not None:
            with jax.named_scope("replicas"):
                sent = self.in_slots(routing, cut, places)
                rows_of = balance.count_experts(sent.expert, slots.kept, sent.prob.shape[-1])
                stats = stats._replace(rows=rows_of)
        if fallback:
            y = self.with_fallback(h, sent, limited, slots, C, dispatch)
        elif dispatch == "ragged":
            y = self.ragged(h, sent, slots, C)
        else:
            y = self.buffered(h, sent, slots, C, dispatch, fold(draws.groups, 1))
        y = cut.whole(self.lay_groups(y), self.width)  # [B,L,D]
        y = y if self.shared is None else y + shared
        y = lay(y, self.rules, names=("batch", "length", "act_embed"))
        if not record:
            return y, stats
        return y, stats, Record(cut.whole(recorded(routing)), cut.whole(slots.gate))

    def settings(self, train: bool, top_k: int | None, capacity_factor: Any) -> MoEConfig:
        """The config of a call, with what it overrides.

        Raises:
            ConfigError: a `top_k` or capacity factor that the config's other settings do not admit.
        """
        moe = self.moe if top_k is None else dataclasses.replace(self.moe, top_k=top_k)
        given = {} if capacity_factor is FROM_CONFIG else {"eval_capacity_factor": capacity_factor}
        if top_k is not None or given:  # one gate of value 1 teaches the router nothing, which evaluation does not ask
            config.require(dataclasses.replace(moe, **given), "moe", learns=train)
        return moe

    def dispatch_for(self, moe: MoEConfig, S: int, C: int) -> str:
        """The dispatcher of a call with groups of S tokens; `auto` asks the cost model."""
        F, matrices = self.experts.w_down.shape[1], self.experts.matrices
        return cost.settle(platform(), moe, group=S, slots=C, d_ff=F, matrices=matrices).dispatch

    def with_fallback(
        self, tokens: jax.Array, routing: Routing, limited: Slots, everyone: Slots, C: int, dispatch: str
    ) -> jax.Array:
        """tokens [G, S, D] -> [G, S, D] through bounded buffers, or dropless where any of them would overflow.

        One predicate over all groups, so that every device takes the same branch. The dropless branch is recomputed in
        the backward pass: a conditional saves the residuals of both its branches.
        """
        overflow = jnp.any(routing.valid & ~limited.kept)

        def exact() -> jax.Array:
            return jax.checkpoint(lambda t, r, s: self.ragged(t, r, s, t.shape[1]))(tokens, routing, everyone)

        def fast() -> jax.Array:
            return self.buffered(tokens, routing, limited, C, dispatch, None)

        return jax.lax.cond(overflow, exact, fast)

    def buffered(
        self, tokens: jax.Array, routing: Routing, slots: Slots, C: int, dispatch: str, keys: Keys
    ) -> jax.Array:
        """tokens [G, S, D] -> [G, S, D] through buffers of C slots an expert and group."""
        make_plan, move, combine = self.dispatcher(dispatch, C, tokens.dtype)
        with jax.named_scope("dispatch"):
            plan = make_plan(routing, slots)
            buffers = self.exchange(move(tokens, plan), to_experts=True)  # [E,G,C,D]
            buffers = checkpoint_name(buffers, "dispatched")
            if self.rules is not None and self.rules.act_exchange:  # the shares of the tensor shards are joined here
                buffers = lay(buffers, self.rules, (*self.rules.expert_major[:3], self.width))
        with jax.named_scope("experts"):
            out = self.experts(buffers, rate=self.moe.expert_dropout, keys=keys)
        with jax.named_scope("combine"):
            out = checkpoint_name(self.exchange(out, to_experts=False), "expert_out")
            return combine(out, plan)

    def ragged(self, tokens: jax.Array, routing: Routing, slots: Slots, C: int) -> jax.Array:
        """tokens [G, S, D] -> [G, S, D] through as many rows as there are kept choices."""
        weights, kind = self.experts.weights(tokens.dtype), self.experts.kind
        if self.rules is None:
            return ragged_experts(tokens, routing, slots, weights, C, kind)
        return over_mesh(self.rules, C, kind, self.moe.exchange)(tokens, routing, slots, weights)

    def gate(self, rngs: nnx.Rngs, D: int) -> tuple[nnx.Param | None, nnx.Param | None, nnx.Param | None]:
        """Parameters that make the logits: the first matrix of an MLP gate, the router, the scale of learned noise."""
        router, E = self.moe.router, self.moe.experts
        if router.kind == "hash":
            return None, None, None
        gate_in, width, axis = None, D, "router_embed"
        if router.gate == "mlp":
            width, axis = router.gate_width or D, "router_mlp"
            gate_in = param(rngs, (D, width), ("router_embed", axis), fan_in(D))
        # A small router starts near uniform (Switch, section 2.4: smaller initialisation trains more stably).
        out = param(rngs, (width, E), (axis, "router_experts"), 0.1 * fan_in(width))
        noisy = router.kind == "noisy_topk"  # begins with equal noise for all (Shazeer et al. 2017, appendix A)
        return gate_in, out, constant(0.0, (D, E), ("router_embed", "router_experts")) if noisy else None

    def scores(self, h: jax.Array, jitter: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Router logits and, for noisy_topk, the standard deviation of their noise: [G, S, D] -> [G, S, E] float32."""
        h = h.astype(jnp.float32)
        if self.router is None:
            return jnp.zeros((*h.shape[:-1], self.moe.experts)), None
        if jitter is not None:
            h = h * jitter
        spread = None
        if self.noise is not None:
            spread = jax.nn.softplus(jnp.einsum("gsd,de->gse", h, self.noise[...], precision=HIGHEST))
        if self.gate_in is not None:
            h = jax.nn.gelu(jnp.einsum("gsd,dw->gsw", h, self.gate_in[...], precision=HIGHEST))
        logits = jnp.einsum("gsd,de->gse", h, self.router[...], precision=HIGHEST)
        return logits if self.router_bias is None else logits + along_last(self.router_bias[...], logits), spread

    def route(
        self, moe: MoEConfig, h: jax.Array, mask: jax.Array, draws: Draws, C: int, dispatch: str, ids=None, chosen=None
    ) -> tuple[Routing, Slots]:
        """Route and queue each group [G, S, D]; all that follows the logits is local to a group."""
        logits, spread = self.scores(h, draws.jitter)

        def local(bias, logits, mask, noise, spread, ids, chosen) -> tuple[Routing, Slots]:
            given = {"bias": bias, "spread": spread, "ids": ids, "slots": C, "chosen": chosen}
            routing = route(logits, moe, mask, noise, **given)
            if dispatch == "ragged" and C == logits.shape[1]:  # all are kept, and nobody asks for places
                return routing, unlimited(routing, moe)
            return routing, assign(routing, moe, C, noise)

        bias = None if self.bias is None else self.bias[...]
        return self.per_group(local, shared=1)(bias, logits, mask, draws.noise, spread, ids, chosen)

    def in_slots(self, routing: Routing, cut: Cut, places: jax.Array | None) -> Routing:
        """Slots in place of experts. Neighbours in a row take turns, and so do rows at the same place, as in a step of
        decoding."""
        assert self.replicas is not None
        row = jnp.arange(cut.rows, dtype=jnp.int32)[:, None]
        place = jnp.arange(cut.length, dtype=jnp.int32)[None] if places is None else places.astype(jnp.int32)
        turn, slots = cut.groups(row + place), self.experts.w_down.shape[0]
        return self.per_group(lambda table, r, t: in_slots(r, table, t, slots), shared=1)(
            self.replicas[...], routing, turn
        )

    def draws(self, moe: MoEConfig, rows: Keys, cut: Cut, S: int) -> Draws:
        """The random numbers of a call from keys of its rows [B]: those of one device, whatever the mesh.

        Args:
            S: tokens of a group on one device, for which they are drawn.
        """
        if rows is None:
            return SILENT
        keys, alike = group_keys(rows, cut.length, S), S == cut.size
        assert keys is not None
        groups = cut.keys(keys) if alike else None
        if groups is None and moe.expert_dropout:
            why = f"groups of {cut.size} tokens, not of {S} as on one device: dropout inside experts would draw others"
            raise ValueError(f"a split length makes {why}; set moe.capacity_factor or expert_dropout=0")

        def drawn(f: Callable, number: int) -> Any:
            out = jax.vmap(f)(fold(keys if groups is None else groups, number))
            return out if alike else jax.tree.map(cut.regroup, out)

        noise, jitter, D = drawn(lambda k: draw(k, moe, (S, moe.experts)), 0), moe.router.jitter, self.d_model
        return Draws(noise, drawn(lambda k: jittered(jnp.ones((S, D)), jitter, k), 3) if jitter else None, groups)

    def per_group(self, f: Callable, shared: int = 0) -> Callable:
        """`f` over shards of groups. The compiler would gather the groups for a top-k or a sort.

        Args:
            shared: leading arguments that every group needs whole.
        """
        if self.rules is None:
            return f
        current_mesh()
        groups: PartitionSpec = spec((self.rules.groups,))

        def over(*args: Any) -> Any:
            specs = tuple(PartitionSpec() if i < shared else groups for i in range(len(args)))
            return by_hand(f, in_specs=specs, out_specs=groups)(*args)

        return over

    def dispatcher(self, name: str, slots: int, dtype) -> tuple[Callable, Callable, Callable]:
        """Plan, dispatch and combine of a dispatcher, over shards of groups where they gather or scatter."""
        chosen = DISPATCHERS[name]

        def plan(routing: Routing, places: Slots) -> Any:
            return chosen.plan(routing, places, slots, dtype)

        if self.rules is None or not chosen.local:
            return plan, chosen.dispatch, chosen.combine
        groups, buffers = spec((self.rules.groups,)), spec(self.rules.token_major)
        tokens = spec((self.rules.groups, (), self.rules.travelling))
        return (
            self.per_group(plan),
            by_hand(chosen.dispatch, in_specs=(tokens, groups), out_specs=buffers),
            by_hand(chosen.combine, in_specs=(buffers, groups), out_specs=tokens),
        )

    def exchange(self, buffers: jax.Array, *, to_experts: bool) -> jax.Array:
        """Move buffers [E, G, C, D] between their home groups and their experts: one all-to-all.

        Both layouts are stated: with only one of them the compiler gathers instead.
        """
        if self.rules is None:
            return buffers
        layouts = (self.rules.token_major, self.rules.expert_major)
        begin, end = layouts if to_experts else reversed(layouts)
        buffers = lay(buffers, self.rules, begin)
        if self.moe.exchange in ("shard_map", "hierarchical"):
            buffers = exchange.move(buffers, self.rules, self.moe.exchange, home=not to_experts)
        return lay(buffers, self.rules, end)

    @property
    def width(self) -> Axes:
        """The mesh axes of D."""
        return () if self.rules is None else self.rules.act_embed

    def lay_groups(self, x: jax.Array) -> jax.Array:
        """x [G, S, D] where its groups are."""
        return x if self.rules is None else lay(x, self.rules, (self.rules.groups, (), self.width))

    def cut(self, B: int, L: int, factor: float | None, balanced: bool) -> Cut:
        """The groups of a call: those of one device, or smaller ones where their size changes no result."""
        n, S = shards(self.rules), self.group_size(B, L, factor)
        pieces = 2 * n if balanced and n > 1 else n
        if L % pieces:
            raise ValueError(f"rows of {L} tokens do not split into {pieces} pieces for {n} shards of the length")
        if n > 1 and cost.never_full(self.moe, factor):
            S = cost.dropless_group(L // pieces)
        elif n > 1 and (L // pieces) % S:
            why = (
                f"groups of {S} tokens do not fit into the {pieces} pieces of {L // pieces} tokens that {n} shards make"
            )
            raise ValueError(f"{why} of a row: set moe.group_size to a divisor of {L // pieces}")
        self.check_shards(B, L, S)
        return Cut(self.rules, B, L, S, n if balanced else 1)

    def group_size(self, B: int, L: int, factor: float | None) -> int:
        """Tokens S of a group for a call on [B, L] on one device."""
        S = cost.group_size(self.moe, factor, L, self.experts.w_down.shape[1], self.experts.matrices)
        if (L % S and S % L) or B * L % S:
            raise ValueError(
                f"moe.group_size={S} fits no [B={B}, L={L}]: use a divisor of L, or a multiple dividing B*L"
            )
        return S

    def check_input(self, x: jax.Array) -> None:
        if x.ndim != 3:
            remedy = "reshape it; one sequence is x[None]" if x.ndim == 2 else "reshape it"
            raise ValueError(
                f"x has the shape {list(x.shape)}, and a MoELayer takes [B, L, D={self.d_model}]: {remedy}"
            )
        if x.size == 0:
            raise ValueError(f"x has the shape {list(x.shape)} and holds no token: give a token or more")
        if x.shape[-1] != self.d_model:
            raise ValueError(
                f"x {list(x.shape)} has tokens of width {x.shape[-1]}, and this MoELayer was built with d_model="
                f"{self.d_model}: project x to that width, or build the layer with d_model={x.shape[-1]}"
            )

    def check_shards(self, B: int, L: int, S: int) -> None:
        """Rows and groups must divide over the token shards of the current mesh."""
        if self.rules is None:
            return
        sizes = {axis: n for axis, n in current_mesh().shape.items() if axis in self.rules.batch and n > 1}
        count, groups = math.prod(sizes.values()), B * L // S
        over = f"does not divide over {count} token shards ({' x '.join(f'{a}={n}' for a, n in sizes.items())})"
        if B % count:
            raise ValueError(f"a batch of {B} {over}: use a multiple of {count}, or smaller mesh axes")
        if groups % count:
            raise ValueError(f"[B={B}, L={L}] makes {groups} groups of {S} tokens, which {over}: lower moe.group_size")

    def check_key(self, train: bool, key: jax.Array | None) -> None:
        moe = self.moe
        noisy = (
            moe.router.second != "always"
            or moe.priority == "random"
            or moe.router.kind in ("noisy_topk", "sparsemixer")
        )
        noisy = noisy or moe.router.jitter > 0 or moe.expert_dropout > 0
        if train and noisy and key is None:
            raise ValueError("this layer's config draws noise in training: pass key=jax.random.key(...)")

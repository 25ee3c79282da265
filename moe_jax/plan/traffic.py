"""What a step moves between devices: each kind of collective with its mesh axes, count and bytes."""

from typing import NamedTuple

from moe_jax.axes import WIDTHS, Axes
from moe_jax.pattern import STAGE
from moe_jax.plan.leaves import ADDED, LOOKED_UP, Leaf
from moe_jax.plan.work import Step

PASSES = {"all-to-all": 1, "all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


class Move(NamedTuple):
    """One kind of collective of a step."""

    what: str
    op: str
    axes: Axes  # mesh axes of more than one device
    devices: int  # of its group
    count: int  # a step
    bytes: int  # of the array on a device: both sides of an all-to-all or all-reduce, an all-gather's result,
    # a reduce-scatter's input
    hidden: bool  # whether the compiler can run it beside computation: nothing waits for it at once

    @property
    def sent(self) -> float:
        """Bytes that leave a device each time."""
        if self.op == "collective-permute":
            return self.bytes
        return PASSES[self.op] * self.bytes * (self.devices - 1) / self.devices


def live(step: Step, axes: Axes) -> Axes:
    """The axes that hold more than one device."""
    return tuple(a for a in dict.fromkeys(axes) if step.cfg.mesh.over((a,)) > 1)


def move(step: Step, what: str, op: str, axes: Axes, count: float, size: float, hidden: bool = False) -> Move:
    axes = live(step, axes)
    return Move(what, op, axes, step.cfg.mesh.over(axes), round(count), round(size), hidden)


def traffic(step: Step) -> list[Move]:
    """All collectives of a train step that move something, the exchange first."""
    found = [move for stack in step.stacks for move in exchange(stack)]
    found += [*stages(step), *keys_and_values(step)]
    found += [move for stack in step.stacks for move in partial_sums(stack)]
    found += [*weights(step), *gradients(step)]
    return [m for m in found if m.devices > 1 and m.count and m.bytes]


def exchange_bytes(step: Step) -> float:
    """Bytes of the buffers that a device holds on either side of one exchange, f*K*T*D*b with capacity buffers."""
    return step.sent_rows * step.cfg.model.d_model * step.width / step.cfg.mesh.over(step.cfg.rules.travelling)


def exchange(step: Step) -> list[Move]:
    """Tokens to their experts and back: two all-to-alls forward, two backward, and two for each repeated forward pass
    unless the exchanged tensors are saved by name."""
    if step.cfg.model.moe is None:
        return []
    count = round(2 * (2 + step.exchanged_again) * step.moe_layers * step.turns)
    axes = step.cfg.rules.experts
    stages = [(a,) for a in axes] if step.cfg.model.moe.exchange == "hierarchical" else [axes]
    return [move(step, "exchange", "all-to-all", stage, count, exchange_bytes(step)) for stage in stages]


def stages(step: Step) -> list[Move]:
    """What the stages of a pipeline pass on, once a tick, and back with its gradient; and what they share.

    That is the rows of embedding and head, and with several rounds the layers, which are dealt out in another order
    than they are stored.
    """
    s, m, rules = step.schedule, step.cfg.model, step.cfg.rules
    if s is None:
        return []
    rows = step.tokens * m.d_model * step.width / step.over("act_embed", "residual")
    layers = sum(4 * leaf.shard(rules, step.cfg.mesh) for leaf in step.leaves if leaf.axes[0] == "layers")
    outside = ("all-to-all", 4) if step.shared else ("all-reduce", 2)
    return [
        move(step, "between stages", "collective-permute", (STAGE,), 2 * s.ticks, rows),
        move(step, "rows of embedding and head", outside[0], (STAGE,), outside[1], rows * s.microbatches),
        move(step, "layers of rounds", "all-to-all", (STAGE,), 2 * (s.rounds > 1), layers, True),
    ]


def keys_and_values(step: Step) -> list[Move]:
    """Keys and values of split sequences, gathered or passed round a ring, which moves as much; back as gradients."""
    m, axes = step.cfg.model, step.cfg.rules.length
    size = 2 * step.rows * step.cfg.data.length * step.key_heads * m.key_dim * step.width  # values as wide as keys
    hidden = m.attention_exchange == "ring"
    count = round(m.layers * step.turns)
    return [
        move(step, "keys and values", "all-gather", axes, count * step.passes("attn"), size, hidden),
        move(step, "keys and values", "reduce-scatter", axes, count, size, hidden),
    ]


def partial_sums(step: Step) -> list[Move]:
    """Sums over devices that hold slices of a product: heads, hidden widths and the vocabulary.

    Where rows are split between the layers, a sum of tokens is scattered, and the layers gather what they take.
    In the backward pass latent attention adds up where its heads begin: at the latents.
    """
    m, rules, latent = step.cfg.model, step.cfg.rules, step.cfg.model.latent
    row = m.d_model * step.width / step.over("act_embed")
    split = live(step, rules.residual)
    forward = step.passes("attn")  # one after each sub-layer, and one before it in the backward pass

    def added(what: str, axes: Axes, times: float) -> Move:
        op = "reduce-scatter" if split and set(live(step, axes)) <= set(split) else "all-reduce"
        return move(step, what, op, axes, round(times * step.turns), step.tokens * row)

    def last(kind: str) -> float:
        """Forward sums of the layers of a kind: periods are recomputed but for what they add up at their ends, unless
        a norm reads it."""
        ends = sum(repeats for kinds, repeats in m.runs if kinds[-1] == kind and m.norm_order == "pre")
        return m.layer_kinds.count(kind) * forward - ends * (forward - 1 - step.one_by_one)

    own = m.layers * (1 if step.encoder is None else 2)  # attentions: to what an encoder read too
    out = [
        added("attention sums", rules.act_heads, own * (forward + (latent is None or latent.query is None))),
        added("feed-forward sums", rules.act_mlp, last("dense") + m.layer_kinds.count("dense")),
    ]
    if latent is not None:
        size = step.tokens * latent.width * step.width / step.over("latent")
        out.append(move(step, "sums of latents", "all-reduce", rules.act_heads, round(m.layers * step.turns), size))
    if m.qk_norm == "all":  # a float32 sum of squares of queries and one of keys, and those of their gradients
        sums, size = round(own * (forward + 1) * step.turns), 2 * step.tokens * 4
        out.append(move(step, "norms over all heads", "all-reduce", rules.act_heads, sums, size))
    local = m.moe is not None and step.dispatch.dispatch == "ragged"  # experts are added up at the tokens
    if m.moe is not None and m.moe.shared_experts:  # forward together with such experts, but for biases in between
        together = local and not m.biased("ffn") and live(step, rules.act_mlp) == live(step, rules.expert_mlp)
        out.append(added("shared experts' sums", rules.act_mlp, step.moe_layers + (0 if together else last("moe"))))
    if local:
        out.append(added("expert sums", rules.expert_mlp, step.moe_layers + last("moe")))
    elif m.moe is not None:
        times = round(step.moe_layers * (2 + step.exchanged_again) * step.turns)
        out.append(move(step, "expert sums", "all-reduce", rules.expert_mlp, times, step.sent_rows * row))
    if step.encoder is not None:  # of the gradient at what the encoder made
        size = step.encoder.tokens * row
        out.append(move(step, "attention sums", "all-reduce", rules.act_heads, round(m.layers * step.turns), size))
    gathers = round((own + m.layers) * (forward + 1) * step.turns)
    out.append(move(step, "split rows", "all-gather", split, gathers, step.tokens * row))
    tables = step.table_tokens * m.d_model
    rows, sums = (4, step.width) if split else (step.width, 4)  # bytes each, before or after their cast
    heads = 0 if step.both_ways else step.table_passes
    op = "reduce-scatter" if split and set(live(step, rules.vocab)) <= set(split) else "all-reduce"
    return [
        *out,
        move(step, "embedding rows", op, rules.vocab, step.table_passes, tables * rows),
        move(step, "head sums", "all-reduce", rules.act_vocab, heads, tables * sums),
        move(step, "split rows of embedding and head", "all-gather", split, 2 * step.table_passes, tables * step.width),
    ]


def gathered(step: Step, leaf: Leaf) -> Axes:
    """Mesh axes that split the model width of a parameter: its products need that whole."""
    return tuple(a for n in leaf.axes if n in WIDTHS for a in getattr(step.cfg.rules, n))


def weights(step: Step) -> list[Move]:
    """Parameters that are split where their products need them whole are gathered for each pass over them."""
    out: dict[Axes, list[float]] = {}
    mesh = step.cfg.mesh
    for leaf in step.leaves:
        axes = live(step, gathered(step, leaf))
        if not axes:
            continue
        stacked = leaf.axes[0] == "layers"
        layers = leaf.shape[0] if stacked else 1
        passes = step.passes("attn") + 1 if leaf.component not in LOOKED_UP else 1
        size = one(step, leaf) * mesh.over(axes) * step.width
        entry = out.setdefault(axes, [0.0, 0.0])
        runs = passes * layers * (step.turns if stacked else step.table_passes)
        entry[0] += runs
        entry[1] += runs * size
    return [move(step, "weights", "all-gather", axes, n, total / n, True) for axes, (n, total) in out.items()]


def one(step: Step, leaf: Leaf) -> int:
    """Elements of a parameter on a device, of one layer where layers are stacked."""
    rules, mesh = step.cfg.rules, step.cfg.mesh
    here = leaf.shard(rules, mesh)
    return here * mesh.over(rules.layers) // leaf.shape[0] if leaf.axes[0] == "layers" else here


def summed_in(step: Step, leaf: Leaf) -> int:
    """Bytes of an element of a gradient on its way: those of a layer's matrices have the compute type, but on a CPU."""
    matrix = leaf.axes[0] == "layers" and leaf.component not in (*ADDED, "router")
    return step.width if matrix and step.platform != "cpu" else 4


def gradients(step: Step) -> list[Move]:
    """Gradients are added up over the token shards that hold the same parameter: scattered where it is split.

    In every pass over a layer: each microbatch of a loop and each tick of a pipeline has its own, also one without
    work; optimising, the TPU compiler moves them out of the ticks where a stage has a single layer. The compiler
    combines the all-reduces of a layer's gradients into one.
    """
    rules, mesh = step.cfg.rules, step.cfg.mesh
    scatter: dict[Axes, list[float]] = {}
    reduce: dict[Axes, dict[str, tuple[float, float]]] = {}
    for leaf in step.leaves:
        inner = live(step, tuple(a for a in gathered(step, leaf) if a in rules.tokens))
        stacked = leaf.axes[0] == "layers"
        adding = rules.tokens if stacked or not step.shared else (STAGE, *rules.tokens)
        outer = live(step, tuple(a for a in adding if a not in leaf.layout(rules)))
        runs = leaf.shape[0] * step.turns if stacked else step.table_passes
        if inner:
            entry = scatter.setdefault(inner, [0.0, 0.0])
            entry[0] += runs
            entry[1] += one(step, leaf) * summed_in(step, leaf) * mesh.over(inner) * runs
        if outer:
            name = leaf.block if stacked else "tables"
            _, so_far = reduce.setdefault(outer, {}).get(name, (runs, 0))
            reduce[outer][name] = runs, so_far + runs * one(step, leaf) * summed_in(step, leaf)
    found = [move(step, "gradients", "reduce-scatter", x, n, total / n, True) for x, (n, total) in scatter.items()]
    for axes, parts in reduce.items():
        count = sum(times for times, _ in parts.values())
        total = sum(size for _, size in parts.values())
        found.append(move(step, "gradients", "all-reduce", axes, count, total / count, True))
    return found

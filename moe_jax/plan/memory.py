"""Memory of one device at the peak of a train step, by kind.

The layers run in loops (`model.scan`), so that what each leaves for the backward pass is stacked. Unrolled layers, also
a single period, leave the compiler free to keep less with `remat=none`: there the plan is an upper bound.
"""

from collections import Counter
from dataclasses import replace
from math import prod
from typing import NamedTuple

from moe_jax.axes import MANY, WIDTHS
from moe_jax.cost import matrices
from moe_jax.pattern import seen_blocks
from moe_jax.plan.leaves import ADDED, Leaf, expert_width
from moe_jax.plan.work import Step
from moe_jax.schema import MeshConfig

LANES = 128  # numbers of a vector of a TPU
FACTORED = 128  # optax.adafactor: least second-largest dimension of a parameter whose second moment is factored


def optimizer_elements(kind: str, leaf: Leaf, step: Step) -> int:
    """Elements of optimizer state that a device holds for one parameter, all float32."""
    rules, mesh = step.cfg.rules, step.cfg.mesh
    if kind == "adafactor":
        order = sorted(range(len(leaf.shape)), key=lambda i: leaf.shape[i])  # stable, as numpy's sort of short arrays
        if len(order) < 2 or leaf.shape[order[-2]] < FACTORED:
            return leaf.shard(rules, mesh) + 2
        shards = [mesh.over(getattr(rules, a)) for a in leaf.axes]
        local = [n // s for n, s in zip(leaf.shape, shards, strict=True)]
        return prod(local) // local[order[-1]] + prod(local) // local[order[-2]] + 1
    moments = 1 if kind == "muon" and leaf.is_matrix else 2
    return moments * leaf.shard(rules, mesh)


def state(step: Step) -> dict[str, int]:
    """Bytes of what lives from step to step."""
    rules, mesh, kind = step.cfg.rules, step.cfg.mesh, step.cfg.train.optimizer.kind
    return {
        "parameters": sum(4 * leaf.shard(rules, mesh) for leaf in step.leaves) + 4 * step.count.bias,
        "optimizer": sum(4 * optimizer_elements(kind, leaf, step) for leaf in step.leaves),
    }


def gradients(step: Step) -> int:
    """Bytes of the gradients, float32 like the parameters and split like them."""
    return sum(4 * leaf.shard(step.cfg.rules, step.cfg.mesh) for leaf in step.leaves)


def devices_at_least(step: Step, room: int, *, with_gradients: bool = False) -> int:
    """Devices of `room` bytes that hold the state together, and the gradients if asked, with nothing of it twice."""
    one = Step(replace(step.cfg, mesh=MeshConfig()), step.platform)
    held = sum(state(one).values()) + (gradients(one) if with_gradients else 0)
    return -(-held // room)


def cache(step: Step, length: int | None = None) -> int:
    """Bytes of keys and values that generation holds for the batch, at `length` places a sequence."""
    m = step.cfg.model
    rows = max(1, step.cfg.data.batch // step.shards)  # decoding splits the batch over all token axes
    width = m.cached_width if m.latent else m.cached_width // step.over("kv_heads")
    tokens = (length or step.cfg.data.length) + step.cfg.inputs  # also what an encoder read
    return m.layers * rows * tokens * width * step.width


# Activations


def tiled(rows: int, columns: int, platform: str) -> int:
    """Elements that a matrix takes: a TPU keeps tiles of 8 x 128 and lays the better dimension along the 128."""
    if platform != "tpu":
        return rows * columns
    return min(-(-rows // 8) * 8 * (-(-columns // 128) * 128), -(-rows // 128) * 128 * (-(-columns // 8) * 8))


def summed(step: Step) -> int:
    """Bytes that a kernel of attention writes beside its output: the logarithm of each query's sum, float32, which
    splash attention repeats over a vector of a TPU; that of GPUs takes the keys and values of every query head."""
    m, T = step.cfg.model, step.tokens
    heads = m.heads // step.over("act_heads")
    if step.platform == "tpu":
        return T * heads * LANES * 4
    return T * heads * (4 + (m.key_dim + m.value_dim) * step.width * (m.resolved_kv_heads < m.heads))


def probabilities(step: Step) -> int:
    """Elements of a layer's attention probabilities, which a kernel never holds."""
    if step.attention().kernel == "fused":
        return 0
    heads = step.cfg.model.heads // step.over("act_heads")
    L = step.cfg.data.length
    blocks = [(L, L)] if step.both_ways else seen_blocks(L, step.cfg.model.window)
    return step.rows * heads * sum(tiled(*block, step.platform) for block in blocks) // step.over("length")


def distances(step: Step) -> int:
    """Bytes of the biases of a layer's scores by distance, and of their gradient before it is added up."""
    m, L = step.cfg.model, step.cfg.data.length
    return 2 * 4 * m.heads // step.over("act_heads") * tiled(L, L, step.platform) if m.positions == "relative" else 0


def reading(step: Step) -> tuple[int, int]:
    """Elements of the probabilities of a layer's attention to what an encoder read, and of the keys and values."""
    m = step.cfg.model
    if step.encoder is None:
        return 0, 0
    fused = step.attention("reading").kernel == "fused"
    square = 0 if fused else tiled(step.cfg.data.length, step.cfg.inputs, step.platform)
    keys = step.encoder.tokens * step.key_heads * (m.key_dim + m.value_dim)
    return step.rows * m.heads // step.over("act_heads") * square, keys


class Widths(NamedTuple):
    """Elements of a layer's activations on one device."""

    tokens: int  # [T, D]
    stream: int  # the same between attention and feed-forward layers
    query: int  # [T, H*N]
    key: int  # [T, J*N]
    value: int  # [T, J*N], of the values' width
    mixed: int  # [T, H*N], of the values' width: what attention makes
    latents: int  # [T, Q + C], behind their norms
    scores: int  # probabilities
    hidden: int  # [T, F] of the dense feed-forward layer or of the shared experts
    gated: int  # [T, D] of the shared experts in front of their gate
    rows: int  # [R, D] of the exchange
    expert_hidden: int  # [R, F] of the experts
    mask: int  # [G, S, E, C] of one-hot dispatch


def widths(step: Step, kind: str) -> Widths:
    """The sizes of a dense or MoE layer's activations."""
    m, T, moe = step.cfg.model, step.tokens, step.cfg.model.moe
    tokens, heads = T * m.d_model // step.over("act_embed"), m.heads // step.over("act_heads")
    stream = tokens // step.over("residual")
    attention = (
        T * heads * m.key_dim,
        T * step.key_heads * m.key_dim,
        T * step.key_heads * m.value_dim,
        T * heads * m.value_dim,
        T * (m.latent.width - m.latent.rotary) // step.over("latent") if m.latent else 0,
        probabilities(step),
    )
    if kind == "dense" or moe is None:
        return Widths(tokens, stream, *attention, T * m.d_ff // step.over("act_mlp"), 0, 0, 0, 0)
    R, F = step.sent_rows, expert_width(m)
    shared = T * moe.shared_width(F) // step.over("act_mlp")
    one_hot = step.groups * moe.experts * tiled(step.group, step.slots, step.platform)
    mask = one_hot if step.dispatch.dispatch == "einsum" else 0
    rows = R * m.d_model // step.cfg.mesh.over(step.cfg.rules.travelling)
    gated = tokens if moe.shared_gate else 0
    return Widths(tokens, stream, *attention, shared, gated, rows, R * F // step.over("expert_mlp"), mask)


def nonlinear(ffn: str) -> tuple[int, int]:
    """Hidden arrays that the backward pass of a feed-forward network needs: in the compute type, and as bytes.

    All keep what each of their factors was made from, and their output; ReLU this, and where it was positive.
    """
    return {"relu": (1, 1), "gelu": (6, 0), "swiglu": (6, 0), "geglu": (8, 0), "clamped_swiglu": (9, 0)}[ffn]


def residuals(step: Step, kind: str) -> int:
    """Bytes that the backward pass of one layer needs, all that `remat=none` saves."""
    w, b, wide = widths(step, kind), step.width, 4
    full, flags = nonlinear(step.cfg.model.ffn)
    # Two a norm, also of latents, and the router's input, float32.
    norms = (4 * w.stream + 2 * w.latents + (w.tokens if kind == "moe" else 0)) * wide
    products = (w.tokens + w.latents + w.mixed) * b  # what the projections multiply
    L = step.cfg.data.length
    # Each block of queries keeps the keys and values that it sees.
    whole = step.both_ways or step.attention().kernel == "fused"
    slices = 1.0 if whole else sum(keys for _, keys in seen_blocks(L, step.cfg.model.window)) / L
    attention = (w.query + round(slices * (w.key + w.value))) * b + w.scores * (wide + b)
    if step.encoder is not None:
        scores, keys = reading(step)
        norms += 2 * w.stream * wide
        products += (w.tokens + w.mixed) * b
        attention += (w.query + keys) * b + scores * (wide + b)
    hidden = (w.hidden + w.expert_hidden) * (full * b + flags) + (w.tokens * b if w.hidden else 0) + w.gated * b
    exchange = w.rows * (b + wide)  # dispatched rows, and float32 outputs, of which the gates' gradient is made
    mask = w.mask * (wide + b)
    return norms + products + attention + hidden + exchange + mask


def cast_weights(step: Step) -> int:
    """Bytes of the layers' matrices in the compute type, which are made once a layer and saved with the rest."""
    kept = [x for x in step.leaves if x.axes[0] == "layers" and x.component not in (*ADDED, "router")]
    if step.width == 4:  # only attention's, which are reshaped
        kept = [x for x in kept if x.component == "attn"]
    return sum(x.shard(step.cfg.rules, step.cfg.mesh) * step.width for x in kept)


def saved(step: Step, kind: str) -> dict[str, int]:
    """Bytes that the forward pass of one layer leaves for the backward pass."""
    w, b, m = widths(step, kind), step.width, step.cfg.model
    match m.remat:
        case "none":
            return {"activations": residuals(step, kind)}
        case "dots":
            made = w.query + w.key * m.resolved_head_dim // m.key_dim + w.value  # what turns is no part of a key yet
            hidden = (matrices(m.ffn) - 1) * w.hidden
            return {"activations": (2 * w.tokens + w.latents + made + hidden + w.gated) * b}
        case "exchange":
            return {"activations": w.stream * b, "dispatch": 2 * w.rows * b}
        case _:
            return {"activations": w.stream * b}


def working(step: Step, kind: str) -> int:
    """Bytes that the backward pass of one layer holds beside what was saved."""
    w, b = widths(step, kind), step.width
    if step.cfg.model.remat == "none":
        return 2 * (w.hidden + w.expert_hidden) * b + w.rows * b + 8 * w.tokens * b + 2 * w.query * 4
    heads = w.query + w.key + w.value + w.mixed
    scores = max(w.scores, reading(step)[0]) * 4 or summed(step)
    shared = distances(step) + scores + heads * b + 7 * w.tokens * b + 3 * w.hidden * b
    if w.rows and step.dispatch.dispatch == "ragged":  # both operands of each grouped product with zeros past the end
        return shared + (6 if nonlinear(step.cfg.model.ffn)[0] > 1 else 3) * w.expert_hidden * b + 3 * w.rows * b
    # The attention's probabilities in the compute type, or what the exchange brings back: one after the other.
    return shared + 3 * w.expert_hidden * b + 2 * w.rows * b + max(w.scores, 2 * w.rows) * b


class Memory(NamedTuple):
    """Bytes of one device at the peak of a train step."""

    kinds: dict[str, int]  # what is live at the peak
    moment: str  # when that is
    cache: int  # keys and values of generation for the same batch, not part of the peak

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())


def table_gradients(step: Step) -> int:
    """Bytes of the gradients of embedding and head, whole over the axes that their rows are gathered from.

    A tied table has two until they are added: of the look-up and of the head.
    """
    m = step.cfg.model
    tables = m.vocab // step.over("vocab") * m.d_model * 2
    return 4 * (tables + (m.max_length * m.d_model if m.positions == "learned" else 0))


def gathered_head(step: Step) -> int:
    """Bytes of the head in the compute type, where it is gathered for its product."""
    m = step.cfg.model
    split = step.over("embed") > 1
    return m.vocab // step.over("vocab") * m.d_model * step.width if split else 0


def gathered_layer(step: Step) -> int:
    """Bytes of the matrices of the largest layer in the compute type, where their width is split and gathered."""
    rules, mesh = step.cfg.rules, step.cfg.mesh
    layers: dict[str, int] = {}
    for leaf in step.leaves:
        split = mesh.over(tuple(a for n in leaf.axes if n in WIDTHS for a in getattr(rules, n)))
        if leaf.axes[0] == "layers" and split > 1:
            layers[leaf.block] = (
                layers.get(leaf.block, 0) + leaf.shard(rules, mesh) * split // leaf.shape[0] * step.width
            )
    return max(layers.values(), default=0)


def newton_schulz(step: Step) -> int:
    """Bytes of Muon's step of its largest parameter: optax merges layers and experts, which gathers split experts, and
    holds the matrices twice beside their products with themselves; the gradients of its like wait."""
    rules, mesh = step.cfg.rules, step.cfg.mesh

    def whole(leaf: Leaf) -> int:
        return leaf.shard(rules, mesh) * mesh.over(rules.experts if "experts" in leaf.axes else ())

    muons = [x for x in step.leaves if x.is_matrix]
    if not muons:
        return 0
    largest = max(muons, key=whole)
    batch = prod(n for n, a in zip(largest.shape, largest.axes, strict=True) if a in MANY)
    inner = largest.size // batch
    side = min(largest.width, inner // largest.width)
    like = sum(x.shard(rules, mesh) for x in muons if x.size == largest.size) - largest.shard(rules, mesh)
    return 4 * (2 * whole(largest) + batch * side * side + like)


def left(step: Step) -> Counter[str]:
    """Bytes that the forward pass of all layers leaves for the backward pass."""
    out = Counter[str]()
    for alike, kind, times in step.alike:
        for name, size in saved(alike, kind).items():
            out[name] += round(times * size * (step.turns if step.schedule else 1))
    return out


def hardest(step: Step) -> int:
    """Bytes of what the backward pass of the largest layer holds beside what was saved."""
    return max(working(alike, kind) for alike, kind, _ in step.alike)


def memory(step: Step) -> Memory:
    """What is live at the peak, the worst of several moments.

    The compiler forms the gradient of the head after the decoder's layers, so that the logits' gradient lives so long;
    those of an encoder are gone back through after that. Microbatches add their gradients up beside the sum so far.
    """
    m, rules, mesh = step.cfg.model, step.cfg.rules, step.cfg.mesh
    logits = step.table_tokens * m.vocab * 4 // step.over("act_vocab")
    tokens = 5 * step.tokens + (3 * step.encoder.tokens if step.encoder else 0)
    held = state(step) | {"batch": 4 * tokens * step.microbatches}
    layers, first = left(step), Counter[str]() if step.encoder is None else left(step.encoder)
    layers += first
    if step.encoder is not None:  # what the decoder reads
        layers["activations"] += step.encoder.tokens * m.d_model * step.width // step.over("act_embed")
    if m.remat == "none":
        layers["activations"] += cast_weights(step)
    stacks = sum(4 * x.shard(rules, mesh) for x in step.leaves if x.axes[0] == "layers")
    so_far = gradients(step) if step.one_by_one else 0
    if step.schedule is not None:  # what stages made in each tick, and what enters the first one
        rows = step.tokens * m.d_model * step.width // step.over("act_embed", "residual")
        layers["activations"] += rows * (step.schedule.ticks + step.microbatches)
        if step.schedule.rounds > 1:  # layers as they are dealt out to the rounds, beside those of the state
            layers["parameters"] = held["parameters"] + stacks
    work = gathered_layer(step) + hardest(step)
    summed = {"gradients": stacks + so_far, "logits": logits}
    moments = {
        "the loss": dict(layers) | {"gradients": so_far, "logits": 2 * logits, "temporaries": gathered_head(step)},
        "backward pass": dict(layers) | summed | {"temporaries": work},
        "embedding's gradient": summed | {"temporaries": table_gradients(step)},
        "optimizer": {"gradients": gradients(step)},
    }
    if step.encoder is not None:
        work = gathered_layer(step) + hardest(step.encoder)
        moments["the encoder's backward pass"] = dict(first) | {"gradients": stacks + so_far, "temporaries": work}
    if step.cfg.train.optimizer.kind == "muon":
        moments["optimizer"] = {"temporaries": newton_schulz(step)}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    order = ("parameters", "optimizer", "gradients", "activations", "dispatch", "logits", "temporaries", "batch")
    return Memory({k: (held | moments[moment]).get(k, 0) for k in order}, moment, cache(step))

"""Impossible combinations: settings that contradict one another, leave one another without effect, or cannot divide.

Each check returns `Problem`s with the key, the reason and the remedy; `config` turns them into one refusal.
`rules.validate` holds the rules and the mesh against the shapes of the parameters.
"""

from moe_jax.axes import Rules
from moe_jax.checks_attention import Refuse, check_attention, idle
from moe_jax.pattern import STAGE
from moe_jax.refused import ConfigError, Problem
from moe_jax.schema import Config, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, RouterConfig

TOP_K = {"switch": 1, "gshard": 2, "sparsemixer": 2}
STEERING = ("balance_loss", "importance_loss", "load_loss", "device_loss", "communication_loss")  # towards equal loads
GROUPED = ("deepseek_v2", "deepseek_v3")
BIASED = ("softmax_topk", *GROUPED)


def check_moe(moe: MoEConfig, prefix: str = "model.moe", *, learns: bool = True) -> list[Problem]:
    """Impossible combinations inside the mixture of experts; `learns`: and what leaves a router without a gradient."""
    out: list[Problem] = []

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(f"{prefix}.{name}", reason, remedy))

    kind = moe.router.kind
    if moe.top_k > moe.experts:
        no("top_k", f"{moe.top_k} choices among {moe.experts} experts", f"set it to {moe.experts} or less")
    if moe.top_k != TOP_K.get(kind, moe.top_k):
        want = TOP_K[kind]
        why = f"is {moe.top_k}, and the {kind} router picks {want}"
        no("top_k", why, f"set top_k={want} or router.kind=softmax_topk")
    if moe.capacity_factor is None and moe.overflow != "drop":
        why = f"is {moe.overflow!r}, and a layer without capacity_factor never overflows"
        no("overflow", why, "leave it at drop")
    if moe.expert_dropout and (moe.dispatch == "ragged" or moe.overflow == "fallback"):
        name = "ragged dispatch" if moe.dispatch == "ragged" else "overflow=fallback"
        why = f"is {moe.expert_dropout}, and the sorted rows of {name} have no slots to draw its noise for"
        no("expert_dropout", why, "set dispatch=gather and overflow=drop, or expert_dropout=0")
    if moe.overflow == "fallback" and moe.dispatch == "ragged":
        why = "is 'fallback', and ragged dispatch without capacity_factor is what it would fall back to"
        no("overflow", why, "take capacity_factor out, or set dispatch=gather")
    if moe.exchange == "ragged" and moe.dispatch != "ragged":
        why = f"is 'ragged', and dispatch={moe.dispatch} fills buffers of one size"
        no("exchange", why, "set dispatch=ragged, or another exchange")
    if moe.group_size == "auto" and moe.dispatch == "auto":
        why = "is 'auto' with dispatch=auto: what is dropped would depend on the platform"
        no("group_size", why, "name the dispatcher, for example dispatch=einsum, or give a number")
    if not moe.shared_experts:
        why, remedy = "there are no shared experts", f"set {prefix}.shared_experts=1"
        out += idle(moe, prefix, ["shared_d_ff", "shared_gate"], why, remedy)
    if learns:
        _check_gradient(moe, no)
    _check_router(moe, no)
    _check_groups_of_experts(moe, no)
    _check_balance(moe, no)
    if kind == "expert_choice":
        _check_expert_choice(moe, no)
    return out


SOFTMAX_OF_CHOSEN = ("topk_softmax", "noisy_topk")


def _check_gradient(moe: MoEConfig, no: Refuse) -> None:
    """A single gate that is always 1."""
    kind, norm = moe.router.kind, moe.router.normalize
    always_one = kind in SOFTMAX_OF_CHOSEN
    normalized = norm in ("before", "after") or (kind == "deepseek_v3" and norm is None)
    if moe.top_k == 1 and kind not in ("hash", "expert_choice") and (always_one or normalized):
        why = "a gate normalised over one choice is always 1 and gives the router no gradient"
        if always_one:
            no("router.kind", why, "set router.kind=switch or top_k=2")
        else:
            no("router.normalize", why, "set router.kind=switch, router.normalize=none or top_k=2")


def _check_router(moe: MoEConfig, no: Refuse) -> None:
    """Gates, second experts and noise against the kind of router."""
    kind, norm = moe.router.kind, moe.router.normalize
    if kind in SOFTMAX_OF_CHOSEN and norm in ("none", "before"):
        why = "softmax over the chosen logits is normalised already"
        no("router.normalize", why, "leave it unset, or set it to after")
    if kind in ("hash", "expert_choice", "sparsemixer") and norm is not None:
        why = f"the {kind} router does not normalise its gates"
        no("router.normalize", why, "leave it unset")
    if kind != "gshard" and moe.router.second != "always":
        no("router.second", f"is {moe.router.second!r} with the {kind} router", "set router.kind=gshard")
    if (kind != "gshard" or moe.router.second != "random") and moe.router.threshold != RouterConfig.threshold:
        why = f"is {moe.router.threshold:g}, and only a gshard router that keeps the second expert at random has one"
        no("router.threshold", why, "take it out, or set router.kind=gshard and router.second=random")
    if kind != "sparsemixer" and moe.router.margin is not None:
        why = f"is {moe.router.margin:g}, and the {kind} router has none"
        no("router.margin", why, "take it out, or set router.kind=sparsemixer")
    if moe.router.gate_width is not None and moe.router.gate != "mlp":
        no("router.gate_width", f"is {moe.router.gate_width} with a linear gate", "set router.gate=mlp")
    if kind == "hash":
        router = ("gate", "jitter", "bias")
        learned = [n for n in router if getattr(moe.router, n) != getattr(RouterConfig, n)]
        learned += [n for n in (*STEERING, "sequence_loss", "z_loss") if getattr(moe, n)]
        for name in learned:
            where = f"router.{name}" if name in router else name
            no(where, "has no effect on the hash router, which learns nothing", "leave it out")
        if moe.priority in ("probability", "batch"):
            why = f"is {moe.priority!r}, and to the hash router all choices are equally probable"
            no("priority", why, "use choice, token or random")
    if moe.router.force_std != RouterConfig.force_std and moe.router.force != "biased":
        no("router.force_std", f"is {moe.router.force_std:g} without router.force=biased", "set router.force=biased")


def _check_groups_of_experts(moe: MoEConfig, no: Refuse) -> None:
    """Group-limited routing: groups that divide and leave enough experts."""
    r = moe.router
    if r.kind not in GROUPED:
        for name in ("topk_groups", "group_score"):
            if getattr(r, name) is not None:
                no(
                    f"router.{name}",
                    f"is set with the {r.kind} router",
                    f"use one of {', '.join(GROUPED)}",
                )
        if r.groups != 1:
            no("router.groups", f"is {r.groups} with the {r.kind} router", f"use one of {', '.join(GROUPED)}, or 1")
        return
    if moe.experts % r.groups:
        no("router.groups", f"{moe.experts} experts do not divide into {r.groups} groups", "use a divisor of experts")
        return
    keep, size = r.topk_groups or r.groups, moe.experts // r.groups
    if keep > r.groups:
        no("router.topk_groups", f"{keep} groups of {r.groups}", f"set it to {r.groups} or less")
    elif keep * size < moe.top_k:
        why = f"{keep} groups of {size} experts leave {keep * size} for top_k={moe.top_k}"
        no("router.topk_groups", why, f"set it to {-(-moe.top_k // size)} or more")
    if keep < r.groups:
        measure = r.group_score or {"deepseek_v2": "max", "deepseek_v3": "sum2"}[r.kind]
        if measure == "sum2" and size < 2:
            no("router.group_score", "is the sum of two experts in groups of one", "set router.group_score=max")
        if measure == "sumk" and (moe.top_k % keep or moe.top_k // keep > size):
            why = f"top_k={moe.top_k} over {keep} groups of {size} experts is no whole number of each"
            no("router.group_score", why, "use max or sum2, or a topk_groups that divides top_k")
    elif r.group_score is not None:
        no("router.group_score", "has no effect while every group may be used", "set router.topk_groups")
    if r.groups > 1 and r.topk_groups is None:
        no("router.groups", f"is {r.groups}, and every group may be used", "set router.topk_groups, or groups=1")


def _check_balance(moe: MoEConfig, no: Refuse) -> None:
    """Losses and the bias: what they need, and what fights what."""
    kind = moe.router.kind
    steering = [n for n in STEERING if getattr(moe, n)]
    if moe.bias_rate is not None:
        if kind not in BIASED:
            no(
                "bias_rate",
                f"the {kind} router has no selection bias",
                f"use one of {', '.join(BIASED)}",
            )
        if moe.bias_rate > 0 and steering:
            why = f"a moving bias and {', '.join(steering)} fight over the same loads"
            no("bias_rate", why, f"take {' and '.join(steering)} out (sequence_loss may stay), or the bias")
        if moe.bias_rate > 0 and moe.router.force is not None:
            no("bias_rate", "moves a bias that forced choices do not look at", "take it or router.force out")
    elif moe.bias_update != "sign":
        no("bias_update", f"is {moe.bias_update!r} without a bias", "set bias_rate, for example 0.001")
    if moe.load_loss and kind != "noisy_topk":
        why = f"the counts of the {kind} router have no gradient"
        no("load_loss", why, "set router.kind=noisy_topk, or use balance_loss or importance_loss")
    elif moe.load_loss and moe.router.force is not None:
        no("load_loss", "has no effect on forced choices, which noise does not move", "take it or router.force out")
    if moe.device_loss or moe.communication_loss:
        name = "device_loss" if moe.device_loss else "communication_loss"
        if moe.balance_devices is None:
            no("balance_devices", f"is unset, and {name} needs it", "set it to the devices of the experts, mesh.expert")
    elif moe.balance_devices is not None:
        no("balance_devices", "has no effect without device_loss or communication_loss", "set one of them")
    if moe.balance_devices is not None and moe.experts % moe.balance_devices:
        why = f"{moe.experts} experts do not divide into {moe.balance_devices} groups"
        no("balance_devices", why, "use a divisor of experts")
    limited = moe.router.topk_groups is not None and moe.balance_devices not in (None, moe.router.groups)
    if moe.communication_loss and limited:
        why = f"is {moe.balance_devices}, and a token may use {moe.router.topk_groups} of {moe.router.groups} groups"
        no("balance_devices", why, "set it to router.groups, of which the communication loss knows the limit")
    for name in ("balance_form", "balance_over"):
        if getattr(moe, name) != getattr(MoEConfig, name) and not moe.balance_loss:
            no(name, f"is {getattr(moe, name)!r} without a balance loss", "set balance_loss, for example 0.01")


def _check_expert_choice(moe: MoEConfig, no: Refuse) -> None:
    """Expert choice is balanced by construction and fills every slot."""
    if moe.capacity_factor is None:
        no(
            "capacity_factor",
            "is unset, and it says how many tokens an expert chooses",
            "set it to 1.0",
        )
    if moe.priority != "choice":
        no("priority", f"is {moe.priority!r}, and with expert_choice the experts decide", "leave it unset")
    if moe.overflow != "drop":
        no("overflow", f"is {moe.overflow!r}, and expert_choice never overflows", "leave it unset")
    if moe.router.force is not None:
        no("router.force", "forces the choice of tokens, and here experts choose", "use another router.kind")
    if moe.router.balance is not None:
        no("router.balance", f"is {moe.router.balance!r}, and here a token has no choices", "leave it unset")
    for name in (*STEERING, "sequence_loss"):
        if getattr(moe, name) and name != "load_loss":
            no(name, "has no effect: expert_choice is balanced by construction", "leave it out")


def _check_encoder(cfg: Config) -> list[Problem]:
    """What an encoder, or positions by distance, cannot be combined with."""
    m, encoder, out = cfg.model, cfg.model.encoder, []
    over = " and ".join(f"mesh.{axis}" for axis in cfg.rules.length)
    whole = f"set {over} to 1"
    if m.positions == "relative" and cfg.mesh.over(cfg.rules.length) > 1:
        why = "is 'relative', and the attention of split rows adds no biases to its scores"
        out.append(Problem("model.positions", why, f"{whole}, or use rotary"))
    if encoder is None:
        return out
    if cfg.mesh.stage > 1:
        why = f"is {cfg.mesh.stage}, and the stages of a pipeline share one run of layers, not an encoder's too"
        out.append(Problem("mesh.stage", why, "set it to 1"))
    if cfg.mesh.over(cfg.rules.length) > 1:
        out.append(Problem("model.encoder", "its rows are whole, and rules.length splits rows over the mesh", whole))
    length = cfg.inputs
    if length > m.max_length:
        why = f"{length} exceeds model.max_length={m.max_length}"
        out.append(Problem("model.encoder.length", why, "raise model.max_length"))
    size = m.moe.group_size if m.moe is not None else None
    if isinstance(size, int) and length != cfg.data.length and (length % size or cfg.data.length % size):
        why = f"is {size}, which does not divide the rows of both, {length} tokens of an encoder and {cfg.data.length}"
        out.append(Problem("model.moe.group_size", why, "use a divisor of both"))
    return out


def _check_list(m: ModelConfig, moe: MoEConfig) -> list[Problem]:
    """MoE layers by number: some, of those that there are, once each."""
    key, out = "model.moe.layers", []
    if moe.layers is not None:
        out += idle(moe, "model.moe", ["every", "first_dense"], "moe.layers lists the layers", f"take {key} out")
        out += _check_numbers(key, moe.layers, m.layers, least=m.encoder is None)
    if moe.layers is not None and m.encoder is not None and m.encoder.moe_layers is None:
        why = "is unset, and model.moe.layers numbers the layers of the decoder alone"
        out.append(Problem("model.encoder.moe_layers", why, "set it, or use model.moe.every and first_dense"))
    if m.encoder is not None and m.encoder.moe_layers is not None:
        out += _check_numbers("model.encoder.moe_layers", m.encoder.moe_layers, m.encoder.layers, least=False)
    return out


def _check_numbers(key: str, listed: tuple[int, ...], layers: int, *, least: bool) -> list[Problem]:
    """Numbers of layers, once each; `least`: one of them or more, as a stack without another one beside it needs."""
    if (listed or not least) and all(i < layers for i in listed) and len(set(listed)) == len(listed):
        return []
    why = f"is {list(listed)}, and the layers are numbered from 0 to {layers - 1}"
    return [Problem(key, why, f"name {'one of them or more' if least else 'some of them'}, each once")]


def check_model(m: ModelConfig) -> list[Problem]:
    """Impossible combinations inside the model."""
    out = []

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(f"model.{name}", reason, remedy))

    if m.head_dim is None and m.d_model % m.heads:
        no("heads", f"d_model {m.d_model} is not divisible by {m.heads} heads", "set model.head_dim or change heads")
    if m.heads % m.resolved_kv_heads:
        no("kv_heads", f"{m.heads} heads are not a multiple of {m.kv_heads} key/value heads", "use a divisor of heads")
    check_attention(m, no)
    if m.latent is None and m.positions == "rotary" and m.resolved_head_dim % 2:
        no("head_dim", f"{m.resolved_head_dim} is odd, and rotary positions turn pairs", "use an even head_dim")
    if m.positions == "sinusoidal" and m.d_model % 2:
        no("d_model", f"{m.d_model} is odd, and sinusoidal positions come in pairs", "use an even d_model")
    if m.positions != "relative":
        why = f"{m.positions} positions are no distances"
        out += idle(m, "model", ["distance_buckets", "distance_limit"], why, "set model.positions=relative")
    if m.positions != "rotary":
        why = f"{m.positions} positions do not turn"
        out += idle(m, "model", ["rope_theta", "rope"], why, "set model.positions=rotary")
    if m.encoder is not None and m.encoder.start is not None and m.encoder.start >= m.vocab:
        no("encoder.start", f"is {m.encoder.start}, and the vocabulary has ids 0 to {m.vocab - 1}", "use one of them")
    if m.moe is not None:
        out += check_moe(m.moe)
        if m.moe.router.kind == "expert_choice" and not m.moe.router.lookahead:
            why = "expert_choice lets later tokens decide where earlier ones go, and this model is causal"
            no("moe.router.kind", why, "use another router, or permit it with model.moe.router.lookahead=true")
        elif m.moe.router.lookahead and m.moe.router.kind != "expert_choice":
            no("moe.router.lookahead", f"has no effect on the {m.moe.router.kind} router", "leave it out")
        wrong = _check_list(m, m.moe)
        out += wrong
        if not wrong and "moe" not in m.layer_kinds + m.encoder_kinds:
            of = f"{m.layers}" + (f", and {m.encoder.layers} of the encoder" if m.encoder else "")
            why = f"first_dense={m.moe.first_dense}, every={m.moe.every} leave no MoE layer among {of}"
            if m.moe.layers is not None:
                why = f"model.moe.layers and model.encoder.moe_layers name no MoE layer among {of}"
            key = "moe.every" if m.moe.layers is None else "moe.layers"
            no(key, why, "lower model.moe.every or first_dense, raise model.layers, or name a layer")
    elif m.encoder is not None and m.encoder.moe_layers is not None:
        no("encoder.moe_layers", f"is {list(m.encoder.moe_layers)} in a dense model", "take it out, or set model.moe")
    return out


def _check_optimizer(o: OptimizerConfig) -> list[Problem]:
    """Settings of one optimizer or schedule beside another."""
    prefix = "train.optimizer"
    unused = {"adamw": [], "muon": ["eps"], "adafactor": ["b1", "b2", "eps"]}[o.kind]
    out = idle(o, prefix, unused, f"{o.kind} has no such setting", "set train.optimizer.kind=adamw")
    if o.schedule != "wsd":
        out += idle(o, prefix, ["decay"], f"the {o.schedule} schedule has no final decay", f"set {prefix}.schedule=wsd")
    return out


def check_decoding(m: ModelConfig) -> list[Problem]:
    """What a model cannot do one token at a time."""
    if m.moe is None or m.moe.router.kind != "expert_choice":
        return []
    why = "with expert_choice experts choose among the tokens of a sequence, and decoding has one token at a time"
    return [Problem("model.moe.router.kind", why, "use a model with another router, or evaluate whole sequences")]


def require_decoding(m: ModelConfig) -> None:
    """Refuse a model that cannot generate text.

    Raises:
        ConfigError: names the router and what to use instead.
    """
    if problems := check_decoding(m):
        raise ConfigError(*problems)


def check_exchange(moe: MoEConfig, rules: Rules, prefix: str = "model.moe") -> list[Problem]:
    """The exchange against the axes of the experts."""
    if moe.exchange != "hierarchical" or len(rules.experts) == 2:
        return []
    why = f"is 'hierarchical', and rules.experts={list(rules.experts)} names no slow and fast axis"
    return [
        Problem(f"{prefix}.exchange", why, 'set rules.experts to two axes such as ["data", "expert"], or shard_map')
    ]


def check_devices(mesh: MeshConfig, fake_devices: int | None, processes: int = 1) -> list[Problem]:
    """Processes, and fake devices in each of them, that do not fill the mesh."""
    if fake_devices is not None and fake_devices < 1:
        return [Problem("--fake-devices", f"is {fake_devices}", "give 1 or more")]
    if mesh.size % processes:
        why = f"is {processes}, and a mesh of {mesh.size} ({mesh}) does not split into as many equal parts"
        return [Problem("--processes", why, "use a divisor of the mesh, or other mesh.<axis> sizes")]
    if fake_devices is None or fake_devices * processes == mesh.size:
        return []
    total, here = fake_devices * processes, f"{fake_devices} fake devices"
    if processes > 1:
        here += f" in each of {processes} processes, {total} in all,"
    remedy = f"use --fake-devices {mesh.size // processes}, or mesh sizes whose product is {total}"
    return [Problem("--fake-devices", f"{here} for a mesh of {mesh.size} ({mesh})", remedy)]


def _check_context(cfg: Config) -> list[Problem]:
    """Rows split over the mesh: two equal pieces for each shard, and groups of tokens inside of them."""
    n, length, moe = cfg.mesh.over(cfg.rules.length), cfg.data.length, cfg.model.moe
    over = " x ".join(f"mesh.{axis}" for axis in cfg.rules.length)
    if n == 1:
        return []
    m, heads = cfg.model, cfg.mesh.over(cfg.rules.act_heads)
    J, R = m.resolved_kv_heads, m.heads // m.resolved_kv_heads
    if m.heads % heads == 0 and J % heads and R % heads:
        why = f"{J} heads of keys and values for {R} queries each: neither divides over {heads} shards of the heads"
        remedy = f"with {over} above 1, set it to a multiple of {heads}, or rules.act_heads=[]"
        return [Problem("model.kv_heads", why, remedy)]
    if length % (2 * n):
        why = f"{length} tokens do not split into two pieces for each of {n} shards ({over})"
        return [
            Problem("data.length", why, f"set it to a multiple of {2 * n}, or {over} to a divisor of {length // 2}")
        ]
    if moe is None:
        return []
    piece = length // (2 * n)
    if moe.capacity_factor is None and moe.expert_dropout:
        why = f"is {moe.expert_dropout}, and without a capacity its noise would depend on the shards of a row ({over})"
        return [Problem("model.moe.expert_dropout", why, "set model.moe.capacity_factor, or expert_dropout=0")]
    if moe.capacity_factor is None and moe.eval_capacity_factor is None:
        return []  # no group is ever full
    size = length if moe.group_size is None else moe.group_size
    if size == "auto" or piece % size:
        groups = f"groups of {size} tokens" if moe.group_size else "unset: groups of one sequence, which"
        groups = "'auto' cuts groups of whole rows, which" if size == "auto" else groups
        why = f"{groups} do not fit into the pieces of {piece} tokens that {over}={n} makes of a row"
        return [Problem("model.moe.group_size", why, f"set it to a divisor of {piece}, which changes who competes")]
    return []


def _check_residual(cfg: Config) -> list[Problem]:
    """Rows that do not split further between attention and feed-forward layers."""
    rules, lengths = cfg.rules, {"data.length": cfg.data.length, "model.encoder.length": cfg.inputs}
    n = cfg.mesh.over(rules.length + rules.residual)
    over = " x ".join(f"mesh.{axis}" for axis in rules.length + rules.residual)
    why = "splits rows of {} tokens over {} shards ({}), which does not divide them"
    remedy = "set {} to a multiple of {}, or rules.residual=[]"
    wrong = {key: length for key, length in lengths.items() if rules.residual and length % n}
    return [Problem("rules.residual", why.format(m, n, over), remedy.format(key, n)) for key, m in wrong.items()]


def _check_groups(cfg: Config) -> list[Problem]:
    """Group sizes against sequences, microbatches and the mesh."""
    moe, length = cfg.model.moe, cfg.data.length
    assert moe is not None
    size = moe.group_size if isinstance(moe.group_size, int) else length  # auto: a divisor of it
    rows = cfg.data.batch // cfg.train.microbatches
    shards = cfg.mesh.over(cfg.rules.batch)
    if size % length and length % size:
        why = f"{size} is neither a divisor nor a multiple of data.length={length}"
        return [Problem("model.moe.group_size", why, "use a divisor or a multiple of the sequence length")]
    groups = rows * length // size
    if rows * length % size or groups % shards:
        why = f"{rows} sequences of {length} make {rows * length / size:g} groups of {size}, for {shards} token shards"
        return [Problem("model.moe.group_size", why, f"choose it so that the groups are a multiple of {shards}")]
    return []


def _check_stages(cfg: Config) -> list[Problem]:
    """Layers, microbatches and balance against the stages of a pipeline."""
    stages, m, rounds = cfg.mesh.stage, cfg.train.microbatches, cfg.train.rounds
    if stages == 1:
        return idle(cfg.train, "train", ["rounds"], "mesh.stage=1 is no pipeline", "set mesh.stage above 1")
    out = []
    runs = cfg.model.runs
    repeats = runs[0][1] if len(runs) == 1 else 0
    if repeats % (stages * rounds) or not repeats:
        layers = " then ".join(f"{n} x ({', '.join(kinds)})" for kinds, n in runs)
        shares = f"{stages * rounds} equal shares (mesh.stage x train.rounds)"
        why = f"is {stages}, which needs one run of layers that splits into {shares}, not {layers}"
        remedy = "change model.layers or train.rounds, or set model.moe.first_dense=0 and model.stack_above=0"
        out.append(Problem("mesh.stage", why, remedy))
    for name, axes in vars(cfg.rules).items():
        if (STAGE in axes) != (name == "layers") or (name == "layers" and len(axes) > 1):
            why = f"is {list(axes)}, and mesh.stage={stages} makes a pipeline, whose stages split the layers alone"
            out.append(Problem(f"rules.{name}", why, "name 'stage' in rules.layers, alone there and nowhere else"))
    if rounds > 1 and m < stages:
        why = f"{m} microbatches are out of the first of {stages} stages before they are back for round 2"
        out.append(Problem("train.microbatches", why, f"set it to {stages} or more, or train.rounds=1"))
    moe = cfg.model.moe
    if moe is not None and moe.balance_over == "microbatch":
        why = "is 'microbatch', and a pipeline adds the statistics of its microbatches up"
        out.append(Problem("model.moe.balance_over", why, "use step or sequence, or mesh.stage=1"))
    if moe is not None and moe.overflow == "fallback":
        why = "is 'fallback', of which the stages of a pipeline would compute both branches in every tick"
        out.append(Problem("model.moe.overflow", why, "use drop or error, or mesh.stage=1"))
    return out


def check(cfg: Config) -> list[Problem]:
    """Every impossible combination of a config (see `rules.validate` for shapes)."""
    out = check_model(cfg.model) + _check_optimizer(cfg.train.optimizer) + _check_stages(cfg)
    mesh, data, train, moe = cfg.mesh, cfg.data, cfg.train, cfg.model.moe

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(name, reason, remedy))

    shards = mesh.over(cfg.rules.batch)
    if data.batch % train.microbatches:
        no(
            "train.microbatches",
            f"batch {data.batch} does not split into {train.microbatches} parts",
            "use a divisor of data.batch",
        )
    elif (data.batch // train.microbatches) % shards:
        why = f"{data.batch} sequences in {train.microbatches} microbatches do not divide over {shards} token shards"
        remedy = f"set it to a multiple of {shards * train.microbatches}, or mesh sizes that divide it"
        no("data.batch", f"{why} (mesh {mesh})", remedy)
    elif context := _check_context(cfg):
        out += context
    elif moe is not None:
        out += _check_groups(cfg)
    out += _check_residual(cfg) + _check_encoder(cfg)
    out += [] if moe is None else check_exchange(moe, cfg.rules)
    if moe is not None and moe.experts % mesh.over(cfg.rules.experts):
        over = {a: n for a, n in mesh.sizes.items() if a in cfg.rules.experts}
        n, axes = mesh.over(cfg.rules.experts), " x ".join(f"mesh.{a}" for a in over)
        why = f"{moe.experts} experts do not divide over {n} expert shards"
        no(axes, why, f"use a divisor of {moe.experts}, or set model.moe.experts to a multiple of {n}")
    if moe is None and mesh.expert > 1 and "expert" not in cfg.rules.tokens:
        no("mesh.expert", "a dense model has no experts to split", "set mesh.expert=1")
    if train.sample is not None and check_decoding(cfg.model):
        no("train.sample", "asks for text, and expert_choice cannot decode a token at a time", "set train.sample=unset")
    if data.length > cfg.model.max_length:
        no("data.length", f"{data.length} exceeds model.max_length={cfg.model.max_length}", "raise model.max_length")
    return out

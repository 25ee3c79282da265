"""Rules and mesh held against each other and against arrays: every conflict with its remedy. No JAX.

`rules.validate` refuses a model by it, and `moe-jax plan` a mesh.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import prod

from moe_jax.axes import MESH_AXES, Rules
from moe_jax.refused import Problem
from moe_jax.schema import ModelConfig

Leaf = tuple[str, tuple[int, ...], tuple[str, ...]]  # name, shape, logical axes


def clashes(rules: Rules) -> list[Problem]:
    """Activations of which two dimensions would lie on one mesh axis, whatever its size."""
    names = ("batch", "length", "act_embed"), ("batch", "length", "act_mlp"), ("batch", "length", "act_vocab")
    names += ("batch", "length", "act_heads"), ("batch", "length", "kv_heads"), ("batch", "length", "latent")
    layouts = {f"activation ({', '.join(n)})": rules.layout(*n) for n in names}
    layouts["tokens between layers (batch, length and residual, act_embed)"] = rules.stream
    for name in ("vocab", "position"):
        layouts[f"rows of the embedding ({name}, act_embed)"] = rules.layout(name, "act_embed")
    layouts["cache (batch, kv_heads)"] = rules.by_rows().layout("batch", "kv_heads")
    experts, groups, _, travelling = rules.expert_major
    layouts["tokens at their experts (experts, batch, act_embed)"] = (experts, groups, rules.act_embed)
    layouts["tokens on their way (experts, batch, act_exchange)"] = (experts, groups, travelling)
    layouts["hidden layer of the experts (experts, batch, expert_mlp)"] = (experts, groups, rules.expert_mlp)
    out = []
    for name, layout in layouts.items():
        axes = [a for dimension in layout for a in dimension or ()]
        for axis in sorted({a for a in axes if axes.count(a) > 1}):
            remedy = "take it out of one of these rules.*"
            out.append(Problem(name, f"mesh axis {axis!r} holds two dimensions", remedy))
    return out


def misfits(rules: Rules, mesh: Mapping[str, int], leaves: Iterable[Leaf]) -> list[Problem]:
    """Arrays of which a dimension is indivisible, or two lie on one mesh axis."""
    out = []
    for name, shape, axes in leaves:
        used: dict[str, str] = {}
        for size, logical in zip(shape, axes, strict=True):
            over = getattr(rules, logical)
            shards = 1
            for a in over:
                shards *= mesh.get(a, 1)
                if a in used:
                    why = f"{used[a]} and {logical} are both on mesh axis {a!r}"
                    out.append(Problem(name, why, f"change rules.{logical} or rules.{used[a]}"))
                used[a] = logical
            if size % shards:
                why = f"{logical} of size {size} does not divide over {'x'.join(over)}={shards}"
                over = tuple(a for a in over if mesh.get(a, 1) > 1)
                remedy = f"set rules.{logical}=[], another size, or mesh.{over[-1]} to a divisor"
                out.append(Problem(f"{name} {list(shape)}", why, remedy))
    return out


def travels(rules: Rules, mesh: Mapping[str, int], leaves: Iterable[Leaf]) -> list[Problem]:
    """Widths of tokens that cannot be split for their way to the experts."""
    shards = prod(mesh.get(a, 1) for a in rules.act_exchange)
    widths = {n: name for name, shape, axes in leaves for n, a in zip(shape, axes, strict=True) if a == "expert_embed"}
    why = "tokens of width {} do not divide over {} shards on their way to the experts"
    remedy = "set rules.act_exchange=[], or another size"
    return [Problem(name, why.format(n, shards), remedy) for n, name in widths.items() if n % shards]


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Equal conflicts as one that names the first array: a model has the same one in every layer and weight."""
    where: dict[tuple[str, str], list[str]] = {}
    for p in dict.fromkeys(problems):
        where.setdefault((p.reason, p.remedy), []).append(p.key)
    more = {said: f" and {len(names) - 1} more" if len(names) > 1 else "" for said, names in where.items()}
    return [Problem(names[0] + more[said], *said) for said, names in where.items()]


def activations(m: ModelConfig) -> list[Leaf]:
    """Activations that are split otherwise than the weights that make them: logits, queries, and tokens by width."""
    width = ("tokens", (m.d_model,), ("act_embed",))
    return [width, ("logits", (m.vocab,), ("act_vocab",)), ("queries", (m.heads,), ("act_heads",))]


def conflicts(rules: Rules, mesh: Mapping[str, int], leaves: Iterable[Leaf]) -> list[Problem]:
    """Every conflict of the rules with the mesh and with `(name, shape, logical axes)` of arrays."""
    out: list[Problem] = []
    for f in fields(Rules):
        for axis in getattr(rules, f.name):
            if axis not in MESH_AXES:
                why = f"unknown mesh axis {axis!r}"
                out.append(Problem(f"rules.{f.name}", why, f"use {', '.join(MESH_AXES)}"))
        if len(set(getattr(rules, f.name))) < len(getattr(rules, f.name)):
            out.append(
                Problem(f"rules.{f.name}", f"a mesh axis twice in {list(getattr(rules, f.name))}", "name it once")
            )
    outside = [a for a in rules.experts if a not in rules.tokens and mesh.get(a, 1) > 1]
    if outside:
        why = f"expert axes {outside} are not among the token axes {list(rules.tokens)}: no all-to-all is possible"
        out.append(Problem("rules.experts", why, "use a subset of rules.batch and rules.length"))
    idle = [a for a in rules.act_exchange if a not in rules.expert_mlp and mesh.get(a, 1) > 1]
    if idle:
        why = f"{idle} are not among the axes {list(rules.expert_mlp)} of the experts' hidden width, which share tokens"
        out.append(Problem("rules.act_exchange", why, "use a subset of rules.expert_mlp"))
    named = {axis for f in fields(Rules) for axis in getattr(rules, f.name)}
    for axis in (a for a in MESH_AXES if mesh.get(a, 1) > 1 and a not in named):
        why = f"has {mesh[axis]} devices, and no rule splits anything over {axis!r}"
        out.append(Problem(f"mesh.{axis}", why, f"set it to 1, or name {axis!r} in one of rules.*"))
    out += clashes(rules)
    leaves = list(leaves)
    return out + grouped(misfits(rules, mesh, leaves) + travels(rules, mesh, leaves))

"""Optimizers and schedules from the config, and the logical axes of their state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.axes import MANY, WIDTHS, is_matrix
from moe_jax.config import OptimizerConfig


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, ...: linear warm-up, then constant, cosine or WSD (Hu et al. 2024).

    The first step already learns: warm-up goes from peak / warmup to peak.
    """
    peak, final, warmup = cfg.learning_rate, cfg.final * cfg.learning_rate, cfg.warmup
    rest = max(steps - warmup, 1)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)  # of the part after warm-up
        match cfg.schedule:
            case "cosine":
                after = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            case "wsd":
                after = peak + (final - peak) * jnp.clip((done - 1.0 + cfg.decay) / cfg.decay, 0.0, 1.0)
            case _:
                after = jnp.full_like(step, peak)
        return jnp.where(step < warmup, peak * (step + 1.0) / max(warmup, 1), after)

    return rate


def is_axes(x: Any) -> bool:
    """A leaf of a tree of logical axes."""
    return isinstance(x, tuple) and all(isinstance(a, str) for a in x)


def decayed(axes: Any) -> Any:
    """Weight decay applies to matrices, not to norms and biases."""
    return jax.tree.map(
        lambda a: not {"norm", "bias"} & set(a) and sum(n not in MANY for n in a) >= 2, axes, is_leaf=is_axes
    )


def muon_dimensions(axes: Any) -> Any:
    """The matrix that Muon sees in each parameter, stacked layers and experts being batch; None: left to AdamW."""

    def one(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        if not is_matrix(names):
            return None
        inner = [i for i, n in enumerate(names) if n not in MANY]
        width = next(i for i in inner if names[i] in WIDTHS)
        others = tuple(i for i in inner if i != width)
        pair = ((width,), others) if width == inner[0] else (others, (width,))
        return optax.contrib.MuonDimensionNumbers(*pair)

    return jax.tree.map(one, axes, is_leaf=is_axes)


def build(cfg: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
        axes: the logical axes of each parameter, as a tree like the parameters.
    """
    rate, mask = schedule(cfg, steps), decayed(axes)
    match cfg.kind:
        case "adamw":
            core = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
        case "adafactor":
            # optax multiplies the decay by no learning rate; adding it before the rate keeps one meaning of the key.
            core = optax.chain(
                optax.adafactor(None, multiply_by_parameter_scale=True, clipping_threshold=1.0),
                optax.add_decayed_weights(-cfg.weight_decay, mask=mask),
                optax.scale_by_schedule(rate),
            )
        case _:
            core = optax.contrib.muon(
                rate,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=mask,
                adam_b1=cfg.b1,
                adam_b2=cfg.b2,
                consistent_rms=0.2,  # AdamW's step size, so that one learning rate serves both (Liu et al. 2025)
                muon_weight_dimension_numbers=muon_dimensions(axes),
            )
    return optax.chain(optax.clip_by_global_norm(cfg.clip), core) if cfg.clip else core


def names_of(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def state_axes(opt_state: Any, params: Any, axes: Any) -> Any:
    """Logical axes of every leaf of an optimizer state, derived from the parameter that it belongs to.

    A leaf belongs to the parameter whose path ends its own. Factored leaves (Adafactor) lack a dimension of it; what
    matches no parameter, such as counters, is replicated.

    Returns:
        a tree like `opt_state` with one tuple of logical axes (None: replicated dimension) a leaf.
    """
    shapes = {names_of(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    logical = {names_of(p): a for p, a in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)}

    def one(path: Any, leaf: Any) -> tuple:
        names = names_of(path)
        owner = next((names[i:] for i in range(len(names)) if names[i:] in shapes), None)
        if owner is None:
            return (None,) * leaf.ndim
        if leaf.shape == shapes[owner]:
            return logical[owner]
        for out in range(len(shapes[owner])):
            if leaf.shape == shapes[owner][:out] + shapes[owner][out + 1 :]:
                return logical[owner][:out] + logical[owner][out + 1 :]
        return (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(one, opt_state)

"""Attention by a kernel that never holds the scores, on one device or on those of a mesh; `moe_jax.kernels` says when.

The compiler cannot split a kernel: under a mesh each device calls it for its own rows and heads, inside `shard_map`.
"""

import contextlib
from collections.abc import Callable, Generator
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.axes import Rules
from moe_jax.kernels import Kind
from moe_jax.rules import by_hand, current_mesh, spec

SPLASH_TILES = (512, 384, 256, 128)  # tokens of a tile on TPU: the widest that divides a row
TRITON_TILES = {"forward": 64, "backward": 32}  # on GPU; what a core's memory holds of heads 128 wide in float32


class How(NamedTuple):
    """What is the same for every device."""

    kind: Kind
    scale: float  # of the products of queries and keys
    window: int | None = None  # keys that a query sees at most, itself included
    interpret: bool = False  # run the kernel on any processor, step by step: to test it


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, seen: jax.Array, sinks: jax.Array | None, how: How
) -> jax.Array:
    """Splash attention for TPU: tiles that the mask empties are not visited.

    Args:
        q: [B, H, L, N]; k, v: [B, J, M, N], whose widths may differ; segments: [B, L], seen: [B, M] int32; sinks: [H].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, M = q.shape[2], k.shape[2]
    rows, keys = (next(t for t in SPLASH_TILES if n % t == 0) for n in (L, M))
    sizes = kernels.BlockSizes(
        block_q=rows, block_kv=keys, block_q_dkv=rows, block_kv_dkv=keys, block_q_dq=rows, block_kv_dq=keys
    )
    mask: masks.Mask = masks.FullMask((L, M))
    if how.kind == "causal":
        behind = None if how.window is None else how.window - 1
        mask = masks.CausalMask((L, M)) if behind is None else masks.LocalMask((L, M), (behind, 0), 0)
    every = masks.MultiHeadMask([mask] * q.shape[1])
    kernel = kernels.make_splash_mha(every, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=how.interpret)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, seen: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, seen), sinks=sinks)

    return jax.vmap(one)(q * how.scale, k, v, segments, seen)


def triton(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, seen: jax.Array, sinks: jax.Array | None, how: How
) -> jax.Array:
    """The kernel of Pallas and Triton for GPU, which takes keys and values of every query head.

    Args:
        q: [B, H, L, N]; k, v: [B, J, L, N]; segments: [B, L] int32, of queries and keys alike.
    """
    from jax.experimental.pallas.ops.gpu import attention as kernels

    assert sinks is None and how.window is None and how.kind != "reading", "as kernels.lacking_on_gpu says"
    k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    ahead, back = TRITON_TILES["forward"], TRITON_TILES["backward"]
    sizes = kernels.BlockSizes(
        block_q=ahead, block_k=ahead, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back, block_kv_dq=back
    )
    given = (a.transpose(0, 2, 1, 3) for a in (q, k, v))  # [B,L,H,N]
    options = {"sm_scale": how.scale, "causal": how.kind == "causal", "block_sizes": sizes}
    return kernels.mha(*given, segments, **options, interpret=how.interpret).transpose(0, 2, 1, 3)


KERNELS: dict[str, Callable[..., jax.Array]] = {"tpu": splash, "gpu": triton}


@contextlib.contextmanager
def lenient() -> Generator[None]:
    """JAX's own kernels mix types and ranks, which a caller may have forbidden."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def sees(segments: jax.Array, seen: jax.Array, kind: Kind) -> jax.Array:
    """Whether a token [B, L] of an encoder, or one that reads it, sees any of the keys [B, M]."""
    if kind == "both ways":
        return segments > 0

    def found(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        theirs = jnp.sort(theirs)  # no table of all pairs [L, M]
        at = jnp.minimum(jnp.searchsorted(theirs, mine), theirs.shape[0] - 1)
        return (theirs[at] == mine) & (mine > 0)

    return jax.vmap(found)(segments, seen)


def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    seen: jax.Array,
    sinks: jax.Array | None,
    how: How,
    platform: str,
    rules: Rules | None,
) -> jax.Array:
    """What `causal_attention` or, of an encoder, `whole_attention` computes, for whole rows.

    Args:
        q: [B, J, R, L, N], R query heads to each of the J key/value heads; k, v: [B, J, M, N]; segments: [B, L] int32,
            seen: [B, M] int32, 0 for padding; sinks: [H].
        platform: `tpu` or `gpu`.
    """
    kernel = KERNELS[platform]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, seen: jax.Array, *rest: jax.Array):
        B, J, R, L, N = q.shape
        own = rest[0].reshape(J * R) if rest else None
        with lenient():
            y = kernel(q.reshape(B, J * R, L, N), k, v, segments, seen, own, how)  # [B,H,L,N]
        if how.kind != "causal":
            y = jnp.where(sees(segments, seen, how.kind)[:, None, :, None], y, jnp.zeros((), y.dtype))
        return y.reshape(B, J, R, L, -1)

    given = [q, k, v, segments, seen]
    if sinks is not None:
        given.append(sinks.reshape(q.shape[1:3]))
    if rules is None:
        return local(*given)
    heads, sizes = rules.act_heads, current_mesh().shape
    shared = k.shape[1] % prod(sizes[a] for a in heads) > 0  # then each device has a part of every group of heads
    groups, within = ((), heads) if shared else (heads, ())
    queries, keys = spec((rules.batch, groups, within, (), ())), spec((rules.batch, groups, (), ()))
    row = spec((rules.batch, ()))
    specs = [queries, keys, keys, row, row, spec((groups, within))][: len(given)]
    return by_hand(local, in_specs=tuple(specs), out_specs=queries, checked=False)(*given)

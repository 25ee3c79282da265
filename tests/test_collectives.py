"""Reading compiled programs: what moves how many bytes over which axes, how often, and from where."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from moe_jax import mesh as meshes
from moe_jax.collectives import array_bytes, carried, merged, module_of, phase_of, read, replica_groups, sent
from moe_jax.config import MeshConfig
from moe_jax.hlo import Unreadable

SIZES = MeshConfig(data=2, expert=4)
LOCAL = 4 * 8 * 16  # bytes of the float32 [8, 16] that each device holds


def compiled(f, x=None, sizes=SIZES):
    """Collectives of `f` of one device's [8, 16], inside `shard_map` over the mesh."""
    mesh = meshes.build_mesh(sizes, jax.devices()[: sizes.size])
    spec = PartitionSpec(("data", "expert"))
    x = jax.ShapeDtypeStruct((8 * sizes.size, 16), jnp.float32) if x is None else x
    with jax.set_mesh(mesh):
        run = jax.shard_map(f, in_specs=spec, out_specs=spec, check_vma=False)
        return read(jax.jit(run).lower(x).compile().as_text(), mesh)


# Bytes that leave a device, from the definition of each operation: n-1 of n parts of a buffer, and so on.
MOVES = {
    "all-to-all": (lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True), LOCAL * 3 // 4),
    "all-gather": (lambda x: lax.all_gather(x, "expert", tiled=True)[:8], LOCAL * 3),
    "all-reduce": (lambda x: lax.psum(x, "expert"), 2 * LOCAL * 3 // 4),
    "reduce-scatter": (lambda x: jnp.tile(lax.psum_scatter(x, "expert", tiled=True), (4, 1)), LOCAL * 3 // 4),
    "collective-permute": (lambda x: lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]), LOCAL),
}


@pytest.mark.parametrize("op", MOVES)
def test_each_operation(op):
    f, moved = MOVES[op]
    (found,) = compiled(f)
    assert (found.op, found.axes, found.moved, found.times, found.conditional) == (op, ("expert",), moved, 1, False)


def test_over_several_axes_and_over_none():
    (found,) = compiled(lambda x: lax.psum(x, ("data", "expert")))
    assert found.axes == ("data", "expert") and found.moved == 2 * LOCAL * 7 // 8
    assert compiled(lambda x: lax.psum(x, ("fsdp", "tensor"))) == []


def test_loops_are_multiplied_out():
    def f(x):
        def inner(x, _):
            return lax.psum(x, "expert") * 0.1, None

        def outer(x, _):
            return lax.scan(inner, lax.psum(x, "data") * 0.1, length=5)[0], None

        return lax.scan(outer, x, length=3)[0]

    assert {c.axes: c.times for c in compiled(f)} == {("data",): 3, ("expert",): 15}


def test_branches_count_once_and_say_so():
    def f(x):
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "expert"), lambda x: lax.psum(x, "data") * 2, x)

    found = compiled(f)
    assert {(c.axes, c.times, c.conditional) for c in found} == {(("expert",), 1, True), (("data",), 1, True)}


def test_phase_and_module_of_a_gradient():
    def f(x):
        def loss(x):
            with jax.named_scope("experts"):
                return (lax.all_gather(x, "expert", tiled=True) ** 3).sum()

        x = x - jax.grad(loss)(x)
        with jax.named_scope("optimizer"):
            return x * lax.psum(x, "expert")

    found = {(c.op, c.phase, c.modules) for c in compiled(f)}
    assert found == {
        ("all-gather", "forward", ("experts",)),
        ("reduce-scatter", "backward", ("experts",)),
        ("all-reduce", "optimizer", ("optimizer",)),
    }


# Names

SOURCES = {
    "jit(step)/jvp()/while/body/closed_call/ffn/dispatch/sharding_constraint": ("forward", "dispatch"),
    "jit(step)/transpose(jvp())/while/body/closed_call/ffn/experts/dot_general": ("backward", "experts"),
    "jit(step)/transpose(jvp(embed))/scatter-add": ("backward", "embed"),
    "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/attention/dot": (
        "recompute",
        "attention",
    ),
    "jit(step)/optimizer/reduce_sum": ("optimizer", "optimizer"),
    "jit(step)/ffn/dot_general": ("forward", "ffn"),
    "": ("unknown", "other"),
    "slices": ("unknown", "slices"),
    "ice/cells": ("forward", "other"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_phases_and_modules_of_names(source):
    assert (phase_of(source), module_of(source)) == SOURCES[source]


def test_merged_names():
    assert merged("jit(f)/(jvp(a)/x:optimizer/b)") == ["jit(f)/jvp(a)/x", "jit(f)/optimizer/b"]
    assert merged("jit(f)/transpose(jvp(head))") == ["jit(f)/transpose(jvp(head))"]
    assert merged("jit(f)/(a:b)/c") == ["jit(f)/(a:b)/c"]
    assert merged("") == [""]


# Forms that compilers write

GROUPS = {
    "replica_groups={{0,2},{1,3}}": [[0, 2], [1, 3]],
    "replica_groups={}": [[0, 1, 2, 3]],
    "replica_groups=[2,2]<=[4]": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0)": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'b'}": [[0, 1], [2, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'a'}": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}": [[0, 1], [2, 3]],
    "source_target_pairs={{0,1},{1,0}}": [[0, 1], [1, 0]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_replica_groups(text):
    assert replica_groups(f"channel_id=1, {text}, dimensions={{0}}", 4) == GROUPS[text]


@pytest.mark.parametrize("text", ["", "replica_groups=mesh['a'=4] {'a':(1)2}"])
def test_unknown_replica_groups_are_not_guessed(text):
    with pytest.raises(Unreadable):
        replica_groups(text, 4)


def test_bytes_of_types():
    assert array_bytes("f32[2,8]{1,0:T(8,128)}") == 64
    assert array_bytes("(bf16[2,8]{1,0:T(8,128)(2,1)}, /*index=1*/s32[], pred[3]{0}, token[])") == 32 + 4 + 3
    assert array_bytes("f8e4m3fn[4]{0}") == 4 and array_bytes("s4[3]{0}") == 2 and array_bytes("c64[2]") == 16
    with pytest.raises(Unreadable, match="element type opaque"):
        array_bytes("opaque[]")


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_halves_of_an_all_reduce(n):
    """It is a reduce-scatter and an all-gather of what that leaves."""
    whole = 24 * n
    assert sent("all-reduce", whole, n) == sent("reduce-scatter", whole // n, n) + sent("all-gather", whole, n)


HEAD = "HloModule m\n\n"
SUM = "%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  ROOT %c = f32[] add(%a, %a)\n}\n\n"


def text(main, *others):
    """A program of a main computation and others, in the compiler's notation."""
    return HEAD + SUM + "".join(f"{o}\n}}\n\n" for o in others) + f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{main}\n}}\n"


def reads(program):
    return read(program, meshes.build_mesh(SIZES))


def test_halves_count_once_and_return_their_operands_too():
    """As GPUs run them; the bytes are those of the second element, the result."""
    (found,) = reads(
        text(
            "  %p = f32[8]{0} parameter(0)\n"
            "  %s = ((f32[2]{0}), f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}\n"
            "  ROOT %d = f32[8]{0} all-gather-done(%s)"
        )
    )
    assert (found.op, found.axes, found.bytes, found.moved) == ("all-gather", ("expert",), 32, 24)


def test_wrapped_in_an_asynchronous_computation():
    (found,) = reads(
        text(
            "  %p = f32[8]{0} parameter(0)\n"
            "  %s = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%w\n"
            "  ROOT %d = f32[8]{0} async-done(%s), calls=%w",
            "%w (q: f32[8]) -> f32[8] {\n"
            "  %q = f32[8]{0} parameter(0)\n"
            "  ROOT %a = f32[8]{0} all-to-all(%q), replica_groups=[2,4]<=[8], dimensions={0}",
        )
    )
    assert (found.op, found.times, found.moved) == ("all-to-all", 1, 24)


SCATTERED = (
    "%f (q: f32[8]) -> f32[2] {\n"
    "  %q = f32[8]{0} parameter(0)\n"
    "  %r = f32[8]{0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%sum\n"
    "  ROOT %x = f32[2]{0} slice(%r), slice={[0:2]}"
)


def test_a_reduce_scatter_inside_a_fusion():
    """As TPUs write it."""
    main = (
        "  %p = f32[8]{0} parameter(0)\n"
        "  ROOT %d = f32[2]{0} fusion(%p), kind=kCustom, calls=%f, "
        'metadata={op_name="jit(s)/transpose(jvp())/experts/dot"}, '
        'backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}'
    )
    (found,) = reads(text(main, SCATTERED))
    assert (found.op, found.bytes, found.moved) == ("reduce-scatter", 8, 24)
    assert (found.phase, found.modules) == ("backward", ("experts",))
    with pytest.raises(Unreadable, match="inside the fusion d: overlapped"):
        reads(text(main.replace("ScatterFusion", "OtherFusion"), SCATTERED))


def loop(condition, start="constant(0)", step="constant(1)", config=""):
    """A loop around an all-reduce, whose counter is the first element of its state."""
    return text(
        f"  %p = f32[8]{{0}} parameter(0)\n  %z = s32[] {start}\n  %c = s32[] copy(%z)\n"
        "  %t = (s32[], f32[8]{0}) tuple(%c, %p)\n"
        f"  %w = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%body{config}\n"
        "  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1",
        "%cond (s: (s32[], f32[8])) -> pred[] {\n  %s = (s32[], f32[8]{0}) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%s), index=0\n  %n = s32[] constant(7)\n{condition}",
        "%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {\n  %s = (s32[], f32[8]{0}) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%s), index=0\n  %k = s32[] {step}\n"
        "  %h = s32[] copy(%i)\n  %j = s32[] add(%h, %k)\n"
        "  %x = f32[8]{0} get-tuple-element(%s), index=1\n"
        "  %y = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum\n"
        "  ROOT %o = (s32[], f32[8]{0}) tuple(%j, %y)",
    )


LESS = "  ROOT %l = pred[] compare(%i, %n), direction=LT"


@pytest.mark.parametrize(
    "arguments, trips",
    [
        ({"condition": LESS}, 7),
        ({"condition": LESS, "start": "constant(2)"}, 5),
        ({"condition": LESS, "step": "constant(2)"}, 4),
        ({"condition": LESS, "config": ', backend_config={"known_trip_count":{"n":"3"}}'}, 3),
    ],
    ids=str,
)
def test_trip_counts_without_the_compilers_word(arguments, trips):
    """TPU programs hold the counter alone: it begins, grows and ends at constants."""
    assert [c.times for c in reads(loop(**arguments))] == [trips]


@pytest.mark.parametrize(
    "arguments",
    [
        {"condition": "  ROOT %l = pred[] compare(%i, %n), direction=NE"},
        {"condition": '  ROOT %l = pred[] custom-call(%i), custom_call_target="more"'},
        {"condition": LESS, "start": 'custom-call(), custom_call_target="somewhere"'},
        {"condition": LESS, "step": 'custom-call(), custom_call_target="some"'},
    ],
    ids=str,
)
def test_unknown_trip_counts_are_not_guessed(arguments):
    with pytest.raises(Unreadable, match="loop w has no trip count that can be read"):
        reads(loop(**arguments))


def test_what_is_no_program_is_refused():
    with pytest.raises(Unreadable, match="no program in this text"):
        read("", meshes.build_mesh(SIZES))


class Slices:
    """A mesh of two slices of four devices each, as far as reading needs it."""

    axis_names = ("data", "fsdp", "expert", "tensor")
    size = 8

    def __init__(self):
        shape, devices = (2, 2, 2, 1), [SimpleNamespace(slice_index=i // 4) for i in range(8)]
        self.devices = np.array(devices, object).reshape(shape)


SEND = (
    "  %p = f32[8]{0} parameter(0)\n  %t = token[] after-all()\n"
    "  %s = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=1, frontend_attributes={TARGET}\n"
    "  %r = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=2, frontend_attributes={TARGET}\n"
    "  ROOT %g = f32[8]{0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}"
)
KIND = '_xla_megascale_transfer_type="ALL_REDUCE"'


@pytest.mark.parametrize(
    "target", ['_xla_megascale_target="{1,2}x{0:3}"', "_xla_megascale_target={{100000,200000},{100003,200003}}"]
)
def test_traffic_between_slices(target):
    """A send carries it, once; groups of a slice's own collectives number its devices."""
    send, gather = read(text(SEND.replace("TARGET", f"{target},{KIND}")), Slices())
    assert (send.op, send.axes, send.bytes, send.moved) == ("send", ("data",), 32, 32)
    assert (gather.op, gather.axes) == ("all-gather", ("expert",))


def test_a_send_without_a_target_is_not_guessed():
    with pytest.raises(Unreadable, match=r"no target in the send[\s\S]*remedy: try another --topology"):
        read(text(SEND.replace("TARGET", KIND)), Slices())


# Of 32 bytes handed to the network among 4 slices, what leaves a device: all to each other one, or a part to each.
CARRIED = {"ALL_GATHER": 96, "ALL_REDUCE": 48, "REDUCE_SCATTER": 24, "ALL_TO_ALL": 24, "ONE_TO_ONE": 32}


@pytest.mark.parametrize("kind", CARRIED)
def test_bytes_between_slices(kind):
    assert carried(f'send(%p), _xla_megascale_transfer_type="{kind}"', 32, 4) == CARRIED[kind]


@pytest.mark.parametrize("line", ["send(%p)", 'send(%p), _xla_megascale_transfer_type="BROADCAST"'])
def test_an_unknown_transfer_is_not_guessed(line):
    with pytest.raises(Unreadable, match="no known transfer type"):
        carried(line, 32, 4)


# Where a value comes from


def origins(f, *shapes):
    """The arguments that the all-gathers of a jitted function of dicts move, by its compiled program."""
    mesh = meshes.build_mesh(SIZES)
    with jax.set_mesh(mesh):
        run = jax.shard_map(f, in_specs=PartitionSpec(("data", "expert")), out_specs=PartitionSpec(), check_vma=False)
        program = jax.jit(run).lower(*shapes).compile().as_text()
    return [c.arguments for c in read(program, mesh) if c.op == "all-gather"]


def test_gathered_arguments_are_named():
    """Through slices, casts and a loop over layers; what is computed has no name."""

    def f(p):
        def layer(x, w):
            w = lax.all_gather(w.astype(jnp.bfloat16).T, "expert", axis=1, tiled=True)
            return jnp.tanh(x @ w.astype(jnp.float32)).reshape(16, 4, 16)[:, 0], None

        x = lax.all_gather(p["x"] * 3, "data", axis=0, tiled=True)
        return lax.scan(layer, x, p["w"])[0]

    shapes = {"x": jax.ShapeDtypeStruct((64, 16), jnp.float32), "w": jax.ShapeDtypeStruct((24, 16, 16), jnp.float32)}
    found = origins(f, shapes)
    assert sorted(found) == [(), ("p['w']",)]


def test_a_gather_written_as_a_sum():
    """Each device puts its part into zeros and all are added, as TPUs do; it moves what an all-reduce moves."""
    main = (
        "  %p = f32[2]{0} parameter(0), metadata={op_name=\"state.params['w']\"}\n"
        "  %c = f32[] constant(0)\n  %b = f32[8]{0} broadcast(%c), dimensions={}\n  %i = s32[] partition-id()\n"
        "  %u = f32[8]{0} dynamic-update-slice(%b, %p, %i)\n"
        "  ROOT %r = f32[8]{0} all-reduce(%u), replica_groups=[2,4]<=[8], to_apply=%sum"
    )
    (found,) = reads(text(main))
    assert (found.op, found.summed, found.arguments) == ("all-gather", True, ("state.params['w']",))
    assert found.moved == 2 * 32 * 3 // 4
    (found,) = reads(text(main.replace("constant(0)", "parameter(1)").replace("broadcast(%c)", "sine(%c)")))
    assert (found.op, found.summed) == ("all-reduce", False)


def test_merged_arrays_share_a_phase_and_keep_their_modules():
    (found,) = reads(
        text(
            "  %p = f32[8]{0} parameter(0)\n"
            '  %a = f32[8]{0} sine(%p), metadata={op_name="jit(s)/transpose(jvp())/ffn/sin"}\n'
            "  %b = f32[8]{0} cosine(%p)\n"
            "  %s = (f32[8]{0}, f32[8]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%sum, "
            'metadata={op_name="jit(s)/transpose(jvp())/attention/dot"}\n'
            "  ROOT %g = f32[8]{0} get-tuple-element(%s), index=0"
        )
    )
    assert (found.phase, found.modules, found.bytes) == ("backward", ("ffn", "other"), 64)


@pytest.mark.parametrize(
    "user,sliced", [("dynamic-slice(%r, %i), dynamic_slice_sizes={2}", True), ("slice(%r), slice={[0:2]}", False)]
)
def test_a_sum_of_which_a_part_is_used(user, sliced):
    """Each device its own part: what a reduce-scatter would have sent it. The same part for all is none."""
    main = (
        "  %p = f32[8]{0} parameter(0)\n"
        "  %i = s32[] partition-id()\n"
        "  %r = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum\n"
        f"  ROOT %d = f32[2]{{0}} {user}"
    )
    assert [c.sliced for c in reads(text(main))] == [sliced]


def test_ragged_rows_count_as_the_buffer_that_holds_them():
    """How many travel is known only when they do."""
    (found,) = reads(
        text(
            "  %p = f32[8]{0} parameter(0)\n"
            "  %o = f32[16]{0} broadcast(%p), dimensions={0}\n"
            "  %n = s32[4]{0} iota(), iota_dimension=0\n"
            "  %r = f32[16]{0} ragged-all-to-all(%p, %o, %n, %n, %n, %n), replica_groups=[2,4]<=[8]\n"
            "  ROOT %d = f32[8]{0} slice(%r), slice={[0:8]}"
        )
    )
    assert (found.op, found.axes, found.bytes, found.moved) == ("ragged-all-to-all", ("expert",), 64, 48)

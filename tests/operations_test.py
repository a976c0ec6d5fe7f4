"""FLOPs and bytes of a program's operations: of texts that are easily counted, and of programs of known FLOPs."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from mmei_jax.profiling.operations import Work, num_runs, read_operations, total_bytes, total_work
from mmei_jax.profiling.programs import describe_program
from mmei_jax.program_text import parse_program

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[4,8], q: f32[100,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[100,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%q, %zero, %zero), dynamic_slice_sizes={1,8}
  %rows = f32[4,8]{1,0} broadcast(%row), dimensions={0,1}
  %scaled = f32[4,8]{1,0} multiply(%p, %rows)
  %curved = f32[4,8]{1,0} exponential(%scaled)
  ROOT %shifted = f32[4,8]{1,0} add(%curved, %p)
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %w = f32[8,8]{1,0} constant({...})
  %looped = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %looped)
}

%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %is_less = pred[] constant(true)
}

ENTRY %main (x: f32[4,16], y: f32[16,8], image: f32[1,5,5,3], q: f32[100,8]) -> f32[4,8] {
  %x.1 = f32[4,16]{1,0} parameter(0)
  %y = f32[16,8]{1,0} parameter(1)
  %image = f32[1,5,5,3]{3,2,1,0} parameter(2)
  %q.1 = f32[100,8]{1,0} parameter(3)
  %kernel = f32[3,3,3,2]{3,2,1,0} constant({...})
  %product = f32[4,8]{1,0} dot(%x.1, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %padded = f32[1,5,5,2]{3,2,1,0} convolution(%image, %kernel), window={size=3x3 pad=1_1x1_1}, LABELS
  %none = f32[] constant(0)
  %total = f32[4]{0} reduce(%product, %none), dimensions={1}, to_apply=%add
  %fusion = f32[4,8]{1,0} fusion(%product, %q.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp(M)/mul"}
  %library = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%x.1, %y), custom_call_target="__cublas$gemm", backend_config=GEMM
  %secret = f32[4,8]{1,0} custom-call(%fusion), custom_call_target="Secret"
  %start = (s32[], f32[4,8]{1,0}) tuple(%none, %secret)
  %known = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config=TRIPS
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%known), index=1
}
"""
PROGRAM = (
    PROGRAM.replace("LABELS", "dim_labels=b01f_01io->b01f")
    .replace("TRIPS", '{"known_trip_count":{"n":"5"}}')
    .replace(
        "GEMM", '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}'
    )
)
SIDE, NUM_LAYERS = 64, 7


def product(*sizes):
    return Work(2.0 * math.prod(sizes), 2.0 * math.prod(sizes))


@pytest.fixture(scope="module")
def found():
    return {operation.name: operation for operation in read_operations(parse_program(PROGRAM))}


def test_each_operation_is_found_once_and_what_is_fused_in_one(found):
    assert list(found) == ["product", "padded", "total", "fusion", "library", "secret", "looped"]
    assert found["looped"].num_calls == 5
    assert found["fusion"].op_name == "jit(step)/jvp(M)/mul"
    assert found["secret"].opcode == "Secret"


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("product", product(4, 8, 16)),
        # Along each axis 13 pairs of the 15 are within the image.
        ("padded", product(13 * 13, 3, 2)),
        ("total", Work(4.0 * 7)),
        # The exponential is not counted.
        ("fusion", Work(2.0 * 4 * 8)),
        ("library", dataclasses.replace(product(4, 8, 16), is_library=True)),
        ("secret", Work(is_known=False)),
        ("looped", product(4, 8, 8)),
    ],
)
def test_work_of_one_call(found, name, work):
    assert found[name].work == work


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    # The fusion reads one row of q alone.
    [("product", 4 * (64 + 128 + 32)), ("fusion", 4 * (32 + 8 + 32)), ("padded", 4 * (75 + 54 + 50))],
)
def test_bytes_of_one_call(found, name, num_bytes):
    assert found[name].num_bytes == num_bytes


def test_operation_counts_as_often_as_it_runs(found):
    assert num_runs(found["looped"]) == 5
    assert num_runs(found["looped"], counts_loops_once=True) == 1
    # In a loop of unknown length.
    assert num_runs(dataclasses.replace(found["looped"], num_calls=None)) == 1


def test_totals_count_loops_as_often_as_they_run(found):
    whole, once = (total_work(found.values(), counts_loops_once=once) for once in (False, True))
    assert whole.flops - once.flops == 4 * found["looped"].work.flops
    assert not whole.is_known
    difference = total_bytes(found.values()) - total_bytes(found.values(), counts_loops_once=True)
    assert difference == 4 * found["looped"].num_bytes


def known_products(x, weights):
    """Products of known FLOPs, one after the other."""
    for weight in weights:
        x = x @ weight
    return x


def known_scan(x, weights):
    """The same in a scan."""
    return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]


def known_nested_scan(x, weights):
    """The same in a scan of scans, with a gradient: three products for each."""

    def twice(x):
        return jax.lax.scan(lambda x, _: (known_scan(x, weights), None), x, None, length=2)[0].sum()

    return jax.grad(twice)(x)


@pytest.mark.parametrize(
    ("function", "num_products"),
    [
        (known_products, NUM_LAYERS),
        (known_scan, NUM_LAYERS),
        # Only the state has a gradient: one product forward, which nothing reads, and one back.
        (known_nested_scan, 2 * NUM_LAYERS),
    ],
)
def test_flops_of_a_known_program_are_right_to_five_percent(function, num_products):
    x, weights = jnp.ones((SIDE, SIDE)), jnp.ones((NUM_LAYERS, SIDE, SIDE))
    facts = describe_program(jax.jit(function).lower(x, weights).compile())
    expected = num_products * 2 * SIDE**3
    assert facts.flops == pytest.approx(expected, rel=0.05)
    assert facts.product_flops == pytest.approx(expected, rel=0.05)
    assert facts.is_work_known
    assert facts.num_unknown_loops == 0


def test_gradient_of_a_convolution_counts_as_the_compiler_does():
    def loss(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        ).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.ones((5, 4, 6)), jnp.ones((2, 33, 8))).compile()
    counted = total_work(read_operations(parse_program(compiled.as_text())))
    assert counted.product_flops > 1000
    assert counted.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


# As XLA writes programs for GPUs: products are calls of cuBLAS and cuDNN, some of them within fusions and loops.
GPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%sliced (rows: f32[9,64,32], y: f32[32,48]) -> f32[64,48] {
  %rows = f32[9,64,32]{2,1,0} parameter(0)
  %y = f32[32,48]{1,0} parameter(1)
  %one = f32[1,64,32]{2,1,0} slice(%rows), slice={[0:1], [0:64], [0:32]}
  %view = f32[64,32]{1,0} bitcast(%one)
  %inner = (f32[64,48]{1,0}, s8[4194304]{0}) custom-call(%view, %y), custom_call_target="__cublas$lt$matmul", GEMM(1, 0)
  ROOT %sliced.1 = f32[64,48]{1,0} get-tuple-element(%inner), index=0
}

%added (a: f32[64,48], b: f32[64,48]) -> f32[64,48] {
  %a = f32[64,48]{1,0} parameter(0)
  %b = f32[64,48]{1,0} parameter(1)
  ROOT %sum = f32[64,48]{1,0} add(%a, %b)
}

ENTRY %main (x: bf16[6,32,64], image: bf16[2,10,10,4], rows: f32[9,64,32]) -> f32[64,48] {
  %x = bf16[6,32,64]{2,1,0} parameter(0)
  %w = bf16[6,32,48]{2,1,0} parameter(1)
  %image = bf16[2,10,10,4]{3,2,1,0} parameter(2)
  %kernel = bf16[6,3,3,4]{3,2,1,0} parameter(3)
  %change = bf16[2,4,4,6]{3,2,1,0} parameter(4)
  %rows.1 = f32[9,64,32]{2,1,0} parameter(5)
  %y.1 = f32[32,48]{1,0} parameter(6)
  %gemm = (bf16[6,64,48]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", GEMM(1, 1)
  %conv = (bf16[2,4,4,6]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), CONVOLUTION(Forward)
  %back = (bf16[2,10,10,4]{3,2,1,0}, u8[0]{0}) custom-call(%change, %kernel), CONVOLUTION(BackwardInput)
  %learnt = (bf16[6,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %change), CONVOLUTION(BackwardFilter)
  %cut = f32[64,48]{1,0} fusion(%rows.1, %y.1), kind=kCustom, calls=%sliced
  ROOT %out = f32[64,48]{1,0} fusion(%cut, %cut), kind=kLoop, calls=%added
}
"""
GPU_PROGRAM = re.sub(
    r"GEMM\((\d), (\d)\)",
    r'backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_batch_dimensions":[],'
    r'"lhs_contracting_dimensions":["\1"],"rhs_contracting_dimensions":["\2"]},"epilogue":"DEFAULT"}}',
    re.sub(
        r"CONVOLUTION\((\w+)\)",
        r'window={size=3x3 stride=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv\1"',
        GPU_PROGRAM,
    ),
)
# Of 12 pairs along an axis, one at each end is padding.
CONVOLUTION = 2.0 * 2 * 4 * 6 * 10 * 10


class CompiledForGPU(jax.stages.Compiled):
    """What ``compile()`` gives, as far as it is read."""

    input_shardings = output_shardings = ()

    def __init__(self, text, costs):
        self._text, self._costs = text, costs

    def as_text(self):
        return self._text

    def cost_analysis(self):
        return self._costs

    def memory_analysis(self):
        names = ("temp", "argument", "output", "alias", "generated_code")
        return types.SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("gemm", 2.0 * 6 * 64 * 48 * 32),
        ("conv", CONVOLUTION),
        ("back", CONVOLUTION),
        ("learnt", CONVOLUTION),
        ("cut", 2.0 * 64 * 48 * 32),
    ],
)
def test_products_of_libraries_are_counted_from_their_shapes(name, flops):
    operations = {operation.name: operation for operation in read_operations(parse_program(GPU_PROGRAM))}
    assert operations[name].work == Work(flops, flops, is_library=True)


def test_flops_of_a_gpu_program_are_the_texts_because_the_compiler_counts_no_library():
    """To XLA's cost analysis, each of these calls is -1 FLOPs and -1 bytes."""
    known = 2 * 6 * 64 * 48 * 32 + 2 * 64 * 48 * 32 + 3 * CONVOLUTION + 64 * 48
    facts = describe_program(CompiledForGPU(GPU_PROGRAM, {"flops": 64.0 * 48 - 5, "bytes accessed": 3.0 * 64 * 48 - 5}))
    assert facts.flops == known
    assert facts.flops_source == "the program's text"
    assert facts.is_work_known
    assert facts.bytes_accessed == total_bytes(facts.operations)


def test_flops_are_the_compilers_where_no_library_computes_products():
    before, _, after = GPU_PROGRAM.partition("ENTRY %main")
    text = before + "ENTRY %main" + "\n".join(line for line in after.splitlines() if "custom-call" not in line)
    text = text.replace("custom-call(%view, %y)", 'custom-call(%view), custom_call_target="Secret"')
    text = text.replace('custom_call_target="__cublas$lt$matmul"', 'xla="none"')
    facts = describe_program(CompiledForGPU(text, {"flops": 3000.0, "bytes accessed": 5.0}))
    assert (facts.flops, facts.bytes_accessed, facts.flops_source) == (3000.0, 5.0, "XLA's cost analysis")
    # A fusion of which nobody knows what it computes is named.
    assert facts.unknown_calls == ("fusion",)


# As XLA writes programs for TPUs: S(1) is the memory on the chip, into which arrays are copied ahead of their use.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%first (whole: f32[64,128]) -> f32[8,128] {
  %whole = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %few = f32[8,128]{1,0:T(8,128)} slice(%whole), slice={[0:8], [0:128]}
}

%fused (p: f32[8,128], q: f32[8,128], r: f32[64,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %q = f32[8,128]{1,0:T(8,128)} parameter(1)
  %r = f32[64,128]{1,0:T(8,128)S(1)} parameter(2)
  %part = f32[8,128]{1,0:T(8,128)} fusion(%r), kind=kLoop, calls=%first
  %both = f32[8,128]{1,0:T(8,128)} add(%p, %q)
  ROOT %all = f32[8,128]{1,0:T(8,128)} add(%both, %part)
}

ENTRY %main (x: f32[8,128], table: f32[64,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %table = f32[64,128]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %begun = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%table), slice={}
  %rows = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%begun)
  %zero = s32[]{:T(128)} constant(0)
  %big = f32[64,128]{1,0:T(8,128)S(1)} copy(%table)
  %wide = f32[64,128]{1,0:T(8,128)S(1)} dynamic-update-slice(%big, %rows, %zero, %zero)
  %mixed = f32[8,128]{1,0:T(8,128)} fusion(%near, %x, %wide), kind=kLoop, calls=%fused
  %kept = f32[8,128]{1,0:T(8,128)S(1)} fusion(%near, %near, %wide), kind=kLoop, calls=%fused
  %far = f32[8,128]{1,0:T(8,128)S(1)} fusion(%near, %near, %table), kind=kLoop, calls=%fused
  %read = f32[8,128]{1,0:T(8,128)} slice(%wide), slice={[0:8], [0:128]}
  %narrow = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convert(%x)
  ROOT %out = f32[8,128]{1,0:T(8,128)} multiply(%mixed, %kept)
}
"""
NUM_BYTES = 4 * 8 * 128


@pytest.mark.parametrize(
    ("name", "num_arrays"),
    [
        # Read in the main memory, written on the chip.
        ("start", 1),
        ("begun", 2),
        ("big", 8),
        ("wide", 0),
        # What the one reads of, and where the other writes, is on the chip.
        ("mixed", 2),
        ("kept", 0),
        # Of the table one eighth, which a fusion within the fusion takes.
        ("far", 1),
        ("read", 1),
        ("narrow", 1),
        ("out", 2),
    ],
)
def test_what_lies_on_the_chip_is_not_moved(name, num_arrays):
    operations = {operation.name: operation for operation in read_operations(parse_program(TPU_PROGRAM))}
    assert operations[name].num_bytes == num_arrays * NUM_BYTES


def test_the_same_mark_on_a_gpu_is_main_memory():
    text = re.sub(r":T\(8,128\)(\(2,1\))?", ":", TPU_PROGRAM).replace("{1,0:}", "{1,0}")
    operations = {operation.name: operation for operation in read_operations(parse_program(text))}
    assert operations["kept"].num_bytes == 4 * NUM_BYTES

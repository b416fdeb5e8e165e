"""The analysis of kernels' code, on short listings, and the estimates from the analysis."""

import json

import pytest
import torch

from ckpt_kernels import backends
from ckpt_kernels.catalogue.blocks import BLOCKS, BY_NAME, DROPOUT_BLOCKS
from ckpt_kernels.inspect import (
    MACHINES,
    Usage,
    Work,
    accesses,
    below_target,
    estimate,
    roofline,
    sass,
    to_json,
    work,
    worst,
)
from ckpt_kernels.inspect.tables import required_work

# A loop with a load, a store and a special function, a slow path after the end that jumps back, and padding.
LISTING = """
	.target	sm_90a
	.section	.text.scale,"ax",@progbits
.text.scale:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, 0x10 ;
        /*0020*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/              @!P3 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/               @P0 STG.E.64 desc[UR4][R8.64], R4 ;
        /*0080*/                   SHFL.BFLY PT, R9, R4, 0x10, 0x1f ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   ISETP.GE.AND P0, PT, R2, UR5, PT ;
        /*00b0*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*00c0*/                   STG.E desc[UR4][R8.64], R9 ;
        /*00d0*/                   EXIT ;
.L_x_2:
        /*00e0*/                   FADD.FTZ R4, R4, R7 ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
        /*0110*/                   NOP;
.L_x_5:
"""


def test_a_loop_lies_between_a_backward_branch_and_its_target() -> None:
    blocks = sass.parse(LISTING)
    (loop,) = sass.innermost_loops(blocks)
    inside = [one for number in loop for one in blocks[number].instructions]
    # The slow path after the end jumps back, so it belongs to the loop.
    assert [one.name for one in inside] == [
        *("LDG", "FFMA", "MUFU", "BRA", "STG", "SHFL", "BAR", "ISETP", "BRA", "FADD", "BRA"),
    ]  # fmt: skip
    counts = sass.count(inside)
    assert counts.pipes == {"fp32": 2, "integer": 1, "special": 1, "load/store": 3, "other": 4}
    assert counts.instructions == 11
    assert (counts.loaded, counts.stored, counts.exchanges, counts.barriers) == (16, 8, 1, 1)


def test_unreachable_instructions_are_not_counted() -> None:
    everything = [one for block in sass.parse(LISTING) for one in block.instructions]
    assert len(everything) == 16
    assert "NOP" not in {one.name for one in everything}
    # A predicate that is always true guards nothing.
    for guard in ("@PT ", "@UPT "):
        guarded = LISTING.replace("                BRA `(.L_x_3)", f"{guard}BRA `(.L_x_3)")
        assert guarded != LISTING and sum(len(block.instructions) for block in sass.parse(guarded)) == 16


def test_only_the_first_function_is_read() -> None:
    second = LISTING.replace(".text.scale", ".text.other")
    assert len(sass.parse(LISTING + second)) == len(sass.parse(LISTING))


def test_nested_loops_give_the_innermost() -> None:
    code = """
.text.nested:
        /*0000*/                   MOV R1, RZ ;
.L_x_0:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FADD R4, R4, R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   UISETP.GE.AND UP0, UPT, UR4, UR5, UPT ;
        /*0050*/                   BRA.U UP0, `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""
    blocks = sass.parse(code)
    (loop,) = sass.innermost_loops(blocks)
    assert [one.name for number in loop for one in blocks[number].instructions] == ["FADD", "BRA"]
    # A branch with a predicate as operand may fall through.
    assert blocks[-1].instructions[0].name == "EXIT"


def test_copies_to_shared_memory_are_loads() -> None:
    copy = sass.Instruction("LDGSTS.E.BYPASS.128")
    assert sass.count([copy, copy, sass.Instruction("LDS.U16")])[1:4] == (32, 0, 34)
    # Spilled registers are in local memory.
    assert sass.count([sass.Instruction("LDL.64"), sass.Instruction("STL")])[1:4] == (0, 0, 0)


def test_a_listing_without_instructions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse("nvdisasm: error")


# One operand is read twice, once by an address that a loop carries; a second is written; a third is one number.
CODE = """
  tt.func public @kernel(%X: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %n: i32, %Y: !tt.ptr<f32>, %S: !tt.ptr<i64>) {
    %s = tt.load %S : !tt.ptr<i64>
    %x = tt.splat %X : !tt.ptr<bf16> -> tensor<2x64x!tt.ptr<bf16>>
    %x_0 = tt.addptr %x, %column : tensor<2x64x!tt.ptr<bf16>>, tensor<2x64xi32>
    %u = tt.load %x_0, %mask, %zero : tensor<2x64x!tt.ptr<bf16>>
    %last = scf.for %i = %c0 to %n step %c1 iter_args(%at = %x_0, %sum = %zeros) -> (tensor<2x64x!tt.ptr<bf16>>) : i32 {
      %v = tt.load %at : tensor<2x64x!tt.ptr<bf16>>
      scf.yield %at : tensor<2x64x!tt.ptr<bf16>>
    }
    %y = tt.splat %Y : !tt.ptr<f32> -> tensor<2x64x!tt.ptr<f32>>
    tt.store %y, %u : tensor<2x64x!tt.ptr<f32>>
    %elsewhere = tt.load %unknown : tensor<2x64x!tt.ptr<f32>>
"""


def test_accesses_are_known_by_operand() -> None:
    found = accesses.parse(CODE)
    assert found == [
        accesses.Access(2, 1, 8, False),
        accesses.Access(0, 128, 2, False),
        accesses.Access(0, 128, 2, False, loop=1),
        accesses.Access(1, 128, 4, True),
    ]
    large = [one for one in found if one.operand < 2]
    assert accesses.bytes_once(large) == 128 * 2 + 128 * 4
    assert accesses.bytes_once([*large, large[0]._replace(store=True)]) == accesses.bytes_once(large) + 128 * 2
    # The read before the loop is a part of the loop's reads; a second loop is a second pass.
    assert accesses.passes(large) == {0: 1} and accesses.bytes_again(large) == 0
    again = [*large, accesses.Access(0, 128, 2, False, loop=2)]
    assert accesses.passes(again) == {0: 2} and accesses.bytes_again(again) == 128 * 2


def test_work_is_counted_per_element_of_the_loop() -> None:
    from ckpt_kernels.backends.triton import launch

    x, y = (torch.empty(64, 48, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    tile = launch.Tile(rows=2, block=64, warps=1, whole=True)
    one = launch.Launch(None, tile, (x, 64, y, torch.empty(1, device="meta")), programs=64)
    done = work.work_of(LISTING, CODE, one, columns=48, elements=1000, resident=16)
    # 96 elements of the 128 in a tile; each of 32 lanes moves 16 and 8 bytes, and exchanges 4.
    assert done.steady == pytest.approx(11 * 32 / 96) and done.moved == pytest.approx((16 + 8 + 4) * 32 / 96)
    assert (done.elements, done.reads, done.programs, done.passes) == (96, 128 * 2 * 0.75, 16, 1)
    (stores,) = work._loops(sass.parse(LISTING.replace("LDG.E.128", "FADD")))
    assert (stores.instructions, stores.loaded, stores.stored) == (11, 0, 8)


# A copy in bfloat16, with many programs and few instructions.
COPY = Work(
    steady=3.0, instructions=3.0, fp32=0.0, integer=1.0, special=0.0, load_store=0.25, moved=4.0, memory=4.0, again=0.0,
    passes=1, elements=2048.0, reads=4096.0, programs=16, warps=4, stages=1, exchanges=0, barriers=0,
)  # fmt: skip
H200 = MACHINES["H200"]


def test_a_copy_is_bound_by_memory() -> None:
    found = estimate(COPY, H200)
    assert found.binds == "memory" and found.share > 0.99
    assert found.in_flight == 16 * 4096 > found.needed == pytest.approx(H200.bytes_a_clock * H200.latency)


@pytest.mark.parametrize(
    ("change", "binds", "limit"),
    [
        ({"instructions": 62.0}, "instructions", 4 / H200.bytes_a_clock / (62 / 128)),
        ({"integer": 31.0}, "integer", 4 / H200.bytes_a_clock / (31 / 64)),
        ({"special": 8.0}, "special", 4 / H200.bytes_a_clock / (8 / 16)),
        ({"moved": 64.0}, "load/store", 4 / H200.bytes_a_clock / (64 / 128)),
        ({"again": 8.0}, "cache", H200.cache / H200.copy / 3),
    ],
)
def test_the_lowest_limit_binds(change: dict[str, float], binds: str, limit: float) -> None:
    found = estimate(COPY._replace(**change), H200)
    assert found.binds == binds and found.limits[binds] == pytest.approx(limit)
    assert 0.9 * limit < found.share <= limit + 1e-9


def test_one_small_program_waits_for_memory() -> None:
    found = estimate(COPY._replace(programs=1), H200)
    assert found.binds == "latency" and found.share < 0.4
    # With the loads of two further steps in flight, the program waits less.
    assert found.share < estimate(COPY._replace(programs=1, stages=3), H200).share
    assert estimate(COPY._replace(stages=3), H200).in_flight == 2 * estimate(COPY, H200).in_flight
    for waited_for in ("exchanges", "barriers"):
        assert estimate(COPY._replace(programs=1, **{waited_for: 9}), H200).share < found.share


def test_rates_of_a_closed_queueing_network() -> None:
    # One customer never waits for others; many customers keep the slowest station busy.
    assert roofline._rate(1, 10.0, 3.0, 5.0) == pytest.approx(1 / 18)
    assert roofline._rate(500, 10.0, 3.0, 5.0) == pytest.approx(1 / 5)
    # With two customers, one station and no delay, the station is always busy.
    assert roofline._rate(2, 0.0, 4.0) == pytest.approx(1 / 4)


def kernel(name: str, work: Work | None, dtype: str = "bf16") -> Usage:
    return Usage(name, dtype, 64, 4, 32, 0, 0, 0, (16,), 100, 3.0, 3, 0.5, work)


def test_the_worst_kernels_come_first_and_those_below_target_are_named() -> None:
    slow = kernel("slow forward", COPY._replace(instructions=62.0))
    usages = [kernel("fast forward", COPY), slow, kernel("slow too", slow.work, "fp32")]
    assert below_target(usages, "sm_90") == [slow]
    text = worst(usages, "sm_90", 2)
    head, first, second = text.splitlines()[:3]
    assert first.startswith("slow") and second.startswith("slow") and "fast" not in text
    assert "H100" in head and "H200" in head and "B200" not in head
    assert "1 of 2 kernels in bfloat16 are below target on a H200" in text
    # Every column is explained, or names a machine, a pipe, or a property of the kernel.
    for column in head.split():
        named = ("kernel", "columns", "dtype", "H100", "H200", "fp32", "integer", "special", "load/store")
        assert column in named or f"{column}: " in text or f"{column}, " in text, column


def test_estimates_as_data() -> None:
    (found,) = json.loads(to_json([kernel("copy forward", COPY)], [], "sm_100"))["triton"]
    assert found["work"]["memory"] == 4.0 and set(found["estimates"]) == {"B200"}
    assert found["estimates"]["B200"]["binds"] == "memory"
    (unknown,) = json.loads(to_json([kernel("copy forward", None)], [], "sm_90"))["triton"]
    assert unknown["work"] is None and unknown["estimates"] == {}


def test_targets_are_by_direction() -> None:
    assert roofline.target("glu forward") == roofline.target("glu again") == 0.95
    assert roofline.target("glu backward") == roofline.target("group_norm+silu backward, plane sums") == 0.88


def test_unknown_work_and_machines_are_errors() -> None:
    with pytest.raises(ValueError, match="the work of 'k' is not known"):
        required_work(kernel("k", None))
    with pytest.raises(ValueError, match="arch is 'sm_80'; expected one of a known machine: sm_100, sm_90"):
        worst([kernel("k", COPY)], "sm_80", 1)


def test_occupancy_counts_the_shared_memory_of_a_launch() -> None:
    from ckpt_kernels.inspect.kernels import PROCESSORS

    processor = PROCESSORS["sm_90"]
    assert processor.resident(4, 32, 0) == 16
    assert processor.resident(4, 32, 100 << 10) == 2
    assert processor.resident(8, 128, 0) == 2


def test_every_kernel_of_the_catalogue_is_inspected() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ckpt_kernels.inspect.variants import block_operands, launches, variants

    # Rows that a program holds at once, and longer rows.
    inspected = {one.launch.kernel.fn.__name__ for columns in (64, 32768) for one in variants(columns, torch.float32)}
    launched = {
        one.kernel.fn.__name__
        for block in (*BLOCKS, *DROPOUT_BLOCKS)
        for launched in launches(block.call, block_operands(block.name, 64, torch.float32)).values()
        for one in launched
    }
    assert launched <= inspected and len(launched) > 10


def test_launches_are_recorded_only_within_the_context() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ckpt_kernels.backends.triton import launch
    from ckpt_kernels.inspect.variants import block_operands, launches

    operands = block_operands("layer_norm", 64, torch.float32)
    assert [len(launched) for launched in launches(BY_NAME["layer_norm"].call, operands).values()] == [1, 1]
    # The reference serves tensors without memory, such as those of a model on the meta device.
    with launch.recording() as launched:
        BY_NAME["layer_norm"].call(**operands)
    assert not launched


def test_recordings_nest() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ckpt_kernels.backends.triton import launch
    from ckpt_kernels.inspect.variants import block_operands

    operands = block_operands("layer_norm", 64, torch.float32)

    def run() -> None:
        with backends.serving("triton"):
            BY_NAME["layer_norm"].call(**operands)

    with launch.recording() as outer:
        with pytest.raises(KeyError), launch.recording() as inner:
            run()
            raise KeyError
        assert (len(inner), len(outer)) == (1, 0)
        run()
    run()
    assert (len(inner), len(outer)) == (1, 1)


def test_variants_are_named_by_pass_and_have_the_columns_of_their_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ckpt_kernels.inspect.variants import ROWS, block_operands, variants

    every = list(variants(64, torch.bfloat16))
    found = {one.name: one for one in every}
    assert len(found) == len(every) and all(one.elements == ROWS * 64 for one in every)
    # Contiguous operands of a block without operands by row or column are viewed as one row.
    flat = ("glu (silu) forward", "glu (silu) backward", "glu (silu) backward and output")
    flat += ("bias_act (gelu) backward and output",)
    assert {name: one.columns for name, one in found.items()} == {
        name: ROWS * 64 if name in flat else 64 for name in found
    }
    assert found["layer_norm+gelu again"].launch.kernel.fn.__name__ == "row_norm_forward_kernel"
    assert {"rotary forward", "group_norm+silu (channels last) backward, row sums"} < found.keys()
    assert not any("rotary" in one.name for one in variants(2048, torch.bfloat16))
    operands = block_operands("rotary", 64, torch.bfloat16)
    assert operands["input"].shape == (1, 9, ROWS, 64) and operands["input"].dtype == torch.bfloat16
    assert operands["cos"].dtype == torch.float32

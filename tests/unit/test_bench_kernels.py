"""Kernels of passes are counted by what they do."""

from types import SimpleNamespace

import pytest

from verl.bench.kernels import KINDS, NUM_LONGEST, REST, WALL, KernelTable, by_kind, kind_of, longest


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<GroupProblemShape>>", "products"),
        ("aten::mm", "products"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64, 64>>", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<bf16>>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__t0", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_adamw_bf16_kernel", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "copies"),
        ("_swiglu_forward_kernel", REST),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16>>", REST),
    ],
)
def test_a_kernel_is_of_the_kind_that_its_name_tells(kernel, kind):
    assert kind_of(kernel) == kind


def test_seconds_add_up_with_those_in_which_nothing_ran():
    kernels = {"aten::mm": 1.0, "nvjet_a": 2.0, "flash_fwd": 0.5, "add": 0.25, WALL: 5.0}
    expected = dict.fromkeys((*KINDS, REST), 0.0) | {"products": 3.0, "attention": 0.5, REST: 0.25}
    assert by_kind(kernels) == expected | {"none": 1.25, WALL: 5.0}
    assert by_kind(kernels | {WALL: 3.0})["none"] == 0.0  # kernels of several streams run side by side


def test_what_takes_longest_is_named_without_the_whole():
    seconds = {f"k{index}": float(index) for index in range(NUM_LONGEST + 3)} | {WALL: 99.0}
    assert longest(seconds)[0] == (f"k{NUM_LONGEST + 2}", NUM_LONGEST + 2.0)
    assert len(longest(seconds)) == NUM_LONGEST
    assert longest({WALL: 1.0}) == []


def test_gpu_and_host_are_told_apart(capsys):
    noted = [({"aten::mm": 0.5}, {"cudaLaunchKernel": 0.25}, 2.0)]
    table = KernelTable(SimpleNamespace(start_kernels=lambda: None, kernel_seconds=lambda: noted))
    with table.watch("update"):
        pass
    table.print("once more")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table.passes == {"update": {"aten::mm": 0.5, WALL: 2.0}}
    assert ["0.500", "s", "products", "aten::mm"] in lines and ["0.250", "s", "host", "cudaLaunchKernel"] in lines
    assert lines[1][-2:] == ["once", "more"]

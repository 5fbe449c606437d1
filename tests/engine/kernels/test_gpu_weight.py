"""Which kernels a packed matrix gets on a GPU, and the sparse tensor cores where there are some."""

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import gpu as triton_there
from sparity.engine.kernels import gpu_weight, vendor_weight
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.gpu_weight import prepare_on_gpu
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.engine.kernels.vendor_weight import VendorWeight
from sparity.errors import InvalidInput
from sparity.formats import build_format

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the sparse tensor cores need a CUDA GPU")


@pytest.mark.parametrize("name", ["bitmask", "csr", "coo", "two_of_four"])
@pytest.mark.parametrize("values", ["same", "int8"])
def test_other_formats_become_bitmask(gpu, name, values):
    packed = build_format(name).pack(weight_for("two_of_four", 6, 70), values)  # too odd for tensor cores
    wanted = TritonWeight(build_format("bitmask").pack(weight_for("two_of_four", 6, 70), values), gpu)
    found = prepare_on_gpu(packed, gpu)
    assert found.part.keys() == wanted.part.keys()
    assert all(torch.equal(found.part[part], wanted.part[part]) for part in wanted.part)


def test_blocks_stay_blocks(gpu):
    packed = build_format("block").pack(weight_for("block", 32, 32))
    assert prepare_on_gpu(packed, gpu).format == "block"


def test_dense_is_left_to_pytorch(gpu):
    packed = build_format("dense").pack(torch.ones(4, 4))
    with pytest.raises(InvalidInput, match="dense 4 x 4: no kernel for the format dense: PyTorch's own"):
        prepare_on_gpu(packed, gpu)


@pytest.mark.parametrize(
    ("shape", "dtype", "values", "reason"),
    [
        ((32, 64), torch.float32, "same", "float16, bfloat16 and int8, not float32"),
        ((33, 64), torch.float16, "same", "multiples of 32"),
        ((32, 80), torch.bfloat16, "int8", "multiples of 32"),
    ],
)
def test_what_the_sparse_tensor_cores_do_not_take(shape, dtype, values, reason):
    packed = build_format("two_of_four").pack(weight_for("two_of_four", *shape).to(dtype), values)
    assert reason in vendor_weight.declines(packed)
    with pytest.raises(InvalidInput, match=reason):
        VendorWeight(packed)
    assert "no kernel of the sparse tensor cores for the format bitmask" in vendor_weight.declines(
        build_format("bitmask").pack(torch.ones(32, 64))
    )


def test_reasons_without_a_gpu(monkeypatch):
    packed = build_format("bitmask").pack(torch.ones(4, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_weight.declines(packed, "cuda") == "PyTorch sees no CUDA GPU"
    assert "only with TRITON_INTERPRET=1" in gpu_weight.declines(packed, "cpu")
    assert gpu_weight.declines(packed, "mps") == "GPU kernels run on CUDA, not on mps"
    monkeypatch.setattr(triton_there, "find_spec", lambda name: None)
    assert "Triton is not installed" in gpu_weight.declines(packed, "cuda")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 100])
def test_sparse_tensor_cores(dtype, tokens):
    weight = weight_for("two_of_four", 96, 320).to(dtype)
    found = prepare_on_gpu(build_format("two_of_four").pack(weight))
    assert isinstance(found, VendorWeight)
    x = inputs(tokens, 320).to(dtype)
    wanted = reference.gemv(weight, x)
    half_place = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    bound = reference.error_bound(weight, x, 320 * 2**-23) + wanted.abs() * half_place
    assert ((found(x.cuda()).cpu().double() - wanted).abs() <= bound).all()


@needs_cuda
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 100])
def test_sparse_tensor_cores_with_int8(tokens):
    packed = build_format("two_of_four").pack(weight_for("two_of_four", 96, 320), "int8")
    found = prepare_on_gpu(packed)
    assert isinstance(found, VendorWeight)
    x = inputs(tokens, 320)
    wanted = reference.gemv_int8(build_format("two_of_four").decode(packed), packed.tensors["scales"], x)
    assert ((found(x.cuda()).cpu().double() - wanted).abs() <= wanted.abs() * 2**-7).all()

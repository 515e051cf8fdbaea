"""The kernel draws what the eager operation draws."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian as eager


@pytest.mark.parametrize("shape", [(1, 1), (5461, 3), (64, 32), (7, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("key", [0, -5, 2**31 - 1], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_gaussian(shape: tuple[int, int], key: int, on_device: bool, device: torch.device) -> None:
    word = torch.tensor(key, dtype=torch.int32, device=device) if on_device else key
    ours = pick(eager, "triton", device)(*shape, key=word, dtype=torch.float32, device=device)
    theirs = eager(*shape, key=word, dtype=torch.float32, device=device)
    # The hash is exact; sine, cosine and logarithm differ in the last bits, and near an angle of 2 pi in a few more.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    ours = pick(eager, "triton", device)(33, 5, key=9, dtype=dtype, device=device)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, eager(33, 5, key=9, dtype=dtype, device=device), rtol=1e-2, atol=1e-5)


def test_more_than_a_counter_can_tell_apart_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="expected fewer than 2\\^31 elements"):
        pick(eager, "triton", device)(2**16, 2**15, key=0, dtype=torch.float32, device=device)

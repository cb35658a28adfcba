import pytest
import torch

from s2a_fx.nn.lite_side_branch import LiteSideBlock, SideTransition, TapScale


def _rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_all_of_24_blocks_have_a_gradient_and_hear_their_tap(scale):
    torch.manual_seed(0)
    blocks = [LiteSideBlock(12) for _ in range(24)]
    taps = [(scale * torch.randn(2, 12, 8, 8)).requires_grad_() for _ in blocks]
    y = torch.zeros(2, 12, 8, 8)
    for block, tap in zip(blocks, taps, strict=True):
        y = block(TapScale()(tap) + y)
    y.square().mean().backward()
    gradients = [_rms(block.expand.weight.grad) for block in blocks]
    assert min(gradients) > 1e-3 * max(gradients)
    heard = [scale * _rms(tap.grad) for tap in taps]
    assert min(heard) > 1e-3 * max(heard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_image_is_scaled_for_itself_and_one_number_is_kept(dtype):
    x = (torch.randn(3, 8, 4, 4) * torch.tensor([1e-3, 1.0, 200.0]).view(3, 1, 1, 1)).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = TapScale()(x)
    assert y.dtype == dtype
    assert [_rms(image.float()) for image in y] == pytest.approx([0.5] * 3, rel=0.02)
    assert kept == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_image_of_zeros_stays_one(dtype):
    x = torch.zeros(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    y = TapScale()(x)
    assert (y == 0).all()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    "part", [LiteSideBlock(64), SideTransition((64, 64), (8, 8), (4, 4)), SideTransition((64, 64), (7, 7), (4, 4))]
)
def test_the_output_begins_with_the_variance_of_the_input(part):
    x = torch.randn(4, 64, *((7, 7) if hasattr(part, "pool") else (8, 8)))
    pooled = part.pool(x) if hasattr(part, "pool") else x
    assert part(x).std().item() == pytest.approx(pooled.std().item(), rel=0.25)

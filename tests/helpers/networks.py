"""Tiny networks, their states in several layouts of keys, and upscalers of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor, nn

from pdd_cli.engines.select import TorchEngine
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import RRDBNet
from pdd_cli.runtime import Runtime
from pdd_cli.upscaling.upscaler import Upscaler

CPU = Runtime(torch.device("cpu"), "fp32")


def compact(scale: int = 4, channels: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = SRVGGNetCompact(num_in_ch=channels, num_out_ch=channels, num_feat=16, num_conv=3, upscale=scale)
    return dict(net.state_dict())


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def upscaler(model: SRModel, *, tile: int | str = 0, overlap: int = 16, notify: list[str] | None = None) -> Upscaler:
    return Upscaler(
        TorchEngine(model, CPU), tile=tile, overlap=overlap, notify=([] if notify is None else notify).append
    )


def repeating(scale: int) -> SRModel:
    """A network that repeats each pixel, and so costs nothing."""
    module = nn.Upsample(scale_factor=scale)
    module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return SRModel(module=module, scale=scale, in_channels=3, out_channels=3, architecture="test")


def rrdbnet(**more: int) -> Mapping[str, Tensor]:
    return RRDBNet(**{"features": 8, "blocks": 1, **more}).state_dict()


def swinir() -> Mapping[str, Tensor]:
    from spandrel.architectures.SwinIR.__arch.SwinIR import SwinIR

    return SwinIR(
        img_size=16, window_size=8, embed_dim=12, depths=[2], num_heads=[2], mlp_ratio=2, upscale=2,
        upsampler="pixelshuffledirect",
    ).state_dict()  # fmt: skip


def old_layout(state):
    """ESRGAN's own key names, written out independently of pdd's renaming."""
    last = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    plain = {"conv_first": "model.0", "conv_body": f"model.1.sub.{last}", "conv_up1": "model.3", "conv_up2": "model.6",
             "conv_hr": "model.8", "conv_last": "model.10"}  # fmt: skip
    renamed = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if module.startswith("body."):
            _, block, dense, conv = module.split(".")
            module = f"model.1.sub.{block}.RDB{dense[-1]}.{conv}.0"
        else:
            module = plain[module]
        renamed[f"{module}.{kind}"] = value
    return renamed


def bsrgan_layout(state):
    swaps = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    renamed = {}
    for key, value in state.items():
        head, rest = key.split(".", 1)
        if head == "body":
            block, dense, tail = rest.split(".", 2)
            renamed[f"RRDB_trunk.{block}.RDB{dense[-1]}.{tail}"] = value
        else:
            renamed[f"{swaps.get(head, head)}.{rest}"] = value
    return renamed


def efficientnet_state():
    """Random weights under the published file's keys, in timm's order (which is the file's order)."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    keys = ["_conv_stem.weight", *(f"_bn0.{k}" for k in ("weight", "bias", "running_mean", "running_var"))]
    for block in range(16):
        layers = (["_expand_conv", "_bn0"] if block else []) + ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        for layer in layers:
            kinds = ("weight", "bias", "running_mean", "running_var") if "bn" in layer else ("weight",)
            keys += [f"_blocks.{block}.{layer}.{kind}" for kind in kinds]
    values = [v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    return network, dict(zip(keys, values, strict=True))

"""Perceptual feature networks with ImageNet weights: VGG-19, VGG-16, EfficientNet-Lite0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdd_cli.errors import InputError

# Number of convolutions in each stage of the VGG networks in torchvision's layout; max pooling separates the stages.
_VGG_STAGES = {"vgg19": (2, 2, 4, 4, 4), "vgg16": (2, 2, 3, 3, 3)}
_VGG_CHANNELS = (64, 128, 256, 512, 512)

# Root mean square of EfficientNet-Lite0's outputs at strides 2, 4, 8, 16, 32, measured on photographs. Outputs are
# divided by it, so that its layers have the weight of the VGG layers that they replace.
_EFFICIENTNET_RMS = (9.7, 10.1, 8.2, 5.3, 2.2)


class FeatureNetwork(nn.Module):
    """Features before the ReLU at named layers, of images in 0..1. ImageNet normalisation is applied inside."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """(N, 3, H, W) in 0..1 to {layer: (N, C, h, w)}; `layers` are named as in VGG-19, for example conv3_4."""
        raise NotImplementedError


# Not torchvision's VGG: importing torchvision takes 1.6 s, and its ReLUs overwrite the features before them.
class VGG(FeatureNetwork):
    """The convolutions of VGG-19 or VGG-16. A layer that VGG-16 lacks (conv3_4) is the last of its stage (conv3_3)."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = stages
        self.convolutions = nn.ModuleDict()
        inputs = 3
        for stage, (count, channels) in enumerate(zip(stages, _VGG_CHANNELS, strict=True), 1):
            for number in range(1, count + 1):
                self.convolutions[f"conv{stage}_{number}"] = nn.Conv2d(inputs, channels, 3, padding=1)
                inputs = channels

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        wanted = {layer: self._own_name(layer) for layer in layers}
        last = max(wanted.values())
        found: dict[str, Tensor] = {}
        x = (images - self.mean) / self.std
        for name, convolution in self.convolutions.items():
            if name.endswith("_1") and name != "conv1_1":
                x = F.max_pool2d(x, 2)
            x = convolution(x)
            if name in wanted.values():
                found[name] = x
            if name == last:
                break
            x = F.relu(x)
        return {layer: found[own] for layer, own in wanted.items()}

    def _own_name(self, layer: str) -> str:
        stage, number = (int(part) for part in layer.removeprefix("conv").split("_"))
        return f"conv{stage}_{min(number, self.stages[stage - 1])}"


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0's linear bottlenecks at strides 2 to 32, scaled to unit RMS, for stages 1 to 5 of VGG."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        levels = self.network((images - self.mean) / self.std)
        stages = {layer: int(layer.removeprefix("conv").split("_")[0]) - 1 for layer in layers}
        return {layer: levels[stage] / _EFFICIENTNET_RMS[stage] for layer, stage in stages.items()}

    def train(self, mode: bool = True) -> EfficientNetLite0:
        # Batch normalisation must keep its ImageNet statistics.
        super().train(False)
        return self


def feature_network(name: str, state: Mapping[str, Tensor], *, origin: str) -> FeatureNetwork:
    """The frozen feature network `name` with the weights `state`; `origin` names their file in an error.

    `name`: vgg19, vgg16 (torchvision's keys `features.N.weight`), or efficientnet-lite0 (keys of the package
    efficientnet-lite-pytorch). Raises InputError if the weights belong to another network.
    """
    network: FeatureNetwork
    if name == "efficientnet-lite0":
        network = EfficientNetLite0()
        expected = _efficientnet_keys(network.network)  # type: ignore[arg-type]
        prefix = "network."
    else:
        network = VGG(_VGG_STAGES[name])
        expected = _vgg_keys(_VGG_STAGES[name])
        prefix = "convolutions."
    own = network.state_dict()
    renamed = {prefix + new: state[old].float() for old, new in expected.items() if old in state}
    missing = [old for old, new in expected.items() if prefix + new not in renamed]
    misfits = [key for key, tensor in renamed.items() if own[key].shape != tensor.shape]
    if missing or misfits:
        what = f"no {missing[0]}" if missing else f"another shape of {misfits[0]}"
        raise InputError(
            f"{origin}: not the weights of {name} ({what})", "Give the network of these weights: --features."
        )
    network.load_state_dict(renamed, strict=False)
    return network.eval().requires_grad_(False)


def _vgg_keys(stages: tuple[int, ...]) -> dict[str, str]:
    """torchvision's keys to ours: its `features` numbers convolutions, ReLUs and max pooling consecutively."""
    keys, index = {}, 0
    for stage, count in enumerate(stages, 1):
        for number in range(1, count + 1):
            for kind in ("weight", "bias"):
                keys[f"features.{index}.{kind}"] = f"conv{stage}_{number}.{kind}"
            index += 2
        index += 1
    return keys


def _efficientnet_keys(network: nn.Module) -> dict[str, str]:
    """Keys of the published file to timm's."""
    modules = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(network.blocks) for b, _ in enumerate(stage)]  # type: ignore[arg-type]
    for number, block in enumerate(blocks):
        if number:  # every block but the first begins with an expansion
            theirs = "_expand_conv _bn0 _depthwise_conv _bn1 _project_conv _bn2"
            ours = "conv_pw bn1 conv_dw bn2 conv_pwl bn3"
        else:
            theirs, ours = "_depthwise_conv _bn1 _project_conv _bn2", "conv_dw bn1 conv_pw bn2"
        for their, our in zip(theirs.split(), ours.split(), strict=True):
            modules[f"_blocks.{number}.{their}"] = f"{block}.{our}"
    kinds = {"conv": ("weight",), "bn": ("weight", "bias", "running_mean", "running_var")}
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in modules.items()
        for kind in kinds["bn" if "_bn" in theirs else "conv"]
    }

"""Any base that can be trained is, and gives what spandrel computes of the result; what can't be is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from torch import Tensor, nn

from pdd_cli.adaptation.trainable import check_trainable, chosen_for, freeze_first, frozen_blocks_shared
from pdd_cli.errors import InputError
from pdd_cli.models.loading import SRModel
from pdd_cli.models.rrdbnet import rrdbnet_from_state
from pdd_cli.settings.adapt import OptimizerSettings
from tests.helpers.commands import Outcome, command
from tests.helpers.networks import CPU, bsrgan_layout, old_layout, rrdbnet, swinir


def compact() -> Mapping[str, Tensor]:
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    return SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4).state_dict()


def span() -> Mapping[str, Tensor]:
    from spandrel.architectures.SPAN.__arch.span import SPAN

    return SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).state_dict()


BASES: dict[str, tuple[Callable[[], Mapping[str, Tensor]], str, int]] = {
    "6 blocks": (lambda: rrdbnet(blocks=6), "RRDBNet", 4),
    "x2": (lambda: rrdbnet(unshuffle=2), "RRDBNet", 2),
    "ESRGAN's old keys": (lambda: old_layout(rrdbnet()), "RRDBNet", 4),
    "BSRGAN's keys": (lambda: bsrgan_layout(rrdbnet()), "RRDBNet", 4),
    "compact": (compact, "RealESRGAN Compact", 4),
    "SPAN": (span, "SPAN", 2),
    "SwinIR": (swinir, "SwinIR", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_it_is_adapted_and_exported(pdd: Callable[..., Outcome], ground: Path, home: Path, name: str) -> None:
    make, architecture, scale = BASES[name]
    torch.manual_seed(0)
    before = {key: value.clone().contiguous() for key, value in make().items()}
    torch.save({"params_ema": before}, "base.pth")
    done = pdd(*command(ground, "--base", "base.pth", "--export", "pth", steps=8)[3:], "--json")
    assert done.code == 0, done.err
    assert len([json.loads(line) for line in Path("runs/realLR/log.jsonl").read_text().splitlines()]) == 8
    assert "skipped" not in done.err
    card = json.loads(done.out)["card"]
    assert (card["architecture"], card["scale"]) == (architecture, scale)

    # spandrel, which knows nothing of pdd, loads the entry and the export; both are the same model, and not the base.
    lr = torch.linspace(0, 1, 3 * 16 * 24).view(1, 3, 16, 24)
    with torch.inference_mode():
        stored = ModelLoader().load_from_state_dict(load_file(home / "weights" / "realLR.safetensors")).eval()(lr)
        exported = ModelLoader().load_from_file("runs/realLR/realLR.pth").eval()(lr)
        base = ModelLoader().load_from_state_dict(before).eval()(lr)
    assert stored.shape == (1, 3, 16 * scale, 24 * scale)
    assert torch.equal(stored, exported)
    assert 1e-6 < float((stored - base).abs().max()) < 0.5


class _Net(nn.Module):
    def __init__(self, *, weights: bool = True) -> None:
        super().__init__()
        if weights:
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class _Detached(_Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(self.conv(x))


class _Rounded(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((255 * self.conv(x)).round() / 255)


class _Overwritten(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).exp()
        return super().forward(y.mul_(2).exp() + y.zero_())


class _Infinite(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((self.conv(x) * 0).sqrt())


@pytest.mark.parametrize(
    ("network", "channels", "words"),
    [
        (_Net(weights=False), 3, "has no trainable parameters"),
        (_Net(), 2, "the model has 2 input and 2 output channels"),
        (_Detached(), 3, "fails (element 0 of tensors does not require grad"),
        (_Overwritten(), 3, "fails (one of the variables needed for gradient computation has been modified"),
        (_Rounded(), 3, "no gradient reaches its weights"),
        (_Infinite(), 3, "its gradient is not finite"),
    ],
)
def test_what_cannot_be_trained_is_refused(network: nn.Module, channels: int, words: str) -> None:
    model = SRModel(module=network, scale=2, in_channels=channels, out_channels=channels, architecture="Odd")
    with pytest.raises(InputError) as raised:
        check_trainable(model, "odd.pth", CPU)
    assert words in raised.value.message
    assert raised.value.message.startswith("odd.pth")
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_names_weights_that_are_not_for_training(
    pdd: Callable[..., Outcome], ground: Path, dry: tuple[str, ...]
) -> None:
    save_file({key: (value * 100).to(torch.int8) for key, value in rrdbnet().items()}, "small.safetensors")
    done = pdd(*command(ground, "--base", "small.safetensors")[3:], *dry)
    assert done.code == 2
    assert "small.safetensors: quantised weights (body.0.rdb1.conv1.bias is int8)" in done.err
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    two = SRVGGNetCompact(num_in_ch=2, num_out_ch=2, num_feat=8, num_conv=2).state_dict()
    save_file({key: value.contiguous() for key, value in two.items()}, "two.safetensors")
    done = pdd(*command(ground, "--base", "two.safetensors")[3:], *dry)
    assert done.code == 2
    assert "two.safetensors: the model has 2 input and 2 output channels" in done.err
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["6 blocks", "SwinIR"])
def test_the_first_parameters_can_stay_as_they_are(pdd: Callable[..., Outcome], ground: Path, name: str) -> None:
    torch.manual_seed(0)
    before = {key: value.clone().contiguous() for key, value in BASES[name][0]().items()}
    torch.save(before, "base.pth")
    freeze = ("--set", "optimizer.freeze=0.5")
    done = pdd(*command(ground, "--base", "base.pth", "--export", "pth", *freeze, steps=8)[3:])
    assert done.code == 0, done.err
    after = torch.load("runs/realLR/realLR.pth", weights_only=True)["params_ema"]
    trained = {key for key in before if not torch.equal(before[key], after[key])}
    parameters = [key for key in before if key.endswith(("weight", "bias", "table"))]  # the others are buffers
    sizes = [(key in trained, before[key].numel()) for key in parameters]
    assert sizes == sorted(sizes, key=lambda size: size[0])  # all that stay are first
    kept = sum(size for changed, size in sizes if not changed) / sum(size for _, size in sizes)
    assert 0.3 < kept <= 0.5


@pytest.mark.parametrize(
    ("blocks", "given", "expected"),
    [
        (23, {}, (0.65, 2e-4)),
        (6, {}, (0, 1e-4)),
        (6, {"freeze": 0.5}, (0.5, 2e-4)),
        (23, {"freeze": 0}, (0, 1e-4)),
        (23, {"learning_rate": 3e-5}, (0.65, 3e-5)),
    ],
)
def test_how_much_is_frozen_depends_on_the_size(blocks: int, given: dict[str, float], expected: tuple[float, ...]):
    network = rrdbnet_from_state(rrdbnet(blocks=blocks))
    assert network is not None
    assert chosen_for(network, OptimizerSettings.model_validate(given)) == expected


def test_frozen_blocks_are_computed_once_and_give_the_same() -> None:
    torch.manual_seed(0)
    specialist = rrdbnet_from_state(rrdbnet(blocks=4))
    assert specialist is not None
    generalist = copy.deepcopy(specialist).requires_grad_(False)
    freeze_first(specialist, 0.6)
    with torch.no_grad():
        generalist.body[3].rdb3.conv5.weight.mul_(2)  # as training makes it another network
    lr, calls = torch.rand(2, 3, 16, 16), []
    generalist.body[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = generalist(lr)
        assert calls == [1]
        for equal, count in ((False, 2), (True, 2)):
            with frozen_blocks_shared(specialist, generalist, equal):
                specialist(lr)
                assert torch.equal(generalist(lr), expected)
            assert len(calls) == count
        assert torch.equal(generalist(lr), expected)
    assert len(calls) == 3

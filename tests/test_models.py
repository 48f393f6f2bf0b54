"""Our networks against spandrel's, torchvision's and timm's."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel import ModelLoader

from pdd_cli.errors import InputError
from pdd_cli.models.discriminator import UNetDiscriminator
from pdd_cli.models.features import feature_network
from pdd_cli.models.loading import load_sr_model, model_from_state
from pdd_cli.models.rrdbnet import RRDBNet, rrdbnet_from_state, standard_keys
from pdd_cli.weights.states import read_state
from tests.helpers.networks import bsrgan_layout, efficientnet_state, old_layout


def tiny(**changes):
    torch.manual_seed(0)
    return RRDBNet(**{"features": 8, "growth": 32, "blocks": 2, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict, old_layout, bsrgan_layout])
def test_rrdbnet_equals_spandrels_forward_in_every_key_layout(layout):
    state = layout(tiny().state_dict())
    ours = model_from_state(state, origin="test")
    theirs = ModelLoader().load_from_state_dict(dict(state))
    assert (ours.architecture, ours.scale) == ("RRDBNet", 4)
    lr = torch.rand(1, 3, 13, 10)
    with torch.inference_mode():
        assert torch.allclose(ours.upscale(lr), theirs.model(lr), atol=1e-6)


@pytest.mark.parametrize(("unshuffle", "scale"), [(2, 2), (4, 1)])
def test_pixel_unshuffled_rrdbnet_equals_spandrels(unshuffle, scale):
    state = tiny(unshuffle=unshuffle).state_dict()
    ours = model_from_state(state, origin="test")
    theirs = ModelLoader().load_from_state_dict(dict(state))
    assert ours.scale == theirs.scale == scale
    lr = torch.rand(1, 3, 8, 12)
    odd = torch.cat((lr, lr[..., -1:, :]), 2)  # one row more, as padding by repetition makes it from 8 + 1 rows
    with torch.inference_mode():
        assert torch.allclose(ours.upscale(lr), theirs.model(lr), atol=1e-5)
        padded = torch.nn.functional.pad(odd, (0, 0, 0, -9 % unshuffle), mode="replicate")
        expected = theirs.model(padded)[..., : 9 * scale, :]
        assert torch.allclose(ours.upscale(odd), expected, atol=1e-5)


def test_a_foreign_architecture_loads_through_spandrel():
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    torch.manual_seed(0)
    network = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=3)
    ours = model_from_state(network.state_dict(), origin="test")
    assert ours.scale == 3
    lr = torch.rand(1, 3, 7, 5)
    with torch.inference_mode():
        assert torch.equal(ours.upscale(lr), network(lr))


def test_other_states_are_not_taken_for_rrdbnet():
    state = standard_keys(tiny().state_dict())
    state.pop("conv_hr.bias")
    assert rrdbnet_from_state(state) is None
    assert rrdbnet_from_state({"conv_first.weight": torch.zeros(8, 3, 3, 3)}) is None


def test_params_ema_is_taken_and_code_is_not_run(tmp_path):
    good, path = tiny().state_dict(), tmp_path / "both.pth"
    torch.save({"params": tiny(blocks=1).state_dict(), "params_ema": good}, path)
    assert set(read_state(path)) == set(good)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"params": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth"):
        load_sr_model(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


class Plain:
    """A class that no loader of weights knows."""


STATE = tiny(blocks=1).state_dict()
OTHER = {key: tensor + 1 for key, tensor in STATE.items()}
DISCRIMINATOR = {f"conv{number}.weight": torch.zeros(512, 512, 3, 3) for number in range(2)}


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"params-ema": STATE, "params": OTHER},
        {"params": OTHER, "params_ema": STATE},
        {"net": STATE},
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(9_000_000)}}, "param_groups": []}},
        {"model_state_dict": STATE, "optimizer_state_dict": {"x": torch.zeros(9_000_000)}},
        {"generator": STATE, "discriminator": DISCRIMINATOR},
        {"G": STATE, "D": DISCRIMINATOR},
        {"g": OTHER, "g_ema": STATE},
        {"state": {"model": STATE}, "step": torch.tensor(3)},
        {"checkpoint": {"nets": {"netG": STATE, "netD": DISCRIMINATOR}}, "iter": 5},
        prefixed("module.", STATE),
        {"state_dict": prefixed("module.", STATE)},
        {"state_dict": prefixed("_orig_mod.module.", STATE)},
        {"params": prefixed("module.netG.", STATE)},
        {"state_dict": prefixed("net_g.", STATE)},
        {
            "state_dict": prefixed("net_g.", STATE)
            | prefixed("net_d.", DISCRIMINATOR)
            | prefixed("loss.", DISCRIMINATOR)
        },
        {"state_dict": prefixed("net_g.", OTHER) | prefixed("net_g_ema.", STATE)},
        {"state_dict": prefixed("model.", STATE)},
        {"state_dict": prefixed("module.", old_layout(STATE))},
        old_layout(STATE),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_network_is_found_however_a_checkpoint_nests_it(tmp_path, content, legacy):
    path = tmp_path / "nested.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = load_sr_model(path).module.state_dict()
    assert set(found) == set(STATE)
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_the_content_decides_the_format_not_the_name(tmp_path):
    save_file(STATE, tmp_path / "named.pth")
    save_file(STATE, tmp_path / "NAMED.SAFETENSORS")
    torch.save(STATE, tmp_path / "other.safetensors")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    torch.save(STATE, tmp_path / "no_suffix")
    for path in tmp_path.iterdir():
        assert all(torch.equal(tensor, STATE[key]) for key, tensor in read_state(path).items()), path


def onnx_model(path):
    import onnx

    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), path)


def scripted(path):
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), path)


def archive(format):
    def make(path):
        inner = path.parent / "inner"
        inner.mkdir(exist_ok=True)
        torch.save(STATE, inner / "real.pth")
        shutil.move(shutil.make_archive(str(path.parent / "packed"), format, inner), path)

    return make


def cut(save):
    def make(path):
        save(path)
        path.write_bytes(path.read_bytes()[:-5000])

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("\n <!DOCTYPE html><html>not found</html>"), "an HTML page"),
        (lambda path: path.write_text("<html><body>"), "an HTML page"),
        (lambda path: path.write_text('<?xml version="1.0"?><Error/>'), "an XML file"),
        (lambda path: path.write_text('{"error": "Access denied"}'), "a JSON text"),
        (lambda path: path.write_text("Entry not found\n"), "a text file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "Git LFS"),
        (lambda path: path.write_text("/annex/objects/SHA256E-s9--0.pth\n"), "git-annex"),
        (onnx_model, "an ONNX model"),
        (scripted, "a TorchScript program"),
        (archive("zip"), r"a zip archive \(of .*real\.pth"),
        (archive("tar"), "an archive"),
        (archive("gztar"), "an archive"),
        (archive("xztar"), "an archive"),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "an image"),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "JPEG"), "an image"),
        (lambda path: torch.save(Plain(), path), r"Python objects \(tests.test_models.Plain\)"),
        (lambda path: torch.save({"params": STATE, "args": Plain()}, path), "Python objects"),
        (lambda path: torch.save({"args": Plain()}, path, _use_new_zipfile_serialization=False), "Python objects"),
        (lambda path: torch.save({"epoch": 3}, path), r"contains no tensors \(epoch\)"),
        (cut(lambda path: torch.save(STATE, path)), "incomplete"),
        (cut(lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False)), "incomplete"),
        (cut(lambda path: save_file(STATE, path)), "incomplete"),
        (lambda path: path.write_bytes(b"PK\x03\x04broken"), "incomplete"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "not a weights file"),
        (lambda path: path.write_text("7767517\n1 1\nInput x 0 1 x\n"), "one of two files of an ncnn model"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_what_is_no_weights_file_is_called_by_its_name(tmp_path, make, words):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        make(path)
        with pytest.raises(InputError, match=words) as raised:
            load_sr_model(path)
        assert str(path.with_suffix("")) in raised.value.message
        assert raised.value.hint or "no tensors" in words or "one of two" in words


def test_weights_with_nan_are_refused(tmp_path):
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    state["conv_up2.bias"][1] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"conv_up2\.bias holds values that are not finite"):
        load_sr_model(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_features_are_torchvisions_before_the_relu(name):
    import torchvision

    torch.manual_seed(0)
    layout = torchvision.models.vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[name]]
    reference = torchvision.models.vgg.make_layers(layout)  # the `features` of that network
    state = {f"features.{key}": value for key, value in reference.state_dict().items()}
    ours = feature_network(name, state, origin="test")
    # Running numbers of the convolutions in torchvision's `features`.
    index = {"vgg16": {"conv1_2": 2, "conv2_1": 5, "conv3_4": 14, "conv4_1": 17, "conv5_4": 28},
             "vgg19": {"conv1_2": 2, "conv2_1": 5, "conv3_4": 16, "conv4_1": 19, "conv5_4": 34}}[name]  # fmt: skip
    images = torch.rand(1, 3, 64, 48)
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        found = ours(images, tuple(index))
        for layer, number in index.items():
            expected = reference[: number + 1](x)
            assert torch.allclose(found[layer], expected, atol=1e-4), layer
            assert (found[layer] < 0).any()


def test_efficientnet_features_are_timms_up_to_their_scale():
    network, state = efficientnet_state()
    ours = feature_network("efficientnet-lite0", state, origin="test")
    ours.train()  # must not touch the batch statistics
    images = torch.rand(1, 3, 64, 64)
    x = (images - ours.mean) / ours.std
    with torch.inference_mode():
        expected = network(x)
        found = ours(images, ("conv1_2", "conv3_1", "conv5_4"))
    for layer, level in (("conv1_2", 0), ("conv3_1", 2), ("conv5_4", 4)):
        ratio = expected[level] / found[layer]
        assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3), layer


def test_wrong_feature_weights_are_refused():
    with pytest.raises(InputError, match="not the weights of vgg19"):
        feature_network("vgg19", {"features.0.weight": torch.zeros(64, 3, 3, 3)}, origin="x.pth")
    _, state = efficientnet_state()
    with pytest.raises(InputError, match="not the weights of vgg16"):
        feature_network("vgg16", state, origin="x.pth")


@pytest.mark.slow
def test_discriminator_has_real_esrgans_keys_and_per_pixel_logits():
    network = UNetDiscriminator(8)
    spectral = {f"conv{i}.weight_{kind}" for i in range(1, 9) for kind in ("orig", "u", "v")}
    spectral = {key for key in network.state_dict() if "weight_" in key} ^ spectral
    assert not spectral
    assert {"conv0.weight", "conv0.bias", "conv9.weight", "conv9.bias"} <= set(network.state_dict())
    assert network(torch.rand(2, 3, 32, 24)).shape == (2, 1, 32, 24)
    # Spectral normalisation: after power iterations no filter bank stretches by more than 1.
    for _ in range(50):
        network(torch.rand(1, 3, 16, 16))
    with torch.no_grad():
        network.eval()(torch.rand(1, 3, 16, 16))
        norm = torch.linalg.matrix_norm(network.conv5.weight.flatten(1), 2)
    assert float(norm) == pytest.approx(1, abs=0.05)

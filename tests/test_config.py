"""Precedence, and errors that name key, value and what is allowed."""

from pathlib import Path

import pytest

from pdd_cli.errors import InputError
from pdd_cli.settings.adapt import AdaptConfig
from pdd_cli.settings.resolve import resolve
from pdd_cli.settings.upscale import UpscaleConfig


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def adapt(options=None, **places):
    return resolve(AdaptConfig, "adapt", options={"real_dir": Path("lr"), **(options or {})}, **places)


def test_precedence():
    Path("other.yaml").write_text("adapt: {steps: 30, seed: 3, batch_size: 5}")
    Path("pdd.yaml").write_text("adapt: {steps: 99, seed: 9}")
    config = adapt({"steps": 10, "seed": None}, overrides=["steps=20", "seed=2"], file=Path("other.yaml"))
    assert (config.steps, config.seed, config.batch_size) == (10, 2, 5)
    assert adapt().steps == 99
    Path("pdd.yaml").unlink()
    assert adapt().steps == 100


def test_nested_keys_and_yaml_values():
    config = adapt(overrides=["losses.intra=0.5", "optimizer.halve_at=[0.5, 0.75]", "generalist.decay=0.99"])
    assert config.losses.intra == 0.5
    assert config.optimizer.halve_at == (0.5, 0.75)
    assert config.generalist.decay == 0.99


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["step=3"], ["step", "did you mean steps"]),
        (["losses.intr=3"], ["losses.intr", "did you mean intra", "perceptual"]),
        (["steps=-1"], ["steps", "-1", "greater than or equal to 1"]),
        (["steps=many"], ["steps", "'many'", "integer"]),
        (["generalist.warmup_steps=0"], ["generalist.warmup_steps", "0", "greater than or equal to 1"]),
        (["generalist.mode=static"], ["generalist.weights", "missing", "give --generalist"]),
        (["generalist.mode=dynamic"], ["generalist", "ema", "static"]),
        (["precision=int8"], ["precision", "'int8'", "bf16"]),
        (["steps=4"], ["steps 4", "warm-up"]),
        (["features.weights=x.pth"], ["x.pth", "--features"]),
        (["steps"], ["--set steps", "key.path=value"]),
        (["steps=[1"], ["--set steps=[1", "YAML"]),
        (["steps.x=1", "steps.y=2", "steps.x.z=3"], ["steps.x.z", "single value"]),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(overrides, words):
    with pytest.raises(InputError) as caught:
        adapt(overrides=overrides)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapt: {stepz: 3}", ["bad.yaml", "stepz", "did you mean steps"]),
        ("adapted: {}", ["bad.yaml", "adapted", "did you mean adapt"]),
        ("adapt: [1, 2]", ["bad.yaml", "adapt"]),
        ("steps: 3\n  x: 4", ["bad.yaml", "line 2", "YAML"]),
        ("- 1", ["bad.yaml", "adapt:"]),
    ],
)
def test_errors_in_a_file_name_the_file(text, words):
    Path("bad.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        adapt(file=Path("bad.yaml"))
    for word in words:
        assert word in caught.value.message


def test_a_union_has_one_message():
    for value, allowed in (("bad", "'auto' or a valid integer"), (-1, "'auto' or greater than or equal to 0")):
        with pytest.raises(InputError) as caught:
            resolve(UpscaleConfig, "upscale", options={"input": Path("a"), "output": "b", "tile": value, "quality": 0})
        lines = caught.value.message.splitlines()
        assert lines == [
            f"tile: {value!r} is not allowed: {allowed}",
            "quality: 0 is not allowed: greater than or equal to 1",
        ]


def test_a_missing_config_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        adapt(file=Path("nowhere.yaml"))


def test_missing_settings_name_their_option():
    with pytest.raises(InputError, match="--real-dir"):
        resolve(AdaptConfig, "adapt", options={})


def test_a_file_may_leave_required_settings_to_the_command_line():
    Path("pdd.yaml").write_text("upscale: {weights: bsrgan, tile: 128}")
    config = resolve(UpscaleConfig, "upscale", options={"input": Path("a"), "output": "b"})
    assert (config.weights, config.tile) == ("bsrgan", 128)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        adapt().steps = 3


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_are_valid(path):
    assert adapt(file=path).steps > 0


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_runs_are_its_settings(path):
    config = adapt(file=path)
    weights, synthetic = config.losses, config.synthetic
    assert config.name == path.stem
    if path.stem.startswith("released"):  # the authors' files: the roles are the other way round
        assert (config.base, config.generalist.weights, config.generalist.warmup_steps) == ("realesrgan", "esrgan", 0)
    else:
        base, domain, mode = path.stem.split("-")
        assert config.generalist.mode == mode
        assert config.base == ("esrgan" if mode == "static" else base)
        assert mode == "ema" or config.generalist.weights == base
        assert domain in ("realsr", "drealsr", "ntire20")
        assert config.generalist.warmup_steps == 5
    if path.stem == "released-drealsr":
        assert (weights.inter, synthetic.filters, synthetic.antialias) == (0.5, ("bicubic",), True)
    else:
        filters = ("bicubic", "bilinear", "area")
        assert (weights.inter, synthetic.filters, synthetic.antialias) == (1, filters, False)
    assert (weights.intra, weights.pixel, weights.perceptual, weights.adversarial) == (1, 0.5, 1, 0.01)
    assert (weights.adversarial_reduction, weights.inter_group) == ("mean", 8)
    assert (weights.consistency, weights.feature_distance, weights.adversarial_on_target) == (0, 0, True)
    assert (config.steps, config.batch_size, config.crop, config.discriminator) == (100_000, 16, 48, "unet")
    assert config.discriminator_warmup_steps == 300
    rates = config.optimizer
    assert (rates.learning_rate, rates.discriminator_learning_rate, rates.betas) == (1e-4, 1e-4, (0.9, 0.99))
    assert rates.freeze == 0
    assert rates.halve_at == (0.25,)
    assert (synthetic.blur, synthetic.noise, synthetic.jpeg) == (None, None, None)
    assert (weights.self_ensemble, synthetic.own_share) == (0, 0)


def test_there_is_a_file_for_each_of_the_papers_runs():
    assert len(list((CONFIGS / "paper").glob("*.yaml"))) == 14


def test_groups_of_the_inter_norm_fill_the_batch():
    with pytest.raises(InputError, match=r"batch_size 4 is not a multiple of losses\.inter_group 3"):
        adapt(overrides=["losses.inter_group=3"])

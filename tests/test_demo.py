"""`make demo`: its commands are valid, and the sample images are what it needs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from pdd_cli.cli import app

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_commands_of_the_demo_are_valid():
    printed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"PDD_HOME=demo/home \S+/pdd (.*)", printed.replace("\\\n", " "))
    parser = typer.main.get_command(app)

    assert [command.split()[0] for command in commands] == ["fetch-weights", "adapt", "upscale", "upscale", "evaluate"]
    for command in commands:
        name, *options = shlex.split(command)
        assert parser.commands[name].make_context(name, options).params
        for folder in re.findall(r"samples/\S+", command):
            assert (ROOT / folder).is_dir()


def test_the_samples_are_small_and_the_pairs_show_the_same():
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*") if file.is_file()) < 1_500_000
    assert len(list((SAMPLES / "train").glob("*.webp"))) == 10
    pairs = sorted((SAMPLES / "test" / "lr").iterdir())
    assert [path.name for path in pairs] == [path.name for path in sorted((SAMPLES / "test" / "hr").iterdir())]
    for lr_path in pairs:
        lr, hr = Image.open(lr_path), Image.open(SAMPLES / "test" / "hr" / lr_path.name)
        assert hr.size == (2 * lr.width, 2 * lr.height)
        small = hr.convert("L").resize(lr.size, Image.Resampling.BOX)
        assert np.corrcoef(np.ravel(np.asarray(small)), np.ravel(np.asarray(lr.convert("L"))))[0, 1] > 0.9
        assert not (SAMPLES / "train" / lr_path.name).exists()

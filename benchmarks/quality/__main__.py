"""How much does adapting gain? Domains x variants x seeds, each by the commands as a user types them, in one table.

    python -m benchmarks.quality DATA WORK --base realesrgan.safetensors --domains camera_b jpeg film \
        --variants bicubic lanczos base base-x8 plain photos --seeds 0 1

DATA holds `camera_b`, `camera_phone`, `kodak24`, `hr_photos`, `realset65` and `features/` (domains.py, variants.yaml
and measures.py say how each is used). Everything is kept in WORK, so that a stopped call continues. The table is
printed and written to WORK/table.md. HR images are for scoring only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from benchmarks.quality.domains import CAMERAS, NAMES, SCALE, Domain, domain
from benchmarks.quality.measures import MEASURES, Judges, measure_folder, read, table
from pdd_cli.models.loading import load_sr_model

VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("variants.yaml").read_text())
COLUMNS = ("domain", "variant", "seed", *MEASURES, "minutes", "verdict", "score", "strength")


@dataclass(frozen=True)
class Laboratory:
    """Where everything is."""

    data: Path
    work: Path
    base: Path
    photos: Path
    more: list[str]  # options of every `pdd adapt`

    @property
    def features(self) -> Path:
        return self.data / "features" / "vgg16_features_fp16.safetensors"

    def pdd(self, *arguments: object) -> None:
        """Run a command; exit where it fails for another reason than a part of the images."""
        command = [sys.executable, "-m", "pdd_cli", *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | {"PDD_HOME": str(self.work / "home")}, check=False)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}")

    def scores(self, where: Domain, variant: str, seed: int, judges: Judges) -> dict[str, Any]:
        """What was measured of a variant, computed where it isn't known; `hr` is the HR images themselves."""
        folder = where.test_hr if variant == "hr" else self.work / "outputs" / where.name / f"{variant}-{seed}"
        known = self.work / "scores" / where.name / f"{variant}-{seed}.json"
        if known.exists():
            return dict(json.loads(known.read_text()))
        try:
            facts = {} if variant == "hr" else self.upscale(where, variant, seed, folder)
            found = measure_folder(folder, where.test_hr, judges) | facts
        except RuntimeError as error:  # a run that diverges, for one
            found = {"verdict": str(error).split(":")[0]}
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(found) + "\n")
        return found

    def upscale(self, where: Domain, variant: str, seed: int, folder: Path) -> dict[str, Any]:
        """Write the SR images of a variant into `folder`; returns what is known of its training."""
        settings = VARIANTS[variant]
        shutil.rmtree(folder, ignore_errors=True)
        if method := settings.get("resize"):
            _each(where, folder, lambda lr: _resized(lr, method))
        elif settings.get("mean_of_8"):
            model = load_sr_model(self.base)
            _each(where, folder, lambda lr: _mean_of_8(model.upscale, lr))
        else:
            plain = settings.get("weights", str(self.base))
            weights, facts = self.adapted(where, variant, seed) if "adapt" in settings else (plain, {})
            self.pdd("upscale", where.test_lr, folder, "--weights", weights, *settings.get("upscale", ()))
            return facts
        return {}

    def adapted(self, where: Domain, variant: str, seed: int) -> tuple[str, dict[str, Any]]:
        """The name of weights adapted by the command, and the verdict."""
        settings, name = VARIANTS[variant], f"{where.name}-{variant}-{seed}"
        real = self.data / "realset65" if settings.get("real") == "mixed" else where.train_lr
        placeholders = {"BASE": str(self.base), "TEACHER": f"{where.name}-plain-{seed}"}
        options = [placeholders.get(option, option) for option in settings["adapt"]]
        hr = self._hr(settings["hr"], where)
        started = time.perf_counter()
        self.pdd(
            "adapt", "--real-dir", real, "--base", self.base, "--name", name, "--runs-dir", self.work / "runs",
            "--features", "vgg16", "--feature-weights", self.features, "--seed", seed, "--overwrite",
            *(["--hr-dir", hr] if hr else []), *options, *self.more,
        )  # fmt: skip
        minutes = (time.perf_counter() - started) / 60
        verdict = json.loads((self.work / "runs" / name / "verdict.json").read_text())
        word = {True: "keep", False: "reject", None: "not judged"}[verdict["keep"]]
        scores = {one["strength"]: one["score"] for one in verdict["adapted"]}
        strength = verdict["strength"] or max(scores)
        return name, {"minutes": minutes, "verdict": word, "score": scores[strength], "strength": strength}

    def _hr(self, kind: str, where: Domain) -> Path | str | None:
        """The value of --hr-dir; None: the option is not given."""
        if kind in ("own", "photos"):
            return self.photos if kind == "photos" else kind
        if kind == "default":
            return None if where.name in CAMERAS else self._without_kodak()
        folder = self.work / f"hr-{kind}"
        random = np.random.default_rng(0)
        for path in () if folder.exists() else sorted(self.photos.iterdir()):
            image = read(path).astype(np.float32)
            if kind == "blurred":
                image = np.asarray(cv2.GaussianBlur(image, (0, 0), 2))
            else:
                image += 12 * random.standard_normal(image.shape, np.float32)
            folder.mkdir(exist_ok=True)
            Image.fromarray(image.round().clip(0, 255).astype(np.uint8)).save(folder / f"{path.stem}.png")
        return folder

    def _without_kodak(self) -> Path:
        """The image set that `pdd adapt` takes by default, without Kodak's photographs, which score."""
        folder, home = self.work / "hr-without-kodak", self.work / "home"
        if not folder.exists():
            self.pdd("fetch-weights", "photos")
            others = [path for path in (home / "images" / "photos").glob("*.*g") if not path.stem.startswith("kodim")]
            folder.mkdir()
            for path in others:
                shutil.copy(path, folder)
        return folder


def _each(where: Domain, folder: Path, method: Callable[[Tensor], Tensor]) -> None:
    folder.mkdir(parents=True)
    for path in sorted(where.test_lr.iterdir()):
        lr = torch.from_numpy(read(path).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            sr = method(lr)
        pixels = (sr[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{path.stem}.png")


def _resized(lr: Tensor, method: str) -> Tensor:
    image = Image.fromarray((lr[0] * 255).round().byte().permute(1, 2, 0).numpy())
    filters = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
    larger = image.resize((SCALE * image.width, SCALE * image.height), filters[method])
    return torch.from_numpy(np.array(larger)).permute(2, 0, 1)[None].float() / 255


def _mean_of_8(upscale: Callable[[Tensor], Tensor], lr: Tensor) -> Tensor:
    """The mean over the eight flips and transposes (geometric self-ensemble)."""
    total: Tensor | float = 0.0
    for turned in (False, True):
        for axes in ((), (2,), (3,), (2, 3)):
            image = lr.transpose(2, 3) if turned else lr
            sr = upscale(image.flip(axes)).flip(axes)
            total = total + (sr.transpose(2, 3) if turned else sr)
    assert isinstance(total, Tensor)
    return total / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="weights file")
    parser.add_argument("--hr-photos", type=Path, help="sharp photographs (default: DATA/hr_photos)")
    parser.add_argument("--domains", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--variants", nargs="+", default=["bicubic", "base", "plain"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--adapt-options", nargs=argparse.REMAINDER, default=[], help="for every run; the last option")
    arguments = parser.parse_args()
    lab = Laboratory(
        arguments.data, arguments.work, arguments.base.absolute(), arguments.hr_photos or arguments.data / "hr_photos",
        arguments.adapt_options,
    )  # fmt: skip
    lab.work.mkdir(parents=True, exist_ok=True)
    judges = Judges.load(lab.features)
    rows: list[dict[str, Any]] = []
    for name in arguments.domains:
        where = domain(name, lab.data, lab.work / "domains")
        for variant in ("hr", *arguments.variants):
            for seed in arguments.seeds if "adapt" in VARIANTS.get(variant, {}) else [0]:
                row = {"domain": name, "variant": variant, "seed": seed} | lab.scores(where, variant, seed, judges)
                rows.append(row)
                print(json.dumps(row), flush=True)
    (lab.work / "table.md").write_text(table(rows, COLUMNS) + "\n")
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()

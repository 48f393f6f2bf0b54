"""Is the verdict right? Judges good and bad models without ground truth, and measures their true gain.

    python -m benchmarks.quality.verdicts DATA WORK judged.json --base realesrgan.safetensors --other FILE
    python -m benchmarks.quality.verdicts --table judged.json

DATA and WORK are those of `python -m benchmarks.quality`, which trains the models. Each adapted model is judged on its
own domain, with variants that are spoilt in known ways, and on the two domains that follow it. The judgement is that of
`pdd adapt`, on held-out training images (the central 64 LR pixels of at most three). The true gain over the base is
measured on six test pairs (the central 40 LR pixels). Rows are written at once, and a second call continues.

A model is good if at least two of PSNR, feature distance and SSIMULACRA 2 are better than the base's, and none is worse
by more than its standard error. A verdict is right if it keeps a good model or rejects another one.
"""

from __future__ import annotations

import argparse
import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr, zscore

from benchmarks.quality.domains import CHOSEN_ON, NAMES, SCALE, domain
from benchmarks.quality.measures import BORDER, RGB, read, ssimulacra2
from pdd_cli.adaptation.judge import Judgement, Verdict, decide, held_out_indices, judge_crops
from pdd_cli.adaptation.preview import center_crop, to_rgb8
from pdd_cli.engines.select import choose_engine
from pdd_cli.files import write_text
from pdd_cli.imaging.find import find_images
from pdd_cli.iqa.feature_distance import feature_distance, unit_features
from pdd_cli.iqa.pairing import pair
from pdd_cli.models.features import FeatureNetwork, feature_network
from pdd_cli.models.loading import load_sr_model
from pdd_cli.runtime import Runtime
from pdd_cli.weights.states import read_state

Image = NDArray[Any]  # (H, W, 3), float32 in 0..1
Row = Mapping[str, Any]

GAINS = ("psnr", "distance", "ssimulacra2")
_JUDGED, _JUDGED_SIDE = 3, 64
_SCORED, _SCORED_SIDE = 6, 40


# --- models ------------------------------------------------------------------------------------------------------


def variants(lr: RGB, base: Image, sr: Image) -> dict[str, Callable[[], Image]]:
    """Ways to spoil the output `sr` of adapted weights, by name."""
    random = np.random.default_rng(zlib.crc32(lr.tobytes()))
    return {
        "": lambda: sr,
        "half strength": lambda: (base + sr) / 2,  # of the images, not of the weights
        "overdone": lambda: base + 1.75 * (sr - base),
        "blurred": lambda: _blurred(sr, 1.5),
        "sharpened": lambda: sr + (sr - _blurred(sr, 1.5)),
        "grainy": lambda: sr + 6 / 255 * random.standard_normal((*sr.shape[:2], 1), np.float32),
        "with the LR's noise": lambda: sr + _enlarged(_noise(lr)),
    }


def variants_of_base(lr: RGB, base: Image) -> dict[str, Callable[[], Image]]:
    """Models made of the base alone, by name: corrected to be closer to the LR, and spoilt."""
    error = lr.astype(np.float32) / 255 - _reduced(base)
    corrected = base + _enlarged(_blurred(error, 3))
    spoilt = variants(lr, base, corrected)
    return {
        "bicubic": lambda: _enlarged(lr.astype(np.float32) / 255),
        "corrected": lambda: corrected,
        "corrected finely": lambda: base + _enlarged(error),
        **{f"corrected, {name}": spoilt[name] for name in ("blurred", "sharpened", "grainy", "with the LR's noise")},
    }


def _noise(lr: RGB) -> Image:
    values = lr.astype(np.float32) / 255
    return values - _blurred(values, 1)


def _blurred(image: Image, deviation: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), deviation))


def _enlarged(image: Image) -> Image:
    return np.asarray(cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC))


def _reduced(image: Image) -> Image:
    return np.asarray(cv2.resize(image, None, fx=1 / SCALE, fy=1 / SCALE, interpolation=cv2.INTER_AREA))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model to judge in a domain: the outputs of a weights file, or a variant of them."""

    domain: str
    label: str
    weights: Path
    variant: str = ""
    of_base: bool = False  # a variant of the base


def candidates(
    base: Path, other: Path | None, adapted: Mapping[str, Path], names: Sequence[str]
) -> Iterator[Candidate]:
    """Everything that can be judged with the weights that are there."""
    lr, sr = np.zeros((8, 8, 3), np.uint8), np.zeros((8 * SCALE, 8 * SCALE, 3), np.float32)
    for name in names:
        for variant in variants(lr, sr, sr) if name in adapted else ():
            yield Candidate(name, f"adapted, {variant}" if variant else "adapted", adapted[name], variant)
    for name in names:
        for variant in variants_of_base(lr, sr):
            label = variant if variant == "bicubic" else f"base, {variant}"
            yield Candidate(name, label, base, variant, of_base=True)
        if other:
            yield Candidate(name, other.stem, other)
    for step in (1, 2):
        for name in names:
            source = NAMES[NAMES.index(name) - step]
            if source in adapted:
                yield Candidate(name, f"adapted to {source}", adapted[source])


# --- judging and scoring ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Crops:
    """The images of one domain: LR crops to judge on, and LR crops with their HR to score."""

    judged: Sequence[RGB]
    scored: Sequence[RGB]
    hr: Sequence[RGB]


@dataclass(frozen=True, eq=False)
class Outputs:
    """The SR of the LR crops of a domain."""

    judged: Sequence[Image]
    scored: Sequence[Image]


@dataclass(frozen=True, eq=False)
class Laboratory:
    """Where everything is."""

    data: Path
    work: Path
    base: Path
    features: FeatureNetwork

    @functools.cache  # noqa: B019
    def crops(self, name: str) -> Crops:
        where = domain(name, self.data, self.work / "domains")
        train = find_images(where.train_lr)
        held_out = [train[index] for index in held_out_indices(len(train), 0.2)][:_JUDGED]
        lr, hr = find_images(where.test_lr), find_images(where.test_hr)
        pairs = list(pair(lr, where.test_lr, hr, where.test_hr).pairs.items())
        chosen = [pairs[round(index)] for index in np.linspace(0, len(pairs) - 1, _SCORED)]
        crops = [_crop_of_pair(read(small), read(large)) for small, large in chosen]
        judged = [center_crop(read(path), _JUDGED_SIDE) for path in held_out]
        return Crops(judged, [small for small, _ in crops], [large for _, large in crops])

    @functools.cache  # noqa: B019
    def hr_features(self, name: str) -> list[list[torch.Tensor]]:
        return [self._features(_inner(hr)) for hr in self.crops(name).hr]

    @functools.cache  # noqa: B019
    def base_truth(self, name: str) -> NDArray[np.float64]:
        return self.truth(name, self.upscaled(self.base, name))

    def upscaled(self, weights: Path, name: str) -> Outputs:
        """The outputs of a model in a domain, computed once."""
        path, crops = self.work / "verdicts" / f"{weights.stem}-on-{name}.npz", self.crops(name)
        if not path.exists():
            engine = choose_engine(load_sr_model(weights), Runtime("cpu", "fp32"), "auto")
            inputs: list[Image] = [
                lr.transpose(2, 0, 1)[None].astype(np.float32) / 255 for lr in (*crops.judged, *crops.scored)
            ]
            srs = [engine.run(lr)[0].transpose(1, 2, 0) for lr in inputs]
            engine.close()
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, *[np.clip(sr, 0, 1).astype(np.float16) for sr in srs])
        with np.load(path) as kept:
            found = [kept[f"arr_{index}"].astype(np.float32) for index in range(len(kept))]
        return Outputs(found[: len(crops.judged)], found[len(crops.judged) :])

    def outputs(self, candidate: Candidate) -> Outputs:
        """The outputs of a candidate."""
        crops, base = self.crops(candidate.domain), self.upscaled(self.base, candidate.domain)
        theirs = self.upscaled(candidate.weights, candidate.domain)

        def change(lrs: Sequence[RGB], bases: Sequence[Image], srs: Sequence[Image]) -> list[Image]:
            made = []
            for lr, by_base, sr in zip(lrs, bases, srs, strict=True):
                found = variants_of_base(lr, by_base) if candidate.of_base else variants(lr, by_base, sr)
                made.append(np.clip(found[candidate.variant](), 0, 1).astype(np.float32))
            return made

        return Outputs(
            change(crops.judged, base.judged, theirs.judged), change(crops.scored, base.scored, theirs.scored)
        )

    def judgement(self, name: str, outputs: Outputs) -> Judgement:
        return judge_crops(zip(self.crops(name).judged, outputs.judged, strict=True))

    def truth(self, name: str, outputs: Outputs) -> NDArray[np.float64]:
        """(6, 3): PSNR, negative distance and SSIMULACRA 2 of each pair."""
        found = []
        for sr, hr, theirs in zip(outputs.scored, self.crops(name).hr, self.hr_features(name), strict=True):
            resized = np.asarray(cv2.resize(to_rgb8(sr), hr.shape[1::-1], interpolation=cv2.INTER_AREA))
            ours, original = _inner(resized), _inner(hr)
            error = float(np.mean((ours / 255 - original / 255) ** 2))
            distance = float(feature_distance(self._features(ours), theirs))
            found.append((-10 * np.log10(max(error, 1e-10)), -distance, ssimulacra2(original, ours)))
        return np.array(found)

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """The judgements of base and candidate, and the gain with its standard error (the distance as a fraction)."""
        name, ours, base = candidate.domain, self.outputs(candidate), self.base_truth(candidate.domain)
        gains = self.truth(name, ours) - base
        gains[:, GAINS.index("distance")] /= -base[:, GAINS.index("distance")].mean()
        values = {"gain": gains.mean(0), "error": gains.std(0, ddof=1) / len(gains) ** 0.5}
        outputs = {"base": self.upscaled(self.base, name), "adapted": ours}
        return {
            "domain": name,
            "model": candidate.label,
            **{key: _rounded(asdict(self.judgement(name, found))) for key, found in outputs.items()},
            **{key: _rounded(dict(zip(GAINS, found, strict=True))) for key, found in values.items()},
        }

    def _features(self, image: RGB) -> list[torch.Tensor]:
        with torch.inference_mode():
            return unit_features(self.features, torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)


def _crop_of_pair(lr: RGB, hr: RGB) -> tuple[RGB, RGB]:
    """The centre of an LR image, and the same part of its HR, which may be smaller than x4."""
    factor = hr.shape[0] // lr.shape[0]
    y, x = (max(0, (length - _SCORED_SIDE) // 2) for length in lr.shape[:2])
    part = hr[factor * y :, factor * x :][: factor * _SCORED_SIDE, : factor * _SCORED_SIDE]
    return lr[y:, x:][:_SCORED_SIDE, :_SCORED_SIDE], part


def _inner(image: RGB) -> RGB:
    return np.ascontiguousarray(image[BORDER:-BORDER, BORDER:-BORDER])


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in values.items()}


def run(lab: Laboratory, other: Path | None, results: Path, names: Sequence[str]) -> None:
    """Judge and score every candidate that has no row yet."""
    rows = json.loads(results.read_text()) if results.exists() else []
    known = {(row["domain"], row["model"]) for row in rows}
    weights = sorted((lab.work / "home" / "weights").glob("*-plain-*.safetensors"))
    adapted = {path.stem.split("-plain-")[0]: path for path in weights}
    for candidate in candidates(lab.base, other, adapted, names):
        if (candidate.domain, candidate.label) not in known:
            rows.append(lab.row(candidate))
            write_text(results, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            print(json.dumps(rows[-1]), flush=True)


# --- verdicts -----------------------------------------------------------------------------------------------------


def verdict(row: Row) -> Verdict:
    """The verdict that `pdd adapt` gives."""
    return decide({1.0: Judgement(**row["adapted"])}, Judgement(**row["base"]), SCALE)


def score(row: Row) -> float:
    """The score that `pdd adapt` gives."""
    return Judgement(**row["adapted"]).score(Judgement(**row["base"]), SCALE)


def good(row: Row) -> bool:
    """Whether the model is better than the base by the ground truth."""
    gain = row["gain"]
    return sum(gain[name] > 0 for name in GAINS) >= 2 and all(gain[name] > -row["error"][name] for name in GAINS)


def right(row: Row) -> bool:
    """Whether `pdd adapt` keeps a good model or rejects another one."""
    return verdict(row).keep is good(row)


def true_gains(rows: Sequence[Row]) -> NDArray[np.float64]:
    """The mean of the z-scores of the three gains, which orders models of different domains."""
    return np.asarray(np.mean([zscore([row["gain"][name] for row in rows]) for name in GAINS], axis=0))


def agreement(rows: Sequence[Row]) -> tuple[int, float]:
    """The number of right verdicts, and Spearman's correlation of score and true gain."""
    return sum(map(right, rows)), float(spearmanr([score(row) for row in rows], true_gains(rows)).statistic)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, by domain and falling score, and the agreement."""
    lines = ["| domain | model | score | verdict | PSNR | distance | SSIMULACRA 2 | right |", "|" + "---|" * 8]
    for row in sorted(rows, key=lambda row: (NAMES.index(row["domain"]), -score(row))):
        gain = row["gain"]
        lines.append(
            f"| {row['domain']} | {row['model']} | {score(row):.1f} | {verdict(row).label} | {gain['psnr']:+.2f} | "
            f"{-100 * gain['distance']:+.1f} % | {gain['ssimulacra2']:+.1f} | {'yes' if right(row) else '**no**'} |"
        )
    chosen_on = [row for row in rows if row["domain"] in CHOSEN_ON]
    others = [row for row in rows if row["domain"] not in CHOSEN_ON]
    for name, part in (("all", rows), ("chosen on", chosen_on), ("others", others)):
        if len(part) > 2:
            count, correlation = agreement(part)
            lines += ["", f"- {name}: {count} of {len(part)} right, Spearman {correlation:.2f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--base", type=Path, help="weights file")
    parser.add_argument("--other", type=Path, help="weights file of another model")
    parser.add_argument("--domains", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--table", type=Path, help="print the table of a results file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    features = arguments.data / "features" / "vgg16_features_fp16.safetensors"
    network = feature_network("vgg16", read_state(features), origin=str(features))
    lab = Laboratory(arguments.data, arguments.work, arguments.base, network)
    run(lab, arguments.other, arguments.results, arguments.domains)


if __name__ == "__main__":
    main()

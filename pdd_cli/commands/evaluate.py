"""`pdd evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdd_cli.console import Console
from pdd_cli.errors import DownloadError, InputError, PartialFailure

if TYPE_CHECKING:
    from pdd_cli.config import EvaluateConfig
    from pdd_cli.iqa.metrics import ImageScores, Item, MetricInfo
    from pdd_cli.iqa.report import Report

_ROWS = 60  # of the table on screen; the rest is in --output


def evaluate(
    sr_dir: Annotated[
        Path | None,
        typer.Argument(help="Image or folder to score. [default: what the latest `pdd upscale` made]"),
    ] = None,
    gt_dir: Annotated[
        Path | None, typer.Option(help="Ground truth (HR originals), image or folder; paired by name.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics of pyiqa, for example niqe,psnr,lpips. [default: niqe]", metavar="A,B,…")
    ] = None,
    crop_border: Annotated[
        int | None, typer.Option(help="Pixels to leave out at each side. [default: 0]", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write all scores to this .csv or .json file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an `evaluate:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Score images with any metric of pyiqa, with ground truth or without.

    A metric that needs ground truth is passed over where --gt-dir isn't given. Images that can't be read or compared
    are named; the others are scored (exit code 3).
    """
    from pdd_cli.config import EvaluateConfig, resolve

    console = Console(json=json)
    settings = resolve(
        EvaluateConfig,
        "evaluate",
        options={
            "sr_dir": sr_dir,
            "gt_dir": gt_dir,
            "metrics": tuple(part.strip() for part in metrics.split(",") if part.strip()) if metrics else None,
            "crop_border": crop_border,
            "output": output,
            "device": device,
            "offline": offline,
        },
        overrides=set_ or (),
        file=config,
    )

    from pdd_cli.device import choose_runtime
    from pdd_cli.iqa.metrics import load_metrics, metric_infos
    from pdd_cli.iqa.report import Report, check_format, write_report

    if settings.output is not None:
        check_format(settings.output)
    infos = metric_infos(settings.metrics)
    target = str(choose_runtime(settings.device).device)
    items, problems = _items(settings, console)
    skipped = {}
    if all(item.reference is None for item in items):
        skipped = {info.name: "needs ground truth: add --gt-dir DIR" for info in infos if info.full_reference}
    for name, reason in skipped.items():
        console.warn(f"{name} is skipped: it {reason}")
    wanted = [info for info in infos if info.name not in skipped]
    if not wanted:
        raise InputError(
            f"nothing to compute: {', '.join(skipped)} compare with ground truth",
            "Add --gt-dir DIR, or a metric without reference, such as niqe.",
        )

    from pdd_cli.commands._fetching import fetch_progress

    with fetch_progress(console) as on_event:
        loaded, lacking = load_metrics(wanted, device=target, offline=settings.offline, on_event=on_event)
    if not loaded:
        raise _summed(lacking)
    images = _score(items, loaded, settings, console)
    report = Report(list(loaded), images, settings.crop_border, skipped)
    _show(report, settings, console)
    if settings.output is not None:
        write_report(settings.output, report)
        console.say(f"scores written to {settings.output}")
    console.result(report.as_document())
    problems += [problem for scores in images for problem in dict.fromkeys(scores.problems.values())]
    for problem in problems:
        console.warn(problem)
    if lacking:
        raise _summed(lacking)
    if problems:
        raise PartialFailure(f"{len(problems)} images have no score, or not all", "The others are done.")


def _summed(errors: Sequence[DownloadError]) -> DownloadError:
    return DownloadError("\n".join(error.message for error in errors), "\n       ".join(error.hint for error in errors))


def _items(settings: EvaluateConfig, console: Console) -> tuple[list[Item], list[str]]:
    """What to score, with ground truth where it is given; and what can't be paired."""
    from pdd_cli.images import find_images
    from pdd_cli.iqa.metrics import Item
    from pdd_cli.iqa.pairing import pair

    images, root = _images(settings.sr_dir, console)
    if settings.gt_dir is None:
        return [Item(image) for image in images], []
    if not settings.gt_dir.exists():
        raise InputError(f"--gt-dir {settings.gt_dir}: no such file or folder")
    if settings.gt_dir.is_file():
        if len(images) != 1:
            raise InputError(
                f"--gt-dir {settings.gt_dir} is one file, but there are {len(images)} images to score",
                "Name the folder of the originals.",
            )
        return [Item(images[0], settings.gt_dir)], []
    references = find_images(settings.gt_dir)
    pairing = pair(images, root, references, settings.gt_dir)
    if not pairing.pairs:
        raise InputError(
            f"no image in {root} has the name of one in --gt-dir {settings.gt_dir}",
            f"For example {images[0].name} would need a ground truth named {images[0].stem}.*",
        )
    problems = []
    for image in pairing.unmatched:
        several = [str(path) for path in pairing.ambiguous.get(image, ())]
        why = f"several in {settings.gt_dir} could be its ground truth: {', '.join(several)}" if several else (
            f"no ground truth of that name in {settings.gt_dir}"
        )  # fmt: skip
        problems.append(f"{image}: {why}")
    if pairing.unused:
        console.warn(
            f"{len(pairing.unused)} of {len(references)} images in {settings.gt_dir} have no counterpart to score: "
            + ", ".join(path.name for path in pairing.unused[:5])
            + (", …" if len(pairing.unused) > 5 else "")
        )
    return [Item(image, pairing.pairs.get(image)) for image in images], problems


def _images(sr_dir: Path | None, console: Console) -> tuple[list[Path], Path]:
    """The images to score, and the folder that their names are relative to."""
    import os

    from pdd_cli.images import find_images
    from pdd_cli.latest import latest_upscale

    if sr_dir is None:
        latest = latest_upscale()
        if latest is None:
            raise InputError(
                "nothing to score: no folder was given, and there is no earlier `pdd upscale`",
                "pdd evaluate SR_DIR",
            )
        images = [pair.sr for pair in latest.pairs if pair.sr.is_file()]
        if not images:
            raise InputError(
                f"the outputs of the latest `pdd upscale`, in {latest.output}, are gone", "pdd evaluate SR_DIR"
            )
        console.say(f"scoring what the latest `pdd upscale` made: {latest.output}, weights {latest.weights}")
        parents = [str(image.parent) for image in images]
        return images, Path(os.path.commonpath(parents))
    if sr_dir.is_file():
        return [sr_dir], sr_dir.parent
    if not sr_dir.exists():
        raise InputError(f"{sr_dir}: no such file or folder")
    images = find_images(sr_dir)
    if not images:
        raise InputError(f"{sr_dir}: no images in it", "pdd reads PNG, JPEG, WebP, TIFF and BMP files.")
    return images, sr_dir


def _score(
    items: Sequence[Item], loaded: dict[MetricInfo, object], settings: EvaluateConfig, console: Console
) -> list[ImageScores]:
    from pdd_cli.iqa.metrics import score

    with console.progress(transient=True) as progress:
        task = progress.add_task("evaluate", total=len(items), note="")
        images = []
        for scores in score(
            items,
            loaded,
            crop_border=settings.crop_border,
            on_start=lambda item: progress.update(task, note=item.image.name),
        ):
            images.append(scores)
            progress.update(task, advance=1)
    return images


def _show(report: Report, settings: EvaluateConfig, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        Column("image", overflow="fold", footer="mean"),
        *(
            Column(f"{metric.name} {metric.arrow}", justify="right", footer=_number(report.mean(metric)))
            for metric in report.metrics
        ),
        show_footer=True,
    )
    for scores in report.images[:_ROWS]:
        values = [_number(scores.values.get(metric.name)) for metric in report.metrics]
        table.add_row(escape(_short(scores.item.image, settings.sr_dir)), *values)
    console.table(table)
    if len(report.images) > _ROWS:
        console.say(f"{len(report.images) - _ROWS} more images are not shown: --output scores.csv has them all")


def _short(image: Path, root: Path | None) -> str:
    return str(image.relative_to(root)) if root is not None and root.is_dir() else image.name


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

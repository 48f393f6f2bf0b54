"""`pdd adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pdd_cli.console import Console
from pdd_cli.distributed import World
from pdd_cli.errors import Interrupted


def adapt(
    real_dir: Annotated[
        Path | None, typer.Option(help="Folder of real LR images of one source; searched recursively.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Weights to start from: NAME or FILE. [default: realesrgan]")] = None,
    hr_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of sharp HR photographs for the synthetic domain. [default: made from the real images]"
        ),
    ] = None,
    mode: Annotated[
        Literal["ema", "static"] | None,
        typer.Option(help="Generalist: moving average of the specialist, or a second, frozen model. [default: ema]"),
    ] = None,
    generalist: Annotated[str | None, typer.Option(help="The frozen model of --mode static: NAME or FILE.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run and of its weights. [default: the real-dir's name]")
    ] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Where runs are kept. [default: runs]")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. [default: 200]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Synthetic and real crops a step, each, over all processes. [default: 2]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of crops and initial weights. [default: 0]")] = None,
    features: Annotated[
        Literal["auto", "vgg19", "vgg16", "efficientnet-lite0"] | None,
        typer.Option(help="Feature network of the distances. [default: auto: vgg19, else what can be had]"),
    ] = None,
    feature_weights: Annotated[Path | None, typer.Option(help="File with the weights of --features.")] = None,
    intra_weight: Annotated[float | None, typer.Option(help="Weight of the intra-model distance. [default: 1]")] = None,
    inter_weight: Annotated[float | None, typer.Option(help="Weight of the inter-model distance. [default: 1]")] = None,
    val_lr: Annotated[
        Path | None,
        typer.Option(help="LR images whose HR is in --val-hr: true scores are shown, nothing is chosen by them."),
    ] = None,
    val_hr: Annotated[Path | None, typer.Option(help="Ground truth of --val-lr, paired by name.")] = None,
    export: Annotated[
        str | None,
        typer.Option(help="Write the result for other programs, too: pth (BasicSR's form), onnx.", metavar="pth,onnx"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of this name from its checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run and weights of this name.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="[default: auto]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an `adapt:` section. [default: ./pdd.yaml]")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value; repeatable.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate time, memory and disk; write nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Adapt a model to your own real images, without ground truth (Pairwise Distance Distillation).

    Writes runs/NAME/ (settings, log, previews, checkpoint) and registers the weights NAME for `pdd upscale`.
    Ctrl-C saves a checkpoint; `pdd adapt --resume --name NAME` goes on.
    """
    from pdd_cli.commands._adapting import check_name, derived_name, dry_adapt, finish, stored_run, weight_files
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.config import AdaptConfig, given, resolve
    from pdd_cli.weights.fetch import ensure

    console = Console(json=json)
    options: dict[str, object] = {
        "real_dir": real_dir,
        "base": base,
        "hr_dir": hr_dir,
        "generalist.mode": mode,
        "generalist.weights": generalist,
        "name": name,
        "runs_dir": runs_dir,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "features.network": features,
        "features.weights": feature_weights,
        "losses.intra": intra_weight,
        "losses.inter": inter_weight,
        "val_lr": val_lr,
        "val_hr": val_hr,
        "export": tuple(part.strip() for part in export.split(",") if part.strip()) if export else None,
        "device": device,
        "precision": precision,
        "offline": offline,
    }
    stored = None
    if resume:
        folder = stored_run(given(AdaptConfig, "adapt", options=options, overrides=set_ or (), file=config))
        options |= {"runs_dir": folder.path.parent, "name": folder.path.name}
        stored = folder.config if folder.config.exists() else None
    settings = resolve(AdaptConfig, "adapt", options=options, overrides=set_ or (), file=config, stored=stored)

    from pdd_cli.adaptation.estimate import check_places
    from pdd_cli.adaptation.folder import RunFolder
    from pdd_cli.adaptation.loop import train
    from pdd_cli.adaptation.prepare import WeightFiles, check_inputs, memory_errors, prepare_run
    from pdd_cli.adaptation.publish import write_report
    from pdd_cli.interruption import Interruption
    from pdd_cli.runtime import choose_runtime, keep_freed_memory
    from pdd_cli.weights.store import Store

    store = Store.default()
    run_name = settings.name or derived_name(settings.real_dir, console)
    if dry_run:
        dry_adapt(settings, store, console, name=run_name, resume=resume, overwrite=overwrite)
        return
    world = World.from_environment()
    world.share(settings.batch_size)
    runtime = choose_runtime(world.device(settings.device), settings.precision)
    world.join(runtime.device)
    keep_freed_memory()
    if world.is_first:
        check_name(run_name, store, replace=resume or overwrite)
        check_inputs(settings, RunFolder(settings.runs_dir / run_name), resume=resume, overwrite=overwrite)

    def find_weights() -> WeightFiles:
        with fetch_progress(console) as on_event:
            return weight_files(
                settings,
                lambda reference: ensure(reference, store=store, offline=settings.offline, on_event=on_event),
                console.warn,
            )

    weights = world.first_on_machine(find_weights)
    with memory_errors(settings):
        run = prepare_run(
            settings, weights, runtime,
            name=run_name, resume=resume, overwrite=overwrite, notify=console.warn, say=console.say, world=world,
        )  # fmt: skip
    if world.is_first:
        check_places(run, store)
    console.say(
        f"adapting {settings.base} to {len(run.domains.real)} real images as '{run_name}': "
        f"{settings.steps - run.state.step} steps on {runtime}, features of {run.features_name}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )

    interruption = Interruption(
        on_first=lambda: console.say("stopping after this step; press Ctrl-C again to stop at once"),
        on_second=lambda: console.leave(f"stopped at once; {run.resume_command} goes on from the last checkpoint"),
    )
    with console.progress() as progress, interruption:
        task = progress.add_task("adapt", total=settings.steps, completed=run.state.step, note="")
        losses: dict[str, float] = {}
        for report in train(run, interruption.requested):
            losses = report.losses
            if report.event:
                console.warn(report.event)
            shown = "  ".join(
                f"{key} {losses[key]:.3f}"
                for key in ("inter", "intra", "pixel", "perceptual", "adversarial")
                if key in losses
            )
            progress.update(task, completed=report.step, note=shown)
    finished = world.any(run.finished)
    world.leave()
    if not finished:
        if world.is_first:
            write_report(run, None)
        raise Interrupted(
            f"stopped after step {run.state.step} of {settings.steps}; the state is saved in {run.folder.checkpoint}",
            f"To go on: {run.resume_command}",
        )
    if not world.is_first:
        return
    finish(run, store, console, losses)

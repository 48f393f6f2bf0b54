"""`pdd adapt`."""

from __future__ import annotations

import signal
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
    Ctrl-C saves a checkpoint; the same command with --resume goes on.
    """
    from pdd_cli.commands._adapting import check_name, dry_adapt, weight_files
    from pdd_cli.commands._fetching import fetch_progress
    from pdd_cli.config import AdaptConfig, resolve
    from pdd_cli.weights.fetch import ensure

    console = Console(json=json)
    settings = resolve(
        AdaptConfig,
        "adapt",
        options={
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
        },
        overrides=set_ or (),
        file=config,
    )

    from pdd_cli.device import choose_runtime, keep_freed_memory
    from pdd_cli.distillation.rehearsal import check_places
    from pdd_cli.distillation.run import RunFolder, WeightFiles, check_inputs, memory_told, prepare_run
    from pdd_cli.weights.store import Store

    store = Store.default()
    run_name = settings.name or settings.real_dir.resolve().name
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
    with memory_told(settings):
        run = prepare_run(
            settings, weights, runtime,
            name=run_name, resume=resume, overwrite=overwrite, notify=console.warn, world=world,
        )  # fmt: skip
    if world.is_first:
        check_places(run, store)
    console.say(
        f"adapting {settings.base} to {len(run.domains.real)} real images as '{run_name}': "
        f"{settings.steps - run.state.step} steps on {runtime}, features of {run.features_name}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )

    with console.progress() as progress, _Interruption() as interruption:
        task = progress.add_task("adapt", total=settings.steps, completed=run.state.step, note="")
        losses: dict[str, float] = {}
        for report in run.train(interruption.requested):
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
            run.write_report(None)
        raise Interrupted(
            f"stopped after step {run.state.step} of {settings.steps}; the state is saved in {run.folder.checkpoint}",
            "Run the same command with --resume to go on.",
        )
    if not world.is_first:
        return
    if run.state.step < settings.steps:
        console.say(
            f"stopped early after step {run.state.step} of {settings.steps}: the last {settings.early_stopping} "
            "judgements brought nothing better (--resume --set early_stopping=off goes on)"
        )
    with memory_told(settings):
        conclusion = run.conclude()
        verdict = conclusion.verdict
        entry = run.register(store, verdict)
        report_file = run.write_report(conclusion)
        exported = run.export()
    console.say(f"done: report in {report_file}, weights '{run_name}' in {entry.path}")
    for path in exported:
        console.say(f"exported: {path}")
    if verdict.keep:
        console.say(f"verdict: keep. {verdict.reason}")
        strength = f" --strength {verdict.strength:g}" if verdict.strength < 1 else ""
        console.say(f"next: pdd upscale IN OUT --weights {run_name}{strength}")
    else:
        console.warn(f"verdict: reject. {verdict.reason}")
        console.say("Look at the report before you use it. More images of one look, or --hr-dir, may help.")
    if told := conclusion.truth_in_words():
        console.say(told)
    console.result(
        {
            "name": run_name,
            "weights": entry.path,
            "run": run.folder.path,
            "report": report_file,
            "steps": run.state.step,
            "features": run.features_name,
            "losses": losses,
            "verdict": {"keep": verdict.keep, "reason": verdict.reason, "strength": verdict.strength},
            "truth": conclusion.truth_document(),
            "card": entry.card.model_dump(),
        }
    )


class _Interruption:
    """Ctrl-C or SIGTERM asks the run to stop after its step; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _Interruption:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

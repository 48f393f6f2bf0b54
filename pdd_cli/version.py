"""The version of this package, and of others that influence its results."""

__version__ = "0.2.0"


def versions(*packages: str) -> dict[str, str]:
    """The versions of pdd and of those of `packages` that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes 20 ms, which `pdd --help` doesn't need

    found = {"pdd": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

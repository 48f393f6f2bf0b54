"""The exceptions of pdd, each with its exit code."""


class PddError(Exception):
    """A failure that a user can act on.

    `message` says what went wrong and names the file or option; `hint` says what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(PddError):
    """Bad usage, configuration or input."""

    exit_code = 2


class PartialFailure(PddError):  # noqa: N818 - the run did finish
    """The run finished, but some inputs failed. Each of them has already been reported."""

    exit_code = 3


class DownloadError(PddError):
    """A download or its verification failed. Nothing was installed."""

    exit_code = 4


class OutOfMemory(MemoryError):  # noqa: N818 - the name that PyTorch uses
    """The machine or device ran out of memory. `runtime.convert_memory_errors` converts the libraries' errors to it."""


class ResourceError(PddError):
    """Out of memory or disk."""

    exit_code = 5


class CheckFailed(PddError):  # noqa: N818 - the run did finish
    """A requested check does not hold (`pdd evaluate --fail-if-worse`)."""

    exit_code = 6


class Interrupted(PddError):  # noqa: N818 - requested by the user
    """Stopped by Ctrl-C or SIGTERM after the state was saved."""

    exit_code = 130


def package_load_error(error: ImportError) -> InputError:
    """The error for an installed package that can't be imported, usually because a system library is missing."""
    hint = "Install what is missing."
    if "libGL" in str(error):
        hint = (
            "OpenCV needs libraries of a desktop. Install them (Debian: apt install libgl1), or run: "
            "pip install --force-reinstall --no-deps opencv-python-headless"
        )
    return InputError(f"a package cannot be loaded: {error}", hint)

"""The few ways in which pdd fails, each with its exit code."""


class PddError(Exception):
    """A failure that a user can act on: what went wrong, and what to do about it.

    `message` names the file or option; `hint` says what to do. Neither ever holds a traceback.
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
    """The run finished, but some inputs failed; each has been named already."""

    exit_code = 3


class DownloadError(PddError):
    """A download or its verification failed; nothing was installed."""

    exit_code = 4


class OutOfMemory(MemoryError):  # noqa: N818 - as PyTorch's is called
    """The machine or device ran out of memory. `runtime.one_memory_error` raises it for each library's own error."""


class ResourceError(PddError):
    """Out of memory or disk."""

    exit_code = 5


class CheckFailed(PddError):  # noqa: N818 - the run did finish
    """A check that was asked for does not hold (`pdd evaluate --fail-if-worse`)."""

    exit_code = 6


class Interrupted(PddError):  # noqa: N818 - asked for by the user
    """Stopped by Ctrl-C or SIGTERM after the state was saved."""

    exit_code = 130


def unloadable(error: ImportError) -> InputError:
    """What to say of an installed package that does not load: a library of the system is missing, usually."""
    hint = "Install what is missing."
    if "libGL" in str(error):
        hint = (
            "OpenCV looks for a desktop's libraries. Install them (Debian: apt install libgl1), or run: "
            "pip install --force-reinstall --no-deps opencv-python-headless"
        )
    return InputError(f"a package cannot be loaded: {error}", hint)

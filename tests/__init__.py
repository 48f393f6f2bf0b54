"""The test suite. What must hold in the whole process before PyTorch is loaded is set here."""

import signal

from pdd_cli.system import limit_thread_spinning

limit_thread_spinning()
# A program that was started in the background of a shell ignores Ctrl-C, and so do the programs that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

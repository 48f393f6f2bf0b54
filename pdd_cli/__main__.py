"""Runs `pdd` for `python -m pdd_cli`."""

from pdd_cli.cli import main

main()

"""`python -m pdd_cli` is `pdd`."""

from pdd_cli.cli import main

main()

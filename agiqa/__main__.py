"""`python -m agiqa` is the `agiqa` command."""

from agiqa.cli import main

main()

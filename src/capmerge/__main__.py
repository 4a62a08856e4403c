"""`python -m capmerge`, the same as the console script."""

from capmerge.cli.app import main

main()

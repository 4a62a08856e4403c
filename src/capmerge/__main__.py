"""The entry point of `python -m capmerge`, which does what the console script does."""

from capmerge.cli.app import main

main()

"""`python -m capmerge`, the same as the console script."""

from capmerge.cli import main

main()

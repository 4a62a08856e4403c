"""The entry point of the console script `capmerge` and of `python -m capmerge`."""

from capmerge.start import importing

with importing("capmerge: ", "capmerge"):
    from capmerge.cli.app import main

if __name__ == "__main__":
    main()

"""The command line, with one module of options for each command."""

"""The command line: one file of options for each command."""

"""The story of each command, without a command line."""

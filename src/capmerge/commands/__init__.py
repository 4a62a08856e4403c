"""The commands as functions that know no command line, one module for each."""

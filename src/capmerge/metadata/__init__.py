"""A metadata file as a stream of records, read and written by any number of processes."""

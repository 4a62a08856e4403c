"""Bytes in and bytes out: sources, atomic files and folders, locks, and files of arrays."""

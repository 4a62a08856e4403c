"""Bytes in and bytes out: sources, files that appear whole, columns of numbers. No JSON is known here."""

"""Test data and small runs that several tests build."""

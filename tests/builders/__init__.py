"""Builders of test data and of small runs that several tests share."""

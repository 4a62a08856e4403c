"""Rewrite sd-scripts metadata of any size into wildcard-ready captions.

The rooms of this package, floor by floor, are listed in the README; a module imports from lower
floors only.
"""

__version__ = "0.1.0"

"""The paths of the repository, its examples and the golden data."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
EXAMPLE_METADATA = ROOT / "examples" / "meta_lat.json"
EXAMPLE_LATENTS = ROOT / "examples" / "latents"

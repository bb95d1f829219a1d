"""Where the tests find things: the repository, and the data and models that lie beside some checkouts."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # absent for most users; tests that need it skip

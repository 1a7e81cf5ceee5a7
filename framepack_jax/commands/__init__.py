"""Flags -> settings -> one call; files, progress bars and messages."""

import os

# transformers reads tokenizers and configs here, and its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

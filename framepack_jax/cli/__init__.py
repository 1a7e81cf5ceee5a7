"""One file per subcommand: its flags, one call, and the messages of its result."""

import gc
import os

# transformers reads tokenizers and configs here, and its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Imports and tracing make millions of objects that live. With Python's thresholds (700, 10, 10),
# a sixth of the time until the first step goes into looking for garbage among them.
gc.set_threshold(100_000, 20, 20)

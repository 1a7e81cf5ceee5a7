"""One file per subcommand: its flags, one call, and the messages of its result."""

import os

# transformers reads tokenizers and configs here, and its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

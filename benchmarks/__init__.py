"""Commands that measure; the package, imported before PyTorch, sets up the process as always."""

import fourstage  # noqa: F401

"""remetal brings a dead computer back: the same system, on whatever metal is at hand."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's linear algebra is not used: it needs no threads that spin

__version__ = "0.1.0"

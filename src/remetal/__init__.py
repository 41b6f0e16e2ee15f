"""remetal brings a dead computer back: the same system, on whatever metal is at hand."""

__version__ = "0.1.0"

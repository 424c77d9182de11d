"""Lazy tensors, which make any range of their rows on demand, the operations on them, and samples of their values.
Knows no file format."""

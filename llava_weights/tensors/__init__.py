"""A tensor that makes any range of its rows when it is asked, the operations on such tensors, and samples of their values.
Knows no file format."""

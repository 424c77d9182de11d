"""Weight files, bytes to names and back: headers in, tensors out. No pickle is ever executed.
Every reader here takes its input for hostile."""

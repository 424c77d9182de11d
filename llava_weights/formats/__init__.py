"""Weight files: their headers read as lazy tensors, and written. No pickle is ever executed.
Every reader here treats its input as hostile."""

"""Data sets: a module and a function each, from files or a generator to tensors in memory."""

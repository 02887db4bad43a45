"""The kernels; ``legato.ops.backends`` has their table."""

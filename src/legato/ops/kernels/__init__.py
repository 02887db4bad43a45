"""The kernels; ``legato.ops.backends`` holds their table."""

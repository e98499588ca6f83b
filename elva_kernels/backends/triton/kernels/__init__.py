"""The kernels themselves: these files import triton."""

"""Speed, memory and error of the ops, in one run with this machine's ceilings and the rivals.

Run from the repository root after an in-place build (`pip install -e .`): with the working
directory there, Python imports the tree's own elva_kernels.
"""

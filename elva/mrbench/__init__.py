"""MRBench, rebuilt: judges of grains, the sample, and its review by hand."""

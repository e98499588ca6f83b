"""Figures of reliability: what was tried to make elva_kernels and elva go wrong, and how often it
did."""

"""Backends: the same launchers for every device and compiler, and the choice among them."""

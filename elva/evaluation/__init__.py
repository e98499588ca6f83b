"""Evaluation: ranks, figures and grain distances of what was retrieved."""

"""Training: what a stage optimises, on which examples and negatives, and the loop around it."""

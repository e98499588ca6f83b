"""The ops as torch knows them: schemas, kernels, shapes for tracing, gradients."""

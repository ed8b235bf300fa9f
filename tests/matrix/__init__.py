"""Where `DensityLR` can be dropped in, tried: ``python -m tests.matrix`` prints the table."""

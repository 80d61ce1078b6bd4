"""The microbenchmarks: `make bench`."""

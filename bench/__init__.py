"""Measured comparisons with peers: `make bench`."""

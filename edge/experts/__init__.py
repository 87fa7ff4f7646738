"""Experts of a mixture on a device that cannot hold them all: on flash, in a byte budget, read while steps compute."""

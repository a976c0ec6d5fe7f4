"""Simulated data with known causes: every number that comes from here is a number about a simulation."""

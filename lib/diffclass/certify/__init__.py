"""Certificates: votes, bounds, radii."""

"""Stands where NIXL would be."""

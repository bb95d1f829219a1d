"""Measurements of accuracy and speed. Imports the core, never the command line."""

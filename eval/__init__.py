"""Measurements of accuracy and speed; imports the core, never the command line."""

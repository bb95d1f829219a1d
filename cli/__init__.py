"""The command line: one file a command. Each parses, calls one function of the core, and owns the screen."""

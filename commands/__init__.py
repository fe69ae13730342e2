"""The command line: options, one body per verb, and what a terminal shows."""

"""The TCP links between the members of a pipeline."""

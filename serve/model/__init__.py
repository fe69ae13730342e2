"""The transformer, written once for Mixtral and the dense members of its family."""

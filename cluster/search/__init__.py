"""The placement problem free of names: its cost model, and the search for the best route."""

"""One deployment at work: its controller, the agents on its nodes, the actors of its pipeline."""

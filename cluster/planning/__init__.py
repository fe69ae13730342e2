"""The planner: from a model, machines and wishes to a plan, and how it is shown and compared."""

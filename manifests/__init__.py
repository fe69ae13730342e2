"""What a user asks for: the schema, the loader, the catalogue of releases, examples."""

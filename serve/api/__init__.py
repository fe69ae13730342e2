"""The HTTP server: OpenAI's and Mistral's endpoints over one engine."""

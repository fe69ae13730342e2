"""The demo's release: real small weights from a GGUF file, made into a mixture of experts."""

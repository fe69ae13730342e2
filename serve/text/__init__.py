"""Tokenizers, chat formats, and tokens back to text."""

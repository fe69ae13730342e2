"""Tokenizers, chat formats, grammars, and tokens back to text."""

"""Tokens: model, stage, scheduler, sampler, tokenizer and chat, HTTP API."""

"""Requests to steps and back: scheduler, KV blocks, stages and their workers, sampler."""

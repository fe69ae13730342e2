"""Magnetar: from a magnet link to a served Mixture-of-Experts model."""

__version__ = "0.1.0"

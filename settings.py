"""Where things are on this machine and the defaults that more than one room uses."""

import os
from pathlib import Path

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
KV_BLOCK_TOKENS = 16
"""Tokens in one KV block; the planner sizes memory with it and the scheduler hands blocks out."""


def data_dir() -> Path:
    """The folder for everything that lasts: ``$MAGNETAR_HOME``, else the XDG data folder."""
    if home := os.environ.get("MAGNETAR_HOME"):
        return Path(home)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "magnetar"


def default_store() -> Path:
    """The folder that keeps downloaded releases."""
    return data_dir() / "store"

"""The versions of torrents that are made and read."""

from typing import Literal

TorrentFormat = Literal["v1", "v2", "hybrid"]
"""What a torrent has hashes of: pieces of all files (every client reads them), trees of each file,
or both."""

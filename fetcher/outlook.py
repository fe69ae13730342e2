"""What a fetch would do: its files, pieces and bytes, and the room on the disk."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """For one node and what it wants now. Nothing is downloaded to know this."""

    name: str
    info_hash: str | None
    """None for a plain folder, of which nothing is fetched."""
    files: dict[str, int]
    """Files of the release and their sizes in bytes, also those that are wanted in part."""
    piece_length: int
    num_pieces: int
    """Wanted; the release may have more."""
    wanted_bytes: int
    """In whole pieces."""
    missing_bytes: int
    """Of these, what is not on the disk yet."""
    store: Path
    free_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Field names as keys, JSON types only."""
        return asdict(self) | {"store": str(self.store)}

    def table(self) -> str:
        """For people."""
        lines = [f"{name}  {num_bytes:,} bytes" for name, num_bytes in sorted(self.files.items())]
        lines += [
            "",
            f"wanted   {self.wanted_bytes:,} bytes in {self.num_pieces:,} pieces"
            f" of {self.piece_length:,} bytes",
            f"missing  {self.missing_bytes:,} bytes",
            f"free     {self.free_bytes:,} bytes in {self.store}",
        ]
        return "\n".join(lines)

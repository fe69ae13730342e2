"""Amounts as people read them."""


def gigabytes(num_bytes: int) -> str:
    """Decimal gigabytes for people; small amounts in megabytes."""
    if abs(num_bytes) < 1_000_000_000:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def milliseconds(seconds: float) -> str:
    """Three digits; seconds where they are many."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"

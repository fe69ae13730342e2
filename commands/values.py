"""What the values of options may be; argparse turns what is raised here into a usage error."""

import argparse
import re
from collections.abc import Callable
from typing import Literal

from ..errors import UsageError


def positive(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 too."""
    return 0 if text == "0" else positive(text)


def port(text: str) -> int:
    """A TCP port; 0 is any."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port between 0 and 65535")
    return int(text)


def positive_float(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def rate(text: str) -> int:
    """Bytes a second."""
    from ..fetcher.rates import parse_rate

    try:
        return parse_rate(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def duration(text: str) -> float:
    """Seconds above 0."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?([smhd]?)", text.strip())
    seconds = float(match[1]) * {"m": 60, "h": 3600, "d": 86400}.get(match[2], 1) if match else 0
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 30m, 12h or 7d")
    return seconds


def age(text: str) -> float:
    """Seconds, 0 too."""
    return 0.0 if text in ("0", "0s") else duration(text)


def node_limit(text: str) -> tuple[str, int]:
    """A node and bytes of memory."""
    match = re.fullmatch(r"([^=]+)=(\d{1,6}(?:\.\d{1,3})?) ?([MGT])B", text.strip())
    size = round(float(match[2]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[3]]) if match else 0
    if match is None or size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no NODE=SIZE, such as a=24GB")
    return match[1], size


def node_pin(text: str) -> tuple[str, tuple[int, int]]:
    """A node and [first, end) of layers."""
    from ..manifests.placement import layer_range

    node, _, layers = text.strip().partition("=")
    if not node or not layers:
        raise argparse.ArgumentTypeError(f"{text!r} is no NODE=LAYERS, such as a=0-7")
    try:
        return node, layer_range(layers)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def window(text: str) -> int | Literal["none"]:
    """Tokens, or none."""
    return "none" if text == "none" else positive(text)


def checked_by(check: str) -> Callable[[str], str]:
    """A text that this function of `magnet` accepts; it is not needed for `--help`."""

    def checked(text: str) -> str:
        from ..fetcher.torrent import magnet

        try:
            getattr(magnet, check)(text.strip())
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text.strip()

    return checked

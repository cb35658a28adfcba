"""Values on the command line."""

import argparse
import re

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An integer of 0 or more."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"must be an integer of 0 or more, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """Bytes: 16GB, 800MB, 4GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a size such as 16GB or 800MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])

"""Seeds of random draws that follow from a user's seed and from what is drawn, the same in every run."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A seed below 2^56 that differs for any other `parts`."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

"""Random generators seeded by name: the same on every machine, in every process and in any order of construction."""

import hashlib

import torch


def generator_of(key: str) -> torch.Generator:
    """A CPU generator, seeded only by `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

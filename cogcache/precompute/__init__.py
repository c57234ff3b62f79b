"""Stage one: clips and captions to shards, with the frozen VAE and T5. Runs once."""

from cogcache.precompute.encode import EncodeResult, encode, encode_all

__all__ = ["EncodeResult", "encode", "encode_all"]

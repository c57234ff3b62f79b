"""Looking at a cache: a table, JSON, or a gallery in one HTML file. Changes nothing."""

from cogcache.inspect.run import inspect_shards

__all__ = ["inspect_shards"]

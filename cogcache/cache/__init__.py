"""The shards: what they are, and how they are written, read and put in order.

``shards/README.md`` in the repository is the normative specification of the format.

- :mod:`cogcache.cache.format` -- records, fingerprints, names; no I/O
- :mod:`cogcache.cache.files` -- durable files: atomic replace, fsync, locks, journal lines
- :mod:`cogcache.cache.backend` -- what a backend must provide
- :mod:`cogcache.cache.tar` -- the webdataset backend: entries as members of tar files
- :mod:`cogcache.cache.zarr.shard` -- the zarr backend: entries as chunks of sharded zarr v3 arrays
- :mod:`cogcache.cache.shard` -- one shard of any backend: durable appends, recovery, checked reads
- :mod:`cogcache.cache.writer` -- the commit protocol
- :mod:`cogcache.cache.reader` -- indexed, checked reads
- :mod:`cogcache.cache.storage` -- where a reader's bytes come from
- :mod:`cogcache.cache.plan` -- the order of an epoch, a pure function
"""

"""Caches behind a URL: reading them through a local cache, and sending them there from a staging folder."""

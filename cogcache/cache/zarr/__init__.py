"""The zarr backend: sharded arrays of zarr version 3, read and written without the zarr package."""

"""The files of a store, as FORMAT.md specifies them: arrays, item table, manifest, metadata, and their checks."""

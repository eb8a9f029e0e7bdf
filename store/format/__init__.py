"""What a store is on disk, as FORMAT.md says it: layout, arrays, items, listings, and the checks of each."""

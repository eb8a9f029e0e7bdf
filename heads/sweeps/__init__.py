"""Many heads over one store, one after the other or side by side."""

"""A store as one HDF5 file, and back."""

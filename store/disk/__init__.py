"""Files that are whole or absent, and lock files."""

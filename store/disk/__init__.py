"""Files that are whole or absent, durable names, hashes and locks: what every write to a store goes through."""

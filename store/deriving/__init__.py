"""New from old: sketches and other encodings of a store, and labels joined to it."""

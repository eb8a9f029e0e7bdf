"""From a store to padded batches: features and where they are kept, splits, batches."""

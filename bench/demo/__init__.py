"""`agiqa demo`: painted pictures, a tiny model, and the whole way from them to a report."""

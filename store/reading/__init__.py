"""From the files of a store to its rows and items: stored arrays, `Store`, views, unions, summaries."""

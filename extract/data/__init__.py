"""From tables, conversation files and images to items."""

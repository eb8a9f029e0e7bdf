"""What a finished store needs: verification, repair, garbage collection."""

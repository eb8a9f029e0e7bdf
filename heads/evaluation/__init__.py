"""What a trained head is worth: metrics, intervals, comparisons, run folders, prediction."""

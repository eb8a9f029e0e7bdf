"""What predicts MOS without a head: means, rating words, closed-form regressions."""

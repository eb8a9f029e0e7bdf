"""Search over the settings of a head: Optuna proposes trials, and validation items judge them."""

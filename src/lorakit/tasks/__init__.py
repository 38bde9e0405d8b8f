"""Built-in tasks to train and measure on, in pure Python: no model, no torch."""

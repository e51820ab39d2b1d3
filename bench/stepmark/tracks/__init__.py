"""One module per track: its tasks, inputs, metrics and shared algorithms."""

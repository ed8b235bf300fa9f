"""Other people's training loops and loggers, one module each; nothing is imported before it is."""

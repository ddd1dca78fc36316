"""The loop and what it keeps: state, learning rate, averages, metrics, checkpoints."""

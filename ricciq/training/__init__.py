"""The training loop, its step, losses, schedule and state; and learned rounding."""

"""What observing a large store costs the scheduler."""

"""What lies where: pages, frames and sinks, a step's writes, and its plan."""

"""What the fleet tools say about published traces and figures."""

"""Training: the table of stages, the loop, its losses, its log, and the rivals' soft prompts."""

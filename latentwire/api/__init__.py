"""The wire in use: encode here, send bytes, answer there."""

"""What is trained and sent: encoders, adapters, the closed form that both start from, the wire, checkpoints."""

"""What more of everything would take, computed from shapes and from measured figures."""

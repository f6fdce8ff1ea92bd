"""Data sets: what is asked, where it comes from, and how an answer to it is scored."""

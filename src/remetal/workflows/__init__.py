"""What a person asks for, from start to end. Each module reads like a table of contents."""

"""A volume's content as a map of chunks: which blocks are used, reading them, writing them back."""

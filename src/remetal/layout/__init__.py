"""The graph of a machine's disks and layers: probe it, plan it onto other disks, apply it."""

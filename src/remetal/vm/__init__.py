"""Virtual machines: what a machine is made of, its firmware, serial console and monitor, and running it."""

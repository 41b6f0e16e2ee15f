"""The kernels of an installed system: what they can drive, what their initramfs holds, and whether they boot here."""

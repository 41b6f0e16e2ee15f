"""The lab for storage stacks: described machines are built, captured, restored onto other disks, and compared.

`model` says what a stack is, `catalog` holds them all, one module per kind of layer knows the standard tools for it,
`guest` runs inside User Mode Linux, and `run` drives the whole from outside.
"""

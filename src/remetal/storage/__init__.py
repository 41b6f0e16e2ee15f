"""Objects by name: one contract, one file per kind of store, wrappers on the same contract."""

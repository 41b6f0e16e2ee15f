"""The repository: encrypted chunks, signed snapshots and keys, in any store. Formats: docs/format/."""

"""Pure parsers and writers of on-disk structures. Bytes in, bytes out: nothing here opens a file or a device."""

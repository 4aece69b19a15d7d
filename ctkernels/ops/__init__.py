"""The ops: one folder each, on shared machinery (registration, backends, layout, checks), one file each."""

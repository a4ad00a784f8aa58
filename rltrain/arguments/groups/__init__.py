"""The groups of the configuration, one file each: the flags, and which of their values fit together."""

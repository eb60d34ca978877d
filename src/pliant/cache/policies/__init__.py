"""KV policies, one file each; a file's docstring names its paper. See pliant.cache.policy."""

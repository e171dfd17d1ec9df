"""Check another implementation against the definitions: see README.md in this folder."""

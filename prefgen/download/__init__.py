"""Fetching named, pinned and checksummed sets of files, when somebody asks for them by a command."""

"""Flags, folders, devices, processes, optimisers: what all that can be run shares."""

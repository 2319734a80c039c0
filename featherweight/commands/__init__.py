"""The commands of `featherweight`: each parses, calls the library and prints."""

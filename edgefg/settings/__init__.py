"""Settings of every stage as plain data; the command line is generated from them. No torch."""

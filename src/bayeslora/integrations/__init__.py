"""Other tools on a posterior: the LM evaluation harness, servers of plain adapters, and our own server."""

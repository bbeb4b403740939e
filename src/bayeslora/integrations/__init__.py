"""Other libraries, answered by a posterior: the evaluation harness, and servers of plain adapters."""

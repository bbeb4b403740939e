"""Other libraries' evaluations and loggers, answered by a posterior."""

"""Several methods on one task: runs that are kept, costs, tables, significance, pictures."""

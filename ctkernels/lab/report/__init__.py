"""One HTML page from the results of any protocol."""

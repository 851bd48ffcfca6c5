"""What came out, on one page: tables, curves and pictures."""

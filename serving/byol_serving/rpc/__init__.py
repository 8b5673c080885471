"""The gRPC surface: servicers, the table of status codes, and the wrapper around every call."""
